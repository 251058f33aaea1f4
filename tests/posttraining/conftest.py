"""A small base model, and runs on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from groundup.posttraining import Finetuning, conclude, finetune
from small_finetuning import Run, plan, some_questions, write_base, write_jsonl


@pytest.fixture(scope="session")
def questions() -> list[dict[str, Any]]:
    """Questions on Python's library, and their answers."""
    return some_questions(97)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, questions: list[dict[str, Any]]) -> Path:
    """The folder of a model that was never trained, with a tokenizer that fits the questions."""
    return write_base(tmp_path_factory.mktemp("base"), questions)


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
