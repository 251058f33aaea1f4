"""Decoding beside the peers: tokens a second for one text and for many, on a CPU.

    python benchmarks/decode.py                    everything: half an hour on two quiet cores
    python benchmarks/decode.py --works decode     one kind of work, or several: decode, crowd, gaps
    python benchmarks/decode.py --quick            a small model, one round: does it run?
    python benchmarks/render.py                    write docs/benchmarks.md from the kept results

decode   a prompt of 128 tokens, 128 new ones, for one text and for eight: ours, llama.cpp (F32, F16, Q8_0, Q4_0) and
         transformers' generate (float32, bfloat16). A prompt of 512 tokens for reading.
crowd    32 requests of unequal lengths: ours, transformers' generate on one padded batch, its generate_batch
gaps     four texts that are continued while a prompt of 8,000 tokens is read: the time between their tokens

The model is a Llama of 110 million parameters with random weights (12 layers, 768 wide, 12 heads, 4 of keys and values,
vocabulary of 32,000, the head not tied): how fast it decodes does not hang on what it says. Everybody decodes greedily.
Each measurement runs in a process of its own, the contenders in turn; a ratio is that of two contenders in one round.
llama.cpp is compared where llama-cpp-python is installed (pip install llama-cpp-python; it may have to be built).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from attention_bench import Kept, Worker, machine, rounded, say

from groundup.model import ModelConfig, Transformer, quantize_model, save_model
from groundup.model.weights.gguf import save_gguf
from groundup.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
JOBS = Path(__file__).with_name("decode_jobs.py")
SHAPE: dict[str, Any] = dict(
    vocab_size=32_000, context_length=16_384, n_layer=12, n_head=12, n_kv_head=4, n_embd=768, n_ff=2048, qk_norm=False,
    tie_embeddings=False, init_std=0.05,
)  # fmt: skip
QUICK: dict[str, Any] = SHAPE | dict(vocab_size=512, context_length=512, n_layer=2, n_embd=96, n_ff=256)
WAYS = ("float32", "16-bit", "8-bit", "4-bit")
WORKS = ("decode", "crowd", "gaps")


def cases_of(quick: bool) -> list[dict[str, Any]]:
    """What is measured, and who takes part."""
    three, two = ["groundup", "llama.cpp", "transformers"], ["groundup", "llama.cpp"]
    long, new = (64, 8) if quick else (512, 128)
    cases = [
        {"work": "decode", "way": way, "batch": batch, "prompt": prompt, "new": count,
         "contenders": three if way in ("float32", "16-bit") else two}
        for way in WAYS
        for batch, prompt, count in ((1, min(128, long), new), (8, min(128, long), new), (1, long, 1))
    ]  # fmt: skip
    rng = np.random.default_rng(3)
    lengths = rng.integers(8, 32 if quick else 384, 32).tolist()
    news = rng.integers(4, 16 if quick else 192, 32).tolist()
    cases += [
        {"work": "crowd", "way": way, "lengths": lengths, "news": news,
         "contenders": ["groundup", "transformers", "transformers, continuous"]}
        for way in ("float32", "16-bit")
    ]  # fmt: skip
    gaps = {"work": "gaps", "way": "16-bit", "batch": 4, "prompt": 32, "long": 256 if quick else 8000}
    return [*cases, gaps | {"contenders": ["groundup"]}]


def write_models(folder: Path, shape: Mapping[str, Any]) -> None:
    """The same weights for everybody, in everybody's formats."""
    torch.manual_seed(1)
    model = Transformer(ModelConfig.from_dict(shape)).eval()
    (folder / "hf").mkdir()
    save_model(model, folder / "hf")
    words = "".join(chr(33 + number % 90) for number in range(40_000))
    tokenizer = Tokenizer.train([words], 300, show_progress=False)  # no text is read: llama.cpp's file wants one
    for kind in ("f32", "f16", "q8_0", "q4_0"):
        save_gguf(model, tokenizer, folder / f"{kind}.gguf", kind)  # type: ignore[arg-type]
    for kind in ("int8", "int4"):
        (folder / kind).mkdir()
        quantized = quantize_model(copy.deepcopy(model), kind)  # type: ignore[arg-type]
        save_model(quantize_model(quantized, "int8", skip=["embedding"]), folder / kind)  # the head, as in q4_0


def measure_case(worker: Worker, case: dict[str, Any], rounds: int, common: dict[str, Any]) -> dict[str, Any]:
    """Every contender once a round, in turn."""
    job = {key: value for key, value in case.items() if key != "contenders"} | common
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in case["contenders"]}
    failures: dict[str, str] = {}
    agree: dict[str, Any] = {}
    for _ in range(rounds):
        for name in case["contenders"]:
            if name in failures:
                continue
            answer = worker.ask(job | {"job": "work", "kind_of_work": case["work"], "contender": name})
            if "failed" in answer:
                failures[name] = answer["failed"]
                say(f"  FAILED {case['work']} {case['way']} {name}: {answer['failed']}")
                continue
            agree[name] = answer.pop("tokens", None)
            found[name].append(answer)
    kept = {key: value for key, value in case.items() if key not in ("contenders", "lengths", "news")}
    if case["way"] == "float32" and agree.get("groundup"):  # the same first tokens: it is the same model
        kept["same"] = {
            name: [row[:8] for row in tokens] == [row[:8] for row in agree["groundup"]]
            for name, tokens in agree.items()
            if tokens and name != "groundup"
        }
    if case["work"] == "crowd":
        kept["tokens"] = sum(case["news"])
    result = kept | {"rounds": found, "failures": failures}
    say("  " + line_of(result))
    return result


def line_of(case: Mapping[str, Any]) -> str:
    """A case in a line."""
    if case["work"] == "gaps":
        return f"gaps: p99 {median(one['ratio'] for one in case['rounds']['groundup']):.2f}x the usual"
    head = f"{case['work']} {case['way']} batch {case.get('batch', 32)} prompt {case.get('prompt', 'mixed')}: "
    return head + ", ".join(f"{name} {rate(case, name):,.0f}" for name, times in case["rounds"].items() if times)


def rate(case: Mapping[str, Any], name: str) -> float:
    """Tokens a second: decoded, of a crowd those that were asked for, and read where nothing is decoded."""
    return median(rate_of(case, one) for one in case["rounds"][name])


def rate_of(case: Mapping[str, Any], one: Mapping[str, Any]) -> float:
    """The same of one round."""
    if case["work"] == "crowd":
        return case["tokens"] / one["seconds"]
    return 1 / one["decode"] if case["new"] > 1 else case["batch"] * case["prompt"] / one["read"]


def add_ratios(cases: list[dict[str, Any]]) -> None:
    """Ours over each of the others, round by round."""
    for case in cases:
        ours = case["rounds"]["groundup"]
        case["ratios"] = {}
        for name, theirs in case["rounds"].items():
            if name == "groundup" or not theirs or not ours:
                continue
            found = [rate_of(case, a) / rate_of(case, b) for a, b in zip(ours, theirs, strict=False)]
            case["ratios"][name] = {"median": median(found), "low": min(found), "high": max(found)}


def main() -> None:
    """Measure, keep, render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), help="fewer than all are not kept")
    parser.add_argument("--rounds", type=int, help="how often each contender runs (3)")
    parser.add_argument("--quick", action="store_true", help="a small model, one round; nothing is kept")
    parser.add_argument("--done", type=Path, metavar="FILE", help="keep what is measured there, and go on from it")
    parser.add_argument("--out", type=Path, help="write the result there instead of where it is kept")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    shape, load_before = QUICK if arguments.quick else SHAPE, os.getloadavg()[0]
    there = importlib.util.find_spec("llama_cpp") is not None
    if not there:
        say("llama-cpp-python is not installed, so llama.cpp is left out; the head of this file says how to have it.")
    kept = Kept(arguments.done)
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), shape)
        worker = Worker({"PYTHONWARNINGS": "ignore"}, JOBS)
        common = {"folder": folder, "vocab_size": shape["vocab_size"], "threads": torch.get_num_threads()}
        for case in cases_of(arguments.quick):
            case["contenders"] = [name for name in case["contenders"] if there or name != "llama.cpp"]
            named = {key: case[key] for key in ("work", "way", "batch", "prompt") if key in case}
            if case["work"] in arguments.works and not any(
                all(one.get(key) == value for key, value in named.items()) for one in kept.cases
            ):
                kept.add(measure_case(worker, case, rounds, common))
        worker.close()
    add_ratios(kept.cases)
    result: dict[str, Any] = {
        "benchmark": "decode", "date": datetime.now(UTC).strftime("%Y-%m-%d"), "quick": arguments.quick,
        "load_before": load_before, "shape": shape, "cases": kept.cases, "machine": machine("cpu"),
    }  # fmt: skip
    result["machine"]["packages"]["llama_cpp_python"] = version("llama_cpp_python") if there else None
    result = rounded(result)
    whole = set(arguments.works) == set(WORKS) and not arguments.quick
    if arguments.out or whole:
        (arguments.out or RESULTS / "decode.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    import render
    from decode_page import decode

    say("\n".join(decode(result)))
    if whole and not arguments.out:
        render.write_page()


if __name__ == "__main__":
    main()
