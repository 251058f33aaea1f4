"""Attention: how a position looks at the ones before it.

multi-head (n_kv_head = n_head)      grouped-query (n_kv_head = 2)         multi-query (n_kv_head = 1)
  q  q  q  q                           q  q  q  q                            q  q  q  q
  |  |  |  |                            \\/    \\/                              \\ \\/ /
  kv kv kv kv                           kv    kv                                kv

Latent attention, which makes all keys and values of one small vector, is in latent_attention.py; what is computed of
queries, keys and values, in backends.py.
"""

# B batch   T query positions   S key positions   H query heads   G key/value heads   D head dimension   E embedding

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from groundup.model.backends import Backend, Scores, attend
from groundup.model.cache import Cache, Part
from groundup.model.config import ModelConfig
from groundup.model.masks import View
from groundup.model.norms import make_norm
from groundup.model.positions import Rotation, alibi_slopes, rotate


@dataclass
class Step:
    """What the blocks of one forward pass are told, besides the stream.

    Args:
        view: what every position may see, windows aside.
        rotation: cosines and sines of the rotary positions; None where there are none.
        local_rotation: those of the layers with a sliding window.
        cache: keys and values of earlier positions.
        backend: how attention is computed.
        weights: collects the attention weights of each layer, B H T S; None to not look at them.
        parts: of a ragged batch, whose row of tokens has a view and a cache for each part only.
    """

    view: View
    rotation: Rotation | None
    local_rotation: Rotation | None
    cache: Cache | None
    backend: Backend
    weights: list[Tensor] | None = None
    parts: tuple[Part, ...] = ()


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention, by the config's head counts."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.slopes_H: Tensor | None
        self.layer, self.kind, self.window = layer, config.layer_kinds[layer], config.window(layer)
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.kv_heads, config.head_width
        self.scale, self.softcap, self.dropout = config.score_scale, config.attention_softcap, config.dropout
        q_width, kv_width = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        self.q = nn.Linear(config.n_embd, q_width, bias=bool(config.qkv_bias))
        self.k = nn.Linear(config.n_embd, kv_width, bias=bool(config.qkv_bias))
        self.v = nn.Linear(config.n_embd, kv_width, bias=bool(config.qkv_bias))
        self.out = nn.Linear(q_width, config.n_embd, bias=bool(config.out_bias))
        self.norm_whole = config.qk_norm_whole
        widths = (q_width, kv_width) if self.norm_whole else (self.head_dim, self.head_dim)
        self.q_norm, self.k_norm = (make_norm(config, width) if config.qk_norm else None for width in widths)
        self.sinks_H = nn.Parameter(torch.zeros(self.n_head)) if config.attention_sinks else None
        slopes_H = alibi_slopes(self.n_head) if config.positions == "alibi" else None
        self.register_buffer("slopes_H", slopes_H, persistent=False)

    def forward(self, x_BTE: Tensor, step: Step) -> Tensor:
        """Attend from each position of ``x_BTE`` to the cached positions and those before it; shape B T E."""
        q, k, v_BTGD = self.q(x_BTE), self.k(x_BTE), self.v(x_BTE).unflatten(-1, (self.n_kv_head, -1))
        if self.q_norm is not None and self.k_norm is not None and self.norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q_BTHD, k_BTGD = q.unflatten(-1, (self.n_head, -1)), k.unflatten(-1, (self.n_kv_head, -1))
        if self.q_norm is not None and self.k_norm is not None and not self.norm_whole:
            q_BTHD, k_BTGD = self.q_norm(q_BTHD), self.k_norm(k_BTGD)
        if (rotation := rotation_of(self.kind, step)) is not None:
            q_BTHD, k_BTGD = rotate(q_BTHD, *rotation), rotate(k_BTGD, *rotation)
        return self.out(in_parts(self._mixed, step, q_BTHD, k_BTGD, v_BTGD).flatten(2))

    def _mixed(self, step: Step, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> Tensor:
        """The values that queries find, among the new keys and those of the cache; B T H D."""
        first = 0
        if step.cache is not None:
            k_BTGD, v_BTGD, first = step.cache.append(self.layer, k_BTGD, v_BTGD)
            k_BTGD, v_BTGD = k_BTGD.to(q_BTHD.dtype), v_BTGD.to(q_BTHD.dtype)
        scores = Scores(self.scale, self.softcap, self.slopes_H, self.sinks_H, self.dropout if self.training else 0.0)
        view = step.view.at(self.window, first)
        return attend(q_BTHD, k_BTGD, v_BTGD, view, scores, backend=step.backend, weights=step.weights)


def in_parts(mix: Callable[..., Tensor], step: Step, *tensors: Tensor) -> Tensor:
    """What ``mix`` makes of a step and tensors B T ...; of a ragged batch, 1 M ..., part by part."""
    if not step.parts:
        return mix(step, *tensors)
    found = []
    for part in step.parts:
        cache = part.cache
        view = View(part.queries, cache.length, 0, None, cache.pad_B, None, tensors[0].device)
        own = replace(step, view=view, cache=cache, parts=())
        found.append(mix(own, *(part.cut(tensor) for tensor in tensors)).flatten(0, 1))
    return torch.cat(found)[None]


def rotation_of(kind: str, step: Step) -> Rotation | None:
    """The rotary positions of a layer, by its letter in ``layer_pattern``."""
    if kind == "N":
        return None
    return step.local_rotation if kind == "S" else step.rotation


def make_attention(config: ModelConfig, layer: int) -> nn.Module:
    """The attention of a layer that the config asks for."""
    from groundup.model.latent_attention import LatentAttention

    return LatentAttention(config, layer) if config.latent.kv_rank else Attention(config, layer)
