"""How fast training windows are dealt, and in how little memory.

    python benchmarks/loader.py                      200 million tokens for speed, a billion for memory
    python benchmarks/loader.py --tokens 20000000    fewer, for a first look (kept nowhere)

Tokens are made up: documents of log-normal length in uint16 shards, warm in the system's cache. One core deals
micro-batches of 16 x 1,024, every way of cutting the text in turn, for several rounds; the median round counts. Beside
them stands the loader that small training scripts have (nanoGPT's: a memory map opened per batch, random places,
rows converted to int64 and stacked), on the same tokens. Where the machine is shared, seconds of processor time say
more than those of the clock. Ends in one JSON line, kept in benchmarks/results/loader.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np

from groundup.data import (
    FillInTheMiddle,
    Loader,
    MixedLoader,
    Mixture,
    PackedLoader,
    Prefetcher,
    ShardWriter,
    TokenLoader,
    TokenSet,
    Weights,
)
from groundup.runtime.environment import describe_environment

RESULT = Path(__file__).resolve().parent / "results" / "loader.json"
ROUND_SECONDS = 1.5
CONTEXT, BATCH = 1024, 16
TOKENIZER = SimpleNamespace(vocab_size=50_257, end_of_text_id=50_256, fingerprint="made up")


def make_tokens(folder: Path, n_tokens: int) -> TokenSet:
    """Shards of so many tokens, in documents of a median of 400."""
    random = np.random.default_rng(0)
    ids = random.integers(0, 50_000, 1 << 22).astype(np.uint16)
    writer, written = ShardWriter(folder, TOKENIZER, 100_000_000), 0  # type: ignore[arg-type]
    while written < n_tokens:
        length = min(int(random.lognormal(6, 1)), 100_000, n_tokens - written)
        start = int(random.integers(0, len(ids) - length))
        writer.add(ids[start : start + length], 4 * length)
        written += length + 1
    writer.close()
    return TokenSet.open(folder)


def peer(tokens: TokenSet) -> Callable[[int], object]:
    """A batch as small training scripts make it."""
    import torch

    files = sorted(tokens.folder.glob("*.bin"))

    def batch(_: int) -> object:
        data = np.memmap(files[0], np.uint16, "r")
        starts = torch.randint(len(data) - CONTEXT, (BATCH,))
        inputs = torch.stack([torch.from_numpy(data[i : i + CONTEXT].astype(np.int64)) for i in starts])
        targets = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + CONTEXT].astype(np.int64)) for i in starts])
        return inputs, targets

    return batch


def contenders(tokens: TokenSet) -> dict[str, Callable[[int], object]]:
    """Every way of dealing, by name: an index to a batch."""
    fill = FillInTheMiddle(50_001, 50_002, 50_003, rate=0.5, spm_rate=0.5, seed=0)
    three = {name: TokenLoader(tokens, CONTEXT, BATCH, seed) for seed, name in enumerate("abc")}
    loaders: dict[str, Loader] = {
        "windows": TokenLoader(tokens, CONTEXT, BATCH, 0),
        "documents": TokenLoader(tokens, CONTEXT, BATCH, 0, documents=True),
        "best_fit": PackedLoader(tokens, CONTEXT, BATCH, 0),
        "mixture of three": MixedLoader(three, Mixture([Weights(0, [6, 3, 1])]), BATCH, 0),
        "fill-in-the-middle": TokenLoader(tokens, CONTEXT, BATCH, 0, fill=fill),
    }
    ways: dict[str, Callable[[int], object]] = {name: loader.batch for name, loader in loaders.items()}
    return ways | {"windows, prefetched": Prefetcher(loaders["windows"], 2).batch, "memmap and stack": peer(tokens)}


def speeds(tokens: TokenSet, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Tokens per second, and per second of the processor's time, of each way, round by round, the ways in turn."""
    ways = contenders(tokens)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    index = dict.fromkeys(ways, 0)
    for _ in range(rounds):
        for name, batch in ways.items():
            started, busy, first = time.perf_counter(), time.process_time(), index[name]
            while (elapsed := time.perf_counter() - started) < ROUND_SECONDS:
                batch(index[name])
                index[name] += 1
            dealt = (index[name] - first) * CONTEXT * BATCH
            found[name].append((dealt / elapsed, dealt / (time.process_time() - busy)))
    return found


def plan_seconds(tokens: TokenSet) -> dict[str, Any]:
    """What best-fit packing costs: to plan an epoch, in room, in documents cut."""
    loader, windows = PackedLoader(tokens, CONTEXT, BATCH, 0), TokenLoader(tokens, CONTEXT, BATCH, 0)
    started = time.perf_counter()
    rows = tokens.n_tokens // CONTEXT
    while loader.epoch_of(rows) == 0:
        rows += 1
    seconds = time.perf_counter() - started
    report = loader.report()
    return {
        "documents": tokens.n_documents,
        "seconds_per_million_documents": round(seconds / tokens.n_documents * 1e6, 2),
        "padding": round(report["padding"], 6),
        "documents_cut": report["documents_cut"],
        "documents_cut_by_windows": windows.report()["documents_cut"],
    }


_MEMORY = """
import sys
from pathlib import Path
from groundup.data import TokenLoader, TokenSet
loader = TokenLoader(TokenSet.open(Path(sys.argv[1])), 1024, 16, 0)
for index in range(0, loader.batches_per_epoch, 5):
    loader.batch(index)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def memory_bytes(n_tokens: int) -> int:
    """Peak resident memory of a process that deals a fifth of so many tokens (sparse files), in shuffled order."""
    with tempfile.TemporaryDirectory() as place:
        folder, each = Path(place), n_tokens // 10
        entries = []
        for number in range(10):
            name = f"tokens-{number:05d}"
            with open(folder / f"{name}.bin", "wb") as file:
                file.truncate(2 * each)
            (folder / f"{name}.idx").write_bytes(bytes(8))
            entries.append({"file": f"{name}.bin", "index": f"{name}.idx", "tokens": each, "documents": 1})
        about = {"tokenizer": "made up", "vocab_size": 50_257, "end_of_text_id": 50_256, "dtype": "uint16"}
        totals = {"n_tokens": 10 * each, "n_documents": 10, "n_bytes": 1, "shards": entries}
        manifest = {"format": "groundup token shards", "version": 1, **about, **totals}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        command = [sys.executable, "-c", _MEMORY, place]
        return 1024 * int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(n_tokens: int, rounds: int) -> dict[str, Any]:
    """All figures."""
    environment = describe_environment()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as place:
        tokens = make_tokens(Path(place), n_tokens)
        found = speeds(tokens, rounds)
        packing = plan_seconds(tokens)
    return {
        "benchmark": "loader",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {key: environment[key] for key in ("cpu", "cores", "memory_bytes", "python", "packages", "commit")},
        "tokens": n_tokens,
        "context": CONTEXT,
        "batch": BATCH,
        "rounds": rounds,
        "ways": {
            name: {
                "tokens_per_second": round(median(wall for wall, _ in values)),
                "lowest_and_highest": [round(min(values)[0]), round(max(values)[0])],
                "tokens_per_processor_second": round(median(busy for _, busy in values)),
            }
            for name, values in found.items()
        },
        "packing": packing,
        "memory_of_a_billion_tokens": memory_bytes(5 * n_tokens),
    }


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000_000, help="made up for the speeds; five times for memory")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    result = measure(arguments.tokens, arguments.rounds)
    for name, way in result["ways"].items():
        wall, busy = (way[key] / 1e6 for key in ("tokens_per_second", "tokens_per_processor_second"))
        print(f"{name:24} {wall:8.1f} million tokens/s {busy:8.1f} per second of processor time")
    print(f"{'peak memory':24} {result['memory_of_a_billion_tokens'] / 1e6:8.1f} MB")
    if arguments.tokens == parser.get_default("tokens"):
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
