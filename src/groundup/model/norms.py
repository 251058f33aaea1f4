"""Normalisation: what keeps the residual stream's scale in hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.model.config import ModelConfig


class RMSNorm(nn.RMSNorm):
    """Divide by the root mean square over the last axis, then scale (Zhang & Sennrich 2019).

    Computed in the input's own dtype: under bf16 autocast the residual stream stays float32, so nothing is lost.

    Args:
        plus_one: scale by 1 + weight, the weight starting at 0 (Gemma).
    """

    def __init__(self, width: int, eps: float, *, plus_one: bool = False) -> None:
        self.plus_one = plus_one
        super().__init__(width, eps=eps)

    def reset_parameters(self) -> None:
        """Start as no scaling at all."""
        nn.init.constant_(self.weight, 0.0 if self.plus_one else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` over its last axis; same shape and dtype."""
        weight = self.weight + 1.0 if self.plus_one else self.weight
        return F.rms_norm(x, self.normalized_shape, weight.to(x.dtype), self.eps)


def make_norm(config: ModelConfig, width: int | None = None) -> nn.Module:
    """The norm that ``config.norm`` names, over ``width`` features (default: the residual stream's)."""
    width = config.n_embd if width is None else width
    if config.norm == "layernorm":
        return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)
    return RMSNorm(width, config.norm_eps, plus_one=config.norm_plus_one)


def softcap(x: Tensor, bound: float | None) -> Tensor:
    """Keep ``x`` within ``bound`` smoothly: ``bound tanh(x / bound)`` (Bello et al. 2017; Gemma 2); None leaves it."""
    return x if bound is None else bound * torch.tanh(x / bound)
