"""The divergence of two models: against the definition written out, token by token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from groundup.evaluation import bits_per_byte, model_scorer
from groundup.evaluation.divergence import divergence
from groundup.model import ModelConfig, Transformer, quantize_model
from groundup.runtime import GroundupError, UsageError

VOCABULARY, CONTEXT = 61, 13
SIZES = np.arange(VOCABULARY) % 5  # bytes of each token; some stand for none


def model(seed: int = 3) -> Transformer:
    torch.manual_seed(seed)
    config = ModelConfig(vocab_size=VOCABULARY, context_length=CONTEXT, n_layer=2, n_head=2, n_embd=36, init_std=0.3)
    return Transformer(config).eval()


def text(count: int = 47) -> np.ndarray:
    return np.random.default_rng(5).integers(1, VOCABULARY, count)


@torch.inference_mode()
def by_definition(ours: nn.Module, theirs: nn.Module, tokens: np.ndarray, stride: int) -> dict[str, float]:
    """Window after window as bits_per_byte.py tells them, one token after the other, in float64."""
    kls, same, losses, others = [], [], [], []
    ids, counted = [7, *tokens.tolist()], 0
    while counted < len(tokens):
        end = min(CONTEXT, len(tokens)) if counted == 0 else min(counted + stride, len(tokens))
        start = max(0, end - CONTEXT)
        window = torch.tensor([ids[start:end]])
        p_tv, q_tv = (m(window)[0].double().softmax(-1) for m in (ours, theirs))
        for place in range(counted, end):
            p, q, target = p_tv[place - start], q_tv[place - start], ids[place + 1]
            kls.append(sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True)))
            same.append(float(p.argmax() == q.argmax()))
            losses.append(-math.log(p[target]))
            others.append(-math.log(q[target]))
        counted = end
    assert len(kls) == len(tokens)
    means = {
        name: float(np.mean(v)) for name, v in dict(kl=kls, agreement=same, loss=losses, changed_loss=others).items()
    }
    return means | {"kl_99": float(np.quantile(kls, 0.99))}


@pytest.mark.parametrize("stride", [1, 6, 13])
def test_by_definition(stride: int) -> None:
    ours, theirs = model(), quantize_model(model(), "int4", group=32)
    found = divergence(ours, theirs, text(), SIZES, CONTEXT, start_id=7, stride=stride, show_progress=False)
    for name, value in by_definition(ours, theirs, text(), stride).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4), name
    assert found.kl > 0.001  # four bits leave their mark
    assert 0 < found.agreement < 1


def test_losses_are_those_of_bits_per_byte() -> None:
    ours, theirs = model(), quantize_model(model(), "int8")
    settings: dict[str, Any] = dict(start_id=7, max_tokens=41, show_progress=False)
    found = divergence(ours, theirs, text(), SIZES, CONTEXT, **settings)
    for mine, loss, perplexity, bits in (
        (ours, found.loss, found.perplexity, found.bits_per_byte),
        (theirs, found.changed_loss, found.changed_perplexity, found.changed_bits_per_byte),
    ):
        expected = bits_per_byte(model_scorer(mine, "cpu"), text(), SIZES, CONTEXT, **settings)
        assert loss == pytest.approx(expected.loss, rel=1e-6)
        assert bits == pytest.approx(expected.bits_per_byte, rel=1e-6)
        assert perplexity == pytest.approx(math.exp(expected.loss), rel=1e-6)
    assert (found.n_tokens, found.n_bytes) == (41, int(SIZES[text()[:41]].sum()))


def test_a_model_and_itself_are_the_same() -> None:
    found = divergence(model(), model(), text(), SIZES, CONTEXT, start_id=7, show_progress=False)
    assert (found.kl, found.kl_99, found.agreement) == (0.0, 0.0, 1.0)
    assert found.loss == found.changed_loss


def test_it_has_a_direction() -> None:
    ours, theirs = model(), model(seed=4)
    there, back = (
        divergence(*pair, text(), SIZES, CONTEXT, start_id=7, show_progress=False)
        for pair in ((ours, theirs), (theirs, ours))
    )
    assert there.kl != pytest.approx(back.kl, rel=1e-3)


def test_models_are_left_as_they_were_and_a_short_text_is_one_window() -> None:
    ours, theirs = model().train(), model().eval()
    found = divergence(ours, theirs, text(5), SIZES, CONTEXT, start_id=7, show_progress=False)
    assert found.n_tokens == 5
    assert ours.training
    assert not theirs.training


def test_bad_input_is_one_line() -> None:
    with pytest.raises(UsageError, match="stride = 14"):
        divergence(model(), model(), text(), SIZES, CONTEXT, start_id=7, stride=14)
    with pytest.raises(GroundupError, match="empty"):
        divergence(model(), model(), text(0), SIZES, CONTEXT, start_id=7)
    with pytest.raises(GroundupError, match="token id 61"):
        divergence(model(), model(), np.array([61]), SIZES, CONTEXT, start_id=7)
