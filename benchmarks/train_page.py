"""What benchmarks/train.py and time_to_loss.py found, as sections of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

Result = Mapping[str, Any]
MEGABYTE = 2**20


def place(result: Result) -> str:
    """When, where and with what it was measured."""
    machine = result["machine"]
    packages = machine["packages"]
    where = f"one {machine['gpu']}" if machine["gpu"] else f"{machine['threads']} threads of {machine['cpu']}, no GPU"
    names = ", ".join(
        f"{name} {packages[name]}" for name in ("torch", "transformers", "litgpt") if packages.get(name) is not None
    )
    commit = (machine["commit"] or "unknown")[:12]
    return f"Measured {result['date']} at commit {commit}, on {where}, Python {machine['python']}, {names}."


def train(result: Result) -> list[str]:
    """Tokens a second, the share of the ceiling and peak memory of every contender."""
    where = "on a GPU" if result["machine"]["gpu"] else "on a CPU"
    ceilings = ", ".join(f"{flops / 1e9:,.0f} GFLOP/s in {name}" for name, flops in result["ceilings"].items())
    rounds = sorted({len(times) for case in result["cases"] for times in case["rounds"].values() if times})
    counted_rounds = " or ".join(map(str, rounds)) + (" round" if rounds == [1] else " rounds")
    lines = [
        f"## Training steps, {where}",
        "",
        place(result),
        "",
        "Forward pass, backward pass, clipping and optimizer (fused AdamW), all contenders with the same size and "
        "batches. Ours is the loop of `groundup pretrain`; the others have a loop that does nothing else. *By hand* is "
        "a plain GPT in nanoGPT's shape. Each measurement ran in a process of its own, the contenders in turn, "
        f"{counted_rounds}; tokens/s are the median of the rounds (lowest to highest). MFU is the share of "
        f"the fastest matrix product that this run measured in the same precision ({ceilings}), by the FLOPs of "
        "Chowdhery et al. 2022. A ratio is that of tokens/s of ours and of the fastest peer of the same shape in one "
        "round: above 1, this package is faster. Memory is the peak of the process beyond what it held before there "
        "was a model; of compiled ones, what the compiler holds is in it. The first step compiles. As it comes, ours "
        "takes Muon, or AdamW where Muon would double the time of so small a step.",
    ]
    if result["machine"]["packages"].get("litgpt") is None:
        lines += ["", "litgpt was not installed here: the head of benchmarks/train.py says why, and how to have it."]
    for name, size in result["sizes"].items():
        cases = [case for case in result["cases"] if case["size"] == name]
        shape = f"{size['n_layer']} x {size['n_embd']}, {size['n_head']} heads, vocabulary {size['vocab_size']:,}"
        parameters = [of["parameters"] for case in cases for of in case["settings"].values()]
        counted = f"; {min(parameters) / 1e6:.1f} to {max(parameters) / 1e6:.1f}M parameters" if parameters else ""
        lines += ["", f"### {name}: {shape}, {size['batch']} x {size['context']} tokens a step{counted}", ""]
        lines += size_table(cases)
    if result["failures"]:
        lines += ["", "Could not be measured: " + "; ".join(result["failures"]) + "."]
    return lines


def size_table(cases: list[Result]) -> list[str]:
    """One row per contender and way."""
    lines = ["| | | tokens/s | MFU | against the fastest peer | peak MB | first step |", "|---|---|" + 5 * "---|"]
    for case in cases:
        for name, rate in case["tokens_per_second"].items():
            first = median(one["first"] for one in case["rounds"][name])
            memory = case["memory"].get(name)
            way = case["way"]
            if way == "as it comes":
                chosen = case["settings"][name]
                way += f": {chosen['precision']}{', compiled' if chosen['compiled'] else ''}"
            lines.append(
                f"| {way} | {name} | {rate['median']:,.0f} ({rate['low']:,.0f} to {rate['high']:,.0f}) | "
                f"{case['mfu'][name]:.0%} | {shown_ratio(case['ratios'].get(name))} | "
                f"{f'{memory / MEGABYTE:,.0f}' if memory else '–'} | {first:.1f} s |"
            )
    return lines


def shown_ratio(found: Result | None) -> str:
    """A median with its lowest and highest, and whom it is against."""
    if found is None:
        return ""
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f}), {found['theirs']}"


def time_to_loss(result: Result) -> list[str]:
    """How long a plain GPT and a recipe of ours take to the same loss."""
    rows = result["rounds"]
    theirs, ours = ([round_[who] for round_ in rows] for who in ("by hand", "groundup"))
    verdict = "met" if result["met"] else "**missed**"

    def shown(ratio: Mapping[str, float]) -> str:
        return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"

    lines = [
        "## Time to a loss",
        "",
        place(result),
        "",
        f"nanoGPT's own example for a CPU (4 layers of 4 heads, 128 wide, context 64, 12 sequences a step, "
        f"{result['steps']:,} steps of AdamW on the characters of Shakespeare), written by hand in the same shape, and "
        "`groundup pretrain recipes/shakespeare-cpu.yaml`: processes in turn, from the command until the model is "
        "saved, with imports, tokenizing, trials and evaluations in it. The whole of our command goes on: it scores "
        "all of the held-out text beside gzip, xz and a 6-gram, and writes a report. Both losses are of the last tenth "
        "of the text, all of it, in windows of the model's own context that do not overlap, in nats per character.",
        "",
        "| | seconds until the model is saved | the whole command | loss |",
        "|---|---|---|---|",
    ]
    for name, of in (("by hand", theirs), ("groundup", ours)):
        seconds, saved, losses = ([one[key] for one in of] for key in ("seconds", "saved_seconds", "loss"))
        lines.append(
            f"| {name} | {median(saved):.1f} ({min(saved):.1f} to {max(saved):.1f}) | {median(seconds):.1f} | "
            f"{median(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}) |"
        )
    lines += [
        "",
        f"To a loss of {result['target']:g}, ours takes {shown(result['ratio'])} of the other's time; at most "
        f"{result['bar']:g} was asked for: {verdict}. Of whole commands it is {shown(result['whole_ratio'])}.",
    ]
    if any(loss > result["target"] for loss in (one["loss"] for one in theirs)):
        lines.append(
            "Where the plain GPT ends above that loss, its whole time is taken all the same, which is in its favour."
        )
    return lines
