"""Text to token ids by byte-pair encoding: the algorithm behind a byte-pair :class:`~groundup.tokenizer.Tokenizer`.

The work is done by the compiled functions in kernels/ (through compiled.py), or, where Numba is missing or cannot
compile, by bpe.py in plain Python: the same ids, about fifty times slower.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from groundup.runtime.console import warn
from groundup.tokenizer import bpe
from groundup.tokenizer.pretokenize import Splitter
from groundup.tokenizer.rules import Pair, Rules

if TYPE_CHECKING:
    from types import ModuleType


@cache
def compiled() -> ModuleType | None:
    """The module of compiled algorithms; None where Numba cannot be used, which is said once."""
    if os.environ.get("GROUNDUP_NO_NUMBA"):
        return None
    try:
        from groundup.tokenizer import compiled

        compiled.check()
    except Exception as error:  # Numba fails in many ways: no wheel, no LLVM, a NumPy too new, nowhere to cache
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        warn(f"the tokenizer works in plain Python, about 50 times slower, because Numba cannot be used: {reason}")
        return None
    return compiled


class BytePairEncoder:
    """Byte-pair encoding of text.

    Args:
        tokens: the bytes of each token by id.
        merges: pairs of ids, the first one merged first; None when a token's id is its rank (tiktoken's rule).
        pattern: the regular expression that cuts text into chunks.
        ordinary: the ids that text may become. All 256 single bytes are among them.
        whole_words: a chunk that is itself a token becomes it without merging; always so when ``merges`` is None.

    Raises:
        UsageError: the pattern does not compile.
        GroundupError: a byte has no token.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        merges: Sequence[Pair] | None,
        pattern: str,
        ordinary: Collection[int],
        whole_words: bool = False,
    ) -> None:
        self._tokens = tokens
        self._dtype = np.dtype(np.uint16 if len(tokens) <= 1 << 16 else np.uint32)
        rules = Rules(tokens, merges, sorted(ordinary), whole_words)
        splitter = Splitter(pattern)
        library = compiled()
        self._encoder = library.CompiledEncoder(rules, splitter) if library else PlainEncoder(rules, splitter)
        self.encode = self._encoder.encode
        """Token ids of one text: ``encode(text) -> list[int]``."""

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Token ids of each text.

        Args:
            texts: any texts.
            threads: how many work at once; None for one per core.
        """
        return self._encoder.encode_batch(texts, threads)

    def encode_array(self, texts: Sequence[str], threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of all texts, one after another (uint16 or uint32), and where each text begins (int64).

        Arguments are those of :meth:`encode_batch`.
        """
        ids, starts = self._encoder.encode_array(texts, threads)
        return ids.astype(self._dtype, copy=False), starts

    def spans(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a text, and the byte (in UTF-8) at which each of them ends."""
        ids = self.encode(text)
        return ids, np.cumsum([len(self._tokens[number]) for number in ids]).tolist() if ids else []


class PlainEncoder:
    """Byte-pair encoding where nothing can be compiled."""

    def __init__(self, rules: Rules, splitter: Splitter) -> None:
        self._splitter = splitter
        self._words = bpe.WordCache(rules)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        return memoryview(self._pack(text)).cast("I").tolist()

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Token ids of each text. Threads would not help."""
        return [self.encode(text) for text in texts]

    def encode_array(self, texts: Sequence[str], threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of all texts, one after another, and where each text begins."""
        packed, ends = bytearray(), [0]
        for text in texts:
            packed += self._pack(text)
            ends.append(len(packed) // 4)
        return np.frombuffer(packed, dtype=np.uint32), np.array(ends, dtype=np.int64)

    def _pack(self, text: str) -> bytes:
        return b"".join(map(self._words.__getitem__, self._splitter.split(text)))


def recover_merges(tokens: Sequence[bytes], ordinary_ids: Sequence[int]) -> list[Pair]:
    """The merges behind a vocabulary whose ids are ranks: :meth:`Rules.recovered`."""
    rules = Rules(tokens, None, sorted(ordinary_ids), whole_words=True)
    library = compiled()
    if library:
        found = library.recover_merges(rules)
        if found is not None:
            return [(left, right) for left, right, _ in found.tolist()]
    return [(left, right) for left, right, _ in rules.recovered()]
