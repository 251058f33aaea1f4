"""Attention: how a position looks at the ones before it.

multi-head (n_kv_head = n_head)      grouped-query (n_kv_head = 2)         multi-query (n_kv_head = 1)
  q  q  q  q                           q  q  q  q                            q  q  q  q
  |  |  |  |                            \\/    \\/                              \\ \\/ /
  kv kv kv kv                           kv    kv                                kv
"""

# B batch   T query positions   S key positions   H query heads   G key/value heads   D head dimension   E embedding

from __future__ import annotations

import math
import time
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.model.cache import KVCache
from groundup.model.config import ModelConfig
from groundup.model.norms import RMSNorm
from groundup.model.positions import rotate

Backend = Literal["explicit", "sdpa"]
BACKENDS: tuple[Backend, ...] = ("explicit", "sdpa")
LARGEST_SCORES = 2**30  # bytes of attention scores in float32 above which writing them out is not even tried


def visible_keys(queries: int, keys: int, pad_B: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each query may see, True where it may: the causal triangle aligned at the last key, less the padding.

    Returns:
        bool, 1 1 T S without padding and B 1 T S with it. A padding query sees itself, so that its softmax is finite;
        nothing reads its result.
    """
    past = keys - queries
    query_T1 = torch.arange(past, keys, device=device)[:, None]
    key_S = torch.arange(keys, device=device)
    causal_TS = key_S <= query_T1
    if pad_B is None:
        return causal_TS[None, None]
    real_B1S = key_S >= pad_B[:, None, None]
    return (causal_TS & (real_B1S | (key_S == query_T1)))[:, None]


def explicit_attention(
    q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """Softmax(q k^T / sqrt(D)) v with the matrices written out (Vaswani et al. 2017, eq. 1).

    Args:
        q_BHTD, k_BHSD, v_BHSD: queries, keys and values, already with one key/value head per query head.
        mask: bool, True where a query may look, broadcastable to B H T S; None means causal with S = T.
        dropout: probability of dropping an attention weight.

    Returns:
        The mixed values, B H T D.
    """
    B, H, T, D = q_BHTD.shape
    S = k_BHSD.shape[-2]
    if mask is None:
        mask = visible_keys(T, S, None, q_BHTD.device)
    hidden = torch.zeros(mask.shape, dtype=q_BHTD.dtype, device=q_BHTD.device).masked_fill_(~mask, float("-inf"))
    # One pass computes hidden + q k^T / sqrt(D): scaling and masking cost as much again when done apart (on a CPU).
    scores = torch.baddbmm(
        hidden.expand(B, H, T, S).flatten(0, 1),
        q_BHTD.flatten(0, 1),
        k_BHSD.flatten(0, 1).transpose(-2, -1),
        alpha=1.0 / math.sqrt(D),
    )
    weights_BHTS = scores.view(B, H, T, S).softmax(dim=-1)
    if dropout:
        weights_BHTS = F.dropout(weights_BHTS, dropout)
    return weights_BHTS.to(v_BHSD.dtype) @ v_BHSD


def attend(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    mask: Tensor | None,
    *,
    backend: Backend,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention with shared key/value heads; each of the G serves H // G query heads.

    Args:
        q_BTHD: queries; k_BSGD, v_BSGD: keys and values, S >= T when a cache precedes the queries.
        mask: bool, True where a query may look, broadcastable to B H T S; None means causal with S = T.
        backend: ``explicit`` or ``sdpa``; equal to each other within rounding.
        dropout: probability of dropping an attention weight.

    Returns:
        The mixed values, B T H D.
    """
    q, k, v = q_BTHD.transpose(1, 2), k_BSGD.transpose(1, 2), v_BSGD.transpose(1, 2)
    shared = q.shape[1] // k.shape[1]
    if shared > 1:
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    if backend == "explicit":
        mixed_BHTD = explicit_attention(q, k, v, mask, dropout)
    else:
        mixed_BHTD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)
    return mixed_BHTD.transpose(1, 2)


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention, by the config's head counts."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.kv_heads, config.head_dim
        self.dropout = config.dropout
        self.q = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=config.bias)
        self.k = nn.Linear(config.n_embd, config.kv_heads * config.head_dim, bias=config.bias)
        self.v = nn.Linear(config.n_embd, config.kv_heads * config.head_dim, bias=config.bias)
        self.out = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        x_BTE: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: KVCache | None,
        backend: Backend,
    ) -> Tensor:
        """Attend from each position of ``x_BTE`` to the cached positions and those before it; shape B T E."""
        B, T, _ = x_BTE.shape
        q_BTHD = self.q(x_BTE).view(B, T, self.n_head, self.head_dim)
        k_BTGD = self.k(x_BTE).view(B, T, self.n_kv_head, self.head_dim)
        v_BTGD = self.v(x_BTE).view(B, T, self.n_kv_head, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHD, k_BTGD = self.q_norm(q_BTHD), self.k_norm(k_BTGD)
        if rotary is not None:
            q_BTHD, k_BTGD = rotate(q_BTHD, *rotary), rotate(k_BTGD, *rotary)
        if cache is not None:
            k_BTGD, v_BTGD = cache.append(self.layer, k_BTGD, v_BTGD)
            k_BTGD, v_BTGD = k_BTGD.to(q_BTHD.dtype), v_BTGD.to(q_BTHD.dtype)
        dropout = self.dropout if self.training else 0.0
        mixed_BTHD = attend(q_BTHD, k_BTGD, v_BTGD, mask, backend=backend, dropout=dropout)
        return self.out(mixed_BTHD.reshape(B, T, self.n_head * self.head_dim))


def fastest_backend(
    config: ModelConfig, batch_size: int, device: torch.device, dtype: torch.dtype, repeats: int = 3
) -> Backend:
    """The backend whose forward and backward pass takes the least time here, found by running each.

    A backend that fails on this device is left out.

    Raises:
        RuntimeError: none of them runs, which would be a broken installation.
    """
    T, H, G, D = config.context_length, config.n_head, config.kv_heads, config.head_dim
    seconds: dict[Backend, float] = {}
    for backend in BACKENDS:
        if backend == "explicit" and 4 * batch_size * H * T * T > LARGEST_SCORES:
            continue  # it would be slower than a backend that never holds them, and might not fit
        q = torch.randn(batch_size, T, H, D, device=device, dtype=dtype, requires_grad=True)
        k, v = (torch.randn(batch_size, T, G, D, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
        try:
            times = []
            for _ in range(repeats + 1):
                started = time.perf_counter()
                attend(q, k, v, None, backend=backend).sum().backward()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append(time.perf_counter() - started)
            seconds[backend] = min(times[1:])
        except RuntimeError:  # not for this dtype, not for this device, not enough memory
            continue
    if not seconds:
        raise RuntimeError(f"no attention backend runs on {device} in {dtype}")
    return min(seconds, key=lambda name: seconds[name])
