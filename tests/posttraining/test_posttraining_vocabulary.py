"""A tokenizer and a model that lack the special tokens of a chat template get them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groundup.model import LoraConfig, ModelConfig, Transformer, add_adapter, load_model, save_model
from groundup.posttraining.vocabulary import resize_embeddings, with_template
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


# ---- the model


def model(vocab_size: int = 61, **fields: Any) -> Transformer:
    torch.manual_seed(3)
    sizes = dict(context_length=17, n_layer=2, n_head=3, n_embd=24, n_ff=40, init_std=0.3)
    return Transformer(ModelConfig.from_dict(sizes | {"vocab_size": vocab_size} | fields)).eval()


def ids() -> Tensor:
    return torch.randint(61, (3, 13), generator=torch.Generator().manual_seed(5))


FAMILIES: list[dict[str, Any]] = [
    {},  # our own
    {"tie_embeddings": False, "qk_norm": False},  # Llama
    {"norm": "layernorm", "positions": "learned", "feed_forward": "gelu", "bias": True, "qk_norm": False},  # GPT-2
]


@pytest.mark.parametrize("fields", FAMILIES)
@torch.no_grad()
def test_old_logits_stay_and_the_model_is_saved(fields: dict[str, Any], tmp_path: Path) -> None:
    small = model(**fields)
    before = small(ids())
    grown = resize_embeddings(small, 67, seed=7)
    after = grown(ids())
    assert grown is small
    assert after.shape == (3, 13, 67)
    torch.testing.assert_close(after[..., :61], before, rtol=0, atol=1e-5)
    assert grown.config.vocab_size == 67
    assert (grown.head.weight is grown.embedding.weight) == grown.config.tie_embeddings
    save_model(grown, tmp_path)
    loaded = load_model(tmp_path).eval()
    assert loaded.config.vocab_size == 67
    torch.testing.assert_close(loaded(ids()), after, rtol=0, atol=1e-5)
    new = torch.tensor([[61, 66, 5]])
    torch.testing.assert_close(loaded(new), grown(new), rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_without_noise_are_the_mean_and_take_little() -> None:
    grown = resize_embeddings(model(tie_embeddings=False).double(), 67, noise=0.0)
    for weight in (grown.embedding.weight, grown.head.weight):
        torch.testing.assert_close(weight[61:], weight[:61].mean(dim=0).expand(6, -1))
        assert weight.dtype == torch.float64
    share = grown(ids()).softmax(dim=-1)[..., 61:].sum(dim=-1)
    assert (share <= 6 / 67 + 1e-12).all()
    assert not torch.equal(grown.embedding.weight[61], grown.head.weight[61])


@torch.no_grad()
def test_noise_has_the_covariance_of_the_old_rows() -> None:
    grown = resize_embeddings(model().double(), 61 + 20_011, noise=0.04)
    old, new = grown.embedding.weight[:61], grown.embedding.weight[61:]
    torch.testing.assert_close(new.mean(dim=0), old.mean(dim=0), rtol=0, atol=0.003)
    expected = 0.04 * torch.cov(old.T, correction=0)
    error = (torch.cov(new.T) - expected).norm() / expected.norm()
    assert error < 0.1, "a fortieth is chance"
    again = resize_embeddings(model().double(), 61 + 20_011, noise=0.04)
    assert torch.equal(again.embedding.weight, grown.embedding.weight)
    other = resize_embeddings(model().double(), 61 + 20_011, noise=0.04, seed=1)
    assert not torch.equal(other.embedding.weight[61:], new)


@torch.no_grad()
def test_padding_rows_are_drawn_anew() -> None:
    padded = model(vocab_size=71)
    before = padded.embedding.weight.clone()
    grown = resize_embeddings(padded, 63, used=61, noise=0.0)
    assert grown.config.vocab_size == 71
    assert torch.equal(grown.embedding.weight[:61], before[:61])
    torch.testing.assert_close(grown.embedding.weight[61:], before[:61].mean(dim=0).expand(10, -1))
    same = grown.embedding.weight
    assert resize_embeddings(grown, 71).embedding.weight is same


def test_what_was_frozen_stays_frozen_and_the_rest_learns() -> None:
    small = model()
    small.embedding.weight.requires_grad_(False)
    assert not resize_embeddings(small, 67).embedding.weight.requires_grad
    grown = resize_embeddings(model().bfloat16(), 67)
    assert grown.embedding.weight.dtype == torch.bfloat16
    grown(torch.tensor([[66, 3]])).float().sum().backward()
    gradient = grown.embedding.weight.grad
    assert gradient is not None
    assert gradient.shape == (67, 24)
    assert (gradient[66] != 0).any()


def test_what_cannot_be_resized() -> None:
    with pytest.raises(UsageError, match="used = 62 must be from 1 to the model's vocab_size, 61"):
        resize_embeddings(model(), 67, used=62)
    adapted = add_adapter(model(tie_embeddings=False), LoraConfig(targets=("head",)))
    with pytest.raises(UsageError, match="has adapters or is quantized, and takes no new tokens"):
        resize_embeddings(adapted, 67)  # type: ignore[arg-type]
