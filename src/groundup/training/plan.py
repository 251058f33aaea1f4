"""What a run will do, settled before it starts: the text prepared, every open key derived, trials made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from groundup.config import Given, build
from groundup.data import SENTINEL_TOKENS, PreparedData, TokenSet, prepare
from groundup.model import ModelConfig, explain, fastest_backend
from groundup.model.memory import loss_chunk
from groundup.report import check_trackers
from groundup.runtime import GroundupError, UsageError, read_json, warn, write_json
from groundup.runtime.console import byte_size, clock, flop_rate, quantity
from groundup.runtime.device import (
    Precision,
    activation_dtype,
    choose_device,
    choose_precision,
    keep_freed_memory,
    matmul_flops,
)
from groundup.runtime.files import folder_lock
from groundup.runtime.process_group import World, first_decides
from groundup.tokenizer import Tokenizer
from groundup.training.checkpoint import Checkpoints
from groundup.training.parallel import settle_way
from groundup.training.profile import parse_steps
from groundup.training.recipe import FIXED, PretrainRecipe
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
from groundup.training.trials import fit, worth_compiling

_PLAN = {  # what the plan shows, by section
    "model": [f"model.{key}" for key in ("n_layer", "n_embd", "n_head", "vocab_size", "context_length", "dropout")],
    "training": [
        "optim.optimizer",
        "optim.learning_rate",
        "optim.warmup_steps",
        "batch_tokens",
        "micro_batch",
        "max_steps",
        "precision",
        "attention",
        "checkpointing",
        "compile",
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
        world: the processes it runs on.
        sets: the training parts of several texts by name; empty where there is one.
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
    world: World = field(default_factory=World)
    sets: dict[str, TokenSet] = field(default_factory=dict)
    finished: bool = False
    trained: bool = False
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def precision(self) -> Precision:
        """What the forward pass runs in."""
        return "float32" if self.recipe.precision == "auto" else self.recipe.precision

    def plan_rows(self) -> list[dict[str, Any]]:
        """The plan as rows of section, key, value and why: what the model is, what it costs, what was derived."""
        costs = explain(self.recipe.model, self.recipe.micro_batch or 1, **_memory_options(self))
        reasons = {entry.key: entry.why for entry in self.derived}
        speed = self.world.size * self.flops_per_second * EFFICIENCY / costs.training_flops_per_token
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
        speed = self.world.size * self.flops_per_second * EFFICIENCY
        return tokens * costs.training_flops_per_token / speed if speed else None


def _memory_options(it: Pretraining) -> dict[str, Any]:
    """What :func:`explain` needs to know of a run to say how much memory it takes."""
    return {
        "activation_dtype_bytes": activation_dtype(it.precision).itemsize,
        "optimizer": it.recipe.optim.optimizer,
        "checkpointing": "none" if it.recipe.checkpointing == "auto" else it.recipe.checkpointing,
        "loss_chunk": it.recipe.loss.chunk or loss_chunk(it.recipe.model.vocab_size),
    }


def plan_pretraining(given: Given, world: World | None = None) -> Pretraining:
    """Prepare the text and settle everything that was left open; write recipe, plan and environment into the run
    folder. Of several processes the first one does it, and the others take its word.

    Raises:
        GroundupError: the recipe contradicts itself, the text cannot be read, the folder cannot be written or holds
            another run.
    """
    here = world or World()
    keep_freed_memory()  # before anything is measured
    return first_decides(here, lambda: _plan(given, here), _to_tell, lambda told: _as_told(told, given, here))


def _to_tell(planned: Pretraining) -> dict[str, Any]:
    return {
        "values": planned.values,
        "derived": [asdict(entry) for entry in planned.derived],
        "data": str(planned.prepared.folder),
        "sets": {name: str(part.folder) for name, part in planned.sets.items()},
        "budget": asdict(planned.budget),
        "flops": planned.flops_per_second,
    }


def _as_told(told: Mapping[str, Any], given: Given, world: World) -> Pretraining:
    recipe = build(PretrainRecipe, told["values"], given.sources)
    return Pretraining(
        RunFolder(Path(recipe.out)), recipe, [Derived(**one) for one in told["derived"]],
        PreparedData.open(Path(told["data"])), Budget(**told["budget"]), device_of(recipe.device, world),
        told["flops"], world, {name: TokenSet.open(Path(folder)) for name, folder in told["sets"].items()},
        values=dict(told["values"]),
    )  # fmt: skip


def device_of(request: str, world: World) -> torch.device:
    """The device of this process: of several on one machine each has a GPU of its own."""
    device = choose_device(request)
    if world.size > 1 and device.type == "cuda":
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    return device


def _plan(given: Given, world: World) -> Pretraining:
    given = settle_length(given)
    fixed = given.values.get("micro_batch") is not None  # by this command; what a run came to before may change
    # Names, types and contradictions, before any work is done.
    defaults = build(PretrainRecipe, without_open_shape(given.values), given.sources)
    check_trackers(defaults.track)
    if defaults.profile is not None:
        parse_steps(defaults.profile)
    run = RunFolder(Path(defaults.out))
    trained = bool(Checkpoints(run.checkpoints).all())
    before = resume_values(run, given, PretrainRecipe, FIXED, trained=trained)
    derived_before = run.derived(given) if before else []
    given = before or _with_model_of(given)
    recipe = build(PretrainRecipe, without_open_shape(given.values), given.sources)
    budget = run_budget(given.values)
    device = device_of(recipe.device, world)
    precision = choose_precision(recipe.precision, device, width=int(given.values.get("model.n_embd") or 256))
    speed = matmul_flops(device, precision)
    with folder_lock(run.path, "working"):
        prepared, sets = _prepare_all(recipe, run, vocabulary_limit(given.values, speed, budget))
    tokens = sum(part.n_tokens for part in sets.values()) or prepared.train.n_tokens
    _note_text(run, prepared)
    facts = Facts(tokens, prepared.tokenizer.vocab_size, speed * world.size)
    plan = derive(given.values, facts, budget)
    plan.fill("tokenizer.vocab_size", prepared.tokenizer.vocab_size, "by the text's size and the model's")
    plan.derived = [*derived_before, *plan.derived]
    if recipe.precision == "auto":
        plan.derived.append(Derived("precision", precision, "measured: the faster of float32 and bfloat16 here"))
    recipe = build(PretrainRecipe, plan.values | {"precision": precision, "device": device.type}, given.sources)
    if tokens < (recipe.batch_tokens or 0):
        warn(
            f"{prepared.folder}: {tokens:,} tokens of text are fewer than a step reads (batch_tokens = "
            f"{recipe.batch_tokens:,}), so that each step reads some of it again. Give more text, or a smaller batch."
        )
    settled: dict[str, Any] = {"parallel": "auto" if world.size == 1 else settle_way(recipe.parallel, world)}
    micro_batch, checkpointing, why = fit(
        recipe.model, recipe, device, precision, world, fixed=fixed, chunk=recipe.loss.chunk
    )
    if micro_batch != recipe.micro_batch:
        plan.derived = [entry for entry in plan.derived if entry.key != "micro_batch"]
        plan.derived.append(Derived("micro_batch", micro_batch, f"what fits: {why}"))
    if checkpointing != recipe.checkpointing:
        plan.derived.append(Derived("checkpointing", checkpointing, why))
    settled |= {"micro_batch": micro_batch, "checkpointing": checkpointing}
    if recipe.attention == "auto":
        settled["attention"] = fastest_backend(recipe.model, micro_batch, device, activation_dtype(precision))
        plan.derived.append(Derived("attention", settled["attention"], "measured: the faster backend here"))
    recipe = replace(recipe, **settled)
    if device.index is not None and world.size == 1:
        recipe = replace(recipe, device=str(device))
    pretraining = Pretraining(run, recipe, plan.derived, prepared, budget, device, speed, world, sets)
    if recipe.compile is None:
        compiled, why = worth_compiling(pretraining)
        plan.derived.append(Derived("compile", compiled, why))
        pretraining = replace(pretraining, recipe=replace(recipe, compile=compiled))
    values = resolved(pretraining.recipe, plan.values)
    pretraining = replace(pretraining, values=values)
    run.save_recipe(values, plan.derived)
    run.save_plan(pretraining.plan_rows(), plan.derived)
    run.save_environment(str(device), precision, world.size)
    return pretraining


def _with_model_of(given: Given) -> Given:
    """The given values over the shape of the model to go on from, where there is one.

    Raises:
        UsageError: another shape was given.
    """
    name = given.values.get("init_from")
    if name is None:
        return given
    from groundup.config import flatten, keys_of
    from groundup.inference import find_model
    from groundup.model import read_config

    folder = find_model(name)
    config: ModelConfig = read_config(folder)
    of_model = {f"model.{k}": v for k, v in flatten(asdict(config), keys_of(ModelConfig)).items()}
    free = ("model.context_length", "model.dropout", "model.rope_theta", "model.rope_scaling.", "model.sliding_window")
    for key, value in given.values.items():
        if key in of_model and value != of_model[key] and not key.startswith(free):
            raise UsageError(f"{key} = {value}, but the model of init_from = {name} has {of_model[key]}. Leave it out.")
    values = of_model | dict(given.values)
    values.setdefault("tokenizer.path", str(folder))
    return Given(values, given.sources)


_NAMED = re.compile(r"\s*([A-Za-z_]\w*)=([^,]+)")


def named_texts(data: str) -> dict[str, str]:
    """The texts of ``name=source, name=source``; none where ``data`` is one source.

    Raises:
        UsageError: a name is there twice.
    """
    parts = [_NAMED.fullmatch(part) for part in data.split(",")]
    if not all(parts) or Path(data).exists():
        return {}
    pairs = [(part[1], part[2].strip()) for part in parts if part is not None]
    if len(dict(pairs)) < len(pairs):
        raise UsageError(f"data = {data}: a name is there twice.")
    return dict(pairs)


def _prepare_all(
    recipe: PretrainRecipe, run: RunFolder, max_vocab_size: int
) -> tuple[PreparedData, dict[str, TokenSet]]:
    """The run's text, prepared into its folder; of several, the first, and all training parts by name.

    The others are encoded with the first one's tokenizer, and what is held out to measure on is the first one's.
    """
    texts = named_texts(recipe.data)
    if not texts:
        if recipe.loader.mixture:
            raise UsageError('loader.mixture weighs several texts: name them, as in --data "web=…, code=…".')
        return _prepare(recipe, run, recipe.data, run.data, max_vocab_size), {}
    first: PreparedData | None = None
    sets = {}
    for name, source in texts.items():
        prepared = _prepare(recipe, run, source, run.data / name, max_vocab_size, first.tokenizer if first else None)
        first = first or prepared
        sets[name] = prepared.train
    assert first is not None
    return first, sets


def _note_text(run: RunFolder, prepared: PreparedData) -> None:
    """Note which text this is, where it lies outside of the run's folder; a run that has trained goes on with no other.

    Raises:
        GroundupError: it was prepared again since.
    """
    if prepared.folder.is_relative_to(run.path):
        return
    noted, digest = run.path / "data.json", prepared.digest()
    before = read_json(noted, "note about the text") if noted.is_file() else {}
    if Checkpoints(run.checkpoints).all() and before.get("digest", digest) != digest:
        raise GroundupError(
            f"{prepared.folder}: this corpus is not the one that the run in {run.path} began with. Put that one back, "
            "or choose another --out."
        )
    write_json(noted, prepared.stats | {"digest": digest})


def _prepare(
    recipe: PretrainRecipe,
    run: RunFolder,
    data: str,
    out: Path,
    max_vocab_size: int,
    tokenizer: Tokenizer | None = None,
) -> PreparedData:
    """One text. A run that has trained goes on with what it began with, whatever has become of the source."""
    if out.is_dir() and Checkpoints(run.checkpoints).all():
        return PreparedData.open(out, verify=True)
    if tokenizer is None and recipe.tokenizer.path:
        tokenizer = Tokenizer.load(recipe.tokenizer.path)
    return prepare(
        data,
        out,
        vocab_size=recipe.tokenizer.vocab_size if tokenizer is None else None,
        max_vocab_size=max_vocab_size,
        pattern=recipe.tokenizer.pattern,
        algorithm=recipe.tokenizer.algorithm,
        tokenizer=tokenizer,
        special_tokens=SENTINEL_TOKENS if recipe.loader.fim_rate else (),
        corpus=recipe.corpus,
        data_dir=Path(recipe.data_dir) if recipe.data_dir else None,
        limit=recipe.limit,
    )
