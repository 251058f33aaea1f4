"""The sampler of a batch: edits against naive loops and transformers, states, seeds, failures of single rows."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.inference.sampler import Choice, SamplerState, distribution, prompt_logprobs, sample
from groundup.inference.sampling import SamplingParams, choose, probabilities
from groundup.inference.truncation import Candidates, as_surprising
from groundup.runtime import GroundupError, UsageError

V = 31
examples = settings(max_examples=100, deadline=None)
token_lists = st.lists(st.integers(0, 5), min_size=0, max_size=40)  # of few kinds, so that runs come again


def state(prompt: list[int] | None = None, output: list[int] | None = None, **fields: Any) -> SamplerState:
    own = {name: fields.pop(name) for name in ("vocab_size", "end_tokens", "stream", "mask") if name in fields}
    made = SamplerState(SamplingParams(**fields), prompt or [], **{"vocab_size": V} | own)
    for token in output or []:
        made.observe(token)
    return made


def logits_for(seed: int, size: int = V, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


def edited(logits: torch.Tensor, made: SamplerState) -> torch.Tensor:
    """Log-probabilities after all edits: what the sampler draws from at temperature 1, without filters."""
    return distribution(logits, made).log()


def token_of(choice: Choice | GroundupError) -> int:
    assert isinstance(choice, Choice)
    return choice.token


def support(p: torch.Tensor) -> set[int]:
    return set(p.nonzero()[:, 0].tolist())


# ---- edits against their definitions


@given(token_lists, token_lists, st.floats(0.5, 2.0), st.floats(-2, 2), st.floats(-2, 2))
@examples
def test_penalties_are_what_they_say(
    prompt: list[int], output: list[int], repetition: float, presence: float, frequency: float
) -> None:
    logits = logits_for(len(prompt) * 41 + len(output))
    bias = {2: 1.5, 7: -3.0}
    expected = logits.tolist()
    for token in {*prompt, *output}:
        expected[token] = expected[token] * repetition if expected[token] < 0 else expected[token] / repetition
    for token, count in Counter(output).items():
        expected[token] -= presence + frequency * count
    for token, value in bias.items():
        expected[token] += value
    made = state(
        prompt, output, temperature=1.0, repetition_penalty=repetition, presence_penalty=presence,
        frequency_penalty=frequency, logit_bias=bias,
    )  # fmt: skip
    torch.testing.assert_close(distribution(logits, made), torch.tensor(expected).softmax(0), rtol=1e-4, atol=1e-6)


@given(token_lists, token_lists, st.integers(1, 5))
@examples
def test_no_run_of_tokens_comes_twice(prompt: list[int], output: list[int], size: int) -> None:
    text = prompt + output
    runs = {tuple(text[i : i + size]) for i in range(len(text) - size + 1)}
    banned = {token for token in range(V) if (*text[len(text) - size + 1 :], token)[-size:] in runs}
    p = distribution(logits_for(3), state(prompt, output, temperature=1.0, no_repeat_ngram=size))
    assert support(p) == set(range(V)) - banned


@given(token_lists, token_lists, st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=5))
@examples
def test_bad_runs_are_never_completed(prompt: list[int], output: list[int], bad: list[list[int]]) -> None:
    text = prompt + output
    banned = {run[-1] for run in bad if text[len(text) - len(run) + 1 :] == run[:-1] and len(text) >= len(run) - 1}
    p = distribution(logits_for(5), state(prompt, output, temperature=1.0, bad_tokens=bad))
    assert support(p) == set(range(V)) - banned


def test_only_allowed_tokens_are_chosen() -> None:
    p = distribution(logits_for(7), state(temperature=1.0, allowed_tokens=(3, 17, 5), bad_tokens=((5,),)))
    assert support(p) == {3, 17}
    assert float(p[3] / p[17]) == pytest.approx(math.exp(float(logits_for(7)[3] - logits_for(7)[17])), rel=1e-4)


def test_end_and_stop_tokens_wait_for_min_tokens() -> None:
    fields: dict[str, Any] = dict(temperature=1.0, min_tokens=2, stop_tokens=(5,), end_tokens=frozenset({3, 99}))
    for output, banned in (([], {3, 5}), ([1], {3, 5}), ([1, 1], set()), ([1, 1, 1], set())):
        assert support(distribution(logits_for(1), state([2], output, **fields))) == set(range(V)) - banned
    assert support(distribution(logits_for(1), state([2], ignore_end=True, **fields))) == set(range(V)) - {5}


def test_edits_hold_for_greedy_choices_too() -> None:
    logits = torch.zeros(V)
    logits[11], logits[13], logits[17] = 3.0, 2.0, 1.0
    chosen = {
        11: state(temperature=0.0),
        13: state(temperature=0.0, bad_tokens=((11,),)),
        17: state([11, 13], temperature=0.0, no_repeat_ngram=1),
        4: state(temperature=0.0, logit_bias={4: 4.0}),
    }
    assert [token_of(choice) for choice in sample(logits.expand(4, V), list(chosen.values()))] == list(chosen)


@pytest.mark.parametrize("name", ["logit_bias", "allowed_tokens", "stop_tokens", "bad_tokens"])
def test_tokens_outside_the_vocabulary_are_refused(name: str) -> None:
    value: Any = {"logit_bias": {V: 1.0}, "bad_tokens": ((1, V),)}.get(name, (1, V))
    with pytest.raises(UsageError, match=f"{name}: the token id 31 is outside the vocabulary of 31"):
        state(**{name: value})


def test_prompt_tokens_outside_the_vocabulary_do_no_harm() -> None:
    made = state([V, 3, V + 5, 3], temperature=1.0, repetition_penalty=2.0, no_repeat_ngram=2)
    assert support(distribution(logits_for(2), made)) == set(range(V))


def test_long_runs_cost_no_more_than_short_ones() -> None:
    """Nor is anything forbidden that did not come before; the last run of the text below did, and 1 came after it."""
    text = [0] * 3000 + [1] + [0] * 2999
    p = distribution(logits_for(2), state(text, temperature=1.0, no_repeat_ngram=3000))
    assert support(p) == set(range(V)) - {0, 1}
    assert support(distribution(logits_for(2), state(text, temperature=1.0, no_repeat_ngram=3002))) == set(range(V))


# ---- edits against transformers


@pytest.mark.parametrize("seed", range(5))
def test_edits_are_those_of_transformers(seed: int) -> None:
    transformers = pytest.importorskip("transformers")
    generator = np.random.default_rng(seed)
    prompt, output = (generator.integers(0, 7, size=size).tolist() for size in (13, 11))
    ids = torch.tensor([prompt + output])
    logits = logits_for(seed)
    bad = [[3], [*output[-2:], 19], [6, 6, 20]]
    ends = [2, 23]
    pairs: list[tuple[Any, dict[str, Any]]] = [
        (transformers.RepetitionPenaltyLogitsProcessor(1.3), {"repetition_penalty": 1.3}),
        (transformers.NoRepeatNGramLogitsProcessor(2), {"no_repeat_ngram": 2}),
        (transformers.NoRepeatNGramLogitsProcessor(3), {"no_repeat_ngram": 3}),
        (transformers.NoBadWordsLogitsProcessor(bad, eos_token_id=ends), {"bad_tokens": bad}),
        (transformers.MinNewTokensLengthLogitsProcessor(13, 12, ends), {"min_tokens": 12}),
        (transformers.MinNewTokensLengthLogitsProcessor(13, 11, ends), {"min_tokens": 11}),
        (transformers.SequenceBiasLogitsProcessor([[[4], 2.5], [[9], -1.0]]), {"logit_bias": {4: 2.5, 9: -1.0}}),
    ]
    for process, fields in pairs:
        made = state(prompt, output, temperature=1.0, end_tokens=frozenset(ends), **fields)
        expected = process(ids, logits[None].clone())[0].log_softmax(0)
        torch.testing.assert_close(edited(logits, made), expected, rtol=1e-4, atol=1e-5)


# ---- a grammar


class Counting:
    """Digits in order, from 0 on: after ``last`` nothing may follow but the end."""

    def __init__(self, last: int) -> None:
        self.last, self.next = last, 0

    def allowed(self) -> torch.Tensor | None:
        return torch.arange(V) == self.next

    def advance(self, token: int) -> None:
        assert token == self.next
        self.next += 1

    def finished(self) -> bool:
        return self.next > self.last

    def copy(self) -> Counting:
        return copy.copy(self)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_is_followed_to_its_end(temperature: float) -> None:
    """Which comes when the grammar says so, whatever ``min_tokens`` asks for."""
    made = state(temperature=temperature, mask=Counting(3), end_tokens=frozenset({29}), min_tokens=9, seed=1)
    tokens = []
    for step in range(4):
        tokens.append(token_of(sample(logits_for(step)[None], [made])[0]))
        made.observe(tokens[-1])
    assert tokens == [0, 1, 2, 3]
    assert token_of(sample(logits_for(9)[None], [made])[0]) == 29


def test_a_grammar_that_allows_all_changes_nothing() -> None:
    mask = Counting(3)
    mask.allowed = lambda: None  # type: ignore[method-assign]
    expected = distribution(logits_for(3), state(temperature=1.0))
    assert torch.equal(distribution(logits_for(3), state(temperature=1.0, mask=mask)), expected)


# ---- rows and batches

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"typical_p": 0.8},
    {"epsilon_cutoff": 0.01}, {"eta_cutoff": 0.02}, {"mirostat": 2, "mirostat_tau": 2.0},
    {"mirostat": 1, "mirostat_tau": 2.0}, {"repetition_penalty": 1.4},
    {"presence_penalty": 0.5, "frequency_penalty": 0.3}, {"no_repeat_ngram": 2, "temperature": 0.0},
    {"logit_bias": {3: 2.0}, "top_k": 40, "top_p": 0.95}, {"bad_tokens": ((3,), (4, 5))}, {"logprobs": 3},
    {"allowed_tokens": tuple(range(0, 30, 2))}, {"logprobs": 0, "temperature": 0.0},
]  # fmt: skip


@pytest.mark.parametrize("size", [31, 1499])
def test_alone_is_among_fifty_others_bit_for_bit(size: int) -> None:
    def states() -> list[SamplerState]:
        return [state([1, 2, 3], vocab_size=size, seed=row, **KINDS[row % len(KINDS)]) for row in range(51)]

    together, alone = states(), states()
    for step in range(4):
        logits = torch.stack([logits_for(1000 * step + row, size) for row in range(51)])
        if step == 1:
            logits = (logits * 2).round() / 2  # ties
        found = sample(logits, together)
        order = torch.randperm(51, generator=torch.Generator().manual_seed(step)).tolist()
        others = {row: sample(logits[row : row + 1].clone(), [alone[row]])[0] for row in order}
        assert found == [others[row] for row in range(51)]
        for row, choice in enumerate(found):
            together[row].observe(token_of(choice))
            alone[row].observe(token_of(choice))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, None])
def test_a_row_that_is_not_finite_fails_alone(wrong: float | None) -> None:
    logits = torch.stack([logits_for(row) for row in range(2 * len(KINDS))])
    expected = sample(logits, [state(seed=3, **KINDS[row // 2]) for row in range(len(logits))])
    for row in range(0, len(logits), 2):
        logits[row] = -math.inf if wrong is None else torch.where(torch.arange(V) == 5, wrong, logits[row])
    found = sample(logits, [state(seed=3, **KINDS[row // 2]) for row in range(len(logits))])
    for row, choice in enumerate(found):
        if row % 2:
            assert choice == expected[row]
        else:
            assert isinstance(choice, GroundupError)
            assert "logits that are not finite: its weights are damaged" in str(choice)


def test_where_nothing_is_allowed_or_all_overflows_the_row_fails_alone() -> None:
    states = [
        state(temperature=0.0),
        state(allowed_tokens=(3,), bad_tokens=((3,),)),
        state(allowed_tokens=(3,), mask=Counting(3)),
        state(logit_bias={3: 1e300}),
        state([4], repetition_penalty=1e-300),
        state(seed=3),
    ]
    logits = logits_for(4).abs().expand(6, V)
    found = sample(logits, states)
    assert token_of(found[0]) == int(logits[0].argmax())
    assert token_of(found[5]) == choose(logits[0], SamplingParams(), torch.Generator().manual_seed(3))
    for choice, says in zip(found[1:5], ["no token may come next"] * 2 + ["so large that the logits"] * 2, strict=True):
        assert isinstance(choice, GroundupError)
        assert says in str(choice)
    with pytest.raises(GroundupError, match="no token may come next"):
        distribution(logits[0], states[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_logits_of_any_dtype_and_with_a_graph(dtype: torch.dtype) -> None:
    logits = logits_for(8).to(dtype).expand(3, V).clone().requires_grad_()
    states = [state(temperature=0.0), state(seed=1, top_k=3), state(seed=1, logprobs=2)]
    expected = sample(logits.detach().float(), [state(temperature=0.0), *(s.fork(0) for s in states[1:])])
    assert sample(logits, states) == expected


def test_greedy_ties_go_to_the_first() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0], [0.0, 0.0, -1.0, 0.5]])
    assert [token_of(choice) for choice in sample(logits, [state(temperature=0.0, vocab_size=4)] * 3)] == [1, 0, 3]


# ---- random numbers


def test_the_first_stream_is_the_seeds_own_and_the_others_are_not() -> None:
    assert torch.equal(state(seed=77).generator.get_state(), torch.Generator().manual_seed(77).get_state())
    numbers = {
        float(torch.rand((), generator=state(seed=seed, stream=stream).generator))
        for seed in (0, 1, 2, 2**40, 2**63 - 1)
        for stream in range(20)
    }
    assert len(numbers) >= 99  # 2**40 and 0 begin alike: PyTorch takes the lower 32 bits of a seed
    assert state().generator.initial_seed() != state().generator.initial_seed()


def test_a_fork_has_the_history_and_its_own_random_numbers() -> None:
    fields: dict[str, Any] = dict(
        seed=5, temperature=1.0, no_repeat_ngram=2, presence_penalty=0.7, repetition_penalty=1.2, mask=Counting(9),
        bad_tokens=((2, 21), (5, 23)),
    )  # fmt: skip
    fields["mask"].allowed = lambda: None
    first = state([0, 4], [0, 1, 2], **fields)
    second = first.fork(1)
    assert torch.equal(distribution(logits_for(1), first), distribution(logits_for(1), second))
    assert first.generator.initial_seed() == 5
    assert second.generator.get_state().tolist() == state(seed=5, stream=1).generator.get_state().tolist()
    before = distribution(logits_for(1), first)
    for token in (3, 4, 5):
        second.observe(token)
    assert torch.equal(distribution(logits_for(1), first), before)
    assert not torch.equal(distribution(logits_for(1), second), before)
    assert (first.mask.next, second.mask.next) == (3, 6)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.get("temperature") != 0.0], ids=str)
def test_draws_follow_the_distribution(kind: dict[str, Any]) -> None:
    logits = logits_for(12, spread=1.2)
    made = state([4, 4, 3], [4, 7], seed=43, **{"temperature": 1.0} | kind)
    expected = distribution(logits, made).numpy() * 3000
    counts = np.bincount([token_of(sample(logits[None], [made])[0]) for _ in range(3000)], minlength=V)
    likely = expected >= 5
    assert counts[expected == 0].sum() == 0
    found = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(expected[likely], max(expected[~likely].sum(), 1e-3))
    chi_squared, n = float(((found - wanted) ** 2 / wanted).sum()), int(likely.sum())
    # The 0.999 quantile of chi-squared with n degrees of freedom (Wilson & Hilferty 1931).
    assert n >= 2
    assert chi_squared < n * (1 - 2 / (9 * n) + 3.09 * math.sqrt(2 / (9 * n))) ** 3


def test_sampling_does_not_observe() -> None:
    made = state([1], [2], temperature=1.0, no_repeat_ngram=1, frequency_penalty=1.0, seed=1)
    before = distribution(logits_for(3), made)
    sample(logits_for(3)[None], [made])
    assert torch.equal(distribution(logits_for(3), made), before)


def test_without_history_it_is_the_choice_of_params_alone() -> None:
    for kind in ({"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"mirostat": 2}):
        params = SamplingParams(seed=9, **kind)  # type: ignore[arg-type]
        made, generator = state(seed=9, **kind), torch.Generator().manual_seed(9)
        assert torch.equal(distribution(logits_for(2), made), probabilities(logits_for(2), params))
        for _ in range(20):
            assert token_of(sample(logits_for(2)[None], [made])[0]) == choose(logits_for(2), params, generator)


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (0.5, 3), (1 - 2**-53, 3)])
def test_what_is_impossible_is_not_drawn_at_the_edges(
    monkeypatch: pytest.MonkeyPatch, number: float, token: int
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, dtype, generator: torch.tensor(number, dtype=dtype))
    p = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    assert Candidates(None, p).draw(torch.Generator()) == token
    assert Candidates(np.array([10, 11, 12, 13, 14]), p * 0.3).draw(torch.Generator()) == 10 + token


# ---- mirostat


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tau", [3.5, 5.0])
def test_mirostat_keeps_the_mean_surprise_near_tau(tau: float, version: Literal[1, 2]) -> None:
    """On Zipf's distribution, whose own mean surprise is 7.5 bits and whose least is 2.9."""
    p = 1.0 / torch.arange(1.0, 998.0)
    logits, p = p.log(), p / p.sum()
    made = state(vocab_size=997, temperature=1.0, mirostat=version, mirostat_tau=tau, seed=3)
    surprises = []
    for _ in range(1500):
        token = token_of(sample(logits[None], [made])[0])
        made.observe(token)
        surprises.append(-math.log2(float(p[token])))
    assert np.mean(surprises[100:]) == pytest.approx(tau, abs=0.1)


@given(st.lists(st.integers(0, V - 1), max_size=12), st.floats(0.3, 2.0))
@examples
def test_mirostat_is_its_definition(taken: list[int], temperature: float) -> None:
    """Basu et al. 2020, second version: cut where the surprise exceeds mu, move mu by the error of what was taken."""
    made = state(temperature=temperature, mirostat=2, mirostat_tau=2.3, mirostat_eta=0.4)
    mu = 2 * 2.3
    for step, token in enumerate([*taken, 0]):
        weights = [math.exp(x / temperature) for x in logits_for(step).tolist()]
        p = [weight / sum(weights) for weight in weights]
        kept = {i for i in range(V) if -math.log2(p[i]) <= mu} or {p.index(max(p))}
        if all(abs(-math.log2(value) - mu) > 1e-4 for value in p):  # where rounding does not decide
            found = distribution(logits_for(step), made)
            assert support(found) == kept
            assert found.tolist() == pytest.approx(
                [p[i] / sum(p[j] for j in kept) if i in kept else 0.0 for i in range(V)], rel=1e-3
            )
        else:
            distribution(logits_for(step), made)
        made.observe(token)
        mu -= 0.4 * (-math.log2(p[token]) - 2.3)


@pytest.mark.parametrize("exponent", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("surprise", [0.5, 3.0, 6.0, 40.0])
def test_mirostats_first_version_keeps_as_many_as_zipfs_law_would_have_it(exponent: float, surprise: float) -> None:
    """Basu et al. 2020, Theorem 2: with k of N Zipfian tokens the surprise is log2(k^s (1 - N^-e) / e), e = s - 1."""
    size = 2000
    p = np.arange(1.0, size + 1) ** -exponent
    p = (p / p.sum()).astype(np.float32)
    kept = len(as_surprising(np.random.default_rng(0).permutation(p), surprise))
    e = exponent - 1

    def bits(k: float) -> float:
        return exponent * math.log2(k) + (math.log2((1 - size**-e) / e) if e else math.log2(math.log(size)))

    assert kept == 1 or bits(kept - 0.6) <= surprise
    assert kept == size or bits(kept + 0.6) >= surprise


@pytest.mark.parametrize(
    ("p", "kept"),
    [([1.0], {0}), ([0.0, 1.0, 0.0], {1}), ([0.25] * 4, {0, 1, 2, 3}), ([0.5, 0.5, 0.0], {0, 1, 2})],
)
def test_mirostats_first_version_where_no_law_can_be_seen(p: list[float], kept: set[int]) -> None:
    assert set(as_surprising(np.array(p, np.float32), 1.0).tolist()) == kept


# ---- log-probabilities


def naive_logprobs(logits: torch.Tensor) -> list[float]:
    values = logits.double().tolist()
    total = math.log(sum(math.exp(value - max(values)) for value in values)) + max(values)
    return [value - total for value in values]


@pytest.mark.parametrize("count", [0, 1, 4, 99])
def test_log_probabilities_are_the_models_own(count: int) -> None:
    """Whatever penalties and filters make of it; ties among the likeliest go by id."""
    logits = (logits_for(6) * 2).round() / 2
    exact = naive_logprobs(logits)
    order = sorted(range(V), key=lambda i: (-exact[i], i))[:count]
    for fields in ({"temperature": 0.0}, {"top_k": 2, "logit_bias": {3: 99.0}}, {"repetition_penalty": 2.0}):
        (choice,) = sample(logits[None], [state([1, 2], logprobs=count, seed=1, **fields)])
        assert isinstance(choice, Choice)
        assert choice.logprob == pytest.approx(exact[choice.token], abs=1e-5)
        assert choice.top is not None
        assert [token for token, _ in choice.top] == order
        assert [value for _, value in choice.top] == pytest.approx([exact[i] for i in order], abs=1e-5)
    assert token_of(sample(logits[None], [state(logit_bias={3: 99.0}, seed=1)])[0]) == 3


def test_log_probabilities_are_given_to_those_who_asked() -> None:
    states = [state(seed=1), state(temperature=0.0), state(best_of=3, n=2), state(best_of=2, n=2), state(logprobs=0)]
    found = sample(logits_for(6).expand(5, V), states)
    kinds = [(choice.logprob is None, choice.top) for choice in found if isinstance(choice, Choice)]
    assert kinds == [(True, None), (True, None), (False, None), (True, None), (False, [])]


def test_log_probabilities_of_a_prompt() -> None:
    count, length = 3, 131  # more than are computed at once
    logits = torch.stack([logits_for(row) for row in range(length)])
    targets = [row % V for row in range(length - 1)] + [V + 2]
    found = prompt_logprobs(logits, targets, count)
    assert len(found) == length
    for row, (own, top) in enumerate(found):
        exact = naive_logprobs(logits[row])
        assert own == (pytest.approx(exact[targets[row]], abs=1e-5) if targets[row] < V else -math.inf)
        assert [token for token, _ in top] == sorted(range(V), key=lambda i: -exact[i])[:count]
        assert [value for _, value in top] == pytest.approx(sorted(exact, reverse=True)[:count], abs=1e-5)
    assert prompt_logprobs(logits[:2], targets[:2], 0)[1][1] == []
    assert prompt_logprobs(logits[:0], [], 2) == []
    broken = prompt_logprobs(torch.full((1, V), math.nan), [3], 2)
    assert math.isnan(broken[0][0])
    assert broken[0][1] == []
