"""A tokenizer that lacks the special tokens of a chat template gets them."""

from __future__ import annotations

from pathlib import Path

import pytest

from groundup.posttraining.vocabulary import with_template
from groundup.runtime import UsageError
from groundup.tokenizer import CHAT_TEMPLATES, Tokenizer
from groundup.tokenizer.vocabulary import Vocabulary

TALK = [{"role": "user", "content": "two and two <|im_end|>"}, {"role": "assistant", "content": "are four"}]
TEXTS = ["two and two are four", "naïve <|im_end|> 日本語 <s>"]


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(["two and two are four "] * 9, 290, show_progress=False)


# ---- the tokenizer


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_template_brings_its_special_tokens(tok: Tokenizer, name: str, tmp_path: Path) -> None:
    grown, added = with_template(tok, name)
    assert "<|endoftext|>" not in added
    expected = {"chatml": 2, "hermes": 2, "llama3": 4}.get(name, 0)  # the others take <|endoftext|> for both ends
    assert [grown.special_tokens[one] for one in added] == list(range(tok.vocab_size, tok.vocab_size + expected))
    assert grown.vocab_size == tok.vocab_size + expected
    assert [grown.encode(text) for text in TEXTS] == [tok.encode(text) for text in TEXTS]
    again, nothing = with_template(grown, name)
    assert nothing == []
    assert again.fingerprint == grown.fingerprint
    grown.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    ids = grown.apply_chat_template(TALK)
    assert loaded.apply_chat_template(TALK) == ids
    assert set(ids) >= {grown.special_tokens[one] for one in added}


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_the_saved_tokenizer_is_the_same_elsewhere(tok: Tokenizer, name: str, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    grown, added = with_template(tok, name, ["<tool>"])
    assert added[-1] == "<tool>"
    grown.save(tmp_path)
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    other = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in (*TEXTS, *(f"two{mark} and{mark}{mark}" for mark in added)):
        ids = grown.encode(text, allow_special="all")
        assert peer.encode(text).ids == ids
        assert other(text)["input_ids"] == ids
    assert len(other) == peer.get_vocab_size() == grown.vocab_size
    harmless = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "four"}]
    assert other.apply_chat_template(harmless, return_dict=False) == grown.apply_chat_template(harmless)


def test_a_vocabulary_with_other_ends_keeps_them(tok: Tokenizer) -> None:
    bare = Tokenizer.train(["two and two"], 265, special_tokens=[], show_progress=False)
    grown, added = with_template(bare, "vicuna")
    assert added == ["<s>", "</s>"]
    assert grown.apply_chat_template_with_mask(TALK)[0][-1] == grown.special_tokens["</s>"]
    grown, added = with_template(tok, "vicuna")
    assert grown.apply_chat_template_with_mask(TALK)[0][-1] == tok.end_of_text_id


def test_what_jinja_source_spells_out_is_added(tok: Tokenizer) -> None:
    source = (
        "{% for m in messages %}{{ '<|turn|>' ~ m.role ~ '<|said|>' ~ m.content }}<end>"
        "{{ '<|' + m.role + '|>' }}{% endfor %}"
    )
    grown, added = with_template(tok, source, ["<end>"])
    assert added == ["<|turn|>", "<|said|>", "<end>"]
    ids = grown.apply_chat_template(TALK)
    assert [ids.count(grown.special_tokens[name]) for name in added] == [2, 2, 2]
    with pytest.raises(UsageError, match="unknown chat template 'chatmll'"):
        with_template(tok, "chatmll")


def test_special_tokens_that_cannot_be_added(tok: Tokenizer) -> None:
    with pytest.raises(UsageError, match="' two' is an ordinary token"):
        tok.with_special_tokens([" two"])
    with pytest.raises(UsageError, match="two characters or longer, and each given once"):
        tok.with_special_tokens(["<a>", "<a>"])
    with pytest.raises(UsageError, match="a list of names"):
        tok.with_special_tokens("<a>")


def test_an_added_token_becomes_special_with_its_id(tok: Tokenizer) -> None:
    base = tok.vocabulary
    number = len(base.tokens)
    parts = Vocabulary(
        "bpe", (*base.tokens, b"<|im_end|>"), base.pattern, base.merges, base.special_tokens, {"<|im_end|>": number}
    )
    before = Tokenizer(parts)
    assert number in before.encode("<|im_end|>")
    after = before.with_special_tokens(["<|im_end|>", "<|im_start|>"])
    assert after.special_tokens["<|im_end|>"] == number
    assert after.special_tokens["<|im_start|>"] == number + 1
    assert number not in after.encode("<|im_end|>")


@pytest.mark.parametrize("algorithm", ["words", "characters"])
def test_other_algorithms(algorithm: str, tmp_path: Path) -> None:
    tok = Tokenizer.train(["two and two"], algorithm=algorithm, show_progress=False)
    grown, added = with_template(tok, "chatml")
    assert added == ["<|im_start|>", "<|im_end|>"]
    grown.save(tmp_path)
    assert Tokenizer.load(tmp_path).apply_chat_template(TALK) == grown.apply_chat_template(TALK)


def test_sentencepiece(shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    tok = Tokenizer.load(shared_data / "tokenizers" / "llama2" / "tokenizer.model")
    assert with_template(tok, "llama2")[1] == []
    grown, added = with_template(tok, "chatml")
    assert [grown.special_tokens[name] for name in added] == [32_000, 32_001]
    grown.save(tmp_path)
    assert Tokenizer.load(tmp_path).apply_chat_template(TALK) == grown.apply_chat_template(TALK)


def test_real_vocabulary_of_gpt2(shared_data: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tok = Tokenizer.load(shared_data / "tokenizers" / "gpt2")
    grown, added = with_template(tok, "chatml")
    assert [grown.special_tokens[name] for name in added] == [50_257, 50_258]
    grown.save(tmp_path)
    other = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    text = "<|im_start|>user\nI'm 42 <|im_end|>"
    assert other(text)["input_ids"] == grown.encode(text, allow_special="all")
