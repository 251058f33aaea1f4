from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.data import Document, Dropped
from groundup.data.clean import clean
from groundup.data.dedup import ExactDuplicates

LONG = "a text that is long enough to stay, and to bear a few control characters before it is no text"


def cleaned(text: str) -> str:
    result = clean(Document(text, "name"))
    assert isinstance(result, Document), result
    return result.text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (f"{LONG}\r\nb\rc\x85d", f"{LONG}\nb\nc\nd"),
        (f"{LONG}\0\x07\x1b\x7f\x9fx\x0c", f"{LONG}x"),
        (f"\tif x:  \n\t\t{LONG}  \n", f"\tif x:  \n\t\t{LONG}  \n"),
        (f"{LONG}\n\n\n\nb", f"{LONG}\n\n\n\nb"),
        (f"{LONG}\n\n\n\n\n\n\nb", f"{LONG}\n\n\n\nb"),
        (f"{LONG}\r\n\r\n\r\n\r\n\r\n\r\nb", f"{LONG}\n\n\n\nb"),
        (f"{LONG} \ud83d é", f"{LONG} \ufffd é"),
        (f"\ufeff{LONG}", LONG),
        ("日本語のテキストも、そのまま残ります。はい。", "日本語のテキストも、そのまま残ります。はい。"),
        ("😀" * 20, "😀" * 20),
    ],
)
def test_mends(before: str, after: str) -> None:
    assert cleaned(before) == after


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "too short"),
        ("x" * 15, "too short"),
        (" " * 50 + "x" + "\n" * 50, "too short"),
        ("\x01\x02\x03" * 20 + LONG, "mostly not text"),
        ("\ufffd" * 20 + LONG, "mostly not text"),
    ],
)
def test_drops_with_a_reason(text: str, reason: str) -> None:
    result = clean(Document(text, "name"))
    assert isinstance(result, Dropped)
    assert (result.name, result.reason) == ("name", reason)


def test_min_chars() -> None:
    assert isinstance(clean(Document("x" * 15, "a"), min_chars=15), Document)


def test_what_needs_no_mending_is_the_same_object() -> None:
    document = Document(LONG, "a", "group")
    assert clean(document) is document
    assert clean(Document(LONG + "\r", "a", "group")) == Document(LONG + "\n", "a", "group")


@given(st.text(st.characters(codec=None), min_size=1))
def test_cleaning_is_idempotent_and_leaves_utf8(text: str) -> None:
    result = clean(Document(text, "a"), min_chars=1)
    if isinstance(result, Document):
        result.text.encode("utf-8")
        again = clean(result, min_chars=1)
        assert isinstance(again, Dropped) or again.text == result.text


def test_the_first_of_equal_texts_stays() -> None:
    is_new = ExactDuplicates()
    first, second = Document("one  two\nthree", "a"), Document(" one two three\n", "b")
    assert is_new(first) is first
    assert is_new(second) == Dropped("b", "duplicate", "of a")
    assert is_new(Document("one two three", "a")) == Dropped("a", "duplicate", "of a")
    different = Document("one two threes", "c")
    assert is_new(different) is different
