"""Real text, and tokenizers trained on it once for all tests of this room."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from groundup.tokenizer import Tokenizer


def read_texts(file: Path, limit: int) -> list[str]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line, _ in zip(lines, range(limit), strict=False)]


@pytest.fixture(scope="session")
def shakespeare(shared_data: Path) -> str:
    return (shared_data / "pretrain" / "tinyshakespeare.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def code(shared_data: Path) -> list[str]:
    return read_texts(shared_data / "pretrain" / "code.jsonl.gz", 60)


@pytest.fixture(scope="session")
def multilingual(shared_data: Path) -> list[str]:
    """The Universal Declaration of Human Rights in many scripts."""
    return read_texts(shared_data / "pretrain" / "multilingual" / "udhr_all_languages.jsonl.gz", 80)


@pytest.fixture(scope="session")
def trained(shakespeare: str) -> Tokenizer:
    """4,096 tokens of Shakespeare, two of them special."""
    names = ("<|endoftext|>", "<|user|>")
    return Tokenizer.train([shakespeare], 4096, special_tokens=names, show_progress=False)


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    """A tokenizer that needs no shared data: it knows this one sentence well."""
    text = "the cat sat on the mat and the dog sat on the cat; so they all sat, naïve 中文 中文 👋🏽👋🏽. " * 3
    return Tokenizer.train([text], 300, special_tokens=("<|endoftext|>", "<|end|>"), show_progress=False)


@pytest.fixture(scope="session")
def vocabularies(shared_data: Path) -> Path:
    """The folder of published vocabularies."""
    return shared_data / "tokenizers"


@pytest.fixture(scope="session")
def gpt2(vocabularies: Path) -> Tokenizer:
    """GPT-2's own vocabulary."""
    return Tokenizer.load(vocabularies / "gpt2")
