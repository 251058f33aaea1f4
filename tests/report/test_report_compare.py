"""Runs side by side: their figures, which of them may be compared, and in what the recipes differ."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_report_html import Page

from groundup.report import MetricsWriter, compare_runs, figures_of_runs, write_comparison
from groundup.report.compare import Comparison, letters
from groundup.report.compare_page import _range, draw_comparison
from groundup.runtime import GroundupError, UsageError, write_json

RECIPE = """data: {data}
out: {out}
eval_tokens: 65536
model:
  n_layer: {layers}  # by the text's size
  context_length: 64
optim:
  learning_rate: {rate}
"""


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """A run of so many layers, with this held-out text and tokenizer."""

    def run(name: str, *, layers: int = 4, text: str = "held out", tokenizer: str = "t1", rate: str = "3e-4") -> Path:
        path = tmp_path / name
        with MetricsWriter(path / "metrics.jsonl") as metrics:
            for step in range(1, 31):
                loss = 3 + 6 * math.exp(-step / 9) - layers / 10
                row = {"step": step, "tokens": 512 * step, "seconds": 0.5 * step, "loss": loss}
                row["bits_per_byte"] = loss / 2
                metrics.write({"kind": "train", **row, "tokens_per_second": 1000.0 * layers, "memory_bytes": 10**9})
                if step % 10 == 0:
                    metrics.write({"kind": "eval", **row, "loss": loss + (step == 30)})
        (path / "recipe.yaml").write_text(RECIPE.format(data="text.txt", out=path, layers=layers, rate=rate))
        plan = {"section": "cost", "key": "parameters", "value": f"{layers}.5M", "why": "counted"}
        write_json(path / "plan.json", {"rows": [plan]})
        row = {"name": "this model", "kind": "model", "bits_per_byte": 1.5 - layers / 100}
        write_json(path / "evaluation.json", {"val_bytes": 99, "rows": [row]})
        prepared(path / "data", text, tokenizer)
        return path

    return run


def prepared(folder: Path, text: str, tokenizer: str) -> None:
    (folder / "val").mkdir(parents=True)
    with gzip.open(folder / "val" / "documents.jsonl.gz", "wb") as file:
        for number, line in enumerate(text.split()):
            file.write(json.dumps({"name": f"d{number}", "text": line}).encode() + b"\n")
    shards = [{"file": "0.bin", "sha256": f"{text} {tokenizer}"}]
    write_json(folder / "val" / "manifest.json", {"tokenizer": tokenizer, "shards": shards})


def figures(comparison: Comparison) -> dict[str, tuple[list[str], int | None]]:
    return {row.name: (row.cells, row.best) for row in comparison.figures}


def test_figures_of_comparable_runs(make: Callable[..., Path]) -> None:
    found = compare_runs([make("small", layers=4), make("large", layers=7)])
    assert [run.name for run in found.runs] == ["small", "large"]
    assert (found.same_text, found.same_tokenizer, found.notes) == (True, True, [])
    told = figures(found)
    assert told["bits per byte, all held-out text"] == (["1.460", "1.430"], 1)
    losses = [[3 + 6 * math.exp(-step / 9) - layers / 10 for step in (10, 20, 30)] for layers in (4, 7)]
    assert told["held-out loss, nats per token: best"] == ([f"{one[1]:.3f}" for one in losses], 1)
    assert told["held-out loss, nats per token: last"] == ([f"{one[2] + 1:.3f}" for one in losses], 1)
    assert told["bits per byte, on the way: best"] == ([f"{one[2] / 2:.3f}" for one in losses], 1)
    assert told["parameters"] == (["4.5M", "7.5M"], None)
    assert told["steps"] == (["30", "30"], None)
    assert told["training tokens"] == (["15.4k", "15.4k"], None)
    assert told["time in the loop"] == (["15 s", "15 s"], None)
    assert told["tokens/s, median"] == (["4k", "7k"], None)
    assert told["peak memory"] == (["1.00 GB", "1.00 GB"], None)
    assert told["held-out text"] == told["tokenizer"] == (["A", "A"], None)
    assert "energy" not in told  # nobody measured it
    assert [(row.name, row.cells) for row in found.differences] == [("model.n_layer", ["4", "7"])]


def test_the_same_number_written_otherwise_is_no_difference(make: Callable[..., Path]) -> None:
    same = compare_runs([make("a", rate="3e-4"), make("b", rate="0.0003")])
    assert same.differences == []
    other = compare_runs([make("c", rate="3e-4"), make("d", rate="0.00030001")])
    (row,) = other.differences
    assert (row.name, row.cells) == ("optim.learning_rate", ["0.0003", "0.00030001"])


def test_another_tokenizer_leaves_bits_per_byte_comparable(make: Callable[..., Path]) -> None:
    found = compare_runs([make("a"), make("b", layers=5, tokenizer="t2")])
    told = figures(found)
    assert told["bits per byte, on the way: best"][1] == 1
    assert told["held-out loss, nats per token: best"][1] is None
    assert told["tokenizer"][0] == ["A", "B"]
    (note,) = found.notes
    assert "compare bits per byte, not loss" in note
    assert "only where the tokenizer is the same" in draw_comparison(found)[-1].caption
    assert "only where" not in draw_comparison(found)[0].caption


def test_another_text_makes_nothing_comparable(make: Callable[..., Path]) -> None:
    found = compare_runs([make("a"), make("b", text="other words"), make("c", layers=9)])
    assert figures(found)["held-out text"][0] == ["A", "B", "A"]
    assert all(best is None for _, best in figures(found).values())
    assert "different held-out texts" in found.notes[0]
    assert "only where the held-out text is the same" in draw_comparison(found)[0].caption


def test_where_one_text_ends_and_the_next_begins_counts(make: Callable[..., Path]) -> None:
    assert not compare_runs([make("a", text="ab c"), make("b", text="a bc")]).same_text


def test_a_text_that_is_not_to_be_found_is_told(make: Callable[..., Path]) -> None:
    known, unknown = make("known"), make("unknown")
    shutil.rmtree(unknown / "data")
    found = compare_runs([known, unknown])
    assert figures(found)["held-out text"][0] == ["A", "?"]
    assert not found.same_text
    assert found.notes == [
        "The held-out text of unknown is not to be found: whether bits per byte compare cannot be told."
    ]


def test_equal_tokens_are_an_equal_text(make: Callable[..., Path]) -> None:
    runs = [make("a"), make("b")]
    for run in runs:
        (run / "data" / "val" / "documents.jsonl.gz").unlink()
    assert compare_runs(runs).same_text
    (runs[0] / "data" / "val" / "manifest.json").write_text("[]")
    assert not compare_runs(runs).same_text


def test_a_damaged_text_is_no_text(make: Callable[..., Path]) -> None:
    runs = [make("a"), make("b", tokenizer="t2")]
    path = runs[0] / "data" / "val" / "documents.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-9])
    assert figures(compare_runs(runs))["held-out text"][0] == ["?", "A"]


def test_a_text_prepared_elsewhere_is_found_through_the_recipe(make: Callable[..., Path], tmp_path: Path) -> None:
    here, there = make("here"), make("there")
    shutil.move(there / "data", tmp_path / "corpus")
    recipe = (there / "recipe.yaml").read_text().replace("data: text.txt", f"data: {tmp_path / 'corpus'}")
    (there / "recipe.yaml").write_text(recipe)
    assert compare_runs([here, there]).same_text


def test_other_windows_on_the_way_are_told(make: Callable[..., Path]) -> None:
    one, other = make("one"), make("other")
    recipe = (other / "recipe.yaml").read_text().replace("65536", "4096")
    (other / "recipe.yaml").write_text(recipe)
    (note,) = compare_runs([one, other]).notes
    assert "the figure on all of it is the one to compare" in note


def test_a_run_of_an_older_version_and_one_that_has_only_begun(make: Callable[..., Path], tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "tokens": 64, "loss": 9.1}\n{"kind": "tr')
    (old / "recipe.yaml").write_text("- not\n- a mapping")
    told = figures(compare_runs([make("new"), old]))
    assert told["steps"][0] == ["30", "1"]
    assert told["parameters"][0] == ["4.5M", "–"]
    assert told["time in the loop"][0] == ["15 s", "–"]
    assert told["bits per byte, all held-out text"][0] == ["1.460", "–"]


@pytest.mark.parametrize("count", [0, 1, 19])
def test_too_few_and_too_many(count: int, make: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="two runs at least" if count < 2 else "18 runs at most, these are 19"):
        compare_runs(["a run"] * count)


def test_what_is_no_run(make: Callable[..., Path], tmp_path: Path) -> None:
    run = make("a")
    with pytest.raises(UsageError, match="this run is named twice"):
        compare_runs([run, tmp_path / "." / "a"])
    with pytest.raises(GroundupError, match="there is no run here"):
        compare_runs([run, tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(GroundupError, match=r"neither metrics\.jsonl nor evaluation\.json"):
        compare_runs([run, tmp_path / "empty"])


def test_runs_of_one_name_are_called_by_their_paths(make: Callable[..., Path], tmp_path: Path) -> None:
    runs = [make("x/demo"), make("y/demo", layers=5)]
    assert [run.name for run in compare_runs(runs).runs] == [str(run) for run in runs]


def test_letters() -> None:
    assert letters(["x", "y", None, "x", "z"]) == ["A", "B", "?", "A", "C"]


# ---- what is shown


def test_the_table_marks_the_lowest(make: Callable[..., Path]) -> None:
    from rich.console import Console

    found = compare_runs([make("a [red]"), make("b", layers=6)])
    console = Console(width=110, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(figures_of_runs("title", found.runs, found.figures))
    text = console.export_text()
    assert "a [red]" in text
    assert "1.440 *" in text
    assert "1.460 *" not in text


def drawn(found: Comparison) -> dict[str, Any]:
    return {plot.title: ElementTree.fromstring(plot.svg) for plot in draw_comparison(found)}


def test_curves_over_steps_tokens_and_time(make: Callable[..., Path]) -> None:
    found = drawn(compare_runs([make("_a & b <c>"), make("$x$", layers=6)]))
    assert list(found) == [
        f"{measure} over {x}" for measure in ("Bits per byte", "Training loss") for x in ("steps", "tokens", "time")
    ]
    for title, figure in found.items():
        text = "".join(figure.itertext())
        assert "_a & b <c>" in text
        assert "$x$" in text
        assert {"steps": "steps", "tokens": "training tokens", "time": "seconds of training"}[title.split()[-1]] in text
    ids = [one.get("id") for figure in found.values() for one in figure.iter() if one.get("id")]
    assert len(ids) == len(set(ids)) > 0


def test_every_run_of_many_has_a_line_of_its_own(make: Callable[..., Path]) -> None:
    runs = [make(f"run{number}", layers=number + 1) for number in range(13)]
    figure = drawn(compare_runs(runs))["Training loss over steps"]
    styles = set()
    for element in figure.iter():
        style = element.get("style", "")
        if element.tag.endswith("path") and "stroke: var(--plot-" in style and "fill: none" in style:
            styles.add(style)
    runs_drawn = {style for style in styles if "plot-axis" not in style and "plot-grid" not in style}
    assert len(runs_drawn) == 13


def test_the_page_is_whole_and_needs_nothing(make: Callable[..., Path], tmp_path: Path) -> None:
    found = compare_runs([make("<b>a"), make("b", layers=6, tokenizer="t2")])
    path = write_comparison(found, tmp_path / "compare.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 6
    assert "b" not in page.tags
    for told in ("<b>a", "1.440", "model.n_layer", "compare bits per byte, not loss", "2 runs side by side"):
        assert told in page.words
    assert ("class", "number best") in page.attributes
    for name, value in page.attributes:
        assert name not in ("src", "srcset", "href")
        assert name != "xlink:href" or (value or "").startswith("#")
    assert "script" not in page.tags
    assert write_comparison(found, tmp_path / "again.html").read_bytes() == path.read_bytes()


def test_a_page_of_runs_without_curves(tmp_path: Path) -> None:
    for name in ("a", "b"):
        row = {"name": "this model", "kind": "model", "bits_per_byte": 1.5}
        write_json(tmp_path / name / "evaluation.json", {"rows": [row]})
    found = compare_runs([tmp_path / "a", tmp_path / "b"])
    page = Page(write_comparison(found, tmp_path / "page.html").read_text())
    assert "svg" not in page.tags
    assert "1.500" in page.words


def test_a_page_that_cannot_be_written(make: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GroundupError, match="cannot write"):
        write_comparison(compare_runs([make("a"), make("b")]), tmp_path / "file" / "page.html")


def test_a_short_run_is_seen_beside_a_long_one() -> None:
    """The first steps of the long one are cut off; those of the short one are all it has."""
    long, short = [9.0] * 3 + [2.0] * 997, [8.0, 7.5, 7.0]
    low, high = _range([long, short])
    assert low == 2.0
    assert 7.5 <= high < 9.0
    assert _range([long]) == (2.0, 2.0)
