"""The recipe's ``optim`` section."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from groundup.runtime import UsageError


@dataclass(frozen=True)
class OptimConfig:
    """How the weights are updated.

    Args:
        optimizer: muon for the matrices of the blocks (AdamW for the rest), or adamw for everything
        learning_rate: peak learning rate of both; Muon's updates are scaled to AdamW's size, so one number serves (Liu
            et al. 2025)
        beta1: AdamW's decay of the mean gradient
        beta2: AdamW's decay of the mean squared gradient
        eps: AdamW's guard against division by zero
        momentum: Muon's decay of the mean gradient
        weight_decay: decoupled decay of the matrices (Loshchilov & Hutter 2019); embeddings and norms are not decayed
        grad_clip: global gradient norm above which gradients are scaled down; 0 for never
        warmup_steps: steps over which the learning rate rises from zero
        decay_fraction: the last part of the run over which the learning rate falls linearly
        final_learning_rate: fraction of the peak reached at the end
    """

    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    warmup_steps: int = 50
    decay_fraction: float = 0.6
    final_learning_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise UsageError(f"optim.{name} = {getattr(self, name)} must be above 0.")
        if not 0.0 <= self.decay_fraction <= 1.0:
            raise UsageError(f"optim.decay_fraction = {self.decay_fraction} must lie between 0 and 1.")
        if not 0.0 <= self.final_learning_rate <= 1.0:
            raise UsageError(
                f"optim.final_learning_rate = {self.final_learning_rate} must lie between 0 and 1: it is a fraction."
            )
        for name in ("warmup_steps", "weight_decay", "grad_clip"):
            if not getattr(self, name) >= 0:  # so written, NaN is refused too
                raise UsageError(f"optim.{name} = {getattr(self, name)} must not be negative.")
        for name in ("beta1", "beta2", "momentum"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UsageError(f"optim.{name} = {getattr(self, name)} must be at least 0 and below 1.")
