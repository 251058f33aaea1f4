"""Holding out: which part of the text the model never trains on.

By document wherever there are enough of them, so that no held-out line has its context in the training part.
A book or a handful of files is cut instead, and its end is held out.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import numpy as np

from groundup.data.document import Document, utf8_length
from groundup.runtime import GroundupError

MIN_GROUPS = 20  # with fewer documents, one of them is too large a part of the whole to be held out
MIN_VAL_BYTES = 1024  # a small text holds out this much (a quarter of it at most): less measures nothing
MIN_TAIL_BYTES = 256  # a shorter end of a document is not worth cutting off

_HASH_BYTES = 16


class Outline:
    """What the choice of the held-out part hangs on: 24 bytes for each document, its text not among them.

    Attributes:
        sizes: bytes in UTF-8 of each document, in the order they were added.
        groups: of each group, the numbers of its documents.
    """

    def __init__(self, documents: Iterable[Document] = ()) -> None:
        self.sizes = array("q")
        self.groups: dict[str, list[int]] = {}
        self._hashes = bytearray()
        for document in documents:
            self.add(document)

    def add(self, document: Document) -> None:
        """Take note of one more document."""
        if document.group:
            self.groups.setdefault(document.group, []).append(len(self.sizes))
        self.sizes.append(utf8_length(document.text))
        self._hashes += blake2b(document.text.encode(), digest_size=_HASH_BYTES).digest()

    def hash(self, number: int) -> bytes:
        """16 bytes that tell a document's text from others."""
        return bytes(self._hashes[number * _HASH_BYTES : (number + 1) * _HASH_BYTES])


@dataclass(frozen=True)
class Split:
    """Which documents, or which ends of documents, are held out.

    Args:
        way: "by document", "end of each document" or "end of the longest document".
        wanted_bytes: how much was to be held out.
        held_out: numbers of the documents that are held out whole.
        tails: bytes to cut off the ends of which documents.
    """

    way: str
    wanted_bytes: int
    held_out: frozenset[int] = frozenset()
    tails: Mapping[int, int] = field(default_factory=dict)

    def parts(self, documents: Iterable[Document]) -> Iterator[tuple[str, Document]]:
        """Deal out the documents, which come in the order of the outline: each with ``train`` or ``val``.

        One that is cut comes twice, the part to train on first.

        Raises:
            GroundupError: there are not even two characters to part.
        """
        for number, document in enumerate(documents):
            if number in self.tails:
                at = cut_near_end(document.text, self.tails[number])
                yield "train", replace(document, text=document.text[:at])
                yield "val", replace(document, text=document.text[at:], name=f"{document.name} (end)")
            else:
                yield "val" if number in self.held_out else "train", document


def split(outline: Outline, val_fraction: float, max_val_bytes: int, seed: int) -> Split:
    """Hold out about ``val_fraction`` of the bytes, the same ones for the same text and seed.

    Documents of one group stay together. They are taken in the order of a hash of seed and content, and
    passed over where they are larger than what is still wanted. Neither part is ever empty.

    Args:
        outline: of cleaned documents, at least one, of at least two characters that are not space.
        val_fraction: of the UTF-8 bytes, at most one half.
        max_val_bytes: of UTF-8.
        seed: another seed holds out other documents; the ends of documents are the same for all.
    """
    sizes = outline.sizes
    total = sum(sizes)
    wanted = min(max(int(val_fraction * total), min(MIN_VAL_BYTES, total // 4)), max_val_bytes)
    units, held_out = _pick_groups(outline, wanted, seed)
    enough = bool(held_out) and sum(sizes[number] for number in held_out) >= wanted / 2

    if enough and units >= MIN_GROUPS:
        return Split("by document", wanted, held_out)
    if tails := _tails(sizes, wanted):
        way = "end of each document" if len(tails) > 1 else "end of the longest document"
        return Split(way, wanted, tails=tails)
    if enough:
        return Split("by document", wanted, held_out)
    longest = max(range(len(sizes)), key=sizes.__getitem__)
    return Split("end of the longest document", wanted, tails={longest: min(wanted, sizes[longest] // 2)})


def _pick_groups(outline: Outline, wanted: int, seed: int) -> tuple[int, frozenset[int]]:
    """How many there are to choose from, groups and single documents, and the numbers of the documents chosen.

    Whole groups, of ``wanted`` bytes together at most.
    """
    in_groups = {number for members in outline.groups.values() for number in members}
    members = {numbers[0]: numbers for numbers in outline.groups.values()}
    firsts = array(
        "q", (number for number in range(len(outline.sizes)) if number not in in_groups or number in members)
    )
    ranks = bytearray()
    for first in firsts:
        ranks += _rank([outline.hash(number) for number in members.get(first, (first,))], seed)
    high, low = np.frombuffer(ranks, ">u8").reshape(-1, 2).T
    picked: set[int] = set()
    left = wanted
    for place in np.lexsort((low, high)):  # stable: what says the same comes in the order it came in
        unit = members.get(firsts[place], (firsts[place],))
        size = sum(outline.sizes[number] for number in unit)
        if size <= left:
            picked.update(unit)
            left -= size
            if not left:
                break
    return len(firsts), frozenset(picked)


def _rank(hashes: list[bytes], seed: int) -> bytes:
    """A group's place in the order of holding out: a hash of the seed and of what its texts say."""
    return blake2b(b"".join([str(seed).encode(), *sorted(hashes)]), digest_size=_HASH_BYTES).digest()


def _tails(sizes: Sequence[int], wanted: int) -> dict[int, int]:
    """Bytes to cut off the end of which documents: the same fraction of every one that is long enough."""
    total = sum(sizes)
    long_enough = [number for number, size in enumerate(sizes) if size * wanted >= MIN_TAIL_BYTES * total]
    shared = sum(sizes[number] for number in long_enough)
    return {number: min(wanted * sizes[number] // shared, sizes[number] // 2) for number in long_enough}


def cut_near_end(text: str, tail_bytes: int) -> int:
    """Where to cut so that about ``tail_bytes`` remain: between paragraphs, else lines, else characters.

    Returns:
        An index into ``text``; there is something other than space on both sides of it. A boundary between
        paragraphs or lines is taken where there is one within half of ``tail_bytes`` of the exact place.

    Raises:
        GroundupError: there are not two characters other than space.
    """
    first, last = (
        len(text) - len(text.lstrip()) + 1,
        len(text.rstrip()) - 1,
    )  # the first and last possible cut
    if first > last:
        raise GroundupError("the text is too short to hold a part of it out.")
    head = text.encode()[: max(0, utf8_length(text) - tail_bytes)].decode("utf-8", "ignore")
    exact = min(max(len(head), first), last)
    reach = (len(text) - exact) // 2
    for boundary in ("\n\n", "\n"):
        after = text.find(boundary, exact, exact + reach)
        before = text.rfind(boundary, max(0, exact - reach), exact)
        found = [place + len(boundary) for place in (after, before) if place >= 0]
        found = [place for place in found if first <= place <= last]
        if found:
            return min(found, key=lambda place: abs(place - exact))
    return exact
