"""A plain GPT: learned positions, layer norms before each sub-layer, GELU, tied embeddings, PyTorch's fused attention.

From Radford et al. 2019 (the model, and the scaling of what is added to the stream) and Press & Wolf 2017 (one table at
both ends). It has the interface of nanoGPT: ids and targets in, logits and loss out.
"""

# B batch   T positions   H heads   D head dimension   E embedding   V vocabulary

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the model.

    Args:
        vocab_size: V.
        block_size: the longest T.
        n_layer: blocks.
        n_head: H.
        n_embd: E.
        bias: of linear layers and norms.
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    bias: bool = True


class LayerNorm(nn.Module):
    """A layer norm whose bias may be left out."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x_BTE: Tensor) -> Tensor:
        """The same shape, normalised over E."""
        return F.layer_norm(x_BTE, self.weight.shape, self.weight, self.bias, 1e-5)


class Block(nn.Module):
    """Attention, then a feed-forward four times as wide; each reads the normed stream and is added to it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        E, bias = config.n_embd, config.bias
        self.n_head = config.n_head
        self.norm_1, self.norm_2 = LayerNorm(E, bias), LayerNorm(E, bias)
        self.qkv, self.mix = nn.Linear(E, 3 * E, bias=bias), nn.Linear(E, E, bias=bias)
        self.widen, self.narrow = nn.Linear(E, 4 * E, bias=bias), nn.Linear(4 * E, E, bias=bias)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """The stream after the block."""
        x_BTE = x_BTE + self.attend(self.norm_1(x_BTE))
        return x_BTE + self.narrow(F.gelu(self.widen(self.norm_2(x_BTE))))

    def attend(self, x_BTE: Tensor) -> Tensor:
        """Causal self-attention of all heads at once."""
        B, T, E = x_BTE.shape
        shape = (B, T, self.n_head, E // self.n_head)
        heads = (part.view(shape).transpose(1, 2) for part in self.qkv(x_BTE).chunk(3, -1))
        mixed_BHTD = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.mix(mixed_BHTD.transpose(1, 2).reshape(B, T, E))


class GPT(nn.Module):
    """The whole model."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = LayerNorm(config.n_embd, config.bias)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self._initialise)
        for block in self.blocks:
            for linear in (block.mix, block.narrow):  # each adds to the stream: 2 x n_layer of them keep its size
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * config.n_layer))
        self.head.weight = self.tokens.weight

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits B T V, and the mean cross-entropy in nats per token where there are targets."""
        positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        x_BTE = self.tokens(ids_BT) + self.positions(positions_T)
        for block in self.blocks:
            x_BTE = block(x_BTE)
        logits_BTV = self.head(self.norm(x_BTE))
        if targets_BT is None:
            return logits_BTV, None
        return logits_BTV, F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
