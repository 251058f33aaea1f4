"""The fast algorithm does what the reference does, on everything."""

from __future__ import annotations

import doctest
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.tokenizer import Tokenizer, bpe, bpe_reference
from groundup.tokenizer.alphabet import ALPHABET_ORDER, CHARACTER_OF_BYTE, from_characters, to_characters
from groundup.tokenizer.pretokenize import PATTERNS, Splitter
from groundup.tokenizer.rules import Rules

# Few different bytes make many ties, overlaps ("aaa") and merges of merges.
chunk_counts = st.dictionaries(
    st.text("aab \x00é", min_size=1, max_size=40).map(str.encode), st.integers(1, 5), min_size=1, max_size=8
)


def as_bytes(tokens: list[bytes], merges: list[tuple[int, int]]) -> list[tuple[bytes, bytes]]:
    return [(tokens[left], tokens[right]) for left, right in merges]


def test_reference_on_the_example_of_the_paper() -> None:
    # Sennrich et al. 2016, figure 1 (without the end-of-word mark, and with ties by age).
    words = {b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3}
    _, merges = bpe_reference.train(words, 256 + 4)
    # e+s and s+t both occur 9 times; e is the older byte. l+o and o+w 7 times.
    assert merges == [(b"e", b"s"), (b"es", b"t"), (b"l", b"o"), (b"lo", b"w")]
    assert bpe_reference.encode(b"lowest", merges) == [b"low", b"est"]


def test_the_examples_in_the_references_docstrings() -> None:
    assert doctest.testmod(bpe_reference) == (0, 2)


def test_reference_glues_from_left_to_right() -> None:
    assert bpe_reference.merge_everywhere([b"a"] * 5, (b"a", b"a")) == [b"aa", b"aa", b"a"]


@settings(max_examples=300, deadline=None)
@given(chunk_counts, st.integers(0, 40), st.integers(1, 4))
def test_learning_equals_reference(counts: dict[bytes, int], more: int, min_frequency: int) -> None:
    expected_tokens, expected_merges = bpe_reference.train(counts, 256 + more, min_frequency)
    tokens, merges = bpe.learn(counts, 256 + more, min_frequency)
    assert as_bytes(tokens, merges) == expected_merges
    assert tokens == [bytes([byte]) for byte in range(256)] + expected_tokens[256:]
    assert len(set(tokens)) == len(tokens)


@settings(max_examples=300, deadline=None)
@given(chunk_counts, st.text("aab \x00éz", min_size=1, max_size=120))
def test_both_ways_of_merging_equal_reference(counts: dict[bytes, int], text: str) -> None:
    tokens, merges = bpe.learn(counts, 300, 1)
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    products = range(256, 256 + len(merges))
    expected = bpe_reference.encode(text.encode(), as_bytes(tokens, merges))
    for merge in (bpe.merge_short, bpe.merge_long):
        assert [tokens[number] for number in merge(list(text.encode()), ranks, products)] == expected


def test_learning_equals_reference_on_shakespeare(shakespeare: str) -> None:
    counts = Counter(chunk.encode() for chunk in Splitter(PATTERNS["gpt4"]).split(shakespeare[:50_000]))
    tokens, merges = bpe.learn(counts, 350)
    assert as_bytes(tokens, merges) == bpe_reference.train(counts, 350)[1]
    assert len(merges) == 350 - 256


def test_encoding_equals_reference_on_shakespeare(trained: Tokenizer, shakespeare: str) -> None:
    merges = [(trained.token_bytes(left), trained.token_bytes(right)) for left, right in trained.merges]
    words = sorted(set(shakespeare[:200_000].split()))[::20]
    assert len(words) > 300
    for word in words:
        chunks = [chunk.encode() for chunk in Splitter(trained.pattern).split(word)]
        expected = [token for chunk in chunks for token in bpe_reference.encode(chunk, merges)]
        assert [trained.token_bytes(number) for number in trained.encode(word)] == expected


def test_reserved_bytes_never_become_a_token() -> None:
    counts = {b"user": 10, b"us": 5}
    assert b"user" in bpe.learn(counts, 300)[0]
    tokens, _ = bpe.learn(counts, 300, reserved={b"user"})
    assert b"user" not in tokens
    assert b"us" in tokens


def test_a_chunk_of_a_megabyte_is_not_quadratic() -> None:
    text = "ab" * 500_000
    tok = Tokenizer.train([text], 300, pattern=r"(?s:.+)", special_tokens=(), show_progress=False)
    assert tok.vocab_size > 270  # ab, abab, … up to the one token that is half of the text
    started = time.perf_counter()
    ids = tok.encode(text[:-1])
    assert time.perf_counter() - started < 60  # 3 s; a quadratic loop takes hours
    assert tok.decode(ids) == text[:-1]
    assert len(ids) < 40


@pytest.mark.parametrize("capacity", [1, 7, 1000])
def test_word_cache_is_bounded_and_gives_the_same_ids(capacity: int) -> None:
    tokens, merges = bpe.learn({b"hello": 3, b"help": 3}, 300)
    rules = Rules(tokens, merges, range(len(tokens)), whole_words=False)
    cache, fresh = bpe.WordCache(rules, capacity), bpe.WordCache(rules)
    for chunk in [f"hello{n % 30}" for n in range(90)] + ["x" * 1000]:
        assert cache[chunk] == fresh[chunk]
        assert len(cache) <= capacity
        pairs = as_bytes(tokens, merges)
        ids = memoryview(cache[chunk]).cast("I").tolist()  # packed as 32-bit integers
        assert [tokens[number] for number in ids] == bpe_reference.encode(chunk.encode(), pairs)
    assert "x" * 1000 not in fresh


def test_byte_alphabet_is_hugging_faces() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    assert sorted(CHARACTER_OF_BYTE) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert [CHARACTER_OF_BYTE[byte] for byte in ALPHABET_ORDER] == sorted(CHARACTER_OF_BYTE)
    assert to_characters(b" the\n") == "ĠtheĊ"
    assert from_characters("ĠtheĊ") == b" the\n"
    assert from_characters("a b") is None
