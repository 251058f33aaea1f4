"""What a model is said to cost is what it costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from groundup.model import KVCache, ModelConfig, Transformer, explain


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """A small config with every choice of parts."""
    n_kv_head = draw(st.integers(1, 3))
    n_head = n_kv_head * draw(st.integers(1, 3))
    return ModelConfig(
        vocab_size=draw(st.integers(1, 40)),
        context_length=draw(st.integers(1, 20)),
        n_layer=draw(st.integers(1, 3)),
        n_head=n_head,
        n_kv_head=n_kv_head,
        n_embd=2 * n_head * draw(st.integers(1, 4)),
        n_ff=draw(st.none() | st.integers(1, 50)),
        norm=draw(st.sampled_from(["rmsnorm", "layernorm"])),
        positions=draw(st.sampled_from(["rope", "learned", "none"])),
        feed_forward=draw(st.sampled_from(["swiglu", "gelu", "relu2"])),
        qk_norm=draw(st.booleans()),
        bias=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
    )


@given(configs())
@settings(max_examples=60, deadline=None)
def test_parameters_by_part_are_those_of_the_built_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    counted = explain(config).parameters
    built = dict.fromkeys(counted, 0)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and "norm" not in name:
            part = "biases"
        elif "norm" in name:
            part = "norms"
        elif ".attention." in name:
            part = "attention"
        elif ".feed_forward." in name:
            part = "feed-forward"
        else:
            tables = {"embedding": "token embedding", "positions": "position embedding", "head": "output head"}
            part = tables[name.removesuffix(".weight")]
        built[part] += parameter.numel()
    assert counted == built
    assert explain(config).total_parameters == model.parameter_count()


@given(configs(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 5), st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_cache_bytes_are_those_of_the_cache(config: ModelConfig, dtype: torch.dtype, batch: int, length: int) -> None:
    cache = KVCache(config, batch, length, dtype=dtype)
    assert cache.nbytes == batch * length * explain(config, kv_dtype_bytes=dtype.itemsize).kv_bytes_per_token


@pytest.mark.parametrize(
    "parts",
    [{"n_kv_head": 1}, {"feed_forward": "gelu", "norm": "layernorm", "bias": True}, {"tie_embeddings": False}],
    ids=["grouped-query", "gpt2", "untied"],
)
def test_flops_are_those_that_torch_counts(parts: dict[str, Any]) -> None:
    # torch counts matrix products only, at full size: attention's T x T products whole, as explain() says it does.
    config = ModelConfig(
        vocab_size=101, context_length=23, n_layer=3, n_head=3, n_embd=42, **{"n_ff": 61, "qk_norm": False} | parts
    )
    model = Transformer(config)
    model.backend = "explicit"  # the fused kernels on a CPU are not in torch's table
    ids = torch.randint(config.vocab_size, (5, config.context_length))
    with FlopCounterMode(display=False) as forward:
        logits = model(ids)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    costs, tokens = explain(config), ids.numel()
    assert forward.get_total_flops() == tokens * costs.forward_flops_per_token
    assert forward.get_total_flops() + backward.get_total_flops() == tokens * costs.training_flops_per_token


def test_flops_by_hand() -> None:
    config = ModelConfig(vocab_size=7, context_length=5, n_layer=2, n_head=2, n_kv_head=1, n_embd=4, n_ff=3)
    costs = explain(config)
    attention = 4 * 4 + 2 * 4 * 2 + 4 * 4
    assert costs.matmul_parameters == 2 * (attention + 3 * 4 * 3) + 7 * 4
    assert costs.forward_flops_per_token == 2 * costs.matmul_parameters + 2 * 4 * 4 * 5
    assert costs.training_flops_per_token == 3 * costs.forward_flops_per_token


MEASURE = """
import json, sys
import torch
import torch.nn.functional as F
from groundup.model import ModelConfig, Transformer

torch.set_num_threads(1)

def memory(field):  # of this process alone; getrusage's maximum is inherited from the parent
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def step(config, batch):
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(config.vocab_size, (batch, config.context_length + 1))
    for _ in range(2):  # the moments exist from the second step's forward pass on
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()

fields, batch = json.loads(sys.argv[1])
step(ModelConfig.preset("tiny", context_length=8), 1)  # libraries load what they need
before = memory("VmRSS")
step(ModelConfig(**fields), batch)
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("fields", "batch"),
    [
        ({"vocab_size": 30_011, "context_length": 64, "n_layer": 2, "n_head": 4, "n_embd": 512}, 1),
        ({"vocab_size": 997, "context_length": 256, "n_layer": 6, "n_head": 6, "n_embd": 192}, 16),
        ({"vocab_size": 20_011, "context_length": 256, "n_layer": 1, "n_head": 2, "n_embd": 64}, 8),
    ],
    ids=["mostly weights", "mostly activations", "mostly logits"],
)
def test_predicted_training_memory_is_within_a_factor_two_of_the_peak(fields: dict[str, Any], batch: int) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once, so that the peak is what is used
    arguments = [sys.executable, "-c", MEASURE, json.dumps([fields, batch])]
    run = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=True)
    predicted = explain(ModelConfig(**fields), batch, activation_dtype_bytes=4).training_bytes
    print(int(run.stdout) / predicted, predicted / 1e6)
    assert predicted / 2 < int(run.stdout) < predicted * 2
