"""What decoding remembers: keys and values of the positions already seen, or the latents they come from."""

# B batch   M tokens of a ragged batch   T new positions   S kept positions   G key/value heads   D head dimension

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from groundup.model.config import ModelConfig


class Cache(Protocol):
    """What the model asks of a cache, whatever holds the numbers: one block of memory, or pages of it.

    Attributes:
        length: positions stored so far, padding included.
        capacity: the most it can hold.
        pad_B: how many leading positions of each sequence are padding, which attention must not see; None for none.
    """

    length: int
    capacity: int
    pad_B: Tensor | None

    def append(self, layer: int, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor, int]:
        """Store what a layer has computed for T new positions.

        Returns:
            Keys and values that those positions may need, B S G D, and the place of the first of them.
        """

    def advance(self, positions: int) -> None:
        """Count positions as stored: once per forward pass, after the last layer."""


@dataclass
class Part:
    """Tokens of a ragged batch that are read alike: those of sequences that have equally many new ones.

    Args:
        begin: where they begin in the batch's row of tokens, sequence after sequence.
        sequences: how many sequences.
        queries: T, new tokens of each.
        longest: positions that the longest of these texts has, or will have when its prompt has been read.
        cache: what is kept of them, aligned at their ends (``pad_B``) when their lengths differ.
    """

    begin: int
    sequences: int
    queries: int
    longest: int
    cache: Cache

    @property
    def end(self) -> int:
        """Where they end in the row of tokens."""
        return self.begin + self.sequences * self.queries

    def cut(self, x_1M: Tensor) -> Tensor:
        """This part of something that there is for each token of the row, 1 M ..., as B T ...."""
        return x_1M[0, self.begin : self.end].unflatten(0, (self.sequences, self.queries))


@dataclass
class Ragged:
    """Sequences of different lengths read together, as one row of tokens: each product is of all tokens at once, and
    attention of one part after the other (continuous batching; Yu et al. 2022, "selective batching").

    Args:
        positions_1M: the place of each token in its own text, int64.
        parts: what the row consists of, from its beginning to its end.
    """

    positions_1M: Tensor
    parts: tuple[Part, ...]


class LayerCache:
    """Keys and values of one layer in one block of memory, filled from the left.

    A layer with a sliding window keeps no more than the window needs: its block has room for some positions besides,
    and when it is full the last ``window - 1`` move to its front.

    Args:
        k_shape, v_shape: G D of the keys and of the values; of latent attention, of the latent and its rotary key.
        length: positions to hold; more than the window and ``new`` positions at once are not needed.
        window: how many positions a query sees; None for all.
        new: the most positions that come at once.
    """

    def __init__(
        self, batch_size: int, k_shape: tuple[int, int], v_shape: tuple[int, int], length: int, *,
        window: int | None, new: int, device: torch.device | str, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.window = window
        self.size = length if window is None else min(length, window - 1 + max(new, -(-window // 8)))
        self.k_BSGD = torch.zeros(batch_size, self.size, *k_shape, device=device, dtype=dtype)
        self.v_BSGD = torch.zeros(batch_size, self.size, *v_shape, device=device, dtype=dtype)
        self.start = 0  # the place of what lies at the front of the block

    def append(self, length: int, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor, int]:
        """Store keys and values at the places from ``length`` on; what :meth:`Cache.append` returns."""
        T = k_BTGD.shape[1]
        first = 0 if self.window is None else max(0, length - self.window + 1)
        if self.window is not None and self.size - (length - first) < T:  # more at once than there is room for
            return self._append_long(length, first, k_BTGD, v_BTGD)
        if length + T - self.start > self.size:
            self._move_to_front(first, length)
        begin, end = length - self.start, length + T - self.start
        self.k_BSGD[:, begin:end] = k_BTGD
        self.v_BSGD[:, begin:end] = v_BTGD
        return self.k_BSGD[:, first - self.start : end], self.v_BSGD[:, first - self.start : end], first

    def _move_to_front(self, first: int, length: int) -> None:
        kept = slice(first - self.start, length - self.start)
        for block in (self.k_BSGD, self.v_BSGD):
            block[:, : length - first] = block[:, kept].clone()
        self.start = first

    def _append_long(self, length: int, first: int, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor, int]:
        assert self.window is not None
        kept = slice(first - self.start, length - self.start)
        k_BSGD = torch.cat([self.k_BSGD[:, kept], k_BTGD.to(self.k_BSGD.dtype)], dim=1)
        v_BSGD = torch.cat([self.v_BSGD[:, kept], v_BTGD.to(self.v_BSGD.dtype)], dim=1)
        count = min(self.window - 1, k_BSGD.shape[1])
        self.start = length + k_BTGD.shape[1] - count
        self.k_BSGD[:, :count] = k_BSGD[:, k_BSGD.shape[1] - count :]
        self.v_BSGD[:, :count] = v_BSGD[:, v_BSGD.shape[1] - count :]
        return k_BSGD, v_BSGD, first


def cache_shapes(config: ModelConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """Heads and width of what a layer keeps per position: keys and values; the latent and the rotary key of MLA."""
    latent = config.latent
    if latent.kv_rank:
        return (1, latent.kv_rank), (1, latent.rope_dim)
    return (config.kv_heads, config.head_width), (config.kv_heads, config.value_width)


class KVCache:
    """A cache in one block of memory per layer. All sequences of the batch advance together.

    Each layer keeps what its attention needs: everything, a sliding window, or a latent vector per position. Prompts
    of unequal length are aligned at their ends (``pad_B``).

    Args:
        length: positions to hold.
        new: the most positions that come at once after the first time; more are taken too, but copied.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        length: int,
        *,
        new: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shapes = cache_shapes(config)
        self.layers = [
            LayerCache(batch_size, *shapes, length, window=config.window(layer), new=new, device=device, dtype=dtype)
            for layer in range(config.n_layer)
        ]
        self.capacity = length
        self.length = 0
        self.pad_B: Tensor | None = None

    def append(self, layer: int, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor, int]:
        """Store the new keys and values of one layer; see :meth:`Cache.append`.

        Raises:
            ValueError: there is no room for them.
        """
        end = self.length + k_BTGD.shape[1]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, {end} were asked for")
        return self.layers[layer].append(self.length, k_BTGD, v_BTGD)

    def advance(self, positions: int) -> None:
        """Count ``positions`` more as stored."""
        self.length += positions

    def keep(self, rows: Tensor) -> None:
        """Keep only these sequences of the batch, in this order (indices, int64): finished ones cost nothing any
        more.
        """
        for layer in self.layers:
            layer.k_BSGD, layer.v_BSGD = layer.k_BSGD[rows], layer.v_BSGD[rows]
        self.pad_B = None if self.pad_B is None else self.pad_B[rows]

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(layer.k_BSGD.nbytes + layer.v_BSGD.nbytes for layer in self.layers)
