"""How speed is measured: which passes are timed, on which encoder, and when it stops."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest

from groundup.tokenizer.measure import Encoder, Speed, collect_rows, different_texts, measure


class Factory:
    """Makes encoders that note what each of them was given; the first pass of each takes ``seconds``."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.calls: list[list[Sequence[str]]] = []

    def __call__(self) -> Encoder:
        calls: list[Sequence[str]] = []
        self.calls.append(calls)

        def arrays(texts: Sequence[str], threads: int) -> list[np.ndarray]:
            if len(calls) == 0 and texts == ["abc", "d"]:
                time.sleep(self.seconds)
            calls.append(texts)
            return [np.frombuffer(text.encode(), np.uint8) for text in texts]

        def lists(texts: Sequence[str], threads: int) -> list[list[int]]:
            return [list(text.encode()) for text in texts]

        return Encoder(arrays, lists, lambda text: list(text.encode()), collect_rows)


def test_every_cold_pass_is_the_first_of_its_encoder() -> None:
    make = Factory()
    speed, result, encoder = measure(make, ["abc", "d"], passes=3)
    throwaway, *cold = make.calls
    assert ["abc", "d"] not in throwaway
    assert [len(calls) for calls in cold] == [1, 1, 4]
    assert (len(speed.construct), len(speed.cold), len(speed.warm)) == (3, 3, 3)
    ids, offsets = encoder.collect(result)
    assert (bytes(ids.tolist()), offsets.tolist()) == (b"abcd", [0, 3, 4])


def test_the_cold_time_is_that_of_first_passes() -> None:
    speed, _, _ = measure(Factory(seconds=0.02), ["abc", "d"], passes=2)
    assert min(speed.cold) >= 0.02 > speed.typical_warm


def test_out_of_patience_there_is_one_cold_pass_and_no_warm_one() -> None:
    speed, _, _ = measure(Factory(seconds=0.02), ["abc", "d"], passes=5, patience=0.01)
    assert (len(speed.cold), len(speed.warm)) == (1, 0)
    assert speed.typical_warm == speed.typical_cold


def test_medians() -> None:
    speed = Speed(cold=[9.0, 2.0, 3.0], warm=[1.0, 5.0])
    assert (speed.typical_cold, speed.typical_warm) == (3.0, 3.0)


@pytest.mark.parametrize(("other", "different"), [([[1, 2], [3]], 0), ([[1, 2], [4]], 1), ([[1], [2, 3]], 2)])
def test_different_texts(other: list[list[int]], different: int) -> None:
    assert different_texts(collect_rows([[1, 2], [3]]), collect_rows(other)) == different
