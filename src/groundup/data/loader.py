"""Batches of training windows: what batch i holds depends on the seed and i, and on nothing else.

So a run that resumes, or goes on with another number of processes, needs no saved queue: it asks for the
batch of the next index. An epoch visits every window once, in the order of a keyed permutation, and starts
its windows at its own offset.
"""

from __future__ import annotations

# B batch   T context length
import numpy as np
import numpy.typing as npt

from groundup.data.permutation import Permutation, derive_key
from groundup.data.shards import TokenSet
from groundup.runtime import GroundupError

Int64Array = npt.NDArray[np.int64]

_BLOCK = 1024  # window starts computed at a time: the cost of numpy calls is shared by many small batches


class TokenLoader:
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

    Raises:
        GroundupError: the corpus is shorter than one window and its last target.
    """

    def __init__(self, tokens: TokenSet, context_length: int, batch_size: int, seed: int) -> None:
        if context_length < 1 or batch_size < 1:
            raise ValueError(f"context_length {context_length} and batch_size {batch_size}: at least 1 each")
        if tokens.n_tokens <= context_length:
            raise GroundupError(
                f"{tokens.folder}: {tokens.n_tokens:,} tokens are too few "
                f"for a context_length of {context_length:,}. "
                f"Use a context_length of at most {max(1, tokens.n_tokens - 1):,}, or more text."
            )
        self.tokens = tokens
        self.context_length = context_length
        self.batch_size = batch_size
        self.seed = seed
        self.n_windows = tokens.n_tokens // context_length
        self._block_number, self._block = -1, np.empty(0, np.int64)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches until every window was seen once; the last may hold windows of the next epoch too."""
        return -(-self.n_windows // self.batch_size)

    def epoch(self, index: int) -> int:
        """The epoch that micro-batch ``index`` begins in, from 0."""
        return index * self.batch_size // self.n_windows

    def state(self, index: int) -> dict[str, int]:
        """All that resuming at micro-batch ``index`` needs: the seed, the epoch and the index."""
        return {"seed": self.seed, "epoch": self.epoch(index), "index": index}

    def batch(self, index: int) -> tuple[Int64Array, Int64Array]:
        """Micro-batch ``index``, counted from 0 over all epochs.

        Returns:
            Inputs and targets, int64 [B, T] each; the targets are the inputs moved on by one token.
        """
        if index < 0:
            raise IndexError(f"micro-batch {index}")
        windows = self.tokens.windows(self.starts(index), self.context_length + 1)
        return windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)

    def starts(self, index: int) -> Int64Array:
        """Where in the corpus the windows of micro-batch ``index`` start: int64 [B]."""
        first = index * self.batch_size
        last = first + self.batch_size
        parts = []
        while first < last:
            number, inside = divmod(first, _BLOCK)
            part = self._starts_of_block(number)[inside : inside + last - first]
            parts.append(part)
            first += len(part)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _starts_of_block(self, number: int) -> Int64Array:
        """The starts of ``_BLOCK`` windows, counted over all epochs; the last block asked for is kept."""
        if number == self._block_number:
            return self._block
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
        self._block_number, self._block = number, block
        return block
