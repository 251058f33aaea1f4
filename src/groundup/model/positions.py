"""Positions: how attention learns where a token stands."""

# B batch   T query positions   H heads   D head dimension

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryTable(nn.Module):
    """Cosines and sines of the rotary position embedding (Su et al. 2021, eq. 15).

    Dimension pairs are (i, i + D/2), the convention of the Hugging Face Llama weights, not the interleaved one of the
    paper; the two differ by a fixed permutation of the head dimension.
    """

    cos_TD: Tensor
    sin_TD: Tensor

    def __init__(self, head_dim: int, context_length: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        self._fill(context_length)

    def _fill(self, length: int, device: torch.device | None = None) -> None:
        exponents_D2 = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        # Written as transformers writes it: theta**-x differs in the last bit, which grows with the position.
        frequencies_D2 = 1.0 / self.theta**exponents_D2
        angles_TD2 = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies_D2)
        angles_TD = torch.cat([angles_TD2, angles_TD2], dim=-1)
        self.register_buffer("cos_TD", angles_TD.cos(), persistent=False)
        self.register_buffer("sin_TD", angles_TD.sin(), persistent=False)

    def forward(self, positions_BT: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines for the given positions.

        Args:
            positions_BT: positions per sequence, or None for 0 … length - 1 in every sequence.
            length: T.

        Returns:
            Two float32 tensors that broadcast over B T H D.
        """
        if positions_BT is None:
            return self.cos_TD[None, :length, None], self.sin_TD[None, :length, None]
        return self.cos_TD[positions_BT][:, :, None], self.sin_TD[positions_BT][:, :, None]


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of dimensions by its position's angle; same shape and dtype as ``x_BTHD``."""
    half = x_BTHD.shape[-1] // 2
    turned = torch.cat([-x_BTHD[..., half:], x_BTHD[..., :half]], dim=-1)
    return x_BTHD * cos.to(x_BTHD.dtype) + turned * sin.to(x_BTHD.dtype)
