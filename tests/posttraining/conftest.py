"""A small base model, and runs on it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from groundup.data.stdlib_records import stdlib_records
from groundup.model import ModelConfig, Transformer, save_model
from groundup.posttraining import Finetuning, conclude, finetune
from groundup.tokenizer import Tokenizer
from small_finetuning import Run, plan, write_jsonl


@pytest.fixture(scope="session")
def questions() -> list[dict[str, Any]]:
    """Questions on Python's library, and their answers."""
    return list(islice((one for _, one in stdlib_records() if len(one["completion"]) < 100), 97))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, questions: list[dict[str, Any]]) -> Path:
    """The folder of a model that was never trained, with a tokenizer that fits the questions."""
    folder = tmp_path_factory.mktemp("base")
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


@pytest.fixture
def data(tmp_path: Path, questions: list[dict[str, Any]]) -> Path:
    """The questions as a file."""
    return write_jsonl(tmp_path / "questions.jsonl", questions)


@pytest.fixture
def run(base: Path, data: Path, tmp_path: Path) -> Run:
    """Plans, trains and measures: keys of the recipe (dots as two underscores) to the finished run."""

    def done(*, measured: bool = True, **keys: Any) -> Finetuning:
        planned = plan(base, keys.pop("data", data), keys.pop("out", tmp_path / "run"), **keys)
        found = finetune(planned)
        if measured and found.finished:
            conclude(found)
        return found

    return done
