"""`groundup pretrain` under torchrun: as one process trains, exact after a kill, resumable by other numbers of them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chooser = random.Random(11)
    words = str.split("a model learns what comes next from what came before and a run resumes where it stopped")
    lines = [" ".join(chooser.choices(words, k=chooser.randint(4, 11))) + "." for _ in range(900)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(lines))
    return path


def command(text: Path, out: Path, processes: int, **over: object) -> list[str]:
    flags = {
        "data": text, "out": out, "max-steps": 30, "save-every": 7, "log-every": 1, "seed": 5,
        "n-layer": 2, "n-embd": 48, "n-head": 3, "tokenizer.vocab-size": 300, "context-length": 32,
        "batch-tokens": 256, "micro-batch": 2, "dropout": 0.1, "precision": "float32", "attention": "explicit",
        "device": "cpu", "sample.max-tokens": 5, "optimizer": "adamw", "learning-rate": 0.01, "rank-timeout": 60,
        "compile": "false",
        **over,
    }  # fmt: skip
    words = [f"--{key}={value}" for key, value in flags.items()]
    if processes == 1:
        return [sys.executable, "-m", "groundup", "pretrain", *words]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "groundup"]
    return [sys.executable, *launch, "pretrain", *words]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def finish(words: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def rows(out: Path, kind: str) -> list[tuple[int, float]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in found if row["kind"] == kind]


def steps_so_far(out: Path) -> int:
    try:
        return (out / "metrics.jsonl").read_text().count('"train"')
    except OSError:
        return 0


def start_and_kill(words: list[str], out: Path, step: int) -> None:
    """Start a run in a group of its own and kill all of its processes once it has logged ``step`` steps."""
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(), start_new_session=True
    )
    deadline = time.monotonic() + 120
    while steps_so_far(out) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert steps_so_far(out) >= step
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)


def near(one: list[tuple[int, float]], other: list[tuple[int, float]]) -> float:
    assert [step for step, _ in one] == [step for step, _ in other]
    return max(abs(a - b) for (_, a), (_, b) in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    finish(command(text, out, 1))
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "way"), [(2, "ddp"), (2, "fsdp")])
def test_two_processes_train_as_one_does_and_a_kill_changes_no_bit(
    text: Path, alone: Path, tmp_path: Path, processes: int, way: str
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(command(text, whole, processes, parallel=way))
    assert near(rows(whole, "train"), rows(alone, "train")) < TOLERANCE
    assert near(rows(whole, "eval"), rows(alone, "eval")) < TOLERANCE
    moment = random.Random(time.time_ns()).randint(8, 28)
    start_and_kill(command(text, broken, processes, parallel=way), broken, moment)
    finish(command(text, broken, processes, parallel=way))
    assert rows(broken, "train") == rows(whole, "train"), f"killed at step {moment}"
    assert rows(broken, "eval") == rows(whole, "eval"), f"killed at step {moment}"


@pytest.mark.slow
def test_saved_by_four_it_goes_on_with_one_and_with_two(text: Path, alone: Path, tmp_path: Path) -> None:
    out, reference = tmp_path / "run", tmp_path / "reference"
    # The schedule must not depend on how far each sitting goes, nor dropout on how many sequences pass at once.
    same = {"decay-fraction": 0, "warmup-steps": 3, "dropout": 0.0}
    finish(command(text, out, 4, parallel="fsdp", **same | {"micro-batch": 1, "max-steps": 14}))
    finish(command(text, out, 1, **same | {"micro-batch": 2, "max-steps": 22}))
    finish(command(text, out, 2, parallel="ddp", **same | {"micro-batch": 1}))
    finish(command(text, reference, 1, **same))
    assert near(rows(out, "train"), rows(reference, "train")) < 20 * TOLERANCE
    assert len(rows(out, "train")) == 30


@pytest.mark.slow
def test_a_rank_that_dies_is_named_and_torchrun_starts_again_from_the_checkpoint(
    text: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = command(text, out, 2)
    at = words.index("--standalone")
    process = subprocess.Popen(
        [*words[:at], "--max-restarts=1", *words[at:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(), start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while steps_so_far(out) < 9 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(_rank(process.pid, 1), signal.SIGKILL)
    said, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    assert "lost touch with rank 1" in errors
    assert "Resuming from" in said
    assert rows(out, "train") == rows(out, "train")
    assert near(rows(out, "train"), rows(alone, "train")) < TOLERANCE


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_when_the_time_is_up(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(text, out, 2, **{"rank-timeout": 5, "max-steps": 4000}), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while steps_so_far(out) < 9 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(_rank(process.pid, 1), signal.SIGSTOP)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "lost touch with rank 1" in errors
    assert "the same command goes on from the last checkpoint" in errors


def _rank(launcher: int, rank: int) -> int:
    """The process of a rank among those that torchrun has started."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if parent == launcher and f"RANK={rank}".encode() in variables:
            return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")
