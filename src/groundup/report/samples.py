"""What a run wrote at its checkpoints: ``samples.jsonl`` for programs, ``samples.md`` for people."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from groundup.report.jsonl import JsonlWriter, Row, read_jsonl, truncate_jsonl
from groundup.runtime import write_atomic

FILE = "samples.jsonl"
PAGE = "samples.md"


def add_samples(run: str | os.PathLike[str], samples: Iterable[Row]) -> None:
    """Append samples to a run's ``samples.jsonl`` and write its ``samples.md`` anew.

    Args:
        samples: each with ``step``, ``temperature``, ``prompt`` and the ``text`` that followed it.

    Raises:
        GroundupError: the folder cannot be written.
    """
    with JsonlWriter(Path(run) / FILE) as file:
        for sample in samples:
            file.write(sample)
    write_page(Path(run))


def truncate_samples(run: str | os.PathLike[str], step: int) -> None:
    """Drop, atomically, the samples after ``step``, for a run that resumes there.

    Raises:
        GroundupError: the folder cannot be read or written.
    """
    if (Path(run) / FILE).exists():
        truncate_jsonl(Path(run) / FILE, step, "samples file")
        write_page(Path(run))


def by_step(samples: Iterable[Row]) -> dict[int, list[Row]]:
    """The samples of each step, the latest step first."""
    steps: dict[int, list[Row]] = {}
    for sample in samples:
        step = sample.get("step")
        steps.setdefault(step if isinstance(step, int) else 0, []).append(sample)
    return dict(sorted(steps.items(), reverse=True))


def write_page(run: Path) -> None:
    """Render all samples as Markdown into ``samples.md``, the latest step first.

    Raises:
        GroundupError: the samples cannot be read, or the page cannot be written.
    """
    parts = ["# Samples\n"]
    for step, samples in by_step(read_jsonl(run / FILE, "samples file")).items():
        parts.append(f"## Step {step}\n")
        parts += [sample_section(sample) for sample in samples]
    write_atomic(run / PAGE, "\n".join(parts).encode("utf-8", "replace"))


def sample_section(sample: Row) -> str:
    """One sample: its temperature, and prompt and continuation as they stand, in a fence they cannot break."""
    text = f"{sample.get('prompt', '')}{sample.get('text', '')}"
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"Temperature {sample.get('temperature', '?')}\n\n{fence}text\n{text}\n{fence}\n"
