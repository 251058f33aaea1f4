"""What llama.cpp calls a model's sizes and tensors, and what we call them.

A config is told as a config.json of its family would hold it (families/), so that both have one translation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from groundup.model.config import ModelConfig, RopeScaling
from groundup.model.positions import Rotary
from groundup.model.weights.config_json import families_of
from groundup.model.weights.families import FAMILIES
from groundup.model.weights.families.common import MissingPartError
from groundup.model.weights.gguf_tensors import StoredGguf
from groundup.model.weights.links import Link, by_rows, in_pairs, same
from groundup.runtime import GroundupError, UsageError
from groundup.runtime.errors import nearest
from groundup.runtime.gguf_file import GgufFile

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2"}
"""What llama.cpp calls our families; a file of an architecture is of the first family."""
LARGEST = 1 << 24  # of any size in the head of a file: no model has as many of anything
FREQUENCIES = "rope_freqs.weight"

_LLAMA_WORDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_USUAL = (
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
)
"""What a file need not tell."""

_GPT2_WORDS = {
    "context_length": "n_positions",
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}


def links_of(architecture: str, config: ModelConfig) -> list[Link]:
    """Every tensor of a file, and what it is of ours."""
    links = [same("token_embd.weight", "embedding.weight")]
    if not config.tie_embeddings:
        links.append(same("output.weight", "head.weight"))
    if architecture == "gpt2":
        links.append(same("position_embd.weight", "positions.weight"))
    for kind in ("weight", "bias"):
        if kind == "weight" or config.norm == "layernorm":
            links.append(same(f"output_norm.{kind}", f"norm.{kind}"))
        for layer in range(config.n_layer):
            links += _layer_links(architecture, config, layer, kind)
    return links


def _layer_links(architecture: str, config: ModelConfig, layer: int, kind: str) -> Iterator[Link]:
    """The weights of a layer, or its biases."""
    theirs, ours, weights = f"blk.{layer}", f"blocks.{layer}", kind == "weight"
    if weights or config.norm == "layernorm":
        yield same(f"{theirs}.attn_norm.{kind}", f"{ours}.attention_norm.{kind}")
        yield same(f"{theirs}.ffn_norm.{kind}", f"{ours}.feed_forward_norm.{kind}")
    if weights or config.qkv_bias:
        names = [f"{ours}.attention.{name}.{kind}" for name in "qkv"]
        if architecture == "gpt2":
            yield by_rows(f"{theirs}.attn_qkv.{kind}", *names)
        else:
            for letter, name, heads in zip("qkv", names, (config.n_head, config.kv_heads, 0), strict=True):
                paired = architecture == "llama" and heads
                their_name = f"{theirs}.attn_{letter}.{kind}"
                yield in_pairs(their_name, name, heads, config.head_width) if paired else same(their_name, name)
    if weights and config.qk_norm:
        for letter in "qk":
            yield same(f"{theirs}.attn_{letter}_norm.weight", f"{ours}.attention.{letter}_norm.weight")
    if weights or config.out_bias:
        yield same(f"{theirs}.attn_output.{kind}", f"{ours}.attention.out.{kind}")
    if weights or config.ff_bias:
        for name in ("up", "down") if architecture == "gpt2" else ("gate", "up", "down"):
            yield same(f"{theirs}.ffn_{name}.{kind}", f"{ours}.feed_forward.{name}.{kind}")


# ---- from a config to named values


def architecture_of(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """What llama.cpp calls a model like this, and its config as the family writes it.

    Raises:
        UsageError: it has none.
    """
    reason = "it has parts that none of them has"
    for family in families_of(config):
        if (architecture := ARCHITECTURES.get(family.model_type)) is None:
            continue
        if (problem := _unsayable(architecture, config)) is None:
            return architecture, family.values(config)
        reason = f"{architecture} has no {problem}"
    raise UsageError(
        f"llama.cpp has no architecture for this model: {reason}. GGUF files are written of llama (Mistral too), "
        "qwen2, qwen3 and gpt2."
    )


def _unsayable(architecture: str, config: ModelConfig) -> str | None:
    """What a family can say and the architecture of its name cannot."""
    scaling = config.rope_scaling
    if config.sliding_window is not None and config.sliding_window < config.context_length:
        return "sliding windows"
    if architecture == "gpt2":
        return None if config.feed_forward == "gelu" else f"feed_forward = {config.feed_forward}"
    if architecture == "qwen3" and (config.qkv_bias or config.out_bias):
        return "biases"
    if architecture == "qwen2" and config.n_head * config.head_width != config.n_embd:
        return "heads that are together wider or narrower than the stream"
    plain = RopeScaling(scaling.kind, scaling.factor, scaling.original_length)
    if scaling.kind in ("none", "linear") or (scaling.kind == "yarn" and scaling == plain):
        return None
    if scaling.kind == "llama3" and architecture == "llama":
        return None
    return f"rope_scaling = {scaling.kind} with these values"


def model_fields(architecture: str, values: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """What a file says of a model, by name.

    Args:
        values: what a config.json says of it.
    """
    words = _GPT2_WORDS if architecture == "gpt2" else _LLAMA_WORDS
    fields = {name: values[word] for name, word in words.items()}
    fields["vocab_size"] = config.vocab_size
    scaling = config.rope_scaling
    if scaling.kind in ("linear", "yarn"):
        fields |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
    if scaling.kind in ("yarn", "llama3"):  # of which llama.cpp needs the second's divisors only
        original = scaling.original_length or round(config.context_length / scaling.factor)
        fields["rope.scaling.original_context_length"] = original
    return {"general.type": "model", **{f"{architecture}.{name}": value for name, value in fields.items()}}


def frequency_divisors(architecture: str, config: ModelConfig) -> np.ndarray | None:
    """What each rotary frequency is divided by: how Llama 3.1's stretching is told."""
    if architecture == "gpt2" or config.rope_scaling.kind != "llama3":
        return None
    rotaries = [
        Rotary(config.rotary_dim, config.rope_theta, scaling, config.context_length)
        for scaling in (RopeScaling(), config.rope_scaling)
    ]
    plain, stretched = (rotary.frequencies(config.context_length, torch.device("cpu")) for rotary in rotaries)
    return (plain / stretched).numpy()


# ---- and back


def told(file: GgufFile, name: str, kind: type, default: Any = None) -> Any:
    """One value of the head of a file.

    Raises:
        GroundupError: it is missing, or of another type.
    """
    value = file.fields.get(name, default)
    if value is None:
        raise GroundupError(f"{file.path}: {name} is missing from this GGUF file.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind or (isinstance(value, int) and not 0 < value <= LARGEST):
        raise GroundupError(f"{file.path}: {name} has an impossible value ({str(value)[:40]}).")
    return value


def config_of(file: GgufFile) -> ModelConfig:
    """The config of the model in a file.

    Raises:
        GroundupError: the head is damaged, or describes a model that we do not have.
    """
    architecture = told(file, "general.architecture", str)
    family = next((name for name, known in ARCHITECTURES.items() if known == architecture), None)
    if family is None:
        known = dict.fromkeys(ARCHITECTURES.values())
        raise GroundupError(
            f"{file.path}: the architecture {architecture!r} is not one that groundup reads from GGUF files."
            f"{nearest(architecture, known)} It reads {', '.join(known)}."
        )
    if file.fields.get(f"{architecture}.expert_count"):
        raise GroundupError(f"{file.path}: a mixture of experts, which groundup does not read from GGUF files.")
    values = _values(file, architecture)
    there = file.tensors.keys()
    try:
        fields = FAMILIES[family].fields(values)
        if architecture != "gpt2":
            names = {"qkv_bias": "attn_q", "out_bias": "attn_output", "ff_bias": "ffn_up"}
            fields |= {name: f"blk.0.{tensor}.bias" in there for name, tensor in names.items()}
        return ModelConfig.from_dict(fields | {"dropout": 0.0})
    except MissingPartError as error:
        raise GroundupError(f"{file.path}: this model uses {error}, which groundup does not have.") from error
    except (UsageError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise GroundupError(f"{file.path}: {error}") from error


def _values(file: GgufFile, architecture: str) -> dict[str, Any]:
    """What a config.json of the same model would hold."""
    words = _GPT2_WORDS if architecture == "gpt2" else _LLAMA_WORDS
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2 or not 0 < embedding.shape[0] <= LARGEST:
        raise GroundupError(f"{file.path}: no token_embd.weight in it. Does it hold a vocabulary only?")
    values: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    for name, word in words.items():
        kind = float if name.endswith(("epsilon", "freq_base")) else int
        key = f"{architecture}.{name}"
        if key not in file.fields and name in _USUAL:
            continue
        value = told(file, key, kind)
        if values.setdefault(word, value) != value:
            raise GroundupError(f"{file.path}: {key} = {value}, where {values[word]} was expected.")
    layers = values[words["block_count"]]
    if f"blk.{layers - 1}.attn_norm.weight" not in file.tensors or layers > len(file.tensors):
        raise GroundupError(f"{file.path}: the tensor blk.{layers - 1}.attn_norm.weight is missing.")
    if architecture != "gpt2":
        values["rope_scaling"] = _rope_scaling(file, architecture, values)
    return values


def _rope_scaling(file: GgufFile, architecture: str, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the rotary frequencies are stretched, as a config.json has it."""
    if FREQUENCIES in file.tensors:
        return _stretching(file, values)
    kind = told(file, f"{architecture}.rope.scaling.type", str, "none")
    if kind == "none":
        return None
    factor = told(file, f"{architecture}.rope.scaling.factor", float)
    if kind != "yarn":
        return {"rope_type": kind, "factor": factor}
    original = told(file, f"{architecture}.rope.scaling.original_context_length", int)
    return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}


def _stretching(file: GgufFile, values: Mapping[str, Any]) -> dict[str, Any]:
    """From what each frequency is divided by: Llama 3.1's values where they give the same, else the numbers."""
    stored = StoredGguf(file.path, FREQUENCIES, file.tensors[FREQUENCIES])
    width = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    if stored.shape != (width // 2,) or stored.found.offset + 4 * width // 2 > file.size or stored.sizes()[1] != 1:
        raise GroundupError(f"{file.path}: {FREQUENCIES} does not fit heads of {width}.")
    divisors = torch.empty(stored.shape)
    stored.read_into(divisors)
    context, theta = values["max_position_embeddings"], values.get("rope_theta", 10_000.0)
    plain = Rotary(width, theta, RopeScaling(), context).frequencies(context, torch.device("cpu"))
    factor = float(str(np.float32(divisors.max())))
    for original in (file.fields.get("llama.rope.scaling.original_context_length"), 8192, context):
        if not isinstance(original, int) or not 0 < original <= LARGEST:
            continue
        guess = RopeScaling("llama3", factor, original)
        stretched = Rotary(width, theta, guess, context).frequencies(context, torch.device("cpu"))
        if torch.allclose(plain / stretched, divisors, rtol=1e-5):
            more = {"low_freq_factor": guess.low_freq_factor, "high_freq_factor": guess.high_freq_factor}
            return {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": original, **more}
    numbers = divisors.tolist()
    same_for_all = {"short_factor": numbers, "long_factor": numbers, "attention_factor": 1.0}
    return {"rope_type": "longrope", "factor": 1.0, "original_max_position_embeddings": context, **same_for_all}
