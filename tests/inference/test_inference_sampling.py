"""From logits to a token: each filter against its definition, and the draw against its distribution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from groundup.inference import SamplingParams
from groundup.inference.sampling import choose, probabilities
from groundup.runtime import GroundupError, UsageError

# Multiples of 1/8, so that ties are as common as they are exact.
logit_lists = st.lists(st.integers(-60, 60).map(lambda n: n / 8), min_size=1, max_size=30)
temperatures = st.floats(0.05, 5.0)
examples = settings(max_examples=150, deadline=None)


def softmax(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def filtered(logits: list[float], temperature: float, keep: set[int]) -> list[float]:
    p = [value if i in keep else 0.0 for i, value in enumerate(softmax(logits, temperature))]
    return [value / sum(p) for value in p]


def ours(logits: list[float], **params: Any) -> list[float]:
    return probabilities(torch.tensor(logits), SamplingParams(**params)).tolist()


@given(logit_lists, temperatures)
@examples
def test_without_filters_it_is_the_softmax(logits: list[float], temperature: float) -> None:
    assert ours(logits, temperature=temperature) == pytest.approx(softmax(logits, temperature), abs=1e-6)


@given(logit_lists)
@examples
def test_temperature_zero_is_certain_of_the_first_of_the_likeliest(logits: list[float]) -> None:
    expected = [0.0] * len(logits)
    expected[logits.index(max(logits))] = 1.0
    assert ours(logits, temperature=0.0) == expected
    params = SamplingParams(temperature=0.0, top_k=3, top_p=0.4, min_p=0.2)
    assert choose(torch.tensor(logits), params, torch.Generator()) == logits.index(max(logits))


@given(logit_lists, temperatures, st.integers(1, 40))
@examples
def test_top_k_keeps_the_k_likeliest_and_their_ties(logits: list[float], temperature: float, k: int) -> None:
    least = sorted(logits, reverse=True)[min(k, len(logits)) - 1]
    keep = {i for i, logit in enumerate(logits) if logit >= least}
    expected = filtered(logits, temperature, keep)
    assert ours(logits, temperature=temperature, top_k=k) == pytest.approx(expected, abs=1e-6)


@given(logit_lists, temperatures, st.floats(0.01, 1.0))
@examples
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits: list[float], temperature: float, top_p: float) -> None:
    p = softmax(logits, temperature)
    order = sorted(range(len(p)), key=lambda i: (-logits[i], i))
    keep, total = set(), 0.0
    for i in order:
        keep.add(i)
        total += p[i]
        assume(abs(total - top_p) > 1e-5)  # where rounding would decide
        if total >= top_p:
            break
    assert ours(logits, temperature=temperature, top_p=top_p) == pytest.approx(
        filtered(logits, temperature, keep), abs=1e-5
    )


@given(logit_lists, temperatures, st.floats(0.0, 0.99))
@examples
def test_min_p_drops_what_is_unlikely_beside_the_likeliest(
    logits: list[float], temperature: float, min_p: float
) -> None:
    p = softmax(logits, temperature)
    assume(all(abs(value - min_p * max(p)) > 1e-6 for value in p))
    keep = {i for i, value in enumerate(p) if value >= min_p * max(p)}
    assert ours(logits, temperature=temperature, min_p=min_p) == pytest.approx(
        filtered(logits, temperature, keep), abs=1e-6
    )


def entropy(p: list[float]) -> float:
    return -sum(value * math.log(value) for value in p if value > 0)


def distances(p: list[float]) -> list[float]:
    expected = entropy(p)
    return [abs(-math.log(value) - expected) for value in p]


def typical_set(p: list[float], mass: float) -> set[int]:
    """Tokens by the distance of their surprise from the entropy, until they hold the mass; then ties with the last."""
    distance = distances(p)
    total, last = 0.0, 0.0
    for i in sorted(range(len(p)), key=lambda i: distance[i]):
        total, last = total + p[i], distance[i]
        assume(abs(total - mass) > 1e-5)  # where rounding would decide
        if total >= mass:
            break
    near = [abs(value - last) for value in distance]
    assume(all(value < 1e-9 or value > 1e-4 for value in near))
    return {i for i, value in enumerate(near) if value < 1e-9 or distance[i] < last}


@given(logit_lists, temperatures, st.floats(0.01, 0.99))
@examples
def test_typical_keeps_those_whose_surprise_is_expected(logits: list[float], temperature: float, mass: float) -> None:
    p = softmax(logits, temperature)
    assume(min(p) > 1e-30)
    expected = filtered(logits, temperature, typical_set(p, mass))
    assert ours(logits, temperature=temperature, typical_p=mass) == pytest.approx(expected, abs=1e-5)


@given(logit_lists, temperatures, st.floats(0.001, 0.9), st.sampled_from(["epsilon_cutoff", "eta_cutoff"]))
@examples
def test_epsilon_and_eta_drop_what_is_unlikely_but_never_the_likeliest(
    logits: list[float], temperature: float, cutoff: float, name: str
) -> None:
    p = softmax(logits, temperature)
    limit = min(cutoff, math.sqrt(cutoff) * math.exp(-entropy(p))) if name == "eta_cutoff" else cutoff
    assume(all(abs(value - limit) > 1e-6 for value in p))
    keep = {i for i, value in enumerate(p) if value >= limit} or {i for i, x in enumerate(logits) if x == max(logits)}
    expected = filtered(logits, temperature, keep)
    assert ours(logits, temperature=temperature, **{name: cutoff}) == pytest.approx(expected, abs=1e-5)


def large_vocabularies() -> Iterator[list[float]]:
    """Where filters take short cuts; half the logits are so coarse that most are tied."""
    for size in (1031, 2053):
        for spread in (0.01, 2.0, 6.0):
            generator = torch.Generator().manual_seed(size)
            logits = torch.randn(size, generator=generator, dtype=torch.float64) * spread
            yield logits.float().tolist()
            yield ((logits * 4).round() / 4).tolist()


def support(p: Sequence[float]) -> set[int]:
    return {i for i, value in enumerate(p) if value > 0}


@pytest.mark.parametrize("k", [1, 7, 50, 300, 1030])
def test_top_k_of_a_large_vocabulary(k: int) -> None:
    for logits in large_vocabularies():
        least = sorted(logits, reverse=True)[k - 1]
        expected = {i for i, logit in enumerate(logits) if logit >= least}
        assert support(ours(logits, temperature=1.0, top_k=k)) == expected


@pytest.mark.parametrize("mass", [1e-6, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_top_p_of_a_large_vocabulary(mass: float) -> None:
    for logits in large_vocabularies():
        p = softmax(logits, 1.0)
        order = sorted(range(len(p)), key=lambda i: (-logits[i], i))
        total, count = 0.0, 0
        while total < mass:
            total, count = total + p[order[count]], count + 1
        found = support(ours(logits, temperature=1.0, top_p=mass))
        # float32 probabilities may be apart by rounding at the edge of the set, but never be out of order.
        assert found == set(order[: len(found)])
        assert abs(len(found) - count) <= 1 or sum(p[i] for i in found ^ set(order[:count])) < 2e-6


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9])
def test_typical_of_a_large_vocabulary(mass: float) -> None:
    for logits in large_vocabularies():
        p = softmax(logits, 1.0)
        distance = distances(p)
        found = support(ours(logits, temperature=1.0, typical_p=mass))
        farthest = max(distance[i] for i in found)
        assert all(distance[i] >= farthest - 1e-4 for i in range(len(p)) if i not in found)
        assert sum(p[i] for i in found) >= mass - 1e-5
        assert sum(p[i] for i in found if distance[i] < farthest - 1e-4) < mass + 1e-5


def test_filters_apply_in_the_documented_order() -> None:
    """Each to the renormalised rest of 0.4 0.3 0.2 0.1."""
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    # The entropy is 1.280: the surprises 1.204, 1.609 and 0.916 are nearest. Of 0.4 0.3 0.2 typical keeps 0.3 first.
    assert ours(logits, temperature=1.0, typical_p=0.2) == pytest.approx([0, 1, 0, 0])
    assert ours(logits, temperature=1.0, top_k=2, typical_p=0.2) == pytest.approx([1, 0, 0, 0])  # of 4/7 and 3/7
    assert ours(logits, temperature=1.0, typical_p=0.65, min_p=0.9) == pytest.approx([1, 0, 0, 0])
    assert ours(logits, temperature=1.0, top_p=0.6, epsilon_cutoff=0.42) == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert ours(logits, temperature=1.0, epsilon_cutoff=0.35, eta_cutoff=0.99) == pytest.approx([1, 0, 0, 0])
    assert ours(logits, temperature=1.0, top_k=3) == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])
    assert ours(logits, temperature=1.0, top_k=3, top_p=0.75) == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert ours(logits, temperature=1.0, top_p=0.75) == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])
    assert ours(logits, temperature=1.0, min_p=0.6, top_p=0.5) == pytest.approx([1, 0, 0, 0])


@given(
    logit_lists,
    st.floats(0, 1e30, allow_subnormal=True),
    st.none() | st.integers(1, 40),
    st.floats(0, 1, exclude_min=True),
    st.floats(0, 1, exclude_max=True),
)
@examples
def test_whatever_is_asked_the_result_is_a_distribution_over_likely_tokens(
    logits: list[float], temperature: float, k: int | None, top_p: float, min_p: float
) -> None:
    p = ours(logits, temperature=temperature, top_k=k, top_p=top_p, min_p=min_p)
    assert sum(p) == pytest.approx(1.0, abs=1e-5)
    assert min(p) >= 0
    assert p[logits.index(max(logits))] > 0 or temperature > 100  # where float32 makes them all alike
    params = SamplingParams(temperature=temperature, top_k=k, top_p=top_p, min_p=min_p)
    assert p[choose(torch.tensor(logits), params, torch.Generator().manual_seed(1))] > 0


def test_very_small_and_very_large_logits_and_temperatures() -> None:
    assert ours([1e30, 0.0, -1e30], temperature=1.0) == [1, 0, 0]
    assert ours([3.0, 2.0], temperature=1e-300) == [1, 0]
    assert ours([3.0, 3.0], temperature=1e-300) == [0.5, 0.5]
    assert ours([3.0, 2.0], temperature=1.0, top_p=1e-300) == [1, 0]
    assert ours([3.0, -math.inf, 3.0], temperature=1.0) == [0.5, 0, 0.5]


DRAWN: list[dict[str, Any]] = [
    {}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}, {"temperature": 2.0}, {"typical_p": 0.7}, {"eta_cutoff": 0.3},
    {"epsilon_cutoff": 0.05}, {"top_k": 7, "top_p": 0.9, "min_p": 0.05}, {"mirostat": 2, "mirostat_tau": 1.6},
    {"mirostat": 1, "mirostat_tau": 1.6},
]  # fmt: skip


@pytest.mark.parametrize("params", DRAWN, ids=str)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    torch.manual_seed(41)
    logits = torch.randn(11) * 1.5
    sampling = SamplingParams(**{"temperature": 1.0} | params)
    generator = torch.Generator().manual_seed(43)
    draws = 4000
    counts = np.bincount([choose(logits, sampling, generator) for _ in range(draws)], minlength=11)
    expected = probabilities(logits, sampling).numpy() * draws
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_squared = float((((counts - expected) ** 2)[possible] / expected[possible]).sum())
    # The 0.999 quantile of chi-squared with n degrees of freedom (Wilson & Hilferty 1931).
    n = int(possible.sum()) - 1
    assert n >= 2
    assert chi_squared < n * (1 - 2 / (9 * n) + 3.09 * math.sqrt(2 / (9 * n))) ** 3


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(wrong: float, temperature: float) -> None:
    with pytest.raises(GroundupError, match="logits that are not finite: its weights are damaged") as error:
        choose(torch.tensor([0.0, wrong, 1.0]), SamplingParams(temperature=temperature), torch.Generator())
    assert error.value.exit_code == 1


def test_no_possible_token_is_an_error() -> None:
    with pytest.raises(GroundupError, match="not finite"):
        probabilities(torch.full((3,), -math.inf), SamplingParams())


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"max_tokens": 0}, "max_tokens = 0 must be at least 1"),
        ({"temperature": -0.1}, r"temperature = -0\.1 must be 0 or more"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"top_k": 0}, "top_k = 0 must be at least 1"),
        ({"top_p": 0.0}, r"top_p = 0\.0 must be above 0 and at most 1"),
        ({"top_p": 1.1}, r"top_p = 1\.1"),
        ({"min_p": 1.0}, r"min_p = 1\.0 must be at least 0 and below 1"),
        ({"min_p": math.nan}, r"min_p = nan"),
        ({"seed": -1}, "seed = -1 must be at least 0"),
        ({"seed": 2**64}, "seed = 18446744073709551616"),
        ({"stop": ["a", ""]}, "stop: an empty text would end every generation at once"),
        ({"stop": ""}, "stop: an empty text"),
        ({"stop": [3]}, "stop: 3 is not a text"),
        ({"stop": 3}, "stop = 3 must be a list"),
        ({"temperature": "hot"}, "temperature = 'hot' must be a number"),
        ({"temperature": True}, "temperature = True must be a number"),
        ({"top_p": None}, "top_p = None must be a number"),
        ({"max_tokens": True}, "max_tokens = True must be a whole number"),
        ({"max_tokens": 1.5}, r"max_tokens = 1\.5 must be a whole number"),
        ({"max_tokens": None}, "max_tokens = None must be a whole number"),
        ({"top_k": "5"}, "top_k = '5' must be a whole number"),
        ({"seed": 1.0}, r"seed = 1\.0 must be a whole number"),
        ({"typical_p": 0.0}, r"typical_p = 0\.0 must be above 0 and at most 1"),
        ({"epsilon_cutoff": 1.0}, r"epsilon_cutoff = 1\.0 must be at least 0 and below 1"),
        ({"eta_cutoff": -0.1}, r"eta_cutoff = -0\.1 must be at least 0 and below 1"),
        ({"mirostat": 3}, r"mirostat = 3 must be 0 \(off\), 1 or 2"),
        ({"mirostat": False}, "mirostat = False must be 0"),
        ({"mirostat": 2, "mirostat_tau": 0.0}, r"mirostat_tau = 0\.0 must be above 0"),
        ({"mirostat_eta": math.nan}, "mirostat_eta = nan must be a finite number"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty = 0\.0 must be above 0"),
        ({"presence_penalty": math.inf}, "presence_penalty = inf must be a finite number"),
        ({"frequency_penalty": -math.inf}, "frequency_penalty = -inf must be a finite number"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram = -1 must be at least 0"),
        ({"logit_bias": [1, 2]}, r"logit_bias = \[1, 2\] must map token ids to numbers"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: the token id -1 must be at least 0"),
        ({"logit_bias": {"7": 1.0}}, "logit_bias: the token id = '7' must be a whole number"),
        ({"logit_bias": {7: math.nan}}, "logit_bias of token 7 = nan must be a finite number"),
        ({"bad_tokens": [[1], []]}, "bad_tokens: an empty run would forbid every token"),
        ({"bad_tokens": [1, 2]}, "bad_tokens = 1 must be a list"),
        ({"bad_tokens": [[True]]}, "bad_tokens: the token id = True must be a whole number"),
        ({"allowed_tokens": []}, "allowed_tokens is empty"),
        ({"stop_tokens": [3, -5]}, "stop_tokens: the token id -5 must be at least 0"),
        ({"ignore_end": 1}, "ignore_end = 1 must be true or false"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens = 9 is more than max_tokens = 8"),
        ({"logprobs": -1}, "logprobs = -1 must be at least 0"),
        ({"prompt_logprobs": -1}, "prompt_logprobs = -1 must be at least 0"),
        ({"n": 0}, "n = 0 must be at least 1"),
        ({"n": 3, "best_of": 2}, "best_of = 2 is less than n = 3"),
        ({"mirostat": 1, "top_k": 5}, "mirostat = 1 takes the place of all filters: leave top_k at None"),
        ({"mirostat": 2, "top_k": 5}, "mirostat = 2 takes the place of all filters: leave top_k at None"),
        ({"mirostat": 2, "top_p": 0.9}, r"leave top_p at 1\.0"),
        ({"mirostat": 2, "min_p": 0.1}, r"leave min_p at 0\.0"),
        ({"mirostat": 2, "temperature": 0.0}, "mirostat = 2 needs a temperature above 0"),
        ({"regex": "a", "grammar": "b"}, "regex and grammar are both given"),
        ({"json_schema": {}}, r"json_schema = {} must be a text"),
    ],
)
def test_params_that_cannot_be_are_refused(params: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        SamplingParams.of(**params)
    assert error.value.exit_code == 2


def test_one_stop_text_is_not_a_list_of_its_letters() -> None:
    assert SamplingParams.of(stop="end").stop == ("end",)
    assert SamplingParams.of(stop=["end", "fin"]).stop == ("end", "fin")
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]


def test_params_are_values() -> None:
    """Hashable, equal when alike, changed by ``replace`` only, and not by what happens to the lists they came from."""
    bias, bad = {3: -1}, [[1, 2], [3]]
    params = SamplingParams.of(logit_bias=bias, bad_tokens=bad, allowed_tokens=[5, 3], stop_tokens=(np.int64(2),))
    same = SamplingParams.of(logit_bias={3: -1}, bad_tokens=((1, 2), (3,)), allowed_tokens=(5, 3), stop_tokens=[2])
    bias[4] = 1
    bad.append([7])
    assert params == same
    assert hash(params) == hash(same)
    assert {params: "found"}[same] == "found"
    assert type(params.stop_tokens[0]) is int
    assert replace(params, seed=5).seed == 5
    assert replace(params, seed=5).bad_tokens == ((1, 2), (3,))
    assert params != replace(params, logit_bias={})
    with pytest.raises(UsageError, match="top_k = 0"):
        replace(params, top_k=0)
    assert SamplingParams.of() == SamplingParams()


@pytest.mark.parametrize(
    ("name", "params", "arguments"),
    [
        ("TopKLogitsWarper", {"top_k": 9}, (9,)),
        ("TopPLogitsWarper", {"top_p": 0.83}, (0.83,)),
        ("MinPLogitsWarper", {"min_p": 0.07}, (0.07,)),
        ("TypicalLogitsWarper", {"typical_p": 0.57}, (0.57,)),
        ("EpsilonLogitsWarper", {"epsilon_cutoff": 0.03}, (0.03,)),
        ("EtaLogitsWarper", {"eta_cutoff": 0.09}, (0.09,)),
        ("TemperatureLogitsWarper", {"temperature": 1.7}, (1.7,)),
    ],
)
def test_filters_are_those_of_transformers(name: str, params: dict[str, Any], arguments: tuple[float, ...]) -> None:
    transformers = pytest.importorskip("transformers")
    warp = getattr(transformers, name)(*arguments)
    generator = torch.Generator().manual_seed(5)
    for size in (31, 1499):
        for spread in (0.5, 2.0, 5.0):
            logits = torch.randn(size, generator=generator) * spread
            expected = warp(torch.zeros(1, 0, dtype=torch.int64), logits[None].clone())[0].softmax(-1)
            found = probabilities(logits, SamplingParams(**{"temperature": 1.0} | params))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
