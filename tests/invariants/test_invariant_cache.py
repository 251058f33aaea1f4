"""Decoding with a cache computes what reading everything at once computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.model import KVCache, ModelConfig, Transformer

CHOICES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {"qk_norm": False, "n_kv_head": 1, "tie_embeddings": False},
    "gpt2": {"norm": "layernorm", "positions": "learned", "feed_forward": "gelu", "bias": True, "qk_norm": False},
    "no positions": {"positions": "none", "feed_forward": "relu2"},
    "alibi": {"positions": "alibi"},
    "sinusoidal": {"positions": "sinusoidal"},
    "windows": {"layer_pattern": "SSF", "sliding_window": 5, "rope_local_theta": 100.0},
    "windows and sinks": {"layer_pattern": "SF", "sliding_window": 4, "attention_sinks": True, "n_kv_head": 1},
    "soft caps": {"attention_softcap": 2.0, "logit_softcap": 3.0, "layer_pattern": "SF", "sliding_window": 4},
    "latents": {"latent": {"kv_rank": 8, "q_rank": 6, "rope_dim": 4, "nope_dim": 7, "v_dim": 5}, "qk_norm": False},
    "latents with windows": {
        "latent": {"kv_rank": 40, "rope_dim": 4, "nope_dim": 7, "v_dim": 5}, "qk_norm": False, "layer_pattern": "SF",
        "sliding_window": 4,
    },
    "experts": {"experts": {"count": 5, "active": 2, "width": 17, "shared": 1}, "norm_placement": "sandwich"},
    "no rotation in some layers": {"layer_pattern": "FN", "rope_fraction": 0.6},
    "yarn": {"rope_scaling": {"kind": "yarn", "factor": 2.0, "original_length": 14}},
}  # fmt: skip
EXACT = dict(rtol=0, atol=1e-10)


def make(choice: dict[str, Any], backend: Any = "sdpa") -> Transformer:
    """In float64, so that what is not equal is wrong and not noise."""
    torch.manual_seed(23)
    sizes = dict(vocab_size=71, context_length=29, n_layer=3, n_head=3, n_embd=30, n_ff=41, init_std=0.2)
    model = Transformer(ModelConfig.from_dict(sizes | choice)).double().eval()
    model.backend = backend
    return model


def empty_cache(model: Transformer, batch: int, length: int = 29) -> KVCache:
    return KVCache(model.config, batch, length, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["explicit", "sdpa"])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@torch.inference_mode()
def test_odd_chunks_then_one_by_one(choice: dict[str, Any], backend: Any) -> None:
    model = make(choice, backend)
    ids = torch.randint(71, (2, 29))
    cache = empty_cache(model, 2)
    pieces, start = [], 0
    for size in (7, 1, 3, 5, *[1] * 13):
        pieces.append(model(ids[:, start : start + size], cache))
        start += size
        assert cache.length == start
    assert start == 29
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids), **EXACT)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.sampled_from(sorted(CHOICES)))
@settings(max_examples=40, deadline=None)
@torch.inference_mode()
def test_any_chunks(sizes: list[int], choice: str) -> None:
    model = make(CHOICES[choice])
    total = min(29, sum(sizes))
    ids = torch.randint(71, (3, total))
    cache = empty_cache(model, 3, total)
    pieces = [model(part, cache) for part in ids.split(_cut_to(sizes, total), dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids), **EXACT)


def _cut_to(sizes: list[int], total: int) -> list[int]:
    ends = [min(total, sum(sizes[: n + 1])) for n in range(len(sizes))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False) if end > start]


@pytest.mark.parametrize("backend", ["explicit", "sdpa"])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@torch.inference_mode()
def test_padded_on_the_left_is_alone(choice: dict[str, Any], backend: Any) -> None:
    model = make(choice, backend)
    lengths, longest, more = [17, 5, 1, 16], 17, 12
    sequences = [torch.randint(71, (length + more,)) for length in lengths]
    alone = [model(sequence[None])[0] for sequence in sequences]

    cache = empty_cache(model, len(lengths))
    cache.pad_B = torch.tensor([longest - length for length in lengths])
    # The padding holds any token at all: nothing may read it.
    padded = [torch.cat([torch.randint(71, (longest - n,)), s[:n]]) for n, s in zip(lengths, sequences, strict=True)]
    read = model(torch.stack(padded), cache)
    for row, (length, logits) in enumerate(zip(lengths, alone, strict=True)):
        torch.testing.assert_close(read[row, longest - length :], logits[:length], **EXACT)

    rows = torch.arange(4)
    for step in range(more):
        if step == 4:  # two finish; the others change places
            rows = torch.tensor([3, 1])
            cache.keep(rows)
        new = torch.stack([sequences[row][lengths[row] + step] for row in rows])[:, None]
        decoded = model(new, cache)[:, 0]
        for place, row in enumerate(rows.tolist()):
            torch.testing.assert_close(decoded[place], alone[row][lengths[row] + step], **EXACT)


@torch.inference_mode()
def test_a_cache_of_lower_precision_is_near() -> None:
    model = make({}).float()
    ids = torch.randint(71, (2, 29))
    cache = KVCache(model.config, 2, 29, dtype=torch.bfloat16)
    logits = torch.cat([model(ids[:, :20], cache), model(ids[:, 20:], cache)], 1)
    assert (logits - model(ids)).abs().max() < 0.05 * logits.abs().max()
    assert {layer.k_BSGD.dtype for layer in cache.layers} == {torch.bfloat16}


@torch.inference_mode()
def test_layers_with_windows_keep_no_more_than_they_need() -> None:
    model = make(CHOICES["windows"])
    cache = empty_cache(model, 2)
    ids = torch.randint(71, (2, 29))
    for position in range(29):
        model(ids[:, position : position + 1], cache)
    assert [layer.k_BSGD.shape[1] for layer in cache.layers] == [5, 5, 29]
    full = empty_cache(make({}), 2)
    assert cache.nbytes * 3 * 29 == full.nbytes * (5 + 5 + 29)


@torch.inference_mode()
def test_latent_attention_keeps_latents_and_rotary_keys_alone() -> None:
    model = make(CHOICES["latents"])
    cache = empty_cache(model, 2)
    model(torch.randint(71, (2, 29)), cache)
    assert cache.nbytes == 2 * 29 * 3 * (8 + 4) * 8
