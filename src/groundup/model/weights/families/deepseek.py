"""DeepSeek-V2 and V3 (2024): latent attention, many small experts and shared ones."""

from __future__ import annotations

from typing import Any

from groundup.model.config import ModelConfig
from groundup.model.weights.families.common import (
    MissingPartError,
    Values,
    expert_links,
    llama_links,
    mlp_links,
    require,
    rope_fields,
    rope_values,
    shape_fields,
    shape_values,
    shortest,
)
from groundup.model.weights.links import Link, in_pairs, same


class DeepSeekV2:
    """DeepSeek-V2: softmax routing, from the best groups of experts when asked for."""

    model_type, architecture, prefix = "deepseek_v2", "DeepseekV2ForCausalLM", "model."
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    further_layers = False
    router, normalise = "softmax", False

    def fields(self, values: Values) -> dict[str, Any]:
        """See :class:`Family`."""
        require(values, "hidden_act", "silu", "silu")
        require(values, "mlp_bias", False, False)
        if values.get("num_key_value_heads") not in (None, values["num_attention_heads"]):
            raise MissingPartError(f"num_key_value_heads = {values['num_key_value_heads']}")
        rope_dim, nope_dim = values["qk_rope_head_dim"], values["qk_nope_head_dim"]
        bias, dense = bool(values.get("attention_bias", False)), values.get("first_k_dense_replace") or 0
        layers = values["num_hidden_layers"]
        rope = rope_fields(values)
        return {
            **shape_fields(values | {"head_dim": rope_dim + nope_dim}, norm_eps=1e-6),
            **rope,
            "qkv_bias": bias,
            "out_bias": bias,
            "latent": {
                "kv_rank": values["kv_lora_rank"],
                "q_rank": values.get("q_lora_rank") or 0,
                "rope_dim": rope_dim,
                "nope_dim": nope_dim,
                "v_dim": values["v_head_dim"],
            },
            "experts": {
                "count": values["n_routed_experts"],
                "active": values["num_experts_per_tok"],
                "width": values["moe_intermediate_size"],
                "shared": values.get("n_shared_experts") or 0,
                "pattern": shortest("D" * min(dense, layers) + "E" * (layers - dense)),
                "router": self.router,
                "scale": float(values.get("routed_scaling_factor", 1.0)),
                "balance_loss": float(values.get("aux_loss_alpha", 0.0)),
                **self.choice(values),
            },
        }

    def choice(self, values: Values) -> dict[str, Any]:
        """How experts are chosen."""
        # transformers, and the published code for the published models, multiply by the scale and never by the sum.
        require(values, "norm_topk_prob", False, False)
        method = require(values, "topk_method", "greedy", "greedy", "group_limited_greedy")
        if method == "greedy":
            return {"normalise": False}
        return {"normalise": False, "groups": values["n_group"], "active_groups": values["topk_group"]}

    def values(self, config: ModelConfig) -> dict[str, Any]:
        """See :class:`Family`."""
        values, latent, experts = shape_values(config), config.latent, config.experts
        del values["head_dim"]
        return {
            **values,
            **rope_values(config),
            "attention_bias": bool(config.qkv_bias),
            "kv_lora_rank": latent.kv_rank,
            "q_lora_rank": latent.q_rank or None,
            "qk_rope_head_dim": latent.rope_dim,
            "qk_nope_head_dim": latent.nope_dim,
            "v_head_dim": latent.v_dim,
            "n_routed_experts": experts.count,
            "num_experts_per_tok": experts.active,
            "moe_intermediate_size": config.expert_dim,
            "n_shared_experts": experts.shared,
            "first_k_dense_replace": config.expert_layers.count(False),
            "routed_scaling_factor": experts.scale,
            "aux_loss_alpha": experts.balance_loss,
            **self.choice_values(config),
        }

    def choice_values(self, config: ModelConfig) -> dict[str, Any]:
        """How experts are chosen."""
        experts = config.experts
        return {
            "norm_topk_prob": experts.normalise,
            "topk_method": "group_limited_greedy" if experts.groups > 1 else "greedy",
            "n_group": experts.groups,
            "topk_group": experts.active_groups,
        }

    def links(self, config: ModelConfig) -> list[Link]:
        """See :class:`Family`."""
        links, latent = llama_links(config), config.latent
        for layer in range(config.n_layer):
            theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
            attention, our_attention = f"{theirs}.self_attn", f"{ours}.attention"
            q = "q_b_proj" if latent.q_rank else "q_proj"
            links += [
                same(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight"),
                same(f"{theirs}.post_attention_layernorm.weight", f"{ours}.feed_forward_norm.weight"),
                in_pairs(f"{attention}.{q}.weight", f"{our_attention}.q_up.weight", config.n_head, latent.rope_dim),
                in_pairs(
                    f"{attention}.kv_a_proj_with_mqa.weight", f"{our_attention}.kv_down.weight", 1, latent.rope_dim
                ),
                same(f"{attention}.kv_a_layernorm.weight", f"{our_attention}.kv_norm.weight"),
                same(f"{attention}.kv_b_proj.weight", f"{our_attention}.kv_up.weight"),
                same(f"{attention}.o_proj.weight", f"{our_attention}.out.weight"),
            ]
            if latent.q_rank:
                links += [
                    same(f"{attention}.q_a_proj.weight", f"{our_attention}.q_down.weight"),
                    same(f"{attention}.q_a_layernorm.weight", f"{our_attention}.q_norm.weight"),
                ]
            if config.qkv_bias:
                bias = (f"{attention}.kv_a_proj_with_mqa.bias", f"{our_attention}.kv_down.bias")
                links.append(in_pairs(*bias, 1, latent.rope_dim))
            if config.qkv_bias and latent.q_rank:
                links.append(same(f"{attention}.q_a_proj.bias", f"{our_attention}.q_down.bias"))
            if config.out_bias:
                links.append(same(f"{attention}.o_proj.bias", f"{our_attention}.out.bias"))
            links += self.feed_forward_links(config, layer)
        return links

    def feed_forward_links(self, config: ModelConfig, layer: int) -> list[Link]:
        """The feed-forward of a layer."""
        theirs, ours = f"model.layers.{layer}.mlp", f"blocks.{layer}.feed_forward"
        if not config.expert_layers[layer]:
            return mlp_links(config, theirs, ours)
        links = [same(f"{theirs}.gate.weight", f"{ours}.router.weight")]
        links += expert_links(config, f"{theirs}.experts", ours, ("gate_proj", "up_proj", "down_proj"))
        if config.experts.shared:
            links += mlp_links(config, f"{theirs}.shared_experts", f"{ours}.shared")
        return links


class DeepSeekV3(DeepSeekV2):
    """DeepSeek-V3: sigmoid routing, evened by a bias on the choice. Its module for a further token is left aside."""

    model_type, architecture = "deepseek_v3", "DeepseekV3ForCausalLM"
    router, further_layers = "sigmoid", True

    def fields(self, values: Values) -> dict[str, Any]:
        """See :class:`Family`."""
        require(values, "rope_interleave", True, True)
        require(values, "topk_method", "noaux_tc", "noaux_tc")
        require(values, "scoring_func", "sigmoid", "sigmoid")
        return super().fields(values)

    def choice(self, values: Values) -> dict[str, Any]:
        """How experts are chosen."""
        return {
            "normalise": bool(values.get("norm_topk_prob", True)),
            "selection_bias": True,
            "groups": values.get("n_group", 8),
            "active_groups": values.get("topk_group", 4),
        }

    def choice_values(self, config: ModelConfig) -> dict[str, Any]:
        """How experts are chosen."""
        return super().choice_values(config) | {
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "rope_interleave": True,
            "num_nextn_predict_layers": 0,
        }

    def feed_forward_links(self, config: ModelConfig, layer: int) -> list[Link]:
        """The feed-forward of a layer."""
        links = super().feed_forward_links(config, layer)
        if config.expert_layers[layer]:
            theirs = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
            links.append(same(theirs, f"blocks.{layer}.feed_forward.router.selection_bias"))
        return links
