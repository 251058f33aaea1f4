"""Token shards: a corpus as numbers on the disk, read without loading it.

A folder holds ``manifest.json``, and per shard a ``.bin`` (token ids, little-endian uint16 or uint32, an
end-of-text id after every document) and an ``.idx`` (little-endian int64: where in the ``.bin`` a document
starts). The shards in order are one long sequence of tokens. A document that does not fit into what is left
of a shard starts the next one; one that is longer than a whole shard runs on into the next.
"""

from __future__ import annotations

import bisect
import hashlib
import mmap
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from groundup.runtime import GroundupError, os_errors, read_json, sha256_file, write_json

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

FORMAT = "groundup token shards"
VERSION = 1
MANIFEST = "manifest.json"
_MEND = "Prepare the data again: delete this folder, then run the same command."

_HELD_TOKENS = 1 << 22  # tokens held before they are written
_RELEASE_BYTES = 64 << 20  # mapped memory that may pile up before it is handed back
_FAULT_BYTES = 64 << 10  # what one page fault may map: the kernel maps neighbouring pages that are in memory, too

TokenArray = npt.NDArray[np.unsignedinteger[Any]]
IdArray = npt.NDArray[np.integer[Any]]


class ShardWriter:
    """Writes shards into a folder that is there; ``close`` writes the manifest that makes them readable.

    Args:
        folder: where; usually one that :func:`groundup.runtime.atomic_folder` puts into place as a whole.
        tokenizer: whose ids these are; its fingerprint goes into the manifest.
        shard_tokens: most tokens per shard.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self.folder, self.shard_tokens = folder, shard_tokens
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        if tokenizer.end_of_text_id is None:
            raise GroundupError("this tokenizer has no <|endoftext|> token to put between documents. Use one that has.")
        self._end_of_text = tokenizer.end_of_text_id
        self._about_tokenizer = {
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text_id": tokenizer.end_of_text_id,
        }
        self._shards: list[dict[str, Any]] = []
        # Of the shard being filled:
        self._pieces: list[TokenArray] = []  # what is not in its file yet
        self._starts: list[int] = []
        self._digest = hashlib.sha256()
        self._filled = self._held = self._text_bytes = 0

    def add(self, ids: TokenArray, text_bytes: int) -> None:
        """Append one document.

        Args:
            ids: its token ids, without the end-of-text id.
            text_bytes: the length of its text in UTF-8.
        """
        document = np.empty(len(ids) + 1, self._dtype)
        document[:-1] = ids
        document[-1] = self._end_of_text
        if self._filled and self._filled + len(document) > self.shard_tokens:
            self._flush()
        self._starts.append(self._filled)
        self._text_bytes += text_bytes
        while self._filled + len(document) > self.shard_tokens:
            room = self.shard_tokens - self._filled
            self._append(document[:room])
            self._flush()
            document = document[room:]
        self._append(document)

    def close(self) -> None:
        """Write what is left, and the manifest."""
        if self._filled:
            self._flush()
        totals = {
            "n_tokens": sum(shard["tokens"] for shard in self._shards),
            "n_documents": sum(shard["documents"] for shard in self._shards),
            "n_bytes": sum(shard["text_bytes"] for shard in self._shards),
        }
        head = {"format": FORMAT, "version": VERSION, **self._about_tokenizer, "dtype": self._dtype.name}
        write_json(
            self.folder / MANIFEST,
            {**head, "shard_tokens": self.shard_tokens, **totals, "shards": self._shards},
        )

    def _append(self, ids: TokenArray) -> None:
        self._pieces.append(ids)
        self._filled += len(ids)
        self._held += len(ids)
        if self._held >= _HELD_TOKENS:
            self._spill()

    def _spill(self) -> None:
        """Move what is held to the end of the shard's file."""
        raw = np.concatenate(self._pieces).tobytes()
        path = self.folder / f"{self._name()}.bin"
        with os_errors(path, "cannot write"), open(path, "wb" if self._held == self._filled else "ab") as file:
            file.write(raw)
        self._digest.update(raw)
        self._pieces, self._held = [], 0

    def _flush(self) -> None:
        if self._held:
            self._spill()
        name, starts = self._name(), np.array(self._starts, "<i8").tobytes()
        path = self.folder / f"{name}.idx"
        with os_errors(path, "cannot write"):
            path.write_bytes(starts)
        self._shards.append(
            {
                "file": f"{name}.bin",
                "index": path.name,
                "tokens": self._filled,
                "documents": len(self._starts),
                "text_bytes": self._text_bytes,
                "sha256": self._digest.hexdigest(),
                "index_sha256": hashlib.sha256(starts).hexdigest(),
            }
        )
        self._starts, self._digest = [], hashlib.sha256()
        self._filled = self._text_bytes = 0

    def _name(self) -> str:
        return f"tokens-{len(self._shards):05d}"


class TokenSet:
    """A folder of token shards, memory-mapped, read as one long sequence. Made by :meth:`open`.

    Attributes:
        folder: where it lies.
        n_tokens: tokens in all, the end-of-text ids with them.
        n_bytes: UTF-8 bytes of the text they stand for, which is what bits per byte are counted against.
        n_documents: how many documents.
        dtype: numpy's uint16 or uint32.
        vocab_size: of the tokenizer; every id is below it.
        end_of_text_id: what stands after each document.
        fingerprint: of the tokenizer.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], shards: Sequence[TokenArray]) -> None:
        self.folder = folder
        self.n_tokens: int = manifest["n_tokens"]
        self.n_bytes: int = manifest["n_bytes"]
        self.n_documents: int = manifest["n_documents"]
        self.dtype = np.dtype(manifest["dtype"])
        self.vocab_size: int = manifest["vocab_size"]
        self.end_of_text_id: int = manifest["end_of_text_id"]
        self.fingerprint: str = manifest["tokenizer"]
        self._entries: list[dict[str, Any]] = manifest["shards"]
        self._shards = shards
        self._starts = [0, *accumulate(entry["tokens"] for entry in self._entries)]  # of each shard, and the end
        self._maps: Sequence[mmap.mmap] = ()
        self._touched = 0  # bytes mapped since the last release, at most

    @classmethod
    def open(cls, folder: Path, verify: bool = False, tokenizer: Tokenizer | None = None) -> TokenSet:
        """Open a folder of shards; nothing but the manifest is read.

        Args:
            folder: where they lie.
            verify: whether to read everything and compare it with the manifest's SHA-256.
            tokenizer: where given, the one whose ids these must be.

        Raises:
            GroundupError: a file is missing, cut short or (``verify``) changed, or the ids are another
                tokenizer's.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        if tokenizer is not None and tokenizer.fingerprint != manifest["tokenizer"]:
            raise GroundupError(
                f"{folder}: these token ids were made by another tokenizer "
                f"({manifest['tokenizer'][:12]}…, not {tokenizer.fingerprint[:12]}…). "
                "Prepare the data again with this tokenizer, or use the one that lies beside the data."
            )
        maps = [_map_shard(folder, entry, manifest["dtype"]) for entry in manifest["shards"]]
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        # A plain array on top of the map: indexing numpy.memmap itself is several times slower.
        tokens = cls(folder, manifest, [np.frombuffer(mapped, dtype) for mapped in maps])
        tokens._maps = maps
        if verify:
            tokens.verify()
        return tokens

    def verify(self) -> None:
        """Read every file and compare it with the manifest.

        Raises:
            GroundupError: naming the first file that differs.
        """
        for entry in self._entries:
            for file, digest in ((entry["file"], entry["sha256"]), (entry["index"], entry["index_sha256"])):
                if sha256_file(self.folder / file) != digest:
                    raise GroundupError(f"{self.folder / file}: damaged, its SHA-256 is not the manifest's. {_MEND}")

    def read(self, start: int, length: int) -> TokenArray:
        """The tokens ``start`` to ``start + length``, across shard borders: a copy of ``dtype``.

        Raises:
            IndexError: some of them do not exist.
            GroundupError: an id is none of the vocabulary's; its file is named.
        """
        if start < 0 or length < 0 or start + length > self.n_tokens:
            raise IndexError(f"tokens {start} to {start + length} of {self.n_tokens}")
        return self.windows(np.array([start]), length)[0] if length else np.empty(0, self.dtype)

    def windows(self, starts: npt.NDArray[np.int64], length: int) -> TokenArray:
        """Windows of equal length; where one reaches past the last token it goes on at the first.

        Args:
            starts: int64 [B], each in ``range(n_tokens)``.
            length: tokens per window, at most ``n_tokens``.

        Returns:
            A copy [B, length] of ``dtype``.

        Raises:
            GroundupError: an id is none of the vocabulary's; its file is named.
        """
        result = np.empty((len(starts), length), self.dtype)
        self.fill(result, starts)
        return result

    def fill(self, rows: Iterable[IdArray], starts: npt.NDArray[np.int64], within: IdArray | None = None) -> None:
        """Write windows into arrays, converted on the way to their type; as :meth:`windows` otherwise.

        Args:
            rows: arrays of one dimension, or one of two dimensions; each takes a window of its own length.
            starts: int64, one per row.
            within: the array that the rows are views of, where they are several: it is looked at once.
        """
        rows = rows if isinstance(rows, np.ndarray) else list(rows)
        borders, shards = self._starts, self._shards
        for row, start in zip(rows, starts.tolist(), strict=True):
            number = bisect.bisect_right(borders, start) - 1
            end = start + len(row)
            if end <= borders[number + 1]:  # nearly always
                before = borders[number]
                row[:] = shards[number][start - before : end - before]
            else:
                self._fill_across(row, start)
        whole = rows if within is None else within
        assert isinstance(whole, np.ndarray), "several rows, and not what they are views of"
        if whole.size and int(whole.max()) >= self.vocab_size:
            self._refuse_id(rows, starts)
        self._touched += len(starts) * _FAULT_BYTES + whole.size * self.dtype.itemsize
        if self._touched > _RELEASE_BYTES:
            self.release()

    def _fill_across(self, row: IdArray, start: int) -> None:
        """Fill one window that runs on into the next shard, or over the end to the beginning."""
        filled = 0
        while filled < len(row):
            number = bisect.bisect_right(self._starts, start) - 1
            inside = start - self._starts[number]
            piece = self._shards[number][inside : inside + len(row) - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            start = (start + len(piece)) % self.n_tokens

    def _refuse_id(self, rows: Iterable[IdArray], starts: npt.NDArray[np.int64]) -> NoReturn:
        place, found = next(
            (start + int(column), int(row[column]))
            for row, start in zip(rows, starts.tolist(), strict=True)
            for column in np.flatnonzero(row >= self.vocab_size)[:1]
        )
        number = bisect.bisect_right(self._starts, place % self.n_tokens) - 1
        raise GroundupError(
            f"{self.folder / self._entries[number]['file']}: damaged, its token "
            f"{place % self.n_tokens - self._starts[number]:,} is {found:,} where the vocabulary ends at "
            f"{self.vocab_size - 1:,}. {_MEND}"
        )

    def release(self) -> None:
        """Hand back the memory that mapped tokens take; they stay in the system's cache while it has room."""
        self._touched = 0
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    def document_starts(self) -> npt.NDArray[np.int64]:
        """Where each document starts in the whole sequence: int64 [n_documents].

        Raises:
            GroundupError: an index cannot be read, or is damaged.
        """
        parts = []
        for start, entry in zip(self._starts, self._entries, strict=False):
            path = self.folder / entry["index"]
            with os_errors(path, "cannot read"):
                own = np.fromfile(path, "<i8").astype(np.int64)
            if len(own) and (own[0] < 0 or own[-1] >= entry["tokens"] or (np.diff(own) < 1).any()):
                raise GroundupError(f"{path}: damaged, documents do not start in order within the shard. {_MEND}")
            parts.append(own + start)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest = read_json(path, "data manifest")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise GroundupError(f"{path}: not a manifest of token shards. {_MEND}")
    if manifest.get("version") != VERSION:
        raise GroundupError(
            f"{path}: version {manifest.get('version')} of the format; this groundup reads {VERSION}. {_MEND}"
        )
    known = {
        "tokenizer",
        "vocab_size",
        "end_of_text_id",
        "dtype",
        "n_tokens",
        "n_documents",
        "n_bytes",
        "shards",
    }
    if missing := known - manifest.keys():
        raise GroundupError(f"{path}: damaged, it lacks {', '.join(sorted(missing))}. {_MEND}")
    return manifest


def _map_shard(folder: Path, entry: dict[str, Any], dtype: str) -> mmap.mmap:
    """Map one shard's tokens after comparing the sizes of its files with the manifest."""
    width = np.dtype(dtype).itemsize
    for file, expected in (
        (entry["file"], entry["tokens"] * width),
        (entry["index"], entry["documents"] * 8),
    ):
        path = folder / file
        with os_errors(path, "cannot read"):
            size = path.stat().st_size
        if size != expected:
            raise GroundupError(f"{path}: {size:,} bytes, {expected:,} expected: it is damaged. {_MEND}")
    path = folder / entry["file"]
    with os_errors(path, "cannot read"), path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # good even when the file is deleted
