"""A plain training loop: windows at random places, AdamW, a warm-up and half a cosine, gradients clipped at 1."""

# B batch   T positions   N tokens of a text

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """How it trains; the defaults are those of nanoGPT's example on the characters of Shakespeare.

    Args:
        steps: optimizer steps, over which the learning rate falls.
        batch: sequences per step.
        learning_rate: at the peak.
        min_learning_rate: at the end.
        warmup: steps over which the learning rate rises.
        beta2: of AdamW.
        weight_decay: of whatever has two dimensions or more.
    """

    steps: int = 2000
    batch: int = 12
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    warmup: int = 100
    beta2: float = 0.99
    weight_decay: float = 0.1


def random_windows(tokens_N: np.ndarray, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets B T, from places drawn at random."""
    starts = torch.randint(len(tokens_N) - length, (batch,)).tolist()
    rows = [torch.from_numpy(tokens_N[start : start + length + 1].astype(np.int64)) for start in starts]
    windows = torch.stack(rows)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def learning_rate_at(step: int, settings: Settings) -> float:
    """The learning rate of a step, counted from 0 (Loshchilov & Hutter 2017, eq. 5, after a linear warm-up)."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / (settings.warmup + 1)
    done = min(1.0, (step - settings.warmup) / max(1, settings.steps - settings.warmup))
    height = settings.learning_rate - settings.min_learning_rate
    return settings.min_learning_rate + 0.5 * (1 + math.cos(math.pi * done)) * height


def adamw(model: nn.Module, settings: Settings, *, fused: bool = False) -> torch.optim.AdamW:
    """AdamW; matrices and tables are decayed, norms and biases are not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, settings.beta2), fused=fused)


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[], Tensor],
    precision: AbstractContextManager[Any] | None = None,
) -> Tensor:
    """One optimizer step; returns the loss, detached.

    Args:
        loss_of: makes the forward pass, in ``precision``.
    """
    with precision or nullcontext():
        loss = loss_of()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


@torch.no_grad()
def estimate(model: Any, tokens_N: np.ndarray, batches: int, batch: int) -> float:
    """The mean loss of so many random batches, nats per token."""
    model.eval()
    losses = [model(*random_windows(tokens_N, batch, model.config.block_size))[1].item() for _ in range(batches)]
    model.train()
    return sum(losses) / len(losses)
