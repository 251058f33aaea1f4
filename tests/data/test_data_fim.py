from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.data import FillInTheMiddle, LoaderRecipe, TokenLoader, TokenSet, make_loader
from groundup.runtime import UsageError
from groundup.tokenizer import Tokenizer

END, PREFIX, MIDDLE, SUFFIX = 1008, 1001, 1002, 1003
few = settings(max_examples=100, deadline=None)


def filled(rate: float = 1.0, spm_rate: float = 0.0, seed: int = 0) -> FillInTheMiddle:
    return FillInTheMiddle(PREFIX, MIDDLE, SUFFIX, rate, spm_rate, seed)


def example(fill: FillInTheMiddle, document: np.ndarray, epoch: int, place: int) -> list[int]:
    cuts = fill.draw(epoch, np.array([place]), np.array([len(document)]))
    how = int(cuts.first[0]), int(cuts.second[0]), bool(cuts.suffix_first[0])
    return fill.rearrange(document, *how).tolist()


def put_back(ids: list[int]) -> list[int]:
    """The document that an example was made of."""
    assert ids[0] == PREFIX
    suffix, middle = ids.index(SUFFIX), ids.index(MIDDLE)
    assert suffix < middle
    if suffix == 1:  # the suffix first, or an empty prefix: the same
        return ids[middle + 1 :] + ids[2:middle]
    return ids[1:suffix] + ids[middle + 1 :] + ids[suffix + 1 : middle]


@given(
    n=st.integers(1, 30), epoch=st.integers(0, 3), place=st.integers(0, 10**12), spm=st.sampled_from([0.0, 0.5, 1.0])
)
@few
def test_a_rearranged_document_can_be_put_together_again(n: int, epoch: int, place: int, spm: float) -> None:
    document = np.arange(7, 7 + n)
    ids = example(filled(spm_rate=spm), document, epoch, place)
    assert len(ids) == n + 3
    assert put_back(ids) == document.tolist()


def test_the_two_orders_of_the_paper() -> None:
    document = np.arange(10, 30)
    psm, spm = (example(filled(spm_rate=rate), document, 1, 5) for rate in (0.0, 1.0))
    first, second = psm.index(SUFFIX) - 1, psm.index(SUFFIX) - 1 + len(psm) - psm.index(MIDDLE) - 1
    prefix, middle, suffix = (part.tolist() for part in np.split(document, [first, second]))
    assert all(map(len, (prefix, middle, suffix)))
    assert psm == [PREFIX, *prefix, SUFFIX, *suffix, MIDDLE, *middle]
    assert spm == [PREFIX, SUFFIX, *suffix, MIDDLE, *prefix, *middle]


def test_rates_and_where_the_cuts_fall() -> None:
    places = np.arange(0, 700_000, 7)
    for rate in (0.0, 0.3, 1.0):
        assert filled(rate).draw(2, places, places).chosen.mean() == pytest.approx(rate, abs=0.006)
    one, other = (filled(0.5).draw(epoch, places, places).chosen for epoch in range(2))
    assert (one == other).mean() == pytest.approx(0.5, abs=0.01)  # another epoch chooses anew
    document = np.arange(9)
    examples = [example(filled(spm_rate=0.5), document, 0, place) for place in range(4000)]
    first = np.mean([ids[1] == SUFFIX for ids in examples])
    assert first == pytest.approx(0.5 + 0.5 * 0.19, abs=0.03)  # or an empty prefix: 1 - (9/10)^2
    in_order = [example(filled(), document, 0, place) for place in range(4000)]
    middles = Counter(len(ids) - ids.index(MIDDLE) - 1 for ids in in_order)
    for length in range(10):  # |i - j| of two uniform numbers from 0 to 9
        expected = (2 * (10 - length) if length else 10) / 100
        assert middles[length] / 4000 == pytest.approx(expected, abs=0.03)


def test_windows_keep_their_length_and_their_borders(make_tokens: Callable[..., TokenSet]) -> None:
    tokens = make_tokens([list(range(1, n)) for n in (40, 3, 90, 5, 27, 200, 4, 66)], shard_tokens=97)
    plain = TokenLoader(tokens, 31, 4, seed=5, documents=True)
    loader = TokenLoader(tokens, 31, 4, seed=5, documents=True, fill=filled(0.6, 0.5))
    changed = 0
    for index in range(30):
        (a, b, numbers), (inputs, targets, documents) = plain.batch(index), loader.batch(index)
        assert np.array_equal(inputs[:, 1:], targets[:, :-1])
        assert np.array_equal(documents, numbers)  # documents end where they ended
        assert np.array_equal(inputs == END, a == END)
        for row in range(4):
            was, now = np.append(a[row], b[row, -1]), np.append(inputs[row], targets[row, -1])
            for old, new in zip(
                np.split(was, np.flatnonzero(was == END)), np.split(now, np.flatnonzero(was == END)), strict=True
            ):
                old, new = old[old != END].tolist(), new[new != END].tolist()
                if old != new:
                    changed += 1
                    assert put_back(new) == old[:-3]
    assert changed > 50
    assert not any(one is None for one in loader.batch(0))
    again = TokenLoader(tokens, 31, 2, seed=5, documents=True, fill=filled(0.6, 0.5))
    assert np.array_equal(again.batch(7).inputs[1], loader.batch(3).inputs[3])


def test_a_tokenizer_without_sentinels_is_told_how_to_get_them(make_tokens: Callable[..., TokenSet]) -> None:
    plain = Tokenizer.train(["some text of a few words"], algorithm="bytes", show_progress=False)
    words = r"lacks <\|fim_prefix\|>, <\|fim_middle\|>, <\|fim_suffix\|>.*groundup tokenizer train --special-tokens"
    with pytest.raises(UsageError, match=words):
        FillInTheMiddle.with_tokens_of(plain, 0.5, 0.5, seed=0)
    names = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    having = Tokenizer.train(["some text"], algorithm="bytes", special_tokens=names, show_progress=False)
    tokens = make_tokens([list(b"of a text that is long enough" * 9)], tokenizer=having)
    recipe = LoaderRecipe(packing="best_fit", fim_rate=1.0, fim_spm_rate=0.0)
    inputs = make_loader(tokens, recipe, 29, 3, seed=0, tokenizer=having).batch(0).inputs
    assert (inputs == having.special_tokens["<|fim_prefix|>"]).sum() == 3
    with pytest.raises(ValueError, match="needs the tokenizer"):
        make_loader(tokens, recipe, 29, 3, seed=0)
