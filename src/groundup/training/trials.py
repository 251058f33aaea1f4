"""How fast a step is here, found by making some that nothing is learnt from."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from groundup.data import TokenBatch
from groundup.model import Transformer
from groundup.runtime import warn
from groundup.runtime.device import autocast, synchronize

if TYPE_CHECKING:
    from groundup.training.plan import Pretraining

TIMES = 4


def seconds_per_micro_batch(it: Pretraining, *, compiled: bool) -> tuple[float | None, float]:
    """Forward and backward pass of one micro-batch of random tokens, on a model of the run's shape.

    Returns:
        Seconds of the fastest of several, None where it fails; and how much longer the first one took, which is what
        compiling costs.
    """
    from groundup.training.parallel import Stepper, compile_blocks
    from groundup.training.pretraining import objective_of

    config = it.recipe.model
    model = Transformer(config).to(it.device)
    if it.recipe.attention != "auto":
        model.backend = it.recipe.attention
    if it.recipe.checkpointing != "auto":
        model.checkpointing = it.recipe.checkpointing
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
