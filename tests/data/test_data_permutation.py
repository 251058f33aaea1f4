from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.data.permutation import Permutation, derive_key


@given(n=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=150, deadline=None)
def test_is_a_bijection(n: int, key: int) -> None:
    assert sorted(Permutation(n, key)(np.arange(n)).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 1009, 65536, 99_991])
def test_is_a_bijection_at_the_edges(n: int) -> None:
    assert np.array_equal(np.sort(Permutation(n, 3)(np.arange(n))), np.arange(n))


@given(n=st.integers(1, 2**62 - 1), key=st.integers(0, 2**64 - 1), data=st.data())
@settings(max_examples=100, deadline=None)
def test_stays_in_range_and_collides_nowhere_in_huge_domains(n: int, key: int, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True))
    result = Permutation(n, key)(places)
    assert result.min() >= 0
    assert result.max() < n
    assert len(set(result.tolist())) == len(places)


def test_one_place_at_a_time_gives_the_same_as_all_at_once() -> None:
    permutation = Permutation(1009, 11)
    together = permutation(np.arange(1009))
    assert [int(permutation(place)) for place in range(0, 1009, 97)] == together[::97].tolist()
    assert np.array_equal(permutation(np.arange(1008).reshape(28, 36)), together[:1008].reshape(28, 36))


def test_looks_shuffled() -> None:
    n = 100_003
    result = Permutation(n, derive_key(0, 0))(np.arange(n))
    # Against a uniformly random order: correlation has a standard deviation of 1/sqrt(n) = 0.003, and the
    # number of rises is n/2 with a standard deviation of sqrt(n/12) = 91; five of them each.
    assert abs(np.corrcoef(np.arange(n), result)[0, 1]) < 0.016
    assert abs(np.corrcoef(result[:-1], result[1:])[0, 1]) < 0.016
    assert abs(int((np.diff(result) > 0).sum()) - n / 2) < 460
    fixed = int((result == np.arange(n)).sum())  # Poisson with mean 1
    assert fixed < 10


def test_every_order_of_few_things_occurs() -> None:
    orders = {tuple(Permutation(4, derive_key(1, key))(np.arange(4)).tolist()) for key in range(600)}
    assert len(orders) == 24


def test_each_thing_lands_everywhere_equally_often() -> None:
    n, keys = 7, 7000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), Permutation(n, derive_key(key))(np.arange(n))] += 1
    # Binomial with mean 1000 and standard deviation 29.
    assert np.abs(counts - keys / n).max() < 150


def test_keys_differ_by_seed_epoch_and_sign() -> None:
    keys = {derive_key(seed, epoch) for seed in range(-20, 20) for epoch in range(50)}
    assert len(keys) == 40 * 50


def test_refuses_nothing_to_permute() -> None:
    with pytest.raises(ValueError, match="cannot permute 0"):
        Permutation(0, 1)
