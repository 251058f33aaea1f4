"""A shuffled order of n things that needs no memory for it: place i is computed, not looked up."""

from __future__ import annotations

from math import isqrt

import numpy as np
import numpy.typing as npt

ROUNDS = 6  # four make a Feistel network pseudorandom (Luby and Rackoff 1988); tiny domains need a few more

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix64(value: int) -> int:
    """Scramble a 64-bit number one to one (the finaliser of SplitMix64, Steele, Lea and Flood 2014)."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def derive_key(*parts: int) -> int:
    """One 64-bit key from several numbers, such as a seed and an epoch, in this order; any sign."""
    key = 0
    for part in parts:
        key = mix64(key ^ mix64(part & _MASK))
    return key


class Permutation:
    """A keyed bijection of ``range(n)``.

    A place is written as a pair (left, right) on the smallest near-square grid of at least ``n`` cells. Each
    round adds a keyed hash of one half to the other, modulo that half's size, which can be undone, so the
    whole is a bijection of the grid. What lands outside ``range(n)`` is sent through again until it lands
    inside ("cycle walking", Black and Rogaway 2002). The grid has at most sqrt(n) cells too many, so that is
    rare.

    Args:
        n: how many things there are, at least 1 and below 2**62.
        key: which of the orders, any 64-bit number.
    """

    def __init__(self, n: int, key: int) -> None:
        if not 1 <= n < 1 << 62:
            raise ValueError(f"cannot permute {n} things")
        self.n = n
        self._rows = max(isqrt(n), 2)  # two at least: a single row could only be turned, not shuffled
        self._columns = -(-n // self._rows)
        self._keys = [np.uint64(derive_key(key, number)) for number in range(ROUNDS)]

    def __call__(self, places: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Where each of ``places`` (integers in ``range(n)``, any shape) goes: int64 of the same shape."""
        shape = np.shape(places)
        result = self._once(np.asarray(places, dtype=np.uint64).reshape(-1))
        outside = np.flatnonzero(result >= self.n)
        while outside.size:
            result[outside] = self._once(result[outside])
            outside = outside[result[outside] >= self.n]
        return result.astype(np.int64).reshape(shape)

    def _once(self, places: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        left, right = places // columns, places % columns
        for number, key in enumerate(self._keys):
            if number % 2:
                left = (left + _hash(right, key) % rows) % rows
            else:
                right = (right + _hash(left, key) % columns) % columns
        return np.asarray(left * columns + right)


def _hash(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """``mix64`` of each value and the key; array products wrap around silently, as they should."""
    values = (values ^ key) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(29))


def fractions(values: npt.ArrayLike, key: int) -> npt.NDArray[np.float64]:
    """A number from 0 to below 1 for each of ``values`` (integers), as if drawn at random under ``key``."""
    keys = np.asarray(values).astype(np.uint64)
    mixed = _hash(_hash(keys, np.uint64(key)), np.uint64(mix64(key)))
    return np.asarray((mixed >> np.uint64(11)) * 2.0**-53)
