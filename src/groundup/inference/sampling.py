"""From logits to a token: temperature, top-k, top-p, min-p, each request with its own generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from groundup.runtime import GroundupError, UsageError


class Sampling(TypedDict, total=False):
    """The fields of :class:`SamplingParams`, as keyword arguments."""

    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    stop: str | Sequence[str]
    seed: int | None


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    The filters apply in the order temperature, top_k, min_p, top_p, each to what the one before it left.

    Args:
        max_tokens: most tokens to generate
        temperature: 0 takes the likeliest token; 1 samples from the model's own distribution
        top_k: keep only the k likeliest tokens (Fan et al. 2018) and those as likely as the k-th; None for all
        top_p: keep the smallest set of likeliest tokens whose probability reaches p (Holtzman et al. 2020)
        min_p: drop tokens less likely than this fraction of the likeliest one's probability (Nguyen et al. 2024)
        stop: texts that end the generation; none of them is part of the result
        seed: makes the request repeatable, whatever else is in its batch; at least 0; None draws one
    """

    max_tokens: int = 128
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    @classmethod
    def of(cls, **sampling: Unpack[Sampling]) -> SamplingParams:
        """Build from keyword arguments; ``stop`` may be one text or any sequence of texts."""
        stop = sampling.get("stop", ())
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        return cls(**{**sampling, "stop": stop})  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens = {self.max_tokens} must be at least 1.")
        if not 0.0 <= self.temperature < math.inf:
            raise UsageError(f"temperature = {self.temperature} must be 0 or more.")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k = {self.top_k} must be at least 1.")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"top_p = {self.top_p} must be above 0 and at most 1.")
        if not 0.0 <= self.min_p < 1.0:
            raise UsageError(f"min_p = {self.min_p} must be at least 0 and below 1.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UsageError(f"seed = {self.seed} must be at least 0 and below 2^63.")
        if "" in self.stop:
            raise UsageError("stop: an empty text would end every generation at once.")


def probabilities(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that ``params`` sample from, float32 V; one-hot at temperature 0.

    Raises:
        GroundupError: the logits hold NaN, or +inf.
    """
    logits_V = logits_V.float()
    if not torch.isfinite(logits_V.max()):
        raise GroundupError(
            "the model computed logits that are not finite: its weights are damaged or its training diverged."
        )
    if params.temperature == 0.0:
        return torch.zeros_like(logits_V).scatter_(0, logits_V.argmax()[None], 1.0)
    # The maximum is taken off before the division, so that a very small temperature cannot overflow; one that float32
    # rounds to zero would divide 0 by 0.
    logits_V = (logits_V - logits_V.max()) / max(params.temperature, torch.finfo(torch.float32).tiny)
    if params.top_k is not None and params.top_k < logits_V.numel():
        kth = logits_V.topk(params.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < kth, -math.inf)
    p_V = logits_V.softmax(dim=-1)
    if params.min_p > 0.0:
        p_V = p_V.masked_fill(p_V < params.min_p * p_V.max(), 0.0)
    if params.top_p < 1.0:
        sorted_V, order_V = p_V.sort(descending=True, stable=True)
        sorted_V = sorted_V / sorted_V.sum()
        before_V = sorted_V.cumsum(0) - sorted_V
        rest_V = before_V >= params.top_p
        rest_V[0] = False  # the likeliest stays, even where float32 rounds top_p to zero
        p_V = torch.zeros_like(p_V).scatter_(0, order_V, sorted_V.masked_fill(rest_V, 0.0))
    return p_V / p_V.sum()


def choose(logits_V: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Draw one token id. On the CPU, so that a seed means the same on every device."""
    logits_V = logits_V.detach().to("cpu")
    p_V = probabilities(logits_V, params)
    if params.temperature == 0.0:
        return int(p_V.argmax())
    return int(torch.multinomial(p_V, 1, generator=generator))
