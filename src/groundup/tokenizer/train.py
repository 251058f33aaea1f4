"""Learning a vocabulary from texts: what every algorithm has to count, check and number."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from groundup.runtime.console import Progress, progress
from groundup.runtime.errors import GroundupError, UsageError, nearest
from groundup.tokenizer import bpe, lookup
from groundup.tokenizer.alphabet import from_characters
from groundup.tokenizer.encoder import compiled
from groundup.tokenizer.pretokenize import Splitter, pattern_regex
from groundup.tokenizer.vocabulary import NORMALIZATIONS, UNKNOWN, Kind, Normalization, Vocabulary

ALGORITHMS = ("bpe", "bytes", "characters", "words")
BATCH = 8_000_000  # characters that are counted at once


def train(
    texts: Iterable[str],
    vocab_size: int | None,
    pattern: str,
    special_tokens: Sequence[str],
    min_frequency: int | None,
    show_progress: bool,
    algorithm: str,
    normalization: Normalization | None,
    threads: int | None,
) -> Vocabulary:
    """Learn a vocabulary: :meth:`groundup.tokenizer.Tokenizer.train` says what the arguments are.

    Raises:
        UsageError: an argument is wrong.
        GroundupError: there is no text, or a text holds a lone surrogate.
    """
    if algorithm not in ALGORITHMS:
        raise UsageError(
            f"unknown algorithm '{algorithm}'. Known: {', '.join(ALGORITHMS)}.{nearest(algorithm, ALGORITHMS)}"
        )
    if normalization is not None and normalization not in NORMALIZATIONS:
        raise UsageError(f"unknown normalization '{normalization}'. Known: {', '.join(NORMALIZATIONS)}.")
    if min_frequency is not None and min_frequency < 1:
        raise UsageError(f"min_frequency = {min_frequency} must be at least 1.")
    check_special_tokens(special_tokens)
    expression = pattern_regex(pattern)
    Splitter(expression)  # refuses one that does not compile before any text is read
    texts = several(texts)
    if normalization is not None:
        form = normalization
        texts = (unicodedata.normalize(form, text) for text in texts)
    if algorithm == "words":
        learned = _words("words", expression, texts, vocab_size, special_tokens, min_frequency or 1, show_progress)
    elif algorithm == "characters":
        learned = _words(
            "characters", lookup.CHARACTER, texts, vocab_size, special_tokens, min_frequency or 1, show_progress
        )
    else:
        if algorithm == "bytes":
            _ordinary_size(256 + len(special_tokens) if vocab_size is None else vocab_size, special_tokens)
            tokens, merges = [bytes([byte]) for byte in range(256)], list[tuple[int, int]]()
        else:
            if vocab_size is None:
                raise UsageError("byte-pair encoding needs a vocab_size, such as 32000.")
            size = _ordinary_size(vocab_size, special_tokens)
            # What tokenizer.json would write like a special token is never learned.
            reserved = {token for name in special_tokens if (token := from_characters(name))}
            learn = _merges if compiled() else _merges_plainly
            tokens, merges = learn(
                Splitter(expression), texts, size, reserved, min_frequency or 2, show_progress, threads
            )
        names = {name: len(tokens) + number for number, name in enumerate(special_tokens)}
        tokens = [*tokens, *(name.encode() for name in special_tokens)]
        learned = Vocabulary("bpe", tuple(tokens), expression, tuple(merges), names)
    return replace(learned, normalization=normalization)


def _merges(
    splitter: Splitter,
    texts: Iterable[str],
    size: int,
    reserved: set[bytes],
    min_frequency: int,
    show_progress: bool,
    threads: int | None,
) -> tuple[list[bytes], list[tuple[int, int]]]:
    """The tokens by id and the merges of byte-pair encoding, by compiled functions."""
    from groundup.tokenizer.compiled import ChunkCounter
    from groundup.tokenizer.kernels.learn import learn

    counter = ChunkCounter(splitter, threads)
    with _bar(show_progress, "counting words", None, "characters") as bar:
        for batch in _batches(texts):
            try:
                counter.add(batch)
            except UnicodeEncodeError as error:
                raise lone_surrogate(error) from error
            if bar:
                bar.advance(sum(map(len, batch)))
    chunks, ends, counts = counter.result()
    if not len(ends):
        raise _nothing_to_learn()
    del counter  # its tables are larger than what was counted
    with _bar(show_progress, "learning merges", size - 256, "merges") as bar:
        merges, tokens = learn(
            chunks,
            ends,
            counts,
            size,
            min_frequency,
            reserved,
            on_merge=(lambda done: bar.update(done - 256)) if bar else None,
        )
    return tokens, [(left, right) for left, right in merges.tolist()]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts, some megabytes at a time: what is counted need not fit into memory."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _merges_plainly(
    splitter: Splitter,
    texts: Iterable[str],
    size: int,
    reserved: set[bytes],
    min_frequency: int,
    show_progress: bool,
    threads: int | None,
) -> tuple[list[bytes], list[tuple[int, int]]]:
    """What :func:`_merges` finds, in plain Python."""
    chunk_counts = count_chunks(texts, splitter.split, show_progress)
    with _bar(show_progress, "learning merges", size - 256, "merges") as bar:
        return bpe.learn(
            encoded(chunk_counts),
            size,
            min_frequency,
            reserved,
            on_merge=(lambda done: bar.update(done - 256)) if bar else None,
        )


def _words(
    kind: Kind,
    expression: str,
    texts: Iterable[str],
    vocab_size: int | None,
    special_tokens: Sequence[str],
    min_frequency: int,
    show_progress: bool,
) -> Vocabulary:
    """A vocabulary of words or characters, the unknown token and the special tokens, in this order."""
    names = [*special_tokens] if UNKNOWN in special_tokens else [UNKNOWN, *special_tokens]
    if vocab_size is not None and vocab_size <= len(names):
        raise UsageError(
            f"vocab_size = {vocab_size} is too small: one of the {kind} and {len(names)} special tokens "
            f"({UNKNOWN} is one of them) need at least {len(names) + 1}."
        )
    by_code_point = kind == "characters"
    counts = count_chunks(texts, list if by_code_point else Splitter(expression).split, show_progress)
    encoded(counts)  # refuses a lone surrogate
    tokens = lookup.learn(
        {chunk: count for chunk, count in counts.items() if chunk not in names},
        None if vocab_size is None else vocab_size - len(names),
        min_frequency,
        by_code_point,
    )
    ids = {name: len(tokens) + number for number, name in enumerate(names)}
    return Vocabulary(
        kind,
        tuple(token.encode() for token in (*tokens, *names)),
        expression,
        special_tokens=ids,
        unknown=ids[UNKNOWN],
    )


def _ordinary_size(vocab_size: int, special_tokens: Sequence[str]) -> int:
    """How many tokens there may be beside the special ones, when the 256 bytes are tokens."""
    if vocab_size - len(special_tokens) < 256:
        raise UsageError(
            f"vocab_size = {vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens "
            f"need at least {256 + len(special_tokens)}."
        )
    return vocab_size - len(special_tokens)


def check_special_tokens(names: Sequence[str]) -> None:
    """See that the names of special tokens can be found in text.

    Raises:
        UsageError: one is given twice, or is too short.
    """
    if isinstance(names, str):
        raise UsageError(f"special_tokens must be a list of names, not one string: ['{names}'].")
    for number, name in enumerate(names):
        if len(name) < 2 or name in names[:number]:
            raise UsageError(f"special token '{name}': names must be two characters or longer, and each given once.")


def count_chunks(texts: Iterable[str], cut: Callable[[str], Iterable[str]], show_progress: bool) -> Counter[str]:
    """How often each distinct chunk occurs in the texts."""
    counts: Counter[str] = Counter()
    with _bar(show_progress, "counting words", None, "characters") as bar:
        unreported = 0
        for text in texts:
            counts.update(cut(text))
            unreported += len(text)
            # A bar that moved with every short text would cost more than the counting.
            if bar and unreported > 1_000_000:
                bar.advance(unreported)
                unreported = 0
    if not any(counts):
        raise _nothing_to_learn()
    return counts


def _nothing_to_learn() -> GroundupError:
    return GroundupError("there is no text to train a tokenizer on. Give it at least a sentence.")


def encoded(counts: Mapping[str, int]) -> dict[bytes, int]:
    """The chunks in UTF-8."""
    try:
        return {chunk.encode(): count for chunk, count in counts.items()}
    except UnicodeEncodeError as error:
        raise lone_surrogate(error) from error


def several(texts: Iterable[str]) -> Iterable[str]:
    """The texts.

    Raises:
        UsageError: it is one text, which would be read as many of one character.
    """
    if isinstance(texts, str):
        raise UsageError("texts must be several strings, such as a list; for one text write [text].")
    return texts


def _bar(show: bool, label: str, total: int | None, unit: str) -> AbstractContextManager[Progress | None]:
    return progress(label, total, unit) if show else nullcontext()


def lone_surrogate(error: UnicodeEncodeError) -> GroundupError:
    """The line that says where a text cannot be written in UTF-8."""
    chunk = error.object[max(0, error.start - 20) : error.end + 20]
    return GroundupError(
        f"the text holds a lone surrogate, U+{ord(error.object[error.start]):04X}, in {chunk!a}: UTF-8 "
        "cannot write it. Read the file with errors='replace', or clean the text with "
        "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
    )
