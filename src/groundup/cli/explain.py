"""``groundup explain MODEL|RECIPE``: what a model costs before you spend anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundup.cli.arguments import call
from groundup.config import Given
from groundup.model import PRESETS, Explanation, ModelConfig
from groundup.model import explain as costs_of
from groundup.model.drawing import draw_svg, draw_text
from groundup.model.hardware import (
    HARDWARE,
    TOKENS_PER_PARAMETER,
    Hardware,
    decode_estimate,
    experts_met,
    training_estimate,
)
from groundup.model.hardware import hardware as machine_of
from groundup.model.memory import CHECKPOINTING, OPTIMIZERS, WEIGHT_TYPES, loss_chunk, serving_memory, training_memory
from groundup.runtime import UsageError, say
from groundup.runtime.console import byte_size, flop_rate, quantity
from groundup.runtime.errors import nearest
from groundup.runtime.files import write_atomic

if TYPE_CHECKING:
    from rich.table import Table

PLANNED = {"model.n_layer", "model.n_embd", "model.n_head", "model.vocab_size"}  # without these a shape is derived


def explain(
    model: str, context: int | None = None, micro_batch: int = 1, batch: int = 1, tokens: str = "",
    hardware: str = "h100", dtype: str = "bfloat16", checkpointing: str = "none", optimizer: str = "adamw",
    svg: str | None = None,
) -> None:  # fmt: skip
    """Print the parts, parameters, FLOPs, KV cache, memory, time and cost of a model.

    Args:
        model: a preset such as gpt2-124m, a recipe, a run, a checkpoint or a Hugging Face folder
        context: another context length, in tokens
        micro_batch: sequences that pass through at once in training
        batch: sequences that are served at once
        tokens: how many to train on, such as 300B; default 20 per active parameter (Hoffmann et al. 2022)
        hardware: the machine: laptop, server-cpu, rtx-4090, a100, h100, h200, m3-max, or all of them
        dtype: of the weights in serving: float32, bfloat16, int8 or int4
        checkpointing: what training computes again instead of keeping it: none, selective or block
        optimizer: of training: adamw or muon
        svg: a file to draw the model into
    """
    _one_of("dtype", dtype, WEIGHT_TYPES)
    _one_of("checkpointing", checkpointing, CHECKPOINTING)
    _one_of("optimizer", optimizer, OPTIMIZERS)
    machines = HARDWARE if hardware == "all" else {hardware: machine_of(hardware)}
    for name, value in (("micro_batch", micro_batch), ("batch", batch)):
        if value < 1:
            raise UsageError(f"{name} = {value} must be at least 1.")
    config = _config(model)
    if context is not None:
        config = ModelConfig.from_dict(config.to_dict() | {"context_length": context})
    cache_bytes = 4 if dtype == "float32" else 2
    options: dict[str, Any] = {"optimizer": optimizer, "checkpointing": checkpointing}
    costs = costs_of(config, micro_batch, batch=batch, kv_dtype_bytes=cache_bytes, **options)
    count = _tokens(tokens, costs)
    say(_parameter_table(model, costs))
    if (adapter := _adapter(model)) is not None:
        say(adapter)
    say(draw_text(config))
    say(_cost_table(config, costs, micro_batch, batch, dtype, options))
    say(_machine_table(config, costs, machines, batch, dtype, count, checkpointing))
    say(_assumptions(config, costs, machines, batch, count, given=bool(tokens)))
    if svg is not None:
        write_atomic(svg, draw_svg(config, f"{model}: {quantity(costs.total_parameters)} parameters"))
        say(f"drawn into {svg}")


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"{name} = {value} is not one of {', '.join(known)}.{nearest(value, known)}")


def _tokens(written: str, costs: Explanation) -> float:
    """How many tokens to train on: a number with k, M, B or T behind it, or 20 per active parameter."""
    if not written:
        return float(TOKENS_PER_PARAMETER * costs.active_parameters)
    units = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    number, unit = (written[:-1], units[written[-1]]) if written[-1] in units else (written, 1.0)
    try:
        count = float(number.replace("_", "").replace(",", "")) * unit
    except ValueError:
        count = 0.0
    if not 1 <= count < 1e30:
        raise UsageError(f"tokens = {written} should be a number of at least 1, such as 3000000, 500M, 300B or 15T.")
    return count


def _table(*, title: str | None = None, columns: Sequence[str] = "lrl") -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for side in columns:
        table.add_column(justify="left" if side == "l" else "right")
    return table


def _parameter_table(model: str, costs: Explanation) -> Table:
    total, active = costs.total_parameters, costs.active_parameters
    some = "" if active == total else f", {quantity(active)} active per token"
    table = _table(title=f"{model}: {quantity(total)} parameters{some}")
    for part, count in costs.parameters.items():
        if count:
            table.add_row(part, f"{count:,}", f"{count / total:.1%}")
    return table


def _cost_table(
    config: ModelConfig, costs: Explanation, micro_batch: int, batch: int, dtype: str, options: dict[str, Any]
) -> Table:
    context, cache_bytes = config.context_length, 4 if dtype == "float32" else 2
    table = _table()
    table.add_row("FLOPs per token, forward", quantity(costs.forward_flops_per_token), f"at a context of {context:,}")
    further = f", {config.n_predict} further tokens included" if config.n_predict else ""
    table.add_row(
        "FLOPs per token, training", quantity(costs.training_flops_per_token), f"forward and backward{further}"
    )
    past = costs.kv_bytes_per_token_past_windows
    windows = f", {past:,} B once the windows are full" if past != costs.kv_bytes_per_token else ""
    table.add_row("KV cache per token", f"{costs.kv_bytes_per_token:,} B", f"in {_cache_type(dtype)}{windows}")
    table.add_row("KV cache, full context", byte_size(costs.kv_bytes), _sequences(batch))
    memory = costs.training
    state = memory.weights + memory.gradients + memory.moments
    activations = memory.casts + memory.activations + memory.recomputed
    kept = "" if options["checkpointing"] == "none" else f", checkpointing {options['checkpointing']}"
    names = {"adamw": "AdamW", "muon": "Muon"}
    described = f"float32 weights, {names[options['optimizer']]}, micro-batch of {micro_batch} in bf16{kept}"
    table.add_row("memory to train", byte_size(memory.total), described)
    table.add_row("  weights, gradients, moments", byte_size(state), "")
    table.add_row(
        "  activations",
        byte_size(activations),
        "with the weights' copies in bf16",
    )
    chunk = loss_chunk(config.vocab_size)
    chunked = training_memory(config, micro_batch, context, 2, loss_chunk=chunk, **options).loss
    table.add_row("  logits", byte_size(memory.loss), f"{byte_size(chunked)} with the loss in chunks of {chunk:,}")
    serving = serving_memory(config, batch, context, dtype, cache_dtype_bytes=cache_bytes)  # type: ignore[arg-type]
    parts = f"weights in {dtype} {byte_size(serving.weights)}, cache {byte_size(serving.cache)}"
    table.add_row("memory to serve", byte_size(serving.total), f"{parts}, work {byte_size(serving.working)}")
    return table


def _machine_table(
    config: ModelConfig,
    costs: Explanation,
    machines: dict[str, Hardware],
    batch: int,
    dtype: str,
    tokens: float,
    checkpointing: str,
) -> Table:
    table = _table(columns="lrrrrrr")
    table.show_header = True
    heads = ("machine", "train on", "time", "energy", "price", "serve on", "decode, at most")
    for column, head in zip(table.columns, heads, strict=True):
        column.header = head
    for name, machine in machines.items():
        run = training_estimate(costs, machine, tokens, checkpointing=checkpointing)  # type: ignore[arg-type]
        decoding = decode_estimate(
            config, costs, machine, batch, config.context_length, dtype,  # type: ignore[arg-type]
            cache_dtype_bytes=4 if dtype == "float32" else 2,
        )  # fmt: skip
        table.add_row(
            name, f"{run.machines}", f"{_duration(run.seconds)}", _energy(run.joules), f"{_dollars(run.price)}",
            f"{decoding.machines}", f"{quantity(decoding.tokens_per_second)} tokens/s",
        )  # fmt: skip
    return table


def _assumptions(
    config: ModelConfig, costs: Explanation, machines: dict[str, Hardware], batch: int, tokens: float, *, given: bool
) -> str:
    why = "as asked" if given else f"{TOKENS_PER_PARAMETER} per active parameter (Hoffmann et al. 2022)"
    lines = [
        f"Assumed: {quantity(tokens)} tokens to train on, {why}. Time is that of one machine;",
        "as many as the memory needs share it evenly. Prompts are read one by one, 2,048 tokens at a time.",
        f"Decoding {_sequences(batch)} reads weights and caches once per token at full bandwidth, or computes at peak.",
    ]
    if config.experts.count:
        met = experts_met(config, batch)
        lines.append(f"Of {config.experts.count} experts, {met:.3g} are read per step, all chosen alike.")
    for name, machine in machines.items():
        speed = f"{machine.utilisation:.0%} of {flop_rate(machine.flops)}, {byte_size(machine.bandwidth)}/s"
        rent = f"{byte_size(machine.memory)}, {machine.watts:g} W, {machine.price:.2f} USD/h"
        lines.append(f"  {name}: {machine.described}, {speed}, {rent}")
    return "\n".join(lines)


def _sequences(batch: int) -> str:
    return "one sequence" if batch == 1 else f"{batch:,} sequences"


def _cache_type(dtype: str) -> str:
    return "float32" if dtype == "float32" else "bf16"


def _duration(seconds: float) -> str:
    for limit, divisor, unit in (
        (120, 1, "s"),
        (7200, 60, "minutes"),
        (172_800, 3600, "hours"),
        (6.3e7, 86_400, "days"),
    ):
        if seconds < limit:
            return f"{quantity(float(f'{seconds / divisor:.3g}'))} {unit}"
    return f"{quantity(float(f'{seconds / 31_557_600:.3g}'))} years"


def _energy(joules: float) -> str:
    watt_hours = joules / 3600
    return f"{watt_hours:.3g} Wh" if watt_hours < 1000 else f"{quantity(watt_hours / 1000)} kWh"


def _dollars(price: float) -> str:
    return f"{price:.2g} USD" if price < 10 else f"{quantity(price)} USD"


def _config(name: str) -> ModelConfig:
    """The model config behind a preset's name, a recipe, a run or a folder."""
    if name in PRESETS:
        return ModelConfig.preset(name)
    path = Path(name)
    if path.is_dir() or path.suffix == ".bin" or name.startswith("hf:"):
        from groundup.inference import read_model_config

        return read_model_config(name)
    from groundup.config import build, find_recipe, read_recipe, recipe_files
    from groundup.training import PretrainRecipe

    if not path.is_file() and path.name.removesuffix(".yaml") not in recipe_files():
        raise UsageError(
            f"{name}: no preset, recipe or folder of that name.{nearest(name, [*PRESETS, *recipe_files()])} "
            f"Recipes: {', '.join(recipe_files())}. Presets: {', '.join(list(PRESETS)[:6])} … (see the README)."
        )
    given = read_recipe(find_recipe(name), PretrainRecipe)
    return (
        _planned(given) if PLANNED - given.values.keys() else build(PretrainRecipe, given.values, given.sources).model
    )


def _adapter(name: str) -> str | None:
    """What there is to say of an adapter, whose base the costs are of; None for other models."""
    if name in PRESETS or not (Path(name).is_dir() or name.startswith("hf:")):
        return None
    from groundup.inference import find_model
    from groundup.model.adapter_model import describe_adapter, is_adapter

    folder = find_model(name)
    return f"{describe_adapter(folder)}: the costs are those of the base" if is_adapter(folder) else None


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
