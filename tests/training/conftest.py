"""Small runs for the tests of training."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from groundup.model import ModelConfig, Transformer
from groundup.optim import OptimConfig
from groundup.tokenizer import Tokenizer
from groundup.training import checkpoint_writer
from groundup.training.checkpoint_writer import Entry, LiveWriter


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig(vocab_size=31, context_length=13, n_layer=2, n_head=3, n_embd=18, n_ff=29)


@pytest.fixture
def model(config: ModelConfig) -> Transformer:
    torch.manual_seed(5)
    return Transformer(config)


@pytest.fixture
def optim_config() -> OptimConfig:
    return OptimConfig(learning_rate=0.01, warmup_steps=2)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat and the dog sat on the log " * 9], 270, show_progress=False)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes its time for every tensor, so that training catches up with the writer."""
    write = LiveWriter._write_entry

    def slowly(self: LiveWriter, entry: Entry, add: Any) -> None:
        time.sleep(0.005)
        write(self, entry, add)

    monkeypatch.setattr(LiveWriter, "_write_entry", slowly)
    monkeypatch.setattr(checkpoint_writer, "SMALL", 0)
