"""What a fine-tuning run derives when it is not told: each value with where it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from groundup.model import Classifier, ModelConfig, Transformer, fastest_backend
from groundup.model.adapters import LoraConfig, add_adapter
from groundup.posttraining.batches import ExampleLoader
from groundup.posttraining.labelled import LabelledText
from groundup.posttraining.layers import layer_rules
from groundup.posttraining.material import Answers, LabelledMaterial
from groundup.posttraining.recipe import AdapterRecipe, FinetuneRecipe
from groundup.posttraining.text_batches import around, pieces_of
from groundup.runtime import UsageError
from groundup.runtime.device import Precision, activation_dtype
from groundup.runtime.process_group import World
from groundup.tokenizer import Tokenizer
from groundup.training.parallel import settle_way
from groundup.training.scaling import Derived, Plan
from groundup.training.trials import fit

# Nobody need give these.
_TOP = "context_length batch_size micro_batch max_steps save_every precision attention checkpointing"
_OF_OPTIM = "optimizer schedule learning_rate warmup_steps weight_decay"
DERIVED = frozenset((*_TOP.split(), *(f"optim.{key}" for key in _OF_OPTIM.split())))
EXAMPLES_A_STEP = 16
TEXTS_A_STEP = 32
LONGEST_ROW = 1024  # of packed examples, unless one of them is longer: what attention costs grows with it
EXAMPLES_A_ROW = 16  # so that best fit leaves little empty
TOKENS_AT_ONCE = 8192
PER_WIDTH = 0.08  # learning rate x n_embd: 2e-5 at 4,096 (as Llama 2 chat, Touvron et al. 2023, section 3.1)
LARGEST_RATE = 1e-3
LORA_TIMES = 10.0  # LoRA's best learning rate is about ten times that of full fine-tuning (Schulman et al. 2025)


def derive(
    given: Mapping[str, Any], recipe: FinetuneRecipe, config: ModelConfig, tokenizer: Tokenizer,
    material: Answers | LabelledMaterial,
) -> Plan:  # fmt: skip
    """Fill in rows, batch, steps and the optimizer.

    Args:
        given: dotted recipe keys that a person set.
        recipe: made of them.
        config: of the model that is trained.
        material: what is learnt.
    """
    plan = Plan(given)
    if isinstance(material, Answers):
        rows = _rows_of_answers(plan, recipe, config, material)
    else:
        rows = _rows_of_texts(plan, recipe, config, tokenizer, material)
    batch, context = plan.values["batch_size"], plan.values["context_length"]
    at_once = next(n for n in range(max(1, min(batch, TOKENS_AT_ONCE // context)), 0, -1) if batch % n == 0)
    plan.fill("micro_batch", at_once, f"what divides the batch, up to {TOKENS_AT_ONCE:,} tokens at once")
    steps = max(1, round(rows * recipe.epochs / batch))
    if recipe.minutes is None:
        plan.fill("max_steps", steps, f"{recipe.epochs:g} x {rows:,} rows / batch_size")
    steps = plan.values.get("max_steps") or steps
    if recipe.minutes is None:
        every = max(1, min(math.ceil(rows / batch), math.ceil(steps / 3)))
        plan.fill("save_every", every, "once an epoch, three times at least")
    rate = min(PER_WIDTH / config.n_embd, LARGEST_RATE)
    why = "0.08 / n_embd (2e-5 at 4,096: Touvron et al. 2023), at most 0.001"
    if recipe.adapter.method != "full":
        rate, why = LORA_TIMES * rate, f"ten times {why} (Schulman et al. 2025)"
    plan.fill("optim.optimizer", "adamw", "steps in fine-tuning are few and small")
    plan.fill("optim.learning_rate", float(f"{rate:.3g}"), why)
    plan.fill("optim.schedule", "cosine", "as Llama 2 chat")
    plan.fill("optim.warmup_steps", max(1, min(100, steps // 20)), "5% of the steps, at most 100")
    plan.fill("optim.weight_decay", 0.0 if recipe.adapter.method != "full" else 0.01, "weights are to stay near")
    return plan


def _rows_of_answers(plan: Plan, recipe: FinetuneRecipe, config: ModelConfig, answers: Answers) -> int:
    """Settle the length of a row and how many make a step; how many an epoch has."""
    sizes = [example.positions for example in answers.train]
    longest = max([*sizes, *(example.positions for example in answers.val)])
    mean = sum(sizes) / len(sizes)
    if recipe.examples.packing == "padded":
        length, why = _round_up(longest, 8), "the longest example"
    else:
        wanted = 2 ** math.ceil(math.log2(EXAMPLES_A_ROW * mean))
        length, why = max(longest, min(wanted, LONGEST_ROW)), f"room for some {EXAMPLES_A_ROW} examples, up to 1,024"
    length = plan.fill("context_length", min(length, config.context_length), why)
    loader = ExampleLoader(answers.train, length, 1, recipe.seed, recipe.examples.packing)
    rows = loader.rows_of_epoch()
    a_row = len(sizes) / rows
    batch = max(1, round(EXAMPLES_A_STEP / a_row))
    plan.fill("batch_size", batch, f"some {EXAMPLES_A_STEP} examples, {a_row:.1f} of which fill a row")
    return rows


def _rows_of_texts(
    plan: Plan, recipe: FinetuneRecipe, config: ModelConfig, tokenizer: Tokenizer, material: LabelledMaterial
) -> int:
    longest = max(len(ids) + 2 for ids in tokenizer.encode_batch([text.text for text in material.train]))
    context = min(_round_up(longest, 8), config.context_length)
    context = plan.fill("context_length", context, "the longest text, or what fits")
    plan.fill("batch_size", TEXTS_A_STEP, "texts a step (Devlin et al. 2019, appendix A.3)")
    return rows_of_texts(recipe, tokenizer, material.train, context)


def rows_of_texts(recipe: FinetuneRecipe, tokenizer: Tokenizer, texts: Sequence[LabelledText], context: int) -> int:
    """How many rows an epoch of labelled texts has: pieces of long ones, and augmented copies, counted each."""
    count = len(texts)
    if recipe.long_texts == "split":
        room = max(1, context - sum(map(len, around(tokenizer, recipe.classes.pooling))))
        sizes = np.array([len(ids) for ids in tokenizer.encode_batch([text.text for text in texts])])
        count = int(pieces_of(sizes, room).sum())
    return count * (1 + recipe.classes.copies)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def fitted(
    recipe: FinetuneRecipe, config: ModelConfig, device: torch.device, precision: Precision, world: World, *,
    fixed: bool,
) -> tuple[FinetuneRecipe, list[Derived]]:  # fmt: skip
    """The recipe with a micro-batch that is predicted to fit into memory, and the fastest attention here.

    Args:
        fixed: the micro-batch is to stay as it is.

    Raises:
        UsageError: the batch cannot be shared out.
    """
    given, batch = recipe.micro_batch or 1, recipe.batch_size or 1
    if batch % ((given if fixed else 1) * world.size):
        by_processes = f" x {world.size} processes" if world.size > 1 else ""
        raise UsageError(f"batch_size = {batch} is no multiple of micro_batch = {given}{by_processes}.")
    row = replace(config, context_length=recipe.context_length or config.context_length)
    micro_batch, checkpointing, why = fit(row, recipe, device, precision, world, fixed=fixed, chunk=recipe.loss.chunk)
    notes, settled = [], dict[str, Any](parallel="auto" if world.size == 1 else settle_way(recipe.parallel, world))
    for key, value in (("micro_batch", micro_batch), ("checkpointing", checkpointing)):
        if value != getattr(recipe, key):
            notes.append(Derived(key, value, f"what fits: {why}"))
        settled[key] = value
    if recipe.attention == "auto":
        settled["attention"] = fastest_backend(row, micro_batch, device, activation_dtype(precision))
        notes.append(Derived("attention", settled["attention"], "measured: the faster backend here"))
    return replace(recipe, **settled), notes


def lora_config(adapter: AdapterRecipe) -> LoraConfig:
    """What a recipe wants adapters to be."""
    return LoraConfig(
        rank=adapter.rank, alpha=adapter.alpha, dropout=adapter.dropout, targets=tuple(adapter.targets),
        rslora=adapter.rslora, dora=adapter.method == "dora",
    )  # fmt: skip


def sketched(recipe: FinetuneRecipe, config: ModelConfig, n_classes: int = 0) -> nn.Module:
    """The model that a recipe trains, without numbers: for the names and sizes of its parameters."""
    with torch.device("meta"):
        model = Transformer(config)
        found: nn.Module = Classifier(model, n_classes) if n_classes else model
        if recipe.adapter.method != "full":
            add_adapter(model, lora_config(recipe.adapter))
    return found


def rules_of(recipe: FinetuneRecipe, config: ModelConfig, material: Answers | LabelledMaterial) -> list[str]:
    """Rules for the optimizers by what the recipe says of layers.

    Raises:
        UsageError: there are not as many layers.
    """
    wanted = recipe.layers
    n_classes = len(material.classes) if isinstance(material, LabelledMaterial) else 0
    return layer_rules(
        sketched(recipe, config, n_classes), frozen_layers=wanted.frozen, frozen_embeddings=wanted.frozen_embeddings,
        decay=wanted.decay,
    )  # fmt: skip
