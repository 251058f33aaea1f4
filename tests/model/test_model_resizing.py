"""Rows for further tokens change nothing of what a model says of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groundup.model import (
    LoraConfig,
    ModelConfig,
    Transformer,
    add_adapter,
    load_model,
    resize_embeddings,
    save_model,
)
from groundup.runtime import UsageError


def model(vocab_size: int = 61, **fields: Any) -> Transformer:
    torch.manual_seed(3)
    sizes = dict(context_length=17, n_layer=2, n_head=3, n_embd=24, n_ff=40, init_std=0.3)
    return Transformer(ModelConfig.from_dict(sizes | {"vocab_size": vocab_size} | fields)).eval()


def ids() -> Tensor:
    return torch.randint(61, (3, 13), generator=torch.Generator().manual_seed(5))


FAMILIES: list[dict[str, Any]] = [
    {},  # our own
    {"tie_embeddings": False, "qk_norm": False},  # Llama
    {"norm": "layernorm", "positions": "learned", "feed_forward": "gelu", "bias": True, "qk_norm": False},  # GPT-2
]


@pytest.mark.parametrize("fields", FAMILIES)
@torch.no_grad()
def test_old_logits_stay_and_the_model_is_saved(fields: dict[str, Any], tmp_path: Path) -> None:
    small = model(**fields)
    before = small(ids())
    grown = resize_embeddings(small, 67, seed=7)
    after = grown(ids())
    assert grown is small
    assert after.shape == (3, 13, 67)
    torch.testing.assert_close(after[..., :61], before, rtol=0, atol=1e-5)
    assert grown.config.vocab_size == 67
    assert (grown.head.weight is grown.embedding.weight) == grown.config.tie_embeddings
    save_model(grown, tmp_path)
    loaded = load_model(tmp_path).eval()
    assert loaded.config.vocab_size == 67
    torch.testing.assert_close(loaded(ids()), after, rtol=0, atol=1e-5)
    new = torch.tensor([[61, 66, 5]])
    torch.testing.assert_close(loaded(new), grown(new), rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_without_noise_are_the_mean_and_take_little() -> None:
    grown = resize_embeddings(model(tie_embeddings=False).double(), 67, noise=0.0)
    for weight in (grown.embedding.weight, grown.head.weight):
        torch.testing.assert_close(weight[61:], weight[:61].mean(dim=0).expand(6, -1))
        assert weight.dtype == torch.float64
    share = grown(ids()).softmax(dim=-1)[..., 61:].sum(dim=-1)
    assert (share <= 6 / 67 + 1e-12).all()
    assert not torch.equal(grown.embedding.weight[61], grown.head.weight[61])


@torch.no_grad()
def test_noise_has_the_covariance_of_the_old_rows() -> None:
    grown = resize_embeddings(model().double(), 61 + 20_011, noise=0.04)
    old, new = grown.embedding.weight[:61], grown.embedding.weight[61:]
    torch.testing.assert_close(new.mean(dim=0), old.mean(dim=0), rtol=0, atol=0.003)
    expected = 0.04 * torch.cov(old.T, correction=0)
    error = (torch.cov(new.T) - expected).norm() / expected.norm()
    assert error < 0.1, "a fortieth is chance"
    again = resize_embeddings(model().double(), 61 + 20_011, noise=0.04)
    assert torch.equal(again.embedding.weight, grown.embedding.weight)
    other = resize_embeddings(model().double(), 61 + 20_011, noise=0.04, seed=1)
    assert not torch.equal(other.embedding.weight[61:], new)


@torch.no_grad()
def test_padding_rows_are_drawn_anew() -> None:
    padded = model(vocab_size=71)
    before = padded.embedding.weight.clone()
    grown = resize_embeddings(padded, 63, used=61, noise=0.0)
    assert grown.config.vocab_size == 71
    assert torch.equal(grown.embedding.weight[:61], before[:61])
    torch.testing.assert_close(grown.embedding.weight[61:], before[:61].mean(dim=0).expand(10, -1))
    same = grown.embedding.weight
    assert resize_embeddings(grown, 71).embedding.weight is same


def test_what_was_frozen_stays_frozen_and_the_rest_learns() -> None:
    small = model()
    small.embedding.weight.requires_grad_(False)
    assert not resize_embeddings(small, 67).embedding.weight.requires_grad
    grown = resize_embeddings(model().bfloat16(), 67)
    assert grown.embedding.weight.dtype == torch.bfloat16
    grown(torch.tensor([[66, 3]])).float().sum().backward()
    gradient = grown.embedding.weight.grad
    assert gradient is not None
    assert gradient.shape == (67, 24)
    assert (gradient[66] != 0).any()


def test_what_cannot_be_resized() -> None:
    with pytest.raises(UsageError, match="used = 62 must be from 1 to the model's vocab_size, 61"):
        resize_embeddings(model(), 67, used=62)
    adapted = add_adapter(model(tie_embeddings=False), LoraConfig(targets=("head",)))
    with pytest.raises(UsageError, match="has adapters or is quantized, and takes no new tokens"):
        resize_embeddings(adapted, 67)  # type: ignore[arg-type]
