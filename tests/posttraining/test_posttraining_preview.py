"""The printed example: what is learnt in it, whole characters, the middle left out; and the lines of a summary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from groundup.data import Dropped
from groundup.posttraining import Conversation, Encoding, Example, ExampleLoader
from groundup.posttraining.preview import Piece, pieces, plain_preview, preview, summary
from groundup.tokenizer import Tokenizer

NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    """Few merges: most characters outside of ASCII are several tokens."""
    made = Tokenizer.train(["two and two are four "] * 9, 270, special_tokens=NAMES, show_progress=False)
    return made.with_chat_template("chatml")


def talk(tok: Tokenizer, *texts: str) -> Example:
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return Encoding(tok, 10_000).encode(Conversation("x#1", messages))


def test_what_is_learnt_is_marked(tok: Tokenizer) -> None:
    example = talk(tok, "two and two", "are four")
    shown = "<|im_start|>user\ntwo and two<|im_end|>\n<|im_start|>assistant\n>>>are four<|im_end|><<<\n"
    assert plain_preview(tok, example) == shown
    assert plain_preview(tok, example._replace(ids=example.ids[:-1], learn=example.learn[:-1])) == shown[:-1]
    view = preview(tok, example)
    assert view.plain == shown.replace(">>>", "").replace("<<<", "")
    styles = {view.plain[span.start : span.end]: str(span.style) for span in view.spans}
    assert styles["are four"] == "green"
    assert styles["<|im_start|>"] == "dim"
    ends = [str(span.style) for span in view.spans if view.plain[span.start : span.end] == "<|im_end|>"]
    assert ends == ["dim", "green dim"]
    assert not any("green" in style for text, style in styles.items() if "two" in text)


def test_text_that_spells_a_special_token_is_none(tok: Tokenizer) -> None:
    found = pieces(tok, talk(tok, "say <|im_end|>", "no"))
    assert Piece("user\nsay <|im_end|>") in found
    assert [piece.text for piece in found if piece.special] == ["<|im_start|>", "<|im_end|>"] * 2


@pytest.mark.parametrize("most", range(4, 40))
def test_no_character_is_cut(tok: Tokenizer, most: int) -> None:
    said = "日本語 👋🏽 naïve " * 3
    example = talk(tok, said, said)
    assert len(example.ids) > 80
    whole = preview(tok, example).plain
    head, note, tail = preview(tok, example, most).plain.partition(" … ")
    left_out, tail = tail.split(" tokens … ")
    assert note
    assert whole.startswith(head)
    assert whole.endswith(tail)
    assert "\N{REPLACEMENT CHARACTER}" not in head + tail
    kept = len(example.ids) - int(left_out)
    assert most - 8 < kept <= most


def test_a_character_of_several_tokens_is_one_piece(tok: Tokenizer) -> None:
    ids = np.array(tok.encode("a👋b"))
    assert len(ids) == 6
    learn = np.array([False, False, False, False, True, True])
    found = pieces(tok, Example("x", ids, learn, {}))
    assert found == [Piece("a"), Piece("👋b", learnt=True)]


def test_what_is_no_text_is_shown_all_the_same(tok: Tokenizer) -> None:
    half = tok.encode("👋")[:2]
    end = tok.special_tokens["<|im_end|>"]
    ids = np.array([*tok.encode("a"), *half, end, *half, *tok.encode("b\x1b[31m\r\u202e")])
    found = pieces(tok, Example("x", ids, np.zeros(len(ids), bool), {}))
    assert found == [Piece("a�"), Piece("<|im_end|>", special=True), Piece("�b\\x1b[31m\\r\\u202e")]


def test_sentencepiece_shows_its_spaces(shared_data: Path) -> None:
    pytest.importorskip("sentencepiece")
    tok = Tokenizer.load(shared_data / "tokenizers" / "llama2" / "tokenizer.model").with_chat_template("llama2")
    example = talk(tok, "What is 👋🏽?", "A wave of a hand.")
    assert plain_preview(tok, example) == "<s>[INST] What is 👋🏽? [/INST]>>> A wave of a hand. </s><<<"


def test_the_lines_of_a_summary(tok: Tokenizer) -> None:
    examples = [talk(tok, "two", "four")._replace(where=f"x#{n}") for n in range(3)]
    examples.append(talk(tok, "two and two " * 9, "four")._replace(where="x#8"))
    dropped = [Dropped("x#4", "duplicate", "of x#1"), Dropped("x#5", "bad record"), Dropped("x#6", "duplicate")]
    loader = ExampleLoader(examples, 100, 2, seed=1)
    short, long = len(examples[0].ids), len(examples[-1].ids)
    learnt = sum(int(example.learn.sum()) for example in examples)
    total = 3 * short + long
    assert summary("alpaca", examples, dropped, loader.report()) == [
        "form      alpaca",
        "examples  4",
        f"tokens    {total}, of which {learnt} ({learnt / total:.1%}) are learnt",
        f"longest   {long} tokens (x#8), half have at most {short}",
        "left out  3: 2 duplicate, 1 bad record",
        f"packing   packed by best fit: {loader.rows_of_epoch()} rows, {loader.report()['padding']:.1%} of their "
        "positions empty",
    ]
    assert summary("text", []) == ["form      text", "examples  0", "left out  none"]
