"""One process's part in a run of any kind: from start or checkpoint to the end or a stop."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic

from torch import Tensor, nn

from groundup.data import Loader, Prefetcher
from groundup.optim import Horizon, LossScale, WeightAverage, build_optimizers
from groundup.optim.groups import freeze
from groundup.report import open_trackers
from groundup.report.tracking import Trackers
from groundup.runtime import GroundupError, Progress, progress, say
from groundup.runtime.console import quantity
from groundup.runtime.device import activation_dtype
from groundup.runtime.files import folder_lock
from groundup.runtime.interrupt import stop_on_signals
from groundup.runtime.monitor import HardwareMonitor
from groundup.runtime.process_group import barrier
from groundup.runtime.seeds import rng_state, seed_everything, set_rng_state
from groundup.training.checkpoint import Checkpoints, Restored, restore_optimizers
from groundup.training.checkpoint_state import OWN
from groundup.training.job import Job, M
from groundup.training.loop import Loop
from groundup.training.loop_parts import Extras, LoopHooks, LoopSettings, Milestone, Position
from groundup.training.parallel import Stepper, compile_blocks, load_full, settle_way, spread
from groundup.training.profile import StepProfiler


@dataclass(frozen=True)
class Outcome:
    """How a sitting ended.

    Args:
        finished: the run is at its end; otherwise somebody stopped it, and it has been saved.
        trained: steps were made.
    """

    finished: bool
    trained: bool


def train(job: Job[M]) -> tuple[M, Outcome]:
    """Train, or go on where the run stopped.

    Returns:
        The trained model, and how it ended.

    Raises:
        GroundupError: another process trains here, the checkpoints are damaged, the loss is not finite, or the disk is
            full.
    """
    with ExitStack() as held:
        if job.world.is_main:
            held.enter_context(folder_lock(job.run.path, "working"))
        sitting = Sitting(job)
        return sitting.model, sitting.train()


class Sitting(LoopHooks, Generic[M]):
    """Model, optimizers and data of a job, brought to where the run stopped; and what happens around its loop.

    Whoever makes one holds the run folder's lock: see :func:`train`.

    Args:
        job: what is trained, on what and towards what.

    Raises:
        GroundupError: the checkpoints are damaged, or are not of this job.
    """

    def __init__(self, job: Job[M]) -> None:
        self.job, self.world = job, job.world
        recipe, run, world = job.recipe, job.run, job.world
        self.checkpoints = Checkpoints(run.checkpoints, recipe.keep, recipe.keep_every, world)
        restored = self.checkpoints.newest()
        seed_everything(recipe.seed)
        self.model = job.build(fresh=restored is None).to(job.device)
        freeze(self.model, recipe.optim)
        self.objective = job.objective()
        self.stepper: nn.Module = Stepper(self.model, self.objective)
        if recipe.compile:
            compile_blocks(self.model)
        self.stepper = spread(self.stepper, world, settle_way(recipe.parallel, world))
        self.optimizers = build_optimizers(self.model, recipe.optim, activation_dtype(job.precision))
        self.extras = Extras(
            WeightAverage(self.model, recipe.optim.average) if recipe.optim.average else None,
            LossScale(job.device) if job.precision == "float16" else None,
        )
        self.position = Position()
        if restored is not None:
            self._restore(restored)
            say(f"Resuming from {restored.folder} (step {self.position.step:,}).")
        elif world.is_main:
            run.forget_horizon()
        barrier(world)
        self.settings = settings = self._settings()
        per_step = settings.accumulate * world.size * settings.micro_batch
        samples = recipe.max_steps * per_step if recipe.max_steps else None
        self.loader: Loader | Prefetcher = job.loader(settings.micro_batch, samples)
        self.progress: Progress | None = None
        self.trackers: Trackers | None = None
        self.profiler: StepProfiler | None = None
        self.measured_note = ""

    def _settings(self) -> LoopSettings:
        job, recipe = self.job, self.job.recipe
        micro_batch = recipe.micro_batch or 1
        tokens_per_micro_batch = micro_batch * job.positions
        batch_tokens = recipe.batch_tokens or tokens_per_micro_batch * job.world.size
        return LoopSettings(
            batch_tokens=batch_tokens,
            accumulate=batch_tokens // (tokens_per_micro_batch * job.world.size),
            micro_batch=micro_batch,
            max_steps=recipe.max_steps,
            seconds=job.seconds,
            log_every=recipe.log_every,
            save_every=recipe.save_every,
            eval_every=recipe.eval_every,
            precision=job.precision,
            seed=recipe.seed,
            patience=recipe.patience,
            early_stop=recipe.early_stop,
            flops_per_token=job.flops_per_token,
            peak_flops=job.flops_per_second,
        )

    def _restore(self, restored: Restored) -> None:
        part, own = self.job.transformer(self.model), restored.extra.below(OWN)
        if own.keys() != self.job.own(self.model).keys() or (part is not None and not restored.weights):
            raise GroundupError(
                f"{restored.folder}: this checkpoint holds other weights than this run trains. Choose another --out."
            )
        if part is not None:
            load_full(part, restored.weights)
        load_full(self.model, own)
        restore_optimizers(self.model, self.optimizers, restored.tensors, restored.folder)
        self.extras.restore(restored.extra)
        set_rng_state(restored.state["rng"])
        saved = restored.state["position"]
        for key, value in saved.items():
            setattr(self.position, key, value)
        if "sequences" not in saved:  # a checkpoint from before they were counted
            self.position.sequences = self.position.tokens // self.job.positions

    def train(self) -> Outcome:
        """Run the loop to its end or a stop; nothing where it is at its end already.

        Raises:
            GroundupError: see :func:`train`.
        """
        recipe = self.job.recipe
        self.loop = loop = Loop(
            self.stepper,
            self.objective,
            self.batch,
            self.optimizers,
            recipe.optim,
            self.settings,
            self,
            position=self.position,
            decided=self.job.run.horizons(),
            extras=self.extras,
            world=self.world,
        )
        early = recipe.early_stop > 0 and self.position.stale >= recipe.early_stop
        if loop.ended or early:
            return Outcome(finished=True, trained=False)
        with ExitStack() as open_now:
            stop = open_now.enter_context(stop_on_signals())
            if isinstance(self.loader, Prefetcher):
                open_now.callback(lambda: self.loader.close())  # type: ignore[union-attr]
            if self.world.is_main:
                self._watch(open_now)
            try:
                ended = loop.run(stop)
            except BaseException:
                self.checkpoints.finish(quietly=True)
                raise
            self.checkpoints.finish()
        return Outcome(finished=ended in ("final", "early"), trained=True)

    def batch(self, index: int) -> Any:
        """One micro-batch on the device."""
        return self.job.on_device(self.loader.batch(index))

    def _watch(self, open_now: ExitStack) -> None:
        """Everything that looks on while rank 0 trains: trackers, the hardware monitor, the profiler, the bar."""
        recipe, run, position = self.job.recipe, self.job.run, self.position
        run.forget_evaluation()
        self.trackers = open_now.enter_context(
            open_trackers(recipe.track, run.path, run.path.resolve().name, self.job.values, step=position.step)
        )

        def where() -> dict[str, Any]:
            return {"step": position.step, "tokens": position.tokens, "seconds": round(self.loop.seconds, 3)}

        parent = os.getppid() if self.world.size > 1 else None
        monitor = HardwareMonitor(
            recipe.monitor_every, self.trackers.log, where=where, watts=recipe.watts,
            grams_per_kwh=recipe.grams_per_kwh, energy_joules=self.trackers.energy_joules, root_process=parent,
        )  # fmt: skip
        open_now.enter_context(monitor)
        self.profiler = open_now.enter_context(StepProfiler(recipe.profile, run.path, position=position.step))
        self.progress = open_now.enter_context(progress("training", total=1.0))

    # ---- what the loop calls

    def on_log(self, row: dict[str, Any]) -> None:
        """Write a row of metrics and show it."""
        if self.trackers is None:
            return
        row |= self.job.metrics(row)
        self.trackers.log(row)
        assert self.progress is not None
        speed = f"{quantity(row['tokens_per_second'])} tok/s"
        notes = (f"loss {row['loss']:.3f}", self.job.shown(row), speed, self.measured_note)
        self.progress.update(self.loop.fraction(), "  ".join(note for note in notes if note))

    def on_horizon(self, horizon: Horizon) -> None:
        """Note it, durably."""
        if self.world.is_main:
            self.job.run.save_horizon(horizon)

    def before_update(self) -> None:
        """A checkpoint that is still being written reads the weights."""
        self.checkpoints.settle()

    def after_step(self, step: int) -> None:
        """The profiler counts steps."""
        if self.profiler is not None:
            self.profiler.step(step)

    def on_milestone(self, kind: Milestone) -> None:
        """Evaluate, sample and save."""
        best = False
        if self.extras.average is not None:  # which is put in the weights' place, where a save may still be reading
            self.checkpoints.settle()
        if kind != "asked":
            with self._averaged():
                best = self._measure()
        if kind != "evaluation" or best:
            self._save(best)

    def on_rollback(self) -> bool:
        """Put everything back to the last checkpoint."""
        self.checkpoints.finish(quietly=True)
        restored = self.checkpoints.newest()
        if restored is None:
            return False
        for optimizer in self.optimizers.values():
            optimizer.state.clear()
        self._restore(restored)
        if self.trackers is not None:
            self.trackers.rewind(self.position.step)
        return True

    def on_out_of_memory(self) -> bool:
        """Deal half as many sequences at once, in the same order."""
        half = self.settings.micro_batch // 2
        self.settings = replace(self.settings, micro_batch=half, accumulate=2 * self.settings.accumulate)
        self.loader = self.loader.resized(half)
        return True

    def _measure(self) -> bool:
        """Evaluate and sample; whether the held-out loss has never been lower."""
        position, step = self.position, self.position.step
        found = self.job.measure(self.model)
        samples = self.job.samples(self.model, step)
        best = found.loss < position.best_loss
        position.best_loss, position.stale = min(found.loss, position.best_loss), 0 if best else position.stale + 1
        if self.trackers is not None:
            row = {"kind": "eval", "step": step, "tokens": position.tokens, "seconds": round(position.seconds, 3)}
            self.trackers.log(row | {"loss": found.loss, **found.metrics})
            self.measured_note = found.shown
            if self.progress is not None:
                self.progress.update(self.loop.fraction())
            self.trackers.samples(step, samples)
        return best

    def _save(self, best: bool) -> None:
        job, position = self.job, self.position
        part, own = job.transformer(self.model), job.own(self.model)
        average = {} if self.extras.average is None else self.extras.average.tensors
        state = {
            "step": position.step,
            "position": vars(position).copy(),
            "rng": rng_state(),
            "loader": self.loader.state(position.sequences // self.settings.micro_batch),
        }
        self.checkpoints.save(
            part, job.tokenizer, self.optimizers, state, best=best,
            extra=self.extras.tensors() | {f"{OWN}/{name}": tensor for name, tensor in own.items()},
            exported=_below(average, self.model, part) if average and part is not None else None,
            trained=self.model, beside=job.beside(self.model, {name: average.get(name, own[name]) for name in own}),
        )  # fmt: skip

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """While the block runs, the model has the averaged weights, where there are some."""
        if self.extras.average is None:
            yield
            return
        with self.extras.average.in_place():
            yield


def _below(tensors: Mapping[str, Tensor], model: nn.Module, part: nn.Module) -> dict[str, Tensor]:
    """Those of a model's tensors that are in a part of it, by their names there."""
    path = next(name for name, module in model.named_modules() if module is part)
    start = f"{path}." if path else ""
    return {name.removeprefix(start): one for name, one in tensors.items() if name.startswith(start)}
