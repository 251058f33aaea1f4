"""Initial weights, as named functions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from groundup.model.config import ModelConfig


def initialise(model: nn.Module, config: ModelConfig) -> None:
    """Fill in the initial weights by the scheme that ``config.initialisation`` names."""
    {"depth_scaled": depth_scaled_normal, "normal": normal, "mup": mup}[config.initialisation](model, config)


def depth_scaled_normal(model: nn.Module, config: ModelConfig) -> None:
    """GPT-2's scheme (Radford et al. 2019, section 2.3): N(0, init_std), biases 0, norms 1.

    The layers that write into the residual stream (attention's ``out``, feed-forward's ``down``) are scaled by
    1/sqrt(2 n_layer), so that the stream's variance at the top does not grow with depth.
    """
    residual_std = config.init_std / math.sqrt(2 * config.n_layer)
    _fill(model, lambda name, weight: residual_std if _writes_residual(name) else config.init_std)


def normal(model: nn.Module, config: ModelConfig) -> None:
    """N(0, init_std) everywhere, as Llama's published code does it; biases 0, norms 1."""
    _fill(model, lambda name, weight: config.init_std)


def mup(model: nn.Module, config: ModelConfig) -> None:
    """The initial weights of µP (Yang et al. 2022, table 8): hidden matrices N(0, 1/inputs), an untied head 0.

    So that activations keep their size when the model is made wider. That is one half of it: for learning rates to
    carry over, those of the hidden matrices shrink with width (the optimizer's part), and ``attention_scale`` is set in
    proportion to 1 / head_dim.
    """

    def std(name: str, weight: Tensor) -> float:
        if name.rsplit(".", 2)[-2] in ("embedding", "positions"):
            return config.init_std
        if name == "head.weight":
            return 0.0
        return 1.0 / math.sqrt(weight.shape[-1])

    _fill(model, std)


@torch.no_grad()
def _fill(model: nn.Module, std_of: Callable[[str, Tensor], float]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=std_of(name, parameter))
        elif name.endswith("bias") or name.endswith("sinks_H"):
            nn.init.zeros_(parameter)


def _writes_residual(name: str) -> bool:
    return name.endswith((".out.weight", ".down.weight"))
