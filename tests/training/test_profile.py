"""A profile of some steps: of which, written where, and what happens to a run that ends or goes back among them."""

from __future__ import annotations

import gzip
import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from groundup.runtime import UsageError
from groundup.training.profile import StepProfiler, parse_steps


@pytest.mark.parametrize(("text", "steps"), [("10:15", (10, 15)), ("7", (7, 7)), (" 1 : 1 ", (1, 1)), ("3:3", (3, 3))])
def test_steps_are_read(text: str, steps: tuple[int, int]) -> None:
    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["", "ten", "1:2:3", ":5", "5:", "-1:5", "1.5:2", "1:2x", "١:٢", "9" * 40])
def test_what_cannot_be_read_is_one_line(text: str) -> None:
    with pytest.raises(
        UsageError, match=r"profile = .* should be the first and the last step to look at, such as 10:15"
    ):
        parse_steps(text)


@pytest.mark.parametrize("text", ["15:10", "0:3", "0"])
def test_steps_that_cannot_be(text: str) -> None:
    with pytest.raises(UsageError, match="steps count from 1"):
        parse_steps(text)


def train(steps: str | None, run: Path, made: list[int], *, position: int = 0) -> None:
    """Make the steps ``made``; each multiplies matrices as often as its number says."""
    matrix = torch.randn(13, 13)
    with StepProfiler(steps, run, position=position) as profiler:
        for step in made:
            for _ in range(step):
                matrix @ matrix
            profiler.step(step)


def products(run: Path, name: str) -> int:
    with gzip.open(run / "profile" / f"{name}.json.gz") as file:
        events = json.load(file)["traceEvents"]
    return sum(event.get("name") == "aten::mm" for event in events)


def written(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "profile").iterdir()) if (run / "profile").exists() else []


@pytest.mark.parametrize(
    ("steps", "expected"), [("3:5", 3 + 4 + 5), ("1:2", 1 + 2), ("2", 2), ("1", 1), ("6:7", 6 + 7), ("7", 7)]
)
def test_exactly_the_steps_that_were_asked_for(
    steps: str, expected: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(steps, tmp_path, [1, 2, 3, 4, 5, 6, 7])
    first, last = parse_steps(steps)
    name = f"step-{first}-{last}"
    assert written(tmp_path) == [f"{name}.json.gz", f"{name}.txt"]
    assert products(tmp_path, name) == expected
    table = (tmp_path / "profile" / f"{name}.txt").read_text()
    assert table.startswith(f"{name}: {last - first + 1} steps watched, ")
    assert "aten::mm" in table
    assert f"{name}.txt" in "".join(capsys.readouterr().out.split())


def test_off_there_is_nothing(tmp_path: Path) -> None:
    train(None, tmp_path, [1, 2, 3])
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_resumes_among_the_steps_watches_the_rest(tmp_path: Path) -> None:
    train("3:6", tmp_path, [5, 6, 7], position=4)
    assert products(tmp_path, "step-5-6") == 5 + 6


def test_a_run_that_resumes_behind_them_watches_nothing(tmp_path: Path) -> None:
    train("3:6", tmp_path, [7, 8], position=6)
    assert written(tmp_path) == []


def test_a_run_that_ends_among_the_steps_keeps_what_it_saw(tmp_path: Path) -> None:
    train("3:600", tmp_path, [1, 2, 3, 4])
    assert products(tmp_path, "step-3-4") == 3 + 4
    train("20:30", tmp_path / "early", [1, 2])
    assert written(tmp_path / "early") == []


def test_a_run_that_fails_still_ends_the_profiler(tmp_path: Path) -> None:
    with suppress(ZeroDivisionError), StepProfiler("1:9", tmp_path) as profiler:
        profiler.step(1)
        raise ZeroDivisionError
    assert written(tmp_path) == ["step-1-1.json.gz", "step-1-1.txt"]
    train("2", tmp_path, [1, 2])  # only one profiler may run: it would fail if the other still did
    assert "step-2-2.txt" in written(tmp_path)


def test_a_run_that_goes_back_keeps_what_was_seen_before(tmp_path: Path) -> None:
    train("3:600", tmp_path, [1, 2, 3, 4, 2, 3, 4])
    assert written(tmp_path) == ["step-3-4.json.gz", "step-3-4.txt"]


def test_a_folder_that_cannot_be_written_costs_the_profile_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile").write_text("a file")
    train("1:2", tmp_path, [1, 2, 3])
    assert "the profile is lost; the run goes on" in capsys.readouterr().err
