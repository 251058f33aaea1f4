from __future__ import annotations

import random
import string
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.data import Document
from groundup.data.document import utf8_length
from groundup.data.split import Outline, Split, cut_near_end, split
from groundup.runtime import GroundupError


@dataclass
class Parts:
    """A split, and what it makes of the documents."""

    choice: Split
    train: list[Document]
    val: list[Document]

    @property
    def way(self) -> str:
        return self.choice.way

    @property
    def wanted_bytes(self) -> int:
        return self.choice.wanted_bytes


def parted(documents: list[Document], fraction: float, most: int, seed: int) -> Parts:
    choice = split(Outline(documents), fraction, most, seed)
    parts = Parts(choice, [], [])
    for part, document in choice.parts(documents):
        (parts.train if part == "train" else parts.val).append(document)
    return parts


def words(n_bytes: int, seed: int) -> str:
    letters = random.Random(seed).choices(string.ascii_lowercase + "   \n", k=n_bytes - 2)
    return "a" + "".join(letters) + "z"


def corpus(sizes: list[int], groups: list[str | None] | None = None) -> list[Document]:
    groups = groups or [None] * len(sizes)
    return [Document(words(n, i), f"d{i}", g) for i, (n, g) in enumerate(zip(sizes, groups, strict=True))]


def size_of(documents: list[Document]) -> int:
    return sum(utf8_length(document.text) for document in documents)


def check(documents: list[Document], parts: Parts) -> None:
    """Neither part is empty, and together they hold every character once, in order."""
    assert parts.train
    assert parts.val
    assert all(document.text.strip() for document in (*parts.train, *parts.val))
    if parts.way == "by document":
        names = {document.name for document in parts.val}
        assert parts.val == [document for document in documents if document.name in names]
        assert parts.train == [document for document in documents if document.name not in names]
        return
    tails = {document.name: document.text for document in parts.val}
    assert [one.text + tails.get(f"{one.name} (end)", "") for one in parts.train] == [one.text for one in documents]


@given(
    sizes=st.lists(st.integers(16, 4000), min_size=1, max_size=60),
    fraction=st.sampled_from([0.001, 0.01, 0.05, 0.2, 0.5]),
    most=st.sampled_from([256, 2000, 10**6]),
    seed=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_any_corpus_is_parted(sizes: list[int], fraction: float, most: int, seed: int) -> None:
    documents = corpus(sizes)
    parts = parted(documents, fraction, most, seed)
    check(documents, parts)
    # A cut at the end of a line may hold out half as much again.
    assert size_of(parts.val) <= 1.5 * parts.wanted_bytes + 2
    assert parts == parted(documents, fraction, most, seed)


@given(sizes=st.lists(st.integers(200, 3000), min_size=100, max_size=120), seed=st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_many_documents_are_held_out_whole_and_in_the_amount_wanted(sizes: list[int], seed: int) -> None:
    documents = corpus(sizes)
    parts = parted(documents, 0.1, 10**6, seed)
    assert parts.way == "by document"
    check(documents, parts)
    assert 0.8 * parts.wanted_bytes < size_of(parts.val) <= parts.wanted_bytes == int(0.1 * sum(sizes))


def test_groups_stay_together() -> None:
    groups = [f"g{i % 40}" for i in range(200)]
    parts = parted(corpus([500 + i for i in range(200)], groups), 0.1, 10**6, seed=0)
    assert parts.way == "by document"
    assert not {one.group for one in parts.train} & {one.group for one in parts.val}


def test_the_choice_depends_on_seed_and_text_not_on_names_or_order() -> None:
    documents = corpus([1000 + i for i in range(50)])
    held_out = {one.text for one in parted(documents, 0.1, 10**6, seed=0).val}
    renamed = [Document(one.text, f"other-{one.name}") for one in reversed(documents)]
    assert {one.text for one in parted(renamed, 0.1, 10**6, seed=0).val} == held_out
    assert {one.text for one in parted(documents, 0.1, 10**6, seed=1).val} != held_out


def test_a_document_too_large_is_passed_over() -> None:
    documents = corpus([500_000, *[1000] * 60])
    parts = parted(documents, 0.05, 10**6, seed=0)
    assert parts.way == "by document"
    assert documents[0] in parts.train
    assert len(parts.val) == 28


def test_large_documents_only_give_up_their_ends() -> None:
    parts = parted(corpus([50_000] * 24), 0.01, 10**6, seed=0)
    assert parts.way == "end of each document"
    assert len(parts.val) == 24
    assert 9_000 < size_of(parts.val) < 15_000


def test_one_book_gives_up_its_end() -> None:
    documents = corpus([40_000])
    parts = parted(documents, 0.05, 10**6, seed=0)
    assert parts.way == "end of the longest document"
    assert parts.val[0].name == "d0 (end)"
    check(documents, parts)


def test_a_small_text_holds_out_a_quarter_at_most() -> None:
    parts = parted(corpus([2000]), 0.05, 10**6, seed=0)
    assert 250 <= size_of(parts.val) <= 750


def test_the_most_to_hold_out_is_kept_to() -> None:
    parts = parted(corpus([20_000] * 200), 0.05, 60_000, seed=0)
    assert size_of(parts.val) == 60_000


def test_cut_prefers_paragraphs_to_lines_to_characters() -> None:
    assert cut_near_end("a" * 50 + "\n\n" + "b" * 20 + "\n" + "c" * 30, 40) == 52
    assert cut_near_end("a" * 60 + "\n" + "b" * 39, 40) == 61
    assert cut_near_end("a" * 100, 40) == 60
    assert cut_near_end("é" * 50, 41) == 29  # 41 bytes from the end lies within a character: the next larger tail


@given(st.text(min_size=2).filter(lambda text: len("".join(text.split())) >= 2), st.integers(0, 300))
def test_a_cut_leaves_something_on_both_sides(text: str, tail: int) -> None:
    at = cut_near_end(text, tail)
    assert text[:at].strip()
    assert text[at:].strip()


def test_a_text_too_short_to_cut() -> None:
    with pytest.raises(GroundupError, match="too short"):
        cut_near_end("  x \n", 2)
