"""The vectorised n-gram model is a proper distribution, and equals the formula done with dictionaries."""

from __future__ import annotations

import math
import resource
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.evaluation import KneserNeyModel
from groundup.evaluation.ngram import FALLBACK_DISCOUNTS
from groundup.runtime import GroundupError


class NaiveKneserNey:
    """Interpolated modified Kneser-Ney from the formulas of Chen & Goodman 1999, one dictionary per order."""

    def __init__(self, data: bytes, order: int) -> None:
        self.order = order
        padded = bytes(order - 1) + data
        highest = Counter(padded[i : i + order] for i in range(len(data)))
        self.counts: dict[int, dict[bytes, int]] = {order: dict(highest)}
        for k in range(order - 1, 0, -1):
            before = defaultdict(set)  # N1+(. g): which bytes were seen before g
            for i in range(len(data)):
                ngram = padded[i : i + order]
                before[ngram[order - k :]].add(ngram[order - k - 1])
            self.counts[k] = {gram: len(seen) for gram, seen in before.items()}
        self.discounts = {k: self.estimate(counts) for k, counts in self.counts.items()}

    @staticmethod
    def estimate(counts: dict[bytes, int]) -> tuple[float, ...]:
        n = Counter(counts.values())
        if not all(n[j] for j in (1, 2, 3, 4)):
            return FALLBACK_DISCOUNTS
        y = n[1] / (n[1] + 2 * n[2])
        found = tuple(j - (j + 1) * y * n[j + 1] / n[j] for j in (1, 2, 3))
        return found if all(0 < d <= j for j, d in enumerate(found, 1)) else FALLBACK_DISCOUNTS

    def probability(self, context: bytes, byte: int) -> float:
        return self.at(len(context) + 1, context, byte)

    def at(self, k: int, context: bytes, byte: int) -> float:
        if k == 0:
            return 1 / 256
        lower = self.at(k - 1, context[1:], byte)
        followers = {g: c for g, c in self.counts[k].items() if g[:-1] == context}
        total = sum(followers.values())
        if total == 0:
            return lower
        taken = [self.discounts[k][min(c, 3) - 1] for c in followers.values()]
        count = followers.get(context + bytes([byte]), 0)
        own = count - self.discounts[k][min(count, 3) - 1] if count else 0.0
        return own / total + sum(taken) / total * lower


@settings(deadline=None, max_examples=30)
@given(
    train=st.lists(st.sampled_from(b"ab cd\n\x00\xff"), min_size=1, max_size=150).map(bytes),
    val=st.lists(st.sampled_from(b"ab cde\n\x00\xff"), min_size=1, max_size=15).map(bytes),
    order=st.integers(1, 8),
)
def test_equals_the_formula_on_any_text(train: bytes, val: bytes, order: int) -> None:
    naive = NaiveKneserNey(train, order)
    padded = bytes(order - 1) + val
    expected = [math.log2(naive.probability(padded[i : i + order - 1], padded[i + order - 1])) for i in range(len(val))]
    np.testing.assert_allclose(KneserNeyModel(order).fit(train).log2_probabilities(val), expected, rtol=1e-11)


def test_equals_the_formula_where_the_discounts_are_estimated(shared_data: Path) -> None:
    text = (shared_data / "pretrain" / "the-verdict.txt").read_bytes()
    train, val = text[:5_000], text[15_000:15_030]
    naive, model = NaiveKneserNey(train, 3), KneserNeyModel(3).fit(train)
    assert naive.discounts[3] != FALLBACK_DISCOUNTS  # else this test would say nothing new
    padded = bytes(2) + val
    expected = [math.log2(naive.probability(padded[i : i + 2], padded[i + 2])) for i in range(len(val))]
    np.testing.assert_allclose(model.log2_probabilities(val), expected, rtol=1e-11)


@settings(deadline=None, max_examples=25)
@given(
    train=st.one_of(st.binary(min_size=1, max_size=300), st.text("abc ", min_size=1, max_size=2000).map(str.encode)),
    context=st.binary(max_size=8),
    order=st.integers(1, 8),
)
def test_the_256_next_bytes_sum_to_one(train: bytes, context: bytes, order: int) -> None:
    model = KneserNeyModel(order).fit(train)
    for start in (context, train[: len(context)], train[-5:]):
        last = [model.log2_probabilities(start + bytes([byte]))[-1] for byte in range(256)]
        assert np.exp2(last).sum() == pytest.approx(1.0, abs=1e-9)


def test_sums_to_one_and_never_sees_zero_on_real_text(shared_data: Path) -> None:
    text = (shared_data / "pretrain" / "tinyshakespeare.txt").read_bytes()
    model = KneserNeyModel(6).fit(text[:200_000])
    rng = np.random.default_rng(0)
    for position in rng.integers(200_000, len(text), size=20):
        context = text[position : position + 5]
        probabilities = [np.exp2(model.log2_probabilities(context + bytes([byte]))[-1]) for byte in range(256)]
        assert sum(probabilities) == pytest.approx(1.0, abs=1e-9)
        assert min(probabilities) > 0


def test_more_context_helps_on_real_text(shared_data: Path) -> None:
    text = (shared_data / "pretrain" / "tinyshakespeare.txt").read_bytes()
    train, val = text[:1_000_000], text[1_000_000:]
    bits = [KneserNeyModel(order).fit(train).bits_per_byte(val) for order in range(1, 7)]
    assert bits == sorted(bits, reverse=True)
    # Order 1 is no better than the exact frequencies would be.
    frequencies = Counter(train)
    assert bits[0] > -sum(math.log2(frequencies[b] / len(train)) for b in val if b in frequencies) / len(val)
    assert 2.0 < bits[5] < 2.4


def test_two_kilobytes_and_one_byte_are_enough(shared_data: Path) -> None:
    text = (shared_data / "pretrain" / "the-verdict.txt").read_bytes()
    assert 3.0 < KneserNeyModel(6).fit(text[:2_000]).bits_per_byte(text[10_000:10_500]) < 8.0
    assert 0 < KneserNeyModel(6).fit(b"x").bits_per_byte(b"x") < 8
    assert len(KneserNeyModel(6).fit(b"x").log2_probabilities(b"")) == 0


def test_the_past_is_all_that_counts() -> None:
    """A byte's probability does not change with what follows it, nor with what stands too far back."""
    model = KneserNeyModel(4).fit(b"the cat sat on the mat and the cat ran")
    whole = model.log2_probabilities(b"the cat ran on")
    np.testing.assert_array_equal(model.log2_probabilities(b"the cat"), whole[:7])
    np.testing.assert_array_equal(model.log2_probabilities(b"he cat ran on")[3:], whole[4:])


def test_misuse_is_told() -> None:
    with pytest.raises(GroundupError, match="training text is empty"):
        KneserNeyModel().fit(b"")
    with pytest.raises(GroundupError, match="held-out text is empty"):
        KneserNeyModel().fit(b"abc").bits_per_byte(b"")
    with pytest.raises(ValueError, match="fit the model"):
        KneserNeyModel().log2_probabilities(b"abc")
    with pytest.raises(ValueError, match="order = 9"):
        KneserNeyModel(9)


@pytest.mark.slow
def test_fourteen_megabytes_in_time_and_memory(shared_data: Path) -> None:
    import gzip
    import json

    with gzip.open(shared_data / "pretrain" / "books_en.jsonl.gz", "rt", encoding="utf-8") as lines:
        text = "\n".join(json.loads(line)["text"] for line in lines).encode()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    bits = KneserNeyModel(6).fit(text[:14_000_000]).bits_per_byte(text[-1_000_000:])
    assert time.process_time() - started < 25
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 1.5e9
    assert 1.5 < bits < 2.5
