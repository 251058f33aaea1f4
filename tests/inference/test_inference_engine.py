"""What the engine does for many: completions, log-probabilities, errors that are one request's alone, nothing lost."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from groundup.inference import Engine, EngineSettings, LanguageModel, PromptLookup, Request, SamplingParams
from groundup.inference.drafts import PromptLookup as Lookup
from groundup.model import ModelConfig, Transformer
from groundup.runtime import GroundupError, UsageError

GREEDY = SamplingParams(temperature=0.0, max_tokens=9)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(31)
    sizes = dict(vocab_size=53, context_length=64, n_layer=2, n_head=2, n_embd=22, head_dim=8, n_ff=29, init_std=0.4)
    return Transformer(ModelConfig.from_dict(sizes)).double().eval()


def run(engine: Engine, *requests: Request) -> None:
    for _ in engine.run(requests):
        pass


def finish(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def nothing_held(engine: Engine) -> bool:
    return all(group.pool.held == 0 for group in engine.paged.groups)


# ---- several completions


def test_the_completions_of_a_prompt_share_its_blocks_and_go_their_own_ways(model: Transformer) -> None:
    engine = Engine(model, settings=EngineSettings(block=4))
    params = SamplingParams(n=4, max_tokens=12, seed=5, temperature=1.0)
    request = Request(PROMPT, params)
    engine.add(request)
    engine.step()
    (group,) = engine.paged.groups
    assert group.pool.held == 3  # eleven tokens in blocks of four, once
    engine.step()
    assert group.pool.held == 3 + 3  # three copies of the block they write into
    finish(engine)
    assert nothing_held(engine)
    texts = [tuple(one.tokens) for one in request.completions]
    assert len(set(texts)) == 4
    assert [one.finish for one in request.completions] == ["length"] * 4
    alone = Request(PROMPT, replace(params, n=1))
    run(Engine(model), alone)
    assert tuple(alone.tokens) == texts[0]  # the first is what n = 1 gives
    again = Request(PROMPT, params)
    run(engine, again, Request([7, 7], params))
    assert [tuple(one.tokens) for one in again.completions] == texts


def test_greedy_completions_are_all_the_same(model: Transformer) -> None:
    request = Request(PROMPT, replace(GREEDY, n=3))
    run(Engine(model, settings=EngineSettings(cache_tokens=40, block=3)), request)
    assert request.completions[0].tokens == request.completions[1].tokens == request.completions[2].tokens


def test_the_best_of_several_are_kept(model: Transformer) -> None:
    params = SamplingParams(best_of=6, n=2, max_tokens=8, seed=1, logprobs=0)
    request = Request(PROMPT, params)
    run(Engine(model), request)
    every = Request(PROMPT, replace(params, best_of=None, n=6))
    run(Engine(model), every)

    def mean(one: Any) -> float:
        return sum(one.logprobs) / len(one.logprobs)

    best = sorted(every.completions, key=mean, reverse=True)[:2]
    assert [one.tokens for one in request.completions] == [one.tokens for one in best]


# ---- log-probabilities


@torch.inference_mode()
def test_logprobs_are_those_of_the_model(model: Transformer) -> None:
    params = SamplingParams(max_tokens=6, seed=2, temperature=0.7, top_k=5, logprobs=3, prompt_logprobs=2)
    for chunk in (512, 3):
        request = Request(PROMPT, params)
        engine = Engine(model, settings=EngineSettings(step_tokens=chunk, block=2))
        run(engine, Request(PROMPT, GREEDY), request)  # the other one's blocks are there to be found
        (one,) = request.completions
        log_p = model(torch.tensor([PROMPT + one.tokens]))[0].log_softmax(-1)
        for place, (token, logprob, others) in enumerate(
            zip(one.tokens, one.logprobs, one.alternatives, strict=True), start=len(PROMPT) - 1
        ):
            assert logprob == pytest.approx(log_p[place, token].item(), abs=1e-5)
            check_alternatives(others, log_p[place], 3)
        assert len(request.prompt_logprobs) == len(PROMPT) - 1
        for place, (logprob, others) in enumerate(request.prompt_logprobs):
            assert logprob == pytest.approx(log_p[place, PROMPT[place + 1]].item(), abs=1e-5)
            check_alternatives(others, log_p[place], 2)


def check_alternatives(found: list[tuple[int, float]], log_p_V: Tensor, count: int) -> None:
    values, ids = log_p_V.topk(count)
    assert [token for token, _ in found] == ids.tolist()
    assert [value for _, value in found] == pytest.approx(values.tolist(), abs=1e-5)


# ---- how it ends


def test_stop_tokens_end_a_text_and_are_no_part_of_it(model: Transformer) -> None:
    free = Request(PROMPT, GREEDY)
    run(Engine(model), free)
    stop = free.tokens[4]
    request = Request(PROMPT, replace(GREEDY, stop_tokens=(stop, 52)))
    run(Engine(model), request)
    place = free.tokens.index(stop)
    assert request.tokens == free.tokens[:place]
    assert (request.finish, request.completions[0].stop_token) == ("stopped", stop)


def test_a_mask_is_followed_and_a_text_ends_when_it_does(model: Transformer) -> None:
    class OnlyThese:
        """Three tokens in their order, then the end."""

        def __init__(self) -> None:
            self.left = [11, 7, 13]

        def allowed(self) -> Tensor:
            mask = torch.zeros(53, dtype=torch.bool)
            mask[self.left[0] if self.left else 0] = True
            return mask

        def advance(self, token: int) -> None:
            assert token == self.left.pop(0)

        def finished(self) -> bool:
            return not self.left

        def copy(self) -> OnlyThese:
            return OnlyThese()

    request = Request(PROMPT, replace(GREEDY, max_tokens=30), mask=OnlyThese())
    run(Engine(model, end_of_text=0, drafter=PromptLookup()), request)
    assert request.tokens == [11, 7, 13]
    assert request.finish == "end_of_text"


# ---- what goes wrong is one request's alone


def test_a_bad_request_ends_at_once_and_the_others_are_served(model: Transformer) -> None:
    engine = Engine(model)
    good = [Request(PROMPT, GREEDY), Request([5], GREEDY)]
    bad = [
        (Request([], GREEDY), "the prompt is empty"),
        (Request([53], GREEDY), "the token id 53 is outside the model's vocabulary of 53"),
        (Request([1] * 65, GREEDY), "the prompt has 65 tokens, the model's context 64"),
    ]
    for request, _ in bad:
        engine.add(request)
        assert request.finish == "error"
    with pytest.raises(UsageError, match="the prompt is empty"):
        run(engine, good[0], Request([], GREEDY), good[1])
    assert [len(request.tokens) for request in good] == [9, 9]
    for request, message in bad:
        assert message in str(request.error)
    for wrong in ({"max_tokens": 0}, {"max_tokens": -1}, {"n": 0}, {"temperature": -1.0}):
        with pytest.raises(UsageError):
            replace(GREEDY, **wrong)


def test_logits_that_are_not_numbers_end_the_request_that_has_them(model: Transformer) -> None:
    sick = Transformer(model.config).double().eval()
    sick.load_state_dict(model.state_dict())
    with torch.no_grad():
        sick.head.weight = torch.nn.Parameter(sick.head.weight.clone())
        sick.embedding.weight[44] = float("nan")
    engine, params = Engine(sick, settings=EngineSettings(block=2)), replace(GREEDY, allowed_tokens=tuple(range(44)))
    well, ill = Request(PROMPT, params), Request([1, 44, 2], params)
    with pytest.raises(GroundupError, match="not finite"):
        run(engine, well, ill)
    assert well.finish == "length"
    assert ill.finish == "error"
    alone = Request(PROMPT, params)
    run(Engine(model), alone)
    assert well.tokens == alone.tokens
    # And the blocks that it wrote its NaN into do no harm to those who get them next.
    engine.paged.groups[0].pool.forget_all()
    again = [Request([n, *PROMPT], params) for n in range(4)]
    run(engine, *again)
    others = [Request([n, *PROMPT], params) for n in range(4)]
    run(Engine(model), *others)
    assert [one.tokens for one in again] == [one.tokens for one in others]


def test_a_model_that_fails_on_one_request_serves_the_others(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model)
    wanted = Request(PROMPT, GREEDY)
    run(engine, wanted)
    features = Transformer.features

    def failing(self: Transformer, ids_BT: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if 44 in ids_BT:
            raise RuntimeError("no such kernel")
        return features(self, ids_BT, *arguments, **options)

    monkeypatch.setattr(Transformer, "features", failing)
    well, ill = Request(PROMPT, GREEDY), Request([1, 44, 2], GREEDY)
    with pytest.raises(GroundupError, match="the model failed on this request: no such kernel"):
        run(engine, well, ill)
    assert well.tokens == wanted.tokens
    assert nothing_held(engine)


def test_a_step_that_breaks_is_told_to_everybody_and_the_engine_goes_on(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model)
    run(engine, Request(PROMPT, GREEDY))
    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler, "plan", lambda: 1 / 0)
        with pytest.raises(GroundupError, match="the engine failed: ZeroDivisionError"):
            run(engine, Request(PROMPT, GREEDY))
    request = Request(PROMPT, GREEDY)
    run(engine, request)
    assert len(request.tokens) == 9
    assert nothing_held(engine)


def test_a_cache_that_is_too_small_is_said_and_those_that_fit_are_served(model: Transformer) -> None:
    engine = Engine(model, settings=EngineSettings(cache_tokens=24, block=4))
    long, grows, fits = Request([1] * 40, GREEDY), Request([2] * 20, GREEDY), Request(PROMPT, GREEDY)
    with pytest.raises(GroundupError, match="the prompt's 40 tokens are more than the cache holds \\(24\\)"):
        run(engine, long, grows, fits)
    assert "the cache has no room for 25 tokens: it holds 24 in all" in str(grows.error)
    assert len(grows.tokens) == 5  # what was generated stays
    alone = Request(PROMPT, GREEDY)
    run(Engine(model), alone)
    assert fits.tokens == alone.tokens
    assert nothing_held(engine)


def test_settings_out_of_range_are_one_line() -> None:
    for name, value in (("cache_tokens", -1), ("step_tokens", -1), ("block", 0), ("max_sequences", 0), ("drafts", 0)):
        with pytest.raises(UsageError, match=f"{name} = {value} must be at least"):
            EngineSettings(**{name: value})


# ---- clients that come and go


def test_a_client_that_vanishes_costs_nothing(model: Transformer) -> None:
    engine = Engine(model)
    stays = Request(PROMPT, GREEDY)
    engine.add(stays)
    leaves = engine.run([Request([5, 5, 5], replace(GREEDY, max_tokens=40))])
    next(leaves)
    next(leaves)
    leaves.close()
    finish(engine)
    assert len(stays.tokens) == 9
    assert nothing_held(engine)


def test_a_thousand_requests_leak_nothing(model: Transformer) -> None:
    engine = Engine(model, settings=EngineSettings(cache_tokens=500, block=4, max_sequences=40))
    rng = random.Random(7)
    requests = [
        Request(
            [rng.randrange(53) for _ in range(rng.randint(1, 30))],
            SamplingParams(max_tokens=rng.randint(1, 6), seed=n, n=rng.choice([1, 1, 2])), priority=rng.randint(0, 2),
        )
        for n in range(1000)
    ]  # fmt: skip
    for request in requests:
        engine.add(request)
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
        if steps % 7 == 0:
            requests[rng.randrange(1000)].end("cancelled")
    assert all(request.finish is not None and request.error is None for request in requests)
    assert nothing_held(engine)
    assert (engine.scheduler.waiting, engine.scheduler.running) == ([], [])
    (group,) = engine.paged.groups
    assert group.pool.available == 125


def test_many_threads_use_one_engine(model: Transformer) -> None:
    engine = Engine(model)
    prompts = [[n, 3, 1, 4] for n in range(12)]
    wanted = [Request(prompt, GREEDY) for prompt in prompts]
    run(engine, *wanted)
    found: list[Request] = [Request(prompt, GREEDY) for prompt in prompts]
    threads = [threading.Thread(target=run, args=(engine, request)) for request in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [request.tokens for request in found] == [request.tokens for request in wanted]


def test_in_an_event_loop_and_a_task_that_is_cancelled_lets_go(lm: LanguageModel) -> None:
    settings: dict[str, Any] = dict(max_tokens=15, temperature=1.0)
    prompts = ["the cat", "the dog sat", "naïve 中文"]
    wanted = [lm.generate(prompt, seed=n, **settings) for n, prompt in enumerate(prompts)]

    async def everybody() -> list[str]:
        async def pieces(number: int, prompt: str) -> str:
            return "".join([piece async for piece in lm.astream(prompt, seed=number, **settings)])

        impatient = asyncio.create_task(lm.agenerate("the mat", max_tokens=100_000, temperature=1.0))
        found = await asyncio.gather(*(pieces(n, prompt) for n, prompt in enumerate(prompts)))
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        with pytest.raises(UsageError, match="max_tokens"):
            await lm.agenerate("the", max_tokens=0)
        return list(found)

    assert asyncio.run(everybody()) == wanted
    until = time.monotonic() + 20
    while lm.engine.busy and time.monotonic() < until:
        time.sleep(0.01)
    assert not lm.engine.busy
    assert lm.generate(prompts[0], seed=0, **settings) == wanted[0]  # and the plain way still works beside the thread


# ---- who goes first


def test_a_lower_number_goes_first_and_takes_the_place_of_a_higher_one(model: Transformer) -> None:
    engine = Engine(model, settings=EngineSettings(max_sequences=1))
    later, urgent = Request([5, 6], replace(GREEDY, max_tokens=12), priority=5), Request([7], GREEDY, priority=0)
    ordinary = Request([8], GREEDY, priority=5)
    engine.add(later)
    for _ in range(3):
        engine.step()
    assert len(later.tokens) == 3
    engine.add(ordinary)
    engine.add(urgent)
    order: list[int] = []
    requests = (later, ordinary, urgent)
    while engine.busy:
        engine.step()
        order += [n for n, request in enumerate(requests) if request.finish is not None and n not in order]
    assert order == [2, 0, 1]
    for request in requests:
        alone = Request(request.prompt, request.params)
        run(Engine(model), alone)
        assert alone.tokens == request.tokens


def test_a_long_prompt_is_read_beside_those_that_are_answered(model: Transformer) -> None:
    """Every step gives those a token, and a short prompt need not wait for the long one before it."""
    engine = Engine(model, settings=EngineSettings(step_tokens=8, block=4))
    stream = Request([5], replace(GREEDY, max_tokens=40))
    engine.add(stream)
    engine.step()
    long, short = Request([1] * 50, GREEDY), Request([2, 3, 4], GREEDY)
    engine.add(long)
    engine.add(short)
    for step in range(2, 8):
        engine.step()
        assert len(stream.tokens) == step
        if step == 3:
            assert len(short.tokens) >= 1
    assert long.tokens == []
    finish(engine)
    assert len(long.tokens) == 9


# ---- guessing


def test_what_followed_before_is_guessed() -> None:
    lookup = Lookup(longest=3, shortest=2)
    assert lookup.propose([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]
    assert lookup.propose([1, 2, 9, 7, 1, 2, 8, 1, 2], 9) == [8, 1, 2]  # the latest place
    assert lookup.propose([9, 2, 3, 7, 1, 2, 3, 8, 9, 2, 3], 1) == [7]  # the longest match
    assert lookup.propose([1, 2, 3], 4) == []
    assert lookup.propose([1], 4) == []
    assert lookup.propose([], 4) == []
    assert lookup.propose([5, 5, 5], 4) == [5]  # a match may overlap what it is matched with
    assert Lookup(within=4).propose([1, 2, 3, 1, 2, 9, 9, 1, 2], 1) == []
    assert lookup.propose([256, 1, 0, 1, 256], 3) == []  # bytes of neighbours are no token


def test_guesses_agree_with_a_plain_search() -> None:
    rng = random.Random(1)
    for _ in range(300):
        text = [rng.randrange(4) for _ in range(rng.randint(0, 25))]
        assert Lookup(longest=4, shortest=1).propose(text, 3) == plain_search(text)


def plain_search(text: list[int]) -> list[int]:
    for length in range(min(4, len(text) - 1), 0, -1):
        for begin in range(len(text) - length - 1, -1, -1):
            if text[begin : begin + length] == text[-length:]:
                return text[begin + length : begin + length + 3]
    return []


@pytest.mark.slow
def test_guessing_leaves_the_distribution_as_it_is(model: Transformer) -> None:
    """Chi-square over the first three tokens of many answers: with and without guesses, and the exact probabilities."""
    params = SamplingParams(max_tokens=3, temperature=1.0, top_k=4)
    prompt = [7, 8, 9, 7, 8]
    exact = exact_distribution(model, prompt, 3, 4)
    for drafter in (None, Always()):
        counts: dict[tuple[int, ...], int] = {}
        requests = [Request(prompt, replace(params, seed=n)) for n in range(6000)]
        run(Engine(model, drafter=drafter, settings=EngineSettings(drafts=2)), *requests)
        for request in requests:
            counts[tuple(request.tokens)] = counts.get(tuple(request.tokens), 0) + 1
        assert set(counts) <= set(exact)
        likely = {text: p for text, p in exact.items() if p * 6000 >= 5}
        rest = 1 - sum(likely.values())
        seen = [counts.get(text, 0) for text in likely] + [6000 - sum(counts.get(text, 0) for text in likely)]
        wanted = [6000 * p for p in likely.values()] + [max(6000 * rest, 1e-9)]
        square = sum((a - b) ** 2 / b for a, b in zip(seen, wanted, strict=True) if b > 1)
        freedom = len(likely)
        assert square < freedom + 4 * (2 * freedom) ** 0.5


class Always:
    """Guesses that are often right."""

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        return [9, 7, 8][:most]


@torch.inference_mode()
def exact_distribution(model: Transformer, prompt: list[int], length: int, top_k: int) -> dict[tuple[int, ...], float]:
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer: dict[tuple[int, ...], float] = {}
        for text, p in found.items():
            values, ids = model(torch.tensor([[*prompt, *text]]))[0, -1].topk(top_k)
            for token, q in zip(ids.tolist(), values.softmax(-1).tolist(), strict=True):
                longer[(*text, token)] = p * q
        found = longer
    return found


Build = Callable[..., Transformer]
