"""One training step beside the peers: tokens/s, the share of the machine's matrix products, peak memory.

    python benchmarks/train.py                        everything on the CPU: some hours on two quiet cores
    python benchmarks/train.py --device cuda          the same on a GPU
    python benchmarks/train.py --sizes 12M --ways bfloat16      one size, one way, or several: see --help
    python benchmarks/train.py --quick                a tiny model, one round, a minute or two: does it run?
    python benchmarks/render.py                       write docs/benchmarks.md from the kept results

What is measured is the whole step: forward pass, backward pass, clipping, optimizer. Ours is the loop of ``groundup
pretrain`` with everything that it does between steps; the others have a loop that does nothing else: a plain GPT by
hand in nanoGPT's shape (peers/), transformers' GPT-2 and Llama, litgpt's. All have the same size, batches and fused
AdamW; a further row of ours has Muon. Each measurement runs in a process of its own, the contenders in turn, A B A B
…, for several rounds; a ratio is that of two contenders in one round, and the median of the rounds is reported with
the lowest and the highest. "As it comes" is what each does when it is told nothing.

The share is that of the fastest matrix product of the same precision measured in the same run, by the FLOPs of
Chowdhery et al. 2022, appendix B. Peak memory is what the process holds at most in a step beyond what it held before
the model was made, measured in runs of their own.

litgpt is compared where it is installed. It cannot be one of this package's extras: 0.5.13 asks for
huggingface_hub below 1.4 and jsonargparse up to 4.41. Its model works beside newer ones, so install it without what it
asks for: pip install --no-deps litgpt==0.5.13 lightning pytorch-lightning lightning-utilities torchmetrics. Ends in one
JSON line, kept in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from attention_bench import Bench, Kept, Rounds, machine, rounded, say

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
JOBS = Path(__file__).with_name("train_jobs.py")
# "12M" has the vocabulary of a small text, so that its 12.3M parameters are those of its layers; the sizes above it are
# those that `groundup demo` comes to in a few minutes on a CPU.
SIZES: dict[str, dict[str, int]] = {
    "4 x 128": dict(n_layer=4, n_head=2, n_embd=128, vocab_size=2048, context=256, batch=16, steps=24),
    "4 x 256": dict(n_layer=4, n_head=4, n_embd=256, vocab_size=2048, context=256, batch=16, steps=12),
    "12M": dict(n_layer=6, n_head=6, n_embd=384, vocab_size=4096, context=256, batch=16, steps=6),
    "GPT-2 124M": dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50_257, context=512, batch=2, steps=4),
}
QUICK = {"tiny": dict(n_layer=2, n_head=2, n_embd=32, vocab_size=64, context=16, batch=2, steps=2)}
GPU_STEPS = 10  # times as many steps on a GPU, which makes them so much faster
WAYS = ("float32", "bfloat16", "float32, compiled", "bfloat16, compiled", "as it comes")
CONTENDERS = (
    "groundup, GPT-2", "by hand, GPT-2", "transformers, GPT-2", "litgpt, GPT-2",
    "groundup, Llama", "transformers, Llama", "litgpt, Llama",
    "groundup, GPT-2, Muon",
)  # fmt: skip
AS_IT_COMES = ("groundup, GPT-2", "by hand, GPT-2", "transformers, GPT-2", "litgpt, GPT-2")


def contenders_of(way: str, packages: dict[str, bool]) -> list[str]:
    """Who runs in a way; those whose package is not installed do not."""
    names = AS_IT_COMES if way == "as it comes" else CONTENDERS
    return [name for name in names if packages.get(name.partition(",")[0], True)]


def measure_case(bench: Bench, name: str, size: dict[str, int], way: str, packages: dict[str, bool]) -> dict[str, Any]:
    """One size in one way."""
    job = {"job": "train", "kind": f"{name}, {way}", "way": way, "size": size, "steps": size["steps"]}
    names = contenders_of(way, packages)
    rounds = bench.rounds_of(names, job)
    memory = {of: bench.run("memory", job | {"contender": of, "steps": 2}) for of in rounds}
    for of, times in rounds.items():
        if times:
            say(f"  {name:<10} {way:<20} {of:<24} {tokens_per_second(size, times):10,.0f} tokens/s")
    return {
        "size": name,
        "way": way,
        "rounds": {of: [summary(one) for one in times] for of, times in rounds.items()},
        "memory": {of: answer["bytes"] for of, answer in memory.items() if answer},
        "settings": {of: {key: times[0][key] for key in ("parameters", "precision", "compiled")}
                     for of, times in rounds.items() if times},
    }  # fmt: skip


def summary(one: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one process: its median step."""
    kept = {key: one[key] for key in ("first", "loss", "ceiling", "flops_per_token")}
    return kept | {"seconds": median(one["seconds"])}


def tokens_per_second(size: dict[str, int], times: list[dict[str, Any]]) -> float:
    """Of the median step of all rounds' steps."""
    return size["batch"] * size["context"] / median(second for one in times for second in one["seconds"])


# ---- what it comes to


def add_figures(result: dict[str, Any]) -> None:
    """Tokens/s and shares of the ceiling of every contender; ratios of ours to the fastest peer of the same shape."""
    ceilings: dict[str, float] = {}
    for case in result["cases"]:
        for name, times in case["rounds"].items():
            for one in times:
                precision = case["settings"][name]["precision"]
                ceilings[precision] = max(ceilings.get(precision, 0.0), one["ceiling"])
    result["ceilings"] = ceilings
    for case in result["cases"]:
        size = result["sizes"][case["size"]]
        tokens = size["batch"] * size["context"]
        case["tokens_per_second"], case["mfu"] = {}, {}
        for name, times in case["rounds"].items():
            if not times:
                continue
            rates = [tokens / one["seconds"] for one in times]
            case["tokens_per_second"][name] = {"median": median(rates), "low": min(rates), "high": max(rates)}
            flops = times[0]["flops_per_token"] * median(rates)
            case["mfu"][name] = flops / ceilings[case["settings"][name]["precision"]]
        case["ratios"] = {
            ours: found for ours in case["rounds"] if ours.startswith("groundup") and (found := ratio(case, ours))
        }


def ratio(case: dict[str, Any], ours: str) -> dict[str, Any] | None:
    """How many times as many tokens a second ours makes as the fastest peer of its shape, round by round."""
    rounds: Rounds = case["rounds"]
    shape = ours.split(", ")[1]
    peers = [
        name for name in rounds if not name.startswith("groundup") and name.split(", ")[1] == shape and rounds[name]
    ]
    if not peers or not rounds[ours]:
        return None
    best = min(peers, key=lambda name: median(one["seconds"] for one in rounds[name]))
    ratios = [their["seconds"] / our["seconds"] for our, their in zip(rounds[ours], rounds[best], strict=False)]
    return {"theirs": best, "median": median(ratios), "low": min(ratios), "high": max(ratios)}


def measure_all(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every size and way that was asked for."""
    sizes = QUICK if arguments.quick else SIZES
    if arguments.device.startswith("cuda") and not arguments.quick:
        sizes = {name: size | {"steps": GPU_STEPS * size["steps"]} for name, size in sizes.items()}
    packages = {"litgpt": importlib.util.find_spec("litgpt") is not None}
    if not packages["litgpt"]:
        say("litgpt is not installed, so it is left out; the head of this file says how to install it.")
    result: dict[str, Any] = {
        "benchmark": "train",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "quick": arguments.quick,
        "device": arguments.device,
        "load_before": os.getloadavg()[0],
    }
    bench, kept = Bench(folder, arguments, JOBS), Kept(arguments.done)
    for name in sizes if arguments.quick else arguments.sizes:
        for way in arguments.ways:
            if not kept.has(size=name, way=way):
                kept.add(measure_case(bench, name, sizes[name], way, packages))
    measured = {case["size"] for case in kept.cases}
    result |= {"cases": kept.cases, "sizes": {name: size for name, size in sizes.items() if name in measured}}
    bench.close()
    result |= {"rounds": bench.rounds, "failures": bench.failures, "machine": machine(arguments.device)}
    result["machine"]["packages"]["litgpt"] = version("litgpt") if packages["litgpt"] else None
    add_figures(result)
    return rounded(result)


def main() -> None:
    """Measure, keep, render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), metavar="SIZE",
                        help=f"of {', '.join(SIZES)}; fewer than all are not kept")  # fmt: skip
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY",
                        help=f"of {'; '.join(WAYS)}; fewer than all are not kept")  # fmt: skip
    parser.add_argument("--rounds", type=int, help="how often each contender runs (3)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round; nothing is kept")
    parser.add_argument("--done", type=Path, metavar="FILE", help="keep what is measured there, and go on from it")
    parser.add_argument("--out", type=Path, help="write the result there instead of where it is kept")
    parser.set_defaults(dtype="float32", memory_limit=0.0)  # of the attention benchmark: here each job names its own
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure_all(arguments, Path(folder))
    whole = set(arguments.sizes) == set(SIZES) and set(arguments.ways) == set(WAYS) and not arguments.quick
    name = "train.json" if arguments.device == "cpu" else "train_gpu.json"
    if arguments.out or whole:
        (arguments.out or RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    import render
    from train_page import train

    say("\n".join(train(result)))
    if whole and not arguments.out:
        render.write_page()


if __name__ == "__main__":
    main()
