"""The whole way from text to token shards: collect, clean, hold out, train the tokenizer, write."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from groundup.data.clean import clean
from groundup.data.dedup import ExactDuplicates
from groundup.data.document import Document, Dropped, Source, count_reasons, printable, utf8_length
from groundup.data.places import is_remote
from groundup.data.prepared import (
    DROPPED,
    FORMAT,
    PARTS,
    STATS,
    VERSION,
    PartWriter,
    PreparedData,
    read_stats,
)
from groundup.data.recipe import CorpusRecipe
from groundup.data.remote import NotPreparedError, open_remote
from groundup.data.shards import MANIFEST
from groundup.data.sources import NAMED_SOURCES, open_source
from groundup.data.split import Outline, Split, split
from groundup.data.spool import Spool
from groundup.data.stdlib_source import TABLE
from groundup.runtime import GroundupError, UsageError, atomic_folder, progress, say, warn, write_json
from groundup.runtime.files import remove_leftovers
from groundup.runtime.hub import UnreachableError
from groundup.tokenizer import END_OF_TEXT, Tokenizer

MIN_TEXT_BYTES = 2_000
SMALL_TEXT_BYTES = 100_000

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
    algorithm: str = "bpe",
    tokenizer: Tokenizer | None = None,
    corpus: CorpusRecipe | None = None,
    data_dir: Path | None = None,
    limit: int | None = None,
    special_tokens: Sequence[str] = (),
) -> PreparedData:
    """Turn text into a corpus for training, in a folder that is whole or absent.

    What lies at ``out`` already is used as it is if it was made from the same inputs, and replaced if it was
    made from others. Where ``data`` is a corpus that was prepared before, here or elsewhere, that is opened where it
    lies, and ``out`` is not touched: how its text was cut, cleaned and held out is settled.

    Args:
        data: what to read: text, see :func:`groundup.data.open_source`; or a prepared corpus: a folder,
            ``hf:owner/name[/folder]``, or an address such as ``s3://bucket/folder`` (see remote.py).
        out: the folder to make.
        vocab_size: of the tokenizer to train; by default what :func:`suggest_vocab_size` gives for the
            training part.
        max_vocab_size: most tokens where ``vocab_size`` is not given; a small model has no use for many.
        pattern: how the tokenizer cuts text before merging.
        algorithm: bpe; or bytes, characters or words, of which ``vocab_size`` then is a bound where it is given.
        tokenizer: use this one and train none.
        corpus: what to keep, drop and hold out.
        data_dir: where downloads are kept.
        limit: read at most so many documents.
        special_tokens: names that a tokenizer trained here gets besides the end of text, such as the sentinels of
            fill-in-the-middle.

    Raises:
        UsageError: ``data`` is a prepared corpus, and another vocabulary, or a part of it, is asked for.
        GroundupError: the text cannot be read or is too little, or ``out`` cannot be written or holds
            something else.
    """
    corpus = corpus or CorpusRecipe()
    out = Path(out).expanduser()
    if tokenizer is not None and vocab_size not in (None, tokenizer.vocab_size):
        raise UsageError(
            f"vocab_size = {vocab_size}, but the given tokenizer has {tokenizer.vocab_size:,} tokens. Leave one out."
        )
    if (given := _open_given(data, out, data_dir / "remote" if data_dir else None)) is not None:
        _check_wishes(given, data, vocab_size, tokenizer, limit)
        say(f"{data}: a prepared corpus, used as it is.")
        return given
    check_place(out)
    remove_leftovers(out.parent, out.name)
    source = open_source(data, data_dir, limit)
    inputs = {
        "data": printable(data),
        "source": source.identity(),
        "limit": limit,
        "corpus": asdict(corpus),
        "vocab_size": vocab_size or f"by size, at most {max_vocab_size}",
        "pattern": pattern,
        "algorithm": algorithm,
        "tokenizer": tokenizer.fingerprint if tokenizer is not None else None,
        **({"special_tokens": list(special_tokens)} if special_tokens else {}),
    }
    inputs = json.loads(json.dumps(inputs))  # as it will be read back
    if (ready := _already_made(out, inputs)) is not None:
        say(f"{out}: this corpus is there already, made from the same text and settings.")
        return ready
    with atomic_folder(out) as folder, closing(Spool(folder)) as spool:
        build = _Build(folder, spool, source, corpus, inputs)
        build.collect()
        parts = build.split()
        size = vocab_size or suggest_vocab_size(build.counts["bytes"]["train"], max_vocab_size)
        wanted = size if algorithm == "bpe" else vocab_size
        chosen = tokenizer or build.train_tokenizer(parts, wanted, pattern, algorithm, special_tokens)
        build.write(parts, chosen)
    return PreparedData.open(out)


@dataclass
class _Build:
    """One preparation under way: its stages, and what they note for ``stats.json`` and ``dropped.jsonl``.

    Texts pass through one at a time: from the source into the spool, and from there as often as they are needed, so
    that a corpus may be larger than memory.
    """

    folder: Path
    spool: Spool
    source: Source
    corpus: CorpusRecipe
    inputs: dict[str, Any]
    outline: Outline = field(default_factory=Outline)
    dropped: list[Dropped] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=lambda: {"documents": {}, "bytes": {}})

    def collect(self) -> None:
        """Read the source; mend every document; drop what is no use, and what was there before."""
        is_new = ExactDuplicates()
        with self._stage("collect"):
            for document in self._read():
                result = clean(document, self.corpus.min_chars)
                if isinstance(result, Document) and self.corpus.dedup:
                    result = is_new(result)
                if isinstance(result, Document):
                    self.spool.add(result)
                    self.outline.add(result)
                    self._count("cleaned", self.outline.sizes[-1])
                else:
                    self.dropped.append(result)
        self._warn_of_skipped()
        self._check_size()

    def _read(self) -> Iterator[Document]:
        """The documents of the source, up to ``corpus.max_bytes``."""
        most = self.corpus.max_bytes
        with progress("collecting text", most, "bytes") as bar:
            for document in self.source:
                size, left = utf8_length(document.text), math.inf if most is None else most - self._bytes("collected")
                if size > left:  # a part of the document that reaches past the end
                    head = document.text.encode("utf-8", "surrogatepass")[: int(left)].decode("utf-8", "ignore")
                    document = replace(document, text=head)
                self._count("collected", utf8_length(document.text))
                bar.advance(utf8_length(document.text))
                yield document
                if size >= left:
                    break

    def split(self) -> Split:
        """Hold out the validation part."""
        corpus = self.corpus
        with self._stage("split"):
            parts = split(self.outline, corpus.val_fraction, corpus.max_val_bytes, corpus.split_seed)
            for part, document in parts.parts(self.spool):
                self._count(part, utf8_length(document.text))
        return parts

    def train_tokenizer(
        self, parts: Split, vocab_size: int | None, pattern: str, algorithm: str, special_tokens: Sequence[str]
    ) -> Tokenizer:
        """Train a tokenizer on the training part alone."""
        with self._stage("tokenizer"):
            texts = _sample(
                (document.text for part, document in parts.parts(self.spool) if part == "train"),
                self._bytes("train"),
                self.corpus.tokenizer_bytes,
            )
            return Tokenizer.train(
                texts, vocab_size, pattern, special_tokens=(*special_tokens, END_OF_TEXT), algorithm=algorithm
            )

    def write(self, parts: Split, tokenizer: Tokenizer) -> None:
        """Write tokens, texts, tokenizer, what was dropped, and the stats."""
        total = self._bytes("train") + self._bytes("val")
        with self._stage("shards"), progress("writing token shards", total, "bytes") as bar, ExitStack() as open_now:
            tokenizer.save(self.folder / "tokenizer")
            writers = {
                part: open_now.enter_context(
                    PartWriter(self.folder / part, tokenizer, self.corpus.shard_tokens, bar.advance)
                )
                for part in PARTS
            }
            for part, document in parts.parts(self.spool):
                writers[part].add(document)
        self._write_notes(parts, tokenizer, {part: writer.n_tokens for part, writer in writers.items()})

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

    def _count(self, stage: str, n_bytes: int) -> None:
        """One more document of so many bytes has passed a stage."""
        for what, more in (("documents", 1), ("bytes", n_bytes)):
            self.counts[what][stage] = self.counts[what].get(stage, 0) + more

    def _bytes(self, stage: str) -> int:
        return self.counts["bytes"].get(stage, 0)

    def _warn_of_skipped(self) -> None:
        surprising = [one for one in self.source.skipped if one.reason not in _EXPECTED_SKIPS]
        if surprising:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in count_reasons(surprising).items())
            warn(
                f"{self.source.name}: left out {len(surprising):,} files or records: {reasons} "
                f"(first: {surprising[0].name})."
            )

    def _check_size(self) -> None:
        size = self._bytes("cleaned")
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


def _sample(texts: Iterable[str], n_bytes: int, most: int) -> Iterator[str]:
    """Of texts that have ``n_bytes`` together, ``most`` at most, taken evenly from beginning to end.

    The first is taken in any case, whatever its size: there must be something to learn from.
    """
    passed = taken = 0
    for text in texts:
        size = utf8_length(text)
        passed += size
        if not taken or (taken + size) * n_bytes <= passed * most:
            taken += size
            yield text


def check_place(out: Path) -> None:
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


def _open_given(data: str, out: Path, cache: Path | None) -> PreparedData | None:
    """The corpus that ``data`` names, where that is prepared already; None where it is text."""
    if is_remote(data):
        from_hub = data.startswith("hf:")
        if from_hub and (out / STATS).is_file():  # so it was text when ``out`` was made of it: nobody need be asked
            return None
        try:
            return open_remote(data, cache)
        except (NotPreparedError, UnreachableError):
            if not from_hub:
                raise
            return None
    folder = Path(data).expanduser()
    if data in NAMED_SOURCES or not all((folder / name).is_file() for name in (STATS, f"{PARTS[0]}/{MANIFEST}")):
        return None
    return PreparedData.open(folder)


def _check_wishes(
    given: PreparedData, data: str, vocab_size: int | None, tokenizer: Tokenizer | None, limit: int | None
) -> None:
    """Refuse what a corpus that is already prepared cannot follow.

    Raises:
        UsageError: it has another tokenizer or vocabulary, or only a part of it is wanted.
    """
    size = given.tokenizer.vocab_size
    if tokenizer is not None and tokenizer.fingerprint != given.tokenizer.fingerprint:
        raise UsageError(
            f"{data}: prepared with another tokenizer than the given one. Leave that out, or give the text itself."
        )
    if vocab_size not in (None, size):
        raise UsageError(
            f"{data}: prepared with {size:,} tokens, not with vocab_size = {vocab_size}. Leave that out, or give the "
            "text itself."
        )
    if limit is not None:
        raise UsageError(f"{data}: a prepared corpus is taken as a whole. Leave limit = {limit} out.")


def _same_inputs(made: dict[str, Any], inputs: dict[str, Any]) -> bool:
    """Whether a corpus was made from these inputs, or by a groundup that told fewer of them apart.

    What is held out used to hang on the seed. A corpus from that time stays good where nobody asks for another choice:
    a run that trained on it must find the same text again.
    """
    made = {"algorithm": "bpe", **made}
    made["corpus"] = {"tokenizer_bytes": CorpusRecipe.tokenizer_bytes, **made["corpus"]}
    asked = inputs["corpus"]["split_seed"]
    if "seed" in made and asked in (made.pop("seed"), CorpusRecipe.split_seed):
        made["corpus"] = {"split_seed": asked, **made["corpus"]}
    return made == inputs


def _already_made(out: Path, inputs: dict[str, Any]) -> PreparedData | None:
    """The corpus at ``out`` if it was made from these inputs and is whole."""
    if not (out / STATS).is_file():
        return None
    try:
        if not _same_inputs(read_stats(out)["inputs"], inputs):
            return None
        return PreparedData.open(out)
    except (GroundupError, KeyError) as error:
        warn(f"the corpus made before cannot be used and is made again. {error}")
        return None
