"""Searches give what plain loops that recompute everything give, and transformers where it still has them; and they
live with whatever the engine does: preemption, full caches, windows that move, clients that go, numbers that are none.
"""

# V vocabulary   T tokens   E embedding   K tokens that are tried

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from groundup.cli.generate import main as generate
from groundup.inference import Engine, EngineSettings, LanguageModel, PromptLookup, Request, SamplingParams
from groundup.model import ModelConfig, Transformer, save_model
from groundup.runtime import GroundupError, UsageError

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
END, LLAMA_END = 30, 38  # tokens that the two models do say
BEAMS = SamplingParams(beams=4, n=4, max_tokens=12)
CONTRASTIVE = SamplingParams(contrastive_alpha=0.6, top_k=4, max_tokens=12)


def built(**fields: Any) -> Transformer:
    torch.manual_seed(31)
    sizes = dict(vocab_size=53, context_length=64, n_layer=2, n_head=2, n_embd=22, head_dim=8, n_ff=29, init_std=0.4)
    return Transformer(ModelConfig.from_dict(sizes | fields)).eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return built().double()


def run(engine: Engine, *requests: Request) -> None:
    for _ in engine.run(requests):
        pass


def nothing_held(engine: Engine) -> bool:
    idle = (engine.scheduler.waiting, engine.scheduler.running) == ([], [])
    return idle and all(group.pool.held == 0 for group in engine.paged.groups)


def outcome(request: Request) -> list[tuple[list[int], str | None]]:
    return [(one.tokens, one.finish) for one in request.completions]


def scores(request: Request) -> list[float]:
    return [one.score for one in request.completions if one.score is not None]


def watched(engine: Engine) -> Counter[str]:
    """Counts the engine's forward passes, and the tokens in them."""
    assert engine.scheduler is not None
    counts, plain = Counter[str](), engine._runner.run

    def counted(works: Any, wanted: Any) -> list[Tensor]:
        counts["steps"] += 1
        counts["tokens"] += sum(work.queries for work in works)
        return plain(works, wanted)

    engine._runner.run = counted  # type: ignore[method-assign]
    return counts


# ---- beam search by the book: every text is a list of tokens, and everything is computed again for each


@dataclass
class Naive:
    """Beam search, one group after the other at each place."""

    model: Transformer
    params: SamplingParams
    end: int
    ended: list[list[tuple[float, list[int]]]] = field(default_factory=list)

    @torch.inference_mode()
    def log_p(self, tokens: list[int]) -> Tensor:
        """Of the next token, V; after penalties."""
        found = self.model(torch.tensor([tokens[-self.model.config.context_length :]]))[0, -1].float().log_softmax(-1)
        for token in set(tokens) if self.params.repetition_penalty != 1.0 else ():
            found[token] *= self.params.repetition_penalty
        return found

    def search(self, prompt: list[int]) -> list[tuple[float, list[int]]]:
        groups, params = self.params.beam_groups, self.params
        size = params.beams // groups
        live: list[list[tuple[float, list[int]]]] = [[(0.0, prompt)] for _ in range(groups)]
        self.ended = [[] for _ in range(groups)]
        for length in range(1, params.max_tokens + 1):
            said: list[int] = []
            for number in range(groups):
                if not live[number]:
                    continue
                every: list[tuple[float, list[int]]] = []
                for score, tokens in live[number]:
                    log_p = self.log_p(tokens)
                    for token in range(len(log_p)):
                        off = params.diversity_penalty * said.count(token)
                        every.append((score + log_p[token].item() - off, [*tokens, token]))
                every.sort(key=lambda one: -one[0])
                over = [tokens[-1] == self.end or length == params.max_tokens for _, tokens in every[: 2 * size]]
                for rank, (score, tokens) in enumerate(every[:size]):
                    if over[rank]:
                        self.ended[number].append((score / length**params.length_penalty, tokens[len(prompt) :]))
                self.ended[number] = sorted(self.ended[number], key=lambda one: -one[0])[:size]
                goes_on = [one for one, is_over in zip(every, over, strict=False) if not is_over][:size]
                live[number] = goes_on if self.hopes(number, goes_on, length, size) else []
                said += [tokens[-1] for _, tokens in live[number]]
        found = sorted((one for group in self.ended for one in group), key=lambda one: -one[0])
        return [(score, tokens[:-1] if tokens[-1] == self.end else tokens) for score, tokens in found]

    def hopes(self, number: int, goes_on: list[tuple[float, list[int]]], length: int, size: int) -> bool:
        if len(self.ended[number]) < size or not goes_on:
            return bool(goes_on)
        if self.params.early_stopping == "full":
            return False
        never = self.params.early_stopping == "never" and self.params.length_penalty > 0
        at = self.params.max_tokens if never else length
        return goes_on[0][0] / at**self.params.length_penalty > self.ended[number][-1][0]


@pytest.mark.parametrize(
    "fields",
    [
        {"beams": 4},
        {"beams": 3, "early_stopping": "full", "length_penalty": 2.0},
        {"beams": 5, "early_stopping": "never", "length_penalty": -0.5},
        {"beams": 4, "beam_groups": 2, "diversity_penalty": 0.7},
        {"beams": 6, "beam_groups": 3, "diversity_penalty": 2.5, "early_stopping": "full"},
        {"beams": 6, "beam_groups": 2, "diversity_penalty": 0.3, "early_stopping": "never", "length_penalty": 0.3},
        {"beams": 3, "beam_groups": 3, "diversity_penalty": 1.1, "repetition_penalty": 1.4},
    ],
)
def test_beams_are_those_of_a_plain_loop(model: Transformer, fields: dict[str, Any]) -> None:
    params = SamplingParams(**{"max_tokens": 9} | fields)
    params = replace(params, n=params.beams)
    endings = 0
    for prompt in (PROMPT, [11, 2], [8]):
        request = Request(prompt, params)
        run(Engine(model, end_of_text=END, settings=EngineSettings(block=4)), request)
        expected = Naive(model, params, END).search(prompt)
        assert [one.tokens for one in request.completions] == [tokens for _, tokens in expected]
        assert scores(request) == pytest.approx([score for score, _ in expected], abs=1e-4)
        endings += sum(one.finish == "end_of_text" for one in request.completions)
    assert endings > 0  # or nothing was said about how texts end


def test_as_many_beams_as_there_are_beginnings_find_the_best_of_all_texts() -> None:
    model = built(vocab_size=7).double()
    request = Request([3, 1], SamplingParams(beams=49, n=6, max_tokens=3, length_penalty=0.0))
    run(Engine(model), request)

    @torch.inference_mode()
    def log_p(text: tuple[int, ...]) -> float:
        rows = model(torch.tensor([[3, 1, *text]]))[0].log_softmax(-1)
        return sum(rows[1 + place, token].item() for place, token in enumerate(text))

    best = sorted(((log_p(text), text) for text in itertools.product(range(7), repeat=3)), reverse=True)[:6]
    assert [tuple(one.tokens) for one in request.completions] == [text for _, text in best]
    assert scores(request) == pytest.approx([score for score, _ in best], abs=1e-5)


def test_groups_that_may_not_say_the_same_take_the_likeliest_tokens_in_their_order(model: Transformer) -> None:
    request = Request(PROMPT, SamplingParams(beams=5, n=5, beam_groups=5, diversity_penalty=100.0, max_tokens=2))
    run(Engine(model), request)
    first = model(torch.tensor([PROMPT]))[0, -1].topk(5).indices.tolist()
    assert {one.tokens[0] for one in request.completions} == set(first)
    assert len({one.tokens[1] for one in request.completions}) == 5
    # The first group is a greedy search; the others have paid for nothing, as no token of theirs is said twice.
    greedy = Request(PROMPT, SamplingParams(temperature=0.0, max_tokens=2))
    run(Engine(model), greedy)
    assert greedy.tokens in [one.tokens for one in request.completions]


def test_logprobs_are_the_models_own_and_add_up_to_the_score(model: Transformer) -> None:
    params = replace(BEAMS, logprobs=2, prompt_logprobs=0, length_penalty=0.5)
    request = Request(PROMPT, params)
    run(Engine(model), request)
    for one in request.completions:
        log_p = model(torch.tensor([PROMPT + one.tokens]))[0].log_softmax(-1)
        rows = range(len(PROMPT) - 1, len(PROMPT) - 1 + len(one.tokens))
        expected = [log_p[row, token].item() for row, token in zip(rows, one.tokens, strict=True)]
        assert one.logprobs == pytest.approx(expected, abs=1e-5)
        assert one.score == pytest.approx(sum(expected) / len(expected) ** 0.5, abs=1e-4)
        assert [[token for token, _ in some] for some in one.alternatives] == log_p[rows].topk(2).indices.tolist()
    assert len(request.prompt_logprobs) == len(PROMPT) - 1


# ---- transformers


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Transformer, Any]]:
    """The same small random Llama, here and there."""
    transformers = pytest.importorskip("transformers")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    model = built(n_kv_head=1, norm_eps=1e-5)
    folder: Path = tmp_path_factory.mktemp("llama")
    save_model(model, folder)
    yield model, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    transformers.logging.set_verbosity(verbosity)


def theirs(other: Any, prompt: list[int], ends: list[int], **fields: Any) -> tuple[list[list[int]], list[float]]:
    found = other.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), do_sample=False,
        eos_token_id=ends, pad_token_id=ends[0], return_dict_in_generate=True, output_scores=True, **fields,
    )  # fmt: skip
    texts = [[int(token) for token in row[len(prompt) :]] for row in found.sequences]
    return [list(itertools.takewhile(lambda token: token not in ends, text)) for text in texts], [
        float(score) for score in found.sequences_scores
    ]


EARLY = {"estimate": False, "full": True, "never": "never"}


@pytest.mark.parametrize("early_stopping", EARLY)
@pytest.mark.parametrize("beams", [2, 4, 5])
def test_beams_are_those_of_transformers(both: tuple[Transformer, Any], beams: int, early_stopping: Any) -> None:
    model, other = both
    engine = Engine(model, end_of_text=LLAMA_END, settings=EngineSettings(compiled=beams == 4))
    finishes = Counter[str | None]()
    for length_penalty in (1.0, 0.0, 2.5, -1.0):
        for prompt in (PROMPT, [11, 2, 40]):
            params = SamplingParams(
                beams=beams, n=beams, max_tokens=15, length_penalty=length_penalty, early_stopping=early_stopping
            )
            request = Request(prompt, params)
            run(engine, request)
            texts, values = theirs(
                other, prompt, [LLAMA_END], num_beams=beams, num_return_sequences=beams, max_new_tokens=15,
                length_penalty=length_penalty, early_stopping=EARLY[early_stopping],
            )  # fmt: skip
            assert [one.tokens for one in request.completions] == texts
            assert scores(request) == pytest.approx(values, abs=1e-4)
            finishes.update(one.finish for one in request.completions)
    assert finishes["end_of_text"] > 3
    assert nothing_held(engine)


@pytest.mark.parametrize(
    ("ours", "options"),
    [
        ({"repetition_penalty": 1.6}, {"repetition_penalty": 1.6}),
        ({"no_repeat_ngram": 2}, {"no_repeat_ngram_size": 2}),
        ({"min_tokens": 6}, {"min_new_tokens": 6}),
        ({"bad_tokens": ((5,), (3, 1))}, {"bad_words_ids": [[5], [3, 1]]}),
        ({"stop_tokens": (2, 30)}, {}),
    ],
)
def test_what_edits_logits_follows_its_beam_as_in_transformers(
    both: tuple[Transformer, Any], ours: dict[str, Any], options: dict[str, Any]
) -> None:
    model, other = both
    request = Request(PROMPT, SamplingParams(beams=4, n=3, max_tokens=14, **ours))
    run(Engine(model, end_of_text=LLAMA_END, settings=EngineSettings(compiled=False)), request)
    ends = [LLAMA_END, *ours.get("stop_tokens", ())]
    texts, values = theirs(
        other, PROMPT, ends, num_beams=4, num_return_sequences=3, max_new_tokens=14, **options
    )  # fmt: skip
    assert [one.tokens for one in request.completions] == texts
    assert scores(request) == pytest.approx(values, abs=1e-4)


# ---- contrastive search by the book


@torch.inference_mode()
def contrastive(model: Transformer, prompt: list[int], params: SamplingParams, end: int) -> list[int]:
    """Every candidate is computed from the beginning. A context that slides is the window that the engine moves."""
    tokens, context = list(prompt), model.config.context_length
    while len(tokens) < len(prompt) + params.max_tokens:
        scored = []
        for token in model(torch.tensor([window(tokens, context)]))[0, -1].topk(params.top_k or 0).indices.tolist():
            p = model(torch.tensor([window(tokens, context)]))[0, -1].softmax(-1)[token].item()
            features_TE = model.features(torch.tensor([window([*tokens, token], context)]))[0]
            likeness = max(F.cosine_similarity(features_TE[-1], row, dim=0).item() for row in features_TE[:-1])
            alpha = params.contrastive_alpha
            scored.append(((1 - alpha) * p - alpha * likeness, token))
        token = max(scored)[1]
        if token == end:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def window(tokens: list[int], context: int) -> list[int]:
    while len(tokens) > context:
        tokens = tokens[context - context // 2 :]
    return tokens


@pytest.mark.parametrize(("alpha", "top_k"), [(0.3, 2), (0.6, 5), (0.9, 3), (1.0, 4)])
def test_contrastive_search_is_that_of_a_plain_loop(model: Transformer, alpha: float, top_k: int) -> None:
    params = SamplingParams(contrastive_alpha=alpha, top_k=top_k, max_tokens=13)
    engine = Engine(model, end_of_text=END, settings=EngineSettings(block=4))
    greedy = Request(PROMPT, SamplingParams(temperature=0.0, max_tokens=13))
    run(engine, greedy)  # and what it computed of the prompt is there to be found
    different = 0
    for prompt in (PROMPT, [11, 2], [8]):
        request = Request(prompt, params)
        run(engine, request)
        expected = contrastive(model, prompt, params, END)
        assert request.tokens == expected
        assert request.finish == ("length" if len(expected) == 13 else "end_of_text")
        different += prompt == PROMPT and expected != greedy.tokens
    assert different
    assert nothing_held(engine)


def test_contrastive_search_with_little_contrast_is_greedy(model: Transformer) -> None:
    request = Request(PROMPT, replace(CONTRASTIVE, contrastive_alpha=1e-9, repetition_penalty=1.3, logprobs=1))
    greedy = Request(PROMPT, SamplingParams(temperature=0.0, max_tokens=12, repetition_penalty=1.3, logprobs=1))
    run(Engine(model), request, greedy)
    assert request.tokens == greedy.tokens
    (one,), (other,) = request.completions, greedy.completions
    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert [[token for token, _ in some] for some in one.alternatives] == [
        [token for token, _ in some] for some in other.alternatives
    ]


def test_contrastive_search_in_a_window_that_moves() -> None:
    model = built(context_length=16).double()
    params = replace(CONTRASTIVE, max_tokens=25)
    request, ends = Request(PROMPT, params, slide=True), Request(PROMPT, params)
    engine = Engine(model, settings=EngineSettings(block=4))
    run(engine, request, ends)
    assert request.tokens == contrastive(model, PROMPT, params, -1)
    assert ends.tokens == request.tokens[: 16 - len(PROMPT)]  # each token that is weighed has to be computed first
    assert ends.finish == "length"
    assert nothing_held(engine)


def test_contrastive_search_by_the_compiled_kernels() -> None:
    model = built()
    request = Request(PROMPT, CONTRASTIVE)
    run(Engine(model), request)
    assert request.tokens == contrastive(model.double(), PROMPT, CONTRASTIVE, -1)


# ---- what it costs


def test_nothing_is_computed_twice(model: Transformer) -> None:
    engine = Engine(model, settings=EngineSettings(block=4, prefix_cache=False))
    for request, tokens in (
        (Request(PROMPT, BEAMS), len(PROMPT) + 4 * 11),
        (Request(PROMPT, replace(BEAMS, beam_groups=2, diversity_penalty=0.5)), len(PROMPT) + 4 * 11),
        (Request(PROMPT, CONTRASTIVE), len(PROMPT) + 4 * 12),
    ):
        counts = watched(engine)
        run(engine, request)
        steps = len(request.tokens) + (request.params.beams == 1)
        assert counts == {"steps": steps, "tokens": tokens}
        assert nothing_held(engine)


def test_beams_share_the_blocks_of_what_they_have_in_common(model: Transformer) -> None:
    engine = Engine(model, settings=EngineSettings(block=4))
    engine.add(Request(PROMPT * 3, replace(BEAMS, max_tokens=4)))
    (pool,) = [group.pool for group in engine.paged.groups]
    plain, held = engine._runner.run, []

    def looked_at(works: Any, wanted: Any) -> list[Tensor]:
        held.append(pool.held)
        return plain(works, wanted)

    engine._runner.run = looked_at  # type: ignore[method-assign]
    while engine.busy:
        engine.step()
    assert held[:2] == [9, 9 + 3]  # thirty-three tokens in blocks of four; then all but one copy the one they write to
    assert max(held) <= 9 + 3
    assert nothing_held(engine)


def test_others_run_beside_it_in_the_same_steps(model: Transformer) -> None:
    plain = [
        SamplingParams(temperature=0.0, max_tokens=12),
        SamplingParams(seed=5, max_tokens=9, n=3, temperature=1.0),
        BEAMS,
        replace(BEAMS, beam_groups=2, diversity_penalty=0.5, repetition_penalty=1.2),
        CONTRASTIVE,
    ]
    alone = [Request([n, *PROMPT], params) for n, params in enumerate(plain)]
    for request in alone:
        run(Engine(model), request)
    together = [Request([n, *PROMPT], params) for n, params in enumerate(plain)]
    engine = Engine(model, drafter=PromptLookup())
    counts = watched(engine)
    run(engine, *together)
    assert [outcome(one) for one in together] == [outcome(one) for one in alone]
    assert counts["steps"] == 13  # as many as the longest, the contrastive search, takes alone
    assert nothing_held(engine)


def test_reproducible_means_bit_for_bit() -> None:
    engine = Engine(built(), settings=EngineSettings(reproducible=True))
    alone = [Request(PROMPT, BEAMS), Request(PROMPT, CONTRASTIVE)]
    for request in alone:
        run(engine, request)
    among = [Request(PROMPT, BEAMS), Request(PROMPT, CONTRASTIVE)]
    run(engine, among[0], *[Request([n, 2, n], replace(BEAMS, max_tokens=n)) for n in range(1, 9)], among[1])
    assert [outcome(one) for one in among] == [outcome(one) for one in alone]
    assert scores(among[0]) == scores(alone[0])


# ---- what comes between


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("params", [BEAMS, replace(BEAMS, beam_groups=2, diversity_penalty=0.5), CONTRASTIVE])
@pytest.mark.parametrize(
    "fields",
    [
        {"cache_tokens": 24},
        {"cache_tokens": 40, "step_tokens": 3},
        {"step_tokens": 3, "reproducible": True},
        {"max_sequences": 2},
    ],
)
def test_a_cache_or_a_step_that_has_no_room_for_all(
    model: Transformer, params: SamplingParams, fields: dict[str, Any], prefix_cache: bool
) -> None:
    free = Request(PROMPT, params)
    run(Engine(model), free)
    engine = Engine(model, settings=EngineSettings(block=4, prefix_cache=prefix_cache, **fields))
    request = Request(PROMPT, params)
    run(engine, request)
    assert outcome(request) == outcome(free)
    assert scores(request) == pytest.approx(scores(free), abs=1e-4)
    if fields == {"cache_tokens": 24}:
        assert engine.scheduler.preempted > 0
    assert nothing_held(engine)


@pytest.mark.parametrize("params", [BEAMS, CONTRASTIVE])
def test_one_that_is_more_urgent_takes_its_place_for_a_while(model: Transformer, params: SamplingParams) -> None:
    free, urgent = Request(PROMPT, params), Request([9] * 20, SamplingParams(temperature=0.0, max_tokens=8))
    run(Engine(model), free)
    engine = Engine(model, settings=EngineSettings(block=4, cache_tokens=48, prefix_cache=False))
    request = Request(PROMPT, params, priority=1)
    engine.add(request)
    for _ in range(6):
        engine.step()
    run(engine, urgent)
    assert urgent.finish == "length"
    assert engine.scheduler.preempted > 0
    run(engine, Request(PROMPT, params, priority=1))  # and waits for the first one
    assert outcome(request) == outcome(free)
    assert nothing_held(engine)


@pytest.mark.parametrize("params", [BEAMS, CONTRASTIVE])
def test_a_text_that_no_cache_holds_is_said_and_the_others_are_served(
    model: Transformer, params: SamplingParams
) -> None:
    engine = Engine(model, settings=EngineSettings(block=4, cache_tokens=20))
    grows, fits = Request(PROMPT, params), Request(PROMPT[:4], replace(params, max_tokens=5))
    with pytest.raises(GroundupError, match=r"the cache has no room for 21 tokens|more than the cache holds"):
        run(engine, grows, fits)
    free = Request(PROMPT[:4], replace(params, max_tokens=5))
    run(Engine(model), free)
    assert outcome(fits) == outcome(free)
    assert nothing_held(engine)


def test_beams_in_a_window_that_moves() -> None:
    model = built(context_length=16).double()
    params = replace(BEAMS, max_tokens=25)
    request, ends = Request(PROMPT, params, slide=True), Request(PROMPT, params)
    engine = Engine(model, settings=EngineSettings(block=4))
    run(engine, request, ends)

    class Sliding(Naive):
        def log_p(self, tokens: list[int]) -> Tensor:
            return super().log_p(window(tokens, 16))

    expected = Sliding(model, params, -1).search(PROMPT)
    assert [one.tokens for one in request.completions] == [tokens for _, tokens in expected]
    assert [len(one.tokens) for one in ends.completions] == [16 - len(PROMPT) + 1] * 4
    assert [one.finish for one in ends.completions] == ["length"] * 4


@pytest.mark.parametrize("params", [BEAMS, CONTRASTIVE])
def test_a_client_that_vanishes_costs_nothing(model: Transformer, params: SamplingParams) -> None:
    engine = Engine(model)
    stays = Request(PROMPT, params)
    engine.add(stays)
    leaves = engine.run([Request([5, 5, 5], replace(params, max_tokens=40))])
    for _ in range(4):
        next(leaves)
    leaves.close()
    while engine.busy:
        engine.step()
    alone = Request(PROMPT, params)
    run(Engine(model), alone)
    assert outcome(stays) == outcome(alone)
    assert nothing_held(engine)


@pytest.mark.parametrize("params", [BEAMS, CONTRASTIVE])
def test_logits_that_are_not_numbers_end_the_request_that_has_them(model: Transformer, params: SamplingParams) -> None:
    sick = built().double()
    with torch.no_grad():
        sick.head.weight = torch.nn.Parameter(sick.head.weight.clone())
        sick.embedding.weight[44] = float("nan")
    engine = Engine(sick, settings=EngineSettings(block=4))
    well = Request(PROMPT, replace(params, logit_bias={44: -100.0}))
    ill = Request(PROMPT, replace(params, logit_bias={44: 100.0}))  # it is computed in the second step
    with pytest.raises(GroundupError, match="not finite"):
        run(engine, well, ill)
    assert (well.finish, ill.finish) == ("length", "error")
    alone = Request(PROMPT, replace(params, logit_bias={44: -100.0}))
    run(Engine(model), alone)
    assert outcome(well) == outcome(alone)
    assert nothing_held(engine)


def test_searches_of_all_kinds_leak_nothing(model: Transformer) -> None:
    engine = Engine(model, end_of_text=END, settings=EngineSettings(cache_tokens=160, block=4, max_sequences=12))
    rng = random.Random(7)
    kinds: list[dict[str, Any]] = [
        {}, {"n": 2}, {"beams": 3, "n": 2}, {"beams": 4, "beam_groups": 2, "diversity_penalty": 1.0},
        {"contrastive_alpha": 0.5, "top_k": 3},
    ]  # fmt: skip
    requests = [
        Request(
            [rng.randrange(53) for _ in range(rng.randint(1, 30))],
            SamplingParams(max_tokens=rng.randint(1, 9), seed=n, **rng.choice(kinds)), priority=rng.randint(0, 2),
        )
        for n in range(150)
    ]  # fmt: skip
    for request in requests:
        engine.add(request)
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
        assert steps < 5000
        if steps % 7 == 0:
            requests[rng.randrange(150)].end("cancelled")
    assert all(request.finish is not None and request.error is None for request in requests)
    assert engine.scheduler.preempted > 0
    assert nothing_held(engine)
    assert engine.paged.groups[0].pool.available == 40


# ---- grammars and stop texts


class Rising:
    """Each token is larger than the one before, by at most nine; after 50 there is only the end, or nothing."""

    def __init__(self, last: int, ends: bool = True) -> None:
        self.last, self.ends = last, ends

    def allowed(self) -> Tensor:
        mask = torch.zeros(53, dtype=torch.bool)
        mask[self.last + 1 : min(51, self.last + 10)] = True
        return mask

    def advance(self, token: int) -> None:
        assert self.last < token <= self.last + 9
        self.last = token

    def finished(self) -> bool:
        return self.ends and self.last >= 50

    def copy(self) -> Rising:
        return Rising(self.last, self.ends)


def test_a_grammar_follows_its_beam(model: Transformer) -> None:
    for params in (replace(BEAMS, max_tokens=40), replace(CONTRASTIVE, max_tokens=40)):
        request = Request([7], params, mask=Rising(7))
        engine = Engine(model, end_of_text=0)
        run(engine, request)
        for one in request.completions:
            assert one.tokens[-1] == 50
            assert all(0 < after - before <= 9 for before, after in itertools.pairwise([7, *one.tokens]))
            assert one.finish == "end_of_text"
        assert len({tuple(one.tokens) for one in request.completions}) == len(request.completions)
        assert nothing_held(engine)


def test_a_grammar_that_leads_nowhere_ends_what_follows_it(model: Transformer) -> None:
    ends = Request([41], replace(BEAMS, max_tokens=2), mask=Rising(48, ends=False))
    engine = Engine(model, end_of_text=0)
    run(engine, ends)
    assert outcome(ends) == [([49, 50], "length")]  # there is one text of that length, though four were asked for
    for params in (BEAMS, CONTRASTIVE):
        nothing = Request([41], params, mask=Rising(48, ends=False))
        with pytest.raises(GroundupError, match="no token may come next"):
            run(engine, nothing)
        assert nothing_held(engine)


@pytest.mark.parametrize("sampling", [{"beams": 3}, {"contrastive_alpha": 0.5, "top_k": 3}])
def test_stop_texts_end_a_text_and_are_no_part_of_it(lm: LanguageModel, sampling: dict[str, Any]) -> None:
    (free,) = lm.complete(["the cat"], max_tokens=20, **sampling)[0]
    stop = next(free.text[at : at + 3] for at in range(4, 20) if free.text[at : at + 3] not in free.text[: at + 2])
    (ended,) = lm.complete(["the cat"], max_tokens=20, stop=stop, **sampling)[0]
    assert stop not in ended.text
    if "beams" not in sampling:  # where another text may have taken its place
        assert ended.finish == "stopped"
        assert ended.text == free.text[: free.text.index(stop)]


def test_a_beam_search_knows_which_of_its_texts_have_met_a_stop_text(lm: LanguageModel) -> None:
    """With one letter to stop at, ``full`` ends a search when as many texts have met it as there are beams."""
    prompt, fields = "the cat", {"beams": 3, "n": 3, "max_tokens": 40, "early_stopping": "full"}
    free = lm.complete([prompt], SamplingParams(**fields))[0]  # type: ignore[arg-type]
    ((letter, _),) = Counter(sorted("".join(one.text for one in free))).most_common(1)
    found = lm.complete([prompt], SamplingParams(stop=(letter,), **fields))[0]  # type: ignore[arg-type]
    assert [one.finish for one in found] == ["stopped"] * 3
    for one in found:
        assert letter not in one.text
        assert letter in lm.tokenizer.decode(one.tokens, continued=True)
        assert letter not in lm.tokenizer.decode(one.tokens[:-1], continued=True)
        assert len(one.tokens) < 40


def test_a_beam_search_streams_its_text_when_it_is_known(lm: LanguageModel) -> None:
    text = lm.generate("the cat", beams=4, max_tokens=10)
    assert "".join(lm.stream("the cat", beams=4, max_tokens=10)) == text
    assert asyncio.run(lm.agenerate("the cat", beams=4, max_tokens=10)) == text
    assert lm.generate("the cat", beams=4, max_tokens=10, seed=3, temperature=0.0) == text
    (best, second) = lm.complete(["the cat"], beams=4, n=2, max_tokens=10)[0]
    assert best.text == text
    assert best.score is not None
    assert second.score is not None
    assert best.score > second.score
    assert lm.complete(["the cat"], max_tokens=2)[0][0].score is None


# ---- what cannot be asked for


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"beams": 0}, "beams = 0 must be at least 1"),
        ({"beams": 2, "n": 3}, "n = 3 is more than beams = 2"),
        ({"beams": 4, "beam_groups": 3, "diversity_penalty": 1.0}, "beam_groups = 3 does not divide beams = 4"),
        ({"beams": 4, "beam_groups": 2}, "beam_groups and diversity_penalty belong together"),
        ({"beams": 4, "diversity_penalty": 1.0}, "beam_groups and diversity_penalty belong together"),
        ({"beams": 4, "diversity_penalty": -1.0}, r"diversity_penalty = -1\.0 must be 0 or more"),
        ({"beams": 4, "length_penalty": 11.0}, r"length_penalty = 11\.0 must be between -10 and 10"),
        ({"beams": 4, "early_stopping": True}, "early_stopping = True must be one of estimate, full, never"),
        ({"beams": 4, "temperature": 0.7}, r"temperature = 0\.7: beam search draws nothing"),
        ({"beams": 4, "top_k": 5}, "top_k = 5: beam search draws nothing"),
        ({"beams": 4, "top_p": 0.9}, r"top_p = 0\.9: beam search draws nothing"),
        ({"beams": 4, "mirostat": 2}, "mirostat = 2: beam search draws nothing"),
        ({"beams": 4, "best_of": 4}, "best_of = 4: beam search draws nothing"),
        ({"beams": 4, "contrastive_alpha": 0.6, "top_k": 4}, "beams and contrastive_alpha are both given"),
        ({"length_penalty": 2.0}, "length_penalty belongs to beam search: give beams, 2 or more"),
        ({"early_stopping": "never"}, "early_stopping belongs to beam search"),
        ({"beam_groups": 2}, "beam_groups belongs to beam search"),
        ({"contrastive_alpha": 0.6}, "contrastive_alpha needs top_k"),
        ({"contrastive_alpha": 1.5, "top_k": 4}, r"contrastive_alpha = 1\.5 must be at least 0 and at most 1"),
        ({"contrastive_alpha": 0.6, "top_k": 4, "n": 2}, "n = 2: contrastive search finds one text"),
        ({"contrastive_alpha": 0.6, "top_k": 4, "min_p": 0.1}, r"min_p = 0\.1: contrastive search draws nothing"),
    ],
)
def test_what_has_no_meaning_is_refused_in_one_line(params: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        SamplingParams.of(**params)
    assert "\n" not in str(error.value)


def test_the_command_line_has_the_flags_and_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        generate(["--help"])
    shown = capsys.readouterr().out
    for flag in ("--beams", "--length-penalty", "--early-stopping", "--beam-groups", "--contrastive-alpha"):
        assert flag in shown
    with pytest.raises(UsageError, match="n = 5 is more than beams = 2"):
        generate(["model", "Once", "--beams", "2", "--n", "5"])
    with pytest.raises(UsageError, match="early"):
        generate(["model", "Once", "--beams", "2", "--early-stopping", "soon"])
