"""Near duplicates, against Jaccard's index of all pairs."""

from __future__ import annotations

import random

import numpy as np
import pytest

from groundup.data.minhash import FUNCTIONS, NearDuplicates, runs_of

WORDS = [f"w{number}" for number in range(400)]


def changed(words: list[str], count: int, rng: random.Random) -> list[str]:
    found = list(words)
    for place in rng.sample(range(len(words)), count):
        found[place] = rng.choice(WORDS)
    return found


def jaccard(a: str, b: str, run: int = 5) -> float:
    one, other = set(runs_of(a, run).tolist()), set(runs_of(b, run).tolist())
    return len(one & other) / len(one | other)


def test_runs_of_words() -> None:
    assert len(runs_of("a b c d e f", 5)) == 2
    assert len(runs_of("a a a a a a a", 5)) == 1
    assert len(runs_of("a b", 5)) == 1
    assert np.array_equal(runs_of("The cat, sat.", 3), runs_of("the CAT sat", 3))
    assert not np.array_equal(runs_of("the cat sat", 3), runs_of("the cat sits", 3))
    assert len(runs_of("", 5)) == 1


def test_a_signature_estimates_the_share() -> None:
    rng, near = random.Random(1), NearDuplicates()
    for count in (0, 1, 3, 8, 30):
        words = rng.choices(WORDS, k=300)
        a, b = " ".join(words), " ".join(changed(words, count, rng))
        estimate = float((near.signature(a) == near.signature(b)).mean())
        assert estimate == pytest.approx(jaccard(a, b), abs=4 * 0.5 / FUNCTIONS**0.5)
    long = " ".join(rng.choices(WORDS, k=9000))  # more runs than are hashed at once
    other = " ".join(rng.choices(WORDS, k=9000))
    both = long + " " + other
    estimate = float((near.signature(long) == near.signature(both)).mean())
    assert estimate == pytest.approx(jaccard(long, both), abs=4 * 0.5 / FUNCTIONS**0.5)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8, 0.95])
def test_likes_are_found_and_others_are_not(threshold: float) -> None:
    rng, near = random.Random(2), NearDuplicates(threshold)
    originals = [rng.choices(WORDS, k=400) for _ in range(60)]
    for words in originals:
        assert near(" ".join(words)) is None
    found = missed = wrong = 0
    for number, words in enumerate(originals):
        copy = " ".join(changed(words, rng.choice([0, 0, 1, 5, 12, 40]), rng))
        share = jaccard(" ".join(words), copy)
        answer = near(copy)
        if share > min(threshold + 0.15, 0.99):
            found += answer is not None and answer[0] == number
            missed += answer is None
        elif share < threshold - 0.15:
            wrong += answer is not None
    assert missed == wrong == 0
    assert found > 10


def test_the_first_of_several_is_kept() -> None:
    near = NearDuplicates(0.8)
    text = "one two three four five six seven eight nine ten"
    assert near(text) is None
    assert near("something else that has nothing to do with it at all") is None
    assert near(text + "!") == (0, 1.0)
    assert near(text.upper()) == (0, 1.0)


def test_a_threshold_that_makes_no_sense() -> None:
    for threshold in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            NearDuplicates(threshold)
