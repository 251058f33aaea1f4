from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from groundup.data import Loader, Prefetcher, TokenBatch, TokenLoader, TokenSet
from groundup.runtime import GroundupError


class Counting(Loader):
    """Batches that are their own index; notes who asked, and fails where told to."""

    def __init__(self) -> None:
        super().__init__(3, 1, 7)
        self.asked: list[tuple[int, str]] = []
        self.broken: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()

    def samples(self, first: int, count: int) -> TokenBatch:
        self.gate.wait(20)
        self.asked.append((first, threading.current_thread().name))
        if first in self.broken:
            raise GroundupError(f"data/tokens-{first:05d}.bin: damaged")
        return TokenBatch(np.full((count, 3), first), np.full((count, 3), first + 1))

    def epoch_of(self, sample: int) -> int:
        return sample // 10

    def report(self) -> dict[str, object]:
        return {"padding": 0.0, "documents_cut": 0}


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "it does not happen"
        time.sleep(0.002)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("groundup-prefetch")]


def test_batches_are_those_of_the_loader(make_tokens: Callable[..., TokenSet]) -> None:
    tokens = make_tokens([list(range(1000))], shard_tokens=97)
    loader = TokenLoader(tokens, 7, 5, seed=0)
    with Prefetcher(TokenLoader(tokens, 7, 5, seed=0), depth=3) as ahead:
        for index in [*range(9), 4, 5, 40, 0, 1, 1]:  # in order, back after a rollback, forward, the same again
            for one, other in zip(ahead.batch(index)[:2], loader.batch(index)[:2], strict=True):
                assert np.array_equal(one, other)
        assert ahead.state(3) == loader.state(3)
        assert ahead.epoch(30) == loader.epoch(30)
        assert ahead.report() == loader.report()


def test_it_reads_on_in_a_thread_up_to_its_depth() -> None:
    loader = Counting()
    with Prefetcher(loader, depth=3, stride=4) as ahead:
        assert ahead.batch(2).inputs[0, 0] == 2
        wait_for(lambda: len(loader.asked) == 4)
        time.sleep(0.05)
        assert [index for index, _ in loader.asked] == [2, 6, 10, 14]  # and no further, until one is taken
        assert ahead.batch(6).inputs[0, 0] == 6
        wait_for(lambda: len(loader.asked) == 5)
        assert {name.startswith("groundup-prefetch") for _, name in loader.asked} == {True}


def test_an_error_comes_where_its_batch_is_asked_for() -> None:
    loader = Counting()
    loader.broken = {2}
    with Prefetcher(loader, depth=5) as ahead:
        assert [ahead.batch(index).inputs[0, 0] for index in (0, 1)] == [0, 1]
        with pytest.raises(GroundupError, match=r"data/tokens-00002\.bin: damaged"):
            ahead.batch(2)
        assert ahead.batch(3).inputs[0, 0] == 3
        loader.broken = set()
        assert ahead.batch(2).inputs[0, 0] == 2


def test_what_is_done_to_a_batch_is_done_in_the_thread() -> None:
    def convert(batch: TokenBatch) -> tuple[int, str]:
        return int(batch.inputs[0, 0]), threading.current_thread().name

    with Prefetcher(Counting(), depth=1, convert=convert) as ahead:
        index, name = ahead.batch(5)
        assert index == 5
        assert name.startswith("groundup-prefetch")


def test_closing_ends_the_thread_and_drops_what_waits() -> None:
    before = threads()
    loader = Counting()
    ahead = Prefetcher(loader, depth=4)
    ahead.batch(0)
    loader.gate.clear()
    threading.Timer(0.05, loader.gate.set).start()
    ahead.close()
    ahead.close()
    assert threads() == before
    assert len(loader.asked) <= 5
    with pytest.raises(RuntimeError, match="closed"):
        ahead.batch(1)


def test_another_batch_size_goes_on_at_the_same_sample() -> None:
    loader = Counting().resized(4)
    ahead = Prefetcher(loader, depth=2)
    assert ahead.batch(3).inputs[0, 0] == 12
    half = ahead.resized(2)
    assert half.batch(6).inputs.shape == (2, 3)
    assert half.batch(6).inputs[0, 0] == 12
    half.close()


def test_misuse_by_a_programmer() -> None:
    for depth, stride in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            Prefetcher(Counting(), depth, stride)
    with pytest.raises(ValueError, match="batch_size 0"):
        Counting().resized(0)
