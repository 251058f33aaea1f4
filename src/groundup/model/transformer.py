"""The whole model on one screen: a decoder-only Transformer."""

# B batch   T positions   E embedding   V vocabulary

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.model.attention import Attention, Backend, visible_keys
from groundup.model.cache import KVCache
from groundup.model.config import ModelConfig
from groundup.model.feed_forward import make_feed_forward
from groundup.model.initialisation import depth_scaled_normal
from groundup.model.norms import make_norm
from groundup.model.positions import RotaryTable


class Block(nn.Module):
    """Attention, then feed-forward, each behind its norm and added to the residual stream (pre-norm, Xiong et al.
    2020).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = make_feed_forward(config)
        self.dropout = config.dropout

    def forward(
        self,
        x_BTE: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: KVCache | None,
        backend: Backend,
    ) -> Tensor:
        """Shape B T E in and out."""
        mixed = self.attention(self.attention_norm(x_BTE), rotary, mask, cache, backend)
        x_BTE = x_BTE + F.dropout(mixed, self.dropout, self.training)
        computed = self.feed_forward(self.feed_forward_norm(x_BTE))
        return x_BTE + F.dropout(computed, self.dropout, self.training)


class Transformer(nn.Module):
    """Token ids in, logits of the next token out. The same module trains, scores and decodes (with a cache)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backend: Backend = "sdpa"
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.context_length, config.n_embd) if config.positions == "learned" else None
        rotary = config.positions == "rope"
        self.rotary = RotaryTable(config.head_dim, config.context_length, config.rope_theta) if rotary else None
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.norm = make_norm(config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        depth_scaled_normal(self, config)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def features(self, ids_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """The normed residual stream above the last block, B T E: what the head turns into logits."""
        _, T = ids_BT.shape
        past = 0 if cache is None else cache.length
        positions_BT, mask = None, None
        if cache is not None:
            positions_BT = torch.arange(past, past + T, device=ids_BT.device)[None]
            if cache.pad_B is not None:
                positions_BT = (positions_BT - cache.pad_B[:, None]).clamp_min(0)
            if past or cache.pad_B is not None:
                mask = visible_keys(T, past + T, cache.pad_B, ids_BT.device)
        x_BTE = self.embedding(ids_BT)
        if self.positions is not None:
            positions_T = torch.arange(T, device=ids_BT.device)
            x_BTE = x_BTE + self.positions(positions_T if positions_BT is None else positions_BT)
        x_BTE = F.dropout(x_BTE, self.config.dropout, self.training)
        rotary = None if self.rotary is None else self.rotary(positions_BT, T)
        for block in self.blocks:
            x_BTE = block(x_BTE, rotary, mask, cache, self.backend)
        if cache is not None:
            cache.advance(T)
        return self.norm(x_BTE)

    def forward(self, ids_BT: Tensor, cache: KVCache | None = None, *, last_only: bool = False) -> Tensor:
        """Logits of the token after each position.

        Args:
            ids_BT: token ids, int64. With a cache, the ids that follow what it holds.
            cache: keys and values of earlier positions; the new ones are appended.
            last_only: compute the logits of the last position alone (T = 1 in the result): all that decoding needs.

        Returns:
            Logits, B T V.

        Raises:
            ValueError: more positions than ``context_length``.
        """
        past = 0 if cache is None else cache.length
        if past + ids_BT.shape[1] > self.config.context_length:
            raise ValueError(
                f"{past + ids_BT.shape[1]} positions, the model's context_length is {self.config.context_length}"
            )
        features_BTE = self.features(ids_BT, cache)
        return self.head(features_BTE[:, -1:] if last_only else features_BTE)

    def parameter_count(self) -> int:
        """Number of parameters, a tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())
