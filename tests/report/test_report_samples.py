"""Samples are kept for programs and shown to people, whatever a model wrote."""

from __future__ import annotations

from pathlib import Path

from groundup.report import add_samples, truncate_samples
from groundup.report.jsonl import read_jsonl


def sample(step: int, text: str, temperature: float = 0.8) -> dict:
    return {"step": step, "temperature": temperature, "prompt": "Once", "text": text}


def test_samples_are_appended_and_the_page_shows_the_latest_first(tmp_path: Path) -> None:
    add_samples(tmp_path, [sample(100, " upon"), sample(100, " more", 1.0)])
    add_samples(tmp_path, [sample(200, " again")])
    assert [row["step"] for row in read_jsonl(tmp_path / "samples.jsonl")] == [100, 100, 200]
    page = (tmp_path / "samples.md").read_text()
    assert page.index("## Step 200") < page.index("Once again") < page.index("## Step 100") < page.index("Once upon")
    assert page.index("Temperature 0.8\n\n```text\nOnce upon\n```") < page.index("Temperature 1.0")


def test_a_fence_in_a_sample_does_not_end_the_block(tmp_path: Path) -> None:
    add_samples(tmp_path, [sample(1, "\n````\n# Not a heading\n```")])
    lines = (tmp_path / "samples.md").read_text().splitlines()
    opening = lines.index("`````text")
    assert lines[opening + 1 :] == ["Once", "````", "# Not a heading", "```", "`````"]


def test_half_a_character_does_not_stop_the_page(tmp_path: Path) -> None:
    add_samples(tmp_path, [sample(1, "\udce9")])
    assert "Once?" in (tmp_path / "samples.md").read_text()


def test_truncate_drops_later_samples_from_both_files(tmp_path: Path) -> None:
    truncate_samples(tmp_path, 5)
    assert list(tmp_path.iterdir()) == []
    add_samples(tmp_path, [sample(100, " kept"), sample(200, " dropped")])
    truncate_samples(tmp_path, 150)
    assert [row["text"] for row in read_jsonl(tmp_path / "samples.jsonl")] == [" kept"]
    page = (tmp_path / "samples.md").read_text()
    assert " kept" in page
    assert "dropped" not in page
