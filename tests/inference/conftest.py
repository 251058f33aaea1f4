"""A tiny model that speaks text: random weights, and a tokenizer trained on a few sentences in several scripts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from groundup.inference import LanguageModel
from groundup.model import ModelConfig, Transformer
from groundup.tokenizer import Tokenizer

TEXT = "the cat sat on the mat, and the dog sat on the cat; naïve über straße 中文很好 👋🏽 👩‍👩‍👧. " * 4


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 320, show_progress=False)


def build(vocab_size: int, **fields: Any) -> Transformer:
    torch.manual_seed(31)
    sizes = dict(context_length=48, n_layer=2, n_head=2, n_embd=16, n_ff=24, init_std=0.3)
    return Transformer(ModelConfig(vocab_size=vocab_size, **sizes | fields))


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Transformer]:
    """A function of the vocabulary's size, and further fields of the config, that builds a model."""
    return build


@pytest.fixture
def lm(tokenizer: Tokenizer) -> LanguageModel:
    return LanguageModel(build(tokenizer.vocab_size), tokenizer)
