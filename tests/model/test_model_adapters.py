"""Adapters add what their equations say, train alone, merge exactly, and leave as if they had never been there."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.model import KVCache, ModelConfig, Transformer, language_model_loss, save_model
from groundup.model.adapters import (
    Adapted,
    LoraConfig,
    adapted_layers,
    adapter_names,
    add_adapter,
    merge,
    remove,
    set_active,
    trainable_parameters,
    unmerge,
)
from groundup.model.quantized import QuantizedLinear, Scheme, quantize_model
from groundup.runtime import UsageError

KINDS: dict[str, dict[str, bool]] = {
    "lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}, "both": {"rslora": True, "dora": True},
}  # fmt: skip
all_kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
LATENT = {
    "latent": {"kv_rank": 22, "rope_dim": 6, "nope_dim": 10, "v_dim": 13},
    "n_kv_head": 4,
    "head_dim": 16,
    "qk_norm": False,
}


def make(**fields: Any) -> Transformer:
    torch.manual_seed(19)
    base = dict(vocab_size=43, context_length=23, n_layer=2, n_head=4, n_kv_head=2, n_embd=28, head_dim=6, n_ff=37)
    return Transformer(ModelConfig.from_dict(base | {"init_std": 0.15} | fields)).eval()


def stir(model: nn.Module, seed: int = 23) -> nn.Module:
    """Adapters as after training: no B is 0, no magnitude that of its row."""
    torch.manual_seed(seed)
    for layer in adapted_layers(model).values():
        for name in layer.adapters:
            lora = layer.lora(name)
            nn.init.normal_(lora.B, std=0.2)
            if lora.magnitude is not None:
                lora.magnitude.data *= 0.5 + torch.rand_like(lora.magnitude)
    return model


def by_equation(layer: Adapted, names: tuple[str, ...]) -> Tensor:
    """The weight, an output and an input at a time."""
    base = layer.base.weight.detach().double()
    total = base.clone()
    for name in names:
        lora = layer.lora(name)
        config, A, B = lora.config, lora.A.detach().double(), lora.B.detach().double()
        scale = config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)
        for o in range(len(B)):
            row = base[o] + scale * sum(B[o, r] * A[r] for r in range(config.rank))
            if lora.magnitude is not None:
                row = lora.magnitude[o].item() * row / math.sqrt(sum(value.item() ** 2 for value in row))
            total[o] += row - base[o]
    return total


def ids_of(*shape: int) -> Tensor:
    return torch.randint(43, shape, generator=torch.Generator().manual_seed(29))


# ---- one layer


@all_kinds
@pytest.mark.parametrize("quantized", [False, True])
def test_a_layer_computes_the_equation(kind: dict[str, bool], quantized: bool) -> None:
    torch.manual_seed(31)
    holder = nn.ModuleDict({"q": nn.Linear(41, 13)})
    if quantized:
        quantize_model(holder, "int4", group=32)
    plain = holder["q"].weight.detach().clone()
    x = torch.randn(3, 7, 41)
    before = holder["q"](x)
    add_adapter(holder, LoraConfig(rank=5, alpha=7.0, targets=("q",), **kind))
    torch.testing.assert_close(holder["q"](x), before, rtol=1e-5, atol=1e-6)  # B starts at 0
    stir(holder)
    layer = holder["q"]
    assert isinstance(layer, Adapted)
    weight = by_equation(layer, ("default",))
    torch.testing.assert_close(layer.weight.double(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x), F.linear(x, weight.float(), layer.bias), rtol=1e-4, atol=1e-5)
    assert (weight - plain).abs().max() > 0.1


@all_kinds
@pytest.mark.parametrize("read", [False, True], ids=["called", "its weight read"])
def test_gradients(kind: dict[str, bool], read: bool) -> None:
    """Those of the weight's equation, the norm of DoRA counting as a constant."""
    holder = nn.ModuleDict({"q": nn.Linear(11, 7).double()})
    add_adapter(holder, LoraConfig(rank=3, alpha=5.0, targets=("q",), **kind))
    stir(holder)
    layer, x, up = holder["q"], torch.randn(5, 11).double(), torch.randn(5, 7).double()
    assert isinstance(layer, Adapted)
    lora = layer.lora("default")
    ((F.linear(x, layer.weight, layer.bias) if read else layer(x)) * up).sum().backward()
    A, B = (tensor.detach().clone().requires_grad_() for tensor in (lora.A, lora.B))
    turned = layer.base.weight + lora.config.scale * B @ A
    if lora.magnitude is not None:
        m = lora.magnitude.detach().clone().requires_grad_()
        turned = (m / turned.detach().square().sum(1).sqrt())[:, None] * turned
    ((x @ turned.T + layer.base.bias) * up).sum().backward()
    torch.testing.assert_close(lora.A.grad, A.grad)
    torch.testing.assert_close(lora.B.grad, B.grad)
    if lora.magnitude is not None:
        torch.testing.assert_close(lora.magnitude.grad, m.grad)
    assert layer.base.weight.grad is None


def test_dropout_is_of_the_adapters_input_and_of_training_only() -> None:
    torch.manual_seed(37)
    for kind in ({}, {"dora": True}):
        holder = nn.ModuleDict({"q": nn.Linear(41, 13, bias=False)})
        add_adapter(holder, LoraConfig(rank=5, dropout=0.4, targets=("q",), **kind))
        stir(holder)
        layer, x = holder["q"], torch.ones(2000, 41)
        assert isinstance(layer, Adapted)
        holder.eval()
        sure = layer(x)[0]
        torch.testing.assert_close(layer(x)[1], sure)
        holder.train()
        torch.manual_seed(41)
        found = layer(x)
        torch.manual_seed(41)
        seen = F.dropout(x, 0.4)
        expected = F.linear(x, layer.base.weight) + F.linear(seen, layer.weight - layer.base.weight)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.mean(0), sure, rtol=0.1, atol=0.3)


def test_bf16_weights_have_float32_adapters() -> None:
    model = make().to(torch.bfloat16)
    add_adapter(model, LoraConfig(rank=3))
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
    assert model(ids_of(2, 5)).dtype == torch.bfloat16
    stir(model)
    layer = model.blocks[1].feed_forward.up
    assert isinstance(layer, Adapted)
    weight = by_equation(layer, ("default",)).to(torch.bfloat16)
    merge(model)
    assert layer.base.weight.dtype == torch.bfloat16
    assert (layer.base.weight == weight).float().mean() > 0.99  # a tie in float32 may round otherwise


# ---- whole models


def test_what_is_adapted_and_trained() -> None:
    model = make(tie_embeddings=False)
    add_adapter(model, LoraConfig(rank=3))
    names = [f"blocks.{n}.{part}" for n in range(2) for part in ("attention.q", "attention.k", "attention.v",
             "attention.out", "feed_forward.gate", "feed_forward.up", "feed_forward.down")]  # fmt: skip
    assert list(adapted_layers(model)) == names
    assert set(trainable_parameters(model)) == {f"{name}.adapters.default.{part}" for name in names for part in "AB"}
    chosen = add_adapter(make(tie_embeddings=False), LoraConfig(targets=("v", "blocks.0.*.down", "head")))
    picked = ["blocks.0.attention.v", "blocks.0.feed_forward.down", "blocks.1.attention.v", "head"]
    assert list(adapted_layers(chosen)) == picked
    experts = add_adapter(make(experts={"count": 3, "active": 2, "shared": 1}), LoraConfig())
    kinds = {name.split(".", 2)[2] for name in adapted_layers(experts)}
    assert kinds == {"attention.q", "attention.k", "attention.v", "attention.out", "feed_forward.shared.gate",
                     "feed_forward.shared.up", "feed_forward.shared.down"}  # fmt: skip


@all_kinds
@pytest.mark.parametrize("base", ["plain", "int8", "nf4"])
def test_merge_unmerge_remove(kind: dict[str, bool], base: Any) -> None:
    model, ids = make(), ids_of(2, 17)
    if base != "plain":
        quantize_model(model, base, group=32)
    bare = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bare_logits = model(ids)
    add_adapter(model, LoraConfig(rank=3, alpha=4.0, **kind))
    stir(model)
    expected, state = model(ids), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert (expected - bare_logits).abs().max() > 0.1
    weights = {name: by_equation(layer, ("default",)) for name, layer in adapted_layers(model).items()}
    merge(model)
    for name, layer in adapted_layers(model).items():
        assert isinstance(layer.base, nn.Linear)
        torch.testing.assert_close(layer.base.weight.double(), weights[name], rtol=1e-5, atol=1e-6)
        assert layer.weight is layer.base.weight
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-5)
    assert all("original" in name or torch.equal(tensor, state.get(name, tensor)) or name.endswith("base.weight")
               for name, tensor in model.state_dict().items())  # fmt: skip
    for again in (lambda: merge(model), lambda: set_active(model), lambda: remove(model, "default"),
                  lambda: add_adapter(model, LoraConfig(), "b")):  # fmt: skip
        with pytest.raises(UsageError, match=r"blocks\.0\.attention\.q: its adapters are merged"):
            again()
    merged = remove(deepcopy(model))
    assert list(merged.state_dict()) == list(make().state_dict())
    torch.testing.assert_close(merged(ids), expected, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(ids), expected)
    with pytest.raises(UsageError, match="not merged"):
        unmerge(model)
    remove(model)
    assert all(torch.equal(tensor, bare[name]) for name, tensor in model.state_dict().items())
    assert list(bare) == list(model.state_dict())
    assert torch.equal(model(ids), bare_logits)


def test_merge_into_codes() -> None:
    model = quantize_model(make(), "nf4", group=32)
    add_adapter(model, LoraConfig(rank=3))
    stir(model)
    weights = {name: layer.weight for name, layer in adapted_layers(model).items()}
    merge(model, requantize=True)
    for name, layer in adapted_layers(model).items():
        base = layer.base
        assert isinstance(base, QuantizedLinear)
        assert base.scheme == Scheme("nf4", 32)
        assert torch.equal(base.weight, QuantizedLinear(weights[name], None, base.scheme).weight)


@all_kinds
def test_several_adapters_stack_and_swap(kind: dict[str, bool]) -> None:
    model, ids = make(), ids_of(2, 11)
    bare = model(ids)
    add_adapter(model, LoraConfig(rank=3, **kind), "a")
    stir(model, 1)
    only_a = model(ids)
    add_adapter(model, LoraConfig(rank=5, alpha=3.0, targets=("q", "down")), "b")
    torch.testing.assert_close(model(ids), only_a)  # a new one changes nothing yet
    stir(model, 2)
    assert adapter_names(model) == ["a", "b"]
    layers = adapted_layers(model)
    assert layers["blocks.0.attention.k"].active == ("a",)
    q = layers["blocks.0.attention.q"]
    torch.testing.assert_close(q.weight.double(), by_equation(q, ("a", "b")), rtol=1e-5, atol=1e-5)
    both = model(ids)
    set_active(model, "b")
    torch.testing.assert_close(q.weight.double(), by_equation(q, ("b",)), rtol=1e-5, atol=1e-5)
    assert all(".b." in name for name in trainable_parameters(model))
    only_b = model(ids)
    set_active(model)
    assert torch.equal(model(ids), bare)
    assert not trainable_parameters(model)
    set_active(model, "a", "b")
    assert torch.equal(model(ids), both)
    assert torch.equal(remove(deepcopy(model), "a")(ids), only_b)
    remove(model, "b")
    assert list(adapted_layers(model)) == list(layers)
    remove(model, "a")
    assert torch.equal(model(ids), bare)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_latent_attention_reads_the_adapted_weight(kind: str) -> None:
    """Decoding multiplies kv_up into queries and results, and never calls it."""
    model, ids = make(**LATENT), ids_of(2, 17)
    add_adapter(model, LoraConfig(rank=3, **KINDS[kind]))
    stir(model)
    cache = KVCache(model.config, 2, 17)
    with torch.inference_mode():
        steps = torch.cat([model(ids[:, t : t + 1], cache) for t in range(17)], 1)
        torch.testing.assert_close(steps, model(ids), rtol=1e-4, atol=1e-4)


def test_the_loss_reads_the_adapted_head() -> None:
    model, ids = make(tie_embeddings=False), ids_of(2, 12)
    add_adapter(model, LoraConfig(rank=3, targets=("head",)))
    stir(model)
    features = model.features(ids[:, :-1])
    loss = language_model_loss(features, model.head.weight, ids[:, 1:])
    loss.backward()
    found = {name: p.grad.clone() for name, p in trainable_parameters(model).items()}
    model.zero_grad()
    plain = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    plain.backward()
    torch.testing.assert_close(loss, plain)
    assert set(found) == {"head.adapters.default.A", "head.adapters.default.B"}
    for name, parameter in trainable_parameters(model).items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


@all_kinds
@pytest.mark.parametrize("base", ["plain", "nf4"])
def test_training_moves_the_adapters_only(kind: dict[str, bool], base: str) -> None:
    model, ids = make(), ids_of(4, 20)
    if base == "nf4":
        quantize_model(model, "nf4")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_adapter(model, LoraConfig(rank=4, alpha=8.0, **kind)).train()
    trained = trainable_parameters(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.02)
    losses = []
    for _ in range(25):
        loss = language_model_loss(model.features(ids[:, :-1]), model.head.weight, ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    remove(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@all_kinds
@pytest.mark.parametrize("checkpointing", ["block", "selective"])
def test_checkpointing_changes_no_gradient(kind: dict[str, bool], checkpointing: Any) -> None:
    def gradients(how: Any) -> dict[str, Tensor | None]:
        model, ids = quantize_model(make(), "int4"), ids_of(3, 14)
        add_adapter(model, LoraConfig(rank=3, dropout=0.2, **kind))
        stir(model).train()
        model.checkpointing = how
        torch.manual_seed(47)
        language_model_loss(model.features(ids[:, :-1]), model.head.weight, ids[:, 1:]).backward()
        return {name: parameter.grad for name, parameter in trainable_parameters(model).items()}

    expected = gradients("none")
    assert all(grad is not None and grad.abs().max() > 0 for grad in expected.values())
    torch.testing.assert_close(gradients(checkpointing), expected)


def test_tied_head_and_other_mistakes() -> None:
    model = make()
    with pytest.raises(UsageError, match=r"head: its weight is tied to another layer's"):
        add_adapter(model, LoraConfig(targets=("head",)))
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UsageError, match=r"no linear layer fits the adapter targets feed_forwar, gat\."):
        add_adapter(model, LoraConfig(targets=("feed_forwar", "gat")))
    with pytest.raises(UsageError, match=r"fits the adapter targets dow\. Did you mean down"):
        add_adapter(model, LoraConfig(targets=("dow",)))
    with pytest.raises(UsageError, match="has no adapters"):
        merge(model)
    for name in ("", "a.b", "keys"):
        with pytest.raises(UsageError, match="cannot be called"):
            add_adapter(model, LoraConfig(), name)
    add_adapter(model, LoraConfig())
    assert model.head.weight is model.embedding.weight
    with pytest.raises(UsageError, match="called default already"):
        add_adapter(model, LoraConfig())
    with pytest.raises(UsageError, match=r"no adapter called defalt\. Did you mean default"):
        set_active(model, "defalt")
    with pytest.raises(UsageError, match="no adapter called x"):
        remove(model, "x")
    with pytest.raises(UsageError, match=r"has adapters\. Quantize first"):
        quantize_model(model, "int8")
    for wrong in ({"rank": 0}, {"dropout": 1.0}, {"targets": ()}, {"targets": "q"}):
        with pytest.raises(UsageError, match="adapter"):
            LoraConfig(**wrong)


def test_a_model_with_adapters_is_not_saved_as_if_it_had_none(tmp_path: Path) -> None:
    for choice in ({}, {"positions": "none"}):  # as a Qwen 3, and as no family's
        model = Transformer(ModelConfig(vocab_size=31, context_length=7, n_layer=1, n_head=2, n_embd=20, **choice))
        add_adapter(model, LoraConfig(rank=2))
        with pytest.raises(UsageError, match=r"blocks\.0\.attention\.q\.weight is behind an adapter"):
            save_model(model, tmp_path)
        merge(model)
        remove(model)
        save_model(model, tmp_path)
