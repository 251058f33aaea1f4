"""The page of a run: whole, self-contained, safe, and there however little of the run is."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from groundup.report import console_table, write_report
from groundup.report.run_folder import SHOWS
from groundup.runtime import GroundupError

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def read(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_tells_everything(finished_run: Path) -> None:
    page = read(finished_run)
    assert "On held-out text the model needs 1.520 bits per byte" in page.words
    assert "better than gzip -9 (2.450); worse than the byte 6-gram (1.470)." in page.words
    for told in (
        "38% fewer bits",
        "3% more bits",
        "712 kB",
        "16.0 GB",
        "n_layer",
        "not UTF-8",
        "5.4 s",
        "Step 120, the latest",
    ):
        assert told in page.words
    assert page.tags.count("svg") == 4
    assert page.tags.count("details") == 3  # two steps and the recipe
    assert "Not in this report" not in page.words


def test_the_page_tells_what_it_cost(finished_run: Path) -> None:
    words = read(finished_run).words
    assert "What it cost" in words
    for told in ("30 s", "in 120 steps", "16.4k tokens/s"):
        assert told in words
    assert "energy" not in words  # a run of an older version: nobody looked


def test_a_run_that_was_watched_shows_its_machine(measured_run: Path) -> None:
    page = read(measured_run)
    assert page.tags.count("svg") == 10
    titles = ("Model FLOPs utilisation", "Gradient norm", "Peak memory", "Processors", "Memory in use", "Power")
    for told in (*titles, "1.24 GB", "33.0%", "1920 J", "0.237 g", "445 g/kWh"):
        assert told in page.words
    metrics = [json.loads(line) for line in (measured_run / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        if row["kind"] == "hardware":
            row |= dict.fromkeys(("gpu_percent", "watts", "energy_joules", "co2_grams", "watts_from"))
    (measured_run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    page = read(measured_run)
    assert page.tags.count("svg") == 9
    assert "not measured" in page.words
    assert "CO2" not in page.words


def test_a_models_words_stay_words(finished_run: Path) -> None:
    page = read(finished_run)
    for dangerous in ("script", "b ", "i", "iframe", "img"):
        assert dangerous not in page.tags
    assert "<script>alert('x')</script>\u241b &amp; ?" in page.words  # the escape character as its picture
    assert "</pre><script>" in page.words
    assert "<i>n" in page.words
    assert "depth 4 <b>" in page.words


def test_the_page_needs_nothing_from_outside(finished_run: Path) -> None:
    page = read(finished_run)
    for name, value in page.attributes:
        assert name not in ("src", "srcset", "href") or name.startswith("xmlns")
        assert name != "xlink:href" or (value or "").startswith("#")
        assert not name.startswith("on")
    assert "link" not in page.tags
    html = (finished_run / "report.html").read_text()
    assert "default-src 'none'" in html
    assert "@import" not in html
    assert html.count("url(") == html.count("url(#")


def test_equal_runs_give_equal_pages(finished_run: Path) -> None:
    first = write_report(finished_run).read_bytes()
    assert write_report(finished_run).read_bytes() == first


@pytest.mark.parametrize(
    "name",
    [
        "recipe.yaml",
        "environment.json",
        "plan.json",
        "data/stats.json",
        "samples.jsonl",
        "evaluation.json",
        "metrics.jsonl",
    ],
)
def test_any_one_file_may_be_absent(finished_run: Path, name: str) -> None:
    (finished_run / name).unlink()
    words = read(finished_run).words
    assert "Not in this report" in words
    assert SHOWS[name] in words


@pytest.mark.parametrize("content", [b'{"cut": ', b"[1, 2]", b"\xff\xfe", b'{"rows": 3}', b'{"rows": [3]}', b"{}"])
@pytest.mark.parametrize("name", ["environment.json", "plan.json", "data/stats.json", "evaluation.json"])
def test_a_damaged_file_costs_its_own_part_only(finished_run: Path, name: str, content: bytes) -> None:
    (finished_run / name).write_bytes(content)
    page = read(finished_run)
    assert page.tags.count("svg") == 4
    if not content.startswith(b"{") or content.endswith(b": "):
        assert f"{SHOWS[name]}: " in page.words
        assert str(finished_run) not in page.words


def test_a_run_of_one_step(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "tokens": 64, "loss": 9.1}\n{"kind": "tr')
    words = read(tmp_path).words
    assert "At step 1 the training loss was 9.100 nats per token." in words
    for shown in SHOWS.values():
        assert (shown in words) == (shown != SHOWS["metrics.jsonl"])


def test_only_an_evaluation(finished_run: Path, tmp_path: Path) -> None:
    shutil.copy(finished_run / "evaluation.json", tmp_path / "evaluation.json")
    page = read(tmp_path)
    assert "1.520" in page.words
    assert "svg" not in page.tags


def test_a_run_that_diverged(finished_run: Path) -> None:
    evaluation = json.loads((finished_run / "evaluation.json").read_text())
    evaluation["rows"][0]["bits_per_byte"] = None
    (finished_run / "evaluation.json").write_text(json.dumps(evaluation))
    with open(finished_run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 121, "tokens": 495616, "loss": null, "nonfinite": ["loss"]}\n')
    words = read(finished_run).words
    assert "not a finite number" in words
    assert "rows of metrics.jsonl that have some: 1" in words


def test_nothing_to_report_is_told(tmp_path: Path) -> None:
    with pytest.raises(GroundupError, match="there is no run here"):
        write_report(tmp_path / "absent")
    with pytest.raises(GroundupError, match=r"neither metrics\.jsonl nor evaluation\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_console_table(finished_run: Path) -> None:
    from rich.console import Console

    evaluation = json.loads((finished_run / "evaluation.json").read_text())
    evaluation["rows"][0]["name"] = "this model [red]"
    (finished_run / "evaluation.json").write_text(json.dumps(evaluation))
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(console_table(finished_run))
    text = console.export_text()
    assert text.index("byte 6-gram") < text.index("this model [red]") < text.index("gzip -9")
    assert "712 kB" in text
    assert "38% fewer bits" in text
    (finished_run / "evaluation.json").unlink()
    assert console_table(finished_run).row_count == 0
