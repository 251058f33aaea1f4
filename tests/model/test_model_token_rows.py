"""Rows of adapters for single tokens: they learn, the other rows do not, and what is computed is that of the whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groundup.model import (
    LoraConfig,
    ModelConfig,
    Transformer,
    add_adapter,
    language_model_loss,
    quantize_model,
    resize_embeddings,
)
from groundup.model.adapters import merge, remove, set_active, trainable_parameters, unmerge
from groundup.model.token_rows import Rows, TokenRows, add_token_rows, token_rows
from groundup.optim.groups import named_kinds
from groundup.runtime import UsageError

OLD, NEW = 41, 45


def make(**fields: Any) -> Transformer:
    torch.manual_seed(11)
    sizes = dict(vocab_size=OLD, context_length=17, n_layer=2, n_head=3, n_embd=24, n_ff=40, init_std=0.3)
    return resize_embeddings(Transformer(ModelConfig.from_dict(sizes | fields)), NEW).eval()


def with_rows(model: Transformer, name: str = "default", places: Any = range(OLD, NEW), seed: int = 7) -> Transformer:
    add_adapter(model, LoraConfig(rank=2, targets=("q",)), name)
    add_token_rows(model, name, places)
    torch.manual_seed(seed)
    for rows in {id(table.rows(name)): table.rows(name) for table in token_rows(model).values()}.values():
        nn.init.normal_(rows.weight, std=0.4)
    return model


def written_out(model: Transformer) -> Transformer:
    """The same model with the rows that count among its own."""
    plain = copy.deepcopy(model)
    weights = {name: table.weight.detach().clone() for name, table in token_rows(plain).items()}
    for name, weight in weights.items():
        base = plain.get_submodule(name).base
        base.weight = nn.Parameter(weight)
        setattr(plain, name, base)
    if model.config.tie_embeddings:
        plain.head.weight = plain.embedding.weight
    return plain


def ids_of() -> Tensor:
    return torch.randint(OLD - 9, NEW, (3, 17), generator=torch.Generator().manual_seed(5))


tied = pytest.mark.parametrize("tie", [True, False])


@tied
def test_logits_loss_and_gradients_are_those_of_the_whole_weights(tie: bool) -> None:
    model = with_rows(make(tie_embeddings=tie))
    plain, ids = written_out(model).requires_grad_(True), ids_of()
    torch.testing.assert_close(model(ids), plain(ids), rtol=0, atol=1e-5)
    losses = []
    for one in (model, plain):
        features = one.features(ids[:, :-1])
        loss = language_model_loss(features, one.head.weight, ids[:, 1:], chunk=5)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-6)
    names = {name for name in trainable_parameters(model) if name.startswith(("embedding", "head"))}
    assert names == {f"{name}.adapters.default.weight" for name in (("embedding",) if tie else ("embedding", "head"))}
    for table in ("embedding", "head"):
        found, expected = token_rows(model)[table].rows("default").weight.grad, plain.get_submodule(table).weight.grad
        assert found is not None
        assert expected is not None
        assert expected[OLD:].abs().max() > 0
        torch.testing.assert_close(found, expected[OLD:], rtol=0, atol=1e-6)
        assert model.get_submodule(f"{table}.base").weight.grad is None


@tied
def test_only_the_rows_are_in_an_optimizer(tie: bool) -> None:
    """As a table, which is not decayed; bf16 below them leaves them wide."""
    model = with_rows(make(tie_embeddings=tie).bfloat16())
    kinds = {one.name: one.kind for one in named_kinds(model) if one.name.startswith(("embedding", "head"))}
    assert kinds == dict.fromkeys(
        [f"{name}.adapters.default.weight" for name in ("embedding", "head")[: 2 - tie]], "table"
    )
    sizes = {name: parameter.shape for name, parameter in trainable_parameters(model).items() if "embedding" in name}
    assert sizes == {"embedding.adapters.default.weight": (NEW - OLD, 24)}
    assert model.get_parameter("embedding.adapters.default.weight").dtype == torch.float32
    assert model(ids_of()).dtype == torch.bfloat16


@tied
@torch.no_grad()
def test_merged_and_back_to_the_bit(tie: bool) -> None:
    model, ids = with_rows(make(tie_embeddings=tie)), ids_of()
    before, bare = model(ids), model.embedding.base.weight.clone()
    merge(model)
    torch.testing.assert_close(model(ids), before, rtol=0, atol=1e-5)
    assert not torch.equal(model.embedding.base.weight, bare)
    assert torch.equal(unmerge(model).embedding.base.weight, bare)
    assert torch.equal(model(ids), before)
    plain = remove(merge(model))
    assert not token_rows(plain)
    assert (plain.head.weight is plain.embedding.weight) == tie
    torch.testing.assert_close(plain(ids), before, rtol=0, atol=1e-5)


@torch.no_grad()
def test_several_adapters_each_with_its_rows() -> None:
    """Where two have the same token, the mean of both counts; without any, the model's own rows do."""
    model, ids = make(), ids_of()
    bare = model(ids)
    with_rows(model, "a", [OLD, 3], 1)
    with_rows(model, "b", [OLD, NEW - 1], 2)
    rows = {name: model.embedding.rows(name) for name in ("a", "b")}
    assert rows["a"].places_M.tolist() == [3, OLD]
    mean = model.embedding.weight
    torch.testing.assert_close(mean[OLD], (rows["a"].weight[1] + rows["b"].weight[0]) / 2)
    assert torch.equal(mean[3], rows["a"].weight[0])
    assert torch.equal(mean[NEW - 1], rows["b"].weight[1])
    torch.testing.assert_close(model(ids), written_out(model)(ids), rtol=0, atol=1e-5)
    set_active(model, "b")
    assert torch.equal(model.embedding.weight[OLD], rows["b"].weight[0])
    assert [rows[name].weight.requires_grad for name in ("a", "b")] == [False, True]
    set_active(model)
    assert torch.equal(model(ids), bare)
    remove(model, "a")
    assert list(model.head.adapters) == ["b"]
    remove(model, "b")
    assert not isinstance(model.embedding, TokenRows)


def test_further_tokens_for_an_adapter_that_has_some() -> None:
    model = with_rows(make(), places=[OLD + 1, 7])
    learnt = model.embedding.rows("default").weight.detach().clone()
    add_token_rows(model, "default", range(OLD, NEW))
    rows = model.embedding.rows("default")
    assert isinstance(rows, Rows)
    assert rows.places_M.tolist() == [7, *range(OLD, NEW)]
    assert torch.equal(rows.weight[[0, 2]], learnt)
    assert torch.equal(rows.weight[1], model.embedding.base.weight[OLD])
    assert model.head.rows("default") is rows


def test_what_gets_no_rows() -> None:
    model = add_adapter(make(tie_embeddings=False), LoraConfig(targets=("head", "q")))
    with pytest.raises(UsageError, match=r"head: it is quantized or has an adapter of its own"):
        add_token_rows(model, "default", [OLD])
    quantized = quantize_model(make(tie_embeddings=False), "int8", skip=())
    if not isinstance(quantized.head, nn.Linear):
        with pytest.raises(UsageError, match=r"head: it is quantized or has an adapter of its own"):
            add_token_rows(quantized, "default", [OLD])
