"""Three ways to compute attention, equal to each other within rounding: one to read, two to run.

``explicit`` writes out the matrices and the softmax, ``sdpa`` calls PyTorch's fused kernels, ``flex`` compiles one from
the mask's description (FlexAttention). :func:`attend` is the one call for all three.
"""

# B batch   T query positions   S key positions   H query heads   G key/value heads   D head dimension

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from groundup.model.config import ModelConfig
from groundup.model.masks import View
from groundup.model.norms import softcap

Backend = Literal["explicit", "sdpa", "flex"]
BACKENDS: tuple[Backend, ...] = ("explicit", "sdpa", "flex")
LARGEST_SCORES = 2**30  # bytes of attention scores in float32 above which writing them out is not even tried


@dataclass(frozen=True)
class Scores:
    """How scores are made of queries and keys, and what is done to them before the softmax.

    Args:
        scale: multiplies the products.
        softcap: bounds them smoothly; None for no bound.
        slopes_H: how much each head's scores fall per position of distance (ALiBi); None for none.
        sinks_H: a learnt logit per head that takes a share of the attention (Xiao et al. 2024); None for none.
        dropout: probability of dropping an attention weight.
    """

    scale: float
    softcap: float | None = None
    slopes_H: Tensor | None = None
    sinks_H: Tensor | None = None
    dropout: float = 0.0

    def bias(self, view: View) -> Tensor | None:
        """What ALiBi adds to the scores, 1 H T S; float32."""
        if self.slopes_H is None:
            return None
        query_T1 = torch.arange(view.past, view.past + view.queries, device=view.device)[:, None]
        key_1S = torch.arange(view.first, view.past + view.queries, device=view.device)[None]
        return (-self.slopes_H.float()[:, None, None] * (query_T1 - key_1S))[None]


def attend(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, view: View, scores: Scores, *, backend: Backend,
    weights: list[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Scaled dot-product attention with shared key/value heads; each of the G serves H // G query heads.

    Args:
        q_BTHD: queries; k_BSGD, v_BSGD: keys and values, S >= T when a cache precedes the queries. Values may be of
            another width than keys.
        view: what each query may see.
        scores: how scores are made.
        backend: which way; a soft cap, which PyTorch's fused kernels lack, goes the explicit way instead of sdpa.
        weights: a list that the attention weights B H T S are appended to (computed explicitly, whatever the backend).

    Returns:
        The mixed values, B T H D.
    """
    q, k, v = q_BTHD.transpose(1, 2), k_BSGD.transpose(1, 2), v_BSGD.transpose(1, 2)
    if weights is not None:
        mixed_BHTD, weights_BHTS = explicit_attention(q, *_shared(q, k, v), view, scores)
        weights.append(weights_BHTS)
        return mixed_BHTD.transpose(1, 2)
    if backend == "flex":
        return _flex(q, k, v, view, scores).transpose(1, 2)
    if scores.softcap is not None:
        backend = "explicit"
    if view.narrow and view.past == 0 and view.window is not None and scores.slopes_H is None:
        return _in_blocks(q_BTHD, k_BSGD, v_BSGD, view, scores, backend)
    if view.queries == 1 and scores.slopes_H is None:
        return _one_query(q, k, v, view, scores, backend).transpose(1, 2)
    k, v = _shared(q, k, v)
    if backend == "explicit":
        return explicit_attention(q, k, v, view, scores)[0].transpose(1, 2)
    return _sdpa(q, k, v, view.mask() if view.dense else None, scores, scores.bias(view)).transpose(1, 2)


def _shared(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with one head for each query head."""
    shared = q_BHTD.shape[1] // k_BGSD.shape[1]
    if shared == 1:
        return k_BGSD, v_BGSD
    return k_BGSD.repeat_interleave(shared, dim=1), v_BGSD.repeat_interleave(shared, dim=1)


# ---- explicit: what attention is


def explicit_attention(
    q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, view: View, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Softmax(q k^T scale) v with the matrices written out (Vaswani et al. 2017, eq. 1).

    Args:
        q_BHTD, k_BHSD, v_BHSD: queries, keys and values, with one key/value head per query head.

    Returns:
        The mixed values, B H T D, and the weights they were mixed with, B H T S.
    """
    return _explicit(q_BHTD, k_BHSD, v_BHSD, view.mask(), scores, scores.bias(view))


def _explicit(
    q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor, scores: Scores, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, H, T, _ = q_BHTD.shape
    S = k_BHSD.shape[-2]
    hidden = torch.zeros(mask.shape, dtype=q_BHTD.dtype, device=q_BHTD.device).masked_fill_(~mask, float("-inf"))
    if bias is not None:
        hidden = hidden + bias.to(hidden.dtype)
    q_NTD, k_NDS = q_BHTD.flatten(0, 1), k_BHSD.flatten(0, 1).transpose(-2, -1)
    if scores.softcap is None:
        # One pass computes hidden + q k^T scale: scaling and masking cost as much again when done apart (on a CPU).
        scores_NTS = torch.baddbmm(hidden.expand(B, H, T, S).flatten(0, 1), q_NTD, k_NDS, alpha=scores.scale)
        scores_BHTS = scores_NTS.view(B, H, T, S)
    else:
        scores_BHTS = softcap(torch.bmm(q_NTD, k_NDS).view(B, H, T, S) * scores.scale, scores.softcap) + hidden
    if scores.sinks_H is not None:
        # A sink for each head; where a single query's heads stand in rows (_one_query), for each row.
        sinks = scores.sinks_H.to(scores_BHTS.dtype).view(1, H, -1, 1).expand(B, H, T, 1)
        weights_BHTS = torch.cat([scores_BHTS, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights_BHTS = scores_BHTS.softmax(dim=-1)
    if scores.dropout:
        weights_BHTS = F.dropout(weights_BHTS, scores.dropout)
    return weights_BHTS.to(v_BHSD.dtype) @ v_BHSD, weights_BHTS


# ---- sdpa: PyTorch's fused kernels


def _sdpa(
    q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, scores: Scores, bias: Tensor | None
) -> Tensor:
    """No mask means causal, T = S, or a single query that sees everything."""
    if scores.sinks_H is not None:
        return _sdpa_with_sinks(q_BHTD, k_BHSD, v_BHSD, mask, scores, bias)
    causal = mask is None and q_BHTD.shape[-2] > 1
    if bias is not None:
        T, S = q_BHTD.shape[-2], k_BHSD.shape[-2]
        seen = torch.ones(T, S, dtype=torch.bool, device=bias.device).tril_(S - T) if mask is None else mask
        mask, causal = bias.to(q_BHTD.dtype).masked_fill(~seen, float("-inf")), False
    width, other = v_BHSD.shape[-1], q_BHTD.shape[-1]
    if width != other and q_BHTD.device.type == "cpu":
        # PyTorch's fused kernel for CPUs wants one width, else it writes out all scores: zeros make it so.
        if width < other:
            v_BHSD = F.pad(v_BHSD, (0, other - width))
        else:
            q_BHTD, k_BHSD = F.pad(q_BHTD, (0, width - other)), F.pad(k_BHSD, (0, width - other))
    mixed_BHTD = F.scaled_dot_product_attention(
        q_BHTD, k_BHSD, v_BHSD, attn_mask=mask, is_causal=causal, dropout_p=scores.dropout, scale=scores.scale
    )
    return mixed_BHTD[..., :width]


def _sdpa_with_sinks(
    q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, mask: Tensor | None, scores: Scores, bias: Tensor | None
) -> Tensor:
    """A sink is a key before all others, whose value is 0 and whose score is the same for every query.

    One more dimension makes it so: there queries hold sink / scale, the sink's key 1 and all other keys 0. A query that
    sees the sink alone goes before the others, so that causal masks need not be written out.
    """
    assert scores.sinks_H is not None
    B, H, T, _ = q_BHTD.shape
    level = (scores.sinks_H / scores.scale).to(q_BHTD.dtype).view(1, H, 1, 1)
    q = F.pad(torch.cat([q_BHTD, level.expand(B, H, T, 1)], dim=-1), (0, 0, 1, 0))
    k = F.pad(k_BHSD, (0, 1, 1, 0))
    k[:, :, 0, -1] = 1.0
    v = F.pad(v_BHSD, (0, 0, 1, 0))
    mask = None if mask is None else F.pad(F.pad(mask, (1, 0), value=True), (0, 0, 1, 0), value=True)
    bias = None if bias is None else F.pad(bias, (1, 0, 1, 0))
    plain = Scores(scores.scale, dropout=scores.dropout)
    mixed = _sdpa(q, k, v, mask, plain, bias)
    return mixed[:, :, -T:]


# ---- what both have in common


def _one_query(q_BH1D: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, view: View, scores: Scores, backend: Backend) -> Tensor:
    """Decoding: the queries that share a key/value head stand in its rows, so that no key is copied for them."""
    B, H, _, D = q_BH1D.shape
    G = k_BGSD.shape[1]
    q_BGRD = q_BH1D.reshape(B, G, H // G, D)
    mask = view.mask() if view.dense else None
    if backend == "explicit" or scores.sinks_H is not None:  # for sinks the fused way copies all keys and values
        everything = torch.ones(1, 1, 1, k_BGSD.shape[2], dtype=torch.bool, device=q_BH1D.device)
        mixed, _ = _explicit(q_BGRD, k_BGSD, v_BGSD, everything if mask is None else mask, scores, None)
    else:
        mixed = F.scaled_dot_product_attention(
            q_BGRD, k_BGSD, v_BGSD, attn_mask=mask, dropout_p=scores.dropout, scale=scores.scale
        )
    return mixed.reshape(B, H, 1, v_BGSD.shape[-1])


def _in_blocks(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, view: View, scores: Scores, backend: Backend) -> Tensor:
    """Attention through a window W, block by block: W queries see their own W keys and the W before them.

    Time, mask and scores grow with T W, not T^2. Shape B T H D.
    """
    B, T = q_BTHD.shape[:2]
    W = view.window
    assert W is not None
    N = -(-T // W)

    def blocks(x_BTHD: Tensor, *, before: bool) -> Tensor:
        padded = F.pad(x_BTHD, (0, 0, 0, 0, W if before else 0, N * W - T))
        cut = padded.unflatten(1, (-1, W))
        if before:
            cut = torch.cat([cut[:, :-1], cut[:, 1:]], dim=2)
        return cut.flatten(0, 1).transpose(1, 2)  # B N as one, then heads

    place_N11 = W * torch.arange(N, device=view.device)[:, None, None]
    query = place_N11 + torch.arange(W, device=view.device)[:, None]
    key = place_N11 + torch.arange(-W, W, device=view.device)
    mask = view.visible(query, key)[:, 0].expand(B, N, W, 2 * W).flatten(0, 1)[:, None]
    q, k, v = blocks(q_BTHD, before=False), blocks(k_BTGD, before=True), blocks(v_BTGD, before=True)
    k, v = _shared(q, k, v)
    if backend == "explicit":
        mixed, _ = _explicit(q, k, v, mask, scores, None)
    else:
        mixed = _sdpa(q, k, v, mask, scores, None)
    return mixed.transpose(1, 2).unflatten(0, (B, N)).flatten(1, 2)[:, :T]


# ---- flex: a kernel made from the mask


def _flex(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, view: View, scores: Scores) -> Tensor:
    """FlexAttention (Dong et al. 2024): blocks of keys that nothing sees are skipped, and no mask is written out.

    Compiled on a GPU; on a CPU PyTorch computes it plainly, which serves to compare.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if scores.dropout:
        raise RuntimeError("FlexAttention has no dropout")
    pad_B, documents_BS = view.pad_B, view.documents_BS

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query, key = q + view.past, k + view.first
        result = key <= query
        if view.window is not None:
            result = result & (query - key < view.window)
        if pad_B is not None:
            result = result & ((key >= pad_B[b]) | (key == query))
        if documents_BS is not None:
            result = result & (documents_BS[b, query] == documents_BS[b, key])
        return result

    def changed(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        score = softcap(score, scores.softcap)
        if scores.slopes_H is not None:
            score = score - scores.slopes_H[h] * (q + view.past - k - view.first)
        return score

    compiled = q_BHTD.device.type == "cuda"
    rows = None if pad_B is None and documents_BS is None else q_BHTD.shape[0]
    mask = create_block_mask(seen, rows, None, view.queries, view.keys, device=q_BHTD.device, _compile=compiled)
    plain = scores.softcap is None and scores.slopes_H is None
    attention: Any = _compiled_flex() if compiled else flex_attention
    found = attention(
        q_BHTD, k_BGSD, v_BGSD, None if plain else changed, mask, scores.scale,
        enable_gqa=q_BHTD.shape[1] != k_BGSD.shape[1], return_lse=scores.sinks_H is not None,
    )  # fmt: skip
    if scores.sinks_H is None:
        return found
    mixed_BHTD, total_BHT = found  # the logarithm of the softmax's denominator, which the sink's share adds to
    kept_BHT = torch.sigmoid(total_BHT - scores.sinks_H.float().view(1, -1, 1))
    return mixed_BHTD * kept_BHT[..., None].to(mixed_BHTD.dtype)


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


# ---- which one


def fastest_backend(
    config: ModelConfig, batch_size: int, device: torch.device, dtype: torch.dtype, repeats: int = 3
) -> Backend:
    """The backend whose forward and backward pass takes the least time here, found by running each.

    A backend that fails on this device is left out.

    Raises:
        RuntimeError: none of them runs, which would be a broken installation.
    """
    T, H, G = config.context_length, config.n_head, config.n_head if config.latent.kv_rank else config.kv_heads
    window = config.sliding_window if set(config.layer_kinds) == {"S"} else None  # else what most of the time goes to
    scores = Scores(config.score_scale, config.attention_softcap)
    seconds: dict[Backend, float] = {}
    for backend in BACKENDS:
        written_out = min(T, 2 * window) if window else T
        if backend == "explicit" and 4 * batch_size * H * T * written_out > LARGEST_SCORES:
            continue  # it would be slower than a backend that never holds them, and might not fit
        if backend == "flex" and (device.type != "cuda" or config.dropout):
            continue  # PyTorch compiles it for GPUs only; elsewhere it is for comparing
        widths = ((H, config.head_width), (G, config.head_width), (G, config.value_width))
        q, k, v = (torch.randn(batch_size, T, *w, device=device, dtype=dtype, requires_grad=True) for w in widths)
        try:
            times = []
            for _ in range(repeats + 1):
                view = View(T, 0, 0, window, None, None, device)
                started = time.perf_counter()
                attend(q, k, v, view, scores, backend=backend).sum().backward()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append(time.perf_counter() - started)
            seconds[backend] = min(times[1:])
        except RuntimeError:  # not for this dtype, not for this device, not enough memory
            continue
    if not seconds:
        raise RuntimeError(f"no attention backend runs on {device} in {dtype}")
    return min(seconds, key=lambda name: seconds[name])
