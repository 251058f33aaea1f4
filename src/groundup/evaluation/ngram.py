"""A byte-level n-gram model with interpolated modified Kneser-Ney smoothing: what counting alone can do.

Smoothing: Kneser & Ney 1995 (continuation counts); Chen & Goodman 1999, "An empirical study of smoothing
techniques for language modeling", section 4.1.6 (interpolated, with three discounts per order). For a context
h of k - 1 bytes and a byte w, with h' the context without its oldest byte:

    p_k(w | h) = (c(hw) - D_k(c(hw))) / c(h)  +  b(h) p_{k-1}(w | h')
    b(h)       = sum over w of D_k(c(hw)) / c(h)
    p_0(w)     = 1 / 256

c(hw) is how often hw occurs at the highest order; below, it is the number of different bytes seen before hw.
c(h) sums c(hw) over w. A context that was never seen has no term of its own: p_k = p_{k-1}, exactly.

An n-gram is one unsigned 64-bit number, oldest byte first, so that sorting puts the n-grams of one context
side by side and dropping the oldest byte is a mask. Everything below is then sorting, run lengths and binary
search.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from groundup.runtime import GroundupError

# N n-grams (types)   M contexts   P positions of a text

BYTES = 256
MAX_ORDER = 8  # bytes in a uint64
# What lmplz (Heafield et al. 2013) takes where there are too few counts to estimate from.
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)

Keys = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Level:
    """One order of the model.

    Args:
        grams: its distinct n-grams, sorted, shape [N].
        share: the first term of p_k for each of them.
        contexts: the distinct contexts, sorted, shape [M].
        backoff: b(h), what each of them leaves to the order below.
    """

    grams: Keys
    share: Floats
    contexts: Keys
    backoff: Floats

    def interpolate(self, keys_P: Keys, lower_P: Floats) -> Floats:
        """p_k from p_{k-1}, for positions given as packed n-grams of this order."""
        share_P = _look_up(self.grams, self.share, keys_P, 0.0)
        backoff_P = _look_up(self.contexts, self.backoff, keys_P >> np.uint64(8), 1.0)
        return share_P + backoff_P * lower_P


class KneserNeyModel:
    """Predicts each byte from the ``order - 1`` bytes before it. ``fit`` once, then ask.

    A text is read as though ``order - 1`` zero bytes stood before it, so its first bytes are predicted like
    all others.

    Args:
        order: the n of n-gram, 1 to 8.
    """

    def __init__(self, order: int = 6) -> None:
        if not 1 <= order <= MAX_ORDER:
            raise ValueError(f"order = {order}: an n-gram is packed into 64 bits, so 1 to {MAX_ORDER}")
        self.order = order
        self._levels: list[_Level] = []  # order 1 first

    def fit(self, data: bytes) -> KneserNeyModel:
        """Count ``data`` and estimate the discounts.

        Language and code need about 15 bytes of memory per byte of text, noise far more.

        Raises:
            GroundupError: there is no text.
        """
        if not data:
            raise GroundupError("the training text is empty: there is nothing to count. Give it some text.")
        keys = _pack(data, self.order)
        keys.sort()
        grams, counts = _run_lengths(keys)
        del keys
        levels = [_level(grams, counts)]
        for order in range(self.order - 1, 0, -1):
            # Each distinct n-gram of the order above votes once for its suffix: these are the continuation
            # counts.
            suffixes = grams & _mask(order)
            suffixes.sort()
            grams, counts = _run_lengths(suffixes)
            levels.append(_level(grams, counts))
        self._levels = levels[::-1]
        return self

    def log2_probabilities(self, data: bytes) -> Floats:
        """log2 of the probability of each byte of ``data``, given the bytes before it; shape [len(data)]."""
        if not self._levels:
            raise ValueError("fit the model before asking it")
        # A text repeats itself: each different n-gram is looked up once.
        keys, where = np.unique(_pack(data, self.order), return_inverse=True)
        probability = np.full(len(keys), 1.0 / BYTES)
        for order, level in enumerate(self._levels, start=1):
            probability = level.interpolate(keys & _mask(order), probability)
        return np.log2(probability)[where]

    def bits_per_byte(self, data: bytes) -> float:
        """The mean of ``-log2 p`` over the bytes of ``data``.

        Raises:
            GroundupError: there is no text.
        """
        if not data:
            raise GroundupError("the held-out text is empty, so bits per byte are not defined. Hold out some text.")
        return float(-self.log2_probabilities(data).mean())


def _pack(data: bytes, order: int) -> Keys:
    """The n-gram that ends at each byte of ``data``, shape [len(data)]."""
    padded = np.frombuffer(bytes(order - 1) + data, dtype=np.uint8)
    keys = np.zeros(len(data), dtype=np.uint64)
    for offset in range(order):
        keys <<= np.uint64(8)
        keys |= padded[offset : offset + len(data)]
    return keys


def _mask(order: int) -> np.uint64:
    """Keeps the newest ``order`` bytes of a packed n-gram."""
    return np.uint64((1 << 8 * order) - 1)


def _run_lengths(keys: Keys) -> tuple[Keys, Counts]:
    """The distinct values of a sorted array and how often each occurs."""
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    return keys[starts], np.diff(starts, append=len(keys))


def _level(grams_N: Keys, counts_N: Counts) -> _Level:
    """Discount the counts of one order, and hand what was taken to the order below."""
    discount_N = np.array([0.0, *_discounts(counts_N)])[np.minimum(counts_N, 3)]
    contexts_N = grams_N >> np.uint64(8)
    contexts_M, types_M = _run_lengths(contexts_N)
    starts_M = np.cumsum(types_M) - types_M
    total_M = np.add.reduceat(counts_N, starts_M).astype(np.float64)
    return _Level(
        grams=grams_N,
        share=(counts_N - discount_N) / np.repeat(total_M, types_M),
        contexts=contexts_M,
        backoff=np.add.reduceat(discount_N, starts_M) / total_M,
    )


def _discounts(counts_N: Counts) -> tuple[float, float, float]:
    """The discounts for counts of one, two, and three or more (Chen & Goodman 1999, eq. 26).

    In a small or odd text some of the counts of counts are zero, or give a discount outside (0, count];
    constants stand in then.
    """
    n1, n2, n3, n4 = (int(np.count_nonzero(counts_N == count)) for count in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    one, two, more = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
    if not (0 < one <= 1 and 0 < two <= 2 and 0 < more <= 3):
        return FALLBACK_DISCOUNTS
    return one, two, more


def _look_up(keys_N: Keys, values_N: Floats, queries_P: Keys, absent: float) -> Floats:
    """The value beside each query in a sorted table; ``absent`` where the table does not have it."""
    at_P = np.minimum(np.searchsorted(keys_N, queries_P), len(keys_N) - 1)
    return np.where(keys_N[at_P] == queries_P, values_N[at_P], absent)
