"""What decoding remembers: the keys and values of the positions already seen."""

# B batch   S key positions   G key/value heads   D head dimension

from __future__ import annotations

import torch
from torch import Tensor

from groundup.model.config import ModelConfig


class KVCache:
    """A contiguous cache: one preallocated pair of tensors B S G D per layer, filled from the left.

    All sequences of the batch advance together. ``pad_B`` says how many leading positions of each sequence are
    padding (prompts of unequal length are aligned at their ends), which attention must not see.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        length: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.n_layer, batch_size, length, config.kv_heads, config.head_dim)
        self.k_LBSGD = torch.zeros(shape, device=device, dtype=dtype)
        self.v_LBSGD = torch.zeros(shape, device=device, dtype=dtype)
        self.capacity = length
        self.length = 0
        self.pad_B: Tensor | None = None

    def append(self, layer: int, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of one layer and return all of it, B S G D with S = length + T.

        The length itself advances once per forward pass (:meth:`advance`), after the last layer.
        """
        end = self.length + k_BTGD.shape[1]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, {end} were asked for")
        self.k_LBSGD[layer, :, self.length : end] = k_BTGD
        self.v_LBSGD[layer, :, self.length : end] = v_BTGD
        return self.k_LBSGD[layer, :, :end], self.v_LBSGD[layer, :, :end]

    def advance(self, positions: int) -> None:
        """Count ``positions`` more as stored."""
        self.length += positions

    def keep(self, rows: Tensor) -> None:
        """Keep only these sequences of the batch, in this order (indices, int64): finished ones cost nothing any
        more.
        """
        self.k_LBSGD = self.k_LBSGD[:, rows]
        self.v_LBSGD = self.v_LBSGD[:, rows]
        self.pad_B = None if self.pad_B is None else self.pad_B[rows]

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return self.k_LBSGD.nbytes + self.v_LBSGD.nbytes
