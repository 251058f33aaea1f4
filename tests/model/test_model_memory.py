"""The memory that a model is said to need is what it takes, by PyTorch's own account and by measured peaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.model import ModelConfig, Transformer
from groundup.model.hardware import step_bytes
from groundup.model.memory import CHECKPOINTING, serving_memory, training_memory, weight_bytes
from groundup.model.quantized import nbytes, quantize_model
from random_model_configs import configs

# ---- what is kept for the backward pass

BASE = {"vocab_size": 101, "context_length": 96, "n_layer": 3, "n_head": 4, "n_embd": 64, "n_ff": 176}
LATENT = {"kv_rank": 32, "q_rank": 48, "rope_dim": 8, "nope_dim": 16, "v_dim": 12}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "grouped-query": {"n_kv_head": 2, "qk_norm": False},
    "gpt2": {"norm": "layernorm", "feed_forward": "gelu", "bias": True, "positions": "learned"},
    "output norms, whole": {"qk_norm_whole": True, "norm_placement": "output"},
    "windows": {"norm_placement": "sandwich", "feed_forward": "geglu", "layer_pattern": "SSF", "sliding_window": 16},
    "post-norm": {"norm_placement": "post"},
    "side by side": {"parallel_blocks": True, "positions": "none"},
    "soft cap": {"attention_softcap": 9.0},
    "sinks": {"attention_sinks": True, "layer_pattern": "SF", "sliding_window": 16},
    "alibi": {"positions": "alibi", "feed_forward": "relu2"},
    "dropout": {"dropout": 0.1},
    "experts": {
        "feed_forward": "clamped_swiglu",
        "experts": {"count": 8, "active": 2, "width": 96, "pattern": "DE", "shared": 1},
    },
    "latent": {"qk_norm": False, "latent": LATENT},
    "latent, direct queries": {"qk_norm": False, "latent": LATENT | {"q_rank": 0, "nope_dim": 4}},
}


def kept_bytes(config: ModelConfig, sequences: int, *, narrow: bool) -> int:
    """Bytes of all tensors that autograd keeps up to the head's input, the parameters aside, each storage once."""
    torch.manual_seed(0)
    model = Transformer(config)
    model.train()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}  # tensors, not numbers: an address may be used again once its tensor is gone

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in own:
            kept[address] = tensor
        return tensor

    ids = torch.randint(config.vocab_size, (sequences, config.context_length))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        model.features(ids)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("parts", VARIANTS.values(), ids=VARIANTS)
def test_activations_are_those_that_autograd_keeps(parts: dict[str, Any], narrow: bool) -> None:
    config = ModelConfig.from_dict(BASE | parts)
    predicted = training_memory(config, 3, config.context_length, 2 if narrow else 4, cpu=True)
    assert kept_bytes(config, 3, narrow=narrow) == pytest.approx(predicted.activations + predicted.casts, rel=0.04)


def test_what_is_computed_again_is_not_kept() -> None:
    config, tokens = ModelConfig.from_dict(BASE | {"n_layer": 12}), 5 * 96
    none, selective, block = (training_memory(config, 5, 96, 2, checkpointing=how) for how in CHECKPOINTING)
    head = 4 * 64 + 2 * 64  # the final norm's input, and what the head reads
    assert block.activations == tokens * (12 * 4 * 64 + head)
    assert block.recomputed == selective.recomputed == (none.activations - tokens * head) // 12
    assert none.recomputed == 0
    products = 2 * (3 * 64 + 64 + 64 + 2 * 176 + 64) + 4 * 4  # q k v, mixed, out, gate and up, down; and a sum per head
    assert selective.activations == block.activations + tokens * 12 * products
    assert block.total < selective.total < none.total


# ---- weights


@given(configs(), st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=40, deadline=None)
def test_weights_take_what_parameters_take(config: ModelConfig, dtype: Any) -> None:
    with torch.device("meta"):
        model = Transformer(config).to(getattr(torch, dtype))
    assert weight_bytes(config, dtype) == sum(parameter.nbytes for parameter in model.parameters())


@given(configs(), st.sampled_from(["int8", "int4"]))
@settings(max_examples=40, deadline=None)
def test_quantized_weights_take_what_the_quantized_model_takes(config: ModelConfig, kind: Any) -> None:
    model = Transformer(config).to(torch.bfloat16)
    buffers = nbytes(model) - sum(parameter.nbytes for parameter in model.parameters())  # slopes, loads of experts
    assert weight_bytes(config, kind) == nbytes(quantize_model(model, kind)) - buffers


def test_a_step_reads_the_weights_it_needs_by_hand() -> None:
    fields = {
        "vocab_size": 11,
        "context_length": 9,
        "n_layer": 3,
        "n_head": 2,
        "n_embd": 8,
        "n_ff": 5,
        "qk_norm": False,
    }
    windows = {"layer_pattern": "SF", "sliding_window": 3, "tie_embeddings": False, "n_predict": 1}
    config = ModelConfig.from_dict(fields | windows)
    block = 4 * 8 * 8 + 3 * 8 * 5 + 2 * 8
    cache = 5 * (3 + 7 + 3) * 2 * 8 * 2  # five sequences of seven tokens, two windows of three
    assert step_bytes(config, 5, 7) == 2 * (3 * block + 8 + 11 * 8) + cache
    routed = ModelConfig.from_dict(fields | {"experts": {"count": 4, "active": 1, "pattern": "DE"}})
    dense, expert = 3 * 8 * 5, 3 * 8 * 5
    attention, router, met = 4 * 8 * 8 + 2 * 8, 4 * 8, 4 * (1 - 0.75**2)
    weights = 3 * attention + 2 * dense + router + met * expert + 8 + 11 * 8
    assert step_bytes(routed, 2, 7) == pytest.approx(2 * weights + 2 * 3 * 7 * 2 * 8 * 2)


# ---- measured peaks

MEASURE = """
import json, sys
import torch
import torch.nn.functional as F
from groundup.model import KVCache, ModelConfig, Transformer, language_model_loss
from groundup.optim import OptimConfig
from groundup.optim.groups import build_optimizers

torch.set_num_threads(1)

def memory(field):  # of this process alone; getrusage's maximum is inherited from the parent
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def train(config, batch, optimizer="adamw", checkpointing="none", loss_chunk=0, narrow=False):
    model = Transformer(config)
    model.checkpointing = checkpointing
    model.train()
    optimizers = build_optimizers(model, OptimConfig(optimizer=optimizer)).values()
    ids = torch.randint(config.vocab_size, (batch, config.context_length + 1))
    for _ in range(2):  # the moments exist from the second step's forward pass on
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            if loss_chunk:
                loss = language_model_loss(model.features(ids[:, :-1]), model.head.weight, ids[:, 1:], chunk=loss_chunk)
            else:
                loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        del loss
        for optimizer in optimizers:
            optimizer.step()

@torch.inference_mode()
def serve(config, batch, dtype="float32"):
    torch.set_default_dtype(getattr(torch, dtype))
    model = Transformer(config).eval()
    torch.set_default_dtype(torch.float32)
    with open("/proc/self/clear_refs", "w") as file:  # random numbers are drawn in float32: building is not serving
        file.write("5")  # the peak starts anew
    cache = KVCache(config, batch, config.context_length, dtype=getattr(torch, dtype))
    ids = torch.randint(config.vocab_size, (batch, config.context_length - 3))
    for _ in range(3):
        ids = model(ids, cache, last_only=True).argmax(-1)

what, fields, batch, options = json.loads(sys.argv[1])
tiny = {"vocab_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 8}
parts = {key: fields[key] for key in ("experts", "latent", "qk_norm") if key in fields}
globals()[what](ModelConfig.from_dict(tiny | parts), 1, **options)  # libraries load what they need
before = memory("VmRSS")
globals()[what](ModelConfig.from_dict(fields), batch, **options)
print(memory("VmHWM") - before)
"""


def peak(what: str, fields: dict[str, Any], batch: int, options: dict[str, Any]) -> int:
    """Bytes by which a process grows that trains or serves a model."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once, so that the peak is what is used
    arguments = [sys.executable, "-c", MEASURE, json.dumps([what, fields, batch, options])]
    return int(subprocess.run(arguments, capture_output=True, text=True, env=environment, check=True).stdout)


# Predictions leave out what is alive for a moment within one operation, and the allocator's own: peaks are within these
# factors of them. Seen: 0.91 to 1.16.
BAND = (0.8, 1.3)


def within(measured: int, predicted: int, band: tuple[float, float]) -> None:
    print(f"measured / predicted = {measured / predicted:.2f} of {predicted / 1e6:.0f} MB")
    assert band[0] < measured / predicted < band[1]


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from /proc")
WEIGHTS = {"vocab_size": 30_011, "context_length": 64, "n_layer": 2, "n_head": 4, "n_embd": 512}
DEEP = {"vocab_size": 997, "context_length": 256, "n_layer": 6, "n_head": 6, "n_embd": 192}
LOGITS = {"vocab_size": 20_011, "context_length": 256, "n_layer": 1, "n_head": 2, "n_embd": 64}
GROUPED = DEEP | {"n_kv_head": 2, "layer_pattern": "SF", "sliding_window": 64}
MIXTURE = DEEP | {"experts": {"count": 8, "active": 2, "width": 256, "shared": 1, "pattern": "DE"}}
LATENTS = DEEP | {
    "qk_norm": False,
    "latent": {"kv_rank": 64, "q_rank": 96, "rope_dim": 16, "nope_dim": 32, "v_dim": 32},
}
TRAINING: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "mostly weights": (WEIGHTS, 1, {}),
    "mostly weights, muon": (WEIGHTS | {"vocab_size": 997, "n_layer": 8}, 1, {"optimizer": "muon"}),
    "mostly activations": (DEEP, 16, {}),
    "mostly activations, autocast": (DEEP, 16, {"narrow": True}),
    "mostly activations, selective": (DEEP, 16, {"checkpointing": "selective"}),
    "mostly activations, block": (DEEP, 16, {"checkpointing": "block"}),
    "mostly logits": (LOGITS, 8, {}),
    "mostly logits, in chunks": (LOGITS, 8, {"loss_chunk": 256}),
    "grouped-query, windows": (GROUPED, 16, {}),
    "experts": (MIXTURE, 16, {}),
    "latent": (LATENTS, 16, {}),
}


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize(("fields", "batch", "options"), TRAINING.values(), ids=TRAINING)
def test_predicted_training_memory_is_near_the_peak(
    fields: dict[str, Any], batch: int, options: dict[str, Any]
) -> None:
    config, arguments = ModelConfig.from_dict(fields), dict(options)
    width = 2 if arguments.pop("narrow", False) else 4
    predicted = training_memory(config, batch, config.context_length, width, cpu=True, **arguments)
    within(peak("train", fields, batch, options), predicted.total, BAND)


# A CPU without bf16 arithmetic widens one matrix at a time: a small vocabulary, so that this is not most of all.
NARROW = WEIGHTS | {"vocab_size": 997, "n_layer": 9, "n_kv_head": 1, "context_length": 512}
SERVING: dict[str, tuple[dict[str, Any], int, Any]] = {
    "grouped-query, float32": (GROUPED | {"context_length": 1024, "sliding_window": 256}, 4, "float32"),
    "multi-query, bfloat16": (NARROW, 5, "bfloat16"),
    "experts": (MIXTURE | {"context_length": 700}, 6, "float32"),
    "latent": (LATENTS | {"context_length": 700}, 4, "float32"),
}


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize(("fields", "batch", "dtype"), SERVING.values(), ids=SERVING)
def test_predicted_serving_memory_is_near_the_peak(fields: dict[str, Any], batch: int, dtype: Any) -> None:
    config: ModelConfig = ModelConfig.from_dict(fields)
    predicted: Callable[..., Any] = serving_memory
    width = 4 if dtype == "float32" else 2
    found = predicted(config, batch, config.context_length, dtype, cache_dtype_bytes=width, together=batch, cpu=True)
    within(peak("serve", fields, batch, {"dtype": dtype}), found.total, BAND)
