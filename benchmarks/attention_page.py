"""What benchmarks/attention.py and attention_study.py found, as sections of docs/benchmarks.md and as plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from attention_kinds import PEERS

PHASES = {"forward": "forward", "training": "forward and backward", "decoding": "one token decoded"}
GIGABYTE, MEGABYTE, KILOBYTE = 2**30, 2**20, 2**10
Result = Mapping[str, Any]


def attention(result: Result) -> list[str]:
    """Time, memory and cache of every kind of attention; GPT-2; a mixture of experts."""
    machine, shape = result["machine"], result["shape"]
    packages = machine["packages"]
    place = f"one {machine['gpu']}" if machine["gpu"] else f"{machine['threads']} threads of {machine['cpu']}, no GPU"
    where = "on a GPU" if machine["gpu"] else "on a CPU"
    lines = [
        f"## Attention, {where}",
        "",
        f"Measured {result['date']} at commit {(machine['commit'] or 'unknown')[:12]}, on {place}, {result['dtype']}, "
        f"Python {machine['python']}, torch {packages['torch']}, transformers {packages['transformers']}.",
        "",
        f"A model of one layer, {shape['n_head']} heads of {shape['n_embd'] // shape['n_head']} dimensions, "
        f"{shape['n_embd']:,} wide, one sequence; its feed-forward is {shape['n_ff']} wide, so that attention is "
        "nearly all of the work. transformers loads the same folder of weights. Each measurement ran in a process of "
        f"its own, the contenders in turn, {rounds_of(result)}; a ratio is that of two contenders in one round, given "
        "as the median of the rounds (lowest to highest): above 1, this package is faster. "
        f"What would hold more than {result['memory_limit']:g} GiB, or has not been measured, is left out (–).",
    ]
    cases = result.get("attention", [])
    for phase, title in PHASES.items() if cases else ():
        lines += ["", f"### {title.capitalize()}: this package's fastest backend, milliseconds", ""]
        lines += by_length(cases, lambda case, phase=phase: fastest_time(case, phase))
        lines += ["", f"### {title.capitalize()}: how many times as long transformers' faster one takes", ""]
        lines += by_length(cases, lambda case, phase=phase: shown_ratio(case["ratios"][phase]))
    if cases:
        lines += ["", "### Each backend, milliseconds forward / forward and backward / one token", ""]
        lines += backend_table(cases)
        lines += ["", "### Peak memory of forward and backward pass: ours / theirs, MB", ""]
        lines += by_length(cases, lambda case: shown_memory(case, "training"))
        lines += ["", "The least of the backends of each. What weights' gradients hold is in it.", ""]
        lines += ["### Cache, bytes per token of one layer, measured", "", *cache_table(cases)]
        lines += ["", "### Equal outputs", "", *difference_table(cases)]
    if gpt2 := result.get("gpt2"):
        lines += ["", "### GPT-2, forward and backward", "", *gpt2_table(gpt2)]
    if experts := result.get("experts"):
        lines += ["", "### A mixture of experts, forward", "", *experts_table(experts)]
    if result["failures"]:
        lines += ["", "Could not be measured: " + "; ".join(result["failures"]) + "."]
    return lines


def rounds_of(result: Result) -> str:
    """How often each contender ran, where that is not the same at every length."""
    cases = result.get("attention", [])
    fewer = sorted({len(times) for case in cases for times in case["rounds"].values()} - {result["rounds"]})
    text = f"{result['rounds']} rounds"
    return text + (f" (of some kinds {' or '.join(map(str, fewer))})" if fewer else "")


def by_length(cases: Sequence[Result], cell: Callable[[Result], str]) -> list[str]:
    """One row per kind, one column per length."""
    lengths = sorted({case["length"] for case in cases})
    found = {(case["kind"], case["length"]): cell(case) for case in cases}
    lines = ["| | " + " | ".join(f"{length:,}" for length in lengths) + " |", "|---|" + "---|" * len(lengths)]
    for kind in dict.fromkeys(case["kind"] for case in cases):
        cells = (found.get((kind, length), "–") for length in lengths)
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return lines


def medians(case: Result, phase: str, package: str = "") -> dict[str, float]:
    """The median seconds of each contender of a package that was measured at a phase."""
    return {
        name: median(one[phase] for one in times)
        for name, times in case["rounds"].items()
        if name.startswith(package) and times and all(phase in one for one in times)
    }


def fastest_time(case: Result, phase: str) -> str:
    """The least time of ours, and whose it is."""
    times = medians(case, phase, "groundup")
    if not times:
        return "–"
    name = min(times, key=lambda name: times[name])
    return f"{shown_milliseconds(times[name])} {name.removeprefix('groundup, ').replace(', ', ' ')}"


def shown_milliseconds(seconds: float) -> str:
    """Three digits, and thousands with a comma rather than a power of ten."""
    return f"{1e3 * seconds:.3g}" if seconds < 0.9995 else f"{float(f'{1e3 * seconds:.3g}'):,.0f}"


def shown_ratio(found: Mapping[str, Any] | None) -> str:
    """A median with its lowest and highest."""
    return "–" if found is None else f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def shown_memory(case: Result, phase: str) -> str:
    """The least peak of ours beside theirs."""
    cells = []
    for package in ("groundup", "transformers"):
        found = [of[phase] for name, of in case["memory"].items() if name.startswith(package) and of.get(phase)]
        cells.append(f"{min(found) / MEGABYTE:,.0f}" if found else "–")
    return " / ".join(cells)


def backend_table(cases: Sequence[Result]) -> list[str]:
    """Every contender at the shortest, a middle and the longest length."""
    lengths = sorted({case["length"] for case in cases})
    shown = sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})
    lines = ["| kind | | " + " | ".join(f"{length:,}" for length in shown) + " |", "|---|---|" + "---|" * len(shown)]
    for kind in dict.fromkeys(case["kind"] for case in cases):
        of_kind = {case["length"]: case for case in cases if case["kind"] == kind}
        for name in dict.fromkeys(name for case in of_kind.values() for name in case["rounds"]):
            cells = []
            for length in shown:
                times = [medians(of_kind[length], phase).get(name) if length in of_kind else None for phase in PHASES]
                cells.append(" / ".join("–" if seconds is None else shown_milliseconds(seconds) for seconds in times))
            lines.append(f"| {kind} | {name} | " + " | ".join(cells) + " |")
    return lines


def cache_table(cases: Sequence[Result]) -> list[str]:
    """What a cache holds per token of the context, ours beside theirs."""

    def cell(case: Result) -> str:
        held = case["cache_bytes_per_token"]
        sides = [[of for name, of in held.items() if name.startswith(who)] for who in ("groundup", "transformers")]
        return " / ".join(f"{min(side):,.0f}" if side else "–" for side in sides)

    return [*by_length(cases, cell), "", "This package's / transformers'. A window's cache stops growing."]


def difference_table(cases: Sequence[Result]) -> list[str]:
    """The largest difference of each kind's outputs, over lengths and contenders."""
    lines = ["| | compared with | forward | decoding |", "|---|---|---|---|"]
    for kind in dict.fromkeys(case["kind"] for case in cases):
        found = [case["difference"] for case in cases if case["kind"] == kind and case["difference"]]
        if not found:
            continue
        references = ", ".join(dict.fromkeys(of["from"] for of in found))
        peer = f" ({PEERS[kind]})" if PEERS[kind] else ""
        cells = []
        for phase in ("forward", "decoding"):
            worst = [(one[phase], name) for of in found for name, one in of["largest"].items()]
            cells.append("{:.1e} {}".format(*max(worst)) if worst else "–")
        lines.append(f"| {kind} | {references}{peer} | " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        "The largest difference of any number above the last norm, where numbers are about 1, over all lengths and "
        "contenders (transformers' other one among them), and whose it is. ALiBi has no peer that reads our folder.",
    ]


def gpt2_table(gpt2: Result) -> list[str]:
    """Times, memory and losses of whole training passes."""
    tokens = gpt2["batch"] * gpt2["length"]
    lines = ["| | milliseconds | tokens/s | peak, MB | loss | gradient norm |", "|---|---|---|---|---|---|"]
    for name, times in gpt2["rounds"].items():
        seconds, peak = [one["training"] for one in times], gpt2["memory"].get(name)
        lines.append(
            f"| {name} | {1e3 * median(seconds):.0f} ({1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f}) | "
            f"{tokens / median(seconds):,.0f} | {'–' if peak is None else f'{peak / MEGABYTE:,.0f}'} | "
            f"{times[0]['loss']:.5f} | {times[0]['gradient_norm']:.5f} |"
        )
    return [
        *lines,
        "",
        f"{gpt2['parameters'] / 1e6:.0f}M parameters, batch {gpt2['batch']} x {gpt2['length']} tokens. transformers "
        f"with SDPA takes {shown_ratio(gpt2['ratio'])} times as long as this package with the same loss. "
        f"Between the highest and the lowest, losses differ by {gpt2['difference']['loss']:.0e} of the loss, gradient "
        f"norms by {gpt2['difference']['gradient_norm']:.0e}. "
        '"Its own loss" is what training here can use: the head and the loss in pieces.',
    ]


def experts_table(experts: Sequence[Result]) -> list[str]:
    """Times of one layer, and the ratio to the faster of transformers' ways."""
    names = list(dict.fromkeys(name for of in experts for name in of["rounds"]))
    lines = ["| size | tokens | " + " | ".join(names) + " | ratio | largest difference |"]
    lines.append("|---|---|" + "---|" * len(names) + "---|---|")
    for of in experts:
        cells = [
            f"{1e3 * median(one['forward'] for one in of['rounds'][name]):.2f}" if of["rounds"].get(name) else "–"
            for name in names
        ]
        largest = of["difference"].get("largest", {}).get("groundup", {}).get("forward")
        cells += [shown_ratio(of["ratio"]), "–" if largest is None else f"{largest:.1e}"]
        lines.append(f"| {of['n_embd']:,} x {of['width']:,} | {of['tokens']:,} | " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        "Eight experts, two active, milliseconds. The ratio is to the faster of transformers' two ways: above 1, this "
        "package is faster.",
    ]


# ---- the study


def study(result: Result) -> list[str]:
    """What each kind of attention costs in quality, beside what it saves in cache."""
    machine = result["machine"]
    place = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
    lines = [
        "## What a smaller cache costs",
        "",
        f"Measured {result['date']} at commit {(machine['commit'] or 'unknown')[:12]}, on {place}. Each variant of one "
        f"model ({result['shape']}) was trained by `groundup pretrain` on the same {result['tokens']:,} tokens of the "
        f"same text, with {len(result['seeds'])} seed{'s' * (len(result['seeds']) > 1)}. A seed decides the weights, "
        "the order and what is held out; the difference is that of two runs of one seed, given as the mean over seeds "
        "(lowest to highest)."
        + (" One seed cannot tell a difference from chance." if len(result["seeds"]) == 1 else ""),
        "",
        "| | parameters | cache, bytes per token | bits per byte | beside MHA |",
        "|---|---|---|---|---|",
    ]
    baseline = result["variants"].get("MHA", {}).get("bits_per_byte", {})
    for name, of in result["variants"].items():
        bits = of["bits_per_byte"]
        if not bits:
            continue
        beside = [bits[seed] - baseline[seed] for seed in bits if seed in baseline]
        shown = f"{mean(beside):+.4f} ({min(beside):+.4f} to {max(beside):+.4f})" if beside else "–"
        lines.append(
            f"| {name} | {of['parameters'] / 1e6:.2f}M | {of['cache_bytes_per_token']:,.0f} | "
            f"{mean(list(bits.values())):.4f} | {'' if name == 'MHA' else shown} |"
        )
    return [
        *lines,
        "",
        f"Bits per byte of all held-out text at the end (fewer is better). The cache is that of a full context of "
        f"{result['context_length']:,} tokens in bfloat16, over all layers.",
    ]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---- plots


def attention_plots(result: Result, folder: Path) -> list[Path]:
    """Time over length and memory over length, a line per kind: this package's best backend. Returns the files."""
    cases = result.get("attention", [])
    if not cases:
        return []
    suffix = "-gpu" if result["machine"]["gpu"] else ""

    def least_time(case: Result, phase: str, package: str) -> float | None:
        times = medians(case, phase, package)
        return 1e3 * min(times.values()) if times else None

    def least_memory(case: Result, phase: str, package: str) -> float | None:
        held = [of[phase] for name, of in case["memory"].items() if name.startswith(package) and of.get(phase)]
        return min(held) / MEGABYTE if held else None

    return [
        _panels(cases, least_time, "milliseconds", folder / f"attention-time{suffix}.png"),
        _panels(cases, least_memory, "peak memory, MB", folder / f"attention-memory{suffix}.png"),
    ]


def _panels(cases: Sequence[Result], value: Callable[[Result, str, str], float | None], unit: str, path: Path) -> Path:
    """A panel per phase; transformers' MHA is dashed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    panels = figure.subplots(1, len(PHASES))
    kinds = list(dict.fromkeys(case["kind"] for case in cases))
    lines = [(kind, "groundup") for kind in kinds] + [(kinds[0], "transformers")]
    for axes, (phase, title) in zip(panels, PHASES.items(), strict=True):
        for number, (kind, package) in enumerate(lines):
            points = sorted(
                (case["length"], found)
                for case in cases
                if case["kind"] == kind and (found := value(case, phase, package))
            )
            theirs = package == "transformers"
            axes.plot(
                *zip(*points, strict=True) if points else ((), ()),
                marker="o", markersize=2.5, linewidth=1.2,
                linestyle="--" if theirs else "-",
                color="black" if theirs else colormaps["tab20"](number % 20),
                label=f"{kind}, transformers" if theirs else kind,
            )  # fmt: skip
        axes.set(title=title, xlabel="context, tokens")
        if any(len(line.get_xdata()) for line in axes.get_lines()):  # what is empty has no logarithm
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel(unit)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return _saved(figure, path)


def study_plots(result: Result, folder: Path) -> list[Path]:
    """Bits per byte over cache bytes per token, a point per run."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, of) in enumerate(result["variants"].items()):
        bits = list(of["bits_per_byte"].values())
        if not bits:
            continue
        colour, cache = colormaps["tab20"](number % 20), of["cache_bytes_per_token"]
        axes.scatter([cache] * len(bits), bits, s=14, color=colour)
        axes.annotate(name, (cache, mean(bits)), xytext=(5, 3), textcoords="offset points", fontsize=8, color=colour)
    axes.set_xscale("log", base=2)
    axes.margins(x=0.12)  # for the names on the right
    axes.set(xlabel="cache, bytes per token", ylabel="held-out bits per byte")
    axes.grid(alpha=0.25)
    return [_saved(figure, folder / "attention-study.png")]


def _saved(figure: Any, path: Path) -> Path:
    """Write a PNG that is the same for the same figure."""
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path
