"""Which way a step goes, and that steps larger than the kernels take at once give what the model does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from groundup.inference import Engine, EngineSettings, Request, SamplingParams
from groundup.model import ModelConfig, Transformer

PARTS: dict[str, dict[str, Any]] = {
    "full": {},
    "windows": {"layer_pattern": "SF", "sliding_window": 37},
    "growing positions": {"rope_scaling": {"kind": "dynamic", "factor": 2.0, "original_length": 90}},
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=4)


def make(parts: str) -> Transformer:
    torch.manual_seed(17)
    sizes = dict(vocab_size=61, context_length=700, n_layer=2, n_head=4, n_kv_head=2, n_embd=28, n_ff=43, head_dim=10)
    return Transformer(ModelConfig.from_dict(sizes | {"init_std": 0.4} | PARTS[parts])).eval().requires_grad_(False)


def prompts(lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(11)
    return [rng.integers(0, 61, length).tolist() for length in lengths]


def finished(model: Transformer, requests: list[Request], **settings: Any) -> Engine:
    engine = Engine(model, settings=EngineSettings(**settings))
    for _ in engine.run(requests):
        pass
    return engine


def continued(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """The plain loop."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("parts", PARTS)
def test_prompts_longer_than_a_step_of_the_kernels(parts: str) -> None:
    model = make(parts)
    texts = prompts([5, 65, 200, 512, 660])
    requests = [Request(text, GREEDY) for text in texts]
    finished(model, requests)
    for text, request in zip(texts, requests, strict=True):
        assert request.tokens == continued(model, text, 4)


def test_logits_of_more_places_than_a_step_of_the_kernels_has() -> None:
    model, (text,) = make("full"), prompts([200])
    request = Request(text, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0))
    finished(model, [request])
    logp_TV = model(torch.tensor([text]))[0].log_softmax(dim=-1)
    wanted = logp_TV[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0]
    found = torch.tensor([logprob for logprob, _ in request.prompt_logprobs])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


def test_more_texts_than_a_step_of_the_kernels_has() -> None:
    model, texts = make("full"), prompts([3 + n % 7 for n in range(100)])
    requests = [Request(text, GREEDY) for text in texts]
    finished(model, requests)
    for text, request in list(zip(texts, requests, strict=True))[::9]:
        assert request.tokens == continued(model, text, 4)


@pytest.mark.parametrize(("fast", "length", "most"), [(True, 200, 64), (True, 600, 64), (False, 200, 1)])
def test_where_prompts_go(fast: bool, length: int, most: int) -> None:
    """To the kernels; where the processor multiplies tiles, to PyTorch. Single tokens always to the kernels."""
    engine, (text,) = Engine(make("full"), settings=EngineSettings(step_tokens=1000)), prompts([length])
    assert engine.scheduler is not None
    kernels = engine._runner.kernels
    assert kernels is not None
    kernels.fast = fast
    seen: list[int] = []
    begin = kernels._begin

    def watched(ids_N: np.ndarray, *rest: Any) -> None:
        seen.append(len(ids_N))
        begin(ids_N, *rest)

    kernels._begin = watched  # type: ignore[method-assign]
    for _ in engine.run([Request(text, GREEDY)]):
        pass
    assert max(seen) == most
    assert sum(seen) == 3 + (length if most > 1 else 0)
