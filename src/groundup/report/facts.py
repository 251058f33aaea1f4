"""The figures at the top of a page."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from groundup.report.blocks import cell, duration
from groundup.report.metrics import is_number, series
from groundup.report.run_folder import RunFolder
from groundup.runtime.console import quantity


@dataclass(frozen=True)
class Fact:
    """One figure at the top of the page, and what it counts."""

    value: str
    name: str


def effort(run: RunFolder, *, per_second: bool = True) -> list[Fact]:
    """What went into a run: steps, tokens and time.

    Args:
        per_second: whether to say how fast it was, too.
    """
    found = []
    counters = (("step", "steps", cell), ("tokens", "training tokens", quantity), ("seconds", "of training", duration))
    for key, name, show in counters:
        values = [row[key] for row in run.metrics if is_number(row.get(key))]
        if values:
            found.append(Fact(show(max(values)), name))
    rates = series(run.metrics, "train", "step", "tokens_per_second")[1]
    if rates and per_second:
        found.append(Fact(quantity(statistics.median(rates)), "tokens per second, median"))
    return found
