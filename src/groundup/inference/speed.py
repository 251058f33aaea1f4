"""How fast a model reads and writes on this machine, and how much of its memory's speed that is.

To write a token, all weights are read once, whatever their number, and the keys and values of each text. Where that
takes the time, decoding runs at the speed of the memory: the roofline of Williams et al. 2009.
"""

# B texts   T tokens

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median, quantiles

import torch
from torch import nn

from groundup.inference.engine import Engine, EngineSettings
from groundup.inference.requests import Request
from groundup.inference.sampling import SamplingParams
from groundup.model import Transformer
from groundup.model.parts import cache_bytes
from groundup.model.quantized import nbytes
from groundup.runtime import UsageError

BUFFER = 1 << 28  # bytes that are read to measure the memory: more than a processor keeps by itself
WARM_UP = 4  # tokens that are written before anything is measured


@dataclass(frozen=True)
class DecodeSpeed:
    """What was measured for so many texts at once.

    Args:
        batch: texts.
        read: tokens of prompts per second.
        written: new tokens per second, of all texts together.
        step: seconds between the tokens of one text, median; ``slow_step``: what one in a hundred is above.
        step_bytes: read from memory for each of them: weights, keys and values.
    """

    batch: int
    read: float
    written: float
    step: float
    slow_step: float
    step_bytes: int

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.step_bytes / self.step


def decode_speed(model: Transformer, batch: int, prompt: int, new: int, settings: EngineSettings) -> DecodeSpeed:
    """Measure greedy decoding of random tokens, which takes as long as that of any others.

    Args:
        batch: texts at once.
        prompt: tokens of each that are read.
        new: tokens of each that are written.
        settings: of the engine; nothing is kept of one text for the next.

    Raises:
        UsageError: the texts do not fit into the model's context.
        GroundupError: the engine failed.
    """
    config = model.config
    if prompt + new > config.context_length:
        raise UsageError(
            f"{prompt} tokens and {new} new ones are more than the model's context of {config.context_length}."
        )
    engine = Engine(model, settings=settings)
    for count in (WARM_UP, new):
        random = torch.Generator().manual_seed(1)
        prompts = torch.randint(0, config.vocab_size, (batch, prompt), generator=random).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_end=True)
        first, *rest = ends = time_decoding(engine, [Request(ids, params, live=False) for ids in prompts])
    steps = [after - before for before, after in pairwise(ends)]
    cached = cache_bytes(config, batch, prompt + new // 2, model.dtype.itemsize)
    return DecodeSpeed(
        batch, batch * prompt / first, batch * len(rest) / (ends[-1] - first), median(steps),
        quantiles(steps, n=100)[98] if len(steps) > 1 else steps[0], weights_read(model) + cached,
    )  # fmt: skip


def time_decoding(engine: Engine, requests: Sequence[Request]) -> list[float]:
    """Decode some requests: seconds until all have their first token, and until each step after that.

    Raises:
        GroundupError: the engine failed.
    """
    started = time.perf_counter()
    for request in requests:
        engine.add(request)
    while any(not request.tokens and request.error is None for request in requests):
        engine.step()
    ends = [time.perf_counter() - started]
    while engine.busy:
        engine.step()
        ends.append(time.perf_counter() - started)
    for request in requests:
        if request.error is not None:
            raise request.error
    return ends


def weights_read(model: Transformer) -> int:
    """Bytes of weights that a step reads: all but the rows of tables that nobody looks up.

    Of a mixture, all experts are counted: many texts meet all of them, one text does not.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    shared = {id(parameter) for parameter in model.head.parameters()}
    return nbytes(model) - sum(nbytes(table) for table in tables if id(table.weight) not in shared)


def memory_bandwidth(device: torch.device, rounds: int = 5) -> float:
    """Bytes per second at which memory is read, all threads at work: the best of some rounds."""
    buffer = torch.ones(BUFFER // 4, device=device)
    best = float("inf")
    for _ in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        float(buffer.sum())  # the number is waited for
        best = min(best, time.perf_counter() - started)
    return BUFFER / best
