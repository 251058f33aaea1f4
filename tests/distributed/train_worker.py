"""Started by torchrun, or alone: trains tiny models in several ways; rank 0 writes each way's losses as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from groundup.data import TokenBatch
from groundup.model import Experts, ModelConfig, Transformer
from groundup.optim import OptimConfig, WeightAverage, build_optimizers
from groundup.runtime.interrupt import StopRequest
from groundup.runtime.process_group import World, process_group
from groundup.training.loop import Loop
from groundup.training.loop_parts import Extras, LoopHooks, LoopSettings
from groundup.training.objectives import NextToken
from groundup.training.parallel import Stepper, full_tensors, spread

ROWS, MICRO = 8, 1
BASE: dict[str, Any] = dict(vocab_size=53, context_length=13, n_layer=3, n_head=3, n_embd=18, n_ff=29)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # model, optimizer, further settings
    "adamw": ({}, {"optimizer": "adamw"}, {}),
    "muon": ({"tie_embeddings": False}, {"optimizer": "muon"}, {}),
    "clipped, noised, averaged": (
        {},
        {"optimizer": "adamw", "grad_clip": 0.3, "gradient_noise": 1e-3, "average": 0.9, "adaptive_clip": 0.5},
        {},
    ),
    "dropout": ({"dropout": 0.2}, {}, {}),
    "experts": ({"experts": Experts(count=4, active=2, width=7)}, {}, {}),
    "further tokens": ({"n_predict": 1}, {"optimizer": "adamw"}, {}),
    "computed again": ({}, {"optimizer": "adamw"}, {"checkpointing": "selective"}),
    "learned positions": ({"positions": "learned", "norm": "layernorm", "bias": True}, {"optimizer": "adamw"}, {}),
}


class Losses(LoopHooks):
    """Keeps the losses."""

    def __init__(self) -> None:
        self.rows: list[list[float]] = []

    def on_log(self, row: dict[str, Any]) -> None:
        self.rows.append([row["loss"], row["grad_norm"]])


def batch(index: int) -> TokenBatch:
    """One sequence, some of whose targets count for nothing: ranks have unequal shares of a step's targets."""
    generator = torch.Generator().manual_seed(100 + index)
    ids = torch.randint(BASE["vocab_size"], (MICRO, BASE["context_length"] + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[:, : index % 7] = -100
    return TokenBatch(ids[:, :-1], targets)


def train(world: World, way: Any, name: str) -> dict[str, Any]:
    """Seven steps; the losses and the sum of all weights afterwards."""
    fields, optim_fields, further = CASES[name]
    torch.manual_seed(1)
    model = Transformer(ModelConfig(**BASE | fields))
    model.checkpointing = further.get("checkpointing", "none")
    optim = OptimConfig(learning_rate=0.01, warmup_steps=2, **optim_fields)
    stepper = spread(Stepper(model, NextToken()), world, way)
    hooks = Losses()
    settings = LoopSettings(
        batch_tokens=ROWS * BASE["context_length"], accumulate=ROWS // MICRO // world.size, max_steps=7, seconds=None,
        log_every=1, save_every=100, precision="float32", seed=3,
    )  # fmt: skip
    extras = Extras(WeightAverage(model, optim.average) if optim.average else None)
    loop = Loop(
        stepper, NextToken(), batch, build_optimizers(model, optim), optim, settings, hooks, extras=extras, world=world
    )
    loop.run(StopRequest())
    weights = full_tensors(model)
    model.eval()
    with torch.inference_mode():
        logits = model(batch(0).inputs)
    return {
        "rows": hooks.rows,
        "weights": [float(tensor.double().abs().sum()) for tensor in weights.values()],
        "logits": float(logits.abs().sum()),
    }


def main() -> None:
    """Ways and cases as said on the command line: OUT WAY CASE…."""
    torch.set_num_threads(1)
    out, way, *names = sys.argv[1:]
    with process_group(torch.device("cpu"), 60.0) as world:
        found = {name: train(world, way, name) for name in names or CASES}
        if world.is_main:
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
