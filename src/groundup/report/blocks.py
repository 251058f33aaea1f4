"""Free-form facts (what the data went through, the machine) as tables that a person can read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from groundup.runtime.console import byte_size, clock


@dataclass(frozen=True)
class Block:
    """A small table.

    Args:
        title: what it is about.
        columns: the headings; empty for a list of names and values.
        rows: the cells as text, the row's name first.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]


def blocks(facts: Mapping[str, Any], title: str = "overview") -> list[Block]:
    """Tables for a dictionary of any shape.

    Single values come first, as names and values. A dictionary of dictionaries, or a list of them, becomes
    one table with a column for each key; whatever is nested deeper follows under a title of its own.
    """
    single = {key: one for key, one in facts.items() if not isinstance(one, Mapping) and not _is_table(one)}
    found = [Block(title, [], [_pair(key, one, title) for key, one in single.items()])] if single else []
    for key, value in facts.items():
        inner = label(key) if title == "overview" else f"{title}: {label(key)}"
        if isinstance(value, Mapping) and value and all(_is_flat(one) for one in value.values()):
            found.append(_grid(inner, {label(name): row for name, row in value.items()}))
        elif isinstance(value, Mapping):
            found += blocks(value, inner)
        elif _is_table(value):
            found.append(_grid(inner, {str(number): row for number, row in enumerate(value, start=1)}))
    return found


def _pair(key: object, value: Any, title: str) -> list[str]:
    """A name and its value; the unit stands with the value, so the name does without."""
    name = label(key)
    return [name.removesuffix(" bytes").removesuffix(" seconds"), cell(value, f"{title} {name}")]


def _is_flat(value: Any) -> bool:
    """Whether a value is a row: a dictionary of single values."""
    return isinstance(value, Mapping) and not any(isinstance(one, Mapping) or _is_table(one) for one in value.values())


def _is_table(value: Any) -> bool:
    """Whether a value is a list of rows."""
    return isinstance(value, list) and bool(value) and all(_is_flat(one) for one in value)


def _grid(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Block:
    """One row for each entry, one column for each key that occurs in any."""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    cells = [[name, *(cell(row[key], key) if key in row else "" for key in keys)] for name, row in rows.items()]
    return Block(title, ["", *map(label, keys)], cells)


def label(key: object) -> str:
    """A key as words."""
    return str(key).replace("_", " ")


def cell(value: Any, about: str = "") -> str:
    """A value as text.

    Args:
        about: the key (and title) it stands under, which tells bytes and seconds from plain numbers.
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _number(value, set(about.replace("_", " ").lower().split()))
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{label(key)} {cell(one, str(key))}" for key, one in value.items()) or "–"
    if isinstance(value, Iterable):
        return ", ".join(cell(one, about) for one in value) or "–"
    return str(value)


def _number(value: float, about: set[str]) -> str:
    if "bytes" in about and value >= 0:
        return byte_size(value)
    if "seconds" in about and value >= 0:
        return duration(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def duration(seconds: float) -> str:
    """A time for people: 0.32 s, 12 s, 5:02 min, 1:05:00 h."""
    if seconds < 99.5:
        return f"{seconds:#.2g}".rstrip(".") + " s"
    return f"{clock(seconds)} {'h' if seconds >= 3599.5 else 'min'}"
