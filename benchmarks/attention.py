"""Every kind of attention and every backend beside transformers: time, memory, cache; and two whole models.

    python benchmarks/attention.py                        everything on the CPU: some hours on two quiet cores
    python benchmarks/attention.py --device cuda --dtype bfloat16        the same on a GPU
    python benchmarks/attention.py --only gpt2 experts    one part, or several: see --help
    python benchmarks/attention.py --quick                short texts and one round, a minute or two: does it run?
    python benchmarks/attention.py --quick --plots FOLDER         and draw what was found there
    python benchmarks/render.py                           write docs/benchmarks.md from the kept results

How it is measured. A contender is a model of one layer with a narrow feed-forward, so that attention is nearly all of
its work: groundup's with one of its backends, or transformers' with one of its own, loaded from the same folder of
weights. Each measurement runs in a process of its own, the contenders in turn, A B A B …, for several rounds; a ratio
is that of two contenders in one round, and the median of the rounds is reported with the lowest and the highest.
"Forward" reads the whole context, "training" does and computes the gradients of all weights, "decoding" is one token
after a context that lies in the cache. Peak memory is what a process holds at most beyond what it held before, in runs
of their own whose allocator gives back at once what is freed. What would hold more than a limit is left out, and said.
Outputs on the same ids are compared with transformers'. Ends in one JSON line, kept in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from attention_bench import Bench, Kept, Rounds, machine, rounded, say
from attention_kinds import COMMON, KINDS, contenders_of, needed_bytes, phases_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
PARTS = ("attention", "gpt2", "experts")
PHASES = ("forward", "training", "decoding")
GPT2 = ("groundup", "transformers, sdpa", "transformers, eager", "groundup, its own loss")
EXPERTS = ("groundup", "transformers, default", "transformers, eager")
EXPERT_SIZES = ((512, 1792), (1024, 3584))  # Mixtral's 4,096 to 14,336, scaled down
EXPERT_TOKENS = (64, 512, 2048)
REFERENCES = ("transformers, eager", "transformers, sdpa", "groundup, explicit", "groundup, explicit, expanded")


def save(folder: Path, fields: dict[str, Any]) -> int:
    """Save a new model with these fields over the defaults; returns its parameters."""
    import torch

    from groundup.model import ModelConfig, Transformer, save_model

    torch.manual_seed(3)
    model = Transformer(ModelConfig.from_dict(fields))
    for name, parameter in model.named_parameters():
        if "sinks" in name:  # which begin at 0, all alike
            torch.nn.init.normal_(parameter)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder)
    config = json.loads((folder / "config.json").read_text())
    if "layer_types" in config and config["sliding_window"] is None:
        # transformers makes the mask of a window for these families even where no layer has one, and fails without it.
        (folder / "config.json").write_text(json.dumps(config | {"sliding_window": model.config.context_length}))
    return model.parameter_count()


# ---- the parts


def attention_part(bench: Bench, kinds: Sequence[str], lengths: Sequence[int], kept: Kept) -> list[dict[str, Any]]:
    """Every kind at every length, but for what is kept: rounds of times, peak and cache bytes of each contender."""
    longest = max(lengths) + 64
    for kind in kinds:
        folder = bench.folder / kind
        save(folder, COMMON | KINDS[kind] | {"context_length": longest})
        for length in lengths:
            if kept.has(kind=kind, length=length):
                continue
            case = one_case(bench, kind, folder, length)
            kept.add(case)
            for name, times in case["rounds"].items():
                shown = "  ".join(
                    f"{phase} {1e3 * median(one[phase] for one in times):8.2f} ms"
                    for phase in PHASES
                    if phase in times[0]
                )
                say(f"  {kind:<14} {length:>5} {name:<32} {shown}")
    return kept.cases


def one_case(bench: Bench, kind: str, folder: Path, length: int) -> dict[str, Any]:
    """One kind at one length."""
    job = {
        "job": "attention", "kind": kind, "folder": str(folder), "length": length, "vocab_size": COMMON["vocab_size"],
    }  # fmt: skip
    phases, skipped = {}, {}
    for name in contenders_of(kind, bench.device):
        wanted = phases_of(name, bench.device)
        needs = {phase: needed_bytes(kind, name, length, phase, bench.device) for phase in wanted}
        phases[name] = [phase for phase in wanted if needs[phase] <= bench.limit]
        over = {phase: needs[phase] for phase in wanted if needs[phase] > bench.limit}
        if over:
            skipped[name] = over
    names = [name for name, wanted in phases.items() if wanted]
    for name in contenders_of(kind, bench.device):  # of other lengths, or kinds
        bench.output(name).unlink(missing_ok=True)
    rounds = bench.rounds_of(names, job, phases=phases)
    memory: dict[str, Any] = {}
    for name in rounds:
        order = [phase for phase in ("decoding", "forward", "training") if phase in phases[name]]  # gradients stay
        answer = bench.run("memory", job | {"contender": name, "phases": order})
        memory[name] = {phase: answer[phase] for phase in order if phase in answer} if answer else {}
    return {
        "kind": kind,
        "length": length,
        "rounds": {name: [{phase: one[phase] for phase in PHASES if phase in one} for one in times]
                   for name, times in rounds.items()},
        "memory": memory,
        "cache_bytes_per_token": {name: times[0]["cache_bytes_per_token"] for name, times in rounds.items()},
        "difference": bench.differences(names, REFERENCES),
        "skipped": skipped,
    }  # fmt: skip


def gpt2_part(bench: Bench, *, quick: bool) -> dict[str, Any]:
    """Forward and backward pass of GPT-2."""
    batch, length = (1, 64) if quick else (2, 512)
    fields = {"n_layer": 2} if quick else {}
    from groundup.model import PRESETS

    parameters = save(bench.folder / "gpt2", PRESETS["gpt2-124m"] | fields)
    job = {"job": "gpt2", "folder": str(bench.folder / "gpt2"), "batch": batch, "length": length}
    rounds = bench.rounds_of(GPT2, job)
    memory = {name: bench.run("memory", job | {"contender": name}) for name in rounds}
    for name, times in rounds.items():
        say(f"  GPT-2 {name:<24} {1e3 * median(one['training'] for one in times):8.1f} ms  loss {times[0]['loss']:.6f}")
    ends = {key: [times[0][key] for times in rounds.values()] for key in ("loss", "gradient_norm")}
    return {
        "parameters": parameters, "batch": batch, "length": length, "rounds": rounds,
        "difference": {key: (max(of) - min(of)) / max(of) for key, of in ends.items() if of},
        "memory": {name: answer["training"] if answer else None for name, answer in memory.items()},
    }  # fmt: skip


def experts_part(bench: Bench, sizes: Sequence[tuple[int, int]], tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Forward pass of one layer of eight experts, two of them active."""
    found = []
    for n_embd, width in sizes:
        folder = bench.folder / f"experts {n_embd}"
        save(folder, dict(
            vocab_size=64, context_length=64, n_layer=1, n_head=8, n_embd=n_embd, n_ff=width, norm_eps=1e-5,
            qk_norm=False, tie_embeddings=False, experts=dict(count=8, active=2), init_std=0.05,
        ))  # fmt: skip
        for count in tokens:
            job = {"job": "experts", "kind": f"{n_embd} x {width},", "folder": str(folder), "tokens": count}
            rounds = bench.rounds_of(EXPERTS, job | {"n_embd": n_embd})
            difference = bench.differences(EXPERTS, ("transformers, eager", "transformers, default"))
            found.append(
                {"n_embd": n_embd, "width": width, "tokens": count, "rounds": rounds, "difference": difference}
            )
            for name, times in rounds.items():
                milliseconds = 1e3 * median(one["forward"] for one in times)
                say(f"  experts {n_embd:>5} x {width:<5} {count:>5} tokens  {name:<22} {milliseconds:8.2f} ms")
    return found


# ---- what it comes to


def fastest(rounds: Rounds, package: str, phase: str) -> str | None:
    """The package's contender with the least median time in a phase."""
    times = {
        name: median(one[phase] for one in of)
        for name, of in rounds.items()
        if name.partition(",")[0] == package and of and all(phase in one for one in of)
    }
    return min(times, key=lambda name: times[name]) if times else None


def ratio(rounds: Rounds, phase: str, ours: str | None, theirs: str | None) -> dict[str, Any] | None:
    """How many times longer ``theirs`` takes than ``ours``: the median over rounds, the lowest, the highest."""
    if ours is None or theirs is None or not rounds.get(ours) or not rounds.get(theirs):
        return None
    ratios = [their[phase] / our[phase] for our, their in zip(rounds[ours], rounds[theirs], strict=False)]
    return {"ours": ours, "theirs": theirs, "median": median(ratios), "low": min(ratios), "high": max(ratios)}


def add_ratios(result: dict[str, Any]) -> None:
    """The fastest of ours beside the fastest of theirs, for everything measured."""
    for case in result.get("attention", []):
        rounds = case["rounds"]
        case["ratios"] = {
            phase: ratio(rounds, phase, fastest(rounds, "groundup", phase), fastest(rounds, "transformers", phase))
            for phase in PHASES
        }
    if gpt2 := result.get("gpt2"):
        gpt2["ratio"] = ratio(gpt2["rounds"], "training", "groundup", "transformers, sdpa")
    for of in result.get("experts", []):
        of["ratio"] = ratio(of["rounds"], "forward", "groundup", fastest(of["rounds"], "transformers", "forward"))


def measure_all(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every part that was asked for."""
    quick, wanted = arguments.quick, arguments.only
    result: dict[str, Any] = {
        "benchmark": "attention",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "quick": quick,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "memory_limit": arguments.memory_limit,
        "shape": COMMON,
        "load_before": os.getloadavg()[0],
    }
    bench = Bench(folder, arguments)
    if "attention" in wanted:
        lengths = arguments.lengths or ((96,) if quick else LENGTHS)
        result["attention"] = attention_part(bench, arguments.kinds, sorted(lengths), Kept(arguments.done))
    if "gpt2" in wanted:
        result["gpt2"] = gpt2_part(bench, quick=quick)
    if "experts" in wanted:
        result["experts"] = experts_part(
            bench, EXPERT_SIZES[:1] if quick else EXPERT_SIZES, EXPERT_TOKENS[:1] if quick else EXPERT_TOKENS
        )
    bench.close()
    result |= {"rounds": bench.rounds, "failures": bench.failures, "machine": machine(arguments.device)}
    add_ratios(result)
    return rounded(result)


def main() -> None:
    """Measure, keep, render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of weights and work")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="N", help="contexts; others than all are not kept")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND", help="which")
    parser.add_argument("--memory-limit", type=float, default=8.0, metavar="GIB", help="skip what would hold more (8)")
    parser.add_argument("--rounds", type=int, help="how often each contender runs (3)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts; nothing is kept")
    parser.add_argument("--quick", action="store_true", help="short texts, one round; nothing is kept")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the plots there, as PNG")
    parser.add_argument("--done", type=Path, metavar="FILE", help="keep what is measured there, and go on from it")
    parser.add_argument("--out", type=Path, help="write the result there instead of where it is kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure_all(arguments, Path(folder))
    everything = set(arguments.only) == set(PARTS) and set(arguments.kinds) == set(KINDS)
    whole = everything and not (arguments.quick or arguments.lengths)
    name = "attention.json" if arguments.device == "cpu" else "attention_gpu.json"
    if arguments.out or whole:  # before anything is drawn of it
        (arguments.out or RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    import render
    from attention_page import attention, attention_plots

    say("\n".join(attention(result)))
    if arguments.plots:
        arguments.plots.mkdir(parents=True, exist_ok=True)
        attention_plots(result, arguments.plots)
    if whole and not arguments.out:
        render.write_page()


if __name__ == "__main__":
    main()
