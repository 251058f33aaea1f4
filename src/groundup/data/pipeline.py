"""The whole way from text to token shards: collect, clean, hold out, train the tokenizer, write."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from groundup.data.clean import clean
from groundup.data.dedup import ExactDuplicates
from groundup.data.document import Document, Dropped, Source, count_reasons, printable, utf8_length
from groundup.data.prepared import (
    DROPPED,
    FORMAT,
    PARTS,
    STATS,
    VERSION,
    PreparedData,
    read_stats,
    write_documents,
)
from groundup.data.recipe import CorpusRecipe
from groundup.data.shards import ShardWriter
from groundup.data.sources import open_source
from groundup.data.split import Split, split
from groundup.data.stdlib_source import TABLE
from groundup.runtime import GroundupError, UsageError, atomic_folder, progress, say, warn, write_json
from groundup.runtime.files import remove_leftovers
from groundup.tokenizer import Tokenizer

MIN_TEXT_BYTES = 2_000
SMALL_TEXT_BYTES = 100_000

_BATCH_CHARS = 4_000_000  # text encoded at a time
_EXPECTED_SKIPS = {"hidden or tool folder", "hidden file", TABLE}  # what nobody needs to be warned about
_OURS = {*PARTS, "tokenizer", STATS, DROPPED}


def suggest_vocab_size(n_bytes: int, most: int = 32_768) -> int:
    """A vocabulary for so much training text: 0.25 n^0.6, rounded down to a power of two, from 288 to ``most``.

    A rule of thumb of ours, not fitted to measurements: it gives 1,024 tokens to 1.1 MB, 4,096 to 14 MB and 32,768 from
    480 MB on.
    """
    size = 0.25 * max(n_bytes, 1) ** 0.6
    return max(min(1 << max(int(size).bit_length() - 1, 0), most), 288)


def prepare(
    data: str,
    out: Path,
    *,
    vocab_size: int | None = None,
    max_vocab_size: int = 32_768,
    pattern: str = "gpt4",
    tokenizer: Tokenizer | None = None,
    corpus: CorpusRecipe | None = None,
    data_dir: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> PreparedData:
    """Turn text into a corpus for training, in a folder that is whole or absent.

    What lies at ``out`` already is used as it is if it was made from the same inputs, and replaced if it was
    made from others.

    Args:
        data: what to read; see :func:`groundup.data.open_source`.
        out: the folder to make.
        vocab_size: of the tokenizer to train; by default what :func:`suggest_vocab_size` gives for the
            training part.
        max_vocab_size: most tokens where ``vocab_size`` is not given; a small model has no use for many.
        pattern: how the tokenizer cuts text before merging.
        tokenizer: use this one and train none.
        corpus: what to keep, drop and hold out.
        data_dir: where downloads are kept.
        limit: read at most so many documents.
        seed: of the choice of what is held out.

    Raises:
        GroundupError: the text cannot be read or is too little, or ``out`` cannot be written or holds
            something else.
    """
    corpus = corpus or CorpusRecipe()
    out = Path(out).expanduser()
    if tokenizer is not None and vocab_size not in (None, tokenizer.vocab_size):
        raise UsageError(
            f"vocab_size = {vocab_size}, but the given tokenizer has {tokenizer.vocab_size:,} tokens. Leave one out."
        )
    _check_place(out)
    remove_leftovers(out.parent, out.name)
    source = open_source(data, data_dir, limit)
    inputs = {
        "data": printable(data),
        "source": source.identity(),
        "limit": limit,
        "corpus": asdict(corpus),
        "vocab_size": vocab_size or f"by size, at most {max_vocab_size}",
        "pattern": pattern,
        "tokenizer": tokenizer.fingerprint if tokenizer is not None else None,
        "seed": seed,
    }
    inputs = json.loads(json.dumps(inputs))  # as it will be read back
    if (ready := _already_made(out, inputs)) is not None:
        say(f"{out}: this corpus is there already, made from the same text and settings.")
        return ready
    with atomic_folder(out) as folder:
        build = _Build(folder, source, corpus, seed, inputs)
        documents = build.clean(build.collect())
        parts = build.split(documents)
        size = vocab_size or suggest_vocab_size(build.counts["bytes"]["train"], max_vocab_size)
        chosen = tokenizer or build.train_tokenizer(parts, size, pattern)
        build.write(parts, chosen)
    return PreparedData.open(out)


@dataclass
class _Build:
    """One preparation under way: its stages, and what they note for ``stats.json`` and ``dropped.jsonl``."""

    folder: Path
    source: Source
    corpus: CorpusRecipe
    seed: int
    inputs: dict[str, Any]
    dropped: list[Dropped] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=lambda: {"documents": {}, "bytes": {}})

    def collect(self) -> list[Document]:
        """Read the source, up to ``corpus.max_bytes``."""
        documents: list[Document] = []
        read, most = 0, self.corpus.max_bytes
        with self._stage("collect"), progress("collecting text", most, "bytes") as bar:
            for document in self.source:
                size = utf8_length(document.text)
                if most is not None and read + size > most:  # a part of the document that reaches past the end
                    head = document.text.encode("utf-8", "surrogatepass")[: most - read].decode("utf-8", "ignore")
                    document, size = replace(document, text=head), utf8_length(head)
                    most = read + size
                documents.append(document)
                read += size
                bar.advance(size)
                if read == most:
                    break
        self._count("collected", documents, read)
        self._warn_of_skipped()
        return documents

    def clean(self, documents: list[Document]) -> list[Document]:
        """Mend every document; drop what is no use, and what was there before."""
        kept: list[Document] = []
        is_new = ExactDuplicates()
        with self._stage("clean"), progress("cleaning", len(documents), "documents") as bar:
            for document in documents:
                result = clean(document, self.corpus.min_chars)
                if isinstance(result, Document) and self.corpus.dedup:
                    result = is_new(result)
                if isinstance(result, Document):
                    kept.append(result)
                else:
                    self.dropped.append(result)
                bar.advance()
        self._count("cleaned", kept)
        self._check_size()
        return kept

    def split(self, documents: list[Document]) -> Split:
        """Hold out the validation part."""
        with self._stage("clean"):
            parts = split(documents, self.corpus.val_fraction, self.corpus.max_val_bytes, self.seed)
        self._count("train", parts.train)
        self._count("val", parts.val)
        return parts

    def train_tokenizer(self, parts: Split, vocab_size: int, pattern: str) -> Tokenizer:
        """Train a tokenizer on the training part alone."""
        with self._stage("tokenizer"):
            return Tokenizer.train((document.text for document in parts.train), vocab_size=vocab_size, pattern=pattern)

    def write(self, parts: Split, tokenizer: Tokenizer) -> None:
        """Write tokens, texts, tokenizer, what was dropped, and the stats."""
        tokens = {}
        total = self.counts["bytes"]["train"] + self.counts["bytes"]["val"]
        with self._stage("shards"), progress("writing token shards", total, "bytes") as bar:
            tokenizer.save(self.folder / "tokenizer")
            for part, documents in zip(PARTS, (parts.train, parts.val), strict=True):
                place = self.folder / part
                place.mkdir()
                tokens[part] = 0
                writer = ShardWriter(place, tokenizer, self.corpus.shard_tokens)
                for batch in _batches(documents):
                    ids, offsets = tokenizer.encode_array([document.text for document in batch])
                    for document, start, end in zip(batch, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
                        size = utf8_length(document.text)
                        writer.add(ids[start:end], size)
                        tokens[part] += end - start + 1
                        bar.advance(size)
                writer.close()
                write_documents(place / "documents.jsonl.gz", documents)
        self._write_notes(parts, tokenizer, tokens)

    def _write_notes(self, parts: Split, tokenizer: Tokenizer, tokens: dict[str, int]) -> None:
        lines = []
        for one in (*self.source.skipped, *self.dropped):
            lines.append(
                json.dumps({key: value for key, value in asdict(one).items() if value}, ensure_ascii=False) + "\n"
            )
        (self.folder / DROPPED).write_text("".join(lines), encoding="utf-8", errors="replace")
        stats = {
            "format": FORMAT,
            "version": VERSION,
            "source": {"name": self.source.name, "description": self.source.description},
            **self.counts,
            "skipped": count_reasons(self.source.skipped),
            "dropped": count_reasons(self.dropped),
            "split": parts.way,
            "vocab_size": tokenizer.vocab_size,
            "tokens": tokens,
            "bytes_per_token": {part: round(self.counts["bytes"][part] / tokens[part], 4) for part in PARTS},
            "seconds": {stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
            "inputs": self.inputs,
        }
        write_json(self.folder / STATS, stats)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def _count(self, stage: str, documents: list[Document], n_bytes: int | None = None) -> None:
        self.counts["documents"][stage] = len(documents)
        if n_bytes is None:
            n_bytes = sum(utf8_length(document.text) for document in documents)
        self.counts["bytes"][stage] = n_bytes

    def _warn_of_skipped(self) -> None:
        surprising = [one for one in self.source.skipped if one.reason not in _EXPECTED_SKIPS]
        if surprising:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in count_reasons(surprising).items())
            warn(
                f"{self.source.name}: left out {len(surprising):,} files or records: {reasons} "
                f"(first: {surprising[0].name})."
            )

    def _check_size(self) -> None:
        size = self.counts["bytes"]["cleaned"]
        if size < MIN_TEXT_BYTES:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in count_reasons(self.dropped).items())
            dropped = f" (documents dropped: {reasons})" if reasons else ""
            raise GroundupError(
                f"{self.inputs['data']}: {size:,} bytes of text after cleaning{dropped}, "
                f"at least {MIN_TEXT_BYTES:,} are needed. Give more text with --data."
            )
        if size < SMALL_TEXT_BYTES:
            warn(
                f"{self.source.name}: a very small corpus ({size:,} bytes): "
                "the model will learn its letters and words, little more."
            )


def _batches(documents: list[Document]) -> Iterator[list[Document]]:
    """Documents of about ``_BATCH_CHARS`` characters together."""
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _check_place(out: Path) -> None:
    """Refuse to replace a folder that is not ours.

    Raises:
        GroundupError: something else stands at ``out``.
    """
    try:
        entries = sorted(entry.name for entry in out.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise GroundupError(
            f"{out}: cannot be used as a folder ({error.strerror}). Choose another with --out."
        ) from error
    if not entries:
        return
    foreign = [name for name in entries if name not in _OURS]
    if foreign or STATS not in entries:
        raise GroundupError(
            f"{out}: this folder holds other things ({(foreign or entries)[0]}), and would be replaced. "
            "Choose another with --out."
        )


def _already_made(out: Path, inputs: dict[str, Any]) -> PreparedData | None:
    """The corpus at ``out`` if it was made from these inputs and is whole."""
    if not (out / STATS).is_file():
        return None
    try:
        if read_stats(out)["inputs"] != inputs:
            return None
        return PreparedData.open(out)
    except (GroundupError, KeyError) as error:
        warn(f"the corpus made before cannot be used and is made again. {error}")
        return None
