"""What flows through this room: documents, and the record of what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and where it comes from.

    Args:
        text: the text itself.
        name: where it comes from, for people: a path, ``books.jsonl#12``, ``stdlib/json/decoder.py``.
        group: documents with the same group are never parted by the split into train and validation; None
            stands alone.
        language: as the record says in a field ``language`` or ``lang``; None where it does not.
    """

    text: str
    name: str
    group: str | None = None
    language: str | None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """A document or file that was left out.

    Args:
        name: which one.
        reason: why, in words that can be counted ("duplicate", "not UTF-8").
        detail: what else helps to find it ("of a.txt", "byte 512").
    """

    name: str
    reason: str
    detail: str = ""


@dataclass
class Source:
    """A place documents come from; iterating reads it anew each time.

    Args:
        name: short, for messages and reports.
        description: one line for people.
        read: yields the documents; what it cannot use it hands to the function it is given, and goes on.
        identity: what tells one state of the source from another (JSON), without reading the texts.
        limit: at most so many documents.
    """

    name: str
    description: str
    read: Callable[[Callable[[Dropped], None]], Iterator[Document]]
    identity: Callable[[], Any]
    limit: int | None = None
    skipped: list[Dropped] = field(default_factory=list)

    def __iter__(self) -> Iterator[Document]:
        self.skipped.clear()
        return islice(self.read(self.skipped.append), self.limit)


def count_reasons(dropped: Iterable[Dropped]) -> dict[str, int]:
    """How often each reason occurs, most frequent first."""
    return dict(Counter(one.reason for one in dropped).most_common())


def printable(path: str) -> str:
    """A file's name as text that can be written as UTF-8: bytes in it that are not become U+FFFD."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def utf8_length(text: str) -> int:
    """The length of ``text`` in UTF-8 bytes, without encoding it where it is plain ASCII."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
