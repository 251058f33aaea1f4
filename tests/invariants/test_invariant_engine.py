"""The engine gives the tokens of the plain loop, whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.inference import Engine, SamplingParams
from groundup.inference.engine import Request, window_start
from groundup.inference.sampling import choose
from groundup.model import ModelConfig, Transformer

CHOICES: dict[str, dict[str, Any]] = {
    "qwen3": {"n_kv_head": 1},
    "gpt2": {"norm": "layernorm", "positions": "learned", "feed_forward": "gelu", "bias": True, "qk_norm": False},
}
CONTEXT = 24
PROMPTS = [[5], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7, 1, 8], [1] * 10]


def make(choice: dict[str, Any], context: int = CONTEXT) -> Transformer:
    """Weights large enough that the model says something, in float64 so that no tie is broken by rounding."""
    torch.manual_seed(29)
    sizes = dict(vocab_size=37, n_layer=2, n_head=3, n_embd=24, n_ff=41, init_std=0.4)
    return Transformer(ModelConfig(context_length=context, **sizes | choice)).double().eval()


@torch.inference_mode()
def plain_loop(
    model: Transformer, prompt: list[int], params: SamplingParams, end_of_text: int | None = None
) -> list[int]:
    """Decode by computing the whole window anew for every token. What a reader would write."""
    request = Request(prompt, params)
    ids = list(prompt)
    while len(ids) - len(prompt) < params.max_tokens:
        window = ids[window_start(len(ids), model.config.context_length) :]
        token = choose(model(torch.tensor([window]))[0, -1], params, request.generator)
        if token == end_of_text:
            break
        ids.append(token)
    return ids[len(prompt) :]


def run(engine: Engine, requests: list[Request]) -> list[list[int]]:
    streamed: list[list[int]] = [[] for _ in requests]
    for step in engine.run(requests):
        for index, token in step:
            streamed[index].append(token)
    assert streamed == [request.tokens for request in requests]
    assert all(request.finish is not None for request in requests)
    return streamed


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_greedy_is_the_plain_loop_for_prompts_of_unequal_length(choice: dict[str, Any]) -> None:
    model = make(choice)
    params = [SamplingParams(max_tokens=n, temperature=0.0) for n in (13, 12, 5, 9)]  # they finish at different times
    expected = [plain_loop(model, prompt, p) for prompt, p in zip(PROMPTS, params, strict=True)]
    requests = [Request(prompt, p) for prompt, p in zip(PROMPTS, params, strict=True)]
    assert run(Engine(model), requests) == expected
    assert [len(tokens) for tokens in expected] == [13, 12, 5, 9]
    assert {request.finish for request in requests} == {"length"}
    assert len({token for tokens in expected for token in tokens}) > 5  # that the model says something


def test_the_end_of_text_ends_a_request_and_is_not_part_of_it() -> None:
    model = make({})
    params = SamplingParams(max_tokens=13, temperature=0.0)
    free = plain_loop(model, PROMPTS[1], params)
    end = free[6]
    expected = [plain_loop(model, prompt, params, end) for prompt in PROMPTS]
    requests = [Request(prompt, params) for prompt in PROMPTS]
    assert run(Engine(model, end_of_text=end), requests) == expected
    assert len(expected[1]) <= 6
    for request in requests:
        assert request.finish == ("length" if len(request.tokens) == 13 else "end_of_text")
        assert end not in request.tokens


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("context", [1, 2, 7, CONTEXT])
def test_past_the_context_it_is_the_plain_loop_over_the_window(context: int, choice: dict[str, Any]) -> None:
    model = make(choice, context)
    prompts = [*PROMPTS, list(range(CONTEXT - 1)), list(range(CONTEXT)), list(range(CONTEXT + 1)), list(range(36)) * 2]
    for params in (SamplingParams(max_tokens=61, temperature=0.0), SamplingParams(max_tokens=31, seed=3, top_p=0.9)):
        expected = [plain_loop(model, prompt, params) for prompt in prompts]
        assert run(Engine(model), [Request(prompt, params) for prompt in prompts]) == expected


@given(st.integers(1, 50), st.integers(1, 400))
@settings(max_examples=200, deadline=None)
def test_the_window_fits_and_is_at_least_half_full(context: int, length: int) -> None:
    start, before = window_start(length, context), window_start(length - 1, context)
    size = length - start
    assert 1 <= size <= context
    if length <= context:
        assert start == 0
    else:
        assert size > context // 2
        # It moves only when it must, and then leaves room for half a context's tokens.
        assert start == before or ((length - 1) - before == context and size == context // 2 + 1)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_a_seeded_request_is_the_same_alone_and_in_any_batch(temperature: float) -> None:
    model = make({})
    requests = [
        (prompt, SamplingParams(max_tokens=40, temperature=temperature, top_k=20, min_p=0.01, seed=seed))
        for seed, prompt in enumerate(PROMPTS)
    ]
    alone = [run(Engine(model), [Request(*request)])[0] for request in requests]
    assert alone == [plain_loop(model, *request) for request in requests]
    assert run(Engine(model), [Request(*request) for request in requests]) == alone
    assert run(Engine(model), [Request(*request) for request in reversed(requests)]) == alone[::-1]
    assert run(Engine(model), [Request(*requests[1]), Request(*requests[3])]) == [alone[1], alone[3]]
    other = Request(PROMPTS[0], SamplingParams(max_tokens=40, temperature=temperature, seed=99))
    assert run(Engine(model), [other]) != [alone[0]]


def test_a_request_stopped_from_outside_leaves_the_others_alone() -> None:
    model = make({})
    params = SamplingParams(max_tokens=13, temperature=0.0)
    expected = [plain_loop(model, prompt, params) for prompt in PROMPTS]
    requests = [Request(prompt, params) for prompt in PROMPTS]
    for number, _ in enumerate(Engine(model).run(requests)):
        if number == 4:
            requests[0].finish = requests[2].finish = "stopped"
    assert [request.tokens for request in requests] == [expected[0][:5], expected[1], expected[2][:5], expected[3]]


def test_global_randomness_is_neither_used_nor_changed() -> None:
    model = make({})
    request = Request(PROMPTS[0], SamplingParams(max_tokens=9, seed=5))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run(Engine(model), [request])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert run(Engine(model), [Request(PROMPTS[0], SamplingParams(max_tokens=9, seed=5))]) == first
