"""Windows of the running text: what batch i holds depends on the seed and i, and on nothing else.

So a run that resumes, or goes on with another number of processes, needs no saved queue: it asks for the
batch of the next index. An epoch visits every window once, in the order of a keyed permutation, and starts
its windows at its own offset.
"""

from __future__ import annotations

# B batch   T context length
from typing import Any

import numpy as np
import numpy.typing as npt

from groundup.data.batch import Loader, TokenBatch
from groundup.data.fim import FillInTheMiddle
from groundup.data.permutation import Permutation, derive_key
from groundup.data.shards import TokenSet
from groundup.runtime import GroundupError

Int64Array = npt.NDArray[np.int64]

_BLOCK = 1024  # window starts computed at a time: the cost of numpy calls is shared by many small batches


class TokenLoader(Loader):
    """Deals the windows of a token set.

    The corpus is taken as a ring of N tokens: N // T windows that do not overlap, the last of which may run
    over the end to the beginning. Each epoch turns the ring by a seeded amount, so that windows, and the up
    to T - 1 tokens between the last and the first, differ from epoch to epoch. A batch may begin in one epoch
    and end in the next: no window is left out.

    Args:
        tokens: the corpus.
        context_length: T, tokens the model sees.
        batch_size: B, windows per micro-batch.
        seed: of order and offsets.
        documents: whether to number the documents within a window, so that attention can be kept inside them. An
            end-of-text id opens the document behind it: generation starts from it too, so a document's first token
            is learnt from it alone, and its last one predicts the end-of-text id.
        fill: turns documents into fill-in-the-middle examples.

    Raises:
        GroundupError: the corpus is shorter than one window and its last target.
    """

    def __init__(
        self, tokens: TokenSet, context_length: int, batch_size: int, seed: int, documents: bool = False,
        fill: FillInTheMiddle | None = None,
    ) -> None:  # fmt: skip
        super().__init__(context_length, batch_size, seed)
        if tokens.n_tokens <= context_length:
            raise GroundupError(
                f"{tokens.folder}: {tokens.n_tokens:,} tokens are too few "
                f"for a context_length of {context_length:,}. "
                f"Use a context_length of at most {max(1, tokens.n_tokens - 1):,}, or more text."
            )
        self.tokens = tokens
        self.n_windows = tokens.n_tokens // context_length
        self._documents, self._fill = documents, fill
        self._cached: tuple[int, Int64Array] = -1, np.empty(0, np.int64)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches until every window was seen once; the last may hold windows of the next epoch too."""
        return -(-self.n_windows // self.batch_size)

    def epoch_of(self, sample: int) -> int:
        """The epoch of a window, from 0."""
        return sample // self.n_windows

    def samples(self, first: int, count: int) -> TokenBatch:
        """The windows ``first`` to ``first + count``: int64 [count, T]; the targets are the inputs moved on by one."""
        starts = self._starts(first, count)
        if self._fill is None:
            inputs = np.empty((count, self.context_length), np.int64)
            targets = np.empty_like(inputs)
            self.tokens.fill(inputs, starts)
            self.tokens.fill(targets, (starts + 1) % self.tokens.n_tokens)
        else:
            inputs, targets = self._rearranged(first, starts)
        if not self._documents:
            return TokenBatch(inputs, targets)
        return TokenBatch(inputs, targets, np.cumsum(inputs == self.tokens.end_of_text_id, axis=1, dtype=np.int64))

    def report(self) -> dict[str, Any]:
        """No position is empty; ``documents_cut`` counts the documents that a border of epoch 0's windows cuts."""
        n, offset = self.tokens.n_tokens, derive_key(self.seed, 0, 1) % self.tokens.n_tokens
        starts = self.tokens.document_starts()
        begins, ends = (starts - offset) % n, (np.append(starts[1:], n) - 1 - offset) % n
        cut = (ends < begins) | (begins // self.context_length != ends // self.context_length)
        return {
            "packing": "documents" if self._documents else "none",
            "samples_per_epoch": self.n_windows,
            "padding": 0.0,
            "documents": len(starts),
            "documents_cut": int(np.count_nonzero(cut)),
        }

    def starts(self, index: int) -> Int64Array:
        """Where in the corpus the windows of micro-batch ``index`` start: int64 [B]."""
        return self._starts(index * self.batch_size, self.batch_size)

    def _rearranged(self, first: int, starts: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Inputs and targets of windows whose documents were turned into fill-in-the-middle examples."""
        assert self._fill is not None
        windows = np.empty((len(starts), self.context_length + 1), np.int64)
        self.tokens.fill(windows, starts)
        epochs = np.arange(first, first + len(starts)) // self.n_windows
        self._fill.rearrange_windows(windows, self.tokens.end_of_text_id, epochs, starts)
        return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])

    def _starts(self, first: int, count: int) -> Int64Array:
        last = first + count
        parts = []
        while first < last:
            number, inside = divmod(first, _BLOCK)
            part = self._starts_of_block(number)[inside : inside + last - first]
            parts.append(part)
            first += len(part)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _starts_of_block(self, number: int) -> Int64Array:
        """The starts of ``_BLOCK`` windows, counted over all epochs; the last block asked for is kept."""
        kept, block = self._cached  # one assignment for both: another thread may ask meanwhile
        if number == kept:
            return block
        block = np.empty(_BLOCK, np.int64)
        filled = 0
        while filled < _BLOCK:
            epoch, place = divmod(number * _BLOCK + filled, self.n_windows)
            count = min(_BLOCK - filled, self.n_windows - place)
            order = Permutation(self.n_windows, derive_key(self.seed, epoch))
            offset = derive_key(self.seed, epoch, 1) % self.tokens.n_tokens
            windows = order(np.arange(place, place + count))
            block[filled : filled + count] = (windows * self.context_length + offset) % self.tokens.n_tokens
            filled += count
        self._cached = number, block
        return block
