"""Which layers learn, and how fast: the rules, and what the optimizers make of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from groundup.model import Classifier, LoraConfig, ModelConfig, Transformer, add_adapter
from groundup.optim import OptimConfig, build_optimizers
from groundup.posttraining.layers import layer_rules
from groundup.runtime import UsageError

CHOICES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "learned": {"positions": "learned", "norm": "layernorm", "bias": True},
    "further": {"n_predict": 1},
}


def tiny(n_layer: int = 11, **fields: Any) -> Transformer:
    torch.manual_seed(2)
    sizes = dict(vocab_size=31, context_length=13, n_layer=n_layer, n_head=2, n_embd=12, n_ff=17)
    return Transformer(ModelConfig.from_dict(sizes | fields))


def rates(model: nn.Module, rules: list[str]) -> dict[str, float]:
    """What each parameter's learning rate is multiplied by; nothing of one that is frozen."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for optimizer in build_optimizers(model, OptimConfig(learning_rate=0.5, rules=rules)).values():
        for group in optimizer.param_groups:
            found |= {names[id(parameter)]: group["lr"] / 0.5 for parameter in group["params"]}
    return found


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_rates_fall_towards_the_embedding(choice: dict[str, Any]) -> None:
    model = tiny(**choice)
    found = rates(model, layer_rules(model, decay=0.8))
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, rate in found.items():
        first, *rest = name.split(".")
        below = 12 if first in ("embedding", "positions") else 11 - int(rest[0]) if first == "blocks" else 0
        assert rate == pytest.approx(0.8**below, rel=1e-12), name


def test_the_first_layers_are_frozen() -> None:
    model = tiny(tie_embeddings=False)
    found = rates(model, layer_rules(model, frozen_layers=2, frozen_embeddings=True))
    frozen = {name for name, _ in model.named_parameters()} - set(found)
    assert {name.rsplit(".", 3)[0] for name in frozen if ".q." in name} == {"blocks.0", "blocks.1"}
    assert "embedding.weight" in frozen
    assert {name.split(".")[0] for name in found} == {"blocks", "norm", "head"}
    assert any(name.startswith("blocks.10.") for name in found), "10 begins like 1"
    assert set(found.values()) == {1.0}


def test_frozen_below_and_slower_above() -> None:
    model = tiny(n_layer=3)
    found = rates(model, layer_rules(model, frozen_layers=1, decay=0.5))
    assert found["blocks.1.attention.q.weight"] == 0.25
    assert found["blocks.2.attention.q.weight"] == 0.5
    assert found["embedding.weight"] == 0.0625
    assert not any(name.startswith("blocks.0.") for name in found)


def test_a_classifier_and_adapters() -> None:
    classifier = Classifier(tiny(n_layer=2), 3)
    found = rates(classifier, layer_rules(classifier, frozen_embeddings=True, decay=0.5))
    assert found["score.weight"] == 1.0
    assert found["model.blocks.0.feed_forward.down.weight"] == 0.25
    assert "model.embedding.weight" not in found
    adapted = add_adapter(tiny(n_layer=2, tie_embeddings=False), LoraConfig(targets=("q",)))
    rules = layer_rules(adapted, frozen_layers=1, frozen_embeddings=True, decay=0.5)
    assert set(rates(adapted, rules)) == {f"blocks.1.attention.q.adapters.default.{part}" for part in "AB"}


def test_nothing_asked_for_gives_no_rule() -> None:
    assert layer_rules(tiny()) == []


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.5, math.nan])
def test_a_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(UsageError, match=f"layer decay = {decay} must be above 0 and at most 1"):
        layer_rules(tiny(), decay=decay)


@pytest.mark.parametrize("count", [-1, 12])
def test_more_layers_than_there_are(count: int) -> None:
    with pytest.raises(UsageError, match=f"frozen layers = {count} must be from 0 to the model's n_layer, 11"):
        layer_rules(tiny(), frozen_layers=count)
