"""What is said of a tokenizer and of texts: compression, scripts, the longest and the rarest tokens."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from groundup.runtime.errors import GroundupError
from groundup.tokenizer import Tokenizer, compression, vocabulary_dump
from groundup.tokenizer.describe import (
    Compression,
    longest_tokens,
    main_script,
    rarest_tokens,
    survey,
    unused_tokens,
)

DOCUMENTS = [
    ("en", "the cat sat on the mat"),
    ("zh", "中文 中文。"),
    ("en", "and so they all sat"),
    ("en", ""),
    ("zh", "中"),
]


def test_a_survey_counts_what_counting_one_by_one_counts(small: Tokenizer) -> None:
    found = survey(small, iter(DOCUMENTS))
    expected = Counter(token for _, text in DOCUMENTS for token in small.encode(text))
    assert {number: count for number, count in enumerate(found.occurrences.tolist()) if count} == expected
    assert found.total == Compression(
        documents=5,
        bytes=sum(len(text.encode()) for _, text in DOCUMENTS),
        characters=sum(len(text) for _, text in DOCUMENTS),
        words=6 + 2 + 5 + 0 + 1,
        tokens=expected.total(),
    )
    assert list(found.groups) == ["en", "zh"]
    assert found.groups["zh"].characters == 7
    assert found.groups["zh"].tokens == sum(len(small.encode(text)) for name, text in DOCUMENTS if name == "zh")
    assert sum(group.bytes for group in found.groups.values()) == found.total.bytes


def test_a_survey_does_not_depend_on_how_texts_fall_into_batches(
    small: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = survey(small, DOCUMENTS)
    for batch in (1, 20, 30):
        monkeypatch.setattr("groundup.tokenizer.describe.BATCH", batch)
        parts = survey(small, DOCUMENTS)
        assert parts.total == whole.total
        assert parts.groups == whole.groups
        assert np.array_equal(parts.occurrences, whole.occurrences)


def test_a_survey_agrees_with_the_compression_of_each_text(small: Tokenizer) -> None:
    for _, text in DOCUMENTS:
        figures, total = compression(small, text), survey(small, [("", text)]).total
        for name in ("bytes", "characters", "words", "tokens", "bytes_per_token", "tokens_per_word"):
            assert figures[name] == getattr(total, name), name


def test_nothing_at_all(small: Tokenizer) -> None:
    found = survey(small, [])
    assert (found.total, found.groups) == (Compression(), {})
    assert (found.total.bytes_per_token, found.total.tokens_per_word, found.total.tokens_per_character) == (0, 0, 0)
    assert rarest_tokens(small, found.occurrences, 5) == []
    assert unused_tokens(small, found.occurrences) == small.vocab_size - len(small.special_tokens)


def test_a_lone_surrogate_in_a_survey(small: Tokenizer) -> None:
    with pytest.raises(GroundupError, match="lone surrogate"):
        survey(small, [("", "a"), ("", "b\ud800")])


def test_longest_tokens(small: Tokenizer) -> None:
    special = set(small.special_tokens.values())
    lengths = sorted((len(small.token_bytes(n)) for n in range(small.vocab_size) if n not in special), reverse=True)
    for count in (1, 7, small.vocab_size * 2):
        found = longest_tokens(small, count)
        assert [len(small.token_bytes(number)) for number in found] == lengths[:count]
        assert special.isdisjoint(found)
        assert len(set(found)) == len(found)


def test_rarest_tokens(small: Tokenizer) -> None:
    rng = random.Random(1)
    occurrences = np.array([rng.choice([0, 0, 1, 2, 3, 50]) for _ in range(small.vocab_size)])
    for count in (1, 5, 60, 10_000):
        found = rarest_tokens(small, occurrences, count)
        assert occurrences[found].tolist() == sorted(occurrences[occurrences > 0].tolist())[:count]
        assert len(set(found)) == len(found)
    ordinary = np.setdiff1d(np.arange(small.vocab_size), list(small.special_tokens.values()))
    assert unused_tokens(small, occurrences) == int((occurrences[ordinary] == 0).sum())


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("The quick brown fox", "Latin"),
        ("Ünïcödé ﬁ", "Latin"),
        ("Привет, world", "Cyrillic"),
        ("Γειά σου", "Greek"),
        ("مرحبا بالعالم", "Arabic"),
        ("שלום", "Hebrew"),
        ("नमस्ते", "Devanagari"),
        ("你好，世界", "Han"),
        ("人々は平等である", "Japanese"),
        ("カタカナ", "Japanese"),
        ("안녕하세요", "Hangul"),
        ("สวัสดี", "Thai"),
        ("ᏣᎳᎩ", "Cherokee"),
        ("ᓀᐦᐃᔭᐍᐏᐣ", "Canadian"),
        ("𝐁𝐨𝐥𝐝 123 !?", ""),
        ("", ""),
    ],
)
def test_the_script_of_a_text(text: str, script: str) -> None:
    assert main_script(text) == script


def test_scripts_of_real_text(multilingual: list[str]) -> None:
    scripts = Counter(map(main_script, multilingual))
    assert scripts.most_common(1)[0][0] == "Latin"
    assert scripts["Cyrillic"] >= 2
    assert scripts[""] == 0


def test_the_dump_marks_special_tokens(small: Tokenizer) -> None:
    lines = vocabulary_dump(small).splitlines()
    assert len(lines) == small.vocab_size
    assert [line.endswith("  special") for line in lines].count(True) == 2
