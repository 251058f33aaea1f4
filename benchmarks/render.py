"""docs/benchmarks.md, from all kept results: python benchmarks/render.py"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import attention_page
import decode_page
import finetune_page
import train_page

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = PAGE.parent / "images"
HEAD = [
    "# Benchmarks",
    "",
    "Written by `python benchmarks/render.py` from `benchmarks/results/`; do not edit by hand.",
    "",
]


def write_page() -> None:
    """Write the page from every result that is kept."""
    lines = list(HEAD)
    for name, section in SECTIONS.items():
        file = RESULTS / f"{name}.json"
        if file.exists():
            result = json.loads(file.read_text())
            lines += [*section(result), ""]
            for image in PLOTS[name](result, IMAGES) if name in PLOTS else ():
                lines += [f"![{image.stem.replace('-', ' ')}](images/{image.name})", ""]
    PAGE.write_text("\n".join(lines).rstrip("\n") + "\n")


def measured(result: Mapping[str, Any], packages: str) -> str:
    """When, where and with what something was measured."""
    machine = result["machine"]
    return (
        f"Measured {result['date']} at commit {machine['commit'][:12]}, on {machine['cores']} cores of "
        f"{machine['cpu']}, Python {machine['python']}, {packages}, no GPU. "
        "The machine is shared: absolute times vary."
    )


# ---- the first ten minutes


def first_run(result: Mapping[str, Any]) -> list[str]:
    """From a fresh clone to the end of ``make demo``."""
    lines = [
        "## The first ten minutes",
        "",
        measured(result, f"torch {result['machine']['packages']['torch']}"),
        "",
        "| | measured | at most |",
        "|---|---|---|",
        f"| fresh clone to the end of `make demo` ({result['minutes']:g} minutes of training) | "
        f"{result['clone_to_end_seconds'] / 60:.1f} minutes | 10 minutes |",
        f"| of that, `make setup` (warm package index) | {result['setup_seconds']:.0f} s | |",
        f"| collect, clean, tokenizer, shards, default text | {result['runs'][0]['prepare_seconds']:.1f} s | 45 s |",
        f"| `groundup --help` | {result['help_seconds']:.2f} s | 0.3 s |",
        "",
        "Bits per byte of the held-out text (fewer is better), all measured on the same bytes in the same run. The "
        "6-gram was trained on the same training text as the model; gzip and xz see only the held-out text. "
        "The model's figure is that of the run's best checkpoint, chosen on held-out text: where that is the whole of "
        "it, as with tinyshakespeare, the figure is a little optimistic (docs/LOG.md).",
        "",
    ]
    names = ["this model", "byte 6-gram", "xz -9e", "gzip -9"]
    lines += ["| text | held out | tokens seen | " + " | ".join(names) + " |", "|---|---|---|" + "---|" * len(names)]
    for run in result["runs"]:
        bits = [
            next(value for name, value in run["bits_per_byte"].items() if name.startswith(prefix)) for prefix in names
        ]
        cells = " | ".join(f"**{bit:.3f}**" if bit == min(bits) else f"{bit:.3f}" for bit in bits)
        lines.append(
            f"| {run['text']} | {run['held_out_bytes'] / 1e3:,.0f} kB | {run['tokens'] / 1e6:.1f}M | {cells} |"
        )
    return lines


# ---- the tokenizer


def tokenizer(result: Mapping[str, Any]) -> list[str]:
    """Encoding, latency, training and start beside the peers."""
    packages = result["machine"]["packages"]
    named = [f"{name} {packages[name]}" for name in ("numba", "tiktoken", "tokenizers", "gigatoken", "rustbpe")]
    lines = [
        "## The tokenizer",
        "",
        measured(result, ", ".join(named)),
        "",
        "A list of strings goes in, arrays of ids come out (or Python lists, where it says so). Each contender ran in "
        "a process of its own, one after another, for several rounds; a ratio compares two contenders in one round, "
        "and is given as the median of the rounds (lowest to highest). Cold is the first pass of a new tokenizer over "
        "the texts, warm a later one; a process makes up to three of each and gives their median, so that what it pays "
        "once (imports, compiled code, memory that it touches for the first time) is in neither. Vocabulary: cl100k, "
        "where nothing else is said.",
        "",
        *requirement_table(result["requirements"]),
    ]
    encode = [(name, of) for name, by_threads in result.get("encode", {}).items() for of in by_threads.values()]
    if encode:
        lines += ["", "### Encoding to arrays, MB/s, cold / warm", "", *speed_table(encode)]
    lists = [("mixed", of) for of in result.get("lists", {}).values()]
    if lists:
        lines += ["", "### Encoding to Python lists, MB/s, cold / warm", "", *speed_table(lists)]
    others = [(f"{name}, mixed", of) for name, of in result.get("vocabularies", {}).items() if of]
    if others:
        lines += [
            "",
            "### Other vocabularies: arrays, MB/s, cold / warm",
            "",
            *speed_table(others),
            "",
            "rustbpe reads no vocabulary, so the last row is one that it learned itself.",
        ]
    if "latency" in result:
        lines += ["", "### One short string, microseconds", "", *latency_table(result["latency"])]
    if result.get("train"):
        lines += ["", "### Training", "", *training_table(result["train"])]
    if any(result.get("start", {}).get("rounds", {}).values()):
        lines += ["", "### A new process up to its first ids, seconds", "", *start_table(result["start"]["rounds"])]
    lines += ["", "### Equal ids", "", *equality(result)]
    if result["failures"]:
        lines += ["", "Could not be measured: " + "; ".join(result["failures"]) + "."]
    return lines


def spread(found: Mapping[str, float] | None) -> str:
    """A median with its lowest and highest."""
    if found is None:
        return "not measured"
    return f"{found['median']:.3g} ({found['low']:.3g} to {found['high']:.3g})"


def requirement_table(rows: list[dict[str, Any]]) -> list[str]:
    """What was asked for, what was found, and whether that is enough."""
    lines = ["| figure | against | at least | measured | |", "|---|---|---|---|---|"]
    for row in rows:
        unit = row.get("unit")
        bar = f"{unit.partition(', ')[2]} {row['bar']:g} {unit.partition(', ')[0]}" if unit else f"{row['bar']:g}x"
        found = spread(row["found"]) + ("" if unit or row["found"] is None else "x")
        beside = ", ".join(f"{name} {of['median']:.3g}" for name, of in row.get("others", {}).items() if of)
        verdict = {True: "met", False: "**missed**", None: ""}[row["met"]] if row.get("counts", True) else "beside it"
        found += f"; {beside}" if beside else ""
        lines.append(f"| {row['figure']} | {row['against']} | {bar} | {found} | {verdict} |")
    return lines


def contenders_of(measurements: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """All contenders that any measurement has, this package first."""
    names = {name: None for _, of in measurements for name in of["rounds"]}
    return sorted(names, key=lambda name: name != "groundup")


def speed_table(measurements: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """One row per text and number of threads, one column per contender."""
    names = contenders_of(measurements)
    lines = ["| text | threads | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for text, of in measurements:
        cells = []
        for name in names:
            times = of["rounds"].get(name)
            if not times:
                cells.append("–")
                continue
            rates = [of["bytes"] / 1e6 / median(one[phase] for one in times) for phase in ("cold", "warm")]
            note = " (ids differ)" if of["different_texts"].get(name) else ""
            cells.append(" / ".join(f"{rate:.3g}" for rate in rates) + note)
        lines.append(f"| {text}, {of['bytes'] / 1e6:.1f} MB | {of['threads']} | " + " | ".join(cells) + " |")
    constructs = ", ".join(
        f"{name} {median(one['construct'] for _, of in measurements for one in of['rounds'].get(name, [])):.2f}"
        for name in names
    )
    return [*lines, "", f"Seconds to load the vocabulary, which is in none of these: {constructs}."]


def latency_table(latency: Mapping[str, Any]) -> list[str]:
    """Medians of single calls, by the length of the string."""
    rounds = latency["rounds"]
    lengths = list(next(iter(rounds.values()))[0]) if rounds else []
    lines = [
        "| | " + " | ".join(f"{length} characters" for length in lengths) + " |",
        "|---|" + "---|" * len(lengths),
    ]
    for name, times in rounds.items():
        cells = (f"{median(one[length] for one in times):.2f}" for length in lengths)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    calls = latency["strings"] * latency["calls"]
    return [*lines, "", f"The median of {calls:,} calls ({latency['strings']:,} strings, in turn), to a Python list."]


def training_table(train: Mapping[str, Any]) -> list[str]:
    """Seconds and peak memory of learning a vocabulary."""
    lines = ["| text | | seconds | peak of the process, MB | merges |", "|---|---|---|---|---|"]
    for of in train.values():
        for name, times in of["rounds"].items():
            seconds, peaks = ([one[key] for one in times] for key in ("seconds", "peak_bytes"))
            first = of["first_difference"].get(name)
            common = of["in_common"].get(name, 0)
            merges = "equal" if first is None else f"differ from number {first:,} on; {common:,} tokens in common"
            merges = "" if name.startswith("groundup") else merges
            lines.append(
                f"| {of['bytes'] / 1e6:.1f} MB | {name} | {median(seconds):.2f} "
                f"({min(seconds):.2f} to {max(seconds):.2f}) | {median(peaks) / 1e6:.0f} | {merges} |"
            )
    return [
        *lines,
        "",
        "Pattern cl100k, but gigatoken cuts as GPT-2 does whatever it is told, so this package ran with that pattern "
        "too. Texts come from an iterator that reads a file, but gigatoken maps the file into memory. "
        "Whether merges are equal is told against this package with the same pattern.",
    ]


def start_table(rounds: Mapping[str, list[dict[str, float]]]) -> list[str]:
    """The parts of a start."""
    names = {"import": "import", "load": "load cl100k", "encode": "first encode", "process": "whole process"}
    lines = ["| | " + " | ".join(names.values()) + " |", "|---|" + "---|" * len(names)]
    for kind, times in rounds.items():
        if times:
            cells = (f"{median(one[key] for one in times):.2f}" for key in names)
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return lines


def equality(result: Mapping[str, Any]) -> list[str]:
    """Who gives tiktoken's ids, and who does not."""
    wrong: dict[str, list[str]] = {}
    compared = set()
    groups = [
        *((name, of) for name, by_threads in result.get("encode", {}).items() for of in by_threads.values()),
        *(("mixed, lists", of) for of in result.get("lists", {}).values()),
        *((f"mixed, {name}", of) for name, of in result.get("vocabularies", {}).items() if of),
    ]
    for text, of in groups:
        for name, different in of["different_texts"].items():
            compared.add(name)
            if different is None:
                wrong.setdefault(name, []).append(f"{text}: not compared")
            elif different:
                wrong.setdefault(name, []).append(f"{text}: {different:,} of {of['texts']:,} texts differ")
    lines = [
        f"- {name}: " + "; ".join(dict.fromkeys(wrong.get(name, ["equal to tiktoken's on every text above"])))
        for name in sorted(compared - {"tiktoken"})
    ]
    for name, different in result.get("exact", {}).get("different_texts", {}).items():
        size = result["exact"]["bytes"] / 1e6
        verdict = "equal to tiktoken's on every byte" if different == 0 else f"{different} texts differ"
        verdict = "not measured" if different is None else verdict
        lines.append(f"- groundup with {name}, on all {size:.1f} MB there are: {verdict}")
    return lines


# ---- what surrounds the steps of training


def loader(result: Mapping[str, Any]) -> list[str]:
    """Tokens a second and processor second of every way to deal batches."""
    rows = [
        f"| {name} | {way['tokens_per_second'] / 1e6:,.0f} ({' to '.join(f'{end / 1e6:,.0f}' for end in ends)}) "
        f"| {way['tokens_per_processor_second'] / 1e6:,.0f} |"
        for name, way in result["ways"].items()
        for ends in [way["lowest_and_highest"]]
    ]
    packing = result["packing"]
    return [
        "## The loader",
        "",
        measured(result, f"torch {result['machine']['packages']['torch']}"),
        "",
        f"Batches of {result['batch']} x {result['context']:,} tokens from {result['tokens'] / 1e6:,.0f} million that "
        f"lie in memory already, {result['rounds']} rounds (lowest to highest). *memmap and stack* is the loader of "
        "small training scripts, as nanoGPT has it: random places, rows stacked.",
        "",
        "| | million tokens/s | per second of one core |",
        "|---|---|---|",
        *rows,
        "",
        f"Shuffling 1 billion tokens holds {result['memory_of_a_billion_tokens'] / 1e6:,.0f} MB. Best-fit packing of "
        f"{packing['documents']:,} documents pads {packing['padding']:.2%} of positions and cuts "
        f"{packing['documents_cut']:,} documents, where plain windows cut {packing['documents_cut_by_windows']:,}.",
    ]


def checkpoint(result: Mapping[str, Any]) -> list[str]:
    """How long a save holds training up, and the memory it takes."""
    rows = [
        f"| {row['method']} | {row['with_step_blocked_seconds']:.2f} | {row['first_blocked_seconds']:.2f} "
        f"| {row['first_seconds']:.1f} | {row['first_extra_weights']:.2f} |"
        for row in result["rows"]
    ]
    many = len(result["rows"][0]["first_seconds_all"])
    return [
        "## Checkpoints",
        "",
        measured(result, f"torch {result['machine']['packages']['torch']}"),
        "",
        f"{result['model']}, {result['weights_bytes'] / 1e6:,.0f} MB of weights and twice as much of moments; the step "
        f"is a {result['step']}. The first save of a process, {many} {'round' if many == 1 else 'rounds'}. Ours also "
        "flushes to the disk, notes checksums and reads everything back before an older checkpoint may go.",
        "",
        "| | seconds blocked, a step in between | seconds blocked, weights wanted at once | seconds until it is saved "
        "| extra memory, in weights |",
        "|---|---|---|---|---|",
        *rows,
    ]


SECTIONS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "first_run": first_run,
    "tokenizer": tokenizer,
    "attention": attention_page.attention,
    "attention_gpu": attention_page.attention,
    "attention_study": attention_page.study,
    "train": train_page.train,
    "train_gpu": train_page.train,
    "time_to_loss": train_page.time_to_loss,
    "loader": loader,
    "checkpoint": checkpoint,
    "decode": decode_page.decode,
    "quantization": decode_page.quantization,
    "finetune": finetune_page.finetune,
}
PLOTS: dict[str, Callable[[Mapping[str, Any], Path], list[Path]]] = {
    "attention": attention_page.attention_plots,
    "attention_gpu": attention_page.attention_plots,
    "attention_study": attention_page.study_plots,
}

if __name__ == "__main__":
    write_page()
