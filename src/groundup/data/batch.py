"""A micro-batch of token windows, and what anything that deals them has in common."""

# B batch   T positions

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, TypeVar

IGNORED = -100  # a target that counts for nothing: the model room's word for it, which this room must not import

L = TypeVar("L", bound="Loader")


class TokenBatch(NamedTuple):
    """What a language model learns from at once: integers, B x T each, as NumPy arrays or as tensors.

    Args:
        inputs: token ids.
        targets: the id that follows each of them; -100 where nothing is to be learnt.
        documents: the number of the document, within its row, that each position belongs to: attention stays inside
            it. None where a row is one stream.
    """

    inputs: Any
    targets: Any
    documents: Any = None


class Loader(ABC):
    """Deals micro-batches: what batch i holds depends on the seed and on i, and on nothing else.

    Batches are cut from an endless sequence of samples, each a function of the seed and its own number. So a run
    resumes at an index, and goes on with another batch size (:meth:`resized`) at the same sample, without a saved
    queue. Of W processes, process r takes the batches r, r + W, ….

    Args:
        context_length: T, positions of a sample.
        batch_size: B, samples of a batch.
        seed: of everything random.
    """

    def __init__(self, context_length: int, batch_size: int, seed: int) -> None:
        if context_length < 1 or batch_size < 1:
            raise ValueError(f"context_length {context_length} and batch_size {batch_size}: at least 1 each")
        self.context_length, self.batch_size, self.seed = context_length, batch_size, seed

    @abstractmethod
    def samples(self, first: int, count: int) -> TokenBatch:
        """The samples ``first`` to ``first + count``, counted from 0 over all epochs: int64 arrays count x T.

        Raises:
            GroundupError: a file of the data is damaged; it is named.
        """

    @abstractmethod
    def epoch_of(self, sample: int) -> int:
        """The epoch that a sample belongs to, from 0."""

    @abstractmethod
    def report(self) -> dict[str, Any]:
        """What packing costs: ``padding`` (part of all positions that hold nothing), ``documents_cut``, and more."""

    def batch(self, index: int) -> TokenBatch:
        """Micro-batch ``index``, counted from 0 over all epochs: int64 arrays B x T.

        Raises:
            IndexError: ``index`` is negative.
            GroundupError: a file of the data is damaged; it is named.
        """
        if index < 0:
            raise IndexError(f"micro-batch {index}")
        return self.samples(index * self.batch_size, self.batch_size)

    def epoch(self, index: int) -> int:
        """The epoch that micro-batch ``index`` begins in, from 0."""
        return self.epoch_of(index * self.batch_size)

    def state(self, index: int) -> dict[str, int]:
        """All that resuming at micro-batch ``index`` needs: the seed, the epoch and the index."""
        return {"seed": self.seed, "epoch": self.epoch(index), "index": index}

    def resized(self: L, batch_size: int) -> L:
        """The same samples in batches of another size; batch i begins at sample i x ``batch_size``."""
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: at least 1")
        other = copy.copy(self)
        other.batch_size = batch_size
        return other
