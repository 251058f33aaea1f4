"""Near duplicates: texts that share most of their runs of words, found without comparing each with each.

The share of runs of words that two texts have in common (Jaccard's index) is the probability that the least of their
hashed runs is the same (Broder 1997). So a text becomes a signature: the least under each of many hash functions. Texts
whose signatures agree in a band of several numbers are compared; all others are not (Leskovec, Rajaraman and Ullman,
Mining of Massive Datasets, section 3.4).
"""

from __future__ import annotations

import re
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

FUNCTIONS = 128  # the error of an estimated share is about one by the square root of it, at worst half of that
_WORDS = re.compile(r"\w+")

Uint64Array = npt.NDArray[np.uint64]


def runs_of(text: str, length: int) -> Uint64Array:
    """Hashes of all runs of so many words, uint64, each once; of a shorter text, of all its words."""
    words = _WORDS.findall(text.lower())
    runs = {" ".join(words[i : i + length]) for i in range(max(1, len(words) - length + 1))}
    digests = b"".join(blake2b(run.encode("utf-8", "surrogatepass"), digest_size=8).digest() for run in sorted(runs))
    return np.frombuffer(digests, np.uint64)


class NearDuplicates:
    """Remembers the signatures of texts: 1 kB each.

    Args:
        threshold: share of runs of words from which on a text is a duplicate of an earlier one; above 0, at most 1.
        run: words in a run.
        seed: of the hash functions.
    """

    def __init__(self, threshold: float = 0.8, run: int = 5, seed: int = 0) -> None:
        if not 0.0 < threshold <= 1.0:
            raise ValueError(f"a threshold of {threshold}: above 0 and at most 1")
        self.threshold, self.run = threshold, run
        rng = np.random.default_rng(seed)
        # Multiply-shift (Dietzfelbinger et al. 1997): the upper half of an odd multiple.
        self._factors = rng.integers(0, 1 << 63, (FUNCTIONS, 1), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._offsets = rng.integers(0, 1 << 63, (FUNCTIONS, 1), dtype=np.uint64)
        self.rows = _rows_of_a_band(threshold)
        self._bands: list[dict[bytes, list[int]]] = [{} for _ in range(FUNCTIONS // self.rows)]
        self._signatures: list[npt.NDArray[np.uint32]] = []

    def signature(self, text: str) -> npt.NDArray[np.uint32]:
        """The least hash under each function: uint32 [FUNCTIONS]."""
        runs, least = runs_of(text, self.run), np.full(FUNCTIONS, np.iinfo(np.uint32).max, np.uint32)
        for begin in range(0, len(runs), 4096):  # a long text's table of hashes would not fit into the cache
            hashed = (self._factors * runs[None, begin : begin + 4096] + self._offsets) >> np.uint64(32)
            least = np.minimum(least, hashed.min(axis=1).astype(np.uint32))
        return least

    def find(self, text: str) -> tuple[int, float] | None:
        """The text that it is most like, by its number among those remembered, from 0, and the estimated share."""
        return self._like(self.signature(text))

    def __call__(self, text: str) -> tuple[int, float] | None:
        """Remember a text, unless it is like an earlier one: then what :meth:`find` gives."""
        signature = self.signature(text)
        if (found := self._like(signature)) is not None:
            return found
        for band, key in zip(self._bands, self._keys(signature), strict=True):
            band.setdefault(key, []).append(len(self._signatures))
        self._signatures.append(signature)
        return None

    def _like(self, signature: npt.NDArray[np.uint32]) -> tuple[int, float] | None:
        banded = zip(self._bands, self._keys(signature), strict=True)
        alike = sorted({number for band, key in banded for number in band.get(key, ())})
        shares = [float((self._signatures[number] == signature).mean()) for number in alike]
        best = max(shares, default=0.0)
        return (alike[shares.index(best)], best) if best >= self.threshold else None

    def _keys(self, signature: npt.NDArray[np.uint32]) -> list[bytes]:
        return [signature[i * self.rows : (i + 1) * self.rows].tobytes() for i in range(len(self._bands))]


def _rows_of_a_band(threshold: float) -> int:
    """The longest band with which texts at the threshold are missed less than once in a hundred times."""
    for rows in (32, 16, 8, 4, 2):
        if (1 - threshold**rows) ** (FUNCTIONS // rows) < 0.01:
            return rows
    return 1
