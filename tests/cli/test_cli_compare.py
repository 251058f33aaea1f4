"""``groundup compare``: the tables, the page, and every mistake in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs, of which the second is the better."""
    made = []
    for name, layers in (("one", 3), ("other", 5)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        rows = [
            {"kind": kind, "step": step, "tokens": 11 * step, "seconds": step, "loss": 5.0 - step / layers}
            for step in (1, 2, 3)
            for kind in ("train", "eval")
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "recipe.yaml").write_text(f"out: {folder}\nmodel:\n  n_layer: {layers}\n")
        made.append(folder)
    return made


def test_tables_of_figures_and_differences(run: Callable[..., Any], runs: list[Path]) -> None:
    said = run("compare", *runs)
    assert (said.code, said.err) == (0, "")
    lines = [line.split() for line in said.out.splitlines()]
    assert ["one", "other"] in lines
    assert ["held-out", "loss,", "nats", "per", "token:", "best", "4.000", "4.400"] in lines
    assert ["model.n_layer", "3", "5"] in lines
    assert "whether bits per byte compare cannot be told" in said.out
    assert "out" not in [line[0] for line in lines if line]


@pytest.mark.parametrize("place", ["before", "between", "after", "equals"])
def test_a_page_wherever_the_flag_stands(place: str, run: Callable[..., Any], runs: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    words = {
        "before": ["--out", page, *runs],
        "between": [runs[0], "--out", page, runs[1]],
        "after": [*runs, "--out", page],
        "equals": [f"--out={page}", *runs],
    }[place]
    said = run("compare", *words)
    assert (said.code, said.err) == (0, "")
    assert said.out.splitlines()[-1] == f"Page: {page}"
    assert page.read_text().count("<svg") == 3


def test_more_than_two(run: Callable[..., Any], runs: list[Path], tmp_path: Path) -> None:
    third, fourth = (shutil.copytree(runs[0], tmp_path / name) for name in ('a, [b]: "c"', "d"))
    for words in ([*runs, third, fourth], [*runs, "--more", json.dumps([str(third), str(fourth)])]):
        said = run("compare", *words)
        assert (said.code, said.err) == (0, "")
        assert ["steps", "3", "3", "3", "3"] in [line.split() for line in said.out.splitlines()]
        assert third.name in said.out


def test_runs_with_odd_names(run: Callable[..., Any], runs: list[Path]) -> None:
    odd = runs[0].rename(runs[0].with_name("a, [b]: 'c' \"d\" #é"))
    said = run("compare", odd, runs[1])
    assert said.code == 0
    assert odd.name in said.out


def test_equal_recipes_are_told(run: Callable[..., Any], runs: list[Path]) -> None:
    (runs[1] / "recipe.yaml").write_text((runs[0] / "recipe.yaml").read_text())
    assert "The recipes say the same." in run("compare", *runs).out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "compare: the following arguments are required: run, other. See --help."),
        (["."], 2, "compare: the following arguments are required: other. See --help."),
        ([".", "."], 2, ".: this run is named twice."),
        (["nowhere", "nobody"], 1, "nowhere: there is no run here."),
        ([".", "nowhere"], 1, "neither metrics.jsonl nor evaluation.json"),
        (["a", "b", "--page", "c"], 2, "--page is not a known flag."),
        (["a", "b", "--out"], 2, "compare: --out needs a value: text"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], code: int, message: str, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = run("compare", *words)
    assert said.code == code
    assert message in said.line
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []
