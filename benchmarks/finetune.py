"""Fine-tuning on instructions beside TRL and PEFT: tokens/s, memory, how full rows are, the time of an epoch.

    python benchmarks/finetune.py                     everything on the CPU: some hours on two quiet cores
    python benchmarks/finetune.py --works speed       one kind of work, or several: speed, memory, epoch, fill
    python benchmarks/finetune.py --quick             a tiny model, one round, a few minutes: does it run?
    python benchmarks/render.py                       write docs/benchmarks.md from the kept results

speed    steps of full fine-tuning and of LoRA, of a Llama of 10 and one of 124 million parameters, in float32 and in
         bfloat16: ours, packed and padded; TRL's SFTTrainer padded, padded with batches of like length, and packed
memory   the most that is held in a step of LoRA and of QLoRA (TRL with PEFT and bitsandbytes), of both models
epoch    from a file of 1,000 instructions to the end of one epoch, with the smaller model
fill     how full packed rows of 1,024 positions are, for every file of instructions, and with TRL's packing

Steps are equal: so many conversations where each has a row of its own, and rows of about as many tokens where they are
packed. Tokens are real ones, padding is none. TRL's "as it comes" is what SFTConfig does when it is told nothing but to
use the CPU; else it has what makes it fastest there: no checkpointing, and packed rows one after the other. Each
measurement runs in a process of its own, the contenders in turn, for several rounds; a ratio is that of two contenders
in one round. Ends in one JSON line, kept in benchmarks/results/.
"""

from __future__ import annotations

import argparse
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

import torch
from attention_bench import Kept, Worker, machine, rounded, say

from groundup.data import open_records
from groundup.model import ModelConfig, Transformer, save_model
from groundup.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHARED = ROOT.parent / "shared" / "data"
JOBS = Path(__file__).with_name("finetune_jobs.py")
LLAMA: dict[str, Any] = dict(context_length=1024, qk_norm=False, norm_eps=1e-5)
# The larger one has the vocabulary of GPT-2, whose head is a third of its work, though the text has a smaller one.
SIZES: dict[str, dict[str, Any]] = {
    "10M": LLAMA | dict(n_layer=6, n_head=5, n_embd=320, n_ff=864, vocab_size=8192),
    "124M": LLAMA | dict(n_layer=12, n_head=12, n_embd=768, n_ff=2048, vocab_size=50_257),
}
STEPS = {"10M": 12, "124M": 4}
QUICK = {"tiny": LLAMA | dict(n_layer=2, n_head=2, n_embd=32, n_ff=64, vocab_size=640)}
INSTRUCTIONS = ("code_alpaca_2k.json", "dolly_hhrlhf_1k.jsonl", "instruction-data.json")
CONTEXT, BATCH, ROWS = 512, 16, 4  # the rows hold about as many tokens as that many conversations
METHODS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
WAYS = ("float32", "bfloat16", "as it comes")
WORKS = ("speed", "memory", "epoch", "fill")
RACING = ("groundup", "groundup, padded", "TRL", "TRL, by length", "TRL, packed")
PLAIN = ("groundup", "TRL")
# ChatML, with a place for tools and calls of them.
TEMPLATE = r"""
{%- for tool in tools or [] %}{{- '<|im_start|>tool\n' ~ (tool | tojson) ~ '<|im_end|>\n' }}{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content }}
            {%- for call in message.tool_calls or [] %}{{- call.function | tojson }}{%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content ~ '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}"""


def cases_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What is measured, and who takes part."""
    quick, folder = arguments.quick, arguments.data_dir / "sft"
    sizes, small = (QUICK, "tiny") if quick else (SIZES, "10M")
    files = [str(folder / name) for name in INSTRUCTIONS]
    common = {
        "files": files,
        "limit": 60 if quick else None,
        "context": CONTEXT,
        "batch": BATCH,
        "rows": 4,
        "fitting": True,
    }
    cases: list[dict[str, Any]] = [
        common | {"work": "speed", "size": size, "method": method, "way": way, "steps": 2 + STEPS.get(size, 2),
                  "contenders": PLAIN if way == "as it comes" else RACING}
        for size in sizes for method in ("full", "lora") for way in WAYS
    ]  # fmt: skip
    cases += [
        common | {"work": "memory", "size": size, "method": method, "way": way, "steps": 4,
                  "contenders": (*RACING[:3], RACING[4], "groundup, checkpointing", "TRL, checkpointing")}
        for size in sizes for method in ("full", "lora", "qlora") for way in ("float32", "bfloat16")
    ]  # fmt: skip
    thousand = {"files": [files[-1]], "limit": 100 if quick else 1000, "steps": None, "rows": 2, "fitting": False}
    cases += [
        common | thousand | {"work": "epoch", "size": small, "method": "full", "way": way,
                             "contenders": PLAIN if way == "as it comes" else RACING}
        for way in WAYS
    ]  # fmt: skip
    names = [file for file in sorted(folder.iterdir()) if file.suffix != ".md"]
    cases += [
        common | {"work": "fill", "size": small, "method": "", "way": file.name, "files": [str(file)],
                  "context": 1024, "contenders": ("groundup",)}
        for file in (names[:2] if quick else names)
    ]  # fmt: skip
    return cases


def wanted(case: Mapping[str, Any], arguments: argparse.Namespace) -> bool:
    """Whether a case is of the part that is asked for."""
    if arguments.quick or case["work"] == "fill":
        return True
    return (
        case["size"] in arguments.sizes and case["method"] in arguments.methods and case["way"] in arguments.ways
    )  # fmt: skip


def write_models(folder: Path, sizes: Mapping[str, dict[str, Any]], data: Path) -> None:
    """The same random weights and the same tokenizer, learnt from the instructions, for everybody."""
    records = (record for name in INSTRUCTIONS for _, record in open_records(str(data / name)))
    texts = [json.dumps(record, ensure_ascii=False) for record in records]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    for name, shape in sizes.items():
        torch.manual_seed(1)
        place = folder / name
        place.mkdir()
        size = min(shape["vocab_size"], 8192)
        tokenizer = Tokenizer.train(texts, size, special_tokens=special, show_progress=False)
        tokenizer.with_chat_template(TEMPLATE).save(place)
        save_model(Transformer(ModelConfig.from_dict(shape)), place)


def measure_case(workers: Mapping[str, Worker], case: dict[str, Any], rounds: int, folder: Path) -> dict[str, Any]:
    """Every contender once a round, in turn."""
    memory = case["work"] == "memory"
    job = {key: value for key, value in case.items() if key != "contenders"}
    job |= {"job": "fill" if case["work"] == "fill" else "run", "measure": "memory" if memory else "time"}
    job["folder"] = str(folder / case["size"])
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in case["contenders"]}
    failures: dict[str, str] = {}
    for _ in range(1 if memory or case["work"] == "fill" else rounds):
        for name in case["contenders"]:
            if name in failures:
                continue
            answer = workers["memory" if memory else "time"].ask(job | {"contender": name})
            if "failed" in answer:
                failures[name] = answer["failed"]
                say(f"  FAILED {case['work']} {case['method']} {case['way']} {name}: {answer['failed']}")
            else:
                found[name].append(answer)
    kept = {key: case[key] for key in ("work", "size", "method", "way", "context", "batch", "rows")}
    result = kept | {"rounds": found, "failures": failures}
    say("  " + line_of(result))
    return result


def line_of(case: Mapping[str, Any]) -> str:
    """A case in a line."""
    head = f"{case['work']} {case['size']} {case['method']} {case['way']}: "
    if case["work"] == "fill":
        return head + ", ".join(f"{key} {value:.4g}" for key, value in case["rounds"]["groundup"][0].items())
    return head + ", ".join(f"{name} {value(case, name):,.1f}" for name, times in case["rounds"].items() if times)


def value(case: Mapping[str, Any], name: str, key: str | None = None) -> float:
    """Tokens a second, seconds of an epoch, or megabytes: the median of the rounds."""
    key = key or {"speed": "tokens", "epoch": "whole", "memory": "bytes"}[case["work"]]
    return median(one[key] for one in case["rounds"][name]) / (2**20 if key == "bytes" else 1)


def add_ratios(cases: list[dict[str, Any]]) -> None:
    """Ours over the fastest of TRL's, round by round: above 1, ours is faster."""
    for case in cases:
        mine = case["rounds"]["groundup"]
        peers = [name for name, times in case["rounds"].items() if name.startswith("TRL") and times]
        if case["work"] not in ("speed", "epoch") or not mine or not peers:
            continue
        key, best = ("tokens", max) if case["work"] == "speed" else ("whole", min)
        peer = best(peers, key=lambda name, case=case: value(case, name))
        found = [a[key] / b[key] for a, b in zip(mine, case["rounds"][peer], strict=False)]
        found = found if key == "tokens" else [1 / ratio for ratio in found]
        case["ratio"] = {"theirs": peer, "median": median(found), "low": min(found), "high": max(found)}


def main() -> None:
    """Measure, keep, render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), help="fewer than all are not kept")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="of models; for a part of it")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="the same")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="the same")
    parser.add_argument("--rounds", type=int, help="how often each contender runs (3)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round; nothing is kept")
    parser.add_argument("--done", type=Path, metavar="FILE", help="keep what is measured there, and go on from it")
    parser.add_argument("--out", type=Path, help="write the result there instead of where it is kept")
    parser.add_argument("--data-dir", type=Path, default=SHARED, help="the shared data, with sft/ in it")
    arguments = parser.parse_args()
    if not (arguments.data_dir / "sft").is_dir():
        parser.error(f"{arguments.data_dir}: no sft folder there. Give the shared data with --data-dir.")
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    kept, load_before = Kept(arguments.done), os.getloadavg()[0]
    quantizer = importlib.util.find_spec("bitsandbytes") is not None
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), QUICK if arguments.quick else SIZES, arguments.data_dir / "sft")
        quiet = {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        goes_back = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed
        workers = {"time": Worker(quiet, JOBS), "memory": Worker(quiet | goes_back, JOBS)}
        for case in cases_of(arguments):
            if case["method"] == "qlora" and not quantizer:
                case["contenders"] = [name for name in case["contenders"] if name.startswith("groundup")]
            named = {key: case[key] for key in ("work", "size", "method", "way")}
            if case["work"] in arguments.works and wanted(case, arguments) and not kept.has(**named):
                kept.add(measure_case(workers, case, rounds, Path(folder)))
        for worker in workers.values():
            worker.close()
    add_ratios(kept.cases)
    result: dict[str, Any] = {
        "benchmark": "finetune", "date": datetime.now(UTC).strftime("%Y-%m-%d"), "quick": arguments.quick,
        "load_before": load_before, "sizes": SIZES, "cases": kept.cases, "machine": machine("cpu"),
    }  # fmt: skip
    peers = ("trl", "peft", *(["bitsandbytes"] if quantizer else []))
    result["machine"]["packages"] |= {name: version(name) for name in peers}
    result = rounded(result)
    parts = ((arguments.works, WORKS), (arguments.sizes, SIZES), (arguments.methods, METHODS), (arguments.ways, WAYS))
    whole = not arguments.quick and all(set(part) == set(all_) for part, all_ in parts)
    if arguments.out or whole:
        (arguments.out or RESULTS / "finetune.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    import render
    from finetune_page import finetune

    say("\n".join(finetune(result)))
    if whole and not arguments.out:
        render.write_page()


if __name__ == "__main__":
    main()
