"""The first ten minutes: from a fresh clone to the end of `make demo`, and what the model is worth then.

    python benchmarks/first_run.py                               the default text
    python benchmarks/first_run.py --data a.txt b.jsonl.gz       and these, without setting up again
    python benchmarks/render.py                                  write docs/benchmarks.md from the kept results

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

from render import write_page

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


def main() -> None:
    """Measure, keep, render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=[], help="further texts")
    parser.add_argument("--minutes", type=float, default=5, help="training time of each run")
    parser.add_argument("--keep", metavar="FOLDER", help="clone and run in this new folder, and leave it")
    arguments = parser.parse_args()
    result = measure(arguments.data, arguments.minutes, arguments.keep)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    write_page()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
