"""Holding out: which part of the text the model never trains on.

By document wherever there are enough of them, so that no held-out line has its context in the training part.
A book or a handful of files is cut instead, and its end is held out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b

from groundup.data.document import Document, utf8_length
from groundup.runtime import GroundupError

MIN_GROUPS = 20  # with fewer documents, one of them is too large a part of the whole to be held out
MIN_VAL_BYTES = 1024  # a small text holds out this much (a quarter of it at most): less measures nothing
MIN_TAIL_BYTES = 256  # a shorter end of a document is not worth cutting off


@dataclass(frozen=True)
class Split:
    """The two parts, and the way they were told apart.

    Args:
        train: what the model trains on, in the order given.
        val: what is held out, in the order given.
        way: "by document", "end of each document" or "end of the longest document".
        wanted_bytes: how much was to be held out.
    """

    train: list[Document]
    val: list[Document]
    way: str
    wanted_bytes: int


def split(documents: list[Document], val_fraction: float, max_val_bytes: int, seed: int) -> Split:
    """Hold out about ``val_fraction`` of the bytes, the same ones for the same text and seed.

    Documents of one group stay together. They are taken in the order of a hash of seed and content, and
    passed over where they are larger than what is still wanted. Neither part is ever empty.

    Args:
        documents: cleaned, at least one, of at least two characters that are not space.
        val_fraction: of the UTF-8 bytes, at most one half.
        max_val_bytes: of UTF-8.
        seed: another seed holds out other documents; the ends of documents are the same for all.

    Raises:
        GroundupError: there are not even two characters to part.
    """
    sizes = [utf8_length(document.text) for document in documents]
    total = sum(sizes)
    wanted = min(max(int(val_fraction * total), min(MIN_VAL_BYTES, total // 4)), max_val_bytes)
    held_out = _pick_groups(documents, sizes, wanted, seed)
    n_groups = len({document.group or index for index, document in enumerate(documents)})
    enough = held_out and sum(sizes[index] for index in held_out) >= wanted / 2

    if enough and n_groups >= MIN_GROUPS:
        return _by_document(documents, held_out, wanted)
    tails = _tails(sizes, wanted)
    if tails:
        return _cut(
            documents,
            tails,
            "end of each document" if len(tails) > 1 else "end of the longest document",
            wanted,
        )
    if enough:
        return _by_document(documents, held_out, wanted)
    longest = max(range(len(documents)), key=sizes.__getitem__)
    return _cut(documents, {longest: min(wanted, sizes[longest] // 2)}, "end of the longest document", wanted)


def _pick_groups(documents: list[Document], sizes: list[int], wanted: int, seed: int) -> set[int]:
    """Indices of the documents to hold out, whole groups, of ``wanted`` bytes together at most."""
    members: dict[str | int, list[int]] = {}
    for index, document in enumerate(documents):
        members.setdefault(document.group or index, []).append(index)
    ranked = sorted(members.values(), key=lambda group: _rank((documents[index].text for index in group), seed))
    picked: set[int] = set()
    left = wanted
    for group in ranked:
        size = sum(sizes[index] for index in group)
        if size <= left:
            picked.update(group)
            left -= size
    return picked


def _rank(texts: Iterable[str], seed: int) -> bytes:
    """A group's place in the order of holding out: a hash of the seed and of what its texts say."""
    hashes = sorted(blake2b(text.encode(), digest_size=16).digest() for text in texts)
    return blake2b(b"".join([str(seed).encode(), *hashes]), digest_size=16).digest()


def _tails(sizes: list[int], wanted: int) -> dict[int, int]:
    """Bytes to cut off the end of which documents: the same fraction of every one that is long enough."""
    total = sum(sizes)
    long_enough = [index for index, size in enumerate(sizes) if size * wanted >= MIN_TAIL_BYTES * total]
    shared = sum(sizes[index] for index in long_enough)
    return {index: min(wanted * sizes[index] // shared, sizes[index] // 2) for index in long_enough}


def _by_document(documents: list[Document], held_out: set[int], wanted: int) -> Split:
    train = [document for index, document in enumerate(documents) if index not in held_out]
    val = [document for index, document in enumerate(documents) if index in held_out]
    return Split(train, val, "by document", wanted)


def _cut(documents: list[Document], tails: dict[int, int], way: str, wanted: int) -> Split:
    train, val = [], []
    for index, document in enumerate(documents):
        if index not in tails:
            train.append(document)
            continue
        at = cut_near_end(document.text, tails[index])
        train.append(replace(document, text=document.text[:at]))
        val.append(replace(document, text=document.text[at:], name=f"{document.name} (end)"))
    return Split(train, val, way, wanted)


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
