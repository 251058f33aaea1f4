"""The feed-forward layer: what a block computes at each position alone."""

# B batch   T positions   E embedding   F hidden width

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from groundup.model.config import ModelConfig


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020, section 2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.ff_dim, bias=config.bias)
        self.up = nn.Linear(config.n_embd, config.ff_dim, bias=config.bias)
        self.down = nn.Linear(config.ff_dim, config.n_embd, bias=config.bias)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """Shape B T E in and out."""
        return self.down(F.silu(self.gate(x_BTE)) * self.up(x_BTE))


class MLP(nn.Module):
    """``down(activation(up(x)))`` with GELU (tanh form, as GPT-2) or the squared ReLU of Primer (So et al. 2021)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.feed_forward
        self.up = nn.Linear(config.n_embd, config.ff_dim, bias=config.bias)
        self.down = nn.Linear(config.ff_dim, config.n_embd, bias=config.bias)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """Shape B T E in and out."""
        hidden_BTF = self.up(x_BTE)
        if self.activation == "relu2":
            return self.down(F.relu(hidden_BTF).square())
        return self.down(F.gelu(hidden_BTF, approximate="tanh"))


def make_feed_forward(config: ModelConfig) -> nn.Module:
    """The feed-forward layer that ``config.feed_forward`` names."""
    return SwiGLU(config) if config.feed_forward == "swiglu" else MLP(config)
