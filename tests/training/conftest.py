"""Small runs for the tests of training."""

from __future__ import annotations

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
