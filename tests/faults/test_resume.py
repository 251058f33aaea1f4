"""A run that is killed at any moment resumes as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 60 kB of text with some order in it."""
    chooser = random.Random(11)
    words = str.split("a model learns what comes next from what came before and a run resumes where it stopped")
    lines = [" ".join(chooser.choices(words, k=chooser.randint(4, 11))) + "." for _ in range(1300)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(lines))
    return path


def command(text: Path, out: Path, precision: str = "float32") -> list[str]:
    flags = {
        "data": text, "out": out, "max-steps": 60, "save-every": 7, "log-every": 1, "seed": 5, "depth": 2,
        "n-embd": 48, "n-head": 3, "tokenizer.vocab-size": 300, "context-length": 32, "batch-tokens": 256,
        "micro-batch": 4,
        "dropout": 0.1, "precision": precision, "attention": "explicit", "device": "cpu", "sample.max-tokens": 5,
    }  # fmt: skip
    return [sys.executable, "-m", "groundup", "demo", *(f"--{key}={value}" for key, value in flags.items())]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def losses(out: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]


def held_out(out: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "eval"]


def finish(words: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def steps_so_far(out: Path) -> int:
    try:
        return (out / "metrics.jsonl").read_text().count('"train"')
    except OSError:
        return 0


def run_until(words: list[str], out: Path, step: int, number: int) -> int:
    """Start the run, send the signal once it has logged ``step`` more steps, and return its exit code."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    deadline = time.monotonic() + 120
    while steps_so_far(out) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert steps_so_far(out) >= step
    process.send_signal(number)
    return process.wait(timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_killed_three_times_it_ends_with_the_same_bits(text: Path, tmp_path: Path, precision: str) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(command(text, whole, precision))
    chooser = random.Random(time.time_ns())
    moments = sorted(chooser.sample(range(1, 58), 3))
    for moment in moments:
        code = run_until(command(text, broken, precision), broken, moment, signal.SIGKILL)
        assert code == -signal.SIGKILL, f"the run ended by itself before step {moment}"
    resumed = finish(command(text, broken, precision))
    assert losses(broken) == losses(whole), f"killed at steps {moments}"
    assert held_out(broken) == held_out(whole)
    assert (moments[-1] < 8) or "Resuming from" in resumed.stdout
    weights = [out / "checkpoints" / "latest" / "model.safetensors" for out in (whole, broken)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_says_so_and_goes_on_later(text: Path, tmp_path: Path, number: int) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(command(text, whole))
    run_until(command(text, stopped), stopped, 24, number)
    latest = os.readlink(stopped / "checkpoints" / "latest")
    assert int(latest.removeprefix("step-")) >= 24  # it saved where it was, not at the last multiple of 7
    finish(command(text, stopped))
    assert losses(stopped) == losses(whole)


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again_and_another_model_is_refused(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finish(command(text, out))
    before = (out / "metrics.jsonl").read_bytes()
    again = finish(command(text, out))
    assert "Report:" in again.stdout
    assert (out / "metrics.jsonl").read_bytes() == before

    other = subprocess.run([*command(text, out), "--n-layer=3"], capture_output=True, text=True, env=environment())
    assert other.returncode == 2
    assert "model.n_layer = 2, the command says 3" in other.stderr
    assert "Traceback" not in other.stderr
    refused = subprocess.run([*command(text, out), "--resume=false"], capture_output=True, text=True, env=environment())
    assert refused.returncode == 2
    assert "already holds a run" in refused.stderr
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_more_steps_extend_a_finished_run(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [word for word in command(text, out) if not word.startswith("--max-steps")]
    finish([*words, "--max-steps=20"])
    measured = json.loads((out / "evaluation.json").read_text())["rows"][0]["bits_per_byte"]
    longer = finish([*words, "--max-steps=30"])
    assert "max_steps: was 20, now 30" in longer.stdout
    assert losses(out)[-1][0] == 30
    # Measured anew, not left over from the shorter run.
    assert json.loads((out / "evaluation.json").read_text())["rows"][0]["bits_per_byte"] != measured


@pytest.mark.slow
def test_a_run_that_never_saved_gives_way_to_another(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    late = [word for word in command(text, out) if not word.startswith("--save-every")] + ["--save-every=1000"]
    assert run_until(late, out, 3, signal.SIGKILL) == -signal.SIGKILL
    assert (out / "recipe.yaml").exists()
    other = finish([*command(text, out), "--n-layer=1", "--seed=6"])
    assert "Report:" in other.stdout
    assert json.loads((out / "checkpoints" / "latest" / "config.json").read_text())["num_hidden_layers"] == 1


@pytest.mark.slow
def test_a_second_process_in_the_same_folder_is_refused_and_disturbs_nothing(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [*(word for word in command(text, out) if "max-steps" not in word), "--max-steps=400"]
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment())
    deadline = time.monotonic() + 120
    while steps_so_far(out) < 10 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    second = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=120)
    assert second.returncode == 1
    assert "another process is working here" in second.stderr
    assert first.wait(timeout=240) == 0, first.stderr
    assert losses(out)[-1][0] == 400
