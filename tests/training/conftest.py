"""Small runs for the tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from groundup.model import ModelConfig, Transformer
from groundup.optim import OptimConfig
from groundup.tokenizer import Tokenizer


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


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-odd kilobytes of text that is not all the same."""
    import random

    chooser = random.Random(3)
    words = str.split("ground up model token loss step batch layer head width depth text data rate decay warm norm")
    lines = [" ".join(chooser.choices(words, k=chooser.randint(3, 12))) + "." for _ in range(520)]
    path = tmp_path_factory.mktemp("text") / "small.txt"
    path.write_text("\n".join(lines))
    return path
