"""tiktoken's, GPT-2's, SentencePiece's and GGUF's files: read right, written right, and refused in one line."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.runtime.errors import GroundupError, UsageError
from groundup.tokenizer import PATTERNS, Tokenizer
from groundup.tokenizer.formats import tiktoken as our_tiktoken

text_without_surrogates = st.text(st.characters(exclude_categories=["Cs"]))
TEXT = "Hello wörld, it's 12345 中文\n\n  def f(x):\n\treturn x  👋🏽<|endoftext|><s> </s>"


def refused(path: Path | str, **arguments: Any) -> str:
    with pytest.raises(GroundupError) as caught:
        Tokenizer.load(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path)) or str(path) in message
    return message


# ---- .tiktoken


def lines_of(tok: Tokenizer) -> list[bytes]:
    ordinary = tok.vocabulary.ordinary_ids()
    return [base64.b64encode(tok.token_bytes(number)) + b" %d" % number for number in ordinary]


@pytest.fixture
def ranks(small: Tokenizer, tmp_path: Path) -> Path:
    """The vocabulary of ``small``, as a file."""
    small.save_tiktoken(tmp_path / "small.tiktoken")
    return tmp_path / "small.tiktoken"


def test_a_trained_vocabulary_goes_to_tiktoken_and_back(small: Tokenizer, ranks: Path) -> None:
    assert ranks.read_bytes().split(b"\n") == [*lines_of(small), b""]
    again = Tokenizer.load(ranks, pattern="gpt4", special_tokens=small.special_tokens)
    assert (again.merges, again.special_tokens) == (small.merges, small.special_tokens)
    assert again.encode(TEXT, allow_special="all") == small.encode(TEXT, allow_special="all")
    without = Tokenizer.load(ranks, pattern="gpt4")
    assert without.special_tokens == {}
    assert without.encode(TEXT) == small.encode(TEXT)


def test_tiktoken_itself_makes_the_same_ids(small: Tokenizer, ranks: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    pairs = (line.split() for line in ranks.read_bytes().splitlines())
    peer = tiktoken.Encoding(
        "small",
        pat_str=PATTERNS["gpt4"],
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in pairs},
        special_tokens=small.special_tokens,
    )
    again = Tokenizer.load(ranks, pattern="gpt4", special_tokens=small.special_tokens)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(text_without_surrogates | st.sampled_from(["the cat", "<|end|>", " sat", "中文"])).map("".join))
    def check(text: str) -> None:
        assert again.encode(text) == small.encode(text) == peer.encode_ordinary(text)
        assert again.encode(text, allow_special="all") == peer.encode(text, allowed_special="all")

    check()


@settings(max_examples=300)
@given(st.lists(st.integers(0, 257), max_size=30))
def test_invalid_utf8_is_decoded_as_tiktoken_does(ids: list[int]) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    peer = tiktoken.Encoding(
        "bytes", pat_str=r"\s+", mergeable_ranks={bytes([n]): n for n in range(256)}, special_tokens={"<|a|>": 256}
    )
    ours = Tokenizer.train([], None, algorithm="bytes", special_tokens=["<|a|>"], show_progress=False)
    ids = [number for number in ids if number < 257]
    assert ours.decode(ids) == peer.decode(ids)
    assert ours.decode_bytes(ids) == peer.decode_bytes(ids)


DAMAGES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "a line cut short": (
        lambda lines: [*lines[:-1], lines[-1].split()[0]],
        "is not a token and its rank; .* cut short",
    ),
    "not base64": (lambda lines: [*lines[:5], b"!!!! 5", *lines[6:]], r"line 6: !!!! is not base64"),
    "half a base64": (lambda lines: [*lines[:5], b"IQ 5", *lines[6:]], r"line 6: IQ is not base64"),
    "a rank that is none": (lambda lines: [*lines[:5], b"IQ== x", *lines[6:]], "line 6 is not a token and its rank"),
    "a negative rank": (lambda lines: [*lines[:5], b"IQ== -5", *lines[6:]], "line 6 is not a token and its rank"),
    "a huge rank": (lambda lines: [*lines, b"YWJhYmFi 99999999"], "99999999 is not a token id"),
    "a duplicate rank": (lambda lines: [*lines, b"YWJhYmFi 7"], "line 299: the rank 7 was there before"),
    "a duplicate token": (lambda lines: [*lines, lines[65].split()[0] + b" 298"], "line 299: the token b'A' was there"),
    "a missing byte": (lambda lines: lines[1:], "byte 0 has no token"),
    "three words": (lambda lines: [*lines, b"YWI= 298 298"], "line 299 is not a token and its rank"),
    "an empty file": (lambda _: [], "no tokens"),
    "something else": (lambda _: [b"<!DOCTYPE html><html>"], "line 1: <!DOCTYPE is not base64"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_tiktoken_file_says_what_is_wrong(ranks: Path, name: str) -> None:
    change, reason = DAMAGES[name]
    ranks.write_bytes(b"\n".join(change(ranks.read_bytes().splitlines())))
    assert re.search(reason, refused(ranks, pattern="gpt4"))


def test_a_file_cut_short_in_its_last_line_is_found_out(ranks: Path) -> None:
    whole = ranks.read_bytes()
    last_line = len(whole.splitlines()[-1]) + 1
    for missing in range(2, last_line):
        ranks.write_bytes(whole[:-missing])
        assert "line 298" in refused(ranks, pattern="gpt4")


def test_the_pattern_must_be_known(ranks: Path) -> None:
    with pytest.raises(UsageError, match=r"small\.tiktoken: a \.tiktoken file does not say how text is cut"):
        Tokenizer.load(ranks)
    with pytest.raises(UsageError, match="unknown pattern 'gtp4'"):
        Tokenizer.load(ranks, pattern="gtp4")
    with pytest.raises(UsageError, match="does not compile"):
        Tokenizer.load(ranks, pattern="(a")
    assert Tokenizer.load(ranks, pattern=r"\w+|\W+").pattern == r"\w+|\W+"


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base", "r50k_base", "p50k_base", "p50k_edit", "cl100k"])
def test_a_wrong_file_under_a_published_name_is_refused(ranks: Path, name: str) -> None:
    file = ranks.rename(ranks.with_name(f"{name}.tiktoken"))
    assert "damaged, or not OpenAI's" in refused(file)
    assert Tokenizer.load(file, pattern="gpt2").encode("the cat")  # meant so


def test_published_vocabularies_are_known_by_their_checksum(vocabularies: Path, tmp_path: Path) -> None:
    copy = tmp_path / "mine.tiktoken"
    shutil.copy(vocabularies / "r50k_base.tiktoken", copy)
    tok = Tokenizer.load(copy)
    assert (tok.vocab_size, tok.end_of_text_id, tok.pattern) == (50257, 50256, PATTERNS["gpt2"])
    assert Tokenizer.load(copy, pattern=r"\S+|\s+").pattern == r"\S+|\s+"
    copy.write_bytes(copy.read_bytes().rsplit(b"\n", 2)[0])
    with pytest.raises(UsageError, match="does not say how text is cut"):
        Tokenizer.load(copy)
    digest = hashlib.sha256(copy.read_bytes()).hexdigest()
    Tokenizer.load(copy, pattern="gpt2", sha256=digest.upper())
    assert "not the file it should be (SHA-256" in refused(copy, pattern="gpt2", sha256="0" * 64)


def test_one_file_under_two_names(vocabularies: Path, tmp_path: Path) -> None:
    for name, fim in (("p50k_base", False), ("p50k_edit", True)):
        shutil.copy(vocabularies / "p50k_base.tiktoken", tmp_path / f"{name}.tiktoken")
        tok = Tokenizer.load(tmp_path / f"{name}.tiktoken")
        assert ("<|fim_prefix|>" in tok.special_tokens) is fim


def test_a_folder_of_two_vocabularies_is_not_guessed(ranks: Path) -> None:
    assert Tokenizer.load(ranks.parent, pattern="gpt4").encode("the cat")
    shutil.copy(ranks, ranks.with_name("other.tiktoken"))
    assert "there are 2 vocabularies" in refused(ranks.parent, pattern="gpt4")


def test_special_tokens_of_a_file_that_holds_them(vocabularies: Path) -> None:
    """EleutherAI's file has them among the ranks."""
    file = vocabularies / "gpt-neox-20b.tiktoken"
    names = {"<|endoftext|>": 0, "<|padding|>": 1}
    tok = Tokenizer.load(file, pattern="gpt2", special_tokens=names)
    assert tok.special_tokens == names
    assert tok.encode("<|endoftext|>", allow_special="all") == [0]
    assert 0 not in tok.encode("<|endoftext|>")
    with pytest.raises(UsageError, match=r"special token '<\|pad\|>': the id 5 is that of b'\$'"):
        Tokenizer.load(file, pattern="gpt2", special_tokens={"<|pad|>": 5})
    with pytest.raises(UsageError, match=r"'<\|pad\|>': 99999999 is far from"):
        Tokenizer.load(file, pattern="gpt2", special_tokens={"<|pad|>": 99999999})


def test_what_a_tiktoken_file_cannot_hold_is_not_written(small: Tokenizer, tmp_path: Path) -> None:
    parts = small.vocabulary
    size = small.vocab_size
    cannot: dict[str, dict[str, Any]] = {
        "normalizes text": {"normalization": "NFC"},
        "a space before text": {"prefix_space": True},
        "added tokens": {"tokens": [*parts.tokens, b"<x>"], "added_tokens": {"<x>": size}},
        "takes what is beside it": {"token_rules": {"<|end|>": ("lstrip",)}},
        "not the ranks of its merges": {"merges": parts.merges[1:]},  # type: ignore[index]
    }
    for reason, change in cannot.items():
        with pytest.raises(GroundupError, match=f"cannot hold this tokenizer: .*{reason}"):
            Tokenizer(replace(parts, **change)).save_tiktoken(tmp_path / "x.tiktoken")
    words = Tokenizer.train(["a b"], None, algorithm="words", show_progress=False)
    with pytest.raises(GroundupError, match="its algorithm is words"):
        words.save_tiktoken(tmp_path / "x.tiktoken")
    assert not (tmp_path / "x.tiktoken").exists()


def test_what_tiktoken_wrote_opens_in_hugging_face(vocabularies: Path, tmp_path: Path, code: list[str]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tok = Tokenizer.load(vocabularies / "p50k_base.tiktoken")
    tok.save(tmp_path)
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tok.fingerprint
    for text in [TEXT, *code[:10]]:
        ids = tok.encode(text, allow_special="all")
        assert peer.encode(text).ids == again.encode(text, allow_special="all") == ids
    again.save_tiktoken(tmp_path / "p50k_base.tiktoken")
    assert (tmp_path / "p50k_base.tiktoken").read_bytes() == (vocabularies / "p50k_base.tiktoken").read_bytes()


def test_an_id_that_the_vocabulary_leaves_out(vocabularies: Path) -> None:
    tok = Tokenizer.load(vocabularies / "p50k_base.tiktoken")
    edit = replace(tok.vocabulary, special_tokens={}, tokens=[*tok.vocabulary.tokens])
    edit.tokens[50256] = b""  # type: ignore[index]
    gap = Tokenizer(edit)
    assert gap.vocab_size == 50281
    for use in (
        gap.decode,
        gap.decode_bytes,
        lambda ids: list(gap.decode_stream(ids)),
        lambda ids: gap.token_bytes(ids[1]),
    ):
        with pytest.raises(GroundupError, match="token id 50256 is out of use"):
            use([5, 50256])


# ---- GPT-2's two files


def test_gpt2s_own_files(gpt2: Tokenizer, vocabularies: Path, tmp_path: Path) -> None:
    r50k = Tokenizer.load(vocabularies / "r50k_base.tiktoken")
    assert gpt2.special_tokens == {"<|endoftext|>": 50256}
    assert gpt2.encode(TEXT, allow_special="all") == r50k.encode(TEXT, allow_special="all")
    assert list(gpt2.merges) == list(r50k.merges)
    for name in ("encoder.json", "vocab.bpe"):
        assert Tokenizer.load(vocabularies / "gpt2" / name).fingerprint == gpt2.fingerprint
    gpt2.save_tiktoken(tmp_path / "r50k_base.tiktoken")
    assert (tmp_path / "r50k_base.tiktoken").read_bytes() == (vocabularies / "r50k_base.tiktoken").read_bytes()


@pytest.fixture
def pair(small: Tokenizer, tmp_path: Path) -> Path:
    """``small`` as vocab.json and merges.txt."""
    from groundup.tokenizer.alphabet import to_characters

    names = {number: name for name, number in small.special_tokens.items()}
    written = [names.get(number) or to_characters(small.token_bytes(number)) for number in range(small.vocab_size)]
    (tmp_path / "vocab.json").write_text(json.dumps({text: number for number, text in enumerate(written)}))
    merges = "\n".join(f"{written[left]} {written[right]}" for left, right in small.merges)
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    return tmp_path


def test_the_same_pair_by_its_newer_names(small: Tokenizer, pair: Path) -> None:
    tok = Tokenizer.load(pair, pattern="gpt4")
    assert tok.fingerprint == small.fingerprint
    assert Tokenizer.load(pair).pattern == PATTERNS["gpt2"]
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "added_tokens_decoder": {"300": {"content": "<tool>", "special": False, "lstrip": True}},
        "eos_token": "<|end|>",
    }
    (pair / "tokenizer_config.json").write_text(json.dumps(config))
    (pair / "added_tokens.json").write_text(json.dumps({"<tool>": 300, "<other>": 301}))
    tok = Tokenizer.load(pair / "vocab.json")
    assert tok.vocabulary.added_tokens == {"<tool>": 300, "<other>": 301}
    assert tok.encode("a  <tool><other>") == [97, 300, 301]
    assert tok.vocabulary.eos_token == "<|end|>"
    (pair / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(UsageError, match=r"these files of a Qwen2Tokenizer do not say how text is cut"):
        Tokenizer.load(pair)


def test_damaged_pairs(pair: Path) -> None:
    vocab, merges = (pair / "vocab.json").read_bytes(), (pair / "merges.txt").read_bytes()
    (pair / "vocab.json").write_bytes(vocab[:-100])
    assert "this tokenizer is damaged" in refused(pair / "vocab.json")
    (pair / "vocab.json").write_text("[]")
    assert "not a whole vocabulary" in refused(pair / "vocab.json")
    (pair / "vocab.json").write_bytes(vocab)
    whole = json.loads(vocab)
    for change, reason in (
        ({"qqq中": 300}, ""),
        ({"a": 98}, "byte-level text, or its id 98 is used twice"),
        ({"a": "97"}, "'97' is not a token id"),
    ):
        (pair / "vocab.json").write_text(json.dumps({**whole, **change}))
        if reason:
            assert reason in refused(pair / "vocab.json")
        else:  # made by no merge: a special token
            assert Tokenizer.load(pair).special_tokens["qqq中"] == 300
    (pair / "vocab.json").write_bytes(vocab)
    (pair / "merges.txt").write_bytes(merges[: merges.rindex(b" ")])
    assert "is not two tokens; the file is damaged or cut short" in refused(pair / "merges.txt")
    (pair / "merges.txt").write_bytes(merges + b"qq zz\n")
    assert "needs 'qq', which is not in the vocabulary" in refused(pair / "merges.txt")
    (pair / "merges.txt").write_bytes(b"\xff\xfe\n")
    assert "not a whole list of merges" in refused(pair / "merges.txt")
    (pair / "merges.txt").unlink()
    with pytest.raises(GroundupError, match=r"merges\.txt: no such file"):
        Tokenizer.load(pair / "vocab.json")


# ---- SentencePiece


@pytest.fixture(scope="module")
def llama(vocabularies: Path) -> Tokenizer:
    pytest.importorskip("sentencepiece")
    return Tokenizer.load(vocabularies / "llama2" / "tokenizer.model")


@pytest.fixture(scope="module", params=["llama2/tokenizer.model", "sentencepiece/test_model.model"])
def model(request: pytest.FixtureRequest, vocabularies: Path) -> tuple[Tokenizer, Any]:
    """A BPE model with byte fallback, and a unigram model that normalizes; beside the library's own reading."""
    sentencepiece = pytest.importorskip("sentencepiece")
    path = vocabularies / request.param
    return Tokenizer.load(path), sentencepiece.SentencePieceProcessor(model_file=str(path))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_ids_and_text_equal_the_librarys(model: tuple[Tokenizer, Any], data: st.DataObject) -> None:
    ours, library = model
    text = data.draw(
        text_without_surrogates | st.lists(st.sampled_from(["Hello", " world", " ", "▁", "<s>", "é"])).map("".join)
    )
    ids = library.encode(text)
    assert ours.encode(text) == ids
    assert ours.encode_batch([text, text]) == [ids, ids]
    array, offsets = ours.encode_array([text, "", text])
    assert (array.tolist(), offsets.tolist()) == (ids * 2, [0, len(ids), len(ids), 2 * len(ids)])
    if 0 not in ids:  # which they write as a double question mark, and we as <unk>
        assert ours.decode(ids) == library.decode(ids)
    assert "".join(ours.decode_stream(iter(ids))) == ours.decode(ids)
    with_offsets, places = ours.encode_with_offsets(text)
    assert with_offsets == ids
    assert all(0 <= start <= end <= len(text) for start, end in places)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_ids_are_decoded_as_the_library_does(model: tuple[Tokenizer, Any], data: st.DataObject) -> None:
    ours, library = model
    spaces = [number for number in range(3, ours.vocab_size) if set(ours.token_bytes(number)) == {0x20}]
    ids = data.draw(st.lists(st.integers(3, ours.vocab_size - 1) | st.sampled_from(spaces), max_size=12))
    text = ours.decode(ids)
    if "\ufffd" not in text:  # a broken character they write one by one
        assert text == library.decode(ids)
    assert "".join(ours.decode_stream(ids)) == text
    assert ours.decode(ids, continued=True).lstrip(" ") == text.lstrip(" ")


@given(text_without_surrogates)
def test_llamas_round_trip(llama: Tokenizer, text: str) -> None:
    assert llama.decode(llama.encode(text)) == text
    marked = f"{text}</s>{text}<s>"
    assert llama.decode(llama.encode(marked, allow_special="all")) == marked


def test_special_tokens_and_the_space_before_text(llama: Tokenizer) -> None:
    assert llama.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert llama.end_of_text_id == 2
    assert llama.encode("Hello", add_special=True) == [1, 15043]
    assert llama.encode("</s>Hello") == llama._algorithm.encode("</s>Hello") != [2, 15043]
    assert llama.encode("</s>Hello", allow_special="all") == [2, 15043]
    assert llama.decode([15043, 15043]) == "Hello Hello"
    assert llama.decode([15043], continued=True) == " Hello"
    assert list(llama.decode_stream([15043, 15043])) == ["Hello", " Hello"]
    assert list(llama.decode_stream([15043], continued=True)) == [" Hello"]
    wave = llama.encode("🧿")
    assert len(wave) == 5  # the space, and four bytes
    assert list(llama.decode_stream(wave)) == ["🧿"]
    assert llama.token_bytes(15043) == b" Hello"
    assert llama.token_bytes(wave[1]) == b"\xf0"
    with pytest.raises(GroundupError, match="lone surrogate"):
        llama.encode("a\ud800")
    with pytest.raises(GroundupError, match="token id 32000 is out of range"):
        llama.decode([32000])


def test_offsets_of_a_model(llama: Tokenizer) -> None:
    text = "Hello 🧿 wörld</s>"
    ids, offsets = llama.encode_with_offsets(text, allow_special="all")
    assert [text[start:end] for start, end in offsets] == [
        "Hello", " ", *["🧿"] * 4, " w", "ör", "ld", "</s>"
    ]  # fmt: skip
    assert ids[-1] == 2


def test_a_model_is_saved_and_read_again(llama: Tokenizer, vocabularies: Path, tmp_path: Path) -> None:
    llama.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (vocabularies / "llama2" / "tokenizer.model").read_bytes()
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == llama.fingerprint
    assert again.vocabulary == llama.vocabulary
    lines = (tmp_path / "vocabulary.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 32000


def test_a_saved_model_is_hugging_faces_too(
    llama: Tokenizer, tmp_path: Path, multilingual: list[str], code: list[str]
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    llama.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    known = st.sampled_from([*(" ", "  ", "   ", "the", "\n", "</s>", "é", "中", "🧿", "==", "aaaa", "x")])

    @settings(max_examples=300, deadline=None)
    @given(st.lists(known | st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=15).map("".join))
    def check(text: str) -> None:
        ids = llama.encode(text, allow_special="all", add_special=True)
        assert theirs.encode(text).ids == ids

    check()
    peer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in [TEXT, *multilingual[:40], *code[:10]]:
        ids = llama.encode(text, allow_special="all", add_special=True)
        assert theirs.encode(text).ids == peer(text)["input_ids"] == ids
        if "<s>" not in text:
            assert theirs.decode(ids) == text


def test_a_model_that_tokenizer_json_cannot_hold_is_saved_without(vocabularies: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    tok = Tokenizer.load(vocabularies / "sentencepiece" / "test_model.model")
    tok.save(tmp_path)
    names = ["tokenizer.model", "tokenizer_config.json", "vocabulary.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert Tokenizer.load(tmp_path).fingerprint == tok.fingerprint


def test_tokens_that_were_added_to_a_model(llama: Tokenizer, tmp_path: Path) -> None:
    llama.save(tmp_path)
    document = {
        "model": {"type": "BPE", "byte_fallback": True},
        "added_tokens": [
            {"id": 1, "content": "<s>", "special": True},
            {"id": 32000, "content": "<|user|>", "special": True, "rstrip": True},
            {"id": 32001, "content": "<tool>", "special": False},
        ],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    tok = Tokenizer.load(tmp_path)
    assert tok.vocab_size == 32002
    assert tok.special_tokens["<|user|>"] == 32000
    assert tok.encode("<|user|>  Hello<tool>", allow_special="all") == [32000, 15043, 32001]
    assert tok.decode([32000, 15043, 32001]) == "<|user|>Hello<tool>"
    assert 32000 not in tok.encode("<|user|>")
    (tmp_path / "again").mkdir()
    tok.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").fingerprint == tok.fingerprint != llama.fingerprint


@pytest.mark.parametrize("name", ["llama2/tokenizer.model", "sentencepiece/test_model.model"])
def test_a_model_cut_short_anywhere(vocabularies: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("sentencepiece")
    whole = (vocabularies / name).read_bytes()
    file = tmp_path / "tokenizer.model"
    for length in (0, 1, 100, len(whole) // 3, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert "SentencePiece model is damaged or cut short" in refused(file)
    file.write_bytes(b"\x00" * 1000)
    refused(file)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, vocabularies: Path) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(GroundupError, match=r"need the packages sentencepiece .*pip install 'groundup\[tokenizer\]'"):
        Tokenizer.load(vocabularies / "llama2" / "tokenizer.model")
    monkeypatch.setitem(sys.modules, "gguf", None)  # which only writing weights needs
    assert Tokenizer.load(vocabularies / "gguf" / "ggml-vocab-gpt-2.gguf").vocab_size == 50257


# ---- GGUF


def test_gguf_vocabularies_equal_the_ones_they_were_made_of(
    vocabularies: Path, gpt2: Tokenizer, llama: Tokenizer, multilingual: list[str], code: list[str]
) -> None:
    pytest.importorskip("gguf")
    byte_level = Tokenizer.load(vocabularies / "gguf" / "ggml-vocab-gpt-2.gguf")
    spm = Tokenizer.load(vocabularies / "gguf" / "ggml-vocab-llama-spm.gguf")
    assert byte_level.fingerprint == gpt2.fingerprint
    assert (byte_level.end_of_text_id, spm.end_of_text_id) == (50256, 2)
    assert spm.special_tokens == llama.special_tokens
    assert spm.encode("Hello", add_special=True) == llama.encode("Hello", add_special=True)
    for text in [TEXT, "  two  spaces ", *multilingual[:30], *code[:10]]:
        ids = llama.encode(text)
        assert spm.encode(text) == ids
        assert spm.decode(ids) == llama.decode(ids) == text


def write_gguf(path: Path, **fields: Any) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        key = f"tokenizer.{name.replace('__', '.')}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_what_a_gguf_file_says_of_its_vocabulary(small: Tokenizer, tmp_path: Path) -> None:
    from groundup.tokenizer.alphabet import to_characters

    written = [to_characters(small.token_bytes(number)) for number in range(298)] + ["<|a|>", "<|b|>", "<t>", "[PAD]"]
    merges = [f"{written[left]} {written[right]}" for left, right in small.merges]
    fields: dict[str, Any] = {
        "ggml__model": "gpt2",
        "ggml__tokens": written,
        "ggml__token_type": [1] * 298 + [3, 3, 4, 5],
        "ggml__merges": merges,
        "ggml__bos_token_id": 298,
        "ggml__eos_token_id": 299,
        "chat_template": "{{ messages }}",
    }
    tok = Tokenizer.load(write_gguf(tmp_path / "a.gguf", ggml__pre="llama-bpe", **fields))
    assert tok.encode("the cat<|a|><t>", allow_special="all") == [*small.encode("the cat"), 298, 300]
    assert tok.encode("x", add_special=True) == [298, 120]
    assert (tok.vocabulary.bos_token, tok.vocabulary.eos_token) == ("<|a|>", "<|b|>")
    assert tok.chat_template == "{{ messages }}"
    assert tok.vocabulary.whole_words
    assert tok.vocab_size == 301
    tok = Tokenizer.load(write_gguf(tmp_path / "b.gguf", ggml__pre="qwen2", ggml__add_eos_token=True, **fields))
    assert tok.encode("12", add_special=True) == [49, 50, 299]
    assert tok.vocabulary.normalization == "NFC"
    strange = write_gguf(tmp_path / "c.gguf", ggml__pre="qwen9", **fields)
    with pytest.raises(UsageError, match=r"calls 'qwen9', which is not known here\. Give its pattern.* qwen2"):
        Tokenizer.load(strange)
    assert Tokenizer.load(strange, pattern="gpt4").encode("the cat") == small.encode("the cat")
    other = write_gguf(tmp_path / "d.gguf", **{**fields, "ggml__model": "bert"})
    assert "its vocabulary is of kind bert" in refused(other)
    none = write_gguf(tmp_path / "e.gguf", general="x")
    assert "its vocabulary is of kind None" in refused(none)
    short = write_gguf(tmp_path / "f.gguf", ggml__pre="gpt-2", **{**fields, "ggml__token_type": [1] * 5})
    assert "not a whole GGUF file" in refused(short)


def test_a_gguf_file_cut_short_anywhere(vocabularies: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "x.gguf"
    for name in ("ggml-vocab-gpt-2.gguf", "ggml-vocab-llama-spm.gguf"):
        whole = (vocabularies / "gguf" / name).read_bytes()
        for length in (0, 3, 10, 100, 700, len(whole) // 2, len(whole) - 30):
            file.write_bytes(whole[:length])
            assert "not a whole GGUF file" in refused(file)


# ---- finding the file


def test_a_folder_says_what_it_holds(small: Tokenizer, llama: Tokenizer, tmp_path: Path) -> None:
    llama.save(tmp_path)
    small.save(tmp_path)  # byte-level: the model beside it is of something else
    assert Tokenizer.load(tmp_path).vocab_size == small.vocab_size
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path).vocab_size == 32000


def test_names_that_mean_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GroundupError, match=r"cl1000k_base: no such file or folder\. Did you mean cl100k_base\?"):
        Tokenizer.load("cl1000k_base")
    with pytest.raises(UsageError, match=r"unknown vocabulary 'o100k'\. Known: r50k_base, .* Did you mean"):
        Tokenizer.load("openai:o100k")
    with pytest.raises(UsageError, match="a tokenizer of the hub is written hf:owner/name"):
        Tokenizer.load("hf:nobody")


def test_a_file_of_gigabytes_is_refused_at_once(tmp_path: Path) -> None:
    for name in ("x.tiktoken", "tokenizer.json", "tokenizer.model"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(5 * 10**9)  # takes no place on the disk
        assert "5,000,000,000 bytes are too many for a vocabulary" in refused(tmp_path / name)
        (tmp_path / name).unlink()


def test_published_special_tokens_are_tiktokens() -> None:
    theirs = pytest.importorskip("tiktoken_ext.openai_public")
    for name, entry in our_tiktoken.PUBLISHED.items():
        asked: list[tuple[str, str]] = []

        def note(address: str, expected_hash: str, asked: list[tuple[str, str]] = asked) -> dict[bytes, int]:
            asked.append((address, expected_hash))
            return {}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(theirs, "load_tiktoken_bpe", note)
            built = getattr(theirs, name)()
        built["special_tokens"].pop("<|reserved_200018|>", None)  # their second name of <|endofprompt|>
        assert dict(entry.special_tokens) == built["special_tokens"]
        assert asked == [(f"https://openaipublic.blob.core.windows.net/encodings/{entry.file}.tiktoken", entry.sha256)]


def test_bytes_that_no_text_holds_may_be_missing(tmp_path: Path) -> None:
    """EleutherAI's vocabulary was learned from text, so it lacks thirteen."""
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}
    lines = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256) if byte not in never]
    file = tmp_path / "x.tiktoken"
    file.write_bytes(b"\n".join([*lines, base64.b64encode(b"ab") + b" 256"]))
    tok = Tokenizer.load(file, pattern="gpt2")
    assert tok.vocab_size == 257
    assert tok.encode("ab\U0010ffffé") == [256, *"\U0010ffffé".encode()]
    assert tok.merges == ((97, 98),)
    with pytest.raises(GroundupError, match="token id 192 is out of use"):
        tok.decode([192])
    tok.save_tiktoken(tmp_path / "y.tiktoken")
    assert (tmp_path / "y.tiktoken").read_bytes() == file.read_bytes() + b"\n"
    file.write_bytes(b"\n".join([*lines, base64.b64encode(b"a\xff") + b" 256"]))
    assert "byte 255 has no token" in refused(file, pattern="gpt2")
