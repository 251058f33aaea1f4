"""The learning rate over a run."""

from __future__ import annotations

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
