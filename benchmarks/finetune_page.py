"""What benchmarks/finetune.py found, as a section of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from train_page import place, shown_ratio

Result = Mapping[str, Any]
METHODS = {"full": "all weights", "lora": "LoRA", "qlora": "QLoRA"}


def finetune(result: Result) -> list[str]:
    """Speed, memory, an epoch, and how full rows are."""
    cases, packages = result["cases"], result["machine"]["packages"]
    peers = ", ".join(f"{name} {packages[name]}" for name in ("trl", "peft", "bitsandbytes") if name in packages)
    lines = ["## Fine-tuning, on a CPU", "", place(result) + f" Beside it: {peers}."]
    for work, section in (("speed", speed), ("epoch", epoch), ("memory", memory), ("fill", fill)):
        some = [case for case in cases if case["work"] == work]
        if some:
            lines += ["", *section(some)]
    failed = [
        f"{case['work']} {case['size']} {case['method']} {case['way']}, {name}: {why}"
        for case in cases for name, why in case["failures"].items()
    ]  # fmt: skip
    return [*lines, "", "Could not be measured: " + "; ".join(failed) + "."] if failed else lines


def names_of(cases: Sequence[Result]) -> list[str]:
    """All contenders, in their order."""
    return list(dict.fromkeys(name for case in cases for name in case["rounds"]))


def cell(case: Result, name: str, key: str, divisor: float = 1.0, digits: int = 0) -> str:
    """The median of the rounds."""
    times = case["rounds"].get(name)
    return f"{median(one[key] for one in times) / divisor:,.{digits}f}" if times else "–"


def speed(cases: Sequence[Result]) -> list[str]:
    """Tokens a second, all real ones and those that are learnt."""
    first, names = cases[0], names_of(cases)
    lines = [
        "Tokens a second, all that are no padding / those that are learnt; the median of the rounds, each in a process "
        f"of its own, the contenders in turn. A step is {first['batch']} conversations, or {first['rows']} packed rows "
        f"of {first['context']} positions, which hold about as many tokens. LoRA is of rank 16 on all linear layers of "
        "the blocks. TRL is its SFTTrainer with PEFT: without checkpointing, packed rows one at a time, which is its "
        "fastest here; *by length* makes batches of like length; *as it comes* checkpoints activations and takes "
        "bfloat16, while ours chooses its precision by trying. A ratio is that to the fastest of TRL's in one round "
        "(lowest to highest): above 1, this package is faster.",
        "",
        "| | | | " + " | ".join(names) + " | ratio |",
        "|---|---|---|" + "---|" * (len(names) + 1),
    ]
    for case in cases:
        cells = [
            f"{cell(case, name, 'tokens')} / {cell(case, name, 'learnt')}" if case["rounds"].get(name) else "–"
            for name in names
        ]
        what = f"{case['size']} | {METHODS[case['method']]} | {case['way']}"
        lines.append(f"| {what} | " + " | ".join(cells) + f" | {shown_ratio(case.get('ratio'))} |")
    return lines


def epoch(cases: Sequence[Result]) -> list[str]:
    """Seconds from a file to a trained model."""
    names = names_of(cases)
    lines = [
        "Seconds from a file of 1,000 instructions to the end of one epoch: reading, encoding, packing, training "
        "(training alone in brackets); libraries had been imported.",
        "",
        "| | | " + " | ".join(names) + " | ratio |",
        "|---|---|" + "---|" * (len(names) + 1),
    ]
    for case in cases:
        cells = [
            f"{cell(case, name, 'whole', digits=1)} ({cell(case, name, 'training', digits=1)})"
            if case["rounds"].get(name) else "–"
            for name in names
        ]  # fmt: skip
        lines.append(
            f"| {case['size']} | {case['way']} | " + " | ".join(cells) + f" | {shown_ratio(case.get('ratio'))} |"
        )
    return lines


def memory(cases: Sequence[Result]) -> list[str]:
    """The peak of a step."""
    names = names_of(cases)
    lines = [
        "The most that the process holds in a step, in MB, beyond what it held before there was a model; the same "
        "steps as above: the padded ones, and TRL without more said, hold the same batch of 16 conversations; packed "
        "rows are four at once here, and one at a time in TRL. QLoRA is LoRA over NF4 with its scales in eight bits, "
        "of TRL through bitsandbytes.",
        "",
        "| | | | " + " | ".join(names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for case in cases:
        cells = [
            cell(case, name, "bytes", 2**20) if all(one["bytes"] for one in case["rounds"].get(name, [])) else "–"
            for name in names
        ]
        lines.append(f"| {case['size']} | {METHODS[case['method']]} | {case['way']} | " + " | ".join(cells) + " |")
    return lines


def fill(cases: Sequence[Result]) -> list[str]:
    """How full packed rows are."""
    lines = [
        f"How full packed rows of {cases[0]['context']:,} positions are, here and with TRL's packing of the same "
        "examples (best fit too); longer examples are left out:",
        "",
        "| file | examples | tokens | rows | filled | TRL's rows | filled |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        for one in case["rounds"]["groundup"]:
            lines.append(
                f"| {case['way']} | {one['examples']:,} | {one['tokens']:,} | {one['rows']:,} | {one['filled']:.2%} | "
                f"{one['their_rows']:,} | {one['their_filled']:.2%} |"
            )
    return lines
