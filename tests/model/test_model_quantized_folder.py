"""Quantized models on disk: what is read back computes the very same numbers, in no more memory than it needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from groundup.model import ModelConfig, Transformer, load_model, quantize_model, save_model
from groundup.model.quantized import QuantizedLinear, QuantizedStack, nbytes
from groundup.runtime import GroundupError, UsageError

PARTS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "gpt2": {"norm": "layernorm", "positions": "learned", "feed_forward": "gelu", "bias": True, "qk_norm": False},
    "alibi": {"positions": "alibi", "tie_embeddings": False},
    "experts": {"experts": {"count": 3, "width": 23, "shared": 1, "selection_bias": True}, "bias": True},
    "latent": {"latent": {"kv_rank": 11, "rope_dim": 4, "nope_dim": 7, "v_dim": 5}, "qk_norm": False},
    "further": {"n_predict": 1, "layer_pattern": "SF", "sliding_window": 5, "rope_local_theta": 99.0},
}
WAYS: dict[str, dict[str, Any]] = {
    "int8": {"kind": "int8"},
    "int4": {"kind": "int4", "group": 32},
    "int4 with zero points": {"kind": "int4", "group": 128, "zero_point": True},
    "nf4, double": {"kind": "nf4", "double": True},
}


def model_of(parts: dict[str, Any], **way: Any) -> Transformer:
    """Weights off centre, so that zero points matter; norms and biases that are not ones and zeros."""
    torch.manual_seed(17)
    sizes = dict(vocab_size=67, context_length=13, n_layer=2, n_head=3, n_embd=54, n_ff=37)
    model = Transformer(ModelConfig.from_dict(sizes | parts)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) + 0.02)
    if way:
        quantize_model(model, **way)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(model_of({}, kind="int4", group=32), tmp_path, bos_id=3, eos_id=5)
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def assert_equal_models(ours: Transformer, theirs: Transformer) -> None:
    wanted = dict(ours.state_dict())
    found = dict(theirs.state_dict())
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("parts", "way"), [*((name, "int4 with zero points") for name in PARTS), *(("experts", name) for name in WAYS)]
)
def test_read_back_it_computes_the_very_same_numbers(parts: str, way: str, tmp_path: Path) -> None:
    model, ids = model_of(PARTS[parts], **WAYS[way]), torch.randint(67, (2, 13))
    plain = model_of(PARTS[parts])(ids)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path).eval()
    assert loaded.config == model.config
    assert_equal_models(model, loaded)
    assert torch.equal(loaded(ids), model(ids))
    assert not torch.equal(plain, model(ids))  # else nothing was quantized
    assert (loaded.head.weight is loaded.embedding.weight) == model.config.tie_embeddings
    save_model(loaded, tmp_path)  # and once more: nothing is lost on the way
    assert_equal_models(model, load_model(tmp_path))


def test_layers_that_were_left_are_left_and_an_untied_head_can_be_quantized(tmp_path: Path) -> None:
    model = quantize_model(model_of(PARTS["alibi"]), "int8", skip=["*.q", "blocks.1.*"])
    assert isinstance(model, Transformer)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    kinds = {name: type(module) for name, module in loaded.named_modules()}
    assert kinds["head"] is kinds["blocks.0.attention.k"] is QuantizedLinear
    assert kinds["blocks.0.attention.q"] is kinds["blocks.1.attention.k"] is torch.nn.Linear
    assert_equal_models(model, loaded)


def test_the_head_may_be_quantized_in_another_way(tmp_path: Path) -> None:
    model = quantize_model(model_of(PARTS["alibi"], kind="int4", group=32), "int8", skip=["embedding"])
    assert isinstance(model, Transformer)
    save_model(model, tmp_path)
    head = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["head"]
    assert head["kind"] == "int8"
    loaded = load_model(tmp_path)
    assert isinstance(loaded.head, QuantizedLinear)
    assert_equal_models(model, loaded)


def test_experts_are_stacks_again(tmp_path: Path) -> None:
    save_model(model_of(PARTS["experts"], kind="int8"), tmp_path)
    assert any(isinstance(module, QuantizedStack) for module in load_model(tmp_path).modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None])
def test_the_dtype_asked_for_is_computed_in_and_scales_stay_float32(dtype: torch.dtype | None, tmp_path: Path) -> None:
    model = model_of({"bias": True}, kind="int4").to(torch.bfloat16)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, dtype=dtype).eval()
    wanted = dtype or torch.bfloat16  # None leaves weights as they are stored
    layer: Any = loaded.get_submodule("blocks.0.attention.q")
    original: Any = model.get_submodule("blocks.0.attention.q")
    assert layer.dtype == layer.bias.dtype == loaded.embedding.weight.dtype == wanted
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer.scale, original.scale)
    ids = torch.randint(67, (2, 13))
    assert torch.equal(loaded(ids), model.to(wanted)(ids))


def test_the_folder_says_what_was_done_and_that_it_is_ours(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    assert values["model_type"] == "groundup"
    assert (values["bos_token_id"], values["eos_token_id"]) == (3, 5)
    assert values["quantization_config"] == {
        "quant_method": "groundup", "kind": "int4", "group": 32, "zero_point": False, "double": False,
        "skipped": ["head"],
    }  # fmt: skip
    tensors = load_file(folder / "model.safetensors")
    assert tensors["blocks.0.attention.q.codes"].dtype == torch.uint8
    assert tensors["blocks.0.attention.q.codes"].shape == (54, 32)  # 54 inputs in two groups of 32
    assert tensors["blocks.0.attention.q.scale"].shape == (54, 2)
    assert "blocks.0.attention.q.weight" not in tensors
    assert "head.weight" not in tensors


def test_other_tools_refuse_it_instead_of_making_up_weights(folder: Path) -> None:
    import transformers

    with pytest.raises(ValueError, match="groundup"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_beyond_a_size_it_goes_to_several_files(tmp_path: Path) -> None:
    model = model_of({}, kind="int8")
    save_model(model, tmp_path, shard_bytes=9000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_equal_models(model, load_model(tmp_path))


def test_adapters_and_several_ways_are_not_saved(tmp_path: Path) -> None:
    from groundup.model import LoraConfig, add_adapter

    model = model_of({}, kind="int8")
    add_adapter(model, LoraConfig(rank=2))
    with pytest.raises(UsageError, match=r"blocks\.0\.attention\.q\.\w+ is behind an adapter"):
        save_model(model, tmp_path)
    model = model_of({})
    quantize_model(model, "int8", skip=["head", "*.down"])
    quantize_model(model, "int4", skip=["head"])
    with pytest.raises(UsageError, match=r"blocks\.0\.attention\.q is .*int8.*down is .*int4.*only one way"):
        save_model(model, tmp_path)
    assert not list(tmp_path.iterdir())


DAMAGED: dict[str, tuple[Callable[[Any], None], str]] = {
    "kind": (lambda q: q.update(kind="int3"), r"quantization_config is damaged: quantization 'int3'"),
    "group": (lambda q: q.update(group=[]), r"quantization_config is damaged: quantization group \[\]"),
    "no group": (lambda q: q.pop("group"), r"quantization_config is damaged: 'group'"),
    "another group": (lambda q: q.update(group=64), r"scale has shape \[54, 2\], the config asks for \[54, 1\]"),
    "another kind": (lambda q: q.update(kind="int8"), r"has shape .* the config asks for"),
    "a head of no kind": (lambda q: q.update(head={"kind": "int3"}), r"quantization_config is damaged: 'group'"),
    "a head that is no scheme": (lambda q: q.update(head="int8"), r"quantization_config is damaged"),
    "names": (lambda q: q.update(skipped="head"), r"skipped is not a list of names"),
    "nothing left": (lambda q: q.update(skipped=["*"]), r"no linear layer left to quantize"),
    "a tied head": (lambda q: q.update(skipped=[]), r"head: tied to another layer"),
    "one more left": (
        lambda q: q["skipped"].append("blocks.1.attention.v"),
        r"blocks\.1\.attention\.v\.scale has no place",
    ),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_config_is_one_line(folder: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit(folder, lambda values: change(values["quantization_config"]))
    with pytest.raises(GroundupError, match=message) as error:
        load_model(folder)
    assert not isinstance(error.value, UsageError)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_are_missing_or_of_another_type_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "blocks.1.feed_forward.down.codes"
    save_file(tensors | {name: tensors[name].float()}, folder / "model.safetensors")
    with pytest.raises(GroundupError, match=rf"{name} is torch\.float32, should be torch\.uint8"):
        load_model(folder)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(GroundupError, match=rf"{name} is missing"):
        load_model(folder)


def test_quantized_weights_without_their_config_are_refused(folder: Path) -> None:
    edit(folder, lambda values: values.pop("quantization_config") and None)
    with pytest.raises(GroundupError, match=r"\.scale has no place in this model"):
        load_model(folder)


PEAK = """
import sys
from pathlib import Path
from groundup.model.weights import load_model

def memory(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

folder = Path(sys.argv[1])
load_model(folder / "warm", dtype=None)  # libraries load what they need
before = memory("VmRSS")
model = load_model(folder, dtype=None)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from /proc")
def test_loading_needs_the_quantized_size_and_not_that_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "warm").mkdir()
    save_model(model_of({}, kind="int4"), tmp_path / "warm")
    model = Transformer(ModelConfig(vocab_size=61, context_length=7, n_layer=5, n_head=8, n_embd=1024, n_ff=2816))
    plain = nbytes(model)
    small = nbytes(quantize_model(model, "int4"))
    save_model(model, tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, env=environment, check=True
    )
    assert small < plain / 6.5
    assert 0.9 * small < int(run.stdout) < 1.2 * small
