"""What quantizing costs: perplexity, divergence, size and speed of one model in each of the ways there are.

    groundup pretrain recipes/shakespeare-bpe.yaml                                       a trained model, 20 minutes
    python benchmarks/quantization.py --model runs/shakespeare-bpe --data TEXT           the table of docs/benchmarks.md
    python benchmarks/quantization.py … --tokens 2000 --new 8                            does it run? Nothing is kept
    python benchmarks/render.py                                                          write the page

The model must be a trained one: rounding the weights of a random one costs nothing that means anything. TEXT is text
that it has not seen: a run's own held-out part lies in its folder of prepared text. Each way is put on a fresh copy of
the model in bfloat16, and compared with the model in float32 on the same tokens; bfloat16 itself is the first of them.
Speed is that of one text, greedily, a way after the other, for several rounds. Ends in one JSON line, kept in
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import copy
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention_bench import machine, rounded, say
from decode_page import quantization

import groundup
from groundup.data import open_source
from groundup.evaluation import bytes_per_token, divergence
from groundup.inference import EngineSettings
from groundup.inference.speed import decode_speed
from groundup.model import Transformer, quantize_model
from groundup.model.quantized import nbytes

RESULT = Path(__file__).resolve().parent / "results" / "quantization.json"
WAYS: dict[str, dict[str, Any] | None] = {
    "bfloat16": None,
    "int8": {"kind": "int8"},
    "int4, groups of 32, zero points": {"kind": "int4", "group": 32, "zero_point": True},
    "int4, groups of 64, zero points": {"kind": "int4", "group": 64, "zero_point": True},
    "int4, groups of 128, zero points": {"kind": "int4", "group": 128, "zero_point": True},
    "int4, groups of 64": {"kind": "int4", "group": 64},
    "nf4, groups of 64": {"kind": "nf4", "group": 64},
    "nf4, groups of 64, double": {"kind": "nf4", "group": 64, "double": True},
}


def made(model: Transformer, way: dict[str, Any] | None) -> Transformer:
    """A copy in bfloat16, quantized."""
    twin = copy.deepcopy(model).to(torch.bfloat16)
    if way is not None:
        quantize_model(twin, **way)
        if not model.config.tie_embeddings:
            quantize_model(twin, "int8", skip=["embedding"])  # the head
    return twin.eval()


def token_ids(lm: groundup.LanguageModel, data: str, most: int) -> np.ndarray:
    """The beginning of a text, its documents one after the other."""
    ids: list[int] = []
    for document in open_source(data):
        ids += lm.prompt_ids(document.text)
        if len(ids) >= most:
            break
    return np.array(ids[:most])


def main() -> None:
    """Measure, keep, render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run, a checkpoint, a folder")
    parser.add_argument("--named", help="what the page calls it (the model's own name)")
    parser.add_argument("--data", required=True, help="text that it has not seen")
    parser.add_argument("--tokens", type=int, help="compare on so many tokens at most (65,536)")
    parser.add_argument("--new", type=int, help="tokens written where speed is measured (128)")
    parser.add_argument("--rounds", type=int, default=3, help="how often speed is measured (3)")
    arguments = parser.parse_args()
    lm = groundup.load(arguments.model, device="cpu", dtype="float32")
    ids = token_ids(lm, arguments.data, arguments.tokens or 65_536)
    context = lm.model.config.context_length
    new = min(arguments.new or 128, context // 2)
    models = {name: made(lm.model, way) for name, way in WAYS.items()}
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        found = divergence(lm.model, model, ids, bytes_per_token(lm.tokenizer), context, start_id=int(ids[0]))
        rows.append(
            {"way": name, "bytes": nbytes(model), "perplexity": found.changed_perplexity, "kl": found.kl,
             "kl_99": found.kl_99, "agreement": found.agreement, "bits_per_byte": found.changed_bits_per_byte,
             "tokens_per_second": []}
        )  # fmt: skip
        say(f"{name}: perplexity {found.changed_perplexity:.4f}, KL {found.kl:.5f}")
    for _ in range(arguments.rounds):
        for row in rows:
            speed = decode_speed(models[row["way"]], 1, context - new, new, EngineSettings(prefix_cache=False))
            row["tokens_per_second"].append(1 / speed.step)
    result = rounded(
        {"benchmark": "quantization", "date": datetime.now(UTC).strftime("%Y-%m-%d"),
         "model": arguments.named or Path(arguments.model).name,
         "parameters": sum(parameter.numel() for parameter in lm.model.parameters()),
         "tied": lm.model.config.tie_embeddings, "tokens": len(ids), "context": context, "original": {
             "bytes": nbytes(lm.model), "perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte},
         "rows": rows, "machine": machine("cpu")}
    )  # fmt: skip
    print(json.dumps(result))
    say("\n".join(quantization(result)))
    if arguments.tokens is None and arguments.new is None:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        import render

        render.write_page()


if __name__ == "__main__":
    main()
