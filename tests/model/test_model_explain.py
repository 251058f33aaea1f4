"""What a model is said to cost is what it costs: parameters, FLOPs and cache. Memory is in test_model_memory.py."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from groundup.model import KVCache, ModelConfig, Transformer, explain
from groundup.model.parts import attention_flops, cache_bytes
from groundup.optim.groups import split_parameters
from random_model_configs import configs

# ---- parameters


def part_of(name: str) -> str:
    """The part that explain counts a parameter of the built model to, by its name."""
    if name.startswith("further."):
        return "further tokens"
    if "norm" in name:
        return "norms"
    if "sinks" in name:
        return "sinks"
    if name.endswith(".bias"):
        return "biases"
    inner = name.partition(".feed_forward.")[2]
    for beginning, part in (("router", "router"), ("shared", "shared experts")):
        if inner.startswith(beginning):
            return part
    if inner:
        return "feed-forward"
    if ".attention." in name:
        return "attention"
    tables = {"embedding": "token embedding", "positions": "position embedding", "head": "output head"}
    return tables[name.removesuffix(".weight")]


@given(configs())
@settings(max_examples=150, deadline=None)
def test_parameters_by_part_are_those_of_the_built_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    costs = explain(config)
    built = dict.fromkeys(costs.parameters, 0)
    for name, parameter in model.named_parameters():
        part = part_of(name)
        stacked = part == "feed-forward" and parameter.ndim == 3
        built["experts" if stacked else part] += parameter.numel()
    assert costs.parameters == built
    assert costs.total_parameters == model.parameter_count()


@given(configs())
@settings(max_examples=40, deadline=None)
def test_active_parameters_are_those_that_one_token_moves(config: ModelConfig) -> None:
    config = ModelConfig.from_dict(config.to_dict() | {"dropout": 0.0})
    torch.manual_seed(0)
    model = Transformer(config)
    model(torch.zeros(1, 1, dtype=torch.int64)).sum().backward()
    met = 0
    for name, parameter in model.named_parameters():
        if name.startswith("further."):
            continue
        stacked = ".feed_forward." in name and ".router." not in name and name.split(".")[3] in ("gate", "up", "down")
        owner = model.get_submodule(name.rsplit(".", 1)[0])
        if stacked and not isinstance(owner, nn.Linear):
            layer = model.get_submodule(name.rsplit(".", 2)[0])
            assert layer.routing is not None
            met += parameter.numel() // config.experts.count * int((layer.routing.counts_N > 0).sum())
        else:
            met += parameter.numel()
    assert explain(config).active_parameters == met


PUBLISHED = {  # parameters, and those active per token, in billions, as their authors give them
    "gpt2-1558m": (1.558, None),
    "llama3-8b": (8.03, None),
    "mixtral-8x7b": (46.7, 12.9),
    "qwen3-30b-a3b": (30.5, 3.3),
    "deepseek-v2": (236.0, 21.0),
    "deepseek-v3": (671.0, 37.0),
    "gpt-oss-120b": (116.8, None),
    "gemma3-4b": (3.88, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_of_the_field_are_as_large_as_their_authors_say(name: str) -> None:
    costs, (total, active) = explain(ModelConfig.preset(name)), PUBLISHED[name]
    assert costs.total_parameters / 1e9 == pytest.approx(total, rel=0.002)
    assert active is None or costs.active_parameters / 1e9 == pytest.approx(active, rel=0.02)


@given(configs())
@settings(max_examples=60, deadline=None)
def test_moments_are_those_that_the_optimizers_keep(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_dict(config.to_dict() | {"n_predict": 0}))
    matrices, tables, vectors = (sum(t.numel() for t in group) for group in split_parameters(model))
    expected = {"adamw": 8 * (matrices + tables + vectors), "muon": 4 * matrices + 8 * (tables + vectors)}
    for optimizer, count in expected.items():
        assert explain(model.config, optimizer=optimizer).training.moments == count  # type: ignore[arg-type]


# ---- the cache


@given(
    configs(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 5),
    st.integers(1, 70),
    st.integers(1, 9),
)
@settings(max_examples=80, deadline=None)
def test_cache_bytes_are_those_of_the_cache(
    config: ModelConfig, dtype: torch.dtype, batch: int, length: int, new: int
) -> None:
    cache = KVCache(config, batch, length, new=new, dtype=dtype)
    assert cache.nbytes == cache_bytes(config, batch, length, dtype.itemsize, new=new)
    costs = explain(config, context=length, batch=batch, kv_dtype_bytes=dtype.itemsize)
    assert costs.kv_bytes == KVCache(config, batch, length, dtype=dtype).nbytes


@given(configs())
@settings(max_examples=40, deadline=None)
def test_a_token_adds_to_the_cache_what_is_said_before_and_after_its_windows_are_full(config: ModelConfig) -> None:
    costs = explain(config, kv_dtype_bytes=4)

    def growth(length: int) -> int:
        return KVCache(config, 1, length + 1).nbytes - KVCache(config, 1, length).nbytes

    assert growth(0) == costs.kv_bytes_per_token
    assert growth(10 * (config.sliding_window or 1) + 100) == costs.kv_bytes_per_token_past_windows


# ---- FLOPs

MLA = {"kv_rank": 13, "q_rank": 17, "rope_dim": 6, "nope_dim": 5, "v_dim": 7}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped-query": {"n_kv_head": 1},
    "gpt2": {"feed_forward": "gelu", "norm": "layernorm", "bias": True, "positions": "learned"},
    "untied": {"tie_embeddings": False},
    "own head size": {"head_dim": 10, "n_kv_head": 1},
    "latent": {"latent": MLA},
    "latent, direct queries": {"latent": MLA | {"q_rank": 0}},
    "experts": {"experts": {"count": 5, "active": 2, "width": 19, "router_bias": True}},
    "shared experts": {"experts": {"count": 6, "active": 3, "width": 19, "shared": 2, "pattern": "DE"}},
    "sinks, a window never full": {"attention_sinks": True, "layer_pattern": "SF", "sliding_window": 30},
    "soft caps": {"attention_softcap": 5.0, "logit_softcap": 9.0, "norm_placement": "sandwich"},
    "alibi, side by side": {"positions": "alibi", "parallel_blocks": True},
}


def counted(config: ModelConfig, run: Any = None) -> tuple[int, int]:
    """FLOPs of the forward and of the backward pass of five sequences, as torch counts them.

    It counts matrix products only. What it cannot count is kept away: fused attention on a CPU, by the explicit
    backend, and grouped products, by experts whose rows are no whole 16 bytes, which go one after the other.
    """
    model = Transformer(config)
    model.backend = "explicit"
    ids = torch.randint(config.vocab_size, (5, config.context_length))
    with FlopCounterMode(display=False) as forward:
        result = model(ids) if run is None else run(model, ids)
    with FlopCounterMode(display=False) as backward:
        result.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def small(**parts: Any) -> ModelConfig:
    fields = {"vocab_size": 101, "context_length": 23, "n_layer": 3, "n_head": 3, "n_embd": 42, "n_ff": 61}
    return ModelConfig.from_dict(fields | {"qk_norm": False} | parts)


@pytest.mark.parametrize("parts", VARIANTS.values(), ids=VARIANTS)
def test_flops_are_those_that_torch_counts(parts: dict[str, Any]) -> None:
    config = small(**parts)
    forward, backward = counted(config)
    costs, tokens = explain(config), 5 * config.context_length
    assert forward == tokens * costs.forward_flops_per_token
    assert forward + backward == tokens * costs.training_flops_per_token


def test_a_window_costs_its_own_width_and_is_computed_with_twice_as_many_keys() -> None:
    # Block by block, W queries are multiplied with 2 W keys, of which a query sees W: explain counts what is seen.
    config = small(layer_pattern="SSF", sliding_window=6, context_length=24)
    forward, backward = counted(config)
    costs, tokens, hidden = explain(config), 5 * 24, 2 * attention_flops(config, 0, 24)
    assert attention_flops(config, 0, 24) == 2 * 6 * 3 * (14 + 14)
    assert attention_flops(config, 2, 24) == 2 * 24 * 3 * (14 + 14)
    assert forward == tokens * (costs.forward_flops_per_token + hidden)
    assert forward + backward == tokens * (costs.training_flops_per_token + 3 * hidden)


def test_further_tokens_cost_a_block_a_join_and_the_head_each() -> None:
    def run(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
        positions, step = model._step(ids, None, None, None)
        tokens = model.embed(ids, positions)
        module: Any = model.further[0]
        return model.logits(module.norm(module(tokens, tokens, step)))

    plain, config = small(), small(n_predict=3)
    forward, backward = counted(config, run)
    difference = explain(config).training_flops_per_token - explain(plain).training_flops_per_token
    assert 3 * (forward + backward) == 5 * 23 * difference
    assert explain(config).forward_flops_per_token == explain(plain).forward_flops_per_token


def test_flops_by_hand() -> None:
    config = ModelConfig(vocab_size=7, context_length=5, n_layer=2, n_head=2, n_kv_head=1, n_embd=4, n_ff=3)
    costs = explain(config)
    attention = 4 * 4 + 2 * 4 * 2 + 4 * 4
    assert costs.matmul_parameters == 2 * (attention + 3 * 4 * 3) + 7 * 4
    assert costs.forward_flops_per_token == 2 * costs.matmul_parameters + 2 * 4 * 4 * 5
    assert costs.training_flops_per_token == 3 * costs.forward_flops_per_token
    assert explain(config, context=3).forward_flops_per_token == 2 * costs.matmul_parameters + 2 * 4 * 4 * 3


def test_nothing_of_it_needs_torch() -> None:
    code = (
        "import sys\nfrom groundup.model import ModelConfig, explain\n"
        "import groundup.model.hardware, groundup.model.drawing as d\n"
        "c = ModelConfig.preset('deepseek-v3'); explain(c); d.draw_text(c); d.draw_svg(c, 'x')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
