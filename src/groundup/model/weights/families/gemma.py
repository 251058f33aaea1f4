"""Gemma 2 (2024) and the text models of Gemma 3 (2025)."""

from __future__ import annotations

import math
from typing import Any

from groundup.model.config import ModelConfig
from groundup.model.weights.families.common import (
    MissingPartError,
    Values,
    attention_links,
    llama_links,
    mlp_links,
    pattern_fields,
    require,
    rope_fields,
    rope_values,
    shape_fields,
    shape_values,
    window_values,
)
from groundup.model.weights.links import Link, same

_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_out_norm": "post_feedforward_layernorm",
}


class Gemma2:
    """Gemma 2: norms on both sides of each sub-layer, windows in every other layer, soft caps, GeGLU."""

    model_type, architecture, prefix = "gemma2", "Gemma2ForCausalLM", "model."
    ignored = (r".*\.rotary_emb\.inv_freq", r"lm_head\.weight")
    further_layers = False
    every = 2  # one layer of so many sees everything
    caps: tuple[float | None, float | None] = (50.0, 30.0)

    def fields(self, values: Values) -> dict[str, Any]:
        """See :class:`Family`."""
        require(values, "hidden_activation", "gelu_pytorch_tanh", "gelu_pytorch_tanh", None)
        if values.get("use_bidirectional_attention"):
            raise MissingPartError("use_bidirectional_attention = True")
        every = values.get("sliding_window_pattern") or self.every
        default = [
            "full_attention" if (layer + 1) % every == 0 else "sliding_attention"
            for layer in range(values["num_hidden_layers"])
        ]
        shape = shape_fields({"head_dim": 256, "num_key_value_heads": 4, **values}, norm_eps=1e-6, tied=True)
        bias = bool(values.get("attention_bias", False))
        cap, logit_cap = self.caps
        return {
            **shape,
            **self.rope(values),
            **pattern_fields({"sliding_window": 4096, **values}, default),
            "norm_plus_one": True,
            "norm_placement": "sandwich",
            "feed_forward": "geglu",
            "qkv_bias": bias,
            "out_bias": bias,
            "embedding_scale": math.sqrt(shape["n_embd"]),
            "attention_scale": values.get("query_pre_attn_scalar", 256) ** -0.5,
            "attention_softcap": values.get("attn_logit_softcapping", cap),
            "logit_softcap": values.get("final_logit_softcapping", logit_cap),
        }

    def rope(self, values: Values) -> dict[str, Any]:
        """Its rotary positions."""
        return rope_fields(values)

    def values(self, config: ModelConfig) -> dict[str, Any]:
        """See :class:`Family`."""
        values = shape_values(config)
        del values["hidden_act"]
        return {
            **values,
            **self.rope_values(config),
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": bool(config.qkv_bias),
            **window_values(config),
            "query_pre_attn_scalar": _whole(config.score_scale**-2),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }

    def rope_values(self, config: ModelConfig) -> dict[str, Any]:
        """Its rotary positions."""
        return rope_values(config)

    def links(self, config: ModelConfig) -> list[Link]:
        """See :class:`Family`."""
        links = llama_links(config)
        for layer in range(config.n_layer):
            theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
            links += [same(f"{theirs}.{name}.weight", f"{ours}.{norm}.weight") for norm, name in _NORMS.items()]
            links += attention_links(config, layer) + mlp_links(config, f"{theirs}.mlp", f"{ours}.feed_forward")
        return links


class Gemma3(Gemma2):
    """Gemma 3's text models: normed queries and keys, and another rotary base in the layers with windows."""

    model_type, architecture = "gemma3_text", "Gemma3ForCausalLM"
    every = 6
    caps = (None, None)

    def fields(self, values: Values) -> dict[str, Any]:
        """See :class:`Family`."""
        return super().fields(values) | {"qk_norm": True}

    def rope(self, values: Values) -> dict[str, Any]:
        """Its rotary positions, of which transformers 5 writes those of both kinds of layers."""
        given = values.get("rope_parameters") or {}
        if "full_attention" in given:
            local = given.get("sliding_attention") or {}
            if local.get("rope_type", "default") != "default":
                raise MissingPartError(f"rope_type = {local['rope_type']} in layers with a window")
            found = rope_fields(values | {"rope_parameters": given["full_attention"]}, theta=1_000_000.0)
            return found | {"rope_local_theta": float(local.get("rope_theta", 10_000.0))}
        return rope_fields(values, theta=1_000_000.0) | {
            "rope_local_theta": float(values.get("rope_local_base_freq", 10_000.0))
        }

    def rope_values(self, config: ModelConfig) -> dict[str, Any]:
        """The other way round."""
        found = rope_values(config)
        parameters = {
            "full_attention": found["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_local_theta},
        }
        return found | {"rope_parameters": parameters, "rope_local_base_freq": config.rope_local_theta}


def _whole(number: float) -> float:
    """A number, whole where it was meant to be: 256.00000000000006 is 256."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-9) else number
