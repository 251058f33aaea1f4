"""Initial weights, as named functions."""

from __future__ import annotations

import math

import torch
from torch import nn

from groundup.model.config import ModelConfig


@torch.no_grad()
def depth_scaled_normal(model: nn.Module, config: ModelConfig) -> None:
    """GPT-2's scheme (Radford et al. 2019, section 2.3): N(0, init_std), biases 0, norms 1.

    The layers that write into the residual stream (attention's ``out``, feed-forward's ``down``) are scaled by
    1/sqrt(2 n_layer), so that the stream's variance at the top does not grow with depth.
    """
    residual_std = config.init_std / math.sqrt(2 * config.n_layer)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            writes_residual = name.endswith((".out", ".down"))
            nn.init.normal_(module.weight, std=residual_std if writes_residual else config.init_std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=config.init_std)
