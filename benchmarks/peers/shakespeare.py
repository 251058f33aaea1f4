"""nanoGPT's own example for a CPU, by hand: a small GPT learns the characters of a text.

    python benchmarks/peers/shakespeare.py train.txt val.txt out        writes out/model.safetensors and out/log.json

The settings are those that nanoGPT's README gives for a computer without a GPU: 4 layers of 4 heads, 128 wide, context
64, 12 sequences a step, 2,000 steps, no dropout, float32, not compiled; every 250 steps the loss on 20 batches of each
part, and the weights are saved when the held-out one is better.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from gpt import GPT, GPTConfig
from loop import Settings, adamw, estimate, learning_rate_at, random_windows, step
from safetensors.torch import save_file

EVAL_EVERY, EVAL_BATCHES = 250, 20


def main() -> None:
    """Train."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="the text to learn")
    parser.add_argument("val", type=Path, help="the text held out")
    parser.add_argument("out", type=Path, help="a folder for the weights")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=1337, help="of weights and batches")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    texts = [path.read_text(encoding="utf-8") for path in (arguments.train, arguments.val)]
    characters = sorted(set("".join(texts)))
    ids = {character: number for number, character in enumerate(characters)}
    train_N, val_N = (np.array([ids[character] for character in text], np.uint16) for text in texts)

    config = GPTConfig(len(characters), block_size=64, n_layer=4, n_head=4, n_embd=128, bias=False)
    settings = Settings(steps=arguments.steps)
    model = GPT(config)
    optimizer = adamw(model, settings)
    arguments.out.mkdir(parents=True, exist_ok=True)
    log, best = [], float("inf")
    for number in range(settings.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(number, settings)
        if number % EVAL_EVERY == 0 or number == settings.steps:
            train, val = (estimate(model, tokens_N, EVAL_BATCHES, settings.batch) for tokens_N in (train_N, val_N))
            log.append({"step": number, "seconds": time.perf_counter() - began, "train": train, "val": val})
            print(f"step {number}: train {train:.4f}, held out {val:.4f}", file=sys.stderr, flush=True)
            if val < best and number:
                best = val
                weights = {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}
                save_file(weights, arguments.out / "model.safetensors")
        if number < settings.steps:
            inputs_BT, targets_BT = random_windows(train_N, settings.batch, config.block_size)
            loss = step(model, optimizer, lambda inputs=inputs_BT, targets=targets_BT: model(inputs, targets)[1])
            print(f"step {number}: loss {loss.item():.4f}", file=sys.stderr)
    notes = {"config": asdict(config), "settings": asdict(settings), "characters": "".join(characters), "log": log}
    (arguments.out / "log.json").write_text(json.dumps(notes))


if __name__ == "__main__":
    main()
