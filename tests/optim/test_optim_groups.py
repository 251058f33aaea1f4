"""Which parameter is updated by what, and that AdamW is AdamW."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from groundup.model import Experts, ModelConfig, Transformer
from groundup.optim import OptimConfig, build_optimizers
from groundup.runtime import UsageError

CHOICES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_embeddings": False, "qk_norm": False},
    "gpt2": {"norm": "layernorm", "positions": "learned", "feed_forward": "gelu", "bias": True},
    "experts": {"experts": Experts(count=3, active=2), "ff_bias": True},
}


def tiny(**fields: Any) -> Transformer:
    torch.manual_seed(2)
    sizes = dict(vocab_size=31, context_length=11, n_layer=2, n_head=2, n_kv_head=1, n_embd=12, n_ff=17)
    return Transformer(ModelConfig(**sizes | fields))


def placed(model: Transformer, config: OptimConfig) -> dict[str, list[tuple[str, float]]]:
    """For each parameter's name, every (optimizer, weight decay) that holds it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    result: dict[str, list[tuple[str, float]]] = {name: [] for name in names.values()}
    for kind, optimizer in build_optimizers(model, config).items():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                result[names[id(parameter)]].append((kind, group["weight_decay"]))
    return result


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_every_parameter_is_in_its_group_once(choice: dict[str, Any], optimizer: Any) -> None:
    model = tiny(**choice)
    for name, places in placed(model, OptimConfig(optimizer=optimizer, weight_decay=0.3)).items():
        block_matrix = name.startswith("blocks.") and "norm" not in name and not name.endswith(".bias")
        assert places == [(optimizer, 0.3) if block_matrix else ("adamw", 0.0)], name


def test_the_tied_embedding_is_an_embedding_and_there_once() -> None:
    names = placed(tiny(), OptimConfig())
    assert names["embedding.weight"] == [("adamw", 0.0)]
    assert "head.weight" not in names
    assert placed(tiny(tie_embeddings=False), OptimConfig())["head.weight"] == [("adamw", 0.0)]


def test_frozen_parameters_are_left_out() -> None:
    model = tiny()
    model.blocks[0].requires_grad_(False)
    places = placed(model, OptimConfig())
    assert {name for name, found in places.items() if not found} == {n for n in places if n.startswith("blocks.0.")}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_group_starts_at_the_peak(optimizer: Any) -> None:
    for built in build_optimizers(tiny(), OptimConfig(optimizer=optimizer, learning_rate=0.0123)).values():
        assert {group["lr"] for group in built.param_groups} == {0.0123}


def by_hand(model: Transformer, config: OptimConfig, batches: Tensor) -> dict[str, Tensor]:
    """Loshchilov & Hutter 2019, algorithm 2, in plain loops; the moments of Kingma & Ba 2015."""
    mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    square = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step, ids in enumerate(batches, start=1):
        model.zero_grad()
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            decay = config.weight_decay if p.ndim > 1 and name.startswith("blocks.") and "bias" not in name else 0.0
            mean[name] = config.beta1 * mean[name] + (1 - config.beta1) * p.grad
            square[name] = config.beta2 * square[name] + (1 - config.beta2) * p.grad**2
            unbiased_mean = mean[name] / (1 - config.beta1**step)
            unbiased_square = square[name] / (1 - config.beta2**step)
            with torch.no_grad():
                p *= 1 - config.learning_rate * decay
                p -= config.learning_rate * unbiased_mean / (unbiased_square.sqrt() + config.eps)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_adamw_is_the_one_written_by_hand(choice: dict[str, Any]) -> None:
    config = OptimConfig("adamw", learning_rate=0.01, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)
    batches = torch.randint(31, (5, 3, 12), generator=torch.Generator().manual_seed(1))
    expected = by_hand(tiny(**choice).double(), config, batches)
    model = tiny(**choice).double()
    (optimizer,) = build_optimizers(model, config).values()
    for ids in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_state_goes_through_the_checkpoints_tensors_and_comes_back(optimizer: Any, tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    from groundup.training.checkpoint import optimizer_tensors, restore_optimizers

    config = OptimConfig(optimizer, learning_rate=0.01)
    batches = torch.randint(31, (6, 3, 12), generator=torch.Generator().manual_seed(1))

    def train(model: Transformer, built: dict[str, torch.optim.Optimizer], steps: Tensor) -> None:
        for ids in steps:
            model.zero_grad()
            F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
            for one in built.values():
                one.step()

    straight = tiny()
    built = build_optimizers(straight, config)
    train(straight, built, batches[:3])
    save_file(optimizer_tensors(straight, built), tmp_path / "state.safetensors")
    resumed = tiny()
    resumed.load_state_dict(straight.state_dict())
    train(straight, built, batches[3:])
    restored = build_optimizers(resumed, config)
    restore_optimizers(resumed, restored, load_file(tmp_path / "state.safetensors"), tmp_path)
    train(resumed, restored, batches[3:])
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"learning_rate": 0.0}, r"optim\.learning_rate = 0\.0 must be above 0"),
        ({"learning_rate": math.nan}, r"optim\.learning_rate = nan"),
        ({"learning_rate": math.inf}, r"optim\.learning_rate = inf"),
        ({"eps": 0.0}, r"optim\.eps = 0\.0"),
        ({"decay_fraction": 1.5}, r"optim\.decay_fraction = 1\.5 must lie between 0 and 1"),
        ({"final_learning_rate": -0.1}, r"optim\.final_learning_rate = -0\.1.*it is a fraction"),
        ({"warmup_steps": -1}, r"optim\.warmup_steps = -1 must not be negative"),
        ({"weight_decay": math.nan}, r"optim\.weight_decay = nan must not be negative"),
        ({"beta2": 1.0}, r"optim\.beta2 = 1\.0 must be at least 0 and below 1"),
        ({"momentum": -0.5}, r"optim\.momentum = -0\.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        OptimConfig(**fields)
