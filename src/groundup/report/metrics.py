"""What a run measured as it went: ``metrics.jsonl``.

Three kinds of rows, told apart by ``kind``:

    train      step, tokens, seconds, loss, bits_per_byte, tokens_per_second, learning_rate, grad_norm, mfu,
               memory_bytes, seconds_left, skipped_steps
    eval       step, tokens, seconds, loss, bits_per_byte           (on held-out text)
    hardware   step, tokens, seconds, cpu_percent, memory_bytes, gpu_percent, gpu_memory_bytes, watts, energy_joules,
               co2_grams, watts_from                                (see groundup.runtime.monitor)

``tokens`` and ``seconds`` count from the start of the run; ``loss`` is nats per token; ``mfu`` is 0 … 1;
``memory_bytes`` of a train row is the most that was held so far. Rows of older runs lack the later ones of these, and
any row may carry more: whoever reads takes what is there.
"""

from __future__ import annotations

import math
import os
from typing import TypeGuard

from groundup.report.jsonl import JsonlWriter, Row, read_jsonl, truncate_jsonl


class MetricsWriter(JsonlWriter):
    """Appends rows to a run's ``metrics.jsonl``."""


def read_metrics(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of ``metrics.jsonl``, without a last line that a crash cut short.

    Raises:
        GroundupError: the file is missing or cannot be read.
    """
    return read_jsonl(path, "metrics file")


def truncate_metrics(path: str | os.PathLike[str], step: int) -> None:
    """Drop, atomically, the rows after ``step``, for a run that resumes there.

    Raises:
        GroundupError: the file cannot be read or written; it is then as it was.
    """
    truncate_jsonl(path, step, "metrics file")


def energy_so_far(path: str | os.PathLike[str]) -> float:
    """Joules that the run has taken according to its last row that knows; 0.0 where none does.

    For a monitor that goes on counting in another sitting; to be read before :func:`truncate_metrics`.

    Raises:
        GroundupError: the file cannot be read.
    """
    rows = read_metrics(path) if os.path.exists(path) else []
    return max(series(rows, "hardware", "energy_joules", "energy_joules")[0], default=0.0)


def series(rows: list[Row], kind: str, x: str, y: str) -> tuple[list[float], list[float]]:
    """The points (x, y) of one kind of row, in order; rows where either is missing or not finite are left out."""
    chosen = [row for row in rows if row.get("kind") == kind and is_number(row.get(x)) and is_number(row.get(y))]
    return [float(row[x]) for row in chosen], [float(row[y]) for row in chosen]


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value from a JSON file is a finite number; null stands for one that was not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
