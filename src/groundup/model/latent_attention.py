"""Multi-head latent attention: all keys and values of a position are made of one small vector, which alone is kept.

          x ──► kv_down ──► latent (R) ──► kv_norm ──► kv_up ──► k without position (H N), v (H V)
            └──────────────► rotary key (P), one for all heads
          x ──► q_down ──► q_norm ──► q_up ──► q without position (H N), rotary q (H P)

DeepSeek-V2 (2024), section 2.1. Decoding reads the latents of all earlier positions, and need not make keys and values
of them: the matrices that would are multiplied into the query and the result instead ("absorbed").
"""

# B batch   T query positions   S key positions   H heads   R latent width   P rotary width   N width without positions
# V value width   E embedding

from __future__ import annotations

import torch
from torch import Tensor, nn

from groundup.model.attention import Step, in_parts, rotation_of
from groundup.model.backends import Scores, attend
from groundup.model.config import ModelConfig
from groundup.model.masks import View
from groundup.model.norms import make_norm
from groundup.model.positions import alibi_slopes, rotate


class LatentAttention(nn.Module):
    """Attention over latents (DeepSeek-V2, eq. 9 to 19)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.slopes_H: Tensor | None
        self.layer, self.kind, self.window = layer, config.layer_kinds[layer], config.window(layer)
        self.scale, self.softcap, self.dropout = config.score_scale, config.attention_softcap, config.dropout
        latent, H = config.latent, config.n_head
        self.n_head, self.kv_rank = H, latent.kv_rank
        self.nope_dim, self.rope_dim, self.v_dim = latent.nope_dim, latent.rope_dim, latent.v_dim
        q_width, bias = H * config.head_width, bool(config.qkv_bias)
        if latent.q_rank:
            self.q_down = nn.Linear(config.n_embd, latent.q_rank, bias=bias)
            self.q_norm = make_norm(config, latent.q_rank)
        self.q_up = nn.Linear(latent.q_rank or config.n_embd, q_width, bias=False)
        self.kv_down = nn.Linear(config.n_embd, latent.kv_rank + latent.rope_dim, bias=bias)
        self.kv_norm = make_norm(config, latent.kv_rank)
        self.kv_up = nn.Linear(latent.kv_rank, H * (latent.nope_dim + latent.v_dim), bias=False)
        self.out = nn.Linear(H * latent.v_dim, config.n_embd, bias=bool(config.out_bias))
        self.compressed_q = latent.q_rank > 0
        slopes_H = alibi_slopes(H) if config.positions == "alibi" else None
        self.register_buffer("slopes_H", slopes_H, persistent=False)

    def forward(self, x_BTE: Tensor, step: Step) -> Tensor:
        """Attend from each position of ``x_BTE`` to the cached positions and those before it; shape B T E."""
        q = self.q_up(self.q_norm(self.q_down(x_BTE)) if self.compressed_q else x_BTE)
        q_BTHN, q_BTHP = q.unflatten(-1, (self.n_head, -1)).split([self.nope_dim, self.rope_dim], dim=-1)
        latent_BTR, k_BTP = self.kv_down(x_BTE).split([self.kv_rank, self.rope_dim], dim=-1)
        latent_BS1R, k_BS1P = self.kv_norm(latent_BTR)[:, :, None], k_BTP[:, :, None]
        if (rotation := rotation_of(self.kind, step)) is not None:
            q_BTHP, k_BS1P = rotate(q_BTHP, *rotation), rotate(k_BS1P, *rotation)
        return self.out(in_parts(self._mixed, step, q_BTHN, q_BTHP, latent_BS1R, k_BS1P).flatten(2))

    def _mixed(self, step: Step, q_BTHN: Tensor, q_BTHP: Tensor, latent_BS1R: Tensor, k_BS1P: Tensor) -> Tensor:
        """The values that queries find, among the new latents and those of the cache; B T H V."""
        first, dtype = 0, q_BTHN.dtype
        if step.cache is not None:
            latent_BS1R, k_BS1P, first = step.cache.append(self.layer, latent_BS1R, k_BS1P)
            latent_BS1R, k_BS1P = latent_BS1R.to(dtype), k_BS1P.to(dtype)
        view = step.view.at(self.window, first)
        scores = Scores(self.scale, self.softcap, self.slopes_H, None, self.dropout if self.training else 0.0)
        if step.cache is not None and self._absorbing_pays(q_BTHN.shape[1]):
            return self._absorbed(q_BTHN, q_BTHP, latent_BS1R, k_BS1P, view, scores, step)
        kv_BSHX = self.kv_up(latent_BS1R[:, :, 0]).unflatten(-1, (self.n_head, -1))
        k_BSHN, v_BSHV = kv_BSHX.split([self.nope_dim, self.v_dim], dim=-1)
        k_BSHD = torch.cat([k_BSHN, k_BS1P.expand(-1, -1, self.n_head, -1)], dim=-1)
        q_BTHD = torch.cat([q_BTHN, q_BTHP], dim=-1)
        return attend(q_BTHD, k_BSHD, v_BSHV, view, scores, backend=step.backend, weights=step.weights)

    def _absorbing_pays(self, queries: int) -> bool:
        """Whether longer products for each pair of query and key are less work than making keys and values."""
        made, longer = self.nope_dim + self.v_dim, 2 * self.kv_rank - self.nope_dim - self.v_dim
        return queries * longer < self.kv_rank * made

    def _absorbed(
        self,
        q_BTHN: Tensor,
        q_BTHP: Tensor,
        latent_BS1R: Tensor,
        k_BS1P: Tensor,
        view: View,
        scores: Scores,
        step: Step,
    ) -> Tensor:
        """The same with the latents as keys and values, shared by all heads: q^T (W_k c) = (W_k^T q)^T c."""
        up_HXR = self.kv_up.weight.unflatten(0, (self.n_head, -1))
        k_up_HNR, v_up_HVR = up_HXR.split([self.nope_dim, self.v_dim], dim=1)
        q_BTHR = torch.einsum("bthn,hnr->bthr", q_BTHN, k_up_HNR.to(q_BTHN.dtype))
        q_BTHD = torch.cat([q_BTHR, q_BTHP], dim=-1)
        k_BS1D = torch.cat([latent_BS1R, k_BS1P], dim=-1)
        mixed_BTHR = attend(q_BTHD, k_BS1D, latent_BS1R, view, scores, backend=step.backend, weights=step.weights)
        return torch.einsum("bthr,hvr->bthv", mixed_BTHR, v_up_HVR.to(mixed_BTHR.dtype))
