"""A run that is killed at any moment resumes as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

import small_runs
from small_runs import ENVIRONMENT, finish, losses, start, wait_for


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.write_corpus(tmp_path_factory.mktemp("corpus"), 1300)


def command(text: Path, out: Path, **options: object) -> list[str]:
    return small_runs.command("demo", text, out, **{"max-steps": 60, "depth": 2, "micro-batch": 4} | options)


def run_until(words: list[str], out: Path, step: int, number: int) -> int:
    """Start the run, send the signal once it has logged ``step`` steps, and return its exit code."""
    process = start(words)
    wait_for(process, out, step)
    process.send_signal(number)
    return process.wait(timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "options"), [(20, {"save-every": 3}), (3, {"precision": "bfloat16"})])
def test_killed_at_random_moments_it_ends_with_the_same_bits(
    text: Path, tmp_path: Path, kills: int, options: dict[str, object]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(command(text, whole, **options))
    chooser = random.Random(time.time_ns())
    moments = sorted(chooser.sample(range(1, 58), kills))
    for moment in moments:
        code = run_until(command(text, broken, **options), broken, moment, signal.SIGKILL)
        assert code == -signal.SIGKILL, f"the run ended by itself before step {moment}"
    resumed = finish(command(text, broken, **options))
    assert losses(broken) == losses(whole), f"killed at steps {moments}"
    assert losses(broken, "eval") == losses(whole, "eval")
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

    other = subprocess.run([*command(text, out), "--n-layer=3"], capture_output=True, text=True, env=ENVIRONMENT)
    assert other.returncode == 2
    assert "model.n_layer = 2, the command says 3" in other.stderr
    assert "Traceback" not in other.stderr
    refused = subprocess.run([*command(text, out), "--resume=false"], capture_output=True, text=True, env=ENVIRONMENT)
    assert refused.returncode == 2
    assert "already holds a run" in refused.stderr
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_more_steps_extend_a_finished_run(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finish(command(text, out, **{"max-steps": 20}))
    measured = json.loads((out / "evaluation.json").read_text())["rows"][0]["bits_per_byte"]
    longer = finish(command(text, out, **{"max-steps": 30}))
    assert "max_steps: was 20, now 30" in longer.stdout
    assert losses(out)[-1][0] == 30
    # Measured anew, not left over from the shorter run.
    assert json.loads((out / "evaluation.json").read_text())["rows"][0]["bits_per_byte"] != measured


@pytest.mark.slow
def test_a_run_that_never_saved_gives_way_to_another(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run_until(command(text, out, **{"save-every": 1000}), out, 3, signal.SIGKILL) == -signal.SIGKILL
    assert (out / "recipe.yaml").exists()
    other = finish([*command(text, out), "--n-layer=1", "--seed=6"])
    assert "Report:" in other.stdout
    assert json.loads((out / "checkpoints" / "latest" / "config.json").read_text())["num_hidden_layers"] == 1


@pytest.mark.slow
def test_a_second_process_in_the_same_folder_is_refused_and_disturbs_nothing(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = command(text, out, **{"max-steps": 400})
    first = start(words, stderr=subprocess.PIPE)
    wait_for(first, out, 10)
    second = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert second.returncode == 1
    assert "another process is working here" in second.stderr
    assert first.wait(timeout=240) == 0, first.stderr
    assert losses(out)[-1][0] == 400
