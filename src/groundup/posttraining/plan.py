"""What a fine-tuning run will do, settled before it starts: the data read, every open key derived."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from groundup.config import Given, build
from groundup.inference import find_model
from groundup.inference.adapters import find_parts
from groundup.model import ModelConfig, explain, read_config
from groundup.posttraining.derive import derive, fitted, rows_of_texts, rules_of, sketched
from groundup.posttraining.material import Answers, LabelledMaterial, gather_answers, gather_labelled
from groundup.posttraining.recipe import FinetuneRecipe
from groundup.report import check_trackers
from groundup.runtime import GroundupError, UsageError, os_errors, read_json, write_json
from groundup.runtime.console import clock, flop_rate, quantity
from groundup.runtime.device import Precision, choose_precision, keep_freed_memory, matmul_flops
from groundup.runtime.files import folder_lock, verify_folder
from groundup.runtime.process_group import World, first_decides
from groundup.tokenizer import Tokenizer
from groundup.training.checkpoint import Checkpoints
from groundup.training.plan import device_of
from groundup.training.profile import parse_steps
from groundup.training.run import RunFolder, resolved, resume_values, settle_length
from groundup.training.scaling import EFFICIENCY, Derived

# Changing one of these makes another run.
FIXED: tuple[str, ...] = (
    "task",
    "init_from",
    "data",
    "val",
    "val_fraction",
    "columns.",
    "columns",
    "too_long",
    "limit",
)
FIXED += ("skip_bad", "seed", "context_length", "batch_size", "examples.", "classes.pooling", "classes.test")
FIXED += ("classes.test_fraction", "classes.copies", "adapter.", "layers.", "optim.optimizer", "optim.rules")


@dataclass(frozen=True)
class Finetuning:
    """A run that is ready to train, or has been trained.

    Args:
        run: its folder.
        recipe: every key resolved.
        values: the same by dotted key.
        derived: the values nobody gave, with their reasons.
        base: the folder of the model to go on from.
        config: of that model.
        material: what is learnt.
        device: where it runs.
        flops_per_second: measured speed of matrix products there.
        world: the processes it runs on.
        untrained: begin with random weights instead of the base's, to see what those were worth.
        finished: the run is at its end.
        trained: steps were made in this sitting.
    """

    run: RunFolder
    recipe: FinetuneRecipe
    values: dict[str, Any]
    derived: list[Derived]
    base: Path
    config: ModelConfig
    tokenizer: Tokenizer
    material: Answers | LabelledMaterial = field(repr=False)
    device: torch.device
    flops_per_second: float
    world: World = field(default_factory=World)
    untrained: bool = False
    finished: bool = False
    trained: bool = False

    @property
    def precision(self) -> Precision:
        """What the forward pass runs in."""
        return "float32" if self.recipe.precision == "auto" else self.recipe.precision

    @property
    def answers(self) -> Answers:
        """The material of the task sft."""
        assert isinstance(self.material, Answers)
        return self.material

    @property
    def labelled(self) -> LabelledMaterial:
        """The material of the task classify."""
        assert isinstance(self.material, LabelledMaterial)
        return self.material

    @property
    def added(self) -> list[str]:
        """Special tokens that the base model did not have."""
        return self.material.added if isinstance(self.material, Answers) else []

    @property
    def context_length(self) -> int:
        """T, positions of a row."""
        assert self.recipe.context_length is not None
        return self.recipe.context_length

    @cached_property
    def positions(self) -> int:
        """Positions that a row has on average: texts and padded examples are mostly shorter than the longest one."""
        if isinstance(self.material, Answers):
            if self.recipe.examples.packing == "best_fit":
                return self.context_length
            sizes = [example.positions for example in self.material.train]
        else:
            ids = self.tokenizer.encode_batch([text.text for text in self.material.train])
            if self.recipe.long_texts == "split":
                rows = rows_of_texts(self.recipe, self.tokenizer, self.material.train, self.context_length)
                return max(1, round(sum(map(len, ids)) * (1 + self.recipe.classes.copies) / rows) + 1)
            sizes = [min(len(one) + 1, self.context_length) for one in ids]
        return max(1, round(sum(sizes) / len(sizes)))

    @cached_property
    def model_config(self) -> ModelConfig:
        """The config of the model that is trained: that of the base, with rows for added tokens."""
        return replace(self.config, vocab_size=max(self.config.vocab_size, self.tokenizer.vocab_size))

    def plan_rows(self) -> list[dict[str, Any]]:
        """The plan as rows of section, key, value and why."""
        costs, reasons = explain(self.model_config), {entry.key: entry.why for entry in self.derived}
        rows: list[dict[str, Any]] = []

        def add(section: str, key: str, value: Any, why: str) -> None:
            rows.append({"section": section, "key": key, "value": value, "why": why})

        add("model", "init_from", self.recipe.init_from, str(self.base))
        add("model", "parameters", quantity(costs.total_parameters), "counted; a tied head once")
        if self.recipe.adapter.method != "full":
            sketch = sketched(self.recipe, self.model_config, len(getattr(self.material, "classes", ())))
            trained = sum(parameter.numel() for parameter in sketch.parameters() if parameter.requires_grad)
            adapter = self.recipe.adapter
            add("model", "adapter", f"{adapter.method}, rank {adapter.rank}", f"trains {quantity(trained)} of them")
            add("model", "base", adapter.base, "the frozen weights")
        names = ["optimizer", "learning_rate", "warmup_steps", "weight_decay", "schedule"]
        keys = ["context_length", "batch_size", "micro_batch", "max_steps", "minutes", "epochs"]
        for key in [*keys, *(f"optim.{name}" for name in names), "precision", "attention", "checkpointing"]:
            if self.values.get(key) is not None:
                add("training", key.rsplit(".", 1)[-1], self.values[key], reasons.get(key, "given"))
        if (expected := self.expected_seconds()) is not None:
            speed = flop_rate(self.flops_per_second)
            add("cost", "time", clock(expected), f"at {EFFICIENCY:.0%} of the {speed} measured on {self.device}")
        return rows

    def expected_seconds(self) -> float | None:
        """How long training may take."""
        if self.recipe.minutes is not None:
            return 60.0 * self.recipe.minutes
        tokens = (self.recipe.max_steps or 0) * (self.recipe.batch_size or 0) * self.positions
        speed = self.world.size * self.flops_per_second * EFFICIENCY
        return tokens * explain(self.model_config).training_flops_per_token / speed if speed else None


def plan_finetuning(given: Given, world: World | None = None) -> Finetuning:
    """Read the data and settle everything that was left open; write recipe, plan, data and environment into the run
    folder. Of several processes the first one does it, and the others take its word.

    Raises:
        GroundupError: the recipe contradicts itself, the data or the model cannot be read or do not fit, the folder
            cannot be written or holds another run.
    """
    here = world or World()
    keep_freed_memory()  # before anything is measured
    return first_decides(here, lambda: _plan(given, here), _to_tell, lambda told: _as_told(told, given, here))


def _to_tell(planned: Finetuning) -> dict[str, Any]:
    return {
        "values": planned.values, "derived": [asdict(one) for one in planned.derived],
        "flops": planned.flops_per_second, "digest": planned.material.digest,
    }  # fmt: skip


def _as_told(told: Mapping[str, Any], given: Given, world: World) -> Finetuning:
    recipe = build(FinetuneRecipe, told["values"], given.sources)
    base, config, tokenizer = _base(recipe)
    material, tokenizer = _gathered(recipe, tokenizer, config)
    if material.digest != told["digest"]:
        raise GroundupError(f"{recipe.data}: process {world.rank} reads other data than the first one.")
    return Finetuning(
        RunFolder(Path(recipe.out)), recipe, dict(told["values"]), [Derived(**one) for one in told["derived"]], base,
        config, tokenizer, material, device_of(recipe.device, world), told["flops"], world,
    )  # fmt: skip


def _plan(given: Given, world: World) -> Finetuning:
    asked, given = given, settle_length(given)
    fixed = given.values.get("micro_batch") is not None  # by this command; what a run came to before may change
    defaults = build(FinetuneRecipe, given.values, given.sources)
    check_trackers(defaults.track)
    if defaults.profile is not None:
        parse_steps(defaults.profile)
    run = RunFolder(Path(defaults.out))
    trained = bool(Checkpoints(run.checkpoints).all())
    before = resume_values(run, given, FinetuneRecipe, FIXED, trained=trained)
    derived_before = run.derived(given) if before else []
    given = _with_length(asked, before, run) if before else given
    recipe = build(FinetuneRecipe, given.values, given.sources)
    base, config, tokenizer = _base(recipe)
    device = device_of(recipe.device, world)
    precision = choose_precision(recipe.precision, device, width=config.n_embd)
    material, tokenizer = _gathered(recipe, tokenizer, config)
    with folder_lock(run.path, "working"):
        _same_as_before(run, recipe, base, material, trained=trained)
    grown = replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size))
    plan = derive(given.values, recipe, grown, tokenizer, material)
    plan.derived = [*derived_before, *plan.derived]
    if recipe.precision == "auto":
        plan.derived.append(Derived("precision", precision, "measured: the faster of float32 and bfloat16 here"))
    recipe = build(FinetuneRecipe, plan.values | {"precision": precision, "device": device.type}, given.sources)
    if before is None and (rules := rules_of(recipe, grown, material)):
        recipe = replace(recipe, optim=replace(recipe.optim, rules=[*recipe.optim.rules, *rules]))
        plan.derived.append(Derived("optim.rules", recipe.optim.rules, "by layers.frozen and layers.decay"))
    recipe, notes = fitted(recipe, grown, device, precision, world, fixed=fixed)
    settled = {note.key for note in notes}
    plan.derived = [one for one in plan.derived if one.key not in settled] + notes
    if device.index is not None and world.size == 1:
        recipe = replace(recipe, device=str(device))
    found = Finetuning(
        run, recipe, resolved(recipe, plan.values), plan.derived, base, config, tokenizer, material, device,
        matmul_flops(device, precision), world,
    )  # fmt: skip
    run.save_recipe(found.values, found.derived)
    run.save_plan(found.plan_rows(), found.derived)
    write_json(run.path / "data.json", material.note(recipe))
    write_json(run.path / "base.json", {"folder": str(base), "digest": digest_of(base)})
    run.save_environment(str(device), precision, world.size)
    return found


def _with_length(asked: Given, before: Given, run: RunFolder) -> Given:
    """The values of the run that is here, whose number of steps is found anew where other epochs are asked for."""
    epochs, saved = asked.values.get("epochs"), run.saved(FinetuneRecipe)
    if saved is None or epochs is None or epochs == saved.values.get("epochs"):
        return before
    if any(asked.values.get(key) is not None for key in ("max_steps", "minutes")):
        return before
    run.forget_horizon()
    return Given({key: value for key, value in before.values.items() if key != "max_steps"}, before.sources)


def _base(recipe: FinetuneRecipe) -> tuple[Path, ModelConfig, Tokenizer]:
    """The model to go on from: its folder, its config and its tokenizer.

    Raises:
        UsageError: it is not said which, or it cannot be trained.
        GroundupError: it cannot be read.
    """
    for key, what in (("init_from", "the model to go on from, such as runs/demo"), ("data", "the examples")):
        if getattr(recipe, key) is None:
            raise UsageError(f"groundup finetune needs --{key.replace('_', '-')}: {what}.")
    base = find_model(str(recipe.init_from))
    if not base.is_dir():
        raise UsageError(f"{base}: a file of another tool. Make a folder of it first: groundup export {base} --to hf.")
    if not (base / "config.json").is_file():
        raise UsageError(
            f"{recipe.init_from}: an adapter and no whole model. Merge it first (groundup export --to hf), or go on "
            "from it with its base model as --init-from and --adapter.resume-from."
        )
    verify_folder(base)
    config, begun = read_config(base), recipe.adapter.resume_from
    of_tokenizer = base
    if begun is not None:
        find_parts(str(recipe.init_from), [begun])  # an adapter for another model is told before any work
        if (find_model(begun) / "tokenizer.json").is_file():
            of_tokenizer = find_model(begun)
    tokenizer = Tokenizer.load(of_tokenizer)
    if read_json(base / "config.json").get("quantization_config") and recipe.adapter.method == "full":
        raise UsageError(
            f"{recipe.init_from}: quantized weights cannot be trained themselves. Give --adapter.method lora, or the "
            "model that it was made of."
        )
    return base, config, tokenizer


def _gathered(
    recipe: FinetuneRecipe, tokenizer: Tokenizer, config: ModelConfig
) -> tuple[Answers | LabelledMaterial, Tokenizer]:
    if recipe.task == "classify":
        return gather_labelled(recipe, tokenizer, config), tokenizer
    answers = gather_answers(recipe, tokenizer, config)
    return answers, answers.tokenizer


def digest_of(base: Path) -> str:
    """SHA-256 over the weights of a model's folder: what adapters are for."""
    found = hashlib.sha256()
    for path in sorted(base.glob("*.safetensors")):
        with os_errors(path, "cannot read"), path.open("rb") as file:
            while block := file.read(1 << 22):
                found.update(block)
    return found.hexdigest()


def _same_as_before(
    run: RunFolder, recipe: FinetuneRecipe, base: Path, material: Answers | LabelledMaterial, *, trained: bool
) -> None:
    """See that a run that has trained goes on with its data, and its adapters on their model.

    Raises:
        GroundupError: the data or the base model has changed.
    """
    if not trained:
        return
    noted, model = run.path / "data.json", run.path / "base.json"
    if noted.is_file() and read_json(noted).get("digest") != material.digest:
        raise GroundupError(
            f"{recipe.data}: this data has changed since the run in {run.path} began. Choose another --out, or bring "
            "it back as it was."
        )
    frozen = recipe.adapter.method != "full"
    if frozen and model.is_file() and read_json(model).get("digest") != digest_of(base):
        raise GroundupError(
            f"{recipe.init_from}: this model has changed since the run in {run.path} began to train adapters on it. "
            "Choose another --out, or bring it back as it was."
        )
