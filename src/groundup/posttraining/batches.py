"""Examples as micro-batches: packed into rows, or each in a row of its own.

Both give the same loss: attention stays inside each example, positions begin anew in each, and what is empty is
learnt by nobody. Packing computes fewer empty positions.
"""

# B batch   T positions

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from groundup.data import IGNORED, Loader, Permutation, TokenBatch, best_fit, derive_key
from groundup.posttraining.encoding import Example
from groundup.runtime import GroundupError

BLOCK_EXAMPLES = 16_384  # packed together
WHOLE = 8  # positions of padded rows are a multiple of it: kernels are faster, and meet fewer shapes
Packing = Literal["best_fit", "padded"]
Int64Array = npt.NDArray[np.int64]


class ExampleLoader(Loader):
    """Deals examples, those of an epoch in the order of a keyed permutation, or in that of a curriculum.

    Which examples make row i of an epoch hangs on the seed, the epoch and i. Examples are packed in blocks of 16,384,
    each by best fit (Ding et al. 2024); its rows are dealt in shuffled order.

    Args:
        examples: none longer than a row.
        context_length: T, positions of a row.
        batch_size: B, rows of a micro-batch.
        seed: of the order.
        packing: several examples to a row, or one.
        pad: the id in empty positions.
        ranks: for a curriculum: examples of lower rank come earlier within an epoch, those of one rank shuffled. Packed
            together are then examples of like rank.
        block: examples packed together.

    Raises:
        GroundupError: there is no example.
    """

    def __init__(
        self, examples: Sequence[Example], context_length: int, batch_size: int, seed: int,
        packing: Packing = "best_fit", *, pad: int = 0, ranks: Sequence[float] | None = None,
        block: int = BLOCK_EXAMPLES,
    ) -> None:  # fmt: skip
        super().__init__(context_length, batch_size, seed)
        if not examples:
            raise GroundupError("there is no example to learn from. Give more data, or look at what was left out.")
        self.packing, self.pad, self.block = packing, pad, block
        self.ids = np.concatenate([example.ids for example in examples])
        self.learn = np.concatenate([example.learn for example in examples])
        self.ends = np.cumsum([len(example.ids) for example in examples])
        self.sizes = np.array([example.positions for example in examples])
        if self.sizes.max() > context_length:
            raise ValueError(f"an example of {self.sizes.max()} positions in rows of {context_length}")
        self.ranks = None if ranks is None else np.asarray(ranks, np.float64)
        self._epochs: dict[int, tuple[Int64Array, Int64Array]] = {}
        self._ends = [0]  # rows before each epoch
        self._lock = threading.RLock()  # a prefetching thread asks for rows while another asks for the epoch

    def samples(self, first: int, count: int) -> TokenBatch:
        """The rows ``first`` to ``first + count``: int64 [count, T]; padded ones end where the longest of them does."""
        shape = count, self.context_length
        inputs, targets = np.full(shape, self.pad, np.int64), np.full(shape, IGNORED, np.int64)
        documents, longest = np.zeros(shape, np.int64), 0
        for row in range(count):
            with self._lock:
                epoch = self.epoch_of(first + row)
                order, starts = self._epoch(epoch)
            place, filled, number = first + row - self._ends[epoch], 0, 0
            for number, example in enumerate(order[starts[place] : starts[place + 1]]):
                end, size = self.ends[example], self.sizes[example]
                here = slice(filled, filled + size)
                inputs[row, here] = self.ids[end - size - 1 : end - 1]
                learnt = self.learn[end - size : end]
                targets[row, here] = np.where(learnt, self.ids[end - size : end], IGNORED)
                documents[row, here] = number
                filled += size
            documents[row, filled:] = number + 1
            longest = max(longest, filled)
        if self.packing == "padded":
            whole = slice(min(-(-longest // WHOLE) * WHOLE, self.context_length))
            return TokenBatch(inputs[:, whole], targets[:, whole], documents[:, whole])
        return TokenBatch(inputs, targets, documents)

    def epoch_of(self, sample: int) -> int:
        """The epoch that a row belongs to, from 0."""
        with self._lock:
            while self._ends[-1] <= sample:
                _, starts = self._epoch(len(self._ends) - 1)
                self._ends.append(self._ends[-1] + len(starts) - 1)
        return int(np.searchsorted(self._ends, sample, side="right")) - 1

    def rows_of_epoch(self, epoch: int = 0) -> int:
        """How many rows an epoch has."""
        return len(self._epoch(epoch)[1]) - 1

    def report(self) -> dict[str, Any]:
        """Of epoch 0: ``rows``, ``examples``, and ``padding``, the part of all positions that is empty."""
        rows = self.rows_of_epoch()
        filled = int(self.sizes.sum())
        return {
            "packing": self.packing, "rows": rows, "examples": len(self.sizes), "documents_cut": 0,
            "padding": 1 - filled / (rows * self.context_length), "learnt": int(self.learn.sum()),
        }  # fmt: skip

    def _epoch(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """The examples of an epoch, row after row, and where each row begins among them, and the last one ends."""
        if epoch not in self._epochs:
            self._epochs = {epoch: self._packed(epoch)}  # an epoch at a time
        return self._epochs[epoch]

    def _packed(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        count = len(self.sizes)
        order = Permutation(count, derive_key(self.seed, epoch))(np.arange(count))
        if self.ranks is not None:
            order = order[np.argsort(self.ranks[order], kind="stable")]
        if self.packing == "padded":
            return order, np.arange(count + 1)
        rows: list[Int64Array] = []
        for number, begin in enumerate(range(0, count, self.block)):
            block = order[begin : begin + self.block]
            row_of, n_rows = best_fit(self.sizes[block], self.context_length)
            if self.ranks is None:  # best fit puts the longest into the first rows
                dealt = Permutation(n_rows, derive_key(self.seed, epoch, 8, number))(np.arange(n_rows))
            else:
                first = np.full(n_rows, len(block))
                np.minimum.at(first, row_of, np.arange(len(block)))
                dealt = np.argsort(np.argsort(first))
            rows.append(dealt[row_of] + (rows[-1].max() + 1 if rows else 0))
        row_of = np.concatenate(rows)
        places = np.argsort(row_of, kind="stable")
        return order[places], np.concatenate([[0], np.cumsum(np.bincount(row_of))])
