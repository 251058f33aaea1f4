"""What benchmarks/decode.py and benchmarks/quantization.py found, as sections of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from train_page import place

Result = Mapping[str, Any]
GGUF = {"float32": "F32", "16-bit": "F16", "8-bit": "Q8_0", "4-bit": "Q4_0"}


def decode(result: Result) -> list[str]:
    """Tokens a second for one and many, and how long a long prompt holds others up."""
    shape, cases = result["shape"], result["cases"]
    llama = result["machine"]["packages"].get("llama_cpp_python")
    lines = [
        "## Decoding, on a CPU",
        "",
        place(result) + (f" llama.cpp through llama-cpp-python {llama}." if llama else ""),
        "",
        f"A Llama of {shape['n_layer']} x {shape['n_embd']} with {shape['n_kv_head']} of {shape['n_head']} heads for "
        f"keys and values, vocabulary of {shape['vocab_size']:,}, random weights, the same for all. Greedy, every "
        "measurement in a process of its own, the contenders in turn; tokens a second are the median of the rounds, "
        "ratios are of one round (lowest to highest): above 1, this package is faster. 16-bit is bfloat16, of "
        "llama.cpp float16; 8-bit and 4-bit are int8 and int4 in groups of 64, of llama.cpp Q8_0 and Q4_0, all "
        "with the head in eight bits.",
        "",
        "| | | groundup | llama.cpp | ratio | transformers | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in (case for case in cases if case["work"] == "decode"):
        what = f"{case['batch']} x {case['new']} new" if case["new"] > 1 else f"read {case['prompt']}"
        cells = [shown_rate(case, "groundup")]
        for name in ("llama.cpp", "transformers"):
            cells += [shown_rate(case, name), shown_ratio(case, name)]
        lines.append(f"| {case['way']} | {what} | " + " | ".join(cells) + " |")
    lines += roofline(cases)
    crowds = [case for case in cases if case["work"] == "crowd"]
    if crowds:
        lines += [
            "",
            "32 requests of unequal lengths at once, tokens a second that were asked for; transformers pads them to "
            "one batch, or batches them continuously (what `generate_batch` stands on):",
            "",
            "| | groundup | padded | ratio | continuous | ratio | of the cache unused |",
            "|---|---|---|---|---|---|---|",
        ]
        for case in crowds:
            waste = median(one["waste"] for one in case["rounds"]["groundup"])
            cells = [shown_rate(case, "groundup")]
            for name in ("transformers", "transformers, continuous"):
                cells += [shown_rate(case, name), shown_ratio(case, name)]
            lines.append(f"| {case['way']} | " + " | ".join(cells) + f" | {waste:.1%} |")
    for case in (case for case in cases if case["work"] == "gaps"):
        times = case["rounds"]["groundup"]
        usual, usual_p99, after, p99, middle, read, longer = (
            median(one[key] for one in times)
            for key in ("usual", "usual_p99", "after", "p99", "median", "read", "longer")
        )
        lines += [
            "",
            f"Four texts are continued, a token every {1e3 * usual:.1f} ms (99 of 100 below {1e3 * usual_p99:.1f} ms), "
            f"while a prompt of {case['long']:,} tokens is read, which takes {read:.0f} s. Then it is every "
            f"{1e3 * middle:.1f} ms, {middle / usual:.2f} times the usual, and 99 of 100 gaps are below "
            f"{1e3 * p99:.1f} ms: {p99 / usual:.2f} times the usual, {p99 / usual_p99:.2f} times what 99 of 100 "
            f"were before. When it has been read, the four are {longer:,.0f} tokens longer, and take "
            f"{1e3 * after:.1f} ms by themselves.",
        ]
    failed = [
        f"{case['work']} {case['way']}, {name}: {why}" for case in cases for name, why in case["failures"].items()
    ]
    return [*lines, "", "Could not be measured: " + "; ".join(failed) + "."] if failed else lines


def roofline(cases: Sequence[Result]) -> list[str]:
    """What a step moves, and how close to the memory's speed that is."""
    lines = [
        "",
        "What one step reads (all weights once, whatever the number of texts; keys and values of each), and how fast, "
        "beside plain reading of memory in the same process. With more texts, arithmetic takes over: docs/decoding.md.",
        "",
        "| | texts | MB a step | GB/s | of the memory's speed |",
        "|---|---|---|---|---|",
    ]
    for case in cases:
        times = [one for one in case["rounds"]["groundup"] if "step_bytes" in one]
        if times:
            speeds = [one["step_bytes"] / (one["decode"] * case["batch"]) for one in times]
            shares = [speed / one["memory"] for speed, one in zip(speeds, times, strict=True)]
            lines.append(
                f"| {case['way']} | {case['batch']} | {times[0]['step_bytes'] / 1e6:,.0f} | {median(speeds) / 1e9:.1f} "
                f"| {median(shares):.0%} |"
            )
    return lines


def quantization(result: Result) -> list[str]:
    """The section of docs/benchmarks.md."""
    first, head = result["original"], "its head is the embedding and stays" if result["tied"] else "the head in int8"
    lines = [
        "## What quantizing costs",
        "",
        place(result),
        "",
        f"{result['model']}, {result['parameters'] / 1e6:.1f}M parameters ({head}), on {result['tokens']:,} held-out "
        f"tokens in windows of {result['context']} that overlap by half. KL is of the whole distribution from the "
        "float32 model's, in nats per token; speed is that of one text, greedily.",
        "",
        "| | memory | perplexity | bits per byte | KL | 99% of tokens below | same first choice | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
        f"| float32 | {first['bytes'] / 1e6:.1f} MB | {first['perplexity']:.3f} | {first['bits_per_byte']:.4f} "
        "| | | | |",
    ]
    lines += [
        f"| {row['way']} | {row['bytes'] / 1e6:.1f} MB | {row['perplexity']:.3f} | {row['bits_per_byte']:.4f} | "
        f"{row['kl']:.5f} | {row['kl_99']:.4f} | {row['agreement']:.1%} | {median(row['tokens_per_second']):,.0f} |"
        for row in result["rows"]
    ]
    return lines


def shown_rate(case: Result, name: str) -> str:
    """Tokens a second."""
    from decode import rate

    return f"{rate(case, name):,.0f}" if case["rounds"].get(name) else "–"


def shown_ratio(case: Result, name: str) -> str:
    """A median with its lowest and highest."""
    found = case["ratios"].get(name)
    return "–" if found is None else f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
