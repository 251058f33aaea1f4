"""From a recipe to a trained model: prepare, plan, train, save; and the same again after a crash."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from groundup.config import Given, build
from groundup.data import PreparedData, TokenLoader, prepare
from groundup.model import Transformer, explain, fastest_backend
from groundup.optim import build_optimizers
from groundup.report import MetricsWriter, add_samples, truncate_metrics, truncate_samples
from groundup.runtime import GroundupError, Progress, progress, say, write_json
from groundup.runtime.console import byte_size, clock, flop_rate, quantity
from groundup.runtime.device import Precision, choose_device, choose_precision, matmul_flops
from groundup.runtime.environment import describe_environment
from groundup.runtime.files import folder_lock
from groundup.runtime.interrupt import stop_on_signals
from groundup.runtime.seeds import rng_state, seed_everything, set_rng_state
from groundup.tokenizer import Tokenizer
from groundup.training.checkpoint import Checkpoints, Restored, restore_optimizers
from groundup.training.loop import Loop, LoopSettings, Milestone, Position
from groundup.training.objectives import next_token
from groundup.training.recipe import PretrainRecipe
from groundup.training.run import RunFolder, resolved, resume_values, settle_length
from groundup.training.scaling import (
    EFFICIENCY,
    Budget,
    Derived,
    Facts,
    derive,
    run_budget,
    vocabulary_limit,
    without_open_shape,
)


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


_PLAN = {  # what the plan shows, by section
    "model": [f"model.{key}" for key in ("n_layer", "n_embd", "n_head", "vocab_size", "context_length", "dropout")],
    "training": [
        "optim.learning_rate",
        "optim.warmup_steps",
        "batch_tokens",
        "micro_batch",
        "max_steps",
        "precision",
        "attention",
    ],
}


@dataclass(frozen=True)
class Pretraining:
    """A run that is ready to train, or has been trained.

    Args:
        run: its folder.
        recipe: every key resolved.
        derived: the values nobody gave, with their reasons.
        prepared: text and tokenizer.
        budget: time or compute it may spend.
        device: where it runs.
        flops_per_second: measured speed of matrix products there.
        finished: the horizon has been reached.
        trained: steps were made in this sitting.
    """

    run: RunFolder
    recipe: PretrainRecipe
    derived: list[Derived]
    prepared: PreparedData
    budget: Budget
    device: torch.device
    flops_per_second: float
    finished: bool = False
    trained: bool = False
    values: dict[str, Any] = field(default_factory=dict)

    def plan_rows(self) -> list[dict[str, Any]]:
        """The plan as rows of section, key, value and why: what the model is, what it costs, what was derived."""
        costs = explain(self.recipe.model, self.recipe.micro_batch or 1)
        reasons = {entry.key: entry.why for entry in self.derived}
        speed = self.flops_per_second * EFFICIENCY / costs.training_flops_per_token
        rows: list[dict[str, Any]] = []

        def add(section: str, key: str, value: Any, why: str) -> None:
            rows.append({"section": section, "key": key, "value": value, "why": why})

        for section, keys in _PLAN.items():
            for key in keys:
                if self.values.get(key) is not None:
                    add(section, key.rsplit(".", 1)[-1], self.values[key], reasons.get(key, "given"))
        matmul = flop_rate(self.flops_per_second)
        add("cost", "parameters", quantity(costs.total_parameters), "counted; a tied head once")
        formula = "6 x matrix parameters + 12 x layers x width x context (Chowdhery et al. 2022, appendix B)"
        add("cost", "FLOPs per token", quantity(costs.training_flops_per_token), formula)
        add("cost", "memory", byte_size(costs.training_bytes), "float32 weights, gradients, moments; activations")
        add(
            "cost", "tokens/s", quantity(speed), f"expected: {EFFICIENCY:.0%} of the {matmul} measured on {self.device}"
        )
        if (expected := self.expected_seconds()) is not None:
            add("cost", "time", clock(expected), "the budget" if self.budget.seconds else "the steps at that speed")
        return rows

    def expected_seconds(self) -> float | None:
        """How long training will take."""
        if self.budget.seconds is not None:
            return self.budget.seconds
        costs = explain(self.recipe.model)
        tokens = (self.recipe.max_steps or 0) * (self.recipe.batch_tokens or 0)
        return (
            tokens * costs.training_flops_per_token / (self.flops_per_second * EFFICIENCY)
            if self.flops_per_second
            else None
        )


def plan_pretraining(given: Given) -> Pretraining:
    """Prepare the text and settle everything that was left open; write recipe, plan and environment into the run
    folder.

    Raises:
        GroundupError: the recipe contradicts itself, the text cannot be read, the folder cannot be written or holds
            another run.
    """
    given = settle_length(given)
    # Names, types and contradictions, before any work is done.
    defaults = build(PretrainRecipe, without_open_shape(given.values), given.sources)
    run = RunFolder(Path(defaults.out))
    before = resume_values(run, given, trained=bool(Checkpoints(run.checkpoints).all()))
    derived_before = run.derived(given) if before else []
    given = before or given
    recipe = build(PretrainRecipe, without_open_shape(given.values), given.sources)
    budget = run_budget(given.values)
    device = choose_device(recipe.device)
    precision = choose_precision(recipe.precision, device, width=int(given.values.get("model.n_embd") or 256))
    speed = matmul_flops(device, precision)
    with folder_lock(run.path, "working"):
        prepared = _prepare(recipe, run, vocabulary_limit(given.values, speed, budget))
    facts = Facts(prepared.train.n_tokens, prepared.tokenizer.vocab_size, speed)
    plan = derive(given.values, facts, budget)
    plan.fill("tokenizer.vocab_size", prepared.tokenizer.vocab_size, "by the text's size and the model's")
    plan.derived = [*derived_before, *plan.derived]
    if recipe.precision == "auto":
        plan.derived.append(Derived("precision", precision, "measured: the faster of float32 and bfloat16 here"))
    recipe = build(PretrainRecipe, plan.values | {"precision": precision, "device": str(device)}, given.sources)
    attention = recipe.attention
    if attention == "auto":
        dtype = getattr(torch, precision)
        attention = fastest_backend(recipe.model, recipe.micro_batch or 1, device, dtype)
        plan.derived.append(Derived("attention", attention, "measured: the faster backend here"))
    recipe = replace(recipe, attention=attention)
    values = resolved(recipe, plan.values)
    pretraining = Pretraining(run, recipe, plan.derived, prepared, budget, device, speed, values=values)
    run.save_recipe(values, plan.derived)
    run.save_plan(pretraining.plan_rows(), plan.derived)
    write_json(
        run.path / "environment.json",
        describe_environment() | {"device": str(device), "precision": precision},
    )
    return pretraining


def _prepare(recipe: PretrainRecipe, run: RunFolder, max_vocab_size: int) -> PreparedData:
    """The run's text, prepared into its folder.

    A run that has trained goes on with the text it began with, whatever has become of the source.
    """
    if Checkpoints(run.checkpoints).all():
        return PreparedData.open(run.data, verify=True)
    return prepare(
        recipe.data,
        run.data,
        vocab_size=recipe.tokenizer.vocab_size,
        max_vocab_size=max_vocab_size,
        pattern=recipe.tokenizer.pattern,
        tokenizer=Tokenizer.load(recipe.tokenizer.path) if recipe.tokenizer.path else None,
        corpus=recipe.corpus,
        data_dir=Path(recipe.data_dir) if recipe.data_dir else None,
        limit=recipe.limit,
        seed=recipe.seed,
    )


def pretrain(pretraining: Pretraining, hooks: Hooks) -> tuple[Transformer, Pretraining]:
    """Train, or go on where the run stopped.

    Returns:
        The trained model, and the run, ``finished`` unless somebody stopped it.

    Raises:
        GroundupError: another process trains here, the checkpoints are damaged, the loss is not finite, or the disk is
            full.
    """
    with folder_lock(pretraining.run.path, "working"):
        return _Sitting(pretraining, hooks).train()


class _Sitting:
    """One process's part in a run: from start or checkpoint to the end or a stop."""

    def __init__(self, pretraining: Pretraining, hooks: Hooks) -> None:
        self.it, self.hooks = pretraining, hooks
        recipe, device = pretraining.recipe, pretraining.device
        self.checkpoints = Checkpoints(pretraining.run.checkpoints, recipe.keep)
        restored = self.checkpoints.newest()
        seed_everything(recipe.seed)
        self.model = Transformer(recipe.model).to(device)
        if recipe.attention != "auto":
            self.model.backend = recipe.attention
        precision: Precision = "float32" if recipe.precision == "auto" else recipe.precision
        self.optimizers = build_optimizers(self.model, recipe.optim, getattr(torch, precision))
        self.position = Position()
        run = pretraining.run
        if restored is not None:
            self._restore(restored)
        else:
            run.forget_horizon()
        # What was recorded after the checkpoint, or before the first one, will be recorded again.
        truncate_metrics(run.metrics, self.position.step)
        truncate_samples(run.path, self.position.step)
        self.sequences = recipe.micro_batch or 1
        tokens_per_micro_batch = self.sequences * recipe.model.context_length
        batch_tokens = recipe.batch_tokens or tokens_per_micro_batch
        if batch_tokens % tokens_per_micro_batch:
            raise GroundupError(
                f"batch_tokens = {batch_tokens} is not a multiple of micro_batch x context_length = "
                f"{self.sequences} x {recipe.model.context_length} = {tokens_per_micro_batch}."
            )
        self.settings = LoopSettings(
            batch_tokens=batch_tokens,
            accumulate=batch_tokens // tokens_per_micro_batch,
            max_steps=recipe.max_steps,
            seconds=pretraining.budget.seconds,
            log_every=recipe.log_every,
            save_every=recipe.save_every,
            precision=precision,
        )
        self.loader = TokenLoader(pretraining.prepared.train, recipe.model.context_length, self.sequences, recipe.seed)
        train = pretraining.prepared.train
        self.bits_per_nat_and_byte = train.n_tokens / train.n_bytes / math.log(2)
        self.progress: Progress | None = None
        self.eval_note = ""

    def _restore(self, restored: Restored) -> None:
        self.model.load_state_dict(restored.weights)
        restore_optimizers(self.model, self.optimizers, restored.tensors, restored.folder)
        set_rng_state(restored.state["rng"])
        self.position = Position(**restored.state["position"])
        say(f"Resuming from {restored.folder} (step {self.position.step:,}).")

    def train(self) -> tuple[Transformer, Pretraining]:
        recipe, run = self.it.recipe, self.it.run
        model = torch.compile(self.model) if recipe.compile else self.model
        loop = Loop(
            model,  # type: ignore[arg-type]
            next_token,
            self.batch,
            self.optimizers,
            recipe.optim,
            self.settings,
            on_log=self.log,
            on_milestone=self.milestone,
            on_horizon=run.save_horizon,
            position=self.position,
            decided=run.horizons(),
        )
        self.loop = loop
        if loop.horizon is not None and self.position.step >= loop.horizon.steps:
            return self.model, replace(self.it, finished=True)
        run.forget_evaluation()
        with (
            MetricsWriter(run.metrics) as self.metrics,
            progress("training", total=1.0) as self.progress,
            stop_on_signals() as stop,
        ):
            ended = loop.run(stop)
        return self.model, replace(self.it, finished=ended == "final", trained=True)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """One micro-batch on the device."""
        inputs, targets = self.loader.batch(index)
        return (
            torch.from_numpy(inputs).to(self.it.device, non_blocking=True),
            torch.from_numpy(targets).to(self.it.device, non_blocking=True),
        )

    def log(self, row: dict[str, Any]) -> None:
        """Write a row of metrics and show it."""
        row["bits_per_byte"] = row["loss"] * self.bits_per_nat_and_byte
        self.metrics.write(row)
        assert self.progress is not None
        speed = quantity(row["tokens_per_second"])
        note = f"loss {row['loss']:.3f}  {row['bits_per_byte']:.3f} bits/byte  {speed} tok/s{self.eval_note}"
        self.progress.update(self.loop.fraction(), note)

    def milestone(self, kind: Milestone) -> None:
        """Evaluate, sample and save."""
        step = self.position.step
        found = self.hooks.evaluate(self.model, self.it)
        self.metrics.write(
            {
                "kind": "eval",
                "step": step,
                "tokens": self.position.tokens,
                "seconds": round(self.position.seconds, 3),
                "loss": found.loss,
                "bits_per_byte": found.bits_per_byte,
            }
        )
        self.eval_note = f"  held-out {found.bits_per_byte:.3f}"
        if self.progress is not None:
            self.progress.update(self.loop.fraction())
        add_samples(self.it.run.path, self.hooks.sample(self.model, self.it, step))
        best = found.loss < self.position.best_loss
        self.position.best_loss = min(found.loss, self.position.best_loss)
        state = {
            "step": step,
            "position": vars(self.position).copy(),
            "rng": rng_state(),
            "loader": self.loader.state(step * self.settings.accumulate),
        }
        self.checkpoints.save(self.model, self.it.prepared.tokenizer, self.optimizers, state, best=best)
