"""gpt-oss (OpenAI 2025): experts with biases, learnt sinks, a window in every other layer."""

from __future__ import annotations

from typing import Any

from groundup.model.config import ModelConfig
from groundup.model.feed_forward import GATE_LIMIT, SWISH_GAIN
from groundup.model.weights.families.common import (
    Values,
    attention_links,
    llama_links,
    pattern_fields,
    require,
    rope_fields,
    rope_values,
    shape_fields,
    shape_values,
    window_values,
)
from groundup.model.weights.links import Link, alternating, inputs_first, same


class GptOss:
    """gpt-oss; its experts' matrices are one tensor a layer, gate and up in turn, inputs before outputs."""

    model_type, architecture, prefix = "gpt_oss", "GptOssForCausalLM", "model."
    ignored = (r".*\.rotary_emb\.inv_freq",)
    further_layers = False

    def fields(self, values: Values) -> dict[str, Any]:
        """See :class:`Family`."""
        require(values, "swiglu_limit", GATE_LIMIT, GATE_LIMIT)
        require(values, "swiglu_alpha", SWISH_GAIN, SWISH_GAIN)
        bias, layers = bool(values.get("attention_bias", True)), values["num_hidden_layers"]
        default = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
        return {
            **shape_fields({"head_dim": 64, **values}, norm_eps=1e-5),
            **rope_fields(values, theta=150_000.0),
            **pattern_fields({"sliding_window": 128, **values}, default),
            "attention_sinks": True,
            "qkv_bias": bias,
            "out_bias": bias,
            "ff_bias": True,
            "feed_forward": "clamped_swiglu",
            "experts": {
                "count": values.get("num_local_experts", values.get("num_experts", 128)),
                "active": values.get("num_experts_per_tok", values.get("experts_per_token", 4)),
                "width": values["intermediate_size"],
                "router_bias": True,
                "balance_loss": float(values.get("router_aux_loss_coef", 0.001)),
            },
        }

    def values(self, config: ModelConfig) -> dict[str, Any]:
        """See :class:`Family`."""
        return {
            **shape_values(config),
            **rope_values(config),
            "attention_bias": bool(config.qkv_bias),
            **window_values(config),
            "num_local_experts": config.experts.count,
            "num_experts_per_tok": config.experts.active,
            "experts_per_token": config.experts.active,
            "intermediate_size": config.expert_dim,
            "swiglu_limit": GATE_LIMIT,
            "router_aux_loss_coef": config.experts.balance_loss,
        }

    def links(self, config: ModelConfig) -> list[Link]:
        """See :class:`Family`."""
        links = llama_links(config)
        for layer in range(config.n_layer):
            theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
            experts, our_experts = f"{theirs}.mlp.experts", f"{ours}.feed_forward"
            gate, up, down = (f"{our_experts}.{name}" for name in ("gate", "up", "down"))
            links += attention_links(config, layer)
            links += [
                same(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight"),
                same(f"{theirs}.post_attention_layernorm.weight", f"{ours}.feed_forward_norm.weight"),
                same(f"{theirs}.self_attn.sinks", f"{ours}.attention.sinks_H"),
                same(f"{theirs}.mlp.router.weight", f"{our_experts}.router.weight"),
                same(f"{theirs}.mlp.router.bias", f"{our_experts}.router.bias"),
                alternating(f"{experts}.gate_up_proj", f"{gate}.weight", f"{up}.weight", inputs_first=True),
                alternating(f"{experts}.gate_up_proj_bias", f"{gate}.bias", f"{up}.bias", inputs_first=False),
                inputs_first(f"{experts}.down_proj", f"{down}.weight"),
                same(f"{experts}.down_proj_bias", f"{down}.bias"),
            ]
        return links
