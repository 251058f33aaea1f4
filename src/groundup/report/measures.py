"""Measures of several models side by side, as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from groundup.report.metrics import is_number
from groundup.report.standing import DIGITS

ABSENT = "–"


def exact(value: float) -> str:
    """A loss, or bits per byte, to the digits that are compared."""
    return f"{value:.{DIGITS}f}"


def tenths(value: float) -> str:
    """To one digit after the point."""
    return f"{value:.1f}"


def percent(value: float) -> str:
    """A share of 0 to 1."""
    return f"{100 * value:.1f}%"


def ratio(value: float) -> str:
    """How often one holds the other."""
    return f"{value:.2f}×"


def perplexity(value: float) -> str:
    """To one digit after the point, and without any where it is large."""
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.3g}"


@dataclass(frozen=True)
class Measure:
    """A measure, and how it is shown.

    Args:
        key: under which it is found.
        name: what people call it.
        why: how to read it.
        show: writes a value down.
        better: lower, higher, or nothing where neither is.
    """

    key: str
    name: str
    why: str = ""
    show: Callable[[float], str] = exact
    better: str = ""


@dataclass(frozen=True)
class Line:
    """One measure of several models.

    Args:
        name, why: of the measure.
        cells: a text for each model.
        best: which of them is better than all others as far as is shown; else None.
    """

    name: str
    why: str
    cells: list[str]
    best: int | None = None


def lines(rows: Sequence[Mapping[str, Any]], measures: Sequence[Measure]) -> list[Line]:
    """A line for each measure of which any of the rows has a value."""
    found = []
    for measure in measures:
        values = [row.get(measure.key) for row in rows]
        cells = [shown(value, measure.show) for value in values]
        if set(cells) - {ABSENT}:
            found.append(Line(measure.name, measure.why, cells, best(values, cells, measure.better)))
    return found


def shown(value: object, show: Callable[[float], str] = exact) -> str:
    """A measured value as text, whatever stands in its place."""
    if is_number(value):
        return show(float(value))
    return "not finite" if isinstance(value, float) and not math.isfinite(value) else ABSENT


def best(values: Sequence[object], cells: Sequence[str], better: str) -> int | None:
    """The place of the best value; None where there are not two to choose from, or another one is shown alike.

    Args:
        values: what was measured.
        cells: the same as it is shown.
        better: lower, higher, or nothing where neither is.
    """
    known = [(float(value), place) for place, value in enumerate(values) if is_number(value)]
    if not better or len(known) < 2:
        return None
    _, place = min(known) if better == "lower" else max(known)
    return place if list(cells).count(cells[place]) == 1 else None
