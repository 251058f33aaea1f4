"""From a plan to a trained model: build, train, save; and the same again after a crash."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from groundup.data import Loader, Prefetcher, TokenBatch, make_loader
from groundup.model import Transformer, explain, load_model
from groundup.optim import Horizon, LossScale, WeightAverage, build_optimizers
from groundup.optim.groups import freeze
from groundup.report import open_trackers
from groundup.report.tracking import Trackers
from groundup.runtime import Progress, UsageError, progress, say
from groundup.runtime.console import quantity
from groundup.runtime.device import activation_dtype
from groundup.runtime.files import folder_lock
from groundup.runtime.interrupt import stop_on_signals
from groundup.runtime.monitor import HardwareMonitor
from groundup.runtime.process_group import World, barrier
from groundup.runtime.seeds import rng_state, seed_everything, set_rng_state
from groundup.training.checkpoint import Checkpoints, Restored, restore_optimizers
from groundup.training.loop import Loop
from groundup.training.loop_parts import Extras, LoopHooks, LoopSettings, Milestone, Position
from groundup.training.objectives import NextToken
from groundup.training.parallel import Stepper, compile_blocks, load_full, settle_way, spread
from groundup.training.plan import Pretraining, plan_pretraining
from groundup.training.profile import StepProfiler
from groundup.training.recipe import PretrainRecipe

__all__ = ["HeldOut", "Hooks", "Pretraining", "objective_of", "plan_pretraining", "pretrain"]


class HeldOut(Protocol):
    """What an evaluation on held-out text tells the run."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        ...

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte."""
        ...


@dataclass(frozen=True)
class Hooks:
    """What is called during a run; handed in from outside, so that training knows neither evaluation nor sampling.

    Args:
        evaluate: model and run to the loss on held-out text.
        sample: model, run and step to rows of :func:`groundup.report.add_samples`.
    """

    evaluate: Callable[[Transformer, Pretraining], HeldOut]
    sample: Callable[[Transformer, Pretraining, int], list[dict[str, Any]]]


def objective_of(recipe: PretrainRecipe) -> NextToken:
    """What a recipe wants learnt."""
    return NextToken(**asdict(recipe.loss))


def pretrain(pretraining: Pretraining, hooks: Hooks) -> tuple[Transformer, Pretraining]:
    """Train, or go on where the run stopped.

    Returns:
        The trained model, and the run, ``finished`` unless somebody stopped it.

    Raises:
        GroundupError: another process trains here, the checkpoints are damaged, the loss is not finite, or the disk is
            full.
    """
    with ExitStack() as held:
        if pretraining.world.is_main:
            held.enter_context(folder_lock(pretraining.run.path, "working"))
        return _Sitting(pretraining, hooks).train()


class _Sitting(LoopHooks):
    """One process's part in a run: from start or checkpoint to the end or a stop."""

    def __init__(self, pretraining: Pretraining, hooks: Hooks) -> None:
        self.it, self.hooks = pretraining, hooks
        recipe, device, world = pretraining.recipe, pretraining.device, pretraining.world
        self.world: World = world
        self.checkpoints = Checkpoints(pretraining.run.checkpoints, recipe.keep, recipe.keep_every, world)
        restored = self.checkpoints.newest()
        seed_everything(recipe.seed)
        self.model = self._build().to(device)
        freeze(self.model, recipe.optim)
        self.stepper: nn.Module = Stepper(self.model, objective_of(recipe))
        if recipe.compile:
            compile_blocks(self.model)
        self.stepper = spread(self.stepper, world, settle_way(recipe.parallel, world))
        self.optimizers = build_optimizers(self.model, recipe.optim, activation_dtype(pretraining.precision))
        self.extras = Extras(
            WeightAverage(self.model, recipe.optim.average) if recipe.optim.average else None,
            LossScale(device) if pretraining.precision == "float16" else None,
        )
        self.position = Position()
        run = pretraining.run
        if restored is not None:
            self._restore(restored)
            say(f"Resuming from {restored.folder} (step {self.position.step:,}).")
        elif world.is_main:
            run.forget_horizon()
        barrier(world)
        self.sequences = recipe.micro_batch or 1
        tokens_per_micro_batch = self.sequences * recipe.model.context_length
        batch_tokens = recipe.batch_tokens or tokens_per_micro_batch * world.size
        costs = explain(recipe.model)
        self.settings = LoopSettings(
            batch_tokens=batch_tokens,
            accumulate=batch_tokens // (tokens_per_micro_batch * world.size),
            micro_batch=self.sequences,
            max_steps=recipe.max_steps,
            seconds=pretraining.budget.seconds,
            log_every=recipe.log_every,
            save_every=recipe.save_every,
            eval_every=recipe.eval_every,
            precision=pretraining.precision,
            seed=recipe.seed,
            patience=recipe.patience,
            early_stop=recipe.early_stop,
            flops_per_token=costs.training_flops_per_token,
            peak_flops=pretraining.flops_per_second,
        )
        self.loader: Loader | Prefetcher = self._loader()
        train = pretraining.prepared.train
        self.bits_per_nat_and_byte = train.n_tokens / train.n_bytes / math.log(2)
        self.progress: Progress | None = None
        self.trackers: Trackers | None = None
        self.profiler: StepProfiler | None = None
        self.eval_note = ""

    def _build(self) -> Transformer:
        recipe = self.it.recipe
        if recipe.init_from is not None and not self.checkpoints.all():
            from groundup.inference import find_model

            model = load_model(find_model(recipe.init_from))
            model = _with_config(model, recipe)
        else:
            model = Transformer(recipe.model)
        if recipe.attention != "auto":
            model.backend = recipe.attention
        if recipe.checkpointing != "auto":
            model.checkpointing = recipe.checkpointing
        return model

    def _loader(self) -> Loader | Prefetcher:
        recipe, size = self.it.recipe, self.settings.micro_batch
        per_step = self.settings.accumulate * self.world.size * size
        loader = make_loader(
            self.it.sets or self.it.prepared.train,
            recipe.loader,
            recipe.model.context_length,
            size,
            recipe.seed,
            recipe.max_steps * per_step if recipe.max_steps else None,
            tokenizer=self.it.prepared.tokenizer,
            vocab_size=recipe.model.vocab_size,
        )
        if recipe.loader.packing == "best_fit":
            report = loader.report()
            padding, cut = report["padding"], report["documents_cut"]
            say(f"  Packing: {padding:.2%} of positions are padding; {cut:,} documents were cut.")
        return Prefetcher(loader, recipe.loader.prefetch, self.world.size) if recipe.loader.prefetch else loader

    def _restore(self, restored: Restored) -> None:
        load_full(self.model, restored.weights)
        restore_optimizers(self.model, self.optimizers, restored.tensors, restored.folder)
        self.extras.restore(restored.extra)
        set_rng_state(restored.state["rng"])
        saved = restored.state["position"]
        for key, value in saved.items():
            setattr(self.position, key, value)
        if "sequences" not in saved:  # a checkpoint from before they were counted
            self.position.sequences = self.position.tokens // self.it.recipe.model.context_length

    def train(self) -> tuple[Transformer, Pretraining]:
        recipe, run = self.it.recipe, self.it.run
        self.loop = loop = Loop(
            self.stepper,
            objective_of(recipe),
            self.batch,
            self.optimizers,
            recipe.optim,
            self.settings,
            self,
            position=self.position,
            decided=run.horizons(),
            extras=self.extras,
            world=self.world,
        )
        early = recipe.early_stop > 0 and self.position.stale >= recipe.early_stop
        if loop.ended or early:
            return self.model, replace(self.it, finished=True)
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
        return self.model, replace(self.it, finished=ended in ("final", "early"), trained=True)

    def batch(self, index: int) -> TokenBatch:
        """One micro-batch on the device."""
        found = self.loader.batch(index)
        return TokenBatch(
            *(
                None if part is None else torch.from_numpy(part).to(self.it.device, non_blocking=True)
                for part in TokenBatch(*found)
            )
        )

    def _watch(self, open_now: ExitStack) -> None:
        """Everything that looks on while rank 0 trains: trackers, the hardware monitor, the profiler, the bar."""
        recipe, run, position = self.it.recipe, self.it.run, self.position
        run.forget_evaluation()
        self.trackers = open_now.enter_context(
            open_trackers(recipe.track, run.path, run.path.resolve().name, self.it.values, step=position.step)
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
        row["bits_per_byte"] = row.get("cross_entropy", row["loss"]) * self.bits_per_nat_and_byte
        self.trackers.log(row)
        assert self.progress is not None
        speed = quantity(row["tokens_per_second"])
        note = f"loss {row['loss']:.3f}  {row['bits_per_byte']:.3f} bits/byte  {speed} tok/s{self.eval_note}"
        self.progress.update(self.loop.fraction(), note)

    def on_horizon(self, horizon: Horizon) -> None:
        """Note it, durably."""
        if self.world.is_main:
            self.it.run.save_horizon(horizon)

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
        found = self.hooks.evaluate(self.model, self.it)
        samples = self.hooks.sample(self.model, self.it, step)
        best = found.loss < position.best_loss
        position.best_loss, position.stale = min(found.loss, position.best_loss), 0 if best else position.stale + 1
        if self.trackers is not None:
            row = {"kind": "eval", "step": step, "tokens": position.tokens, "seconds": round(position.seconds, 3)}
            self.trackers.log(row | {"loss": found.loss, "bits_per_byte": found.bits_per_byte})
            self.eval_note = f"  held-out {found.bits_per_byte:.3f}"
            if self.progress is not None:
                self.progress.update(self.loop.fraction())
            self.trackers.samples(step, samples)
        return best

    def _save(self, best: bool) -> None:
        position = self.position
        exported = None if self.extras.average is None else self.extras.average.tensors
        state = {
            "step": position.step,
            "position": vars(position).copy(),
            "rng": rng_state(),
            "loader": self.loader.state(position.sequences // self.settings.micro_batch),
        }
        self.checkpoints.save(
            self.model, self.it.prepared.tokenizer, self.optimizers, state, best=best, extra=self.extras.tensors(),
            exported=exported,
        )  # fmt: skip

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """While the block runs, the model has the averaged weights, where there are some."""
        if self.extras.average is None:
            yield
            return
        with self.extras.average.in_place():
            yield


def _with_config(model: Transformer, recipe: PretrainRecipe) -> Transformer:
    """The same weights under the recipe's config: a longer context, other frequencies, other dropout."""
    if recipe.model == model.config:
        return model
    fresh = Transformer(recipe.model)
    try:
        fresh.load_state_dict(model.state_dict())
    except RuntimeError as error:
        what = str(error).splitlines()[-1].strip()
        raise UsageError(
            f"init_from = {recipe.init_from}: its weights do not fit the recipe's model: {what}"
        ) from error
    return fresh
