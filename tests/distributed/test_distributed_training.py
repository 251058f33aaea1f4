"""Two and four processes give the losses of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from train_worker import CASES

WORKER = Path(__file__).with_name("train_worker.py")
TOLERANCE = 2e-6


def torchrun(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def trained(processes: int, way: str, out: Path) -> dict[str, Any]:
    words = [*torchrun(processes), str(WORKER), str(out), way]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trained(1, "none", tmp_path_factory.mktemp("alone") / "found.json")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "way"), [(2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")])
def test_several_processes_give_the_losses_of_one(
    alone: dict[str, Any], tmp_path: Path, processes: int, way: str
) -> None:
    together = trained(processes, way, tmp_path / "found.json")
    assert set(together) == set(CASES)
    for name, found in together.items():
        expected = alone[name]
        worst = max(abs(a[0] - b[0]) for a, b in zip(found["rows"], expected["rows"], strict=True))
        print(f"{name}: {worst:.1e}")
        # Which experts a token goes to is decided by near ties, and their balance is counted over each rank's tokens.
        assert worst < TOLERANCE, name
        # Biases of keys change nothing, so that their gradients are rounding alone, which AdamW makes as large as any.
        assert found["weights"] == pytest.approx(expected["weights"], rel=2e-5, abs=1e-3), name
        assert found["logits"] == pytest.approx(expected["logits"], rel=1e-4), name
