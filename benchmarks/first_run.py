"""The first ten minutes: from a fresh clone to the end of `make demo`, and what the model is worth then.

    python benchmarks/first_run.py                               the default text
    python benchmarks/first_run.py --data a.txt b.jsonl.gz       and these, without setting up again
    python benchmarks/first_run.py --render                      write docs/benchmarks.md from the kept results

Runs in an empty home directory. The yardsticks (gzip -9, xz -9e, a byte 6-gram with Kneser-Ney smoothing) are measured
in the same run, on the same held-out text, by the demo itself. Ends in one JSON line, kept in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "first_run.json"


def timed(command: list[str], cwd: Path, home: Path) -> float:
    """Wall-clock seconds of a command in a clean home; what it prints goes to standard error."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    started = time.perf_counter()
    subprocess.run(command, cwd=cwd, env=environment | {"HOME": str(home)}, check=True, stdout=sys.stderr)
    return time.perf_counter() - started


def read_run(run: Path, name: str) -> dict[str, Any]:
    """What one demo came to."""
    stats = json.loads((run / "data" / "stats.json").read_text())
    evaluation = json.loads((run / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "train"][-1]
    return {
        "text": name,
        "prepare_seconds": round(sum(stats["seconds"].values()), 2),
        "training_seconds": round(rows[-1]["seconds"], 1),
        "tokens": last["tokens"],
        "tokens_per_second": round(last["tokens"] / last["seconds"]),
        "held_out_bytes": evaluation["val_bytes"],
        "bits_per_byte": {row["name"]: round(row["bits_per_byte"], 4) for row in evaluation["rows"]},
    }


def measure(texts: list[str], minutes: float, keep: str | None) -> dict[str, Any]:
    """Clone, run the demo on the default text through make, then on the other texts."""
    with nullcontext(keep) if keep else tempfile.TemporaryDirectory() as place:
        folder, home = Path(place) / "groundup", Path(place) / "home"
        home.mkdir(parents=True)
        started = time.perf_counter()
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        clone = time.perf_counter() - started
        setup = timed(["make", "setup"], folder, home)
        demo = timed(["make", "demo", f"MINUTES={minutes}"], folder, home)
        runs = [read_run(folder / "runs" / "demo", "stdlib")]
        for text in texts:
            name = Path(text).name
            out = folder / "runs" / name
            timed(["make", "demo", f"DATA={Path(text).resolve()}", f"MINUTES={minutes}", f"OUT={out}"], folder, home)
            runs.append(read_run(out, name))
        program = str(folder / ".venv" / "bin" / "groundup")
        help_seconds = min(_silent([program, "--help"]) for _ in range(7))
        environment = json.loads((folder / "runs" / "demo" / "environment.json").read_text())
    return {
        "benchmark": "first_run",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "minutes": minutes,
        "machine": {key: environment[key] for key in ("cpu", "cores", "memory_bytes", "python", "packages", "commit")},
        "clone_to_end_seconds": round(clone + setup + demo, 1),
        "setup_seconds": round(setup, 1),
        "help_seconds": round(help_seconds, 3),
        "runs": runs,
    }


def _silent(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def render(result: dict[str, Any]) -> str:
    """docs/benchmarks.md."""
    machine = result["machine"]
    lines = [
        "# Benchmarks",
        "",
        "Written by `python benchmarks/first_run.py --render` from `benchmarks/results/`; do not edit by hand.",
        "",
        "## The first ten minutes",
        "",
        f"Measured {result['date']} at commit {machine['commit'][:12]}, on {machine['cores']} cores of "
        f"{machine['cpu']}, Python {machine['python']}, torch {machine['packages']['torch']}, no GPU. "
        "The machine is shared: absolute times vary.",
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
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure or render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=[], help="further texts")
    parser.add_argument("--minutes", type=float, default=5, help="training time of each run")
    parser.add_argument("--keep", metavar="FOLDER", help="clone and run in this new folder, and leave it")
    parser.add_argument("--render", action="store_true", help="only write docs/benchmarks.md")
    arguments = parser.parse_args()
    if not arguments.render:
        result = measure(arguments.data, arguments.minutes, arguments.keep)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result))
    (ROOT / "docs" / "benchmarks.md").write_text(render(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
