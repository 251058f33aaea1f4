"""Steps with all their tensors in fixed places give what steps of any shape do. Recording them takes a CUDA device."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from groundup.inference import Engine, EngineSettings, Request, SamplingParams
from groundup.inference.graphs import MOST, StepGraphs
from groundup.inference.paged import PagedCache, Piece
from groundup.model import ModelConfig, Transformer

KINDS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "learned positions, tied": {"positions": "learned", "tie_embeddings": True},
    "windows": {"layer_pattern": "SSF", "sliding_window": 7},
    "windows alone": {"layer_pattern": "S", "sliding_window": 5},
    "latent": {"latent": {"kv_rank": 7, "rope_dim": 4, "nope_dim": 5, "v_dim": 3}, "qk_norm": False},
    "alibi, grouped": {"positions": "alibi", "n_kv_head": 1},
    "sinks, cap": {"attention_sinks": True},
}


def make(**fields: Any) -> Transformer:
    torch.manual_seed(3)
    sizes = dict(vocab_size=61, context_length=300, n_layer=3, n_head=2, n_embd=22, n_ff=29, head_dim=8, init_std=0.3)
    return Transformer(ModelConfig.from_dict(sizes | fields)).double().eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_logits_of_steps_are_those_of_whole_texts(kind: str) -> None:
    model, rng = make(**KINDS[kind]), random.Random(1)
    texts = [[rng.randrange(61) for _ in range(length)] for length in (3, 9, 140)]
    paged = PagedCache(model.config, 700, size=4, dtype=torch.float64)
    for pages in paged.pages:  # beyond the zeros of block 0, nothing may be read that nobody has written
        for page in pages:
            page[4:] = float("nan")
    graphs, helds = StepGraphs(model, paged, 59), [paged.open() for _ in texts]
    for held, text in zip(helds, texts, strict=True):
        assert paged.reserve(held, 0, len(text) - 2)
        batch, _ = paged.ragged([Piece(held, 0, len(text) - 2, len(text))])
        model.features(torch.tensor([text[:-2]]), batch)
        paged.computed(held, text, len(text) - 2, None)
    for back in (2, 1):
        for some in ([0, 1, 2], [1], [2, 0]) if back == 1 else ([0, 1, 2],):  # again in other company: nothing changes
            pieces = [Piece(helds[i], len(texts[i]) - back, 1, len(texts[i])) for i in some]
            for i in some:
                assert paged.reserve(helds[i], len(texts[i]) - back, len(texts[i]) - back + 1)
            found = graphs.logits(pieces, [texts[i][-back] for i in some])
            assert found is not None
            for i, row in zip(some, found, strict=True):
                wanted = model(torch.tensor([texts[i][: len(texts[i]) - back + 1]]))[0, -1, :59]
                torch.testing.assert_close(row, wanted, rtol=1e-9, atol=1e-9)


def test_what_has_no_graph() -> None:
    model = make()
    paged = PagedCache(model.config, 700, size=4, dtype=torch.float64)
    graphs, held = StepGraphs(model, paged, 61), paged.open()
    assert graphs.logits([Piece(held, 3, 2, 5)], [1, 2]) is None
    assert graphs.logits([Piece(held, 3, 1, 5)] * (MOST + 1), [1] * (MOST + 1)) is None
    assert StepGraphs.refusal(model) is None
    assert "experts" in (StepGraphs.refusal(make(experts={"count": 4, "active": 2})) or "")
    grows = make(rope_scaling={"kind": "dynamic", "factor": 2.0, "original_length": 30})
    assert "how long the text is" in (StepGraphs.refusal(grows) or "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_engine_on_a_device_gives_the_tokens_of_the_plain_loop() -> None:
    model = make().float().cuda()
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [5] * 130]
    found = []
    for graphs in (True, False):
        engine = Engine(model, settings=EngineSettings(compiled=graphs))
        requests = [Request(prompt, SamplingParams(temperature=0.0, max_tokens=20)) for prompt in prompts]
        for _ in engine.run(requests):
            pass
        found.append([request.tokens for request in requests])
    assert found[0] == found[1]
