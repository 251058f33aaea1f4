"""A mixture of experts: many feed-forwards of which each token passes through a few.

    x ──► router ──► the best ``active`` of ``count`` experts, and a weight for each
    tokens are sorted by expert, so that each expert's tokens lie together, and all experts are one grouped product
    what comes out is weighted and added up at the token's place; shared experts see every token

Shazeer et al. 2017; Fedus et al. 2021 (Switch); Jiang et al. 2024 (Mixtral); Dai et al. 2024 (DeepSeekMoE).
"""

# M tokens of the batch   K experts per token   N experts   E embedding   F hidden width   R = M K routed rows

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.model.config import GATED, ModelConfig
from groundup.model.feed_forward import activate, gate_with, make_mlp


@dataclass
class Routing:
    """Where the tokens of one layer went.

    Args:
        experts_MK: the experts of each token.
        weights_MK: what their results are multiplied with.
        counts_N: tokens per expert, before any was dropped.
        dropped: routed rows that found their expert full.
        loss: the balancing loss and the router's z-loss, weighted as configured; 0 where neither is asked for.
        entropy: of the mean router probabilities, in nats: log(N) when all experts are used alike.
    """

    experts_MK: Tensor
    weights_MK: Tensor
    counts_N: Tensor
    dropped: Tensor
    loss: Tensor
    entropy: Tensor


class Router(nn.Module):
    """Chooses experts and their weights for each token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.experts
        self.weight = nn.Parameter(torch.empty(config.experts.count, config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.experts.count)) if config.experts.router_bias else None
        self.selection_bias: Tensor | None
        self.load_N: Tensor
        selection = torch.zeros(config.experts.count) if config.experts.selection_bias else None
        self.register_buffer("selection_bias", selection)
        self.register_buffer("load_N", torch.zeros(config.experts.count), persistent=False)

    def forward(self, x_ME: Tensor) -> Routing:
        """Route tokens. Computed in float32 at least: near ties decide where a token goes."""
        config = self.config
        dtype = torch.promote_types(x_ME.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(x_ME.device.type, enabled=False):
            logits_MN = F.linear(x_ME.to(dtype), self.weight.to(dtype), bias)
        scores_MN = logits_MN.sigmoid() if config.router == "sigmoid" else logits_MN.softmax(dim=-1)
        experts_MK = self._choose(scores_MN.detach())
        weights_MK = scores_MN.gather(1, experts_MK)
        if config.normalise:
            weights_MK = weights_MK / (weights_MK.sum(dim=-1, keepdim=True) + 1e-20)
        counts_N = torch.bincount(experts_MK.flatten(), minlength=config.count)
        if self.training:
            self.load_N += counts_N.to(self.load_N.dtype)
        share_N = (scores_MN / scores_MN.sum(dim=-1, keepdim=True)).mean(dim=0)
        return Routing(
            experts_MK,
            weights_MK * config.scale,
            counts_N,
            torch.zeros((), dtype=torch.int64, device=x_ME.device),
            self._loss(logits_MN, share_N, counts_N),
            -(share_N.detach() * share_N.detach().clamp_min(1e-20).log()).sum(),
        )

    def _choose(self, scores_MN: Tensor) -> Tensor:
        config = self.config
        if self.selection_bias is not None:
            scores_MN = scores_MN + self.selection_bias
        if config.groups > 1:
            # A group's score: its best expert (DeepSeek-V2), or the sum of its two best where scores are sigmoids (V3).
            grouped = scores_MN.unflatten(1, (config.groups, -1))
            best = min(2 if config.router == "sigmoid" else 1, grouped.shape[-1])
            chosen = grouped.topk(best, dim=-1).values.sum(dim=-1).topk(config.active_groups, dim=-1).indices
            open_MG = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, chosen, True)
            scores_MN = grouped.masked_fill(~open_MG[..., None], float("-inf")).flatten(1)
        return scores_MN.topk(config.active, dim=-1).indices

    def _loss(self, logits_MN: Tensor, share_N: Tensor, counts_N: Tensor) -> Tensor:
        config, loss = self.config, logits_MN.new_zeros(())
        if config.balance_loss:  # N sum_i f_i P_i (Fedus et al. 2021, eq. 4): 1 when all experts are used alike
            fraction_N = counts_N / counts_N.sum()
            loss = loss + config.balance_loss * config.count * (fraction_N * share_N).sum()
        if config.z_loss:  # Zoph et al. 2022, eq. 5
            loss = loss + config.z_loss * logits_MN.logsumexp(dim=-1).square().mean()
        return loss

    @torch.no_grad()
    def rebalance(self) -> None:
        """Move the selection bias against the load since the last call (Wang et al. 2024, algorithm 1).

        Once per optimizer step; ``load_N`` may be summed over processes before.
        """
        if self.selection_bias is not None:
            self.selection_bias += self.config.bias_rate * torch.sign(self.load_N.mean() - self.load_N)
        self.load_N.zero_()


class MixtureOfExperts(nn.Module):
    """Routed experts, all of them as three (two, without a gate) stacks of matrices, and shared ones."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, E, F_ = config.experts, config.n_embd, config.expert_dim
        self.kind, self.gated, self.capacity = config.feed_forward, config.feed_forward in GATED, experts.capacity
        self.router = Router(config)
        self.gate = _Stack(experts.count, E, F_, bias=bool(config.ff_bias)) if self.gated else None
        self.up = _Stack(experts.count, E, F_, bias=bool(config.ff_bias))
        self.down = _Stack(experts.count, F_, E, bias=bool(config.ff_bias))
        self.shared = make_mlp(config, experts.shared * F_) if experts.shared else None
        self.routing: Routing | None = None

    def forward(self, x_BTE: Tensor) -> Tensor:
        """Shape B T E in and out. What was routed where is kept in ``routing`` until the next call."""
        x_ME = x_BTE.flatten(0, -2)
        self.routing = routing = self.router(x_ME)
        M, K = routing.experts_MK.shape
        expert_R, order_R = routing.experts_MK.flatten().sort(stable=True)
        token_R = order_R // K
        weight_R1 = routing.weights_MK.flatten()[order_R, None]
        counts_N = routing.counts_N
        if self.capacity:
            kept_R = self._within_capacity(expert_R, counts_N, M, K)
            routing.dropped = len(kept_R) - kept_R.sum()
            expert_R, token_R, weight_R1 = expert_R[kept_R], token_R[kept_R], weight_R1[kept_R]
            counts_N = torch.bincount(expert_R, minlength=len(counts_N))
        offsets_N = counts_N.cumsum(0)
        x_RE = x_ME[token_R]
        up_RF = self.up(x_RE, offsets_N, expert_R)
        if self.gate is not None:
            hidden_RF = gate_with(self.kind, self.gate(x_RE, offsets_N, expert_R), up_RF)
        else:
            hidden_RF = activate(self.kind, up_RF)
        mixed_RE = self.down(hidden_RF, offsets_N, expert_R) * weight_R1.to(hidden_RF.dtype)
        # Summed over K in a fixed order where nothing was dropped: adding in place would not be deterministic on a GPU.
        if self.capacity:
            mixed_ME = torch.zeros_like(x_ME).index_add(0, token_R, mixed_RE.to(x_ME.dtype))
        else:
            mixed_ME = torch.empty_like(mixed_RE).index_copy(0, order_R, mixed_RE).unflatten(0, (M, K)).sum(dim=1)
        if self.shared is not None:
            mixed_ME = mixed_ME + self.shared(x_ME)
        return mixed_ME.view_as(x_BTE)

    def _within_capacity(self, expert_R: Tensor, counts_N: Tensor, M: int, K: int) -> Tensor:
        """Which routed rows their expert still has room for: the first of each, in the order of the tokens."""
        room = math.ceil(self.capacity * M * K / len(counts_N))
        begin_N = counts_N.cumsum(0) - counts_N
        place_R = torch.arange(len(expert_R), device=expert_R.device) - begin_N[expert_R]
        return place_R < room


class _Stack(nn.Module):
    """One linear layer per expert, applied to rows that are sorted by expert."""

    def __init__(self, count: int, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(count, outputs)) if bias else None

    def forward(self, x_RI: Tensor, offsets_N: Tensor, expert_R: Tensor) -> Tensor:
        """Rows R inputs to R outputs; expert n has the rows before ``offsets_N[n]`` that no earlier one has."""
        y_RO = grouped_linear(x_RI, self.weight, offsets_N)
        return y_RO if self.bias is None else y_RO + self.bias.to(y_RO.dtype)[expert_R]


def grouped_linear(x_RI: Tensor, weight_NOI: Tensor, offsets_N: Tensor) -> Tensor:
    """All experts' products as one call: rows up to each offset times that expert's matrix; R O.

    PyTorch's grouped product wants rows of whole 16 bytes, and no float64. Others, which no model of use has, go one
    expert after the other.
    """
    dtype = weight_NOI.dtype
    if torch.is_autocast_enabled(x_RI.device.type):
        dtype = torch.get_autocast_dtype(x_RI.device.type)
    x_RI, weight_NOI = x_RI.to(dtype), weight_NOI.to(dtype)
    if dtype != torch.float64 and all(size * dtype.itemsize % 16 == 0 for size in weight_NOI.shape[1:]):
        return F.grouped_mm(x_RI, weight_NOI.transpose(-2, -1), offs=offsets_N.to(torch.int32))
    counts = torch.diff(offsets_N, prepend=offsets_N.new_zeros(1)).tolist()
    parts = zip(x_RI.split(counts), weight_NOI, strict=True)
    return torch.cat([rows @ weight.T for rows, weight in parts])
