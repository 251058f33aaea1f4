"""What families share: the words of ``config.json`` that most of them use, and rotary positions."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Protocol

from groundup.model.config import ModelConfig
from groundup.model.weights.links import Link, same

Values = dict[str, Any]


class MissingPartError(Exception):
    """A checkpoint uses a part that we do not have; the message names it."""


class Family(Protocol):
    """One ``model_type``.

    Attributes:
        model_type: as in config.json.
        architecture: the class of transformers that loads it.
        prefix: what stands before the names of most tensors, and may be missing.
        ignored: names, as regular expressions, of tensors that hold nothing a model needs.
        further_layers: whether layers past the last may be there, which predict further tokens; they are passed over.
    """

    @property
    def model_type(self) -> str: ...  # noqa: D102
    @property
    def architecture(self) -> str: ...  # noqa: D102
    @property
    def prefix(self) -> str: ...  # noqa: D102
    @property
    def ignored(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def further_layers(self) -> bool: ...  # noqa: D102

    def fields(self, values: Values) -> dict[str, Any]:
        """The fields of our config that a config.json comes to.

        Raises:
            KeyError: a value is missing.
            MissingPartError: it asks for a part that we do not have.
        """

    def values(self, config: ModelConfig) -> dict[str, Any]:
        """A config.json for a config that may or may not be of this family."""

    def links(self, config: ModelConfig) -> list[Link]:
        """Every tensor of its checkpoints, and what it is of ours."""


# ---- the words that Llama brought


def shape_fields(values: Values, *, norm_eps: float, tied: bool = False) -> dict[str, Any]:
    """The fields that most families spell alike; the defaults are those of transformers."""
    heads = values["num_attention_heads"]
    return {
        "vocab_size": values["vocab_size"],
        "context_length": values["max_position_embeddings"],
        "n_layer": values["num_hidden_layers"],
        "n_head": heads,
        "n_kv_head": values.get("num_key_value_heads") or heads,
        "n_embd": values["hidden_size"],
        "head_dim": values.get("head_dim") or values["hidden_size"] // heads,
        "n_ff": values["intermediate_size"],
        "norm_eps": values.get("rms_norm_eps", norm_eps),
        "qk_norm": False,
        "tie_embeddings": values.get("tie_word_embeddings", tied),
        "dropout": float(values.get("attention_dropout") or 0.0),
        "init_std": values.get("initializer_range", 0.02),
    }


def shape_values(config: ModelConfig) -> dict[str, Any]:
    """The other way round."""
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "hidden_size": config.n_embd,
        "head_dim": config.head_width,
        "intermediate_size": config.ff_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "use_cache": True,
    }


def require(values: Values, key: str, default: Any, *known: Any) -> Any:
    """A value that must be one of a few.

    Raises:
        MissingPartError: it is another.
    """
    value = values.get(key, default)
    if value not in known:
        raise MissingPartError(f"{key} = {value}")
    return value


# ---- rotary positions

_ROPE_KINDS = {"default": "none", "linear": "linear", "dynamic": "dynamic", "yarn": "yarn", "llama3": "llama3"}
_ROPE_KINDS |= {"longrope": "longrope", "su": "longrope"}


def rope_fields(values: Values, *, theta: float = 10_000.0, partial: bool = False) -> dict[str, Any]:
    """``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (before), as our fields.

    Args:
        theta: the family's default base.
        partial: whether transformers rotates a part of each head when this family asks for it.

    Raises:
        MissingPartError: the frequencies are stretched in a way that we do not have, or a part is asked for.
    """
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _ROPE_KINDS:
        raise MissingPartError(f"rope_type = {kind}")
    found: dict[str, Any] = {
        "rope_theta": float(given.get("rope_theta") or values.get("rope_theta") or theta),
        "rope_fraction": float(given.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0),
    }
    if found["rope_fraction"] != 1.0 and not partial:
        raise MissingPartError(f"partial_rotary_factor = {found['rope_fraction']}")
    if kind == "default":
        return found
    context = values["max_position_embeddings"]
    original = given.get("original_max_position_embeddings", values.get("original_max_position_embeddings"))
    factor = given.get("factor")
    scaling: dict[str, Any] = {"kind": _ROPE_KINDS[kind]}
    if kind == "dynamic":  # there the context is what it was trained on
        original, found["context_length"] = context, round(context * factor)
    elif original is None and kind in ("llama3", "yarn", "longrope"):
        original = context
    if factor is None:
        factor = context / original
    scaling |= {"factor": float(factor), "original_length": original}
    if kind == "yarn":
        found["context_length"] = max(context, round(original * factor))
    taken = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
        "longrope": ("attention_factor", "short_factor", "long_factor"),
    }
    for name in taken.get(scaling["kind"], ()):
        if given.get(name) is not None:
            value = given[name]
            scaling[name] = value if isinstance(value, (bool, list)) else float(value)
    return found | {"rope_scaling": scaling}


def rope_values(config: ModelConfig) -> dict[str, Any]:
    """The other way round, written for transformers 5 and for what came before it."""
    scaling = config.rope_scaling
    parameters: dict[str, Any] = {"rope_type": "default" if scaling.kind == "none" else scaling.kind}
    if config.rope_fraction != 1.0:
        parameters["partial_rotary_factor"] = config.rope_fraction
    found: dict[str, Any] = {"rope_theta": config.rope_theta}
    if config.rope_fraction != 1.0:
        found["partial_rotary_factor"] = config.rope_fraction
    if scaling.kind != "none":
        fields = asdict(scaling)
        parameters["factor"] = scaling.factor
        names = {
            "llama3": ("low_freq_factor", "high_freq_factor"),
            "yarn": ("beta_fast", "beta_slow", "truncate"),
            "longrope": ("short_factor", "long_factor"),
        }.get(scaling.kind, ())
        parameters |= {name: fields[name] for name in names}
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if fields[name]:
                parameters[name] = fields[name]
        original = scaling.original_length or round(config.context_length / scaling.factor)
        if scaling.kind == "dynamic":
            found["max_position_embeddings"] = original
        elif scaling.kind != "linear":
            parameters["original_max_position_embeddings"] = original
        found["rope_scaling"] = dict(parameters)
    return found | {"rope_parameters": parameters | {"rope_theta": config.rope_theta}}


# ---- layers with windows


def pattern_fields(values: Values, default: list[str]) -> dict[str, Any]:
    """``layer_types`` and ``sliding_window`` as our fields."""
    kinds = values.get("layer_types") or default
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise MissingPartError(f"layer_types with {sorted(unknown)[0]}")
    pattern = "".join("S" if kind == "sliding_attention" else "F" for kind in kinds)
    return {
        "layer_pattern": shortest(pattern),
        "sliding_window": values.get("sliding_window") if "S" in pattern else None,
    }


def window_values(config: ModelConfig) -> dict[str, Any]:
    """The other way round. transformers wants the size of a window also where no layer has one."""
    kinds = ["sliding_attention" if kind == "S" else "full_attention" for kind in config.layer_kinds]
    return {"layer_types": kinds, "sliding_window": config.sliding_window or config.context_length}


def shortest(pattern: str) -> str:
    """The shortest beginning of a pattern that, repeated, is the pattern: SFSF is SF."""
    size = len(pattern)
    return next(
        pattern[:length] for length in range(1, size + 1) if (pattern[:length] * size)[:size] == pattern
    )  # fmt: skip


# ---- the names that Llama brought


def llama_links(config: ModelConfig) -> list[Link]:
    """Embedding, head and the norms of the stream."""
    links = [same("model.embed_tokens.weight", "embedding.weight"), same("model.norm.weight", "norm.weight")]
    return links if config.tie_embeddings else [*links, same("lm_head.weight", "head.weight")]


def attention_links(config: ModelConfig, layer: int) -> list[Link]:
    """Queries, keys, values and output, with the biases and norms there are."""
    theirs, ours = f"model.layers.{layer}.self_attn", f"blocks.{layer}.attention"
    links = [same(f"{theirs}.{name}_proj.weight", f"{ours}.{name}.weight") for name in "qkv"]
    links.append(same(f"{theirs}.o_proj.weight", f"{ours}.out.weight"))
    if config.qkv_bias:
        links += [same(f"{theirs}.{name}_proj.bias", f"{ours}.{name}.bias") for name in "qkv"]
    if config.out_bias:
        links.append(same(f"{theirs}.o_proj.bias", f"{ours}.out.bias"))
    if config.qk_norm:
        links += [same(f"{theirs}.{name}_norm.weight", f"{ours}.{name}_norm.weight") for name in "qk"]
    return links


def mlp_links(config: ModelConfig, theirs: str, ours: str) -> list[Link]:
    """A gated feed-forward."""
    links = [same(f"{theirs}.{name}_proj.weight", f"{ours}.{name}.weight") for name in ("gate", "up", "down")]
    if config.ff_bias:
        links += [same(f"{theirs}.{name}_proj.bias", f"{ours}.{name}.bias") for name in ("gate", "up", "down")]
    return links


def expert_links(config: ModelConfig, theirs: str, ours: str, names: tuple[str, str, str]) -> list[Link]:
    """The experts of a layer, each a matrix of its own there; ``names`` are those of gate, up and down."""
    return [
        same(f"{theirs}.{expert}.{name}.weight", f"{ours}.{part}.weight", expert)
        for expert in range(config.experts.count)
        for name, part in zip(names, ("gate", "up", "down"), strict=True)
    ]
