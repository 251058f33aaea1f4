"""What is done to gradients, against plain loops; the loss scale; parameters chosen by rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groundup.model import ModelConfig, Transformer
from groundup.optim import LossScale, Muon, OptimConfig, build_optimizers
from groundup.optim.gradients import add_noise, clip_adaptively, clip_gradients, scale_gradients, total_norm
from groundup.runtime import UsageError


def with_gradients(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(7)
    parameters = []
    for shape in shapes:
        parameter = nn.Parameter(torch.randn(shape))
        parameter.grad = torch.randn(shape)
        parameters.append(parameter)
    return parameters


def gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [p.grad.clone() for p in parameters if p.grad is not None]


def test_the_norm_is_that_of_all_numbers_together() -> None:
    parameters = with_gradients((3, 5), (7,), (2, 3, 4))
    by_hand = math.sqrt(sum(float(x) ** 2 for g in gradients(parameters) for x in g.flatten()))
    assert total_norm(parameters).item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])
def test_gradients_are_scaled_down_to_the_limit_and_never_up(limit: float) -> None:
    parameters = with_gradients((3, 5), (7,))
    before, norm = gradients(parameters), total_norm(parameters)
    clip_gradients(parameters, norm, limit)
    factor = min(1.0, limit / norm.item()) if limit else 1.0
    for now, was in zip(gradients(parameters), before, strict=True):
        torch.testing.assert_close(now, was * factor, rtol=1e-5, atol=0)


def test_each_row_is_bounded_by_its_own_weights() -> None:
    parameters = with_gradients((3, 5), (7,), (2, 3, 4))
    before = gradients(parameters)
    parameters[0].data[1] *= 1000  # this row's gradient is small beside it
    clip_adaptively(parameters, 0.1)
    for parameter, was in zip(parameters, before, strict=True):
        rows, old = parameter.data.reshape(-1, parameter.shape[-1]), was.reshape(-1, parameter.shape[-1])
        assert parameter.grad is not None
        for row, weights, then in zip(parameter.grad.reshape(-1, parameter.shape[-1]), rows, old, strict=True):
            allowed = 0.1 * max(weights.norm().item(), 1e-3)
            factor = min(1.0, allowed / then.norm().item())
            torch.testing.assert_close(row, then * factor, rtol=1e-5, atol=1e-8)
    assert torch.equal(gradients(parameters)[0][1], before[0][1])


def test_noise_has_the_variance_of_the_paper_and_is_the_same_each_time() -> None:
    noise = []
    for step in (0, 0, 99):
        parameter = nn.Parameter(torch.zeros(300, 200))
        parameter.grad = torch.zeros(300, 200)
        add_noise([parameter], 0.3, step, seed=11)
        noise.append(parameter.grad)
    assert torch.equal(noise[0], noise[1])
    assert noise[0].std().item() == pytest.approx(math.sqrt(0.3), rel=0.02)
    assert noise[2].std().item() == pytest.approx(math.sqrt(0.3 / 100**0.55), rel=0.02)


def test_scaling_multiplies_every_gradient() -> None:
    parameters = with_gradients((3, 5), (7,))
    before = gradients(parameters)
    scale_gradients(parameters, torch.tensor(0.25))
    assert all(torch.equal(now, 0.25 * was) for now, was in zip(gradients(parameters), before, strict=True))
    scale_gradients([nn.Parameter(torch.ones(2))], 0.5)  # none has a gradient


def test_the_loss_scale_halves_on_overflow_and_doubles_after_patience() -> None:
    scale = LossScale(torch.device("cpu"), start=64.0, patience=3)
    seen = []
    for overflowed in (0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0):
        scale.update(torch.tensor(float(overflowed)))
        seen.append(scale.scale.item())
    assert seen == [64, 64, 128, 64, 64, 64, 32, 32, 32, 64, 64]
    other = LossScale(torch.device("cpu"), patience=3)
    other.restore(scale.state())
    for _ in range(2):
        other.update(torch.tensor(0.0))
    assert other.scale.item() == 128


# ---- gradients that are not finite


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_optimizer_told_of_overflow_changes_nothing(kind: str) -> None:
    parameter = nn.Parameter(torch.randn(5, 7))
    optimizer: Any = (
        Muon([parameter], lr=0.1, weight_decay=0.1) if kind == "muon" else torch.optim.AdamW([parameter], fused=True)
    )
    parameter.grad = torch.randn(5, 7)
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), None
    optimizer.step()
    before = parameter.detach().clone(), {k: v.clone() for k, v in optimizer.state[parameter].items()}
    parameter.grad = torch.full((5, 7), math.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(parameter, before[0])
    assert all(torch.equal(optimizer.state[parameter][key], value) for key, value in before[1].items())


def test_muon_skips_on_a_device_without_anybody_reading_the_flag() -> None:
    """The way taken on a GPU, where the flag is never looked at: same result, finite or not."""
    results = []
    for masked in (False, True):
        torch.manual_seed(1)
        parameter = nn.Parameter(torch.randn(5, 7))
        muon = Muon([parameter], lr=0.1, weight_decay=0.1)
        for value in (0.0, 1.0, 0.0):
            parameter.grad = torch.randn(5, 7) + (math.nan if value else 0.0)
            with torch.no_grad():
                if masked:
                    muon._update([parameter], parameter.shape, muon.param_groups[0], torch.tensor(value))
                elif not value:
                    muon._update([parameter], parameter.shape, muon.param_groups[0], None)
        results.append(parameter.detach().clone())
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


# ---- rules


def tiny() -> Transformer:
    torch.manual_seed(2)
    return Transformer(ModelConfig(vocab_size=31, context_length=11, n_layer=2, n_head=2, n_embd=12, n_ff=17))


def placed(model: Transformer, config: OptimConfig) -> dict[str, tuple[str, float, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(p)]: (kind, group["lr"], group["weight_decay"])
        for kind, optimizer in build_optimizers(model, config).items()
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_rules_say_what_is_otherwise() -> None:
    rules = ["embedding lr=0.5 decay=0.2", r"blocks\.0\. frozen", "attention optimizer=adamw lr=2"]
    config = OptimConfig(learning_rate=0.01, weight_decay=0.1, rules=rules)
    found = placed(tiny(), config)
    assert found["embedding.weight"] == ("adamw", pytest.approx(0.005), 0.2)
    assert not any(name.startswith("blocks.0.") for name in found)
    attention = {name: place for name, place in found.items() if "attention" in name and "norm" not in name}
    assert attention
    assert set(attention.values()) == {("adamw", 0.02, 0.1)}
    rest = [place for name, place in found.items() if "feed_forward" in name and "norm" not in name]
    assert set(rest) == {("muon", 0.01, 0.1)}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("embedding", "changes nothing"),
        ("embedding lr=fast", "could not convert"),
        ("embedding colour=red", "what is 'colour=red'"),
        ("embedding lr=-1", "what is 'lr=-1'"),
        ("embedding optimizer=lion", "what is 'optimizer=lion'"),
        ("embed( lr=1", "unterminated|missing"),
        ("", "changes nothing"),
    ],
)
def test_a_rule_that_cannot_be_read_is_said(rule: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        OptimConfig(rules=[rule])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["encoder lr=0.5"], "fits no parameter"),
        (["embedding optimizer=muon"], "embedding.weight is a table"),
        ([". frozen"], "nothing is left to train"),
        (["embedding lr=0.5", "embedding lr=0.6"], "'embedding lr=0.6' fits no parameter that is left"),
    ],
)
def test_rules_that_do_not_fit_the_model_are_said(rules: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_optimizers(tiny(), OptimConfig(rules=rules))
