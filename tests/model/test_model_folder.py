"""The Hugging Face folder: what is written is read back, and what cannot be read is named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from groundup.model import ModelConfig, Transformer, load_model, read_config, save_model
from groundup.runtime import GroundupError

PARTS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {"qk_norm": False, "tie_embeddings": False, "n_kv_head": 1},
    "gpt2": {"norm": "layernorm", "positions": "learned", "feed_forward": "gelu", "bias": True, "qk_norm": False},
    "biased": {"bias": True, "norm_eps": 1e-3, "dropout": 0.25},
    "relu2": {"norm": "layernorm", "positions": "none", "feed_forward": "relu2", "tie_embeddings": False},
    "theta": {"rope_theta": 123.0, "n_ff": 31, "init_std": 0.5},
}


def model_of(parts: dict[str, Any]) -> Transformer:
    torch.manual_seed(11)
    sizes = dict(vocab_size=67, context_length=13, n_layer=2, n_head=3, n_embd=18, n_ff=29)
    model = Transformer(ModelConfig(**sizes | parts))
    with torch.no_grad():  # norms and biases that are not ones and zeros, so that losing one shows
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(model_of(PARTS["llama"]), tmp_path)
    return tmp_path


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_what_is_saved_is_loaded_bit_for_bit(parts: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(parts)
    save_model(model, tmp_path, bos_id=3, eos_id=5)
    loaded = load_model(tmp_path).eval()
    assert loaded.config == model.config == read_config(tmp_path)
    assert (loaded.head.weight is loaded.embedding.weight) == model.config.tie_embeddings
    ids = torch.randint(67, (2, 13))
    assert torch.equal(loaded(ids), model(ids))
    for file in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / file).read_text())
        assert (values["bos_token_id"], values["eos_token_id"]) == (3, 5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("qwen3", "qwen3"), ("llama", "llama"), ("gpt2", "gpt2"), ("biased", "groundup"), ("relu2", "groundup")],
)
def test_the_folder_says_what_it_is(name: str, kind: str, tmp_path: Path) -> None:
    save_model(model_of(PARTS[name]), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind


def test_weights_of_another_precision_are_said_and_read_as_float32(tmp_path: Path) -> None:
    model = model_of({}).to(torch.bfloat16)
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_model(tmp_path)
    assert loaded.embedding.weight.dtype == torch.float32
    assert torch.equal(loaded.embedding.weight, model.embedding.weight.float())


def test_sharded_weights_are_read(folder: Path) -> None:
    whole = load_model(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), load_model(folder).parameters(), strict=True))
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(GroundupError, match=r"model-2\.safetensors"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(GroundupError, match=r"index\.json: this weight index is damaged"):
        load_model(folder)


def test_weights_beyond_a_size_go_to_several_files(tmp_path: Path) -> None:
    import transformers

    model = model_of(PARTS["llama"])
    save_model(model, tmp_path, shard_bytes=6000)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert len(names) > 3
    assert not (tmp_path / "model.safetensors").exists()
    sizes = [sum(t.nbytes for t in load_file(tmp_path / name).values()) for name in names]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == sum(p.nbytes for p in model.parameters())
    assert all(size <= 6000 or len(load_file(tmp_path / name)) == 1 for size, name in zip(sizes, names, strict=True))
    again = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(67, (2, 13))
    torch.testing.assert_close(other(ids).logits, model(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_a_family_with_windows_without_any(kind: str, tmp_path: Path) -> None:
    import transformers

    from groundup.model.presets import PRESETS

    shape = dict(vocab_size=67, context_length=13, n_layer=2, n_head=3, n_kv_head=1, n_embd=18, n_ff=29, head_dim=8)
    shape |= dict(layer_pattern="F", sliding_window=None, attention_scale=None, rope_scaling={})
    fields = PRESETS["gemma2-2b"] | {"embedding_scale": 18**0.5} if kind == "gemma2" else PRESETS["gpt-oss-20b"]
    experts = {} if kind == "gemma2" else {"experts": dict(count=4, active=2, width=12, router_bias=True)}
    model = Transformer(ModelConfig.from_dict(fields | shape | experts)).eval()
    save_model(model, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"] == kind
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager"
    )
    ids = torch.randint(67, (2, 13))
    torch.testing.assert_close(other.eval()(ids).logits, model(ids), rtol=0, atol=1e-5)


def test_weights_keep_their_type_when_asked(tmp_path: Path) -> None:
    model = model_of(PARTS["llama"]).to(torch.bfloat16)
    save_model(model, tmp_path)
    kept = load_model(tmp_path, dtype=None)
    assert {parameter.dtype for parameter in kept.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), model.parameters(), strict=True))


def test_an_index_that_points_outside_is_refused(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(GroundupError, match=r"points outside of its folder \(\.\./model\.safetensors\)"):
        load_model(folder)


LOAD = """
import sys
from pathlib import Path
from groundup.model import ModelConfig, Transformer, load_model, save_model

def memory(field):  # of this process alone; getrusage's maximum is inherited from the parent
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

folder = Path(sys.argv[1])
(folder / "warm").mkdir()
save_model(Transformer(ModelConfig.preset("tiny", n_embd=32)), folder / "warm")
load_model(folder / "warm")  # libraries load what they need
before = memory("VmRSS")
model = load_model(folder)
print((memory("VmHWM") - before) / sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as stored", "converted"])
def test_loading_takes_no_more_than_a_fifth_above_the_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    save_model(Transformer(ModelConfig.preset("gpt2-124m")).to(dtype), tmp_path, shard_bytes=300_000_000)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, env=environment, check=True
    )
    assert 0.9 < float(run.stdout) < 1.2


def test_a_tied_head_that_was_saved_all_the_same_is_passed_over(tmp_path: Path) -> None:
    model = model_of({})
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.zeros(67, 18)}, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path).head.weight, model.embedding.weight)


def change_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return act


def change_config(**fields: Any) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        values = {key: value for key, value in (values | fields).items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(values))

    return act


def cut(name: str, keep: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep]) and None


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


KEY = "model.layers.1.self_attn.k_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (change_weights(lambda t: t.pop(KEY)), rf"the tensor {re.escape(KEY)} is missing"),
    "extra tensor": (
        change_weights(lambda t: t.update(extra=torch.ones(2))),
        r"model\.safetensors: the tensor extra has no place in this model",
    ),
    "shape": (
        change_weights(lambda t: t.update({KEY: torch.ones(18, 6)})),
        rf"{re.escape(KEY)} has shape \[18, 6\], the config asks for \[6, 18\]",
    ),
    "cut weights": (cut("model.safetensors", 2000), r"model\.safetensors: damaged or cut short"),
    "empty weights": (cut("model.safetensors", 0), r"model\.safetensors: damaged or cut short"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no model\.safetensors here"),
    "pickle only": (pickle_only, r"only pickled weights are here \(pytorch_model\.bin\).*never read"),
    "cut config": (cut("config.json", 40), r"config\.json: this model config is damaged or is not JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), r"cannot read model config .*config\.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json: this model config is damaged"),
    "unknown type": (
        change_config(model_type="mamba"),
        r"model_type 'mamba' is not one groundup reads\..*llama, mistral",
    ),
    "no type": (change_config(model_type=...), r"no model_type in this model config"),
    "its own code": (
        change_config(model_type="mine", auto_map={"AutoModel": "modeling_mine.Mine"}),
        r"model_type 'mine' is not one groundup reads.*Its own code \(auto_map\) is never run",
    ),
    "quantized": (
        change_config(quantization_config={"quant_method": "gptq"}),
        r"config\.json: these weights are quantized \(gptq\)",
    ),
    "missing field": (change_config(hidden_size=...), r"config\.json: the field 'hidden_size' is missing"),
    "no groundup field": (change_config(model_type="groundup"), r"config\.json: the field 'groundup' is missing"),
    "wrong type": (change_config(num_hidden_layers="two"), r"config\.json: this model config is damaged"),
    "no heads": (change_config(num_attention_heads=0), r"config\.json"),
    "heads": (change_config(num_attention_heads=4, head_dim=...), r"config\.json: model\.n_head = 4 does not divide"),
    "rope scaling": (
        change_config(rope_parameters={"rope_type": "proportional", "factor": 8.0, "rope_theta": 1e4}),
        r"config\.json: this llama model uses rope_type = proportional, which groundup does not have",
    ),
    "rope scaling without its factor": (
        change_config(rope_parameters=..., rope_scaling={"type": "linear"}),
        r"config\.json: ",
    ),
    "activation": (change_config(hidden_act="gelu"), r"uses hidden_act = gelu"),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGES.values(), ids=DAMAGES)
def test_what_cannot_be_loaded_is_named(damage: Callable[[Path], Any], says: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(GroundupError, match=says) as error:
        load_model(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 1


def test_a_config_of_ours_with_a_field_from_the_future_is_refused(tmp_path: Path) -> None:
    save_model(model_of(PARTS["relu2"]), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["groundup"]["n_experts"] = 8
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(GroundupError, match=r"config\.json: model\.n_experts is not a field of the model config"):
        load_model(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(folder: Path) -> None:
    with pytest.raises(GroundupError, match=r"cannot write .*absent"):
        save_model(model_of({}), folder / "absent")
