"""A prepared corpus on the disk: token shards, their texts, the tokenizer, and how it came about."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

from groundup.data.document import Document, utf8_length
from groundup.data.shards import MANIFEST, ShardWriter, TokenSet
from groundup.runtime import GroundupError, os_errors, read_json
from groundup.tokenizer import Tokenizer

FORMAT = "groundup prepared corpus"
VERSION = 1
PARTS = ("train", "val")
STATS = "stats.json"
DOCUMENTS = "documents.jsonl.gz"
DROPPED = "dropped.jsonl"
DECODED = "decoded from the tokens"  # under "texts" in stats.json

_BATCH_CHARS = 4_000_000  # text encoded at a time


@dataclass(frozen=True)
class PreparedData:
    """A corpus ready for training.

    Args:
        folder: where it lies.
        tokenizer: the one its tokens were made with.
        train: the tokens to train on.
        val: the tokens held out.
        stats: documents and bytes at each stage, what was dropped, seconds, bytes per token, the way of the
            split.
        find: gives the path of a file of the corpus that need not be in the folder yet, for one that lies elsewhere.
    """

    folder: Path
    tokenizer: Tokenizer
    train: TokenSet
    val: TokenSet
    stats: dict[str, Any]
    find: Callable[[str], Path] | None = None

    @classmethod
    def open(cls, folder: Path, verify: bool = False) -> PreparedData:
        """Open a prepared corpus.

        Args:
            folder: what :func:`groundup.data.prepare` wrote.
            verify: whether to compare every token shard with its SHA-256.

        Raises:
            GroundupError: it is not one, or a file of it is missing or damaged.
        """
        folder = Path(folder)
        stats = read_stats(folder)
        tokenizer = Tokenizer.load(folder / "tokenizer")
        train, val = (TokenSet.open(folder / part, verify, tokenizer) for part in PARTS)
        return cls(folder, tokenizer, train, val, stats)

    def digest(self) -> str:
        """A SHA-256 of both manifests, and so of every token: what a run notes to know its corpus again.

        Raises:
            GroundupError: a manifest cannot be read.
        """
        found = sha256()
        for part in PARTS:
            path = self.folder / part / MANIFEST
            with os_errors(path, "cannot read"):
                found.update(sha256(path.read_bytes()).digest())
        return found.hexdigest()

    def texts(self, part: str) -> Iterator[str]:
        """The texts of ``"train"`` or ``"val"``, document by document, in the order of the tokens."""
        return (document.text for document in self.documents(part))

    def documents(self, part: str) -> Iterator[Document]:
        """The documents of ``"train"`` or ``"val"``, in the order of the tokens.

        A corpus imported as tokens has no texts of its own: its tokens are decoded.

        Raises:
            GroundupError: the file of documents is missing or damaged.
        """
        if part not in PARTS:
            raise ValueError(f"part {part!r}: there are {' and '.join(PARTS)}")
        if self.stats.get("texts") == DECODED:
            return self._decoded(part)
        name = f"{part}/{DOCUMENTS}"
        return read_documents(self.find(name) if self.find else self.folder / name)

    def _decoded(self, part: str) -> Iterator[Document]:
        tokens = self.train if part == "train" else self.val
        starts = [*tokens.document_starts().tolist(), tokens.n_tokens]
        for number, (start, end) in enumerate(pairwise(starts)):
            ids = tokens.read(start, end - start - 1)  # without the end-of-text id
            yield Document(self.tokenizer.decode(ids), f"{part}#{number + 1}")

    def text_bytes(self, part: str) -> bytes:
        """The text of ``"train"`` or ``"val"`` as UTF-8, nothing between documents: ``n_bytes`` bytes."""
        return b"".join(text.encode() for text in self.texts(part))


def read_stats(folder: Path) -> dict[str, Any]:
    """The ``stats.json`` of a prepared corpus.

    Raises:
        GroundupError: ``folder`` holds no prepared corpus, or one of another version.
    """
    path = folder / STATS
    if not path.is_file():
        raise GroundupError(f"{folder}: no prepared corpus (there is no {STATS}). Make one with: groundup data prepare")
    stats = read_json(path, "corpus description")
    if not isinstance(stats, dict) or stats.get("format") != FORMAT or stats.get("version") != VERSION:
        raise GroundupError(f"{path}: not a prepared corpus of this version of groundup. Prepare the data again.")
    return stats


def document_line(document: Document) -> bytes:
    """A document as a line of JSON, without its language, which is of no use from here on."""
    record = {"name": document.name, "text": document.text}
    if document.group is not None:
        record["group"] = document.group
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def document_of(line: bytes) -> Document:
    """The document that :func:`document_line` wrote down.

    Raises:
        ValueError: it is not JSON.
        KeyError: its name or text is missing.
    """
    record = json.loads(line)
    return Document(record["text"], record["name"], record.get("group"))


class PartWriter:
    """Writes one part of a corpus, document by document: its token shards and its texts, the same for the same.

    Args:
        folder: of the part; it is made.
        tokenizer: encodes it.
        shard_tokens: most tokens in one shard.
        written: told how many bytes of text have been encoded, now and then.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int, written: Callable[[int], None]) -> None:
        self._folder, self._tokenizer, self._written = folder, tokenizer, written
        folder.mkdir()
        self._shards = ShardWriter(folder, tokenizer, shard_tokens)
        self._texts: list[str] = []
        self._chars = 0
        self._files = ExitStack()
        self.n_tokens = 0

    def __enter__(self) -> PartWriter:
        """Open the file of texts."""
        raw = self._files.enter_context(open(self._folder / DOCUMENTS, "wb"))
        # Level 1 packs 4 times as fast as the default and takes a fifth more room; no time stamp, so that equal
        # runs are equal.
        packed = gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0)
        self._documents = self._files.enter_context(packed)
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        """Write what is left, and the manifest that makes the part readable, unless something went wrong."""
        with self._files:
            if error is None:
                self._encode()
                self._shards.close()

    def add(self, document: Document) -> None:
        """Append one document."""
        self._documents.write(document_line(document))
        self._texts.append(document.text)
        self._chars += len(document.text)
        if self._chars >= _BATCH_CHARS:
            self._encode()

    def _encode(self) -> None:
        if not self._texts:
            return
        ids, offsets = self._tokenizer.encode_array(self._texts)
        for text, (start, end) in zip(self._texts, pairwise(offsets.tolist()), strict=True):
            size = utf8_length(text)
            self._shards.add(ids[start:end], size)
            self.n_tokens += end - start + 1
            self._written(size)
        self._texts, self._chars = [], 0


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the documents that a :class:`PartWriter` wrote.

    Raises:
        GroundupError: the file is missing or damaged.
    """
    with os_errors(path, "cannot read"):
        try:
            with gzip.open(path, "rb") as file:
                for line in file:
                    yield document_of(line)
        except (EOFError, gzip.BadGzipFile, zlib.error, ValueError, KeyError) as error:
            raise GroundupError(
                f"{path}: damaged ({error}). Prepare the data again: delete {path.parent.parent}."
            ) from error
