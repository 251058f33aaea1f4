"""The engine gives the tokens of the plain loop: whatever the model, the batch, the cuts, the cache and the guesses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.inference import Engine, EngineSettings, PromptLookup, Request, SamplingParams
from groundup.inference.requests import window_start
from groundup.inference.sampler import Choice, SamplerState, sample
from groundup.model import ModelConfig, Transformer
from random_model_configs import configs

CHOICES: dict[str, dict[str, Any]] = {
    "qwen3": {"n_kv_head": 1},
    "gpt2": {"norm": "layernorm", "positions": "learned", "feed_forward": "gelu", "bias": True, "qk_norm": False},
    "windows": {"layer_pattern": "SSF", "sliding_window": 5, "n_layer": 3, "rope_local_theta": 300.0},
    "sinks and a soft cap": {"attention_sinks": True, "logit_softcap": 9.0, "layer_pattern": "SF", "sliding_window": 7},
    "latent": {"latent": {"kv_rank": 7, "rope_dim": 4, "nope_dim": 5, "v_dim": 3}, "qk_norm": False},
    "experts": {"experts": {"count": 4, "active": 2, "width": 19}},
    "alibi": {"positions": "alibi"},
    "longrope": {
        "rope_scaling": {
            "kind": "longrope", "factor": 2.0, "original_length": 15,
            "short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.0, 2.0, 3.0, 4.0],
        }
    },
}  # fmt: skip
CONTEXT = 24
PROMPTS = [[5], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7, 1, 8], [1] * 10]
GREEDY = SamplingParams(temperature=0.0, max_tokens=13)


def make(choice: dict[str, Any], context: int = CONTEXT) -> Transformer:
    """Weights large enough that the model says something, in float64 so that no tie is broken by rounding."""
    sizes = dict(vocab_size=37, n_layer=2, n_head=3, n_embd=24, n_ff=41, init_std=0.4)
    return random_model(ModelConfig.from_dict(dict(context_length=context, **sizes) | choice))


def random_model(config: ModelConfig) -> Transformer:
    torch.manual_seed(29)
    return Transformer(config).double().eval()


@torch.inference_mode()
def plain_loop(
    model: Transformer, prompt: list[int], params: SamplingParams, end_of_text: int | None = None
) -> list[int]:
    """Decode by computing the whole window anew for every token. What a reader would write."""
    state = SamplerState(params, prompt, vocab_size=model.config.vocab_size)
    ids = list(prompt)
    while len(ids) - len(prompt) < params.max_tokens:
        window = ids[window_start(len(ids), model.config.context_length) :]
        logits = model(torch.tensor([window]))[0, -1]
        if params.temperature == 0.0:
            token = int(logits.argmax())
        else:
            (choice,) = sample(logits[None], [state])
            assert isinstance(choice, Choice)
            token = choice.token
            state.observe(token)
        if token == end_of_text:
            break
        ids.append(token)
    return ids[len(prompt) :]


def run(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    streamed: dict[int, list[int]] = {id(request): [] for request in requests}
    for events in engine.run(requests):
        for event in events:
            streamed[id(event.request)].append(event.token)
    assert list(streamed.values()) == [request.tokens for request in requests]
    assert all(request.finish is not None for request in requests)
    held = [group.pool.held for group in engine.paged.groups]
    assert held == [0] * len(held)  # every block was given back
    return [request.tokens for request in requests]


def expected(model: Transformer, prompts: Sequence[list[int]], params: SamplingParams) -> list[list[int]]:
    return [plain_loop(model, prompt, params) for prompt in prompts]


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_greedy_is_the_plain_loop_for_prompts_of_unequal_length(choice: dict[str, Any]) -> None:
    model = make(choice)
    params = [replace(GREEDY, max_tokens=n) for n in (13, 12, 5, 9)]  # they finish at different times
    wanted = [plain_loop(model, prompt, p) for prompt, p in zip(PROMPTS, params, strict=True)]
    requests = [Request(prompt, p) for prompt, p in zip(PROMPTS, params, strict=True)]
    assert run(Engine(model), requests) == wanted
    assert [len(tokens) for tokens in wanted] == [13, 12, 5, 9]
    assert {request.finish for request in requests} == {"length"}
    assert len({token for tokens in wanted for token in tokens}) > 3  # that the model says something


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_prompts_cut_in_any_way(choice: dict[str, Any], chunk: int) -> None:
    model = make(choice)
    engine = Engine(model, settings=EngineSettings(step_tokens=chunk, block=4))
    assert run(engine, [Request(prompt, GREEDY) for prompt in PROMPTS]) == expected(model, PROMPTS, GREEDY)


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_sequences_that_have_to_give_their_blocks_up_and_come_back(choice: dict[str, Any]) -> None:
    model = make(choice)
    prompts = [[n, *prompt] for n in range(3) for prompt in PROMPTS]
    engine = Engine(model, settings=EngineSettings(cache_tokens=2 * CONTEXT, block=3, step_tokens=7))
    assert run(engine, [Request(prompt, GREEDY) for prompt in prompts]) == expected(model, prompts, GREEDY)
    assert engine.scheduler.preempted > 0


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_what_is_found_in_the_cache_is_what_would_have_been_computed(choice: dict[str, Any]) -> None:
    model = make(choice)
    engine = Engine(model, settings=EngineSettings(block=2))
    first = Request(PROMPTS[1], GREEDY)
    run(engine, [first])
    again, longer = Request(PROMPTS[1], GREEDY), PROMPTS[1] + first.tokens[:7]
    turn = Request(longer, replace(GREEDY, max_tokens=5))
    assert run(engine, [again]) == [first.tokens]
    assert run(engine, [turn]) == [plain_loop(model, longer, replace(GREEDY, max_tokens=5))]
    if "rope_scaling" in choice:  # its keys hang on the length of the text
        assert again.cached == turn.cached == 0
        return
    assert again.cached == 10  # of 11: whole blocks, and one token is computed for what follows it
    # A second turn computes the new tokens alone. The last token of an answer was never read.
    assert turn.cached == (len(longer) - 1) // 2 * 2
    other = Request(PROMPTS[1], GREEDY, tenant="somebody else")
    assert run(engine, [other]) == [first.tokens]
    assert other.cached == 0


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guessed_tokens_change_nothing(choice: dict[str, Any], temperature: float) -> None:
    model = make(choice, context=61)
    params = SamplingParams(temperature=temperature, max_tokens=37, seed=3, top_k=3)
    prompts = [[1, 2, 3, 4] * 4, [7, 7, 7, 7], PROMPTS[1]]
    engine = Engine(model, settings=EngineSettings(block=4, drafts=5), drafter=PromptLookup(shortest=1))
    requests = [Request(prompt, params) for prompt in prompts]
    steps = sum(1 for _ in engine.run(requests))
    assert [request.tokens for request in requests] == expected(model, prompts, params)
    if temperature == 0.0:
        assert steps < 37  # some guesses were right


def test_guesses_that_are_always_right_and_always_wrong() -> None:
    model = make({}, context=61)
    params = replace(GREEDY, max_tokens=31)
    (wanted,) = expected(model, [PROMPTS[1]], params)

    class Knows:
        def __init__(self, wrong: bool) -> None:
            self.wrong = wrong

        def propose(self, tokens: Sequence[int], most: int) -> list[int]:
            done = len(tokens) - len(PROMPTS[1])
            right = wanted[done : done + most]
            return [(token + 1) % 37 for token in right] if self.wrong else right

    for wrong in (False, True):
        request = Request(PROMPTS[1], params)
        steps = sum(1 for _ in Engine(model, drafter=Knows(wrong), settings=EngineSettings(drafts=4)).run([request]))
        assert request.tokens == wanted
        assert steps == (31 if wrong else 7)  # 1 for the prompt's, then 5 at a time


@given(config=configs(), seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_any_model_any_batch(config: ModelConfig, seed: int) -> None:
    """Random models of all parts there are; random prompts, cuts, caches, arrivals, guesses."""
    rng = random.Random(seed)
    if (
        config.rope_scaling.kind == "dynamic"
    ):  # its frequencies change with every token, and leave old keys as they were
        config = replace(config, rope_scaling=replace(config.rope_scaling, kind="yarn"))
    model = random_model(config)
    context = config.context_length
    prompts = [
        [rng.randrange(config.vocab_size) for _ in range(rng.randint(1, context))] for _ in range(rng.randint(1, 5))
    ]
    params = SamplingParams(max_tokens=rng.randint(1, 2 * context), temperature=0.0)
    engine = Engine(
        model,
        settings=EngineSettings(
            block=rng.randint(1, 5), step_tokens=rng.randint(1, 30), max_sequences=rng.randint(1, 4),
            cache_tokens=rng.choice([0, 2 * context + 8]), reproducible=rng.random() < 0.3, drafts=rng.randint(1, 4),
        ),
        drafter=PromptLookup(shortest=1) if rng.random() < 0.5 else None,
    )  # fmt: skip
    for _ in range(2):  # the second time much is found in the cache
        requests = [Request(prompt, params, slide=True, priority=rng.randint(0, 1)) for prompt in prompts]
        got = run(engine, requests)
        assert [request.error for request in requests] == [None] * len(requests)
        assert got == expected(model, prompts, params)


def test_the_end_of_text_ends_a_request_and_is_not_part_of_it() -> None:
    model = make({})
    free = plain_loop(model, PROMPTS[1], GREEDY)
    end = free[6]
    wanted = [plain_loop(model, prompt, GREEDY, end) for prompt in PROMPTS]
    requests = [Request(prompt, GREEDY) for prompt in PROMPTS]
    assert run(Engine(model, end_of_text=end), requests) == wanted
    assert len(wanted[1]) <= 6
    for request in requests:
        assert request.finish == ("length" if len(request.tokens) == 13 else "end_of_text")
        assert end not in request.tokens
    both = [Request(PROMPTS[1], GREEDY), Request(PROMPTS[1], replace(GREEDY, ignore_end=True))]
    run(Engine(model, end_of_text=[end, 36]), both)
    assert len(both[0].tokens) <= 6
    assert both[1].tokens == free


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("context", [1, 2, 7, CONTEXT])
def test_past_the_context_it_is_the_plain_loop_over_the_window(context: int, choice: dict[str, Any]) -> None:
    model = make(choice, context)
    prompts = [*PROMPTS, list(range(CONTEXT - 1)), list(range(CONTEXT)), list(range(CONTEXT + 1)), list(range(36)) * 2]
    for params in (SamplingParams(max_tokens=61, temperature=0.0), SamplingParams(max_tokens=31, seed=3, top_p=0.9)):
        requests = [Request(prompt, params, slide=True) for prompt in prompts]
        assert run(Engine(model), requests) == expected(model, prompts, params)


def test_without_a_sliding_window_a_text_ends_with_the_context() -> None:
    model = make({})
    request = Request(PROMPTS[1], replace(GREEDY, max_tokens=99))
    (tokens,) = run(Engine(model), [request])
    # The last token is chosen when all places are taken; it is never read.
    assert len(PROMPTS[1]) + len(tokens) == CONTEXT + 1
    assert request.finish == "length"
    assert tokens == plain_loop(model, PROMPTS[1], replace(GREEDY, max_tokens=len(tokens)))


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

    def texts(*which: int) -> list[list[int]]:
        return run(Engine(model), [Request(*requests[n], slide=True) for n in which])

    alone = [texts(n)[0] for n in range(len(requests))]
    assert alone == [plain_loop(model, *request) for request in requests]
    assert texts(0, 1, 2, 3) == alone
    assert texts(3, 2, 1, 0) == alone[::-1]
    assert texts(1, 3) == [alone[1], alone[3]]
    other = Request(PROMPTS[0], SamplingParams(max_tokens=40, temperature=temperature, seed=99), slide=True)
    assert run(Engine(model), [other]) != [alone[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_for_bit_the_same_alone_and_among_fifty(dtype: torch.dtype) -> None:
    """With logits that say little, so that every rounding error would be seen."""
    torch.manual_seed(5)
    model = Transformer(ModelConfig(vocab_size=997, context_length=64, n_layer=3, n_head=3, n_embd=96)).to(dtype)
    rng = random.Random(3)
    prompts = [[rng.randrange(997) for _ in range(rng.randint(1, 40))] for _ in range(50)]
    params = [SamplingParams(max_tokens=20, temperature=1.0, seed=n, logprobs=0) for n in range(50)]
    wanted = EngineSettings(reproducible=True, step_tokens=32)
    crowd = [Request(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    run(Engine(model, settings=wanted), crowd)
    for n in (0, 7, 31, 49):
        alone = Request(prompts[n], params[n])
        run(Engine(model, settings=wanted), [alone])
        assert alone.tokens == crowd[n].tokens
        assert alone.completions[0].logprobs == crowd[n].completions[0].logprobs


def test_a_request_ended_from_outside_leaves_the_others_alone() -> None:
    model = make({})
    wanted = expected(model, PROMPTS, GREEDY)
    requests = [Request(prompt, GREEDY) for prompt in PROMPTS]
    for number, _ in enumerate(Engine(model).run(requests)):
        if number == 4:
            requests[0].end("stopped")
            requests[2].end("stopped")
    assert [request.tokens for request in requests] == [wanted[0][:5], wanted[1], wanted[2][:5], wanted[3]]


def test_global_randomness_is_neither_used_nor_changed() -> None:
    model = make({})
    request = Request(PROMPTS[0], SamplingParams(max_tokens=9, seed=5))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run(Engine(model), [request])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert run(Engine(model), [Request(PROMPTS[0], SamplingParams(max_tokens=9, seed=5))]) == first
