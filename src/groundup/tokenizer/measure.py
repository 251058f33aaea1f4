"""How fast a tokenizer is, beside the libraries a person would use instead.

One contender is one library with one vocabulary: a way to make a new encoder, and the fastest public way from
strings to token ids through it. ``groundup tokenizer bench`` and the repository's benchmark share them.

The peers: tiktoken (OpenAI), tokenizers (Hugging Face), gigatoken (Marcel Rød), rustbpe (Andrej Karpathy).
"""

from __future__ import annotations

import os
import time
from base64 import b64decode
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from groundup.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")
Ids = tuple[np.ndarray, np.ndarray]
"""Token ids of many texts one after another, and where each text begins (one more than there are texts)."""


@dataclass(frozen=True)
class VocabularyFiles:
    """One vocabulary in the forms that the contenders read.

    Args:
        pattern: the regular expression that cuts text into chunks, or its name.
        ranks: a ``.tiktoken`` file.
        json: a ``tokenizer.json``.
        scheme: what gigatoken calls the pattern, where it has a name for it ("gpt2", "cl100k", "o200k").
    """

    pattern: str
    ranks: Path | None = None
    json: Path | None = None
    scheme: str | None = None


@dataclass(frozen=True)
class Encoder:
    """A library's encoder with a vocabulary loaded.

    Args:
        arrays: texts and a number of threads in, token ids out, in the library's own kind of array.
        lists: texts and a number of threads in, one Python list of ids per text out.
        one: one text in, its ids out.
        collect: turns what ``arrays`` gives into :data:`Ids`; never timed.
    """

    arrays: Callable[[Sequence[str], int], Any]
    lists: Callable[[Sequence[str], int], list[list[int]]]
    one: Callable[[str], Any]
    collect: Callable[[Any], Ids]


@dataclass
class Speed:
    """Seconds that an encoder took.

    Args:
        construct: to make each one from its file.
        cold: the first pass of each over the texts; it has kept no words yet.
        warm: each further pass of the last one over the same texts.
    """

    construct: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)

    @property
    def typical_cold(self) -> float:
        """The median of the cold passes."""
        return median(self.cold)

    @property
    def typical_warm(self) -> float:
        """The median of the warm passes; of the cold ones where there was no other."""
        return median(self.warm or self.cold)


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Wall-clock seconds of a call, and what it returned."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def measure(
    make: Callable[[], Encoder],
    texts: Sequence[str],
    threads: int = 1,
    passes: int = 3,
    as_lists: bool = False,
    patience: float = 20.0,
) -> tuple[Speed, Any, Encoder]:
    """Time new encoders on texts: cold, each one once, then the last one warm.

    A throwaway encoder meets one short text first, so that what a process pays once (imports, compiled code, a
    thread pool) is in neither figure. Several cold passes for the same reason: the first time that a process touches
    its memory, the system has to find that memory, which on a virtual machine can take as long as the encoding.

    Args:
        make: makes the encoder.
        texts: what it encodes.
        threads: how many threads it may use.
        passes: cold passes, each of a new encoder, and as many warm ones.
        as_lists: time Python lists instead of arrays.
        patience: seconds that the cold passes, and then the warm ones, may take; the first cold one is always made.

    Returns:
        The times, the result of the last pass, and the encoder.
    """
    speed, encoder = Speed(), make()
    result = _encode(encoder, ["A short text, to wake up."] * (2 * threads), threads, as_lists)
    while not speed.cold or (len(speed.cold) < passes and sum(speed.cold) + speed.typical_cold < patience):
        del encoder, result  # so that their memory can be used again, as in a loop over batches
        construct, encoder = timed(make)
        seconds, result = timed(partial(_encode, encoder, texts, threads, as_lists))
        speed.construct.append(construct)
        speed.cold.append(seconds)
    while len(speed.warm) < passes and sum(speed.warm) + speed.typical_warm < patience:
        del result
        seconds, result = timed(partial(_encode, encoder, texts, threads, as_lists))
        speed.warm.append(seconds)
    return speed, result, encoder


def _encode(encoder: Encoder, texts: Sequence[str], threads: int, as_lists: bool) -> Any:
    return (encoder.lists if as_lists else encoder.arrays)(texts, threads)


def latencies(encode: Callable[[str], Any], texts: Sequence[str], rounds: int) -> list[float]:
    """Seconds of each call of ``encode``, the texts one by one, ``rounds`` times over; the first round is not kept."""
    clock = time.perf_counter
    for text in texts:
        encode(text)
    kept = []
    for _ in range(rounds):
        for text in texts:
            started = clock()
            encode(text)
            kept.append(clock() - started)
    return kept


# ---- the contenders


def groundup_encoder(files: VocabularyFiles) -> Encoder:
    """This package."""
    from groundup.tokenizer.tokenizer import Tokenizer

    if files.ranks is not None:
        tok = Tokenizer.load(files.ranks, pattern=files.pattern)
    else:
        assert files.json is not None
        tok = Tokenizer.load(files.json)
    return own_encoder(tok)


def own_encoder(tok: Tokenizer) -> Encoder:
    """A tokenizer of this package that is loaded already."""
    return Encoder(
        arrays=lambda texts, threads: tok.encode_array(texts, threads=threads),
        lists=lambda texts, threads: tok.encode_batch(texts, threads=threads),
        one=tok.encode,
        collect=lambda result: result,
    )


def tiktoken_encoder(files: VocabularyFiles) -> Encoder:
    """OpenAI's tiktoken: ``encode_ordinary`` and ``encode_ordinary_batch``."""
    import tiktoken

    from groundup.tokenizer.pretokenize import TIKTOKEN_SPELLINGS, pattern_regex

    assert files.ranks is not None
    expression = pattern_regex(files.pattern)
    # Its own reader of such files keeps a copy of each by path, which would outlive a change of the file.
    lines = (line.split() for line in files.ranks.read_bytes().splitlines())
    encoding = tiktoken.Encoding(
        "measured",
        pat_str=TIKTOKEN_SPELLINGS.get(expression, expression),
        mergeable_ranks={b64decode(token): int(rank) for token, rank in lines},
        special_tokens={},
    )

    def to_numpy(text: str) -> np.ndarray:
        # encode_to_numpy looks for special tokens first, and is slower than this for all its shortcut.
        return np.array(encoding.encode_ordinary(text), dtype=np.uint32)

    def arrays(texts: Sequence[str], threads: int) -> list[np.ndarray]:
        if threads == 1:
            return [to_numpy(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(to_numpy, texts))

    def lists(texts: Sequence[str], threads: int) -> list[list[int]]:
        return encoding.encode_ordinary_batch(list(texts), num_threads=threads)

    return Encoder(arrays, lists, encoding.encode_ordinary, collect_rows)


def huggingface_encoder(files: VocabularyFiles) -> Encoder:
    """Hugging Face tokenizers: ``encode_batch_fast`` without special tokens."""
    # The library reads it anew at each call.
    import tokenizers

    tok = tokenizers.Tokenizer.from_file(str(files.json))

    def lists(texts: Sequence[str], threads: int) -> list[list[int]]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false" if threads == 1 else "true"
        return [encoding.ids for encoding in tok.encode_batch_fast(list(texts), add_special_tokens=False)]

    return Encoder(
        arrays=lambda texts, threads: [np.array(ids, dtype=np.uint32) for ids in lists(texts, threads)],
        lists=lists,
        one=lambda text: tok.encode(text, add_special_tokens=False).ids,
        collect=collect_rows,
    )


def gigatoken_encoder(files: VocabularyFiles) -> Encoder:
    """gigatoken: ``encode_batch``.

    How many threads "parallel" means is fixed when it is first used (RAYON_NUM_THREADS).
    """
    import gigatoken

    if files.ranks is not None and files.scheme is not None:
        tok = gigatoken.Tokenizer.from_tiktoken(str(files.ranks), pretokenizer=files.scheme)
    else:
        tok = gigatoken.Tokenizer(str(files.json))

    def collect(rows: Any) -> Ids:
        import awkward

        counts = np.asarray(awkward.num(rows))
        return awkward.to_numpy(awkward.flatten(rows)), np.concatenate(([0], np.cumsum(counts))).astype(np.int64)

    return Encoder(
        arrays=lambda texts, threads: tok.encode_batch(list(texts), parallel=threads > 1),
        lists=lambda texts, threads: tok.encode_batch_list(list(texts), parallel=threads > 1),
        one=tok.encode,
        collect=collect,
    )


def collect_rows(rows: Sequence[Sequence[int] | np.ndarray]) -> Ids:
    """One array or list of ids per text, as :data:`Ids`."""
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    flat = [np.asarray(row, dtype=np.uint32) for row in rows]
    return np.concatenate(flat) if flat else np.zeros(0, np.uint32), offsets


PEERS: dict[str, tuple[str, Callable[[VocabularyFiles], Encoder]]] = {
    "tiktoken": ("tiktoken", tiktoken_encoder),
    "Hugging Face tokenizers": ("tokenizers", huggingface_encoder),
    "gigatoken": ("gigatoken", gigatoken_encoder),
}
"""By name: the module to import, and what makes an encoder from a vocabulary's files."""


def installed_peers() -> dict[str, Callable[[VocabularyFiles], Encoder]]:
    """The peers that are installed, by name."""
    return {name: make for name, (module, make) in PEERS.items() if find_spec(module) is not None}


def different_texts(ours: Ids, theirs: Ids) -> int:
    """In how many texts the ids differ."""
    if np.array_equal(ours[1], theirs[1]) and np.array_equal(ours[0], theirs[0]):
        return 0
    return sum(not np.array_equal(mine, other) for mine, other in zip(_rows(ours), _rows(theirs), strict=True))


def _rows(ids: Ids) -> Iterable[np.ndarray]:
    values, offsets = ids
    return (values[start:end] for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
