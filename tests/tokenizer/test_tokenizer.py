"""The public class: training, encoding, decoding, special tokens, saving."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import time
import unicodedata
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.runtime.errors import GroundupError, UsageError
from groundup.tokenizer import PATTERNS, Tokenizer, compression, vocabulary_dump
from groundup.tokenizer.describe import escaped

text_without_surrogates = st.text(st.characters(exclude_categories=["Cs"]))


# ---- training


def test_ids_are_bytes_then_merges_then_special_tokens(small: Tokenizer) -> None:
    assert [small.token_bytes(number) for number in range(256)] == [bytes([n]) for n in range(256)]
    assert small.special_tokens == {"<|endoftext|>": small.vocab_size - 2, "<|end|>": small.vocab_size - 1}
    assert small.end_of_text_id == small.vocab_size - 2
    assert small.vocab_size == 256 + len(small.merges) + 2
    assert small.token_bytes(small.vocab_size - 1) == b"<|end|>"


def test_training_is_a_function_of_the_texts_not_of_their_order() -> None:
    texts = ["one two three two", "two three four three", "four five five one"]
    first, second = (Tokenizer.train(t, 280, show_progress=False) for t in (texts, reversed(texts)))
    assert first.fingerprint == second.fingerprint


def test_vocabulary_stops_where_the_text_has_no_more_pairs() -> None:
    # Two chunks of two letters, each twice: th, Ġit, and nothing else occurs as often as min_frequency.
    tok = Tokenizer.train(["it", "it"], 5000, show_progress=False)
    assert tok.vocab_size == 256 + 1 + 1
    assert Tokenizer.train(["it", "it"], 5000, min_frequency=3, show_progress=False).vocab_size == 256 + 1
    assert Tokenizer.train(["x"], 257, show_progress=False).vocab_size == 257


def test_two_kilobytes_are_enough(shakespeare: str) -> None:
    tok = Tokenizer.train([shakespeare[:2048]], 4096, show_progress=False)
    assert 300 < tok.vocab_size < 1000
    assert tok.decode(tok.encode(shakespeare[:5000])) == shakespeare[:5000]


def test_a_special_token_is_never_learned_from_text() -> None:
    tok = Tokenizer.train(["user user user"], 300, special_tokens=["user"], show_progress=False)
    assert [tok.token_bytes(n) for n in range(tok.vocab_size)].count(b"user") == 1
    assert tok.special_tokens["user"] not in tok.encode("user user")
    assert tok.end_of_text_id is None


def test_progress_is_shown_only_when_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("groundup.runtime.console.LOG_EVERY_SECONDS", 0.0)
    texts = ["".join(chr(97 + i % 26) + chr(97 + i // 26 % 26) * 3 + " " for i in range(676))] * 400
    shown = Tokenizer.train(texts, 600)
    out = capsys.readouterr().out
    assert "counting words" in out
    assert "learning merges" in out
    assert Tokenizer.train(texts, 600, show_progress=False).fingerprint == shown.fingerprint
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("names", [(), ("<|a|>",), ("<|a|>", "<|b|>", "<|c|>")])
def test_too_small_a_vocabulary_names_the_smallest(names: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=f"vocab_size = 250 is too small.* at least {256 + len(names)}"):
        Tokenizer.train(["text"], 250, special_tokens=names)
    smallest = Tokenizer.train(["text"], 256 + len(names), special_tokens=names, show_progress=False)
    assert smallest.vocab_size == 256 + len(names)


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_nothing_to_train_on(texts: list[str]) -> None:
    with pytest.raises(GroundupError, match="no text to train a tokenizer on"):
        Tokenizer.train(texts, 300, show_progress=False)
    with pytest.raises(GroundupError, match="no text to train a tokenizer on"):
        Tokenizer.train(texts, 300, pattern="x*", show_progress=False)


def test_mistakes_in_the_arguments() -> None:
    with pytest.raises(UsageError, match=r"for one text write \[text\]"):
        Tokenizer.train("one text", 300, show_progress=False)
    with pytest.raises(UsageError, match="must be a list of names"):
        Tokenizer.train(["text"], 300, special_tokens="<|end|>", show_progress=False)
    for names in (["<|a|>", "<|a|>"], [""], ["a"]):
        with pytest.raises(UsageError, match=f"special token '{names[0]}'".replace("|", r"\|")):
            Tokenizer.train(["text"], 300, special_tokens=names, show_progress=False)
    with pytest.raises(UsageError, match="min_frequency = 0"):
        Tokenizer.train(["text"], 300, min_frequency=0, show_progress=False)


# ---- encoding


@settings(max_examples=300)
@given(text_without_surrogates)
def test_round_trip(small: Tokenizer, text: str) -> None:
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert small.decode_bytes(ids) == text.encode()
    assert "".join(small.decode_stream(ids)) == text
    assert not set(ids) & set(small.special_tokens.values())


def test_round_trip_of_real_text(trained: Tokenizer, code: list[str], multilingual: list[str]) -> None:
    for text in code + multilingual:
        assert trained.decode(trained.encode(text)) == text


def test_all_ways_of_encoding_agree(trained: Tokenizer, code: list[str]) -> None:
    texts = ["", *code[:10], "", "end"]
    expected = [trained.encode(text) for text in texts]
    assert trained.encode_batch(iter(texts)) == expected
    ids, offsets = trained.encode_array(iter(texts))
    assert ids.dtype == np.uint16
    assert offsets.dtype == np.int64
    assert offsets[0] == 0
    assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == expected
    assert ids.flags.writeable  # torch.from_numpy warns about arrays that are not


def test_encode_array_of_nothing(small: Tokenizer) -> None:
    ids, offsets = small.encode_array([])
    assert ids.tolist() == []
    assert ids.dtype == np.uint16
    assert offsets.tolist() == [0]


def test_more_than_65536_tokens_need_32_bits(small: Tokenizer) -> None:
    vocabulary = [small.token_bytes(number) for number in range(small.vocab_size)]
    names = {f"<|{number}|>": number for number in range(small.vocab_size, 65_537)}
    full = Tokenizer(
        replace(small.vocabulary, tokens=vocabulary + [name.encode() for name in names], special_tokens=names)
    )
    assert full.vocab_size == 65_537
    ids, offsets = full.encode_array(["the cat", "sat"])
    assert ids.dtype == np.uint32
    assert ids.tolist() == small.encode("the cat") + small.encode("sat")
    assert offsets.tolist() == [0, len(small.encode("the cat")), len(ids)]
    assert full.encode("<|65536|>", allow_special="<|65536|>") == [65_536]


def test_one_text_where_several_are_expected(small: Tokenizer) -> None:
    for method in (small.encode_batch, small.encode_array):
        with pytest.raises(UsageError, match="several strings"):
            method("one text")


def test_lone_surrogates_are_refused_with_a_mend_that_works(small: Tokenizer) -> None:
    bad = "the cat \ud83d sat"
    for use in (small.encode, lambda text: small.encode_array([text]), lambda text: compression(small, text)):
        with pytest.raises(GroundupError, match=r"lone surrogate, U\+D83D, in .*errors='replace'"):
            use(bad)
    with pytest.raises(GroundupError, match=r"lone surrogate, U\+DC00"):
        Tokenizer.train(["a\udc00b"], 300, show_progress=False)
    mended = bad.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert small.decode(small.encode(mended)) == "the cat \ufffd sat"


# ---- special tokens


def test_special_tokens_are_plain_text_unless_asked_for(small: Tokenizer) -> None:
    text = "cat<|end|>sat<|endoftext|><|endoftext|>"
    end, end_of_text = small.special_tokens["<|end|>"], small.end_of_text_id
    plain = small.encode(text)
    assert {end, end_of_text}.isdisjoint(plain)
    one = small.encode(text, allow_special=["<|end|>"])
    assert one == [*small.encode("cat"), end, *small.encode("sat<|endoftext|><|endoftext|>")]
    assert small.encode(text, allow_special="<|end|>") == one
    both = small.encode(text, allow_special="all")
    assert both == [*small.encode("cat"), end, *small.encode("sat"), end_of_text, end_of_text]
    assert small.decode(plain) == small.decode(one) == small.decode(both) == text


def test_of_two_special_tokens_that_begin_alike_the_longer_is_found() -> None:
    tok = Tokenizer.train(["text"], 300, special_tokens=["<|a", "<|a|>"], show_progress=False)
    assert tok.encode("<|a|><|a", allow_special="all") == [
        tok.special_tokens["<|a|>"],
        tok.special_tokens["<|a"],
    ]


def test_an_unknown_special_token_names_the_nearest(small: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"'<\|endofext\|>' is no special token.* Did you mean <\|endoftext\|>"):
        small.encode("text", allow_special=["<|endofext|>"])


def test_special_tokens_in_batches_and_arrays(small: Tokenizer) -> None:
    texts = ["cat<|end|>", "", "<|end|><|endoftext|>sat", "the cat"]
    for allowed in ("all", "<|end|>", ()):
        expected = [small.encode(text, allow_special=allowed) for text in texts]
        assert small.encode_batch(texts, allow_special=allowed) == expected
        ids, offsets = small.encode_array(texts, allow_special=allowed)
        assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == expected
        assert ids.dtype == np.uint16
    ids, offsets = small.encode_array(["<|end|>"], allow_special="all")
    assert (ids.tolist(), offsets.tolist()) == ([small.special_tokens["<|end|>"]], [0, 1])


# ---- offsets


def test_offsets_are_characters_and_cover_those_they_cut(small: Tokenizer) -> None:
    text = "aé<|end|>中"
    ids, offsets = small.encode_with_offsets(text, allow_special="all")
    assert ids == small.encode(text, allow_special="all")
    assert (offsets[0][0], offsets[-1]) == (0, (9, 10))
    assert offsets[ids.index(small.special_tokens["<|end|>"])] == (2, 9)
    # Bytes of é and 中 are tokens of their own, so more than one of them covers the character.
    pieces = Tokenizer.train([], algorithm="bytes", show_progress=False).encode_with_offsets("aé中")
    assert pieces == ([*"aé中".encode()], [(0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (2, 3)])
    assert small.encode_with_offsets("") == ([], [])
    with pytest.raises(GroundupError, match="lone surrogate"):
        small.encode_with_offsets("a\ud800")


@given(text_without_surrogates)
def test_offsets_join_to_the_whole_text(small: Tokenizer, text: str) -> None:
    ids, offsets = small.encode_with_offsets(text)
    assert ids == small.encode(text)
    assert [place for place, _ in offsets] == sorted(place for place, _ in offsets)
    covered = {place for start, end in offsets for place in range(start, end)}
    assert covered == set(range(len(text)))
    for number, (start, end) in zip(ids, offsets, strict=True):
        assert small.token_bytes(number) in text[start:end].encode()


# ---- normalization


def test_normalization_is_off_unless_asked_for(tmp_path: Path) -> None:
    text, composed = "cafe\u0301 cafe\u0301 ﬁ ﬁ", "café café ﬁ ﬁ"
    plain = Tokenizer.train([text], 300, show_progress=False)
    assert plain.decode(plain.encode(text)) == text
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        tok = Tokenizer.train([text], 300, show_progress=False, normalization=form)
        normal = unicodedata.normalize(form, text)
        assert tok.encode(text) == tok.encode(composed) == tok.encode(normal)
        assert tok.decode(tok.encode(text)) == normal
        assert tok.merges == Tokenizer.train([normal], 300, show_progress=False).merges
        ids, _ = tok.encode_array([text, composed])
        assert ids.tolist() == tok.encode(text) * 2
        tok.save(tmp_path)
        assert Tokenizer.load(tmp_path).fingerprint == tok.fingerprint
    with pytest.raises(UsageError, match="unknown normalization 'nfc'"):
        Tokenizer.train([text], 300, normalization="nfc", show_progress=False)  # type: ignore[arg-type]


# ---- decoding


@settings(max_examples=300)
@given(st.lists(st.integers(0, 257), max_size=30))
def test_stream_equals_decode_on_any_bytes(small: Tokenizer, ids: list[int]) -> None:
    assert "".join(small.decode_stream(iter(ids))) == small.decode(ids)


def test_stream_never_emits_half_a_character(small: Tokenizer) -> None:
    ids = list("aé中👋".encode())  # ids below 256 are bytes: every character comes in pieces
    assert list(small.decode_stream(ids)) == ["a", "é", "中", "👋"]
    assert list(small.decode_stream(ids[:-1])) == ["a", "é", "中", "\ufffd"]


def test_decode_takes_arrays_and_error_handlers(small: Tokenizer) -> None:
    assert small.decode(np.array([104, 105], dtype=np.uint16)) == "hi"
    assert small.decode([0xFF, 104]) == "\ufffdh"
    assert small.decode([0xFF, 104], errors="ignore") == "h"
    assert small.decode([]) == ""


@pytest.mark.parametrize("wrong", [-1, 10**9])
def test_an_id_out_of_range_is_named(small: Tokenizer, wrong: int) -> None:
    for use in (small.decode, small.decode_bytes, lambda ids: list(small.decode_stream(ids))):
        with pytest.raises(GroundupError, match=f"token id {wrong} is out of range.* 0 to {small.vocab_size - 1}"):
            use([1, wrong])
    with pytest.raises(GroundupError, match="out of range"):
        small.token_bytes(small.vocab_size)


# ---- the rest


def test_fingerprint_tells_tokenizers_apart(small: Tokenizer) -> None:
    parts, size = small.vocabulary, small.vocab_size
    twin = replace(parts, tokens=[*parts.tokens], merges=[*small.merges], chat_template="{{ x }}", eos_token="<|end|>")
    assert Tokenizer(twin).fingerprint == small.fingerprint
    assert len(small.fingerprint) == 64
    end, longer = "<|end|>", {"tokens": [*parts.tokens, b"new"]}
    others: list[dict[str, Any]] = [
        {"pattern": r"\S+|\s+"},
        {"merges": small.merges[:-1]},
        {"special_tokens": {"<|endoftext|>": size - 1, end: size - 2}},
        {**longer, "special_tokens": {**parts.special_tokens, "new": size}},
        {**longer, "added_tokens": {"new": size}},
        {**longer, "added_tokens": {"new": size}, "token_rules": {"new": ["lstrip"]}},
        {**longer, "added_tokens": {"new": size}, "token_rules": {"new": ["rstrip"]}},
        {"whole_words": True},
        {"normalization": "NFC"},
        {"normalization": "NFD"},
        {"prefix_space": True},
        {"prefix": (size - 1,)},
        {"suffix": (size - 1,)},
        {"merges": [], "kind": "words", "unknown": 0, "tokens": [b"a", b"b"], "special_tokens": {}},
        {"merges": [], "kind": "words", "unknown": 1, "tokens": [b"a", b"b"], "special_tokens": {}},
        {"merges": [], "kind": "characters", "unknown": 1, "tokens": [b"a", b"b"], "special_tokens": {}},
    ]
    fingerprints = {Tokenizer(replace(parts, **other)).fingerprint for other in others}
    assert len(fingerprints | {small.fingerprint}) == len(others) + 1


def test_fingerprint_of_a_plain_vocabulary_stays_what_it_was() -> None:
    # Token shards that were written before there were other kinds of vocabularies name it.
    tok = Tokenizer.train(["it is it"], 300, pattern="gpt2", show_progress=False)
    content = [
        PATTERNS["gpt2"],
        [tok.token_bytes(number).hex() for number in range(tok.vocab_size)],
        tok.merges,
        [["<|endoftext|>", tok.vocab_size - 1]],
    ]
    assert tok.fingerprint == hashlib.sha256(json.dumps(content).encode()).hexdigest()


def test_a_copy_for_another_process_is_equal(small: Tokenizer) -> None:
    twin = copy.deepcopy(small)
    assert twin is not small
    assert twin.fingerprint == small.fingerprint
    assert twin.encode("the cat sat") == small.encode("the cat sat")


def test_vocabulary_dump_is_one_line_per_token() -> None:
    tok = Tokenizer.train([" on on\n on on"], 300, show_progress=False)
    lines = vocabulary_dump(tok).splitlines()
    assert len(lines) == tok.vocab_size
    assert lines[10] == r'    10  "\n"'
    assert lines[65] == '    65  "A"'
    assert lines[255] == r'   255  "\xff"'
    # " o" and "on" occur equally often; "o" is older than the space in the byte alphabet.
    assert lines[256] == '   256  "on"  = 111 "o" + 110 "n"'
    assert lines[257] == '   257  " on"  = 32 " " + 256 "on"'
    assert lines[-1] == f'{tok.vocab_size - 1:>6}  "<|endoftext|>"  special'


@given(st.binary() | st.text("\\nx0\x85é\u200b\n").map(str.encode))
def test_escaped_bytes_fit_on_a_line_and_can_be_told(token: bytes) -> None:
    def unescape(match: re.Match[bytes]) -> bytes:
        found = match[0]
        if found[1:2] == b"x":
            return bytes([int(found[2:], 16)])
        if found[1:2] in b"uU":
            return chr(int(found[2:], 16)).encode()
        return {b"\\n": b"\n", b"\\r": b"\r", b"\\t": b"\t", b"\\\\": b"\\"}[found]

    shown = escaped(token)
    assert shown.isprintable()
    assert re.sub(rb"\\(?:x..|u....|U........|[nrt\\])", unescape, shown.encode()) == token


def test_compression_counts(small: Tokenizer) -> None:
    text = "the cat sat on the mat"
    tokens = len(small.encode(text))
    figures = compression(small, text)
    assert figures["bytes"] == 22
    assert figures["words"] == 6
    assert figures["tokens"] == tokens < 22
    assert figures["bytes_per_token"] == 22 / tokens
    assert figures["tokens_per_word"] == tokens / 6
    assert compression(small, "")["bytes_per_token"] == 0.0


@pytest.mark.slow
def test_the_standard_library_is_trained_on_and_encoded_in_seconds() -> None:
    folder = Path(sysconfig.get_paths()["stdlib"])
    outside = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    files = [file for file in folder.rglob("*.py") if outside.isdisjoint(file.relative_to(folder).parts)]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    size = sum(len(text.encode()) for text in texts)
    assert size > 5_000_000

    # Compiling happens once per machine, and is no part of what is measured.
    Tokenizer.train(texts[:1], 300, show_progress=False).encode_array(texts[:1])
    started = time.perf_counter()
    tok = Tokenizer.train(texts, 4096, show_progress=False)
    trained_after = time.perf_counter() - started
    ids, offsets = tok.encode_array(texts)
    encoded_after = time.perf_counter() - started - trained_after

    assert tok.vocab_size == 4096
    assert size / len(ids) > 3
    for number in range(0, len(texts), 50):
        assert tok.decode(ids[offsets[number] : offsets[number + 1]]) == texts[number]
    # For the 12 MB of CPython 3.11: 1.7 s and 1.3 s on one quiet core. Five times that is no noise.
    assert trained_after < 12 * size / 14e6
    assert encoded_after < 8 * size / 14e6


def test_importing_the_room_is_light(root: Path) -> None:
    heavy = "{'torch', 'matplotlib', 'transformers', 'tokenizers', 'huggingface_hub', 'rich'} & set(sys.modules)"
    code = f"import sys, groundup.tokenizer; sys.exit(repr({heavy}) if {heavy} else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root / "src", timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
