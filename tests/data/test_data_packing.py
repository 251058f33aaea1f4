from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groundup.data import FillInTheMiddle, PackedLoader, TokenLoader, TokenSet, best_fit
from groundup.runtime import GroundupError

END = 1008
few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def one_at_a_time(sizes: list[int], capacity: int) -> list[int]:
    """Best-fit-decreasing as one would say it; how full each row is."""
    room: list[int] = []
    for size in sorted(sizes, reverse=True):
        fits = [left for left in room if left >= size]
        if fits:
            room[room.index(min(fits))] -= size
        else:
            room.append(capacity - size)
    return sorted(capacity - left for left in room)


@given(sizes=st.lists(st.integers(1, 47), max_size=83))
@few
def test_best_fit_is_best_fit_decreasing(sizes: list[int]) -> None:
    rows_of, n_rows = best_fit(np.array(sizes, np.int64), 47)
    filled = np.bincount(rows_of, weights=sizes, minlength=n_rows).astype(int)
    assert sorted(filled.tolist()) == one_at_a_time(sizes, 47)


def documents_of(lengths: list[int]) -> list[list[int]]:
    """Documents of different tokens each, so that a token tells where it stood."""
    tokens = iter(range(1, 1008))
    return [[next(tokens) for _ in range(length)] for length in lengths]


def epoch_of_rows(loader: PackedLoader, epoch: int) -> range:
    first = next(i for i in range(10_000) if loader.epoch_of(i) == epoch)
    return range(first, next(i for i in range(first, 10_000) if loader.epoch_of(i) > epoch))


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=23),
    context=st.integers(1, 19),
    block=st.integers(1, 30),
    seed=st.integers(0, 5),
)
@few
def test_every_token_is_learnt_once_an_epoch_behind_what_precedes_it(
    make_tokens: Callable[..., TokenSet], lengths: list[int], context: int, block: int, seed: int
) -> None:
    documents = documents_of(lengths)
    tokens = make_tokens(documents, shard_tokens=13)
    loader = PackedLoader(tokens, context, 3, seed, block_documents=block)
    after = Counter()
    for ids in documents:
        after.update(zip([END, *ids], [*ids, END], strict=True))
    for epoch in range(2):
        rows = epoch_of_rows(loader, epoch)
        inputs, targets, numbers = loader.samples(rows.start, len(rows))
        assert inputs.dtype == targets.dtype == numbers.dtype == np.int64
        assert inputs.shape == targets.shape == numbers.shape == (len(rows), context)
        learnt = targets != -100
        pairs = Counter(zip(inputs[learnt].tolist(), targets[learnt].tolist(), strict=True))
        assert pairs == after
        for row in range(len(rows)):
            same = (numbers[row, 1:] == numbers[row, :-1]) & learnt[row, 1:]
            assert np.array_equal(inputs[row, 1:][same], targets[row, :-1][same])  # a document is one stream
            starts = np.flatnonzero(np.diff(numbers[row], prepend=-1))
            assert set(np.diff(numbers[row], prepend=-1).tolist()) <= {0, 1}
            empty = np.flatnonzero(~learnt[row])
            if len(empty):  # only behind everything else, and a document of its own
                assert np.array_equal(empty, np.arange(empty[0], context))
                assert empty[0] in starts
                assert set(inputs[row, empty].tolist()) == {END}


def test_only_documents_longer_than_a_row_are_cut(make_tokens: Callable[..., TokenSet]) -> None:
    tokens = make_tokens(documents_of([18, 19, 45, 3, 7]))
    loader = PackedLoader(tokens, 19, 2, seed=0)
    inputs, targets, _ = loader.samples(0, loader.report()["rows"])
    # With their end-of-text ids they take 19, 20, 46, 4 and 8 positions: the second and the third do not fit.
    assert loader.report() == {
        "packing": "best_fit",
        "padding": pytest.approx(1 - 97 / (6 * 19)),
        "rows": 6,
        "tokens": 97,
        "pieces": 8,
        "documents": 5,
        "documents_cut": 2,
        "rearranged": 0,
    }
    opened = inputs[targets != -100] == END
    assert opened.sum() == 5  # a rest goes on behind the token before it, not behind an end-of-text id


def test_little_is_left_empty_and_less_is_cut_than_by_windows(make_tokens: Callable[..., TokenSet]) -> None:
    chosen = random.Random(0)
    lengths = [min(int(chosen.lognormvariate(4, 1)), 900) for _ in range(2000)]
    tokens = make_tokens([[7] * length for length in lengths])
    packed, windows = PackedLoader(tokens, 257, 8, seed=0).report(), TokenLoader(tokens, 257, 8, seed=0).report()
    assert packed["padding"] < 0.005
    assert packed["documents_cut"] == sum(length + 1 > 257 for length in lengths)
    assert windows["documents_cut"] > 3 * packed["documents_cut"]


def test_a_row_depends_on_seed_and_number_alone(make_tokens: Callable[..., TokenSet]) -> None:
    tokens = make_tokens(documents_of([5, 17, 2, 31, 11, 7, 3, 23, 19, 13]))
    whole = PackedLoader(tokens, 11, 41, seed=3, block_documents=3).batch(0)
    for order in ([40, 3, 17, 0, 39], [5, 6, 4]):
        jumping = PackedLoader(tokens, 11, 1, seed=3, block_documents=3)
        for index in order:
            for all_rows, one in zip(whole, jumping.batch(index), strict=True):
                assert np.array_equal(all_rows[index], one[0])
    assert not np.array_equal(PackedLoader(tokens, 11, 41, seed=4, block_documents=3).batch(0)[0], whole[0])
    half = PackedLoader(tokens, 11, 41, seed=3, block_documents=3).resized(7)
    assert np.array_equal(half.batch(2)[1], whole[1][14:21])
    assert half.state(2) == {"seed": 3, "epoch": half.epoch_of(14), "index": 2}


def test_epochs_pack_other_documents_together_and_rows_come_shuffled(make_tokens: Callable[..., TokenSet]) -> None:
    tokens = make_tokens([[number] * (number % 29) for number in range(900)])
    loader = PackedLoader(tokens, 31, 1, seed=0, block_documents=300)
    first, second = (loader.samples(epoch_of_rows(loader, e).start, 50)[0] for e in range(2))
    assert not np.array_equal(first, second)
    _, _, numbers = loader.samples(0, 200)  # best fit puts the longest documents into its first rows
    counts = numbers.max(axis=1)
    assert abs(counts[:100].mean() - counts[100:].mean()) < 0.5 * counts.mean()


def test_documents_become_examples_without_losing_a_token(make_tokens: Callable[..., TokenSet]) -> None:
    documents = documents_of([0, 1, 2, 6, 14, 33, 9, 21])
    tokens = make_tokens(documents)
    fill = FillInTheMiddle(1001, 1002, 1003, rate=1.0, spm_rate=0.5, seed=2)
    loader = PackedLoader(tokens, 17, 4, seed=1, fill=fill)
    rows = epoch_of_rows(loader, 0)
    inputs, targets, _ = loader.samples(rows.start, len(rows))
    learnt = Counter(targets[targets != -100].tolist())
    own = Counter(token for ids in documents for token in (*ids, END))
    pieces = sum(-(-(len(ids) + 1) // 14) for ids in documents)
    only_end = sum(len(ids) % 14 == 0 for ids in documents)  # pieces that are nothing but an end-of-text id
    assert learnt == own + Counter(dict.fromkeys((1001, 1002, 1003), pieces - only_end))
    assert loader.report()["rearranged"] == pieces - only_end
    assert not np.isin(inputs, [-100]).any()


def test_what_cannot_be_packed(make_tokens: Callable[..., TokenSet]) -> None:
    fill = FillInTheMiddle(1, 2, 3, rate=1.0, spm_rate=0.5, seed=2)
    with pytest.raises(GroundupError, match=r"context_length of 3 has no room .* at least 4"):
        PackedLoader(make_tokens([[1, 2]]), 3, 1, seed=0, fill=fill)
    with pytest.raises(GroundupError, match="no document"):
        PackedLoader(make_tokens([]), 3, 1, seed=0)
    with pytest.raises(IndexError):
        PackedLoader(make_tokens([[1, 2]]), 3, 1, seed=0).batch(-1)
