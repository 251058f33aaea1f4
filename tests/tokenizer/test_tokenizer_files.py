"""tokenizer.json: equal to Hugging Face in training and encoding, and refused with a reason where damaged."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.runtime.errors import GroundupError
from groundup.tokenizer import PATTERNS, Tokenizer
from groundup.tokenizer.alphabet import to_characters

tokenizers = pytest.importorskip("tokenizers")

# What this Python knows of Unicode, the regex library and Hugging Face's Oniguruma know too; newer characters
# are letters to one and nothing to the other.
known_characters = st.characters(exclude_categories=["Cs", "Cn"])


@pytest.fixture(scope="module")
def saved(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    trained.save(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(saved: Path) -> Any:
    return tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))


def hugging_face_merges(texts: list[str], pattern: str, vocab_size: int) -> list[tuple[str, str]]:
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERNS[pattern]), "isolated")
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    peer.train_from_iterator(texts, trainer)
    return [tuple(merge) for merge in json.loads(peer.to_str())["model"]["merges"]]


# ---- parity with Hugging Face


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "o200k"])
def test_merges_equal_hugging_faces_on_shakespeare(shakespeare: str, pattern: str) -> None:
    ours = Tokenizer.train([shakespeare], 20_000, pattern=pattern, show_progress=False)
    assert ours.vocab_size > 10_000
    merges = [tuple(to_characters(ours.token_bytes(side)) for side in pair) for pair in ours.merges]
    assert merges == hugging_face_merges([shakespeare], pattern, 20_000)


def test_merges_equal_hugging_faces_on_many_scripts(multilingual: list[str]) -> None:
    ours = Tokenizer.train(multilingual, 4096, show_progress=False)
    merges = [tuple(to_characters(ours.token_bytes(side)) for side in pair) for pair in ours.merges]
    assert merges == hugging_face_merges(multilingual, "gpt4", 4096)


def test_ids_equal_hugging_faces_on_real_text(
    trained: Tokenizer, theirs: Any, shakespeare: str, code: list[str], multilingual: list[str]
) -> None:
    texts = [shakespeare[:200_000], *code, *multilingual]
    assert trained.encode_batch(texts) == [encoding.ids for encoding in theirs.encode_batch(texts)]


@settings(max_examples=300, deadline=None)
@given(st.text(known_characters | st.sampled_from(" \n\r\t'\u2028\u00a0\x1c\x85sS1ſ")))
def test_ids_equal_hugging_faces_on_any_text(trained: Tokenizer, theirs: Any, text: str) -> None:
    # Hugging Face always recognises special tokens, and hypothesis does come up with their names.
    ids = trained.encode(text, allow_special="all")
    assert theirs.encode(text).ids == ids
    assert theirs.decode(ids, skip_special_tokens=False) == trained.decode(ids) == text


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "o200k"])
def test_ids_equal_hugging_faces_on_every_code_point(tmp_path: Path, pattern: str) -> None:
    # U+0295 changed from "letter, lower case" to "letter, other" in Unicode 17, which only o200k looks at.
    points = [
        chr(point)
        for point in range(0x110000)
        if unicodedata.category(chr(point)) not in ("Cs", "Cn", "Co") and point != 0x295
    ]
    assert len(points) > 140_000
    tok = Tokenizer.train(["it's in the 12 bins, isn't it"] * 3, 290, pattern=pattern, show_progress=False)
    tok.save(tmp_path)
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = ["".join(f"i{c}'{c}1 {c}" for c in points[start : start + 500]) for start in range(0, len(points), 500)]
    assert tok.encode_batch(texts) == [encoding.ids for encoding in peer.encode_batch(texts)]


def test_special_tokens_in_hugging_face(trained: Tokenizer, theirs: Any) -> None:
    text = "To be<|endoftext|> or <|user|>not<|endoftext|>"
    ids = trained.encode(text, allow_special="all")
    assert theirs.encode(text).ids == ids
    assert ids.count(trained.end_of_text_id) == 2
    assert theirs.decode(ids, skip_special_tokens=False) == text
    assert theirs.token_to_id("<|endoftext|>") == trained.end_of_text_id
    assert theirs.get_vocab_size() == trained.vocab_size


def test_transformers_opens_the_folder(saved: Path, trained: Tokenizer, code: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    for peer in (
        transformers.AutoTokenizer.from_pretrained(str(saved)),
        transformers.PreTrainedTokenizerFast(tokenizer_file=str(saved / "tokenizer.json")),
    ):
        for text in code[:5]:
            assert peer(text)["input_ids"] == trained.encode(text)
            assert peer.decode(trained.encode(text)) == text
        marked = "To be<|endoftext|> or <|user|>not"
        assert peer(marked)["input_ids"] == trained.encode(marked, allow_special="all")
        assert len(peer) == trained.vocab_size
    configured = transformers.AutoTokenizer.from_pretrained(str(saved))
    assert configured.eos_token_id == configured.bos_token_id == trained.end_of_text_id


def test_an_expression_of_ones_own_survives(tmp_path: Path) -> None:
    tok = Tokenizer.train(["ab12cd 12ab"] * 3, 280, pattern=r"[a-z]+|\d{1,2}", show_progress=False)
    tok.save(tmp_path)
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("ab12cd 12ab", "  ..ab--1234", "é12é"):
        assert Tokenizer.load(tmp_path).encode(text) == tok.encode(text) == peer.encode(text).ids


# ---- saving and loading


def test_a_saved_tokenizer_comes_back_equal(saved: Path, trained: Tokenizer, code: list[str]) -> None:
    for path in (saved, str(saved), saved / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == trained.fingerprint
        assert loaded.special_tokens == trained.special_tokens
        assert loaded.encode_batch(code[:5]) == trained.encode_batch(code[:5])


def test_saving_writes_three_files_and_keeps_the_others(small: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    small.save(tmp_path)
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", "vocabulary.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert len((tmp_path / "vocabulary.txt").read_text(encoding="utf-8").splitlines()) == small.vocab_size


def test_a_folder_that_cannot_be_written(small: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GroundupError, match="cannot write"):
        small.save(tmp_path / "file")


def test_a_tokenizer_made_by_hugging_face_is_read(shakespeare: str, tmp_path: Path) -> None:
    """GPT-2's own layout: bytes in alphabet order, the special token first, the pattern inside ByteLevel."""
    peer = tokenizers.ByteLevelBPETokenizer()
    peer.train_from_iterator([shakespeare], vocab_size=1000, special_tokens=["<|endoftext|>"], show_progress=False)
    peer.save(str(tmp_path / "tokenizer.json"))
    tok = Tokenizer.load(tmp_path)
    assert tok.pattern == PATTERNS["gpt2"]
    assert tok.end_of_text_id == 0
    assert tok.encode(shakespeare[:50_000]) == peer.encode(shakespeare[:50_000]).ids
    tok.save(tmp_path / "again")
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
    assert again.encode(shakespeare[:50_000]).ids == tok.encode(shakespeare[:50_000])
    assert Tokenizer.load(tmp_path / "again").fingerprint == tok.fingerprint


# ---- damaged and foreign files


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(GroundupError, match=r"cannot read tokenizer .*tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path)


def test_a_file_cut_short_anywhere(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = file.read_bytes()
    for length in range(0, len(whole) - 2, len(whole) // 40):
        file.write_bytes(whole[:length])
        with pytest.raises(GroundupError, match=r"tokenizer\.json: this tokenizer is damaged"):
            Tokenizer.load(tmp_path)


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], Any]:
    def change(document: dict[str, Any]) -> Any:
        *folders, last = path
        inner: Any = document
        for key in folders:
            inner = inner[key]
        inner[last] = to
        return document

    return change


def _without(*path: Any) -> Callable[[dict[str, Any]], Any]:
    def change(document: dict[str, Any]) -> Any:
        *folders, last = path
        inner: Any = document
        for key in folders:
            inner = inner[key]
        del inner[last]
        return document

    return change


STEPS = ("pre_tokenizer", "pretokenizers")
DAMAGES = {
    "not a tokenizer": (lambda _: [1, 2], "not a whole tokenizer.json"),
    "no model": (_without("model"), "not a whole tokenizer.json .*'model'"),
    "no merges": (_without("model", "merges"), "not a whole tokenizer.json .*'merges'"),
    "another model": (_set("model", "type", to="Unigram"), "the model is Unigram; only byte-level BPE"),
    "normalizer": (_set("normalizer", to={"type": "Lowercase"}), "the normalizer is Lowercase"),
    "an unknown merge": (_set("model", "merges", 3, to="Ġqq x"), "merge 3, 'Ġqq' \\+ 'x', needs 'Ġqq'"),
    "a merge of one": (_set("model", "merges", 3, to="x"), "not a whole tokenizer.json"),
    "a missing byte": (_without("model", "vocab", "Ā"), "byte 0 has no token"),
    "a byte renamed": (
        lambda d: _set("model", "vocab", "qqq", to=0)(_without("model", "vocab", "Ā")(d)),
        "byte 0 has no token",
    ),
    "an id used twice": (_set("model", "vocab", "Ā", to=1), "the id 1 is used twice"),
    "an id that is text": (_set("model", "vocab", "Ā", to="0"), "'0' is not a token id"),
    "not byte-level": (_set("model", "vocab", "▁the", to=9999), "not byte-level"),
    "characters": (
        lambda d: _set("model", "vocab", "▁", to=0)(_without("model", "vocab", "Ā")(d)),
        "'▁' is not byte-level text",
    ),
    "two ids for a name": (_set("added_tokens", 0, "id", to=5), "has two ids"),
    "no pre-tokenizer": (_set("pre_tokenizer", to=None), "only ByteLevel"),
    "another pre-tokenizer": (_set("pre_tokenizer", to={"type": "Whitespace"}), "only ByteLevel"),
    "prefix space": (_set(*STEPS, 1, "add_prefix_space", to=True), "add_prefix_space"),
    "two patterns": (_set(*STEPS, 1, "use_regex", to=True), "by one expression can be read, not by two"),
    "removed": (_set(*STEPS, 0, "behavior", to="Removed"), "whose behavior is Removed"),
    "a token of two lines": (_set("model", "merges", 3, to=["a\nb", "c"]), r"needs 'a\\nb'"),
    "a bad pattern": (_set(*STEPS, 0, "pattern", to={"Regex": "(a"}), r"pattern '\(a' does not compile"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_file_that_cannot_be_read_says_why(small: Tokenizer, tmp_path: Path, name: str) -> None:
    change, reason = DAMAGES[name]
    small.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(change(json.loads(file.read_bytes()))))
    with pytest.raises(GroundupError, match=r"tokenizer\.json: .*" + f"({reason})") as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
