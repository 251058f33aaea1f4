"""Normalisation: what keeps the residual stream's scale in hand."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from groundup.model.config import ModelConfig


class RMSNorm(nn.RMSNorm):
    """Divide by the root mean square over the last axis, then scale (Zhang & Sennrich 2019).

    Computed in the input's own dtype: under bf16 autocast the residual stream stays float32, so nothing is lost.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` over its last axis; same shape and dtype."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config: ModelConfig, width: int | None = None) -> nn.Module:
    """The norm that ``config.norm`` names, over ``width`` features (default: the residual stream's)."""
    width = config.n_embd if width is None else width
    if config.norm == "layernorm":
        return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)
    return RMSNorm(width, eps=config.norm_eps)
