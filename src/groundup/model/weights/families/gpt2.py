"""GPT-2 (Radford et al. 2019) and GPT-NeoX with Pythia (Black et al. 2022; Biderman et al. 2023)."""

from __future__ import annotations

from typing import Any

from groundup.model.config import ModelConfig
from groundup.model.weights.families.common import Values, require, rope_fields, rope_values
from groundup.model.weights.links import Link, by_head, by_rows, same, transposed

_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact", "relu": "relu"}


def _activation(kind: str) -> str:
    return next((theirs for theirs, ours in _ACTIVATIONS.items() if ours == kind), kind)


class GPT2:
    """GPT-2: learned positions, layer norms, biases everywhere, matrices with inputs before outputs."""

    model_type, architecture, prefix = "gpt2", "GPT2LMHeadModel", "transformer."
    ignored = (r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", r"lm_head\.weight")
    further_layers = False

    def fields(self, values: Values) -> dict[str, Any]:
        """See :class:`Family`."""
        activation = require(values, "activation_function", "gelu_new", *_ACTIVATIONS)
        for switch, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
            require(values, switch, usual, usual)
        return {
            "vocab_size": values["vocab_size"],
            "context_length": values["n_positions"],
            "n_layer": values["n_layer"],
            "n_head": values["n_head"],
            "n_embd": values["n_embd"],
            "n_ff": values.get("n_inner") or 4 * values["n_embd"],
            "norm": "layernorm",
            "norm_eps": values.get("layer_norm_epsilon", 1e-5),
            "positions": "learned",
            "feed_forward": _ACTIVATIONS[activation],
            "qk_norm": False,
            "bias": True,
            "tie_embeddings": values.get("tie_word_embeddings", True),
            "dropout": float(values.get("resid_pdrop", 0.1)),
            "init_std": values.get("initializer_range", 0.02),
        }

    def values(self, config: ModelConfig) -> dict[str, Any]:
        """See :class:`Family`."""
        return {
            "vocab_size": config.vocab_size,
            "n_positions": config.context_length,
            "n_ctx": config.context_length,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "n_inner": config.ff_dim,
            "activation_function": _activation(config.feed_forward),
            "layer_norm_epsilon": config.norm_eps,
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
            "tie_word_embeddings": config.tie_embeddings,
            "initializer_range": config.init_std,
        }

    def links(self, config: ModelConfig) -> list[Link]:
        """See :class:`Family`."""
        links = [same("transformer.wte.weight", "embedding.weight"), same("transformer.wpe.weight", "positions.weight")]
        links += [same(f"transformer.ln_f.{kind}", f"norm.{kind}") for kind in ("weight", "bias")]
        if not config.tie_embeddings:
            links.append(same("lm_head.weight", "head.weight"))
        for layer in range(config.n_layer):
            theirs, ours = f"transformer.h.{layer}", f"blocks.{layer}"
            for kind in ("weight", "bias"):
                qkv = [f"{ours}.attention.{name}.{kind}" for name in "qkv"]
                joined = transposed if kind == "weight" else by_rows
                links += [
                    same(f"{theirs}.ln_1.{kind}", f"{ours}.attention_norm.{kind}"),
                    same(f"{theirs}.ln_2.{kind}", f"{ours}.feed_forward_norm.{kind}"),
                    joined(f"{theirs}.attn.c_attn.{kind}", *qkv),
                    joined(f"{theirs}.attn.c_proj.{kind}", f"{ours}.attention.out.{kind}"),
                    joined(f"{theirs}.mlp.c_fc.{kind}", f"{ours}.feed_forward.up.{kind}"),
                    joined(f"{theirs}.mlp.c_proj.{kind}", f"{ours}.feed_forward.down.{kind}"),
                ]
        return links


class GPTNeoX:
    """GPT-NeoX and Pythia: rotary positions on a quarter of each head, attention and feed-forward side by side."""

    model_type, architecture, prefix = "gpt_neox", "GPTNeoXForCausalLM", "gpt_neox."
    ignored = (r".*\.attention\.(masked_)?bias", r".*\.rotary_emb\.inv_freq")
    further_layers = False

    def fields(self, values: Values) -> dict[str, Any]:
        """See :class:`Family`."""
        rope = {
            "rope_theta": values.get("rotary_emb_base", 10_000.0),
            "partial_rotary_factor": values.get("rotary_pct", 0.25),
        }
        bias = bool(values.get("attention_bias", True))
        return {
            "vocab_size": values["vocab_size"],
            "context_length": values["max_position_embeddings"],
            "n_layer": values["num_hidden_layers"],
            "n_head": values["num_attention_heads"],
            "n_embd": values["hidden_size"],
            "n_ff": values["intermediate_size"],
            "norm": "layernorm",
            "norm_eps": values.get("layer_norm_eps", 1e-5),
            "parallel_blocks": values.get("use_parallel_residual", True),
            **rope_fields({**rope, **values}, partial=True),
            "feed_forward": _ACTIVATIONS[require(values, "hidden_act", "gelu", *_ACTIVATIONS)],
            "qk_norm": False,
            "bias": True,
            "qkv_bias": bias,
            "out_bias": bias,
            "tie_embeddings": values.get("tie_word_embeddings", False),
            "dropout": float(values.get("hidden_dropout", 0.0)),
            "init_std": values.get("initializer_range", 0.02),
        }

    def values(self, config: ModelConfig) -> dict[str, Any]:
        """See :class:`Family`."""
        return {
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.context_length,
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
            "hidden_size": config.n_embd,
            "intermediate_size": config.ff_dim,
            "hidden_act": _activation(config.feed_forward),
            "layer_norm_eps": config.norm_eps,
            "use_parallel_residual": config.parallel_blocks,
            **rope_values(config),
            "rotary_emb_base": config.rope_theta,
            "rotary_pct": config.rope_fraction,
            "attention_bias": bool(config.qkv_bias),
            "attention_dropout": config.dropout,
            "hidden_dropout": config.dropout,
            "tie_word_embeddings": config.tie_embeddings,
            "initializer_range": config.init_std,
        }

    def links(self, config: ModelConfig) -> list[Link]:
        """See :class:`Family`."""
        links = [same("gpt_neox.embed_in.weight", "embedding.weight")]
        if not config.tie_embeddings:
            links.append(same("embed_out.weight", "head.weight"))
        for kind in ("weight", "bias"):
            links.append(same(f"gpt_neox.final_layer_norm.{kind}", f"norm.{kind}"))
            for layer in range(config.n_layer):
                theirs, ours = f"gpt_neox.layers.{layer}", f"blocks.{layer}"
                links += [
                    same(f"{theirs}.input_layernorm.{kind}", f"{ours}.attention_norm.{kind}"),
                    same(f"{theirs}.post_attention_layernorm.{kind}", f"{ours}.feed_forward_norm.{kind}"),
                    same(f"{theirs}.mlp.dense_h_to_4h.{kind}", f"{ours}.feed_forward.up.{kind}"),
                    same(f"{theirs}.mlp.dense_4h_to_h.{kind}", f"{ours}.feed_forward.down.{kind}"),
                ]
                if kind == "weight" or config.qkv_bias:
                    qkv = [f"{ours}.attention.{name}.{kind}" for name in "qkv"]
                    links += [
                        by_head(f"{theirs}.attention.query_key_value.{kind}", config.n_head, *qkv),
                        same(f"{theirs}.attention.dense.{kind}", f"{ours}.attention.out.{kind}"),
                    ]
        return links
