"""A mixture of experts computes what a loop over tokens and their experts computes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from groundup.model import ModelConfig, Transformer
from groundup.model.experts import MixtureOfExperts, grouped_linear
from groundup.model.feed_forward import activate, gate_with

VARIANTS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "not normed, scaled": {"normalise": False, "scale": 2.5},
    "shared": {"shared": 2},
    "sigmoid with a bias on the choice": {"router": "sigmoid", "selection_bias": True},
    "groups": {"groups": 3, "active_groups": 2, "active": 3},
    "sigmoid groups": {"router": "sigmoid", "groups": 3, "active_groups": 1, "selection_bias": True},
    "router bias": {"router_bias": True},
    "one": {"active": 1},
    "all": {"active": 6},
}


def layer(experts: dict[str, Any] | None = None, **fields: Any) -> MixtureOfExperts:
    torch.manual_seed(17)
    config = ModelConfig.from_dict(
        dict(vocab_size=31, context_length=19, n_layer=1, n_head=2, n_embd=20)
        | fields
        | {"experts": {"count": 6, "active": 2, "width": 11, **(experts or {})}}
    )
    made = Transformer(config).blocks[0].feed_forward
    assert isinstance(made, MixtureOfExperts)
    made.double()
    for name, parameter in [*made.named_parameters(), *made.named_buffers()]:
        if name != "router.load_N":
            parameter.data.copy_(0.5 * torch.randn_like(parameter))
    return made.eval()


def by_loops(moe: MixtureOfExperts, x_ME: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    config = moe.router.config
    result = torch.zeros_like(x_ME)
    for m, x in enumerate(x_ME):
        logits = x @ moe.router.weight.T + (0 if moe.router.bias is None else moe.router.bias)
        scores = logits.sigmoid() if config.router == "sigmoid" else logits.softmax(0)
        wanted = (scores if moe.router.selection_bias is None else scores + moe.router.selection_bias).tolist()
        size = config.count // config.groups
        groups = [wanted[g * size : (g + 1) * size] for g in range(config.groups)]
        take = 2 if config.router == "sigmoid" else 1
        merits = [sum(sorted(group)[-take:]) for group in groups]
        best = sorted(range(config.groups), key=lambda g: -merits[g])[
            : config.active_groups if config.groups > 1 else 1
        ]
        allowed = [n for n in range(config.count) if n // size in best]
        chosen = sorted(allowed, key=lambda n: -wanted[n])[: config.active]
        weights = scores[chosen] / (scores[chosen].sum() if config.normalise else 1.0) * config.scale
        for weight, n in zip(weights, chosen, strict=True):
            result[m] += weight * expert(moe, n, x)
    return result if moe.shared is None else result + moe.shared(x_ME)


def expert(moe: MixtureOfExperts, n: int, x: Tensor) -> Tensor:
    def linear(stack: Any, y: Tensor) -> Tensor:
        return stack.weight[n] @ y + (0 if stack.bias is None else stack.bias[n])

    if moe.gate is None:
        return linear(moe.down, activate(moe.kind, linear(moe.up, x)))
    return linear(moe.down, gate_with(moe.kind, linear(moe.gate, x), linear(moe.up, x)))


@pytest.mark.parametrize("feed_forward", ["swiglu", "gelu", "clamped_swiglu"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_values_and_gradients_are_those_of_loops(variant: dict[str, Any], feed_forward: str) -> None:
    moe = layer(variant, feed_forward=feed_forward, ff_bias=feed_forward == "clamped_swiglu")
    x = torch.randn(3, 7, 20, dtype=torch.float64)
    found, expected = [], []
    for place, compute in (
        (found, lambda x: moe(x).flatten(0, 1)),
        (expected, lambda x: by_loops(moe, x.flatten(0, 1))),
    ):
        leaf = x.clone().requires_grad_()
        moe.zero_grad()
        y = compute(leaf)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        assert leaf.grad is not None
        place += [y.detach(), leaf.grad, *(p.grad if p.grad is not None else torch.zeros(1) for p in moe.parameters())]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_an_expert_that_nobody_chose_costs_nothing_and_hurts_nothing() -> None:
    moe = layer({"active": 1})
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[3] = 100.0
    x = torch.rand(2, 5, 20, dtype=torch.float64, requires_grad=True)
    y = moe(x)
    y.sum().backward()
    assert moe.routing is not None
    assert moe.routing.counts_N.tolist() == [0, 0, 0, 10, 0, 0]
    torch.testing.assert_close(y[1, 4], expert(moe, 3, x[1, 4]), rtol=0, atol=1e-12)
    assert moe.up.weight.grad is not None
    assert torch.equal(moe.up.weight.grad[0], torch.zeros_like(moe.up.weight[0]))


def test_grouped_products_are_one_product_a_group() -> None:
    x, weight = torch.randn(13, 5), torch.randn(4, 7, 5)
    offsets = torch.tensor([3, 3, 12, 13])
    groups = [0] * 3 + [2] * 9 + [3]
    torch.testing.assert_close(
        grouped_linear(x, weight, offsets), torch.stack([weight[g] @ r for g, r in zip(groups, x, strict=True)])
    )


def test_capacity_drops_what_does_not_fit_in_the_order_of_tokens() -> None:
    moe = layer({"active": 1, "capacity": 1.5})
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[3] = 100.0
    x = torch.rand(1, 8, 20, dtype=torch.float64)
    y = moe(x)[0]
    room = math.ceil(1.5 * 8 / 6)  # for the one expert that all of them want
    assert moe.routing is not None
    assert int(moe.routing.dropped) == 8 - room
    torch.testing.assert_close(y[:room], torch.stack([expert(moe, 3, row) for row in x[0, :room]]), rtol=0, atol=1e-12)
    assert torch.equal(y[room:], torch.zeros_like(y[room:]))
    roomy = layer({"capacity": 6.0})
    other = layer({})
    x = torch.randn(2, 9, 20, dtype=torch.float64)
    torch.testing.assert_close(roomy(x), other(x), rtol=0, atol=1e-12)


def test_losses_by_their_formulas() -> None:
    moe = layer({"balance_loss": 0.3, "z_loss": 0.7})
    x = torch.randn(2, 9, 20, dtype=torch.float64)
    moe(x)
    assert moe.routing is not None
    logits = x.flatten(0, 1) @ moe.router.weight.T
    probabilities = logits.softmax(-1)
    chosen = F.one_hot(probabilities.topk(2).indices, 6).sum(1).double()
    balance = 6 * ((chosen.sum(0) / chosen.sum()) * probabilities.mean(0)).sum()
    z = logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(moe.routing.loss, 0.3 * balance + 0.7 * z)
    even = probabilities.mean(0)
    torch.testing.assert_close(moe.routing.entropy, -(even * even.log()).sum())


def test_the_bias_moves_against_the_load_in_training_only() -> None:
    moe = layer({"selection_bias": True, "bias_rate": 0.25, "active": 1})
    assert moe.router.selection_bias is not None
    with torch.no_grad():
        moe.router.selection_bias.zero_()
        moe.router.weight.zero_()
        moe.router.weight[3] = 1.0
    x = torch.rand(2, 9, 20, dtype=torch.float64)
    moe(x)
    moe.router.rebalance()
    before = moe.router.selection_bias.clone()
    moe.train()
    moe(x)
    moe(x)
    moe.router.rebalance()
    assert (moe.router.selection_bias - before).tolist() == [0.25, 0.25, 0.25, -0.25, 0.25, 0.25]
    assert moe.router.load_N.sum() == 0
    for _ in range(40):  # every expert is chosen sooner or later
        moe(x)
        moe.router.rebalance()
    assert moe.routing is not None
    torch.testing.assert_close(moe.routing.weights_MK, torch.ones(18, 1, dtype=torch.float64))  # it decides who alone


def test_experts_learn_under_autocast_and_in_some_layers_only() -> None:
    torch.manual_seed(5)
    config = ModelConfig.from_dict(
        dict(vocab_size=31, context_length=19, n_layer=4, n_head=2, n_embd=20)
        | {"experts": {"count": 4, "active": 2, "pattern": "DE", "balance_loss": 0.01}}
    )
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(31, (4, 19))
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        routings = model.routings()
        assert len(routings) == 2
        optimizer.zero_grad()
        (loss + sum(routing.loss for routing in routings)).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
