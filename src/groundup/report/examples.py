"""What a fine-tuning run learnt from, as its ``data.json`` has it: what was left out, what leaks, and one example."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from groundup.report.blocks import Block, blocks, cell
from groundup.report.measures import percent, shown
from groundup.report.metrics import is_number
from groundup.report.run_folder import list_of, number_of, part_of, rows_of, words_of

COUNTS = {"records": "records", "train": "to learn from", "val": "held out to choose by", "test": "held out to the end"}
KNOWN = {*COUNTS, "task", "source", "lines", "left_out", "left_out_examples", "shared", "shared_count"}
KNOWN |= {"preview", "added_tokens", "classes"}


@dataclass(frozen=True)
class Piece:
    """A part of the example that is shown in one way: a note stands for tokens that are left out."""

    text: str
    learnt: bool
    special: bool
    note: bool


@dataclass(frozen=True)
class LearntFrom:
    """What a run learnt from.

    Args:
        overview: names and what there is to say.
        left_out: how many records were left out, by reason.
        left_out_examples: some of them: where, reason, detail.
        shared: some held-out examples that are in training too: which, which one there, and how much alike.
        shared_count: how many there are.
        example: what of one example is learnt, in pieces.
        added_tokens: that the tokenizer got.
        classes: how many texts each class has.
        others: whatever else the file holds.
    """

    overview: list[tuple[str, str]]
    left_out: list[tuple[str, int]]
    left_out_examples: list[tuple[str, str, str]]
    shared: list[tuple[str, str, str]]
    shared_count: int
    example: list[Piece]
    added_tokens: list[str]
    classes: list[tuple[str, int]]
    others: list[Block]

    @property
    def left_out_count(self) -> int:
        """How many records were left out."""
        return sum(count for _, count in self.left_out)

    @property
    def most_texts(self) -> int:
        """Of the largest class."""
        return max((count for _, count in self.classes), default=0)


def learnt_from(data: Mapping[str, Any]) -> LearntFrom | None:
    """Read ``data.json``; None where there is nothing in it."""
    if not data:
        return None
    shared = [
        (words_of(row, "held_out"), words_of(row, "train"), shown(row.get("alike"), percent))
        for row in rows_of(data, "shared")
    ]
    left_out = [
        (words_of(row, "where"), words_of(row, "reason"), words_of(row, "detail"))
        for row in rows_of(data, "left_out_examples")
    ]
    return LearntFrom(
        overview=_overview(data),
        left_out=_counts(data, "left_out"),
        left_out_examples=left_out,
        shared=shared,
        shared_count=shared_count(data),
        example=_example(data),
        added_tokens=[str(token) for token in list_of(data, "added_tokens")],
        classes=_counts(data, "classes"),
        others=blocks({key: value for key, value in data.items() if key not in KNOWN}),
    )


def shared_count(data: Mapping[str, Any]) -> int:
    """How many held-out examples are in training too."""
    return int(number_of(data, "shared_count") or len(rows_of(data, "shared")))


def _overview(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [("source", words_of(data, "source"))] if data.get("source") else []
    found += [(name, cell(data[key])) for key, name in COUNTS.items() if is_number(data.get(key))]
    for line in list_of(data, "lines"):
        name, *said = re.split(r"\s{2,}", str(line).strip(), maxsplit=1)
        found.append((name, said[0]) if said else ("", name))
    return found


def _counts(data: Mapping[str, Any], key: str) -> list[tuple[str, int]]:
    """Names and how many there are of each, the most first."""
    found = [(str(name), int(count)) for name, count in part_of(data, key).items() if is_number(count)]
    return sorted(found, key=lambda one: -one[1])


def _example(data: Mapping[str, Any]) -> list[Piece]:
    return [
        Piece(words_of(row, "text"), *(row.get(key) is True for key in ("learnt", "special", "note")))
        for row in rows_of(data, "preview")
    ]


def caution(data: Mapping[str, Any]) -> str:
    """That some of what is measured on is learnt; nothing where none is known to be."""
    count = shared_count(data)
    if not count:
        return ""
    held_out = sum(number_of(data, part) or 0 for part in ("val", "test"))
    of = f" of {held_out:,.0f}" if held_out >= count else ""
    noun, verb = "example" if count == 1 and not of else "examples", "is" if count == 1 else "are"
    return f"{count:,}{of} held-out {noun} {verb} in training too, or nearly so: the figures flatter the model."
