"""What a step takes here: memory, as it is predicted, and time, found by making some that nothing is learnt from."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from groundup.data import TokenBatch
from groundup.model import ModelConfig, Transformer, explain
from groundup.model.memory import loss_chunk
from groundup.runtime import UsageError, say, warn
from groundup.runtime.console import byte_size, clock
from groundup.runtime.device import Precision, activation_dtype, autocast, memory_left, synchronize
from groundup.runtime.process_group import World
from groundup.training.parallel import Stepper, compile_blocks, equip, settle_way
from groundup.training.recipe import RunKeys

if TYPE_CHECKING:
    from groundup.training.plan import Pretraining

MEMORY_SHARE = 0.8  # of the memory that is left, which a run may plan to use
LONG_ENOUGH_TO_COMPILE = 1200.0  # seconds of training below which trying torch.compile costs more than it can bring
TIMES = 4


def fit(
    config: ModelConfig, recipe: RunKeys, device: torch.device, precision: Precision, world: World, *, fixed: bool,
    chunk: int = 0,
) -> tuple[int, Any, str]:  # fmt: skip
    """Sequences at once, and what is computed again, so that the step fits into memory as it is predicted to be.

    Fewer sequences are tried first, as far as the ranks can share a step's evenly; when one sequence alone is too much,
    activations are computed again.

    Args:
        config: of the model, whose context length is that of a sequence.
        fixed: the recipe's micro-batch is to stay as it is.
        chunk: positions whose logits are held at once; 0 chooses.

    Returns:
        micro-batch, checkpointing, and the reason.
    """
    given, chunk = recipe.micro_batch or 1, chunk or loss_chunk(config.vocab_size)
    per_step = max(1, (recipe.batch_tokens or 0) // config.context_length)
    if per_step % world.size:
        raise UsageError(
            f"batch_tokens = {recipe.batch_tokens} is {per_step} sequences, which {world.size} processes cannot share. "
            f"Give a multiple of {world.size} x context_length = {world.size * config.context_length}."
        )
    ours = per_step // world.size
    sizes = [n for n in range(min(given, ours), 0, -1) if ours % n == 0]
    if fixed:
        if (recipe.batch_tokens or 0) % (given * config.context_length * world.size):
            by_processes = f" x {world.size} processes" if world.size > 1 else ""
            raise UsageError(
                f"batch_tokens = {recipe.batch_tokens} is not a multiple of micro_batch x context_length{by_processes} "
                f"= {given} x {config.context_length}{by_processes}."
            )
        sizes = [given]
    ways: list[Any] = ["none", "selective", "block"] if recipe.checkpointing == "auto" else [recipe.checkpointing]
    room = memory_left(device)
    room = None if room is None else int(MEMORY_SHARE * room) // (world.size if device.type == "cpu" else 1)
    share = world.size if settle_way(recipe.parallel, world) == "fsdp" else 1

    def needs(sequences: int, way: Any) -> int:
        costs = explain(
            config, sequences, activation_dtype_bytes=activation_dtype(precision).itemsize,
            optimizer=recipe.optim.optimizer, checkpointing=way, loss_chunk=chunk,
        ).training  # fmt: skip
        fixed = costs.weights + costs.gradients + costs.moments
        return costs.total - fixed + fixed // share

    for way in ways:
        for sequences in sizes:
            if room is None or needs(sequences, way) <= room:
                why = f"{byte_size(needs(sequences, way))} predicted"
                return sequences, way, why + (f", {byte_size(room)} to be had" if room is not None else "")
    say(
        f"  This model is predicted to need {byte_size(needs(sizes[-1], ways[-1]))} of memory; "
        f"{byte_size(room or 0)} are to be had. Trying all the same."
    )
    return sizes[-1], ways[-1], "more than is predicted to fit"


def worth_compiling(it: Pretraining) -> tuple[bool, str]:
    """Try torch.compile on a few steps where the run is long enough for it to pay; whether it did, and why."""
    expected = it.expected_seconds() or 0.0
    if expected < LONG_ENOUGH_TO_COMPILE:
        return False, f"runs under {clock(LONG_ENOUGH_TO_COMPILE)} are over before it pays; --compile true insists"
    if it.world.size > 1:
        return False, "not tried on several processes; --compile true insists"
    say("Trying torch.compile on a few steps …")
    plain, _ = seconds_per_micro_batch(it, compiled=False)
    fast, to_compile = seconds_per_micro_batch(it, compiled=True)
    if fast is None or plain is None:
        return False, "torch.compile failed here"
    saved = expected * (1 - fast / plain) - to_compile
    shown = f"measured: {1000 * plain:.0f} ms a micro-batch, {1000 * fast:.0f} compiled, {to_compile:.0f} s to compile"
    return saved > 0, shown


def seconds_per_micro_batch(it: Pretraining, *, compiled: bool) -> tuple[float | None, float]:
    """Forward and backward pass of one micro-batch of random tokens, on a model of the run's shape.

    Returns:
        Seconds of the fastest of several, None where it fails; and how much longer the first one took, which is what
        compiling costs.
    """
    from groundup.training.pretraining import objective_of

    config = it.recipe.model
    model = equip(Transformer(config).to(it.device), it.recipe)
    if compiled:
        compile_blocks(model)
    stepper = Stepper(model, objective_of(it.recipe))
    shape = (it.recipe.micro_batch or 1, config.context_length)
    ids = torch.randint(it.prepared.tokenizer.vocab_size, shape, device=it.device)
    times = []
    try:
        for _ in range(1 + TIMES):
            synchronize(it.device)
            started = time.perf_counter()
            with autocast(it.device, it.precision):
                loss, _ = stepper(TokenBatch(ids, ids))
            loss.backward()
            synchronize(it.device)
            times.append(time.perf_counter() - started)
            model.zero_grad(set_to_none=True)
    except Exception as error:  # a compiler can fail in any way, and the run does not need it
        warn(f"torch.compile is left out: {(str(error).splitlines() or [type(error).__name__])[0][:200]}")
        return None, 0.0
    return min(times[1:]), times[0] - min(times[1:])
