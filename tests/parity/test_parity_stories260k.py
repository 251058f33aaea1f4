"""Real weights: the 260K-parameter TinyStories model of llama2.c, against reference values computed apart from us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from groundup.inference import Engine, SamplingParams
from groundup.inference.engine import Request
from groundup.model import KVCache, ModelConfig, Transformer, load_model, save_model

BOS = 1


def read_llama2c(file: Path, norm_eps: float, theta: float) -> Transformer:
    """Read llama2.c's first format: seven int32, then every float32 tensor of a kind layer by layer."""
    dim, hidden, layers, heads, kv_heads, vocab, context = np.fromfile(file, dtype="<i4", count=7).tolist()
    values = np.fromfile(file, dtype="<f4", offset=28)
    config = ModelConfig(
        vocab_size=abs(vocab),  # negative would mean an output head of its own
        context_length=context,
        n_layer=layers,
        n_head=heads,
        n_kv_head=kv_heads,
        n_embd=dim,
        n_ff=hidden,
        norm_eps=norm_eps,
        rope_theta=theta,
        qk_norm=False,
        tie_embeddings=vocab > 0,
    )
    taken = 0

    def take(*shape: int) -> Tensor:
        nonlocal taken
        size = int(np.prod(shape))
        taken += size
        return torch.from_numpy(values[taken - size : taken].reshape(shape).copy())

    def halves(rows: Tensor) -> Tensor:
        """Rows of a head stored as pairs (0, 1), (2, 3) … reordered to our pairs (0, D/2), (1, D/2 + 1) …"""
        pairs = rows.view(-1, config.head_dim // 2, 2, dim)
        return pairs.transpose(1, 2).reshape(rows.shape)

    kv_dim = kv_heads * config.head_dim
    state = {"embedding.weight": take(abs(vocab), dim)}
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm": (dim,),
        "attention.q": (dim, dim),
        "attention.k": (kv_dim, dim),
        "attention.v": (kv_dim, dim),
        "attention.out": (dim, dim),
        "feed_forward_norm": (dim,),
        "feed_forward.gate": (hidden, dim),
        "feed_forward.down": (dim, hidden),
        "feed_forward.up": (hidden, dim),
    }
    for name, shape in shapes.items():
        for layer, tensor in enumerate(take(layers, *shape)):
            rotated = name in ("attention.q", "attention.k")
            state[f"blocks.{layer}.{name}.weight"] = halves(tensor) if rotated else tensor
    state["norm.weight"] = take(dim)
    take(2 * context * config.head_dim // 2)  # cosines and sines, which we compute
    state["head.weight"] = state["embedding.weight"]
    assert taken == len(values)
    model = Transformer(config)
    model.load_state_dict(state)
    return model.eval()


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> Path:
    return shared_data / "weights" / "stories260K"


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "expected_greedy.json").read_text())


@pytest.fixture(scope="module")
def model(folder: Path, expected: dict[str, Any]) -> Transformer:
    config = expected["config"]
    return read_llama2c(folder / "stories260K.bin", config["rms_eps"], config["rope_theta"])


def greedy(model: Transformer, prompt: list[int], count: int) -> list[int]:
    request = Request(prompt, SamplingParams(max_tokens=count, temperature=0.0))
    for _ in Engine(model).run([request]):
        pass
    return request.tokens


@torch.inference_mode()
def test_the_first_logits(model: Transformer, expected: dict[str, Any]) -> None:
    logits = model(torch.tensor([[BOS]]))[0, 0]
    torch.testing.assert_close(logits, torch.tensor(expected["logits_at_pos0_after_bos"]), rtol=0, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("backend", ["explicit", "sdpa"])
def test_two_hundred_greedy_tokens_through_engine_and_cache(
    model: Transformer, expected: dict[str, Any], backend: Any
) -> None:
    ids = expected["greedy_token_ids"]
    assert ids[0] == BOS
    model.backend = backend
    assert greedy(model, [BOS], 200) == ids[1:]
    assert greedy(model, ids[:50], 151) == ids[50:]


@torch.inference_mode()
def test_one_pass_over_all_tokens_predicts_each(model: Transformer, expected: dict[str, Any]) -> None:
    ids = torch.tensor([expected["greedy_token_ids"]])
    assert torch.equal(model(ids)[0, :-1].argmax(-1), ids[0, 1:])
    cache = KVCache(model.config, 1, 201)
    torch.testing.assert_close(model(ids, cache), model(ids), rtol=0, atol=1e-4)


def test_saved_it_tells_the_same_story_here_and_in_transformers(
    model: Transformer, expected: dict[str, Any], tmp_path: Path
) -> None:
    import transformers

    save_model(model, tmp_path, bos_id=BOS)
    assert greedy(load_model(tmp_path), [BOS], 200) == expected["greedy_token_ids"][1:]
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        logits = other(torch.tensor([expected["greedy_token_ids"]])).logits[0]
    assert logits[:-1].argmax(-1).tolist() == expected["greedy_token_ids"][1:]
