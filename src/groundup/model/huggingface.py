"""The folder other tools open: config.json and model.safetensors, as transformers reads and writes them.

A config whose parts are those of an architecture that transformers knows is saved as that architecture and loads there
with equal logits: Llama (rmsnorm, rope, swiglu, no biases) and Qwen3 (the same with qk_norm). Anything else is saved
with ``model_type: groundup`` and says so. Weights are read from safetensors only; nothing is ever unpickled and no
remote code is run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer
from groundup.runtime import GroundupError, UsageError, os_errors, read_json, write_json

_LLAMA_NAMES = {  # ours -> the Llama family's; {} is the layer
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "blocks.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.attention.q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.{}.attention.k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.{}.attention.v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.{}.attention.out.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.{}.attention.q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "blocks.{}.attention.k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    "blocks.{}.feed_forward_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.feed_forward.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.{}.feed_forward.up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.feed_forward.down.weight": "model.layers.{}.mlp.down_proj.weight",
}


def model_type(config: ModelConfig) -> str:
    """The transformers architecture that these parts make up: ``llama``, ``qwen3``, or ``groundup`` for none it
    knows.
    """
    llama_parts = (
        config.norm == "rmsnorm" and config.positions == "rope" and config.feed_forward == "swiglu" and not config.bias
    )
    if not llama_parts:
        return "groundup"
    return "qwen3" if config.qk_norm else "llama"


def _theirs(name: str, kind: str) -> str:
    """The name a tensor of ours has in a folder of this model type."""
    if kind == "groundup":
        return name
    layer = re.search(r"\.(\d+)\.", name)
    pattern = re.sub(r"\.\d+\.", ".{}.", name, count=1)
    return _LLAMA_NAMES[pattern].format(layer.group(1) if layer else "")


def config_to_hf(
    config: ModelConfig, *, dtype: str = "float32", bos_id: int | None = None, eos_id: int | None = None
) -> dict[str, Any]:
    """The content of ``config.json`` for this config; ``dtype`` is that of the weights beside it."""
    kind = model_type(config)
    common: dict[str, Any] = {
        "model_type": kind,
        "dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }
    if kind == "groundup":
        return common | {"groundup": config.to_dict()}
    values = common | {
        "architectures": ["LlamaForCausalLM" if kind == "llama" else "Qwen3ForCausalLM"],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "hidden_size": config.n_embd,
        "head_dim": config.head_dim,
        "intermediate_size": config.ff_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        # Written in both places: transformers 5 reads the second, everything older the first.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "use_cache": True,
    }
    return values if kind == "qwen3" else values | {"mlp_bias": False}


def config_from_hf(values: dict[str, Any], where: Path) -> ModelConfig:
    """The config that a ``config.json`` describes.

    Raises:
        GroundupError: the model type is unknown, a field is missing or makes no sense, or it uses a part we do not
            have yet.
    """
    try:
        if values.get("model_type") == "groundup":
            return ModelConfig.from_dict(values["groundup"])
        return _config_of_the_llama_family(values, where)
    except KeyError as error:
        raise GroundupError(f"{where}: the field {error} is missing from this model config.") from error
    except UsageError as error:  # nobody typed it: the file is wrong, not the command
        raise GroundupError(f"{where}: {error}") from error
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise GroundupError(f"{where}: this model config is damaged: a field has an impossible value ({error}).") from (
            error
        )


def _config_of_the_llama_family(values: dict[str, Any], where: Path) -> ModelConfig:
    kind = values.get("model_type")
    if kind not in ("llama", "qwen3"):
        raise GroundupError(
            f"{where}: model_type {kind!r} is not one groundup reads yet. It reads llama, qwen3 and groundup."
        )
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    unsupported = {
        "rope scaling": scaling != "default",
        "attention_bias": bool(values.get("attention_bias")),
        "mlp_bias": bool(values.get("mlp_bias")),
        "a sliding window": bool(values.get("use_sliding_window")),
        "hidden_act": values.get("hidden_act", "silu") != "silu",
    }
    for part, present in unsupported.items():
        if present:
            raise GroundupError(f"{where}: this {kind} model uses {part}, which groundup does not have yet.")
    heads, width = values["num_attention_heads"], values["hidden_size"]
    if values.get("head_dim") not in (None, width // heads):
        raise GroundupError(f"{where}: head_dim {values['head_dim']} differs from hidden_size / num_attention_heads.")
    return ModelConfig(
        vocab_size=values["vocab_size"],
        context_length=values["max_position_embeddings"],
        n_layer=values["num_hidden_layers"],
        n_head=heads,
        n_kv_head=values.get("num_key_value_heads", heads),
        n_embd=width,
        n_ff=values["intermediate_size"],
        norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta", values.get("rope_theta", 10_000.0)),
        qk_norm=kind == "qwen3",
        tie_embeddings=values.get("tie_word_embeddings", False),
        dropout=values.get("attention_dropout", 0.0),
        init_std=values.get("initializer_range", 0.02),
    )


def read_config(folder: Path) -> ModelConfig:
    """The model config of a Hugging Face folder (no weights are read).

    Raises:
        GroundupError: it is missing, damaged, or describes a model we do not have.
    """
    values = read_json(folder / "config.json", "model config")
    if not isinstance(values, dict):
        raise GroundupError(f"{folder / 'config.json'}: this model config is damaged: it holds no named fields.")
    return config_from_hf(values, folder / "config.json")


def save_model(model: Transformer, folder: Path, *, bos_id: int | None = None, eos_id: int | None = None) -> None:
    """Write ``config.json``, ``generation_config.json`` and ``model.safetensors`` into an existing folder.

    The caller makes the folder whole or not at all (:func:`groundup.runtime.atomic_folder`).
    """
    kind = model_type(model.config)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "head.weight" and model.config.tie_embeddings:
            continue
        tensors[_theirs(name, kind)] = tensor.detach().to("cpu").contiguous()
    with os_errors(folder, "cannot write"):
        try:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # safetensors wraps the operating system's error in its own
            raise _as_os_error(error, folder / "model.safetensors") from error
        dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
        config = config_to_hf(model.config, dtype=dtype, bos_id=bos_id, eos_id=eos_id)
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", {"bos_token_id": bos_id, "eos_token_id": eos_id})


def _as_os_error(error: SafetensorError, path: Path) -> Exception:
    code = re.search(r"os error (\d+)", str(error))
    if code is None:
        return GroundupError(f"cannot write {path}: {error}")
    return OSError(int(code.group(1)), str(error), str(path))


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(read_json(index, "weight index")["weight_map"].values())
        except (KeyError, TypeError, AttributeError) as error:
            raise GroundupError(f"{index}: this weight index is damaged: it has no weight_map.") from error
        return [folder / name for name in sorted(names)]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
    if pickles:
        raise GroundupError(
            f"{folder}: only pickled weights are here ({pickles[0]}), which can run code when opened: never read. "
            "Convert them to model.safetensors with the tool that wrote them."
        )
    raise GroundupError(f"{folder}: no model.safetensors here. Is this a checkpoint, a run or a Hugging Face folder?")


def load_model(folder: Path, *, device: torch.device | str = "cpu") -> Transformer:
    """Build the model of a Hugging Face folder and fill in its weights, in float32.

    Raises:
        GroundupError: the config is unknown, a weight file is damaged, or a tensor is missing, unexpected or of another
            shape.
    """
    config = read_config(folder)
    kind = model_type(config)
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device=device)
    if model.rotary is not None:
        model.rotary._fill(config.context_length, torch.device(device))
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    waiting = {
        _theirs(name, kind): tensor
        for name, tensor in model.state_dict().items()
        if not (name == "head.weight" and config.tie_embeddings)
    }
    for path in _weight_files(folder):
        _fill_from(path, waiting)
    if waiting:
        raise GroundupError(f"{folder}: the tensor {next(iter(waiting))} is missing from the weights.")
    return model


def _fill_from(path: Path, waiting: dict[str, Tensor]) -> None:
    """Copy every tensor of one safetensors file into the one that waits for it, and cross that off."""
    with os_errors(path, "cannot read"):
        try:
            with safe_open(path, framework="pt") as file, torch.no_grad():
                for name in file.keys():  # noqa: SIM118 (a safe_open handle is no dict)
                    if name == "lm_head.weight" and name not in waiting:
                        continue  # a tied head that was saved all the same
                    if name not in waiting:
                        raise GroundupError(f"{path}: the tensor {name} has no place in this model.")
                    tensor, target = file.get_tensor(name), waiting.pop(name)
                    if tensor.shape != target.shape:
                        raise GroundupError(
                            f"{path}: {name} has shape {list(tensor.shape)}, the config asks for {list(target.shape)}."
                        )
                    target.copy_(tensor)
        except (SafetensorError, json.JSONDecodeError) as error:
            raise GroundupError(f"{path}: damaged or cut short ({error}).") from error
