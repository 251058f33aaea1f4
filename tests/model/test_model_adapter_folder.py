"""An adapter folder holds all of an adapter, and one that does not fit is told in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from groundup.model import ModelConfig, Transformer
from groundup.model.adapter_folder import load_adapter, save_adapter
from groundup.model.adapters import LoraConfig, adapted_layers, add_adapter, remove, trainable_parameters
from groundup.model.heads import Classifier
from groundup.runtime import GroundupError, UsageError

KINDS: dict[str, dict[str, bool]] = {
    "lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}, "both": {"rslora": True, "dora": True},
}  # fmt: skip
all_kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


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


def ids_of(*shape: int) -> Tensor:
    return torch.randint(43, shape, generator=torch.Generator().manual_seed(29))


@all_kinds
@pytest.mark.parametrize(
    "fields", [{}, {"positions": "alibi"}, {"tie_embeddings": False}], ids=["qwen3", "own", "head"]
)
def test_there_and_back(kind: dict[str, bool], fields: dict[str, Any], tmp_path: Path) -> None:
    model, ids = make(**fields), ids_of(2, 13)
    targets = ("blocks.1.*",) if fields == {} else ("blocks.*", "head") if "tie_embeddings" in fields else ("q", "down")
    add_adapter(model, LoraConfig(rank=3, alpha=2.5, dropout=0.25, targets=targets, **kind))
    stir(model)
    save_adapter(model, tmp_path, base_model="somewhere/Base-1B")
    other = load_adapter(make(**fields), tmp_path, base_model="/models/base-1b")
    assert torch.equal(other(ids), model(ids))
    assert list(adapted_layers(other)) == list(adapted_layers(model))
    mine = adapted_layers(model).popitem()[1].lora("default").config
    theirs = adapted_layers(other).popitem()[1].lora("default").config
    assert theirs == LoraConfig(mine.rank, mine.alpha, mine.dropout, theirs.targets, mine.rslora, mine.dora)
    assert not trainable_parameters(other)
    load_adapter(other, tmp_path, "second", trainable=True)
    assert all(".second." in name for name in trainable_parameters(other))
    with pytest.raises(GroundupError, match=r"this adapter is for somewhere/Base-1B, the model is other"):
        load_adapter(make(**fields), tmp_path, base_model="other")


@all_kinds
def test_layers_that_are_one_in_the_folder(kind: dict[str, bool], tmp_path: Path) -> None:
    """GPT-2 keeps queries, keys and values in one matrix. Ranks do not grow from one saving to the next."""
    gpt2 = dict(
        n_kv_head=4, head_dim=7, positions="learned", norm="layernorm", feed_forward="gelu", qk_norm=False, bias=True
    )
    model, ids = make(**gpt2), ids_of(2, 13)
    add_adapter(model, LoraConfig(rank=3, alpha=5.0, **kind))
    stir(model)
    save_adapter(model, tmp_path)
    again = load_adapter(make(**gpt2), tmp_path)
    torch.testing.assert_close(again(ids), model(ids), rtol=1e-5, atol=1e-5)
    assert adapted_layers(again)["blocks.1.attention.k"].lora("default").A.shape == (3, 28)
    save_adapter(again, tmp_path / "twice")
    first, second = (
        safetensors.torch.load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "twice")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    part = add_adapter(make(**gpt2), LoraConfig(targets=("q", "v")))
    with pytest.raises(UsageError, match=r"attention\.q: for PEFT this is a part of transformer\.h\.0\.attn\.c_attn"):
        save_adapter(part, tmp_path / "part")
    assert not (tmp_path / "part").exists()


def test_what_peft_would_misread_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT takes a gate_proj of a model with experts for the experts', which transformers keeps as one tensor."""
    experts = {"count": 4, "active": 2, "width": 19, "pattern": "DE"}
    model, ids = make(experts=experts), ids_of(2, 9)
    add_adapter(model, LoraConfig(rank=3, targets=("q",)))
    save_adapter(model, tmp_path)
    assert capsys.readouterr().err == ""
    remove(model)
    add_adapter(model, LoraConfig(rank=3))
    stir(model)
    save_adapter(model, tmp_path)
    assert "feed-forwards of this model for those of its experts" in " ".join(capsys.readouterr().err.split())
    assert torch.equal(load_adapter(make(experts=experts), tmp_path)(ids), model(ids))


def test_a_classifier_holds_a_model(tmp_path: Path) -> None:
    def classifier() -> Classifier:
        return Classifier(make(), 3).eval()

    model = classifier()
    add_adapter(model, LoraConfig(targets=("q", "v")))
    stir(model)
    save_adapter(model, tmp_path)
    other = load_adapter(classifier(), tmp_path)
    ids, lengths = ids_of(2, 9), torch.tensor([9, 4])
    other.score.load_state_dict(model.score.state_dict())
    assert torch.equal(other(ids, lengths), model(ids, lengths))


def test_a_folder_that_does_not_fit_is_told(tmp_path: Path) -> None:
    model = add_adapter(make(), LoraConfig(rank=3, targets=("q", "down"), dora=True))
    save_adapter(model, tmp_path)
    config_path, path = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config, tensors = json.loads(config_path.read_text()), safetensors.torch.load_file(path)
    q = "base_model.model.model.layers.0.self_attn.q_proj"

    def refused(message: str, into: Transformer | None = None, **changes: Any) -> None:
        config_path.write_text(json.dumps(config | changes))
        target = make() if into is None else into
        before = list(target.state_dict())
        with pytest.raises(GroundupError, match=message) as caught:
            load_adapter(target, tmp_path)
        assert "\n" not in str(caught.value)
        assert list(target.state_dict()) == before

    refused(rf"{q}\.lora_A\.weight has shape \[3, 28\], .*attention\.q .*ask for \[3, 20\]", make(n_embd=20))
    refused(r"layers\.1\.mlp\.down_proj\.lora_A\.weight has no place in this model", make(n_layer=1))
    refused(rf"{q}\.lora_A\.weight has shape \[3, 28\], .* ask for \[4, 28\]", r=4)
    refused(rf"{q}\.lora_magnitude_vector has no place", use_dora=False)
    refused("peft_type 'IA3' is not LORA", peft_type="IA3")
    refused(r"uses layer_replication = \[\[0, 1\]\], which groundup does not have", layer_replication=[[0, 1]])
    refused("uses bias = 'all'", bias="all")
    refused("uses a_future_thing = True", a_future_thing=True)
    refused("init_lora_weights = 'pissa_niter_4' changed the weights below", init_lora_weights="pissa_niter_4")
    refused("config is damaged: adapter rank = 0", r=0)
    refused("config is damaged: .*could not convert", lora_alpha="much")
    safetensors.torch.save_file({k: v for k, v in tensors.items() if k != f"{q}.lora_B.weight"}, path)
    refused(rf"the tensor {q}\.lora_B\.weight is missing")
    safetensors.torch.save_file({k: v for k, v in tensors.items() if not k.startswith(q)}, path)
    refused(rf"the tensor {q}\.lora_A\.weight is missing, though the config has it as a target")
    safetensors.torch.save_file({**tensors, "base_model.model.stray": torch.zeros(1)}, path)
    refused(r"the tensor base_model\.model\.stray has no place")
    path.write_bytes(path.read_bytes()[:-9])
    refused(r"adapter_model\.safetensors: damaged or cut short")
    path.unlink()
    refused(r"cannot read .*adapter_model\.safetensors: no such file")
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch bad'\ntR.")
    refused(r"adapter_model\.bin: a pickled file, .*never read")
    config_path.write_text("{")
    with pytest.raises(GroundupError, match=r"adapter_config\.json: this adapter config is damaged"):
        load_adapter(make(), tmp_path)
    with pytest.raises(UsageError, match="no adapter called other"):
        save_adapter(model, tmp_path, "other")
