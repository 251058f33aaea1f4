"""Llama (Touvron et al. 2023; Grattafiori et al. 2024) and those that followed it closely: SmolLM (which is Llama),
Mistral and Mixtral (Jiang et al. 2023, 2024), Qwen 2, 2.5 and 3 (Yang et al. 2024, 2025), OLMo 2 (2024), Phi-3 (2024).
"""

from __future__ import annotations

from typing import Any

from groundup.model.config import ModelConfig
from groundup.model.weights.families.common import (
    MissingPartError,
    Values,
    attention_links,
    expert_links,
    llama_links,
    mlp_links,
    pattern_fields,
    require,
    rope_fields,
    rope_values,
    shape_fields,
    shape_values,
    shortest,
    window_values,
)
from groundup.model.weights.links import Link, by_rows, same


class Llama:
    """Llama 2 and 3: pre-norm, rotary positions, SwiGLU. The others are told as what they change."""

    model_type, architecture, prefix = "llama", "LlamaForCausalLM", "model."
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq", r"lm_head\.weight")
    further_layers = False
    norm_eps, theta, partial = 1e-6, 10_000.0, False
    norms = (("attention_norm", "input_layernorm"), ("feed_forward_norm", "post_attention_layernorm"))

    def fields(self, values: Values) -> dict[str, Any]:
        """See :class:`Family`."""
        require(values, "hidden_act", "silu", "silu")
        bias = bool(values.get("attention_bias", False))
        return {
            **shape_fields(values, norm_eps=self.norm_eps),
            **rope_fields(values, theta=self.theta, partial=self.partial),
            "qkv_bias": bias,
            "out_bias": bias,
            "ff_bias": bool(values.get("mlp_bias", False)),
        }

    def values(self, config: ModelConfig) -> dict[str, Any]:
        """See :class:`Family`."""
        more = {"attention_bias": bool(config.out_bias), "mlp_bias": bool(config.ff_bias)}
        return {**shape_values(config), **rope_values(config), **more}

    def links(self, config: ModelConfig) -> list[Link]:
        """See :class:`Family`."""
        links = llama_links(config)
        for layer in range(config.n_layer):
            theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
            links += [same(f"{theirs}.{name}.weight", f"{ours}.{norm}.weight") for norm, name in self.norms]
            links += attention_links(config, layer) + self.feed_forward_links(config, layer)
        return links

    def feed_forward_links(self, config: ModelConfig, layer: int) -> list[Link]:
        """The feed-forward of a layer."""
        return mlp_links(config, f"model.layers.{layer}.mlp", f"blocks.{layer}.feed_forward")


class Mistral(Llama):
    """Mistral: a sliding window in every layer, or in none."""

    model_type, architecture = "mistral", "MistralForCausalLM"

    def fields(self, values: Values) -> dict[str, Any]:
        """See :class:`Family`."""
        window = values.get("sliding_window", 4096)
        return super().fields(values) | {"layer_pattern": "F" if window is None else "S", "sliding_window": window}

    def values(self, config: ModelConfig) -> dict[str, Any]:
        """See :class:`Family`."""
        values = super().values(config)
        del values["attention_bias"], values["mlp_bias"]
        return values | {"sliding_window": config.sliding_window}


class Qwen2(Llama):
    """Qwen 2 and 2.5: biases on queries, keys and values; a window in the upper layers when asked for."""

    model_type, architecture = "qwen2", "Qwen2ForCausalLM"

    def fields(self, values: Values) -> dict[str, Any]:
        """See :class:`Family`."""
        return super().fields(values) | _windows_above(values) | {"qkv_bias": True, "out_bias": False}

    def values(self, config: ModelConfig) -> dict[str, Any]:
        """See :class:`Family`."""
        values = super().values(config)
        del values["attention_bias"], values["mlp_bias"]
        return values | _window_values(config)


class Qwen3(Llama):
    """Qwen 3: normed queries and keys, heads of any width."""

    model_type, architecture = "qwen3", "Qwen3ForCausalLM"

    def fields(self, values: Values) -> dict[str, Any]:
        """See :class:`Family`."""
        return {"head_dim": 128} | super().fields(values) | _windows_above(values) | {"qk_norm": True}

    def values(self, config: ModelConfig) -> dict[str, Any]:
        """See :class:`Family`."""
        values = super().values(config)
        del values["mlp_bias"]
        return values | _window_values(config)


class Qwen3Moe(Qwen3):
    """Qwen 3 with experts in place of the feed-forward, in all layers or every so many."""

    model_type, architecture = "qwen3_moe", "Qwen3MoeForCausalLM"

    def fields(self, values: Values) -> dict[str, Any]:
        """See :class:`Family`."""
        step, dense = values.get("decoder_sparse_step", 1), set(values.get("mlp_only_layers") or ())
        layers = range(values["num_hidden_layers"])
        pattern = "".join("D" if layer in dense or (layer + 1) % step else "E" for layer in layers)
        if bool(values.get("use_sliding_window")):
            raise MissingPartError("use_sliding_window = True")
        return super().fields(values) | {
            "experts": {
                "count": values.get("num_experts", values.get("num_local_experts", 128)),
                "active": values.get("num_experts_per_tok", 8),
                "width": values.get("moe_intermediate_size", 768),
                "pattern": shortest(pattern),
                "normalise": bool(values.get("norm_topk_prob", False)),
                "balance_loss": float(values.get("router_aux_loss_coef", 0.001)),
            },
        }

    def values(self, config: ModelConfig) -> dict[str, Any]:
        """See :class:`Family`."""
        values, experts = super().values(config), config.experts
        for name in ("layer_types", "max_window_layers"):
            values.pop(name, None)
        return values | {
            "num_experts": experts.count,
            "num_experts_per_tok": experts.active,
            "moe_intermediate_size": config.expert_dim,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer, has in enumerate(config.expert_layers) if not has],
            "norm_topk_prob": experts.normalise,
            "router_aux_loss_coef": experts.balance_loss,
        }

    def feed_forward_links(self, config: ModelConfig, layer: int) -> list[Link]:
        """The feed-forward of a layer."""
        if not config.expert_layers[layer]:
            return super().feed_forward_links(config, layer)
        theirs, ours = f"model.layers.{layer}.mlp", f"blocks.{layer}.feed_forward"
        router = same(f"{theirs}.gate.weight", f"{ours}.router.weight")
        return [router, *expert_links(config, f"{theirs}.experts", ours, ("gate_proj", "up_proj", "down_proj"))]


class Mixtral(Mistral):
    """Mixtral: experts in every layer, two of them active, without shared ones."""

    model_type, architecture = "mixtral", "MixtralForCausalLM"
    norm_eps, theta = 1e-5, 1_000_000.0

    def fields(self, values: Values) -> dict[str, Any]:
        """See :class:`Family`."""
        return super().fields({"sliding_window": None, **values}) | {
            "experts": {
                "count": values.get("num_local_experts", 8),
                "active": values.get("num_experts_per_tok", 2),
                "width": values["intermediate_size"],
                "balance_loss": float(values.get("router_aux_loss_coef", 0.001)),
            },
        }

    def values(self, config: ModelConfig) -> dict[str, Any]:
        """See :class:`Family`."""
        return super().values(config) | {
            "num_local_experts": config.experts.count,
            "num_experts_per_tok": config.experts.active,
            "intermediate_size": config.expert_dim,
            "router_aux_loss_coef": config.experts.balance_loss,
        }

    def feed_forward_links(self, config: ModelConfig, layer: int) -> list[Link]:
        """The feed-forward of a layer."""
        theirs, ours = f"model.layers.{layer}.block_sparse_moe", f"blocks.{layer}.feed_forward"
        router = same(f"{theirs}.gate.weight", f"{ours}.router.weight")
        return [router, *expert_links(config, f"{theirs}.experts", ours, ("w1", "w3", "w2"))]


class Olmo2(Llama):
    """OLMo 2: norms on what the sub-layers put out, and on all queries and keys at once."""

    model_type, architecture = "olmo2", "Olmo2ForCausalLM"
    norm_eps = 1e-5
    norms = (
        ("attention_out_norm", "post_attention_layernorm"),
        ("feed_forward_out_norm", "post_feedforward_layernorm"),
    )

    def fields(self, values: Values) -> dict[str, Any]:
        """See :class:`Family`."""
        return super().fields(values) | {"norm_placement": "output", "qk_norm": True, "qk_norm_whole": True}

    def values(self, config: ModelConfig) -> dict[str, Any]:
        """See :class:`Family`."""
        values = super().values(config)
        del values["mlp_bias"]
        return values


class Phi3(Llama):
    """Phi-3: queries, keys and values in one matrix, gate and up in another."""

    model_type, architecture = "phi3", "Phi3ForCausalLM"
    norm_eps, partial = 1e-5, True

    def fields(self, values: Values) -> dict[str, Any]:
        """See :class:`Family`."""
        window = values.get("sliding_window")
        if window is not None and window >= values["max_position_embeddings"]:
            window = None
        found = super().fields(values) | {"layer_pattern": "F" if window is None else "S", "sliding_window": window}
        if found.get("rope_scaling", {"kind": "longrope"})["kind"] != "longrope":
            raise MissingPartError(f"rope_type = {found['rope_scaling']['kind']}")
        return found

    def values(self, config: ModelConfig) -> dict[str, Any]:
        """See :class:`Family`."""
        values = super().values(config)
        del values["attention_bias"], values["mlp_bias"], values["head_dim"]
        values |= {"sliding_window": config.sliding_window, "resid_pdrop": config.dropout, "embd_pdrop": config.dropout}
        original = config.rope_scaling.original_length
        return values if original is None else values | {"original_max_position_embeddings": original}

    def links(self, config: ModelConfig) -> list[Link]:
        """See :class:`Family`."""
        links = llama_links(config)
        for layer in range(config.n_layer):
            theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
            links += [same(f"{theirs}.{name}.weight", f"{ours}.{norm}.weight") for norm, name in self.norms]
            qkv = [f"{ours}.attention.{name}.weight" for name in "qkv"]
            gate_up = [f"{ours}.feed_forward.{name}.weight" for name in ("gate", "up")]
            links += [
                by_rows(f"{theirs}.self_attn.qkv_proj.weight", *qkv),
                same(f"{theirs}.self_attn.o_proj.weight", f"{ours}.attention.out.weight"),
                by_rows(f"{theirs}.mlp.gate_up_proj.weight", *gate_up),
                same(f"{theirs}.mlp.down_proj.weight", f"{ours}.feed_forward.down.weight"),
            ]
        return links


def _windows_above(values: Values) -> dict[str, Any]:
    """Qwen's windows: from layer ``max_window_layers`` on, when ``use_sliding_window`` says so."""
    if not values.get("use_sliding_window"):
        return {}
    below, layers = values.get("max_window_layers", 28), values["num_hidden_layers"]
    default = ["sliding_attention" if layer >= below else "full_attention" for layer in range(layers)]
    return pattern_fields({"sliding_window": 4096, **values}, default)


def _window_values(config: ModelConfig) -> dict[str, Any]:
    """The other way round."""
    if config.sliding_window is None:
        return {"use_sliding_window": False}
    full = config.layer_kinds.find("S")
    return {"use_sliding_window": True, "max_window_layers": full, **window_values(config)}
