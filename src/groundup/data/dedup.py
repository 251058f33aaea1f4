"""Exact duplicates: the first stays, the others are dropped."""

from __future__ import annotations

from hashlib import blake2b

from groundup.data.document import Document, Dropped


def content_key(text: str) -> bytes:
    """A 16-byte hash of the text that does not see how it is spaced or broken into lines."""
    return blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()


class ExactDuplicates:
    """Remembers what it has seen: 16 bytes and a name for each document."""

    def __init__(self) -> None:
        self._first: dict[bytes, str] = {}

    def __call__(self, document: Document) -> Document | Dropped:
        """The document if its text is new, else why it is dropped."""
        key = content_key(document.text)
        if key in self._first:
            return Dropped(document.name, "duplicate", f"of {self._first[key]}")
        self._first[key] = document.name
        return document
