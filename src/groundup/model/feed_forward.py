"""The feed-forward layer: what a block computes at each position alone."""

# B batch   T positions   E embedding   F hidden width

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.model.config import GATED, FeedForward, ModelConfig

SWISH_GAIN, GATE_LIMIT = 1.702, 7.0  # of gpt-oss: its gate is about a GELU, and what it multiplies is bounded


def activate(kind: FeedForward, up: Tensor) -> Tensor:
    """The activation of a feed-forward without a gate; same shape.

    GELU in the tanh form of GPT-2 or exactly (Hendrycks & Gimpel 2016), ReLU, or its square (So et al. 2021).
    """
    if kind == "relu2":
        return F.relu(up).square()
    if kind == "relu":
        return F.relu(up)
    return F.gelu(up, approximate="none" if kind == "gelu_exact" else "tanh")


def gate_with(kind: FeedForward, gate: Tensor, up: Tensor) -> Tensor:
    """What a gated feed-forward makes of its two halves; same shape.

    SwiGLU and GeGLU (Shazeer 2020, section 2, the latter with GELU's tanh form as Gemma), or SwiGLU with bounded inputs
    and one added to the half that is gated (gpt-oss).
    """
    if kind == "geglu":
        return F.gelu(gate, approximate="tanh") * up
    if kind == "clamped_swiglu":
        gate, up = gate.clamp(max=GATE_LIMIT), up.clamp(-GATE_LIMIT, GATE_LIMIT)
        return gate * torch.sigmoid(SWISH_GAIN * gate) * (up + 1)
    if not torch.is_grad_enabled():  # nothing else reads the gate: large temporaries cost as much as what fills them
        return F.silu(gate, inplace=True).mul_(up)
    return F.silu(gate) * up


class GatedMLP(nn.Module):
    """``down(f(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.kind, bias = config.feed_forward, bool(config.ff_bias)
        self.gate = nn.Linear(config.n_embd, width, bias=bias)
        self.up = nn.Linear(config.n_embd, width, bias=bias)
        self.down = nn.Linear(width, config.n_embd, bias=bias)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """Shape B T E in and out."""
        return self.down(gate_with(self.kind, self.gate(x_BTE), self.up(x_BTE)))


class MLP(nn.Module):
    """``down(f(up(x)))``."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.kind, bias = config.feed_forward, bool(config.ff_bias)
        self.up = nn.Linear(config.n_embd, width, bias=bias)
        self.down = nn.Linear(width, config.n_embd, bias=bias)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """Shape B T E in and out."""
        return self.down(activate(self.kind, self.up(x_BTE)))


def make_mlp(config: ModelConfig, width: int) -> nn.Module:
    """A dense feed-forward of the kind that ``config.feed_forward`` names, ``width`` wide inside."""
    return GatedMLP(config, width) if config.feed_forward in GATED else MLP(config, width)


def make_feed_forward(config: ModelConfig, layer: int) -> nn.Module:
    """The feed-forward of a layer: dense, or a mixture of experts."""
    from groundup.model.experts import MixtureOfExperts

    return MixtureOfExperts(config) if config.expert_layers[layer] else make_mlp(config, config.ff_dim)
