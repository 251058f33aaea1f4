"""From logits to a token: each filter against its definition, and the draw against its distribution."""

from __future__ import annotations

import math
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


def test_filters_apply_in_the_documented_order() -> None:
    """top_k, then min_p, then top_p of what is left: of 0.4 0.3 0.2 0.1, each to the renormalised rest."""
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
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


@pytest.mark.parametrize("params", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}, {"temperature": 2.0}], ids=str)
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
    ],
)
def test_params_that_cannot_be_are_refused(params: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        SamplingParams.of(**params)
    assert error.value.exit_code == 2


def test_one_stop_text_is_not_a_list_of_its_letters() -> None:
    assert SamplingParams.of(stop="end").stop == ("end",)
    assert SamplingParams.of(stop=["end", "fin"]).stop == ("end", "fin")
