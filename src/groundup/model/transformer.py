"""The whole model on one screen: a decoder-only Transformer."""

# B batch   T positions   E embedding   V vocabulary

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.model.attention import Step, make_attention
from groundup.model.backends import Backend
from groundup.model.cache import Cache, Ragged
from groundup.model.checkpointing import checkpointed
from groundup.model.config import ModelConfig
from groundup.model.experts import MixtureOfExperts, Router, Routing
from groundup.model.feed_forward import make_feed_forward
from groundup.model.heads import FurtherToken
from groundup.model.initialisation import initialise
from groundup.model.masks import View, positions_in_documents
from groundup.model.norms import make_norm, softcap
from groundup.model.positions import Rotary, Rotation, make_rotary, sinusoidal


class Block(nn.Module):
    """Attention, then feed-forward (or both side by side), each with its norms, added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        before = config.norm_placement in ("pre", "sandwich")
        after = config.norm_placement in ("output", "sandwich")
        self.post, self.parallel = config.norm_placement == "post", config.parallel_blocks
        self.attention_norm = make_norm(config) if before or self.post else None
        self.attention = make_attention(config, layer)
        self.attention_out_norm = make_norm(config) if after else None
        self.feed_forward_norm = make_norm(config) if before or self.post else None
        self.feed_forward = make_feed_forward(config, layer)
        self.feed_forward_out_norm = make_norm(config) if after else None
        self.dropout = config.dropout

    def forward(self, x_BTE: Tensor, step: Step) -> Tensor:
        """Shape B T E in and out."""
        if self.parallel:
            return x_BTE + self._attended(x_BTE, step) + self._computed(x_BTE)
        if self.post:  # the norm is of the sum
            assert self.attention_norm is not None
            assert self.feed_forward_norm is not None
            x_BTE = self.attention_norm(x_BTE + self._attended(x_BTE, step))
            return self.feed_forward_norm(x_BTE + self._computed(x_BTE))
        x_BTE = x_BTE + self._attended(x_BTE, step)
        return x_BTE + self._computed(x_BTE)

    def _attended(self, x_BTE: Tensor, step: Step) -> Tensor:
        y_BTE = x_BTE if self.attention_norm is None or self.post else self.attention_norm(x_BTE)
        y_BTE = self.attention(y_BTE, step)
        y_BTE = y_BTE if self.attention_out_norm is None else self.attention_out_norm(y_BTE)
        return F.dropout(y_BTE, self.dropout, self.training)

    def _computed(self, x_BTE: Tensor) -> Tensor:
        y_BTE = x_BTE if self.feed_forward_norm is None or self.post else self.feed_forward_norm(x_BTE)
        y_BTE = self.feed_forward(y_BTE)
        y_BTE = y_BTE if self.feed_forward_out_norm is None else self.feed_forward_out_norm(y_BTE)
        return F.dropout(y_BTE, self.dropout, self.training)


class Transformer(nn.Module):
    """Token ids in, logits of the next token out. The same module trains, scores and decodes (with a cache).

    Attributes:
        backend: how attention is computed; see backends.py.
        checkpointing: what the backward pass computes again instead of keeping it: nothing, whole blocks, or all of a
            block but its matrix products (``selective``).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backend: Backend = "sdpa"
        self.checkpointing: Literal["none", "block", "selective"] = "none"
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.context_length, config.n_embd) if config.positions == "learned" else None
        self.rotary, self.local_rotary = make_rotary(config), make_rotary(config, local=True)
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.norm = make_norm(config) if config.norm_placement != "post" else nn.Identity()
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        further = [FurtherToken(config, Block(config, config.n_layer - 1)) for _ in range(config.n_predict)]
        self.further = nn.ModuleList(further)
        initialise(self, config)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    @property
    def device(self) -> torch.device:
        """Where it is: its embedding, where it lies in several places."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What its embedding is in. Quantized layers and adapters may be in others."""
        return next(self.parameters()).dtype

    def features(
        self, ids_BT: Tensor, cache: Cache | Ragged | None = None, *, documents_BT: Tensor | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """The normed residual stream above the last block, B T E: what the head turns into logits.

        Args:
            ids_BT, cache, documents_BT: as for :meth:`forward`. With a ragged batch, its row of tokens, 1 M.
            weights: collects the attention weights of each layer, B H T S (computed explicitly).
        """
        return self.norm(self.stream(ids_BT, cache, documents_BT=documents_BT, weights=weights)[0])

    def stream(
        self, ids_BT: Tensor, cache: Cache | Ragged | None = None, *, documents_BT: Tensor | None = None,
        weights: list[Tensor] | None = None,
    ) -> tuple[Tensor, Step]:  # fmt: skip
        """The residual stream above the last block before its norm, B T E, and what the blocks were told."""
        if isinstance(cache, Ragged):
            positions_BT, step = self._ragged_step(cache)
        else:
            positions_BT, step = self._step(ids_BT, cache, documents_BT, weights)
        x_BTE = self.embed(ids_BT, positions_BT)
        for block in self.blocks:
            x_BTE = checkpointed(block, x_BTE, step, self.checkpointing if self.training else "none")
        if isinstance(cache, Ragged):
            for part in cache.parts:
                part.cache.advance(part.queries)
        elif cache is not None:
            cache.advance(ids_BT.shape[1])
        return x_BTE, step

    def embed(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Token ids, with their positions where those are added to the stream, as B T E."""
        x_BTE = self.embedding(ids_BT)
        if self.config.embedding_scale is not None:
            # Rounded to the weights' dtype first, as Gemma does: in bf16 the square root of the width is not exact.
            x_BTE = x_BTE * torch.tensor(self.config.embedding_scale, dtype=x_BTE.dtype)
        if self.positions is not None:
            x_BTE = x_BTE + self.positions(positions_BT)
        elif self.config.positions == "sinusoidal":
            x_BTE = x_BTE + sinusoidal(positions_BT, self.config.n_embd).to(x_BTE.dtype)
        return F.dropout(x_BTE, self.config.dropout, self.training)

    def _step(
        self, ids_BT: Tensor, cache: Cache | None, documents_BT: Tensor | None, weights: list[Tensor] | None
    ) -> tuple[Tensor, Step]:
        """The position of each token, B or 1 by T, and what the blocks are told."""
        T, device = ids_BT.shape[1], ids_BT.device
        past = 0 if cache is None else cache.length
        if past + T > self.config.context_length:
            raise ValueError(f"{past + T} positions, the model's context_length is {self.config.context_length}")
        if cache is not None and documents_BT is not None:
            raise ValueError("packed documents are read without a cache")
        pad_B = None if cache is None else cache.pad_B
        positions_BT = torch.arange(past, past + T, device=device)[None]
        if pad_B is not None:
            positions_BT = (positions_BT - pad_B[:, None]).clamp_min(0)
        elif documents_BT is not None:
            positions_BT = positions_in_documents(documents_BT)
        rotation = None if self.rotary is None else self.rotary(positions_BT, past + T)
        local = None if self.local_rotary is None else rotation
        if self.local_rotary is not None and self.config.rope_local_theta is not None:
            local = self.local_rotary(positions_BT, past + T)
        view = View(T, past, 0, None, pad_B, documents_BT, device)
        return positions_BT, Step(view, rotation, local, cache, self.backend, weights)

    def _ragged_step(self, batch: Ragged) -> tuple[Tensor, Step]:
        """The same for a row of tokens of many sequences; what each part may see is told part by part."""
        positions_1M, parts = batch.positions_1M, batch.parts

        def rotation(rotary: Rotary | None) -> Rotation | None:
            if rotary is None:
                return None
            if not rotary.grows:
                return rotary(positions_1M, self.config.context_length)
            found = [rotary(positions_1M[:, part.begin : part.end], part.longest) for part in parts]
            return torch.cat([cos for cos, _ in found], dim=1), torch.cat([sin for _, sin in found], dim=1)

        turned = rotation(self.rotary)
        own = self.config.rope_local_theta is not None
        local = None if self.local_rotary is None else rotation(self.local_rotary) if own else turned
        nothing = View(0, 0, 0, None, None, None, positions_1M.device)
        return positions_1M, Step(nothing, turned, local, None, self.backend, parts=parts)

    def forward(
        self, ids_BT: Tensor, cache: Cache | None = None, *, documents_BT: Tensor | None = None, last_only: bool = False
    ) -> Tensor:
        """Logits of the token after each position.

        Args:
            ids_BT: token ids, int64. With a cache, the ids that follow what it holds.
            cache: keys and values of earlier positions; the new ones are appended.
            documents_BT: the number of the document that each token belongs to, for sequences packed of several: none
                sees another, and positions count from 0 in each. None where a sequence is one document.
            last_only: compute the logits of the last position alone (T = 1 in the result): all that decoding needs.

        Returns:
            Logits, B T V.

        Raises:
            ValueError: more positions than ``context_length``.
        """
        features_BTE = self.features(ids_BT, cache, documents_BT=documents_BT)
        return self.logits(features_BTE[:, -1:] if last_only else features_BTE)

    def logits(self, features_BTE: Tensor) -> Tensor:
        """What the head makes of features, B T V."""
        return softcap(self.head(features_BTE), self.config.logit_softcap)

    def routings(self) -> list[Routing]:
        """Where the tokens of the last forward pass went in each layer of experts, the first layer first."""
        layers = [module for module in self.modules() if isinstance(module, MixtureOfExperts)]
        return [layer.routing for layer in layers if layer.routing is not None]

    def after_step(self) -> None:
        """What a model adjusts by itself after an optimizer step: the bias by which experts are chosen."""
        for module in self.modules():
            if isinstance(module, Router):
                module.rebalance()

    def parameter_count(self) -> int:
        """Number of parameters, a tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())
