"""Bytes, characters and words behind the same class, equal to Hugging Face once saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.runtime.errors import GroundupError, UsageError
from groundup.tokenizer import Tokenizer

TEXTS = ["the cat sat.", "the dog sat, too\n\n", "naïve 中文"]
UNKNOWN = "<|unk|>"
characters = st.characters(exclude_categories=["Cs", "Cn"])
# Mostly what the tokenizers know, with strangers between.
mixed = st.lists(st.sampled_from([*"the cat\n中", " sat", "the", " dog", "."]) | st.text(characters)).map("".join)


def train(algorithm: str, *, vocab_size: int | None = None, **settings: Any) -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size, algorithm=algorithm, show_progress=False, **settings)


def test_characters_are_numbered_by_code_point() -> None:
    tok = train("characters")
    known = sorted(set("".join(TEXTS)))
    assert [tok.token_bytes(number).decode() for number in range(tok.vocab_size)] == [*known, UNKNOWN, "<|endoftext|>"]
    ids = tok.encode("the €at")
    assert ids == [known.index(c) for c in "the "] + [tok.special_tokens[UNKNOWN]] + [known.index(c) for c in "at"]
    assert tok.decode(ids) == "the <|unk|>at"
    assert tok.end_of_text_id == tok.vocab_size - 1


def test_words_are_the_patterns_chunks_by_frequency() -> None:
    tok = train("words", pattern="gpt2")
    words = [tok.token_bytes(number).decode() for number in range(tok.vocab_size)]
    assert words[:2] == [" sat", "the"]  # twice each, then by code point
    assert set(words[2:-2]) == {" cat", ".", " dog", ",", " too", "\n\n", "naïve", " 中文"}
    for text in TEXTS:
        assert tok.decode(tok.encode(text)) == text
    assert tok.encode("the bird sat") == [words.index("the"), tok.special_tokens[UNKNOWN], words.index(" sat")]


def test_a_smaller_vocabulary_keeps_the_most_frequent() -> None:
    assert train("words", vocab_size=4, pattern="gpt2").encode("the sat dog") == [1, 0, 2]
    two = train("characters", vocab_size=4)
    assert [two.token_bytes(number) for number in range(2)] == [b" ", b"t"]  # the most frequent, by code point
    rare = train("words", pattern="gpt2", min_frequency=2)
    assert rare.vocab_size == 4
    assert rare.fingerprint == train("words", vocab_size=4, pattern="gpt2").fingerprint


def test_bytes_are_the_256() -> None:
    for size in (None, 257, 10_000):
        tok = train("bytes", vocab_size=size)
        assert tok.vocab_size == 257
        assert tok.encode("né") == [*"né".encode()]
        assert len(tok.merges) == 0
    with pytest.raises(UsageError, match="vocab_size = 256 is too small: 256 bytes and 1 special tokens need at least"):
        train("bytes", vocab_size=256)


@pytest.mark.parametrize("algorithm", ["bytes", "characters", "words"])
def test_saved_it_is_read_equal_by_us_and_by_hugging_face(algorithm: str, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tok = train(algorithm, pattern="gpt2")
    tok.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tok.fingerprint
    assert again.vocabulary.kind == tok.vocabulary.kind
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.get_vocab_size() == tok.vocab_size

    @settings(max_examples=200, deadline=None)
    @given(mixed)
    def check(text: str) -> None:
        found = theirs.encode(text)
        ids = tok.encode(text, allow_special="all")
        assert again.encode(text, allow_special="all") == ids == found.ids
        assert tok.encode_with_offsets(text, allow_special="all") == (ids, found.offsets)
        assert tok.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
        if algorithm == "bytes" or tok.special_tokens[UNKNOWN] not in ids:
            assert tok.decode(ids) == text
        array, offsets = tok.encode_array([text, "the", text])
        plain = tok.encode(text)
        assert array.tolist() == [*plain, *tok.encode("the"), *plain]
        assert offsets[-1] == len(array)

    check()
    assert tok.encode("") == []
    assert tok.encode_array([])[1].tolist() == [0]


@pytest.mark.parametrize("algorithm", ["bytes", "characters", "words"])
def test_transformers_opens_it(algorithm: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tok = train(algorithm)
    tok.save(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in (*TEXTS, "a stranger"):
        assert peer(text)["input_ids"] == tok.encode(text)
    assert peer.eos_token_id == tok.end_of_text_id


def test_a_strangers_text_never_becomes_a_special_token() -> None:
    for pattern in (r"\S+|\s+", r"<\|\w+\|>|."):
        tok = Tokenizer.train(
            ["<|endoftext|> the <|endoftext|>"], None, algorithm="words", pattern=pattern, show_progress=False
        )
        unknown = tok.special_tokens[UNKNOWN]
        assert tok.encode("<|endoftext|>") == [unknown]
        assert tok.encode("<|endoftext|>", allow_special="all") == [tok.end_of_text_id]
        assert tok.encode("<|unk|>") == [unknown]


def test_normalization_comes_first() -> None:
    tok = Tokenizer.train(["café"], None, algorithm="characters", normalization="NFD", show_progress=False)
    assert tok.decode(tok.encode("café")) == "cafe\u0301"


def test_mistakes() -> None:
    with pytest.raises(UsageError, match=r"unknown algorithm 'word'\. Known: bpe, bytes, .* Did you mean words\?"):
        train("word")
    with pytest.raises(UsageError, match="byte-pair encoding needs a vocab_size"):
        train("bpe")
    for algorithm in ("words", "characters"):
        with pytest.raises(UsageError, match=f"vocab_size = 2 is too small: one of the {algorithm} and 2 special"):
            train(algorithm, vocab_size=2)
        with pytest.raises(GroundupError, match="no text to train"):
            Tokenizer.train([""], None, algorithm=algorithm, show_progress=False)
        with pytest.raises(GroundupError, match=r"lone surrogate, U\+D800"):
            Tokenizer.train(["a\ud800"], None, algorithm=algorithm, show_progress=False)
        with pytest.raises(GroundupError, match=r"lone surrogate, U\+D800"):
            train(algorithm).encode("the\ud800")


def test_a_unknown_token_of_ones_own_place() -> None:
    tok = train("characters", special_tokens=("<|endoftext|>", UNKNOWN))
    assert tok.special_tokens == {"<|endoftext|>": tok.vocab_size - 2, UNKNOWN: tok.vocab_size - 1}
    assert tok.encode("€") == [tok.vocab_size - 1]
