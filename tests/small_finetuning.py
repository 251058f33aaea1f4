"""Small fine-tuning runs, with as little around them as may be."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from groundup.config import Given
from groundup.data.stdlib_records import stdlib_records
from groundup.model import ModelConfig, Transformer, save_model
from groundup.posttraining import Finetuning, plan_finetuning
from groundup.tokenizer import Tokenizer

QUIET: dict[str, Any] = {
    "track": [], "monitor_every": 0.0, "precision": "float32", "attention": "sdpa", "device": "cpu", "log_every": 1,
    "measure.answers": 2, "measure.max_tokens": 5,
}  # fmt: skip
Run = Callable[..., Finetuning]


def some_questions(count: int) -> list[dict[str, Any]]:
    """Questions on Python's library, and short answers."""
    return list(islice((one for _, one in stdlib_records() if len(one["completion"]) < 100), count))


def write_base(folder: Path, questions: Iterable[dict[str, Any]]) -> Path:
    """A model that was never trained, with a tokenizer that fits the questions."""
    texts = [f"{one['prompt']} {one['completion']}" for one in questions]
    tokenizer = Tokenizer.train(texts, 400, special_tokens=["<|endoftext|>"], show_progress=False)
    torch.manual_seed(3)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, context_length=448, n_layer=2, n_head=2, n_embd=32, n_ff=48,
        tie_embeddings=False,
    )  # fmt: skip
    end = tokenizer.end_of_text_id
    save_model(Transformer(config), folder, bos_id=end, eos_id=end)
    tokenizer.save(folder)
    return folder


def plan(base: Path, data: Path | str, out: Path, **keys: Any) -> Finetuning:
    """A planned run, with as little around it as may be."""
    given = {key.replace("__", "."): value for key, value in keys.items()}
    values = {"init_from": str(base), "data": str(data), "out": str(out)} | QUIET | given
    return plan_finetuning(Given(values, dict.fromkeys(values, "flag")))


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    """A file of records."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
