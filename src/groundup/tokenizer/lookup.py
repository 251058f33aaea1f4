"""The simplest tokenizers: each word, or each character, is one token or the unknown token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np

from groundup.tokenizer.pretokenize import Splitter

CHARACTER = r"[\s\S]"
"""The regular expression whose matches are single characters, in Python's dialect and in Hugging Face's."""


class LookupEncoder:
    """Text to ids by looking up each chunk.

    Args:
        tokens: the bytes of each token by id.
        pattern: the regular expression that cuts text into chunks.
        ordinary: the ids that text may become.
        unknown: the id of a chunk that is no token.

    Raises:
        UsageError: the pattern does not compile.
    """

    def __init__(self, tokens: Sequence[bytes], pattern: str, ordinary: Collection[int], unknown: int) -> None:
        self._ids = {tokens[number].decode(): number for number in ordinary}
        self._unknown = unknown
        self._cut: Callable[[str], Iterable[str]] = list if pattern == CHARACTER else Splitter(pattern).split
        self._dtype = np.uint16 if len(tokens) <= 1 << 16 else np.uint32

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        get, unknown = self._ids.get, self._unknown
        ids = [get(chunk, unknown) for chunk in self._cut(text) if chunk]
        if unknown in ids:
            text.encode()  # a lone surrogate is refused, not unknown
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Token ids of each text. Looking up is done on one thread."""
        return [self.encode(text) for text in texts]

    def encode_array(self, texts: Sequence[str], threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of all texts, one after another, and where each text begins."""
        parts = [np.array(self.encode(text), dtype=self._dtype) for text in texts]
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return (np.concatenate(parts) if parts else np.zeros(0, self._dtype)), offsets

    def spans(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a text, and the byte (in UTF-8) at which each of them ends."""
        ends = np.cumsum([len(chunk.encode()) for chunk in self._cut(text) if chunk], dtype=np.int64)
        return self.encode(text), ends.tolist()


def learn(counts: Mapping[str, int], size: int | None, min_frequency: int, by_code_point: bool) -> list[str]:
    """The most frequent chunks, of those that are equally frequent the ones that sort first.

    Args:
        counts: how often each chunk occurs.
        size: how many to take; None for all.
        min_frequency: leave out those that occur less often.
        by_code_point: whether they are given in the order of their characters, instead of by frequency.
    """
    frequent = [chunk for chunk, count in counts.items() if chunk and count >= min_frequency]
    chosen = sorted(frequent, key=lambda chunk: (-counts[chunk], chunk))[:size]
    return sorted(chosen) if by_code_point else chosen
