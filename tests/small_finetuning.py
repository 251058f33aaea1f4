"""Small fine-tuning runs, with as little around them as may be."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from groundup.config import Given
from groundup.posttraining import Finetuning, plan_finetuning

QUIET: dict[str, Any] = {
    "track": [], "monitor_every": 0.0, "precision": "float32", "attention": "sdpa", "device": "cpu", "log_every": 1,
    "measure.answers": 2, "measure.max_tokens": 5,
}  # fmt: skip
Run = Callable[..., Finetuning]


def plan(base: Path, data: Path | str, out: Path, **keys: Any) -> Finetuning:
    """A planned run, with as little around it as may be."""
    given = {key.replace("__", "."): value for key, value in keys.items()}
    values = {"init_from": str(base), "data": str(data), "out": str(out)} | QUIET | given
    return plan_finetuning(Given(values, dict.fromkeys(values, "flag")))


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    """A file of records."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
