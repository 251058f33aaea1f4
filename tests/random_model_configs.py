"""Small model configs with every choice of parts, for tests that must hold for all of them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from groundup.model import ModelConfig


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Any config that is not refused, of up to five layers."""
    latent = draw(st.booleans() | st.just(False))
    n_layer = draw(st.integers(1, 5))
    positions = draw(st.sampled_from(["rope", "learned", "sinusoidal", "alibi", "none"]))
    n_kv_head = draw(st.integers(1, 3))
    n_head = n_kv_head * (1 if latent else draw(st.integers(1, 3)))
    n_embd = 2 * n_head * draw(st.integers(1, 4))
    placement = draw(st.sampled_from(["pre", "post", "output", "sandwich"]))
    fields: dict[str, Any] = {
        "vocab_size": draw(st.integers(1, 40)),
        "context_length": draw(st.integers(1, 20)),
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": n_kv_head,
        "n_embd": n_embd,
        "n_ff": draw(st.none() | st.integers(1, 50)),
        "norm": draw(st.sampled_from(["rmsnorm", "layernorm"])),
        "norm_plus_one": draw(st.booleans()),
        "norm_placement": placement,
        "parallel_blocks": placement == "pre" and draw(st.booleans()),
        "positions": positions,
        "feed_forward": draw(
            st.sampled_from(["swiglu", "geglu", "clamped_swiglu", "gelu", "gelu_exact", "relu", "relu2"])
        ),
        "attention_softcap": draw(st.none() | st.just(7.0)),
        "logit_softcap": draw(st.none() | st.just(7.0)),
        "bias": draw(st.booleans()),
        "qkv_bias": draw(st.none() | st.booleans()),
        "out_bias": draw(st.none() | st.booleans()),
        "ff_bias": draw(st.none() | st.booleans()),
        "tie_embeddings": draw(st.booleans()),
        "embedding_scale": draw(st.none() | st.just(3.0)),
        "n_predict": 0 if positions in ("learned", "sinusoidal") else draw(st.integers(0, 2)),
        "dropout": draw(st.sampled_from([0.0, 0.1])),
        "experts": draw(_experts(n_layer)),
    }
    pattern = draw(st.text("FSN", min_size=1, max_size=4))
    fields["layer_pattern"] = pattern
    if "S" in (pattern * n_layer)[:n_layer]:
        fields["sliding_window"] = draw(st.integers(1, 25))
        fields["rope_local_theta"] = draw(st.none() | st.just(500.0))
    if latent:
        rope_dim = 2 * draw(st.integers(1, 3)) if positions == "rope" else 0
        widths = {name: draw(st.integers(1, 9)) for name in ("kv_rank", "nope_dim", "v_dim")}
        fields["latent"] = {"q_rank": draw(st.integers(0, 7)), "rope_dim": rope_dim, **widths}
        fields["qk_norm"] = False
        return ModelConfig.from_dict(fields)
    fields["qk_norm"], fields["qk_norm_whole"] = draw(st.booleans()), draw(st.booleans())
    fields["attention_sinks"] = draw(st.booleans())
    fields["head_dim"] = draw(st.sampled_from([None, 4, 8]))
    if positions == "rope":
        fields["rope_fraction"] = draw(st.sampled_from([1.0, 0.5] if fields["head_dim"] else [1.0]))
        kind = draw(st.sampled_from(["none", "linear", "dynamic", "yarn", "llama3"]))
        fields["rope_scaling"] = {"kind": kind, "factor": 2.0}
    return ModelConfig.from_dict(fields)


@st.composite
def _experts(draw: st.DrawFn, n_layer: int) -> dict[str, Any]:
    if draw(st.booleans()):
        return {}
    groups = draw(st.integers(1, 2))
    count = groups * draw(st.integers(1, 4))
    pattern = draw(st.text("ED", min_size=1, max_size=3))
    return {
        "count": count,
        "groups": groups,
        "active_groups": groups,
        "active": draw(st.integers(1, count)),
        "width": draw(st.none() | st.integers(1, 30)),
        "shared": draw(st.integers(0, 2)),
        "pattern": pattern if "E" in (pattern * n_layer)[:n_layer] else "E",
        "router": draw(st.sampled_from(["softmax", "sigmoid"])),
        "router_bias": draw(st.booleans()),
        "selection_bias": draw(st.booleans()),
    }
