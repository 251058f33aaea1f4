"""Several texts in given proportions: which of them sample i comes from depends on the weights and i alone.

Drawing at random would leave shares that are off by 1 / sqrt(n) after n samples, and would need every draw before i to
know how many samples a text has given. Here samples are dealt out evenly instead. With two texts of which the first
has the share p / q, it has given ``floor(j p / q + 1/2)`` of the first j samples: never more than half a sample off,
and found without looking at any earlier sample. More texts are split two by two, along the tree of Huffman's code for
their weights. All of it is whole numbers: no rounding, on no machine.

A curriculum is a schedule of weights. It is cut into pieces within which weights are constant.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import lcm
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from groundup.data.batch import Loader, TokenBatch

RAMP_STEPS = 64  # equal steps in which weights go from one point of a schedule to the next
_BLOCK = 1024  # samples located at a time: the cost of numpy calls is shared by many small batches
_LONG = 1 << 28  # samples of the piece of constant weights that is repeated for ever, about

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Weights:
    """The weights that hold from one sample on.

    Args:
        sample: the sample.
        shares: a weight per source, not negative, not all zero.
    """

    sample: int
    shares: Sequence[float]


@dataclass(frozen=True)
class _Split:
    """A node of the tree: deals the samples that reach it to its two sides.

    Args:
        sides: the left one and the right one: a source's number, or a further node.
        borders: samples of the node before each piece of the schedule, and in all: int64 [pieces + 1].
        left: those of them that go to the left: int64 [pieces + 1].
    """

    sides: tuple[int | _Split, int | _Split]
    borders: Int64Array
    left: Int64Array

    def given_left(self, j: Int64Array) -> Int64Array:
        """How many of the node's first j samples go to the left."""
        piece = np.clip(np.searchsorted(self.borders, j, side="right") - 1, 0, len(self.borders) - 2)
        before, p = self.left[piece], self.left[piece + 1] - self.left[piece]
        q = np.maximum(self.borders[piece + 1] - self.borders[piece], 1)
        return before + (2 * (j - self.borders[piece]) * p + q) // (2 * q)


class Mixture:
    """Deals the numbers of samples to sources.

    After n samples each source has given its wanted number of them within 1 (up to three sources) or 1.7 (any number):
    every split is off by a half at most, and what it passes on shrinks with the share on the way down a Huffman tree
    (1/2 (1 + 1 + 1/2 + 1/3 + 1/5 + 1/8 + ...) at worst). Where weights change, the ends of the pieces they are cut into
    are rounded to whole samples, which adds less than 1.

    Args:
        schedule: weights from sample 0 on, and at later samples, in order.
        shape: ``linear``: between two points weights change evenly (in 64 steps); ``steps``: at the points.

    Raises:
        ValueError: the schedule is empty, does not begin at 0, is out of order, or holds weights that mean nothing.
    """

    def __init__(self, schedule: Sequence[Weights], shape: Literal["linear", "steps"] = "linear") -> None:
        if not schedule or schedule[0].sample != 0:
            raise ValueError("a schedule begins at sample 0")
        if any(one.sample >= two.sample for one, two in pairwise(schedule)):
            raise ValueError("the points of a schedule stand in order, each once")
        for point in schedule:
            if len(point.shares) != len(schedule[0].shares) or min(point.shares) < 0 or not sum(point.shares) > 0:
                raise ValueError(f"weights {list(point.shares)}: one per source, none negative, not all zero")
        self.n_sources = len(schedule[0].shares)
        self._counts, self._borders = _apportion(_pieces(schedule, shape))
        self._period = int(self._borders[-1] - self._borders[-2])  # the last piece, which repeats
        self._tree = _tree(self._counts)
        self._cached: tuple[int, tuple[Int64Array, Int64Array]] = -1, (np.empty(0, np.int64), np.empty(0, np.int64))

    def locate(self, first: int, count: int) -> tuple[Int64Array, Int64Array]:
        """The source of each of the samples ``first`` to ``first + count``, and its number among that source's."""
        parts = []
        while count > 0:
            number, inside = divmod(first, _BLOCK)
            kept, block = self._cached  # one assignment for both: another thread may ask meanwhile
            if kept != number:
                block = self._locate(np.arange(number * _BLOCK, (number + 1) * _BLOCK))
                self._cached = number, block
            part = slice(inside, min(inside + count, _BLOCK))
            parts.append((block[0][part], block[1][part]))
            first, count = first + part.stop - inside, count - (part.stop - inside)
        if not parts:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        sources, own = zip(*parts, strict=True)
        return np.concatenate(sources), np.concatenate(own)

    def given(self, n: int) -> list[int]:
        """How many of the first ``n`` samples each source gives."""
        rounds, place = self._folded(np.array([n]))
        given = rounds[0] * self._per_period()

        def walk(node: int | _Split, j: Int64Array) -> None:
            if isinstance(node, int):
                given[node] += j[0]
                return
            left = node.given_left(j)
            walk(node.sides[0], left)
            walk(node.sides[1], j - left)

        walk(self._tree, place)
        return [int(number) for number in given]

    def _locate(self, samples: Int64Array) -> tuple[Int64Array, Int64Array]:
        rounds, places = self._folded(samples)
        sources, own = np.empty_like(samples), np.empty_like(samples)

        def walk(node: int | _Split, which: Int64Array, j: Int64Array) -> None:
            if isinstance(node, int):
                sources[which], own[which] = node, j
            elif len(which):
                before = node.given_left(j)
                goes_left = node.given_left(j + 1) > before
                walk(node.sides[0], which[goes_left], before[goes_left])
                walk(node.sides[1], which[~goes_left], (j - before)[~goes_left])

        walk(self._tree, np.arange(len(samples)), places)
        return sources, own + rounds * self._per_period()[sources]

    def _folded(self, samples: Int64Array) -> tuple[Int64Array, Int64Array]:
        """How often the last piece has gone round before each sample, and the sample without these rounds."""
        rounds = np.maximum(samples - self._borders[-2], 0) // self._period
        return rounds, samples - rounds * self._period

    def _per_period(self) -> Int64Array:
        return np.asarray(self._counts[-1] - self._counts[-2])


class MixedLoader(Loader):
    """Deals the samples of several loaders in the proportions of a mixture.

    Args:
        loaders: by the name of their text; of one context length.
        mixture: of as many sources, in the same order.
        batch_size: samples per micro-batch.
        seed: as told by :meth:`state`; the loaders have theirs.
    """

    def __init__(self, loaders: Mapping[str, Loader], mixture: Mixture, batch_size: int, seed: int) -> None:
        lengths = {loader.context_length for loader in loaders.values()}
        if len(lengths) != 1 or len(loaders) != mixture.n_sources:
            raise ValueError(f"{len(loaders)} loaders of context lengths {lengths} for {mixture.n_sources} sources")
        super().__init__(lengths.pop(), batch_size, seed)
        self.loaders, self.mixture = dict(loaders), mixture

    def samples(self, first: int, count: int) -> TokenBatch:
        """The samples ``first`` to ``first + count``; those of one source are consecutive ones of its loader."""
        sources, own = self.mixture.locate(first, count)
        whole: list[Int64Array] = []
        for number, loader in enumerate(self.loaders.values()):
            rows = np.flatnonzero(sources == number)
            if not len(rows):
                continue
            parts = [part for part in loader.samples(int(own[rows[0]]), len(rows)) if part is not None]
            whole = whole or [np.empty((count, self.context_length), np.int64) for _ in parts]
            for target, part in zip(whole, parts, strict=True):
                target[rows] = part
        return TokenBatch(*whole)

    def epoch_of(self, sample: int) -> int:
        """How often every source that has given anything has been gone through whole by then."""
        given = self.mixture.given(sample + 1)
        return min(loader.epoch_of(n - 1) for loader, n in zip(self.loaders.values(), given, strict=True) if n)

    def shares(self, samples: int) -> dict[str, dict[str, float]]:
        """Of the first ``samples`` samples, by source: how many it gave, their share, and how often it was seen."""
        given = self.mixture.given(samples)
        return {
            name: {"samples": n, "share": n / max(1, samples), "epoch": loader.epoch_of(n - 1) if n else 0}
            for (name, loader), n in zip(self.loaders.items(), given, strict=True)
        }

    def report(self) -> dict[str, Any]:
        """The report of each source, by its name, and ``padding`` and ``documents_cut`` of all."""
        reports = {name: loader.report() for name, loader in self.loaders.items()}
        weights = np.array(self.mixture.given(1_000_000)) / 1_000_000
        return {
            "packing": next(iter(reports.values()))["packing"],
            "padding": float(sum(w * one["padding"] for w, one in zip(weights, reports.values(), strict=True))),
            "documents_cut": sum(one["documents_cut"] for one in reports.values()),
            "sources": reports,
        }


def _pieces(schedule: Sequence[Weights], shape: str) -> list[tuple[int, list[Fraction]]]:
    """Length in samples and shares (which sum to 1) of each stretch of constant weights; the last is to repeat."""
    points = [(point.sample, _normed(point.shares)) for point in schedule]
    pieces = []
    for (begin, shares), (end, later) in pairwise(points):
        steps = min(RAMP_STEPS, end - begin) if shape == "linear" and shares != later else 1
        borders = [begin + (end - begin) * step // steps for step in range(steps + 1)]
        for step in range(steps):
            how_far = Fraction(2 * step + 1, 2 * steps) if steps > 1 else Fraction(0)
            mixed = [a + (b - a) * how_far for a, b in zip(shares, later, strict=True)]
            pieces.append((borders[step + 1] - borders[step], mixed))
    last = points[-1][1]
    unit = lcm(*(share.denominator for share in last))  # after so many samples every source has its share exactly
    pieces.append((max(1, _LONG // unit) * unit if unit <= _LONG else _LONG, last))
    return pieces


def _normed(weights: Sequence[float]) -> list[Fraction]:
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is a tenth, as it was meant
    return [weight / sum(exact) for weight in exact]


def _apportion(pieces: Sequence[tuple[int, list[Fraction]]]) -> tuple[Int64Array, Int64Array]:
    """Whole numbers of samples per piece and source: the shares of a piece, by largest remainders.

    What rounding owes a source is carried to the next piece, so that it never adds up.

    Returns:
        Samples of each source before each piece and in all, int64 [pieces + 1, sources], and their sums [pieces + 1].
    """
    rows = [[0] * len(pieces[0][1])]
    owed = [Fraction(0)] * len(rows[0])
    for length, shares in pieces:
        wanted = [length * share + debt for share, debt in zip(shares, owed, strict=True)]
        counts = [max(0, wish.__floor__()) if share else 0 for wish, share in zip(wanted, shares, strict=True)]
        while (missing := length - sum(counts)) != 0:  # at most once or twice per source
            step = 1 if missing > 0 else -1
            able = [s for s, share in enumerate(shares) if share and counts[s] + step >= 0]
            counts[max(able, key=lambda s: step * (wanted[s] - counts[s]))] += step
        owed = [wish - count for wish, count in zip(wanted, counts, strict=True)]
        rows.append([before + count for before, count in zip(rows[-1], counts, strict=True)])
    table = np.array(rows, np.int64)
    return table, table.sum(axis=1)


def _tree(counts_PS: Int64Array) -> int | _Split:
    """Huffman's tree over all that each source gives: a source of large share is split off by few nodes."""
    heap: list[tuple[int, int, int | _Split, Int64Array]] = [
        (int(column[-1]), source, source, column) for source, column in enumerate(counts_PS.T)
    ]
    heapq.heapify(heap)
    number = len(heap)
    while len(heap) > 1:
        light, heavy = heapq.heappop(heap), heapq.heappop(heap)
        borders = light[3] + heavy[3]
        node = _Split((heavy[2], light[2]), borders, np.ascontiguousarray(heavy[3]))
        heapq.heappush(heap, (light[0] + heavy[0], number, node, borders))
        number += 1
    return heap[0][2]
