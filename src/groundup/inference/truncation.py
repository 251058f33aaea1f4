"""Cutting a distribution down to the tokens that may be chosen: each filter of the literature as one function.

A filter takes probabilities and gives the places that stay, ascending. Places are few where a vocabulary is large, so
that the filters after the first, and the draw, cost next to nothing.
"""

# V vocabulary   K tokens that are left to choose from

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]
Ids = NDArray[np.intp]

_INFINITY = np.int32(0x7F800000)  # the bits of that float
_BUCKET_BITS = 18  # keep 5 bits of the mantissa: floats that differ by less than 3% share a bucket
ZIPF_FROM = 100  # likeliest tokens, as in Basu's own code
_FEW = 1024  # places are sorted sooner than thrown into buckets


class Candidates(NamedTuple):
    """What is left to choose from.

    Args:
        ids: the tokens, ascending; None for the whole vocabulary.
        p_K: their probabilities, float32, adding up to 1.
        whole_V: the distribution before it was cut, where mirostat wants to know; else None.
    """

    ids: Ids | None
    p_K: Tensor
    whole_V: Tensor | None = None

    def dense(self, size: int) -> Tensor:
        """The distribution over the vocabulary, float32 V."""
        if self.ids is None:
            return self.p_K
        return torch.zeros(size).scatter_(0, torch.from_numpy(self.ids), self.p_K)

    def draw(self, generator: torch.Generator) -> int:
        """One token, by inverting the cumulative distribution: a single random number, whatever the vocabulary."""
        place = 0
        if len(self.p_K) > 1:
            sums_K = self.p_K.cumsum(0, dtype=torch.float64)
            # A number below 1 with 53 bits times the last sum stays below that sum, so that no token of probability 0,
            # over which the sums do not grow, is ever found.
            point = torch.rand((), dtype=torch.float64, generator=generator) * sums_K[-1]
            place = int(torch.searchsorted(sums_K, point, right=True))
        return place if self.ids is None else int(self.ids[place])


def renormalised(p_K: Tensor, places: Ids) -> Tensor:
    """The probabilities at some places, adding up to 1 again."""
    left_K = p_K[torch.from_numpy(places)]
    return left_K / left_K.sum()


def at_least(p_K: Floats, limit: float) -> Ids:
    """Places no less likely than a limit, and the likeliest always.

    Epsilon and eta sampling are this (Hewitt et al. 2022); so is min-p, whose limit is a fraction of the likeliest
    (Nguyen et al. 2024).
    """
    return np.flatnonzero(p_K >= min(np.float32(limit), p_K.max()))


def no_more_surprising(p_K: Floats, surprise: float) -> Ids:
    """Places of at most so much surprise, in bits, and the likeliest always: mirostat's second version (Basu et al.
    2020).
    """
    return at_least(p_K, 2.0 ** min(0.0, -surprise))


def as_surprising(p_K: Floats, surprise: float) -> Ids:
    """As many of the likeliest places as hold so much surprise, in bits, where probabilities fall as Zipf's law says:
    mirostat's first version (Basu et al. 2020, Algorithm 1). The law's exponent is estimated from the likeliest places.
    """
    size = len(p_K)
    top = np.sort(p_K[largest(p_K, min(ZIPF_FROM, size))])[::-1][:ZIPF_FROM].astype(np.float64)
    top = top[top > 0.0]
    if len(top) < 2:
        return largest(p_K, 1)
    ranks = np.arange(1, len(top) + 1)
    steps, falls = np.diff(np.log(ranks)), -np.diff(np.log(top))
    exponent = float((steps * falls).sum() / (steps * steps).sum())
    if exponent <= 0.0:
        return largest(p_K, size)  # all are alike
    over = exponent - 1.0
    share = -over / math.expm1(-over * math.log(size)) if abs(over) > 1e-9 else 1.0 / math.log(size)
    k = 2.0 ** min((math.log2(share) + surprise) / exponent, math.log2(size))
    return largest(p_K, max(1, round(k)))


def eta_limit(p_K: Tensor, eta: float) -> float:
    """The limit of eta sampling, lower where the distribution is flat (Hewitt et al. 2022, section 4.2)."""
    return min(eta, math.sqrt(eta) * math.exp(-float(torch.special.entr(p_K).sum())))


def nucleus(p_K: Floats, mass: float) -> Ids:
    """The fewest of the likeliest places that hold a share of all probability (Holtzman et al. 2020); ties by place."""
    # What is less likely than this holds less than 1 - mass together: most of a vocabulary goes at one glance.
    places = np.flatnonzero(p_K >= np.float32(0.999 * (1.0 - mass) / len(p_K)))
    some = p_K[places]
    # The bits of floats that are not negative are in the order of their values.
    return places[_lowest(_INFINITY - some.view(np.int32), some, mass * float(p_K.sum()))]


def typical(p_K: Tensor, mass: float) -> Ids:
    """The fewest places that hold a share of all probability, those first whose surprise is nearest to the entropy, and
    all that are as near as the last (Meister et al. 2022, eq. 8).
    """
    entropy = torch.special.entr(p_K).sum()
    distance_K: Floats = (-p_K.log() - entropy).abs().numpy()
    fewest = _lowest(distance_K.view(np.int32), p_K.numpy(), mass * float(p_K.sum()))
    return np.flatnonzero(distance_K <= distance_K[fewest].max())


def _lowest(keys_K: NDArray[np.int32], p_K: Floats, wanted: float) -> Ids:
    """The fewest places, lowest key first and ties by place, whose probabilities reach a sum; ascending.

    Sorting a vocabulary takes longer than all else here. So the places are thrown into buckets by the upper bits of
    their keys, and only the bucket in which the sum is reached gets sorted. A few places are all in one.
    """
    bucket_K = keys_K >> (_BUCKET_BITS if len(keys_K) > _FEW else 31)
    sums = np.bincount(bucket_K, weights=p_K).cumsum()
    wanted = min(wanted, sums[-1])  # they may be apart by rounding
    bucket = int(sums.searchsorted(wanted))  # the first whose sum is no less
    inside = np.flatnonzero(bucket_K == bucket)
    inside = inside[keys_K[inside].argsort(kind="stable")]
    before = (sums[bucket - 1] if bucket else 0.0) + p_K[inside].cumsum(dtype=np.float64) - p_K[inside]
    inside = inside[: max(1, int((before < wanted).sum()))]
    kept_K = bucket_K < bucket
    kept_K[inside] = True
    return np.flatnonzero(kept_K)


def largest(values_V: Floats, k: int) -> Ids:
    """Places of the k largest values, and of those that equal the k-th; ascending. No value is NaN.

    The k-th largest of the maxima of any groups of values is no more than the k-th largest value. So it tells which
    few values are worth ordering (groups are strided, which makes their maxima one pass over contiguous rows).
    """
    groups = 4 * k
    depth = len(values_V) // groups
    places: Ids = np.arange(len(values_V))
    if depth > 1:
        maxima = values_V[: depth * groups].reshape(depth, groups).max(0)
        places = np.flatnonzero(values_V >= np.partition(maxima, -k)[-k])
    some = values_V[places]
    return places[some >= np.partition(some, -k)[-k]]
