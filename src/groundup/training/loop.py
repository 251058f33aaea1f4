"""The loop. Every training in groundup runs through it; what differs is the objective and the hooks it is handed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from groundup.data.permutation import derive_key
from groundup.optim import Horizon, OptimConfig, learning_rate_factor
from groundup.optim.gradients import add_noise, clip_adaptively, clip_gradients, scale_gradients, total_norm
from groundup.runtime import GroundupError, warn
from groundup.runtime.device import allow_tf32, autocast, memory_peak, out_of_memory
from groundup.runtime.interrupt import StopRequest
from groundup.runtime.process_group import World, at_step, sum_over_ranks
from groundup.training.loop_parts import Extras, LoopHooks, LoopSettings, Milestone, Position
from groundup.training.objectives import Metrics, Objective
from groundup.training.parallel import Stepper, accumulating

SAVE_AT_LEAST_EVERY_SECONDS = 600.0
TIME_TOLERANCE = 0.1  # of the budget: a run that would miss its time by more has its end moved
MILESTONES = 10  # checkpoints spread over a run, unless save_every says otherwise
MOST_ROLLBACKS = 3  # to the same checkpoint


@dataclass
class _Guard:
    """Steps whose gradients were not finite, counted where the gradients are, so that nobody waits for the count."""

    in_a_row: Tensor
    total: Tensor
    rollbacks: int = 0  # to the checkpoint of step ``restored``
    restored: int = -1


class Loop:
    """One training, step by step.

    Args:
        model: what is trained: the model itself, or :func:`groundup.training.parallel.spread`'s result.
        objective: model and micro-batch to loss.
        batches: micro-batch by index over all ranks, on the model's device: a pure function, so that the order needs no
            state. Micro-batch i holds the sequences from i x ``micro_batch`` on.
        optimizers: by name; each group's ``lr`` is the peak.
        optim: schedule, clipping and the rest of what is done to gradients.
        settings: how long and in which portions.
        hooks: what happens around it.
        position: where to go on from; the start when None.
        decided: the horizons that were handed out before, in order.
        extras: averaged weights and loss scale.
        world: the processes that train together; each takes every ``size``-th micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        batches: Callable[[int], Any],
        optimizers: Mapping[str, torch.optim.Optimizer],
        optim: OptimConfig,
        settings: LoopSettings,
        hooks: LoopHooks,
        *,
        position: Position | None = None,
        decided: Sequence[Horizon] = (),
        extras: Extras | None = None,
        world: World | None = None,
    ) -> None:
        plain = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.stepper = model if isinstance(plain, Stepper) else Stepper(model, objective)
        self.model: nn.Module = plain.model if isinstance(plain, Stepper) else model
        self.objective, self.batches = objective, batches
        self.optimizers, self.optim, self.settings, self.hooks = optimizers, optim, settings, hooks
        self.position = position or Position()
        self.extras, self.world = extras or Extras(), world or World()
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
        self._tables = [m.weight for m in self.model.modules() if isinstance(m, nn.Embedding)]
        self._device = self._parameters[0].device
        self._speed = _Speed()
        self._resume_clock()
        zero = torch.zeros((), device=self._device)
        self._guard = _Guard(zero, zero)

    def run(self, stop: StopRequest) -> Literal["final", "early", "stopped"]:
        """Train to the horizon, or until ``stop`` is set.

        Returns:
            ``final`` when the horizon was reached, ``early`` when held-out loss no longer fell, ``stopped`` when asked
            to stop; what there is has been saved.

        Raises:
            GroundupError: the loss stays infinite or undefined, or there is no memory for one sequence. Checkpoints
                written before stay as they are.
        """
        self.model.train()
        allow_tf32(self.settings.precision)
        self._resume_clock()
        while not self.ended:
            self._settle_horizon()
            if self.settings.early_stop and self.position.stale >= self.settings.early_stop:
                if self.position.saved_step < self.position.step:
                    self._pass("asked")
                return "early"
            loss, gradient_norm, metrics = self._step()
            log, overdue = self._should_log(), False
            if (log or self._device.type == "cpu") and self._must_go_back(loss):
                continue
            if log:
                self._log(loss, gradient_norm, metrics)
            if log or self._device.type == "cpu":
                must_stop, must_save, overdue = self._asked(stop)
                if must_stop:
                    self._pass("stopped")
                    return "stopped"
                if must_save:
                    self._pass("asked")
            if self.ended:
                break  # type: ignore[unreachable]  # mypy takes the property for a constant
            if overdue or self._at_milestone():
                if not self._guard.in_a_row.item():  # else weights that may be the cause would be kept
                    self._pass("regular")
            elif self._at_evaluation():
                self._pass("evaluation")
        self._pass("final")
        return "final"

    def _asked(self, stop: StopRequest) -> tuple[bool, bool, bool]:
        """Whether somebody asked to stop, or to save, or the last save is long ago: on any rank, so that all of them do
        the same at the same step.
        """
        overdue = self.position.seconds - self.position.saved_seconds >= SAVE_AT_LEAST_EVERY_SECONDS
        flags = (stop.signal is not None, stop.save, overdue and self.settings.save_every is None)
        stop.save = False
        if self.world.size > 1:
            mine = torch.tensor([float(flag) for flag in flags], device=self._device)
            must_stop, must_save, overdue = (found > 0 for found in sum_over_ranks(self.world, mine).tolist())
            return must_stop, must_save, overdue
        return flags

    @property
    def ended(self) -> bool:
        """Whether the horizon has been reached."""
        return self.horizon is not None and self.position.step >= self.horizon.steps

    @property
    def seconds(self) -> float:
        """How long the run has taken up to now, what goes on at the moment included."""
        return self.position.seconds + time.monotonic() - self._clock

    def fraction(self) -> float:
        """How much of the run is done, 0 … 1: by steps once the horizon is known, by time before."""
        if self.horizon is not None:
            return self.position.step / max(1, self.horizon.steps)
        assert self.settings.seconds is not None
        return min(1.0, self.position.seconds / self.settings.seconds)

    # ---- one step

    def _step(self) -> tuple[Tensor, Tensor, Metrics]:
        """One optimizer step: this rank's share of the loss, the gradient norm before clipping, and the metrics, all
        still on the device.
        """
        position = self.position
        factor = learning_rate_factor(position.step, self.optim, self.horizon)
        for group, peak in self._groups:
            group["lr"] = peak * factor
        while True:
            try:
                loss, metrics = self._gradients()
                break
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            self._use_less_memory()
        norm = self._update()
        position.step += 1
        position.tokens += self.settings.batch_tokens
        position.sequences += self.settings.accumulate * self.settings.micro_batch * self.world.size
        at_step(self.world, position.step)
        self._tick()
        self.hooks.after_step(position.step)
        return loss, norm, metrics

    def _gradients(self) -> tuple[Tensor, Metrics]:
        """Forward and backward passes of the step's micro-batches, each weighed by what its loss is the mean of."""
        settings, size = self.settings, self.world.size
        first = self.position.sequences // settings.micro_batch + self.world.rank
        indices = range(first, first + settings.accumulate * size, size)
        batches = [self.batches(index) for index in indices]
        counts = [torch.as_tensor(self.objective.count(batch), device=self._device).float() for batch in batches]
        everything = sum_over_ranks(self.world, torch.stack(counts).sum()).clamp_min(1)
        scale = self.extras.loss_scale
        total = torch.zeros((), device=self._device)
        metrics: Metrics = {}
        for index, batch, count in zip(indices, batches, counts, strict=True):
            torch.manual_seed(derive_key(settings.seed, index * settings.micro_batch, 2))  # of dropout
            with accumulating(self.stepper, more=index != indices[-1]):
                with autocast(self._device, settings.precision):
                    loss, found = self.stepper(batch)
                share = count / everything
                # DDP and FSDP take the mean of the ranks' gradients, where the sum is wanted.
                weighed = loss * (share * size)
                (weighed if scale is None else weighed * scale.scale).backward()
            total += loss.detach() * share
            for name, value in found.items():
                metrics[name] = metrics[name] + value * share if name in metrics else value * share
        return total, metrics

    def _update(self) -> Tensor:
        """Clip, and let the optimizers step unless the gradients are not finite; returns their norm before clipping."""
        optim, scale, step = self.optim, self.extras.loss_scale, self.position.step
        if scale is not None:
            scale_gradients(self._parameters, 1 / scale.scale)
        if optim.embedding_gradient_scale != 1.0:
            scale_gradients(self._tables, optim.embedding_gradient_scale)
        if optim.adaptive_clip:
            clip_adaptively(self._parameters, optim.adaptive_clip)
        norm = total_norm(self._parameters)
        bad = (~norm.isfinite()).float()
        clip_gradients(self._parameters, norm, optim.grad_clip)
        if optim.gradient_noise:
            add_noise(self._parameters, optim.gradient_noise, step, derive_key(self.settings.seed, step, 3))
        self.hooks.before_update()
        for optimizer in self.optimizers.values():
            optimizer.found_inf = bad  # type: ignore[attr-defined]
            optimizer.grad_scale = None  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if scale is not None:
            scale.update(bad)
        if self.extras.average is not None:
            self.extras.average.update(step)
        self._after_step()
        # While float16's scale can still come down, an overflow is its search for the right size, and no divergence.
        lost = bad if scale is None else bad * (scale.scale < 1.0)
        guard = self._guard
        guard.in_a_row, guard.total = (guard.in_a_row + lost) * lost, guard.total + bad
        return norm

    def _after_step(self) -> None:
        """What the model adjusts by itself, from what all ranks have seen."""
        after_step: Callable[[], None] | None = getattr(self.model, "after_step", None)
        if after_step is None:
            return
        if self.world.size > 1:
            for load in [buffer for name, buffer in self.model.named_buffers() if name.endswith("load_N")]:
                load.copy_(sum_over_ranks(self.world, load))
        after_step()

    def _use_less_memory(self) -> None:
        """Halve the micro-batch; tokens per step stay."""
        settings = self.settings
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if settings.micro_batch % 2 or self.world.size > 1 or not self.hooks.on_out_of_memory():
            raise GroundupError(
                f"out of memory on {self._device} with {settings.micro_batch} sequences at once. Earlier checkpoints "
                "are kept. Give a smaller --micro-batch, --checkpointing block, or a smaller model."
            )
        half = settings.micro_batch // 2
        self.settings = replace(settings, micro_batch=half, accumulate=2 * settings.accumulate)
        warn(f"out of memory with {settings.micro_batch} sequences at once: going on with {half}, as many per step.")

    def _must_go_back(self, loss: Tensor) -> bool:
        """Look at the gradients that were not finite; go back to the last checkpoint when there were too many.

        The data that led there is passed over: the order goes on behind it.

        Raises:
            GroundupError: there is no checkpoint, or going back did not help.
        """
        guard, position = self._guard, self.position
        position.skipped += int(guard.total.item())
        guard.total = torch.zeros_like(guard.total)
        in_a_row = int(guard.in_a_row.item())
        if in_a_row < self.settings.patience:
            if in_a_row:
                warn(f"step {position.step}: gradients are not finite, the step changed nothing (loss {loss.item()}).")
            return False
        step, sequences, skipped = position.step, position.sequences, position.skipped
        diverged = (
            f"the loss is {loss.item()} at step {step}: training diverged. Earlier checkpoints are kept. "
            "Lower --learning-rate, or try --precision float32."
        )
        if not self.hooks.on_rollback():
            raise GroundupError(diverged)
        guard.rollbacks = 1 if self.position.step > guard.restored else guard.rollbacks + 1
        guard.restored = self.position.step
        if guard.rollbacks > MOST_ROLLBACKS:
            raise GroundupError(diverged)
        guard.in_a_row = torch.zeros_like(guard.in_a_row)
        seconds = self.position.seconds
        self.position.sequences, self.position.skipped = sequences, skipped
        warn(
            f"step {step}: the gradients of {in_a_row} steps in a row are not finite. Back to step "
            f"{self.position.step}; the text in between is passed over."
        )
        self._mark = (self.position.step, seconds)
        self.model.train()
        return True

    # ---- how long

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
        if self.world.size > 1:  # the clocks of ranks differ: all go by the mean
            elapsed = float(sum_over_ranks(self.world, torch.tensor(elapsed, device=self._device)).item())
            elapsed /= self.world.size
        marked_step, marked_seconds = self._mark
        if elapsed - marked_seconds < seconds / MILESTONES or step - marked_step < 3:
            return
        pace = (elapsed - marked_seconds) / (step - marked_step)
        self._mark = (step, elapsed)
        left = seconds - elapsed
        if self.horizon is None:
            if left > self.optim.falling * seconds and left > seconds / MILESTONES:
                return
        elif abs((self.horizon.steps - step) * pace - left) <= TIME_TOLERANCE * seconds:
            return
        # However late it is, the decay gets a fiftieth of the steps made so far: an abrupt end would waste them.
        steps = step + max(1, step // 50, round(left / pace))
        horizon = Horizon(steps, step, learning_rate_factor(step, self.optim, self.horizon))
        self.hooks.on_horizon(horizon)
        self.horizon = horizon

    def _should_log(self) -> bool:
        step = self.position.step
        return step % self.settings.log_every == 0 or step == 1 or self.ended

    def _log(self, loss: Tensor, gradient_norm: Tensor, metrics: Metrics) -> None:
        settings, position = self.settings, self.position
        names = sorted(metrics)
        values = torch.stack([loss, *(torch.as_tensor(metrics[name], device=self._device) for name in names)])
        value, *others = sum_over_ranks(self.world, values).tolist()
        pace = self._speed.seconds_per_step()
        speed = settings.batch_tokens / (pace or math.inf)
        row = {
            "kind": "train",
            "step": position.step,
            "tokens": position.tokens,
            "seconds": round(position.seconds, 3),
            "loss": value,
            **dict(zip(names, others, strict=True)),
            "tokens_per_second": round(speed, 1),
            "learning_rate": max(group["lr"] for group, _ in self._groups),
            "grad_norm": gradient_norm.item(),
        }
        if settings.flops_per_token and settings.peak_flops:
            row["mfu"] = round(speed * settings.flops_per_token / (settings.peak_flops * self.world.size), 4)
        row["memory_bytes"] = memory_peak(self._device)
        if self.horizon is not None:
            row["seconds_left"] = round(pace * (self.horizon.steps - position.step), 1)
        if position.skipped:
            row["skipped_steps"] = position.skipped
        self.hooks.on_log(row)

    def _at_milestone(self) -> bool:
        position = self.position
        if self.settings.save_every is not None:
            return position.step % self.settings.save_every == 0
        if self.horizon is not None:
            return position.step - position.saved_step >= self.horizon.steps / MILESTONES
        assert self.settings.seconds is not None
        seconds = position.seconds - position.saved_seconds
        if self.world.size > 1:
            seconds = float(sum_over_ranks(self.world, torch.tensor(seconds, device=self._device)) / self.world.size)
        return seconds >= self.settings.seconds / MILESTONES

    def _at_evaluation(self) -> bool:
        every = self.settings.eval_every
        return every is not None and self.position.step % every == 0

    def _pass(self, kind: Milestone) -> None:
        if kind != "evaluation":
            self.position.saved_step, self.position.saved_seconds = self.position.step, self.position.seconds
        self.hooks.on_milestone(kind)
        self.model.train()
        self._tick(count=False)  # what the milestone took belongs to the run's time, not to the speed of its steps

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
