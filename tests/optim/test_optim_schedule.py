"""The learning rate over a run."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.optim import Horizon, OptimConfig, learning_rate_factor


def factors(config: OptimConfig, steps: int) -> list[float]:
    horizon = Horizon.of(steps, config)
    return [learning_rate_factor(step, config, horizon) for step in range(steps + 2)]


def test_warm_up_stable_decay_by_hand() -> None:
    config = OptimConfig(warmup_steps=3, decay_fraction=0.4, final_learning_rate=0.2)
    # 10 steps: three of warm-up, the last four fall from 1 towards 0.2, which would be reached at step 10.
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2]
    assert factors(config, 10) == pytest.approx(expected)


def test_no_warm_up_and_no_decay_is_flat() -> None:
    assert factors(OptimConfig(warmup_steps=0, decay_fraction=0.0, final_learning_rate=1.0), 5) == [1.0] * 7


def test_decay_over_the_whole_run_leaves_the_warm_up_alone() -> None:
    config = OptimConfig(warmup_steps=2, decay_fraction=1.0)
    assert Horizon.of(6, config) == Horizon(steps=6, decay_from=2)
    assert factors(config, 6)[:6] == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])


def test_a_run_shorter_than_its_warm_up_never_reaches_the_peak() -> None:
    config = OptimConfig(warmup_steps=100, decay_fraction=0.5)
    assert factors(config, 4)[:4] == pytest.approx([1 / 101, 2 / 101, 3 / 101, 4 / 101])


configs = st.builds(
    OptimConfig,
    warmup_steps=st.integers(0, 40),
    decay_fraction=st.floats(0, 1),
    final_learning_rate=st.floats(0, 1),
)


@given(configs, st.integers(1, 200))
@settings(max_examples=200, deadline=None)
def test_it_is_a_fraction_that_rises_then_falls(config: OptimConfig, steps: int) -> None:
    peak = min(Horizon.of(steps, config).decay_from, steps - 1)
    values = factors(config, steps)
    assert all(0 < value <= 1 for value in values[:steps])
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:steps] == sorted(values[peak:steps], reverse=True)
    if steps > config.warmup_steps:
        assert values[steps:] == [config.final_learning_rate] * 2


@given(configs, st.integers(0, 150), st.integers(1, 150))
@settings(max_examples=200, deadline=None)
def test_a_horizon_decided_late_makes_no_jump(config: OptimConfig, decided: int, left: int) -> None:
    """A run with a budget in minutes goes on without a horizon, then begins to decay at the step it is at."""
    decided = max(decided, config.warmup_steps)
    horizon = Horizon(steps=decided + left, decay_from=decided)
    before = [learning_rate_factor(step, config, None) for step in range(decided + 1)]
    after = [learning_rate_factor(step, config, horizon) for step in range(decided + left + 1)]
    assert after[: decided + 1] == before
    largest_step = (1 - config.final_learning_rate) / left
    falls = [a - b for a, b in zip(after[decided:], after[decided + 1 :], strict=False)]
    assert all(-1e-12 <= fall <= largest_step + 1e-12 for fall in falls)
    assert after[-1] == pytest.approx(config.final_learning_rate)


def test_cosine_falls_from_the_end_of_the_warm_up_by_hand() -> None:
    config = OptimConfig(schedule="cosine", warmup_steps=2, final_learning_rate=0.1)
    # Eight steps: two of warm-up, then half a cosine over six.
    by_hand = [0.1 + 0.9 * (1 + math.cos(math.pi * done / 6)) / 2 for done in range(6)]
    assert factors(config, 8) == pytest.approx([1 / 3, 2 / 3, *by_hand, 0.1, 0.1])


def test_linear_falls_in_equal_steps() -> None:
    config = OptimConfig(schedule="linear", warmup_steps=1)
    assert factors(config, 5) == pytest.approx([1 / 2, 1, 3 / 4, 2 / 4, 1 / 4, 0, 0])


def test_inverse_square_root_is_that_of_the_step() -> None:
    config = OptimConfig(schedule="inverse_sqrt", warmup_steps=3, final_learning_rate=0.3)
    expected = [1 / 4, 2 / 4, 3 / 4, 1, math.sqrt(4 / 5), math.sqrt(4 / 6)]
    assert factors(config, 6)[:6] == pytest.approx(expected)
    assert learning_rate_factor(10_000, config, None) == 0.3


def test_constant_stays() -> None:
    assert factors(OptimConfig(schedule="constant", warmup_steps=1), 4) == [0.5, 1, 1, 1, 1, 1]


@given(
    st.sampled_from(["wsd", "cosine", "linear", "inverse_sqrt", "constant"]),
    st.integers(0, 20),
    st.integers(1, 200),
    st.floats(0.0, 1.0),
)
@settings(max_examples=60, deadline=None)
def test_no_schedule_leaves_its_bounds_or_rises_after_the_warm_up(
    schedule: Any, warmup: int, steps: int, final: float
) -> None:
    config = OptimConfig(schedule=schedule, warmup_steps=warmup, final_learning_rate=final)
    found = factors(config, steps)
    assert all(0.0 <= value <= 1.0 for value in found)
    after = found[warmup:]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(after))
