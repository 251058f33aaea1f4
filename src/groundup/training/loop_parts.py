"""What the loop is told, where it stands, whom it calls, and what it keeps beside model and optimizers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from groundup.optim import Horizon, LossScale, WeightAverage
from groundup.runtime.device import Precision

Milestone = Literal["regular", "evaluation", "asked", "stopped", "final"]


@dataclass
class Position:
    """Where the loop stands: together with weights and optimizers, all that resuming needs.

    Args:
        step: optimizer steps done.
        tokens: tokens seen.
        sequences: how far all ranks together have come in the order of the data.
        seconds: time spent in the loop, over all its sittings.
        saved_step: step of the last milestone.
        saved_seconds: ``seconds`` at the last milestone.
        best_loss: lowest held-out loss so far, nats per token.
        stale: evaluations since then.
        skipped: steps whose gradients were not finite, and which changed nothing.
    """

    step: int = 0
    tokens: int = 0
    sequences: int = 0
    seconds: float = 0.0
    saved_step: int = 0
    saved_seconds: float = 0.0
    best_loss: float = math.inf
    stale: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class LoopSettings:
    """How long and in which portions.

    Args:
        batch_tokens: tokens per optimizer step, all micro-batches of all ranks together.
        accumulate: micro-batches per step and rank.
        micro_batch: sequences per micro-batch.
        max_steps: the horizon, where it is known at the start.
        seconds: budget of time; turned into a number of steps when the learning rate must begin to fall.
        log_every: steps between rows of metrics.
        save_every: steps between milestones; None spreads ten over the run.
        eval_every: steps between evaluations that save nothing; None for milestones alone.
        precision: of the forward pass.
        seed: of everything random in a step: dropout and noise are functions of it and of the place in the data.
        patience: steps in a row whose gradients are not finite before the run goes back to its last checkpoint.
        early_stop: evaluations without a better loss before the run ends; 0 for never.
        flops_per_token: of a training step; 0 where it is not known.
        peak_flops: FLOP/s of one rank's matrix products, measured; 0 where it is not known.
    """

    batch_tokens: int
    accumulate: int
    max_steps: int | None
    seconds: float | None
    log_every: int
    save_every: int | None
    precision: Precision
    micro_batch: int = 1
    eval_every: int | None = None
    seed: int = 0
    patience: int = 5
    early_stop: int = 0
    flops_per_token: float = 0.0
    peak_flops: float = 0.0


class LoopHooks:
    """What happens around the loop: nothing, at every occasion; whoever builds a loop overrides what he cares for."""

    def on_log(self, row: dict[str, Any]) -> None:
        """A row of metrics is there."""

    def on_milestone(self, kind: Milestone) -> None:
        """Time to evaluate, sample and save: of ``evaluation`` only the first two (and what is
        the best so far), of ``asked`` only the last.
        """

    def on_horizon(self, horizon: Horizon) -> None:
        """Time was turned into steps, before anything depends on it: it must outlive a crash."""

    def before_update(self) -> None:
        """Weights and optimizer state are about to change: whoever still reads them must have done so."""

    def after_step(self, step: int) -> None:
        """A step was made."""

    def on_rollback(self) -> bool:
        """Put model, optimizers and position back to the last checkpoint; False where there is none."""
        return False

    def on_out_of_memory(self) -> bool:
        """Memory ran out: deal micro-batches of half as many sequences from now on; False where that is impossible."""
        return False


@dataclass
class Extras:
    """What some runs have beside model and optimizers, and checkpoints keep.

    Args:
        average: of the weights.
        loss_scale: of float16.
    """

    average: WeightAverage | None = None
    loss_scale: LossScale | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        found = {f"average/{k}": v for k, v in self.average.tensors.items()} if self.average else {}
        return found | ({f"loss_scale/{k}": v for k, v in self.loss_scale.state().items()} if self.loss_scale else {})

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`tensors`."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, key = name.partition("/")
            parts.setdefault(part, {})[key] = tensor
        if self.average and "average" in parts:
            self.average.restore(parts["average"])
        if self.loss_scale and "loss_scale" in parts:
            self.loss_scale.restore(parts["loss_scale"])
