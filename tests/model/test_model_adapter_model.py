"""An adapter folder gives back the model that was saved, also where PEFT's format has no place for all of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from groundup.model import ModelConfig, Transformer, load_model, resize_embeddings, save_model
from groundup.model.adapter_config import called
from groundup.model.adapter_model import (
    AdapterNote,
    absorb,
    adapter_files,
    copy_adapter,
    describe_adapter,
    is_adapter,
    load_adapter_model,
    save_adapter_model,
    stack_adapters,
)
from groundup.model.adapter_tables import ROWS
from groundup.model.adapters import LoraConfig, adapted_layers, add_adapter, merge, trainable_parameters
from groundup.model.quantized import QuantizedLinear, QuantizedStack, Scheme, dequantize, quantize, quantize_model
from groundup.model.token_rows import add_token_rows, token_rows
from groundup.runtime import GroundupError, UsageError

SIZE = 43  # tokens of the base
EXPERTS = {"count": 5, "active": 2, "width": 19, "pattern": "DE"}


def make(**fields: Any) -> Transformer:
    torch.manual_seed(17)
    base = dict(vocab_size=SIZE, context_length=23, n_layer=2, n_head=4, n_kv_head=2, n_embd=28, head_dim=6, n_ff=37)
    return Transformer(ModelConfig.from_dict(base | {"init_std": 0.15} | fields)).eval()


def save(model: Transformer, folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_model(model, folder)
    return folder


def with_rows(model: Transformer, count: int, seed: int = 5) -> Transformer:
    """An adapter's rows for the last tokens, as after training: they are not what they were at first."""
    if count:
        torch.manual_seed(seed)
        size = model.config.vocab_size
        add_token_rows(model, "default", range(size - count, size))
        for table in token_rows(model).values():
            nn.init.normal_(table.rows("default").weight, std=0.3)
    return model


def adapted(model: Transformer, seed: int = 3, **fields: Any) -> Transformer:
    """An adapter as after training: no B is 0."""
    add_adapter(model, LoraConfig(**{"rank": 3, "alpha": 5.0} | fields))
    torch.manual_seed(seed)
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora("default").B, std=0.2)
    return model


def ids_of(size: int = SIZE) -> Tensor:
    return torch.randint(size, (2, 13), generator=torch.Generator().manual_seed(29))


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", [None, Scheme("nf4", 32, double=True), Scheme("int4", 32, zero_point=True)])
@pytest.mark.parametrize("rows", [0, 5])
def test_there_and_back(tied: bool, scheme: Scheme | None, rows: int, tmp_path: Path) -> None:
    model = make(tie_embeddings=tied)
    base = save(model, tmp_path / "base")
    resize_embeddings(model, SIZE + rows)
    if scheme is not None:
        quantize_model(model, **asdict(scheme))
    with_rows(adapted(model), rows)
    save_adapter_model(model, tmp_path / "adapter", str(base), scheme)
    assert is_adapter(tmp_path / "adapter")
    assert not is_adapter(base)
    kept = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model."): tensor.shape for name, tensor in kept.items() if ROWS in name}
    tables = [] if not rows else ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    assert names == {f"{table}{ROWS}": (rows, 28) for table in tables}
    note = json.loads((tmp_path / "adapter" / "groundup_adapter.json").read_text())
    assert note == {"base_scheme": scheme and asdict(scheme), "vocab_size": SIZE + rows}
    again = load_adapter_model(tmp_path / "adapter").eval()
    ids = ids_of(SIZE + rows)
    assert torch.equal(again(ids), model(ids))
    assert again.config == model.config
    assert torch.equal(again.head.weight, again.embedding.weight) == tied
    assert (
        getattr(again.head, "base", again.head).weight is getattr(again.embedding, "base", again.embedding).weight
    ) == tied
    assert not trainable_parameters(again)
    further = load_adapter_model(tmp_path / "adapter", trainable=True)
    learnt = {name for name in trainable_parameters(further) if name.startswith(("embedding.", "head."))}
    assert learnt == {f"{name}.adapters.default.weight" for name in ("embedding", "head")[: len(tables)]}
    expected = merge(model)(ids)  # and the same once it is merged for good
    torch.testing.assert_close(absorb(again)(ids), expected, rtol=0, atol=1e-6)
    assert not any(isinstance(module, QuantizedLinear) for module in again.modules())


@torch.no_grad()
def test_other_weights_can_take_the_place_of_the_bases(tmp_path: Path) -> None:
    """And those of a layer that has an adapter itself are known by the name that the layer had."""
    model = make(tie_embeddings=False)
    base = save(model, tmp_path / "base")
    adapted(model, targets=("up", "q"))
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(adapted_layers(model)["blocks.1.feed_forward.up"].base.weight)
    extra = ["norm.weight", "blocks.1.feed_forward.up.weight"]
    save_adapter_model(model, tmp_path / "adapter", str(base), extra=extra)
    trained = trainable_parameters(load_adapter_model(tmp_path / "adapter", trainable=True))
    assert {name.replace(".base.", ".") for name in trained if ".adapters." not in name} == set(extra)
    assert torch.equal(load_adapter_model(tmp_path / "adapter").eval()(ids_of()), model(ids_of()))
    for name in ("norm.wait", "nowhere.weight", "blocks.0.attention.q.base.weight.x"):
        with pytest.raises(UsageError, match="this model has no such parameter"):
            save_adapter_model(model, tmp_path / "other", str(base), extra=[name])
    assert not (tmp_path / "other").exists()
    assert AdapterNote.read(tmp_path / "adapter").replaces
    save_adapter_model(adapted(make(tie_embeddings=False)), tmp_path / "adapter", str(base))
    assert not AdapterNote.read(tmp_path / "adapter").replaces, "nothing is left of what was there before"


def test_what_is_to_be_written_is_a_copy(tmp_path: Path) -> None:
    model = make()
    base = save(model, tmp_path / "base")
    adapted(model)
    before = model(ids_of())
    files = adapter_files(model, str(base), extra=["embedding.weight"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    files.write(tmp_path / "adapter")
    assert torch.equal(load_adapter_model(tmp_path / "adapter").eval()(ids_of()), before)


@torch.no_grad()
@pytest.mark.parametrize("scheme", [Scheme("int8"), Scheme("nf4", 32)])
def test_merged_for_good(scheme: Scheme) -> None:
    """Also stacks of experts and layers without an adapter become plain: what codes stand for, plus the product."""
    model = quantize_model(make(experts=EXPERTS), **asdict(scheme))
    ids = ids_of()
    bare = model(ids)
    adapted(model, targets=("q", "v"))
    expected = model(ids)
    original = {name: module.weight for name, module in model.named_modules() if isinstance(module, QuantizedStack)}
    assert len(original) > 0
    assert (expected - bare).abs().max() > 0.03 * bare.abs().max()
    again = absorb(stack_like(model, scheme), requantize=True)
    assert torch.equal(again(ids), requantized(model, scheme)(ids))
    absorb(model)
    assert not any(isinstance(module, (QuantizedLinear, QuantizedStack)) for module in model.modules())
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in original.items())
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-4)
    assert len(trainable_parameters(model)) == len(list(model.parameters())), "as any model that was loaded"
    plain = make(experts=EXPERTS)
    plain.load_state_dict(model.state_dict())


def stack_like(model: Transformer, scheme: Scheme) -> Transformer:
    """Another model like that of the test above."""
    other = quantize_model(make(experts=EXPERTS), **asdict(scheme))
    adapted(other, targets=("q", "v"))
    other.load_state_dict(model.state_dict())
    return other.eval()


@torch.no_grad()
def requantized(model: Transformer, scheme: Scheme) -> Transformer:
    """By hand: adapted layers as codes of the sum."""
    other = stack_like(model, scheme)
    for layer in adapted_layers(other).values():
        weight = layer.weight
        layer.active = ()
        made = dequantize(quantize(weight, scheme), scheme, weight.shape[1])
        layer.base.forward = lambda x, made=made: nn.functional.linear(x, made)  # type: ignore[method-assign]
    return other


@torch.no_grad()
def test_the_sum_of_several(tmp_path: Path) -> None:
    base = save(make(), tmp_path / "base")
    total = {name: parameter.clone() for name, parameter in make().named_parameters()}
    for seed, targets in ((5, ("q", "v")), (6, ("q", "down"))):
        model = adapted(load_model(base), seed, targets=targets, rank=seed)
        save_adapter_model(model, tmp_path / f"a{seed}", str(base))
        for key, layer in adapted_layers(model).items():
            lora = layer.lora("default")
            total[f"{key}.weight"] += lora.config.scale * lora.B @ lora.A
    stacked = stack_adapters(load_model(base).eval(), {"one": tmp_path / "a5", "two": tmp_path / "a6"})
    expected = make()
    expected.load_state_dict(total, strict=False)
    torch.testing.assert_close(stacked(ids_of()), expected(ids_of()), rtol=1e-4, atol=1e-5)
    assert adapted_layers(stacked)["blocks.1.attention.q"].active == ("one", "two")
    assert describe_adapter(tmp_path / "a6") == f"adapter of rank 6 on 4 layers, 1,404 parameters, for {base}"
    assert 6 * 2 * (28 + 24 + 37 + 28) == 1404


def test_what_does_not_fit_is_told_in_a_line(tmp_path: Path) -> None:
    base, other = save(make(), tmp_path / "base"), save(make(vocab_size=47), tmp_path / "other")
    narrow = save(make(n_embd=20), tmp_path / "narrow")
    model, folder = adapted(make()), tmp_path / "adapter"
    grown = with_rows(adapted(quantize_model(resize_embeddings(make(), 47), "nf4")), 4)
    save_adapter_model(grown, tmp_path / "grown", str(base), Scheme("nf4"))
    save_adapter_model(model, folder, str(base))

    def refused(message: str, place: Path | None = None, on: Path | None = None) -> None:
        with pytest.raises(GroundupError, match=message) as caught:
            load_adapter_model(place or folder, on)
        assert "\n" not in str(caught.value)

    refused(r"adapter_model\.safetensors: this adapter was made on a model of 43 tokens, this one has 47", on=other)
    refused(r"self_attn\.q_proj\.lora_A\.weight has shape \[3, 28\], .* ask for \[3, 20\]", on=narrow)
    refused(
        r"embed_tokens\.token_adapter\.\w+ has shape \[4, 28\], the base model has 20 numbers for each token",
        tmp_path / "grown", narrow,
    )  # fmt: skip
    for seed, name in ((1, "norm-1"), (2, "norm-2")):
        normed = adapted(make())
        nn.init.constant_(normed.norm.weight, seed)
        save_adapter_model(normed, tmp_path / name, str(base), extra=["norm.weight"])
    with pytest.raises(GroundupError, match=r"norm\.weight is replaced by norm-1 already"):
        stack_adapters(load_model(base), {"one": tmp_path / "norm-1", "two": tmp_path / "norm-2"})
    stack_adapters(load_model(base), {"one": tmp_path / "norm-1", "two": tmp_path / "norm-1"})
    refused(r"model\.norm\.weight has shape \[28\], the base model asks for \[20\]", tmp_path / "norm-1", narrow)
    save_adapter_model(model, tmp_path / "int8", str(base), Scheme("int8"))
    with pytest.raises(GroundupError, match=r'made on a base in \{"kind": "int8".*, grown on one in \{"kind": "nf4"'):
        stack_adapters(load_model(base), {"one": tmp_path / "grown", "two": tmp_path / "int8"})
    for content, message in (
        ({"base_scheme": {"kind": "int3"}}, "int3"), ({"vocab_size": "many"}, "many"), ([], "list"),
        ({"base_scheme": "nf4"}, "mapping"),
    ):  # fmt: skip
        (folder / "groundup_adapter.json").write_text(json.dumps(content))
        refused(rf"groundup_adapter\.json: this note of an adapter is damaged: .*{message}")
    save_adapter_model(adapted(resize_embeddings(make(), 47)), folder, str(base), extra=["norm.weight"])
    refused(r"made on a model of 47 tokens, this one has 43, and it has no embeddings for the others")
    save_adapter_model(model, folder, str(tmp_path / "gone"))
    refused(r"adapter_config\.json: the adapter's base model .*gone is neither in the adapter's folder nor in this one")
    (folder / "adapter_config.json").write_text(
        json.dumps(json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": 7})
    )
    refused("adapter config is damaged: base_model_name_or_path is 7, not a name")


def test_where_the_base_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    base = save(model, tmp_path / "here" / "base")
    elsewhere = save(model, tmp_path / "cwd" / "models" / "mine")
    monkeypatch.chdir(tmp_path / "cwd")
    adapted(model)
    for written, found in ((str(base), base), ("../../here/base", base), ("models/mine", elsewhere), ("nobody", None)):
        save_adapter_model(model, tmp_path / "runs" / "a", written)
        place = AdapterNote.read(tmp_path / "runs" / "a").local_base()
        assert place is None if found is None else place is not None and place.resolve() == found, written
        copy_adapter(tmp_path / "runs" / "a", tmp_path / "deep" / "down" / "copy")
        copied = AdapterNote.read(tmp_path / "deep" / "down" / "copy")
        assert copied.base == (str(base) if written.startswith("..") else written)
    for written, spec in (
        ("hf:ann/tiny@v1", "hf:ann/tiny@v1"), ("ann/tiny", "hf:ann/tiny"), ("a/b/c", None), ("/a/b", None),
    ):  # fmt: skip
        save_adapter_model(model, tmp_path / "hub", written)
        assert AdapterNote.read(tmp_path / "hub").hub_base() == spec
    save_adapter_model(model, tmp_path / "hub", "hf:ann/tiny@v1")
    config = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("ann/tiny", "v1"), "as PEFT writes it"
    with pytest.raises(UsageError, match="hf:owner/name"):
        save_adapter_model(model, tmp_path / "hub", "hf:tiny")


def test_what_a_model_is_called() -> None:
    for name, expected in (
        ("hf:ann/tiny@v1", "tiny"), ("ann/tiny", "tiny"), ("/a/b/", "b"), ("runs/x/checkpoints/best", "x"),
        ("runs/x/checkpoints/step-000010", "x"), ("m.gguf", "m.gguf"),
    ):  # fmt: skip
        assert called(name) == expected
