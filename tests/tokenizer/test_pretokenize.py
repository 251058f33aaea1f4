"""Cutting text into chunks: nothing is lost, and the cuts are those that the patterns are known for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.runtime.errors import GroundupError, UsageError
from groundup.tokenizer import Tokenizer, pretokenize
from groundup.tokenizer.pretokenize import PATTERNS, Splitter, pattern_regex

TEXT = "I'LL pay 12345 euros,\n\n  won't you?  "


@pytest.mark.parametrize(
    ("name", "chunks"),
    [
        ("gpt2", ["I", "'", "LL", " pay", " 12345", " euros", ",", "\n\n ", " won", "'t", " you", "?", "  "]),
        (
            "gpt4",
            ["I", "'LL", " pay", " ", "123", "45", " euros", ",\n\n", " ", " won", "'t", " you", "?", "  "],
        ),
        ("o200k", ["I'LL", " pay", " ", "123", "45", " euros", ",\n\n", " ", " won't", " you", "?", "  "]),
    ],
)
def test_cuts_of_the_named_patterns(name: str, chunks: list[str]) -> None:
    assert list(Splitter(pattern_regex(name)).split(TEXT)) == chunks


@given(st.text(), st.sampled_from([*PATTERNS.values(), r"\d+", r"(a)|b", r"x*", r"(?=a)|\s"]))
def test_no_character_is_lost(text: str, expression: str) -> None:
    assert "".join(Splitter(expression).split(text)) == text


def test_what_lies_between_matches_is_a_chunk_too() -> None:
    assert list(Splitter(r"\d+").split("ab12 cd3")) == ["ab", "12", " cd", "3"]
    assert list(Splitter(r"(\d)\d*").split("ab12 cd3")) == ["ab", "12", " cd", "3"]


def test_a_long_text_is_cut_in_the_same_places(monkeypatch: pytest.MonkeyPatch) -> None:
    splitter = Splitter(PATTERNS["gpt4"])
    at_once = splitter.split(TEXT)
    monkeypatch.setattr(pretokenize, "LONG_TEXT", 10)
    one_by_one = splitter.split(TEXT)
    assert not isinstance(one_by_one, list)
    assert list(one_by_one) == at_once


def test_cl100k_is_another_name_of_gpt4() -> None:
    texts = ["some text, some text"]
    by_name = [Tokenizer.train(texts, 270, pattern=name, show_progress=False) for name in ("gpt4", "cl100k")]
    assert by_name[0].pattern == by_name[1].pattern == PATTERNS["gpt4"]


def test_a_pattern_that_does_not_compile() -> None:
    with pytest.raises(UsageError, match=r"pattern '\(ab' does not compile: missing \)"):
        Tokenizer.train(["text"], 300, pattern="(ab")


def test_a_mistyped_pattern_name() -> None:
    with pytest.raises(UsageError, match=r"unknown pattern 'gtp4'\. Known: gpt2, gpt4, .* Did you mean gpt4\?"):
        Tokenizer.train(["text"], 300, pattern="gtp4")


def test_pattern_that_backtracks_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretokenize, "PATIENCE", 0.2)
    for pattern in (r"(?:a|aa)+b$", r"(a|aa)+b$"):  # cut all at once, and, for its group, match by match
        with pytest.raises(GroundupError, match="backtracks without end"):
            list(Splitter(pattern).split("a" * 60))
