"""``groundup explain MODEL|RECIPE``: what a model costs before you spend anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from groundup.cli.arguments import call
from groundup.config import Given
from groundup.model import PRESETS, ModelConfig
from groundup.model import explain as costs_of
from groundup.runtime import UsageError, say
from groundup.runtime.console import byte_size, flop_rate, quantity
from groundup.runtime.errors import nearest

PLANNED = {"model.n_layer", "model.n_embd", "model.n_head", "model.vocab_size"}  # without these a shape is derived


def explain(model: str, context: int | None = None, micro_batch: int = 1) -> None:
    """Print parameters by part, FLOPs, KV cache and memory of a model.

    Args:
        model: a preset such as gpt2-124m, a recipe, a run, a checkpoint or a Hugging Face folder
        context: another context length, in tokens
        micro_batch: sequences that pass through at once in training
    """
    from rich.table import Table

    config = _config(model)
    if context is not None:
        config = ModelConfig.from_dict(config.to_dict() | {"context_length": context})
    if micro_batch < 1:
        raise UsageError(f"micro_batch = {micro_batch} must be at least 1.")
    costs = costs_of(config, micro_batch)
    table = Table(
        title=f"{model}: {quantity(costs.total_parameters)} parameters",
        title_justify="left",
        show_header=False,
        box=None,
    )
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_column(justify="left")
    for part, count in costs.parameters.items():
        if count:
            table.add_row(part, f"{count:,}", f"{count / costs.total_parameters:.1%}")
    table.add_section()
    table.add_row(
        "FLOPs per token, forward",
        quantity(costs.forward_flops_per_token),
        f"at a context of {config.context_length:,}",
    )
    table.add_row("FLOPs per token, training", quantity(costs.training_flops_per_token), "forward and backward")
    table.add_row("KV cache per token", f"{costs.kv_bytes_per_token:,} B", "in bf16")
    full = costs.kv_bytes_per_token * config.context_length
    table.add_row("KV cache, full context", byte_size(full), "one sequence")
    table.add_row(
        "memory to train",
        byte_size(costs.training_bytes),
        f"float32 weights, AdamW, micro-batch of {micro_batch}",
    )
    table.add_row("memory to serve", byte_size(2 * costs.total_parameters + full), "bf16 weights and one sequence")
    say(table)


def _config(name: str) -> ModelConfig:
    """The model config behind a preset's name, a recipe, a run or a folder."""
    if name in PRESETS:
        return ModelConfig.preset(name)
    path = Path(name)
    if path.is_dir():
        from groundup.inference import find_model
        from groundup.model import read_config

        return read_config(find_model(path))
    from groundup.config import build, find_recipe, read_recipe, recipe_files
    from groundup.training import PretrainRecipe

    if not path.is_file() and path.name.removesuffix(".yaml") not in recipe_files():
        raise UsageError(
            f"{name}: no preset, recipe or folder of that name.{nearest(name, [*PRESETS, *recipe_files()])} "
            f"Presets: {', '.join(PRESETS)}. Recipes: {', '.join(recipe_files())}."
        )
    given = read_recipe(find_recipe(name), PretrainRecipe)
    return (
        _planned(given) if PLANNED - given.values.keys() else build(PretrainRecipe, given.values, given.sources).model
    )


def _planned(given: Given) -> ModelConfig:
    """The model that a recipe which leaves its shape open would come to on this machine, given text enough."""
    from groundup.config import build
    from groundup.runtime.device import choose_device, choose_precision, matmul_flops
    from groundup.training import PretrainRecipe
    from groundup.training.run import settle_length
    from groundup.training.scaling import Facts, derive, run_budget, vocabulary_limit, without_open_shape

    given = settle_length(given)
    build(PretrainRecipe, without_open_shape(given.values), given.sources)  # names the file of a contradiction
    device = choose_device(str(given.values.get("device", "auto")))
    precision = choose_precision(str(given.values.get("precision", "auto")), device)
    speed, budget = matmul_flops(device, precision), run_budget(given.values)
    vocab_size = int(given.values.get("tokenizer.vocab_size") or vocabulary_limit(given.values, speed, budget))
    facts = Facts(train_tokens=10**9, vocab_size=vocab_size, flops_per_second=speed)
    plan = derive(given.values, facts, budget)
    say(f"Derived for this machine ({flop_rate(speed)}), given text enough:")
    return ModelConfig.from_dict(
        {k.removeprefix("model."): v for k, v in plan.values.items() if k.startswith("model.")}
    )


def main(arguments: Sequence[str]) -> None:
    """Parse the flags and explain."""
    call(explain, "explain", arguments)
