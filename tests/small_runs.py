"""Small runs of the command line in processes of their own, to be killed, stopped and gone on with."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "save-every": 7, "log-every": 1, "seed": 5, "n-embd": 48, "n-head": 3, "tokenizer.vocab-size": 300,
    "context-length": 32, "batch-tokens": 256, "dropout": 0.1, "precision": "float32", "attention": "explicit",
    "device": "cpu", "sample.max-tokens": 5,
}  # fmt: skip
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def write_corpus(folder: Path, lines: int) -> Path:
    """Some text with some order in it, about 45 bytes a line."""
    chooser = random.Random(11)
    words = str.split("a model learns what comes next from what came before and a run resumes where it stopped")
    path = folder / "corpus.txt"
    path.write_text("\n".join(" ".join(chooser.choices(words, k=chooser.randint(4, 11))) + "." for _ in range(lines)))
    return path


def command(name: str, text: Path, out: Path, *, processes: int = 1, **options: object) -> list[str]:
    """The words of ``groundup name`` with :data:`SETTINGS` and ``options``, under torchrun for several processes."""
    flags = SETTINGS | {"data": text, "out": out} | options
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] if processes > 1 else []
    return [sys.executable, "-m", *launch, "groundup", name, *(f"--{key}={value}" for key, value in flags.items())]


def start(words: list[str], **options: Any) -> subprocess.Popen[str]:
    """Start it, with its standard output and errors thrown away unless ``options`` say otherwise."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(words, text=True, env=ENVIRONMENT, **quiet | options)


def finish(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run it to its end, which must be a good one."""
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def losses(out: Path, kind: str = "train") -> list[tuple[int, float]]:
    """Steps and losses of the rows of a kind."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in found if row["kind"] == kind]


def wait_for(process: subprocess.Popen[str], out: Path, rows: int) -> None:
    """Until the run has logged that many steps."""
    deadline = time.monotonic() + 120
    while _logged(out) < rows and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert _logged(out) >= rows, f"the run ended by itself ({process.poll()}) before step {rows}"


def _logged(out: Path) -> int:
    try:
        return (out / "metrics.jsonl").read_text().count('"train"')
    except OSError:
        return 0
