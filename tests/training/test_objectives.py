"""Objectives against formulas written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from groundup.data import TokenBatch
from groundup.model import Classifier, Experts, ModelConfig, Transformer
from groundup.model.heads import further_features
from groundup.training import Classification, LabelledTexts, NextToken


def by_hand(logits_TV: Tensor, targets: list[int], smoothing: float = 0.0, z_loss: float = 0.0) -> float:
    """The mean over positions that have a target, one position after the other."""
    total, count = 0.0, 0
    for logits_V, target in zip(logits_TV.double(), targets, strict=True):
        if target == -100:
            continue
        normaliser = math.log(sum(math.exp(float(x)) for x in logits_V))
        log_p = [float(x) - normaliser for x in logits_V]
        loss = -(1 - smoothing) * log_p[target] - smoothing * sum(log_p) / len(log_p)
        total, count = total + loss + z_loss * normaliser**2, count + 1
    return total / count


def test_the_loss_is_the_mean_negative_log_probability(model: Transformer) -> None:
    batch = TokenBatch(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))
    loss, metrics = NextToken()(model, batch)
    log_p = model(batch.inputs)[0].log_softmax(-1)
    expected = -(log_p[0, 2] + log_p[1, 3] + log_p[2, 4]) / 3
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert metrics == {}
    assert NextToken().count(batch) == 3


@pytest.mark.parametrize("chunk", [0, 1, 2, 100])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-2)])
def test_smoothing_z_loss_and_targets_that_do_not_count(
    model: Transformer, smoothing: float, z_loss: float, chunk: int
) -> None:
    targets = [5, -100, 7, 0, -100]
    batch = TokenBatch(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([targets]))
    objective = NextToken(label_smoothing=smoothing, z_loss=z_loss, chunk=chunk)
    assert objective.count(batch) == 3
    expected = by_hand(model(batch.inputs)[0], targets, smoothing, z_loss)
    assert objective(model, batch)[0].item() == pytest.approx(expected, abs=1e-5)


def test_documents_of_a_row_do_not_see_each_other(model: Transformer) -> None:
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
    targets = torch.tensor([[1, 4, -100, 5, 9, 2, 6]])
    packed = TokenBatch(ids, targets, torch.tensor([[0, 0, 0, 1, 1, 1, 1]]))
    loss = NextToken()(model, packed)[0].item()
    first = by_hand(model(ids[:, :3])[0], [1, 4, -100])
    second = by_hand(model(ids[:, 3:])[0], [5, 9, 2, 6])
    assert loss == pytest.approx((2 * first + 4 * second) / 6, abs=1e-5)


def with_further(config: ModelConfig, **fields: Any) -> Transformer:
    torch.manual_seed(5)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "context_length", "n_layer", "n_head", "n_embd")}
    return Transformer(ModelConfig(**sizes | fields))


@pytest.mark.parametrize("packed", [False, True])
def test_further_tokens_add_their_mean_loss(config: ModelConfig, packed: bool) -> None:
    model = with_further(config, n_predict=2)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    targets = torch.tensor([[1, 4, 1, 5, 9, 2, 6, 5]])
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]) if packed else None
    if packed:
        targets[0, 3] = -100
    loss, metrics = NextToken(further_weight=0.25)(model, TokenBatch(ids, targets, documents))
    features = further_features(model, ids, documents_BT=documents)
    expected = []
    for depth, feature in enumerate(features):
        wanted = targets[0, depth:].tolist()
        if documents is not None:
            wanted = [target if documents[0, t] == documents[0, t + depth] else -100 for t, target in enumerate(wanted)]
        expected.append(by_hand(model.head(feature)[0], wanted))
    assert loss.item() == pytest.approx(expected[0] + 0.25 * (expected[1] + expected[2]) / 2, abs=1e-5)
    assert metrics["cross_entropy"].item() == pytest.approx(expected[0], abs=1e-5)
    assert metrics["further_tokens"].item() == pytest.approx((expected[1] + expected[2]) / 2, abs=1e-5)


def test_the_losses_of_routers_are_added(config: ModelConfig) -> None:
    model = with_further(config, experts=Experts(count=3, active=2, balance_loss=0.1))
    batch = TokenBatch(torch.tensor([[3, 1, 4, 1]]), torch.tensor([[1, 4, 1, 5]]))
    loss, metrics = NextToken()(model, batch)
    of_routers = sum(routing.loss.item() for routing in model.routings())
    assert of_routers > 0
    assert loss.item() == pytest.approx(metrics["cross_entropy"].item() + of_routers, abs=1e-6)


def test_a_micro_batch_without_targets_is_worth_nothing(model: Transformer) -> None:
    batch = TokenBatch(torch.tensor([[3, 1]]), torch.tensor([[-100, -100]]))
    loss, _ = NextToken()(model, batch)
    loss.backward()
    assert loss.item() == 0.0
    assert NextToken().count(batch) == 0


def test_labels_by_hand(model: Transformer) -> None:
    classifier = Classifier(model, 3)
    texts = LabelledTexts(torch.tensor([[3, 1, 4], [1, 5, 0]]), torch.tensor([3, 2]), torch.tensor([2, 0]))
    loss, metrics = Classification()(classifier, texts)
    first = classifier(torch.tensor([[3, 1, 4]]), torch.tensor([3]))
    second = classifier(torch.tensor([[1, 5]]), torch.tensor([2]))
    expected = (by_hand(first, [2]) + by_hand(second, [0])) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    right = (int(first.argmax()) == 2) + (int(second.argmax()) == 0)
    assert metrics["accuracy"].item() == right / 2
    assert Classification().count(texts) == 2
