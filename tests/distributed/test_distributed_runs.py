"""`groundup pretrain` under torchrun: as one process trains, exact after a kill, resumable by other numbers of them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import small_runs
from small_runs import finish, losses, start, wait_for

TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.write_corpus(tmp_path_factory.mktemp("corpus"), 900)


def command(text: Path, out: Path, processes: int, **over: object) -> list[str]:
    options = {
        "max-steps": 30, "n-layer": 2, "micro-batch": 2, "optimizer": "adamw", "learning-rate": 0.01,
        "rank-timeout": 60, "compile": "false",
    }  # fmt: skip
    return small_runs.command("pretrain", text, out, processes=processes, **options | over)


def start_and_kill(words: list[str], out: Path, step: int) -> None:
    """Start a run in a group of its own and kill all of its processes once it has logged ``step`` steps."""
    process = start(words, start_new_session=True)
    wait_for(process, out, step)
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
    assert near(losses(whole), losses(alone)) < TOLERANCE
    assert near(losses(whole, "eval"), losses(alone, "eval")) < TOLERANCE
    moment = random.Random(time.time_ns()).randint(8, 28)
    start_and_kill(command(text, broken, processes, parallel=way), broken, moment)
    finish(command(text, broken, processes, parallel=way))
    assert losses(broken) == losses(whole), f"killed at step {moment}"
    assert losses(broken, "eval") == losses(whole, "eval"), f"killed at step {moment}"


@pytest.mark.slow
def test_saved_by_four_it_goes_on_with_one_and_with_two(text: Path, alone: Path, tmp_path: Path) -> None:
    out, reference = tmp_path / "run", tmp_path / "reference"
    # The schedule must not depend on how far each sitting goes, nor dropout on how many sequences pass at once.
    same = {"decay-fraction": 0, "warmup-steps": 3, "dropout": 0.0}
    finish(command(text, out, 4, parallel="fsdp", **same | {"micro-batch": 1, "max-steps": 14}))
    finish(command(text, out, 1, **same | {"micro-batch": 2, "max-steps": 22}))
    finish(command(text, out, 2, parallel="ddp", **same | {"micro-batch": 1}))
    finish(command(text, reference, 1, **same))
    assert near(losses(out), losses(reference)) < 20 * TOLERANCE
    assert len(losses(out)) == 30


@pytest.mark.slow
def test_a_rank_that_dies_is_named_and_torchrun_starts_again_from_the_checkpoint(
    text: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = command(text, out, 2)
    at = words.index("--standalone")
    words[at:at] = ["--max-restarts=1"]
    process = start(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    wait_for(process, out, 9)
    os.kill(_rank(process.pid, 1), signal.SIGKILL)
    said, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    assert "lost touch with rank 1" in errors
    assert "Resuming from" in said
    assert near(losses(out), losses(alone)) < TOLERANCE


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_when_the_time_is_up(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = command(text, out, 2, **{"rank-timeout": 5, "max-steps": 4000})
    process = start(words, stderr=subprocess.PIPE, start_new_session=True)
    wait_for(process, out, 9)
    os.kill(_rank(process.pid, 1), signal.SIGSTOP)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "lost touch with rank 1" in errors
    assert "the same command goes on from the last checkpoint" in errors


@pytest.mark.slow
def test_a_full_disk_during_a_save_stops_nothing(text: Path, tmp_path: Path, small_disk: Callable[[str], Path]) -> None:
    disk, out = small_disk("size=40m"), tmp_path / "run"
    out.mkdir()
    (out / "checkpoints").symlink_to(disk, target_is_directory=True)
    words = command(text, out, 2, parallel="fsdp", **{"max-steps": 200, "save-every": 25})
    process = start(words, stderr=subprocess.PIPE, start_new_session=True)
    wait_for(process, out, 40)
    before = sorted(path.name for path in disk.glob("step-*"))
    with suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    wait_for(process, out, 110)
    assert {path.name for path in disk.glob("step-*")} >= set(before)
    (disk / "filler").unlink()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]
    assert "no space left on the disk" in errors
    assert "This checkpoint was not saved; earlier ones stay." in " ".join(errors.split())
    assert len(losses(out)) == 200
    assert os.readlink(disk / "latest") == "step-000200"


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
