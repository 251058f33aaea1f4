"""Files of token ids as other projects write them.

nanoGPT (Karpathy 2022): ids one after another as little-endian uint16, nothing else; an end-of-text id after each
document. llm.c and modded-nanogpt put 1,024 bytes before them, int32 numbers of which the first three are 20240520, 1
and how many ids follow, and the end-of-text id before each document.

Megatron-LM (``megatron/core/datasets/indexed_dataset.py``): the ids in ``NAME.bin``, and in ``NAME.idx``, little-endian

    9 bytes       the magic MMIDIDX\\0\\0
    int64         the version, 1
    uint8         the type of the ids: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
    int64         S, the number of sequences
    int64         D, the number of documents and 1
    S x int32     tokens of each sequence
    S x int64     the byte in NAME.bin where each begins
    D x int64     the sequence at which each document begins, and S

Ours has one sequence per document, which ends with the end-of-text id, as ``--append-eod`` makes it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from groundup.data.shards import TokenSet
from groundup.runtime import GroundupError, os_errors

CHUNK = 1 << 22  # tokens looked at together

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sqBqq")
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_SHORT_IDS = 65_500  # Megatron takes 16 bits for vocabularies below this, 32 for others
_LLMC_MAGIC, _LLMC_BYTES = 20240520, 1024

Ids = npt.NDArray[np.integer[Any]]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenFile:
    """One file of token ids, memory-mapped.

    Args:
        path: the ``.bin``.
        layout: whose it is, for people.
        ids: all its ids, one after another.
        sequences: Megatron's alone: where each sequence begins and ends in ``ids``, int64 [S, 2].
        documents: Megatron's alone: the sequence at which each document begins, and S.
    """

    path: Path
    layout: str
    ids: Ids
    sequences: Int64Array | None = None
    documents: Int64Array | None = None

    @classmethod
    def open(cls, path: Path) -> TokenFile:
        """Open a ``.bin`` of any of the layouts above; Megatron's is the one with an ``.idx`` beside it.

        Raises:
            GroundupError: it is missing, damaged or none of them.
        """
        index = path.with_suffix(".idx")
        if index.is_file():
            return _open_megatron(path, index)
        with os_errors(path, "cannot read"):
            size = path.stat().st_size
            with open(path, "rb") as file:
                head = file.read(12)
        if len(head) == 12 and (numbers := struct.unpack("<3i", head))[0] == _LLMC_MAGIC:
            if numbers[1] != 1 or size != _LLMC_BYTES + 2 * numbers[2]:
                raise GroundupError(
                    f"{path}: a file of llm.c, of version {numbers[1]} with {numbers[2]:,} ids after {_LLMC_BYTES:,} "
                    f"bytes, but {size:,} bytes long. Version 1 can be read, with 2 bytes per id."
                )
            return cls(path, "llm.c", _map(path, "<u2", _LLMC_BYTES))
        if size == 0 or size % 2:
            raise GroundupError(f"{path}: {size:,} bytes, which are no 16-bit token ids. Is its .idx missing?")
        return cls(path, "nanoGPT", _map(path, "<u2"))

    def texts(self, end_of_text_id: int) -> Iterator[Ids]:
        """The ids of each document, without end-of-text ids; documents that consist of nothing else are left out.

        A document of Megatron's with end-of-text ids inside it (packed before it was written) is parted there.
        """
        if self.sequences is None or self.documents is None:
            yield from _parted(self.ids, end_of_text_id)
            return
        for first, last in pairwise(self.documents.tolist()):
            spans = self.sequences[first:last].tolist()
            if all(before[1] == after[0] for before, after in pairwise(spans)):
                whole = self.ids[spans[0][0] : spans[-1][1]] if spans else self.ids[:0]
            else:
                whole = np.concatenate([self.ids[start:stop] for start, stop in spans])
            yield from _parted(whole, end_of_text_id)


def id_type(layout: str, vocab_size: int) -> np.dtype:
    """The type that ``nanogpt`` or ``megatron`` gives the ids of a vocabulary."""
    return np.dtype("<u2" if layout == "nanogpt" or vocab_size < _SHORT_IDS else "<i4")


def write_megatron_index(path: Path, tokens: TokenSet, dtype: np.dtype) -> None:
    """Write the ``.idx`` of a token set, a sequence per document.

    Args:
        path: where to.
        tokens: whose ids were written one after another.
        dtype: as which they were written.

    Raises:
        GroundupError: a document has more tokens than an int32 can say, or the file cannot be written.
    """
    starts = tokens.document_starts()
    lengths = np.diff(starts, append=tokens.n_tokens)
    if len(lengths) and lengths.max() > np.iinfo(np.int32).max:
        raise GroundupError(
            f"{tokens.folder}: document {int(lengths.argmax()) + 1:,} has {lengths.max():,} tokens; Megatron's index "
            "counts to 2,147,483,647. Cut its text before it is prepared."
        )
    code = next(code for code, name in _TYPES.items() if np.dtype(name) == dtype)
    with os_errors(path, "cannot write"), open(path, "wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, code, len(starts), len(starts) + 1))
        lengths.astype("<i4").tofile(file)
        (starts * dtype.itemsize).astype("<i8").tofile(file)
        np.arange(len(starts) + 1, dtype="<i8").tofile(file)


def _open_megatron(path: Path, index: Path) -> TokenFile:
    with os_errors(index, "cannot read"):
        raw = index.read_bytes()
        n_bytes = path.stat().st_size
    if len(raw) < _HEADER.size or not raw.startswith(_MAGIC):
        raise GroundupError(f"{index}: not an index of Megatron-LM. Rename it if the .bin beside it is nanoGPT's.")
    _, version, code, n_sequences, n_documents = _HEADER.unpack_from(raw)
    if version != 1 or code not in _TYPES:
        raise GroundupError(f"{index}: version {version}, type {code}; version 1 and types 1 to 5 and 8 can be read.")
    least = _HEADER.size + 12 * n_sequences + 8 * n_documents
    if min(n_sequences, n_documents) < 0 or len(raw) < least:
        raise GroundupError(f"{index}: {len(raw):,} bytes, {least:,} expected: it is cut short.")
    lengths = np.frombuffer(raw, "<i4", n_sequences, _HEADER.size).astype(np.int64)
    pointers = np.frombuffer(raw, "<i8", n_sequences, _HEADER.size + 4 * n_sequences)
    documents = np.frombuffer(raw, "<i8", n_documents, _HEADER.size + 12 * n_sequences)
    width = np.dtype(_TYPES[code]).itemsize
    fits = (
        n_bytes % width == 0
        and not (pointers % width).any()
        and bool(((lengths >= 0) & (pointers >= 0) & (pointers + width * lengths <= n_bytes)).all())
        and bool((np.diff(documents) >= 0).all())
        and (n_documents == 0 or 0 <= documents[0] <= documents[-1] <= n_sequences)
    )
    if not fits:
        raise GroundupError(f"{path}: does not fit its index {index.name}: one of them is damaged, or of another set.")
    first = pointers // width
    return TokenFile(
        path, "Megatron-LM", _map(path, _TYPES[code]), np.stack([first, first + lengths], axis=1), documents
    )


def _map(path: Path, dtype: str, offset: int = 0) -> Ids:
    with os_errors(path, "cannot read"):
        if path.stat().st_size == offset:  # which cannot be mapped
            return np.empty(0, dtype)
        return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset))


def _parted(ids: Ids, end_of_text_id: int) -> Iterator[Ids]:
    """What lies between end-of-text ids."""
    begun = 0
    for low in range(0, len(ids), CHUNK):
        for place in (np.flatnonzero(ids[low : low + CHUNK] == end_of_text_id) + low).tolist():
            if place > begun:
                yield ids[begun:place]
            begun = place + 1
    if begun < len(ids):
        yield ids[begun:]
