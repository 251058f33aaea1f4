from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groundup.data import TokenLoader, TokenSet
from groundup.runtime import GroundupError

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def count_up(make_tokens: Callable[..., TokenSet]) -> Callable[..., TokenSet]:
    """Tokens 0, 1, 2, … in shards of 97, so that a window shows where it was cut; the last is 1008."""
    made: dict[int, TokenSet] = {}

    def make(n_tokens: int) -> TokenSet:
        if n_tokens not in made:
            made[n_tokens] = make_tokens([list(range(n_tokens - 1))], shard_tokens=97)
        return made[n_tokens]

    return make


@given(n=st.integers(8, 700), context=st.integers(1, 60), batch=st.integers(1, 13), seed=st.integers(0, 9))
@few
def test_an_epoch_sees_every_window_once(
    count_up: Callable[..., TokenSet], n: int, context: int, batch: int, seed: int
) -> None:
    if n <= context:
        return
    loader = TokenLoader(count_up(n), context, batch, seed)
    starts = np.concatenate([loader.starts(index) for index in range(2 * loader.batches_per_epoch + 1)])
    for epoch in range(2):
        of_epoch = starts[epoch * loader.n_windows : (epoch + 1) * loader.n_windows]
        if len(of_epoch) < loader.n_windows:
            continue
        covered = (of_epoch[:, None] + np.arange(context)) % n
        assert len(np.unique(covered)) == loader.n_windows * context  # no token is seen twice in an epoch
        assert n - loader.n_windows * context < context  # and less than one window is left out


@given(n=st.integers(8, 700), context=st.integers(1, 60), batch=st.integers(1, 13), index=st.integers(0, 5000))
@few
def test_targets_are_the_inputs_moved_on_by_one(
    count_up: Callable[..., TokenSet], n: int, context: int, batch: int, index: int
) -> None:
    if n <= context:
        return
    loader = TokenLoader(count_up(n), context, batch, seed=1)
    inputs, targets = loader.batch(index)
    assert inputs.shape == targets.shape == (batch, context)
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.flags.c_contiguous
    assert targets.flags.c_contiguous
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])
    ring = np.append(np.arange(n - 1), 1008)
    rows = loader.starts(index)[:, None] + np.arange(context + 1)
    assert np.array_equal(np.concatenate([inputs, targets[:, -1:]], axis=1), ring[rows % n])


def test_a_batch_depends_on_seed_and_index_alone(count_up: Callable[..., TokenSet]) -> None:
    tokens = count_up(701)
    in_order = [TokenLoader(tokens, 7, 5, seed=3).batch(index) for index in range(60)]
    jumping = TokenLoader(tokens, 7, 5, seed=3)
    for index in (59, 0, 31, 30, 58, 2):
        assert np.array_equal(jumping.batch(index)[0], in_order[index][0])
    other_seed = TokenLoader(tokens, 7, 5, seed=4)
    assert not np.array_equal(other_seed.batch(0)[0], in_order[0][0])


def test_two_halves_of_a_batch_are_the_batch(count_up: Callable[..., TokenSet]) -> None:
    whole, half = TokenLoader(count_up(701), 7, 6, seed=3), TokenLoader(count_up(701), 7, 3, seed=3)
    for index in range(50):
        halves = np.concatenate([half.batch(2 * index)[0], half.batch(2 * index + 1)[0]])
        assert np.array_equal(whole.batch(index)[0], halves)


def test_epochs_differ_in_order_and_in_where_windows_start(count_up: Callable[..., TokenSet]) -> None:
    loader = TokenLoader(count_up(701), 7, 100, seed=0)
    assert loader.n_windows == loader.batch_size == 100
    first, second = loader.starts(0), loader.starts(1)
    assert set(first.tolist()) != set(second.tolist())
    assert len({int(starts.min()) % 7 for starts in map(loader.starts, range(20))}) > 3


def test_batches_beyond_one_block_of_computed_starts(count_up: Callable[..., TokenSet]) -> None:
    loader = TokenLoader(count_up(701), 1, 997, seed=0)
    together = np.concatenate([loader.starts(index) for index in range(10)])
    for epoch in range(9970 // 701):
        assert len(set(together[epoch * 701 : (epoch + 1) * 701].tolist())) == 701


def test_a_corpus_smaller_than_a_batch_repeats(count_up: Callable[..., TokenSet]) -> None:
    loader = TokenLoader(count_up(11), 8, 16, seed=0)
    inputs, _ = loader.batch(0)
    assert inputs.shape == (16, 8)
    assert loader.n_windows == 1
    assert loader.batches_per_epoch == 1
    assert loader.epoch(3) == 48


def test_state_is_three_integers(count_up: Callable[..., TokenSet]) -> None:
    loader = TokenLoader(count_up(701), 7, 30, seed=5)
    assert loader.state(7) == {"seed": 5, "epoch": 2, "index": 7}
    assert loader.batches_per_epoch == 4


def test_too_long_a_context_says_which_would_do(count_up: Callable[..., TokenSet]) -> None:
    with pytest.raises(GroundupError, match=r"11 tokens are too few for a context_length of 11\. .* at most 10"):
        TokenLoader(count_up(11), 11, 2, seed=0)
    TokenLoader(count_up(11), 10, 2, seed=0).batch(0)


def test_misuse_by_a_programmer(count_up: Callable[..., TokenSet]) -> None:
    with pytest.raises(ValueError, match="batch_size 0"):
        TokenLoader(count_up(11), 4, 0, seed=0)
    with pytest.raises(IndexError):
        TokenLoader(count_up(11), 4, 1, seed=0).batch(-1)


def test_deals_over_twenty_million_tokens_a_second(make_tokens: Callable[..., TokenSet]) -> None:
    tokens = make_tokens([list(range(1000))] * 1000, shard_tokens=300_000)
    loader = TokenLoader(tokens, 256, 16, seed=0)
    best = 0.0
    for attempt in range(5):  # the machine is shared: its best moment counts
        started = time.perf_counter()
        for index in range(attempt * 500, (attempt + 1) * 500):
            loader.batch(index)
        best = max(best, 500 * 256 * 16 / (time.perf_counter() - started))
    assert best > 20e6
