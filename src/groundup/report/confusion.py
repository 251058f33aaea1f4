"""Which classes are taken for which, and what is found of each class."""

# C classes

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from groundup.report.measures import ABSENT, percent, shown
from groundup.report.metrics import is_number
from groundup.report.run_folder import list_of, number_of, rows_of, words_of

MOST_CLASSES = 20  # in a matrix; of more, the pairs that are confused most are listed
MOST_PAIRS = 20


@dataclass(frozen=True)
class Cell:
    """A field of the matrix.

    Args:
        count: texts.
        shade: their share of the row, 0 to 1.
        right: whether it is on the diagonal.
        about: what a pointer or a screen reader is told.
    """

    count: int
    shade: float
    right: bool
    about: str


@dataclass(frozen=True)
class Pair:
    """Texts of one class that are taken for another.

    Args:
        label, predicted: both classes.
        count: how many there are.
        share: of the texts of the class, as text.
    """

    label: str
    predicted: str
    count: int
    share: str


@dataclass(frozen=True)
class Found:
    """What is found of one class: texts to be shown.

    Args:
        name: of the class.
        cells: precision, recall, F1, the baseline's F1.
        support: texts of the class.
        f1: to sort by; None where it is not known.
    """

    name: str
    cells: list[str]
    support: str
    f1: float | None


def matrix_of(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[int]]]:
    """The names of the C classes and the confusion matrix, C lists of C counts; nothing where it is not whole."""
    matrix = list_of(evaluation, "confusion")
    size = len(matrix)
    rows = [row for row in matrix if isinstance(row, list) and len(row) == size and all(map(is_number, row))]
    if len(rows) < size:
        return [], []
    names = [str(name) for name in list_of(evaluation, "classes")]
    names = names if len(names) == size else [f"class {number}" for number in range(1, size + 1)]
    return names, [[int(count) for count in row] for row in rows]


def shaded(names: list[str], matrix: list[list[int]]) -> list[tuple[str, list[Cell]]]:
    """The rows of a matrix for a page, with the class of each."""
    found = []
    for label, row in enumerate(matrix):
        texts = sum(row)
        cells = [
            Cell(count, count / max(texts, 1), label == predicted,
                 f"{count:,} of {texts:,} {names[label]}, taken for {names[predicted]}")
            for predicted, count in enumerate(row)
        ]  # fmt: skip
        found.append((names[label], cells))
    return found


def confused_pairs(names: list[str], matrix: list[list[int]]) -> list[Pair]:
    """Which classes are taken for which most often, at most ``MOST_PAIRS`` of those that are at all."""
    found = [
        Pair(names[label], names[predicted], count, percent(count / sum(row)))
        for label, row in enumerate(matrix)
        for predicted, count in enumerate(row)
        if predicted != label and count > 0
    ]
    return sorted(found, key=lambda pair: -pair.count)[:MOST_PAIRS]


def found_of_classes(evaluation: Mapping[str, Any]) -> list[Found]:
    """A row for each class: the weakest first where there are many, else in their own order."""
    found = []
    for row in rows_of(evaluation, "per_class"):
        cells = [shown(row.get(key), percent) for key in ("precision", "recall", "f1", "baseline_f1")]
        support = number_of(row, "support")
        texts = ABSENT if support is None else f"{support:,.0f}"
        found.append(Found(words_of(row, "name") or "?", cells, texts, number_of(row, "f1")))
    if len(found) > MOST_CLASSES:
        found.sort(key=lambda one: -1.0 if one.f1 is None else one.f1)
    return found
