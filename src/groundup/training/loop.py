"""The loop. Every training in groundup runs through it; what differs is the objective and the hooks it is handed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from groundup.optim import Horizon, OptimConfig, learning_rate_factor
from groundup.runtime import GroundupError
from groundup.runtime.device import Precision, autocast
from groundup.runtime.interrupt import StopRequest
from groundup.training.objectives import Objective

Milestone = Literal["regular", "stopped", "final"]
SAVE_AT_LEAST_EVERY_SECONDS = 600.0
TIME_TOLERANCE = 0.1  # of the budget: a run that would miss its time by more has its end moved
MILESTONES = 10  # checkpoints spread over a run, unless save_every says otherwise


@dataclass
class Position:
    """Where the loop stands: together with weights, optimizers and generators, all that resuming needs.

    Args:
        step: optimizer steps done.
        tokens: tokens seen.
        seconds: time spent in the loop, over all its sittings.
        saved_step: step of the last milestone.
        saved_seconds: ``seconds`` at the last milestone.
        best_loss: lowest held-out loss so far, nats per token.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    saved_step: int = 0
    saved_seconds: float = 0.0
    best_loss: float = math.inf


@dataclass(frozen=True)
class LoopSettings:
    """How long and in which portions.

    Args:
        batch_tokens: tokens per optimizer step, all micro-batches together.
        accumulate: micro-batches per step.
        max_steps: the horizon, where it is known at the start.
        seconds: budget of time; turned into a number of steps when the learning rate must begin to fall.
        log_every: steps between rows of metrics.
        save_every: steps between milestones; None spreads ten over the run.
        precision: of the forward pass.
    """

    batch_tokens: int
    accumulate: int
    max_steps: int | None
    seconds: float | None
    log_every: int
    save_every: int | None
    precision: Precision


class Loop:
    """One training, step by step.

    Args:
        model: what is trained; may be wrapped (compiled, parallel).
        objective: model and micro-batch to loss.
        batches: micro-batch by index, on the model's device: a pure function, so that the order needs no state.
        optimizers: by name; each group's ``lr`` is the peak.
        optim: schedule and clipping.
        settings: how long and in which portions.
        on_log: called with each row of metrics.
        on_milestone: called at each milestone, to evaluate, sample and save.
        on_horizon: called when time was turned into steps, before anything depends on it: it must outlive a crash.
        position: where to go on from; the start when None.
        decided: the horizons that were handed out before, in order.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        batches: Callable[[int], Any],
        optimizers: Mapping[str, torch.optim.Optimizer],
        optim: OptimConfig,
        settings: LoopSettings,
        *,
        on_log: Callable[[dict[str, Any]], None],
        on_milestone: Callable[[Milestone], None],
        on_horizon: Callable[[Horizon], None],
        position: Position | None = None,
        decided: Sequence[Horizon] = (),
    ) -> None:
        self.model, self.objective, self.batches = model, objective, batches
        self.optimizers, self.optim, self.settings = optimizers, optim, settings
        self.on_log, self.on_milestone, self.on_horizon = on_log, on_milestone, on_horizon
        self.position = position or Position()
        self.horizon: Horizon | None = None
        if settings.seconds is None and settings.max_steps is not None:
            self.horizon = Horizon.of(settings.max_steps, optim)
        self._decided = [one for one in decided if one.decay_from > self.position.step]
        if len(self._decided) < len(decided):
            self.horizon = decided[len(decided) - len(self._decided) - 1]
        self._mark = (self.position.step, self.position.seconds)
        self._groups = [
            (group, float(group["lr"])) for optimizer in optimizers.values() for group in optimizer.param_groups
        ]
        self._parameters = [p for group, _ in self._groups for p in group["params"]]
        self._device = self._parameters[0].device
        self._speed = _Speed()

    def run(self, stop: StopRequest) -> Milestone:
        """Train to the horizon, or until ``stop`` is set.

        Returns:
            ``final`` when the horizon was reached, ``stopped`` when asked to stop; the milestone of that kind has been
            passed.

        Raises:
            GroundupError: the loss is not finite. Checkpoints written before stay as they are.
        """
        self.model.train()
        self._resume_clock()
        while self.horizon is None or self.position.step < self.horizon.steps:
            self._settle_horizon()
            loss, gradient_norm = self._step()
            if self._should_log():
                self._log(loss, gradient_norm)
            if stop:
                return self._pass("stopped")
            ended = self.horizon is not None and self.position.step >= self.horizon.steps
            if not ended and self._at_milestone():
                self._pass("regular")
        return self._pass("final")

    def fraction(self) -> float:
        """How much of the run is done, 0 … 1: by steps once the horizon is known, by time before."""
        if self.horizon is not None:
            return self.position.step / max(1, self.horizon.steps)
        assert self.settings.seconds is not None
        return min(1.0, self.position.seconds / self.settings.seconds)

    def _step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step: the mean loss over its micro-batches and the gradient norm before clipping, both still on
        the device.
        """
        factor = learning_rate_factor(self.position.step, self.optim, self.horizon)
        for group, peak in self._groups:
            group["lr"] = peak * factor
        total = torch.zeros((), device=self._device)
        first = self.position.step * self.settings.accumulate
        for index in range(first, first + self.settings.accumulate):
            with autocast(self._device, self.settings.precision):
                loss, _ = self.objective(self.model, self.batches(index))
            (loss / self.settings.accumulate).backward()
            total += loss.detach() / self.settings.accumulate
        limit = self.optim.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self._parameters, limit)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        after_step: Callable[[], None] | None = getattr(self.model, "after_step", None)
        if after_step is not None:
            after_step()
        self.position.step += 1
        self.position.tokens += self.settings.batch_tokens
        self._tick()
        return total, norm

    def _settle_horizon(self) -> None:
        """Turn a budget of time into steps when the learning rate must begin to fall; mend that when the pace changes.

        A machine that others use too can become several times slower or faster. The pace is measured over each
        tenth of the budget; if the run would miss its time by more than a tenth, its end is moved and the learning rate
        falls from where it is towards the new one. Each decision is handed out before it takes effect; a resumed run
        takes those made before it was killed at the very steps they were made for.
        """
        step, elapsed, seconds = self.position.step, self.position.seconds, self.settings.seconds
        if self._decided:
            if self._decided[0].decay_from <= step:
                self.horizon = self._decided.pop(0)
            return
        if seconds is None:
            return
        marked_step, marked_seconds = self._mark
        if elapsed - marked_seconds < seconds / MILESTONES or step - marked_step < 3:
            return
        pace = (elapsed - marked_seconds) / (step - marked_step)
        self._mark = (step, elapsed)
        left = seconds - elapsed
        if self.horizon is None:
            if left > self.optim.decay_fraction * seconds:
                return
        elif abs((self.horizon.steps - step) * pace - left) <= TIME_TOLERANCE * seconds:
            return
        # However late it is, the decay gets a fiftieth of the steps made so far: an abrupt end would waste them.
        steps = step + max(1, step // 50, round(left / pace))
        horizon = Horizon(steps, step, learning_rate_factor(step, self.optim, self.horizon))
        self.on_horizon(horizon)
        self.horizon = horizon

    def _should_log(self) -> bool:
        step = self.position.step
        return (
            step % self.settings.log_every == 0
            or step == 1
            or (self.horizon is not None and step == self.horizon.steps)
        )

    def _log(self, loss: torch.Tensor, gradient_norm: torch.Tensor) -> None:
        value = loss.item()
        if not math.isfinite(value):
            raise GroundupError(
                f"the loss is {value} at step {self.position.step}: training diverged. Earlier checkpoints are kept. "
                "Lower --learning-rate, or try --precision float32."
            )
        self.on_log(
            {
                "kind": "train",
                "step": self.position.step,
                "tokens": self.position.tokens,
                "seconds": round(self.position.seconds, 3),
                "loss": value,
                "tokens_per_second": round(
                    self.settings.batch_tokens / (self._speed.seconds_per_step() or math.inf), 1
                ),
                "learning_rate": max(group["lr"] for group, _ in self._groups),
                "grad_norm": gradient_norm.item(),
            }
        )

    def _at_milestone(self) -> bool:
        position = self.position
        if self.settings.save_every is not None:
            return position.step % self.settings.save_every == 0
        if position.seconds - position.saved_seconds >= SAVE_AT_LEAST_EVERY_SECONDS:
            return True
        if self.horizon is not None:
            return position.step - position.saved_step >= self.horizon.steps / MILESTONES
        assert self.settings.seconds is not None
        return position.seconds - position.saved_seconds >= self.settings.seconds / MILESTONES

    def _pass(self, kind: Milestone) -> Milestone:
        self.position.saved_step, self.position.saved_seconds = self.position.step, self.position.seconds
        self.on_milestone(kind)
        self.model.train()
        self._tick(count=False)  # what the milestone took belongs to the run's time, not to the speed of its steps
        return kind

    def _resume_clock(self) -> None:
        self._clock = time.monotonic()

    def _tick(self, count: bool = True) -> None:
        now = time.monotonic()
        self.position.seconds += now - self._clock
        if count:
            self._speed.add(now - self._clock)
        self._clock = now


class _Speed:
    """Mean duration of recent steps."""

    def __init__(self, window: int = 50) -> None:
        self._recent: list[float] = []
        self._window = window

    def add(self, seconds: float) -> None:
        self._recent = [*self._recent[-self._window + 1 :], seconds]

    def seconds_per_step(self) -> float:
        """Seconds; 0.0 before the first step."""
        return sum(self._recent) / len(self._recent) if self._recent else 0.0
