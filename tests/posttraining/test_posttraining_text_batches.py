"""Texts as token ids and micro-batches: what stands around them, what is cut, who is dealt with whom, at what cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from groundup.data import Prefetcher
from groundup.model import Classifier, ModelConfig, Transformer
from groundup.posttraining import EncodedTexts, TextLoader, encode_texts
from groundup.posttraining.labelled import LabelledText, class_names, load_labelled
from groundup.posttraining.text_batches import Around, around
from groundup.runtime import GroundupError, UsageError
from groundup.tokenizer import Tokenizer
from groundup.training import Classification, LabelledTexts


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat and the dog sat on the log " * 9], 270, show_progress=False)


def texts_of(*texts: str) -> list[LabelledText]:
    return [LabelledText(f"x#{n}", text, "ab"[n % 2]) for n, text in enumerate(texts, 1)]


def bare(tok: Tokenizer) -> Tokenizer:
    """Without an end-of-text token."""
    parts = tok.vocabulary
    kept = tuple(token for token in parts.tokens if token != b"<|endoftext|>")
    return Tokenizer(replace(parts, tokens=kept, special_tokens={}))


# ---- token ids


def test_what_stands_around_a_text(tok: Tokenizer) -> None:
    end = tok.end_of_text_id
    assert end is not None
    assert around(tok, "mean") == Around((end,), ())
    assert around(tok, "last") == Around((end,), (end,))
    framed = Tokenizer(replace(tok.vocabulary, prefix=(5,), suffix=(7, 8)))
    assert around(framed, "mean") == Around((5,), ())
    assert around(framed, "last") == Around((5,), (7, 8))
    assert around(bare(tok), "last") == Around((), ())
    one, other = encode_texts(tok, texts_of("the cat"), "ab", 50), encode_texts(framed, texts_of("the cat"), "ab", 50)
    assert one.text(0).tolist() == [end, *tok.encode("the cat")]
    assert other.text(0).tolist() == [5, *tok.encode("the cat")]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_texts_of_any_length(tok: Tokenizer, pooling: Any) -> None:
    end = [tok.end_of_text_id]
    texts = texts_of("cat", "the dog sat on the mat", "<|endoftext|>", "ü", "the log " * 30)
    found = encode_texts(tok, texts, ["a", "b"], 23, pooling=pooling)
    after = end if pooling == "last" else []
    for number, text in enumerate(texts):
        expected = tok.encode(text.text)[: 23 - 1 - len(after)]
        assert found.text(number).tolist() == [*end, *expected, *after]
    assert found.lengths.tolist() == [len(found.text(number)) for number in range(5)]
    assert (len(found), found.cut, int(found.lengths[-1])) == (5, 1, 23)
    assert found.labels.tolist() == [1, 0, 1, 0, 1]
    assert found.where == ["x#1", "x#2", "x#3", "x#4", "x#5"]
    assert found.ids.dtype == found.ends.dtype == found.labels.dtype == np.int64


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_long_texts_in_pieces(tok: Tokenizer, pooling: Any) -> None:
    """All of each text, in order, in pieces that are about as long, each with what stands around a text."""
    texts = texts_of("cat", "the log " * 30, "<|endoftext|>", "the dog sat on the mat", "log " * 19)
    found = encode_texts(tok, texts, ["a", "b"], 23, "split", pooling=pooling)
    before, after = around(tok, pooling)
    room = 23 - len(before) - len(after)
    assert found.owners is not None
    for number, text in enumerate(texts):
        pieces = [found.text(int(piece)).tolist() for piece in np.flatnonzero(found.owners == number)]
        inner = [piece[len(before) : len(piece) - len(after)] for piece in pieces]
        ids = tok.encode(text.text)
        assert [token for piece in inner for token in piece] == ids
        assert len(pieces) == -(-len(ids) // room)
        assert max(map(len, inner)) - min(map(len, inner)) <= 1
        assert all(tuple(piece[: len(before)]) == before for piece in pieces)
        assert all(tuple(piece[len(piece) - len(after) :]) == after for piece in pieces)
    assert (found.cut, found.lengths.max() <= 23, len(found) > 5) == (0, True, True)
    assert found.labels_of_texts.tolist() == [1, 0, 1, 0, 1]
    assert found.where == [texts[owner].where for owner in found.owners]
    assert encode_texts(tok, texts, ["a", "b"], 23, pooling=pooling).labels_of_texts.tolist() == [1, 0, 1, 0, 1]


def test_what_cannot_be_encoded(tok: Tokenizer) -> None:
    texts = texts_of("cat", "the log " * 30)
    count = 1 + len(tok.encode("the log " * 30))
    with pytest.raises(
        GroundupError, match=rf"^x#2: it has {count} tokens, the context holds {count - 1}\. .* split\.$"
    ):
        encode_texts(tok, texts, "ab", count - 1, "refuse")
    assert encode_texts(tok, texts, "ab", count, "refuse").cut == 0
    with pytest.raises(GroundupError, match=r"x#1: the label 'b' is none of the 2"):
        encode_texts(tok, texts, "ac", 50)
    with pytest.raises(UsageError, match="context_length = 2 has no room for a text: 2 tokens stand around each"):
        encode_texts(tok, texts, "ab", 2, pooling="last")
    with pytest.raises(GroundupError, match=r"^x#2: its text comes to no token"):
        encode_texts(bare(tok), texts_of("cat", "", "dog"), "ab", 9)


# ---- micro-batches


def some(count: int, longest: int = 40, seed: int = 0) -> EncodedTexts:
    """Texts whose first token tells which they are."""
    rng = np.random.default_rng(seed)
    rows = [np.array([n, *rng.integers(1000, 2000, int(rng.integers(0, longest)))]) for n in range(count)]
    labels = rng.integers(0, 3, count)
    return EncodedTexts(
        np.concatenate(rows), np.cumsum([len(row) for row in rows]), labels, [f"x#{n}" for n in range(count)]
    )


@pytest.mark.parametrize(("count", "batch"), [(97, 4), (331, 8), (5, 8), (64, 8), (3, 1)])
def test_an_epoch_has_every_text_once(count: int, batch: int) -> None:
    texts = some(count)
    loader = TextLoader(texts, 40, batch, seed=3)
    orders = []
    for epoch in range(5):
        dealt = loader.samples(epoch * count, count).ids[:, 0].tolist()
        assert sorted(dealt) == list(range(count))
        orders.append(tuple(dealt))
    assert len(set(orders)) > 1
    assert [loader.epoch_of(place) for place in (0, count - 1, count, 2 * count)] == [0, 0, 1, 2]


def test_rows_hold_their_texts() -> None:
    texts = some(53, longest=40)
    loader = TextLoader(texts, 37 + 3, 6, seed=1, pad=7)
    for index in range(30):
        batch: Any = loader.batch(index)
        assert isinstance(batch, LabelledTexts)
        assert batch.ids.dtype == batch.lengths.dtype == batch.labels.dtype == np.int64
        longest = batch.lengths.max()
        assert batch.ids.shape == (6, min(40, -(-longest // 8) * 8))
        for ids, length, label in zip(*batch, strict=True):
            assert ids[:length].tolist() == texts.text(ids[0]).tolist()
            assert (ids[length:] == 7).all()
            assert label == texts.labels[ids[0]]


def test_rows_are_never_longer_than_the_context() -> None:
    loader = TextLoader(some(30, longest=13), 13, 5, seed=1)
    assert max(loader.batch(index).ids.shape[1] for index in range(20)) == 13


def test_batches_hang_on_seed_and_number_alone() -> None:
    texts = some(331)
    one, other = TextLoader(texts, 40, 8, seed=3), TextLoader(texts, 40, 8, seed=3)
    backwards = {index: one.batch(index) for index in reversed(range(100))}
    with Prefetcher(other, 3) as ahead:
        for index in range(100):
            assert all(np.array_equal(*pair) for pair in zip(backwards[index], ahead.batch(index), strict=True))
    again = TextLoader(texts, 40, 8, seed=4)
    assert not np.array_equal(again.samples(0, 331).labels, one.samples(0, 331).labels)


@pytest.mark.parametrize("half", [4, 2, 1])
def test_resizing_leaves_the_order_of_the_texts(half: int) -> None:
    loader = TextLoader(some(331), 40, 8, seed=3)
    smaller = loader.resized(half)
    whole = [row for index in range(100) for row in loader.batch(index).ids[:, 0]]
    parts = [row for index in range(100 * 8 // half) for row in smaller.batch(index).ids[:, 0]]
    assert whole == parts
    assert smaller.batch(3).ids.shape[0] == half


def test_texts_of_like_length_go_together_in_every_epoch() -> None:
    count, size = 997, 8
    texts = some(count, longest=200)
    loader = TextLoader(texts, 200, size, seed=3)

    def padding(first: int, last: int) -> float:
        batches = [loader.batch(index) for index in range(first, last)]
        return 1 - sum(b.lengths.sum() for b in batches) / sum(b.ids.size for b in batches)

    in_order = 1 - texts.lengths.sum() / sum(
        -(-texts.lengths[n : n + size].max() // 8) * 8 * len(texts.lengths[n : n + size]) for n in range(0, count, size)
    )
    assert in_order > 0.4
    per_epoch = count // size
    for epoch in range(4):  # the second and later ones begin inside a micro-batch
        assert padding(epoch * per_epoch + epoch, (epoch + 1) * per_epoch + epoch) < 0.1
    report = loader.report()
    assert report["padding"] == pytest.approx(padding(0, per_epoch), abs=0.01)
    assert (report["texts"], report["documents_cut"]) == (count, 0)
    assert loader.resized(4).report()["padding"] < report["padding"]


def test_the_padding_reported_is_that_of_epoch_0() -> None:
    loader = TextLoader(some(96, longest=31), 40, 8, seed=3)
    batches = [loader.batch(index) for index in range(12)]
    expected = 1 - sum(int(b.lengths.sum()) for b in batches) / sum(b.ids.size for b in batches)
    assert loader.report()["padding"] == pytest.approx(expected, abs=1e-12)


def test_long_batches_do_not_come_last() -> None:
    loader = TextLoader(some(1024, longest=200), 200, 8, seed=3)
    longest = np.array([loader.batch(index).lengths.max() for index in range(128)])
    ranks = longest.argsort().argsort()
    assert abs(np.corrcoef(np.arange(128), ranks)[0, 1]) < 0.4
    batches = [set(loader.batch(index).ids[:, 0].tolist()) for index in range(256)]
    repeated = Counter(frozenset(batch) for batch in batches)
    assert max(repeated.values()) == 1  # another epoch has other neighbours


def test_nothing_to_learn_from() -> None:
    nobody = EncodedTexts(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64), [])
    with pytest.raises(GroundupError, match="there is no labelled text to learn from"):
        TextLoader(nobody, 8, 1, seed=0)
    with pytest.raises(ValueError, match="a text of 9 tokens in rows of 8"):
        TextLoader(EncodedTexts(np.arange(9), np.array([9]), np.array([0]), ["x"]), 8, 1, seed=0)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_padding_changes_nothing_of_the_loss(pooling: Any) -> None:
    torch.manual_seed(5)
    config = ModelConfig(vocab_size=2000, context_length=40, n_layer=2, n_head=3, n_embd=18, n_ff=29, init_std=0.3)
    model = Classifier(Transformer(config), 3, pooling=pooling).double()
    texts = some(7)
    batch: Any = TextLoader(texts, 40, 7, seed=1, pad=11).batch(0)
    loss, metrics = Classification()(model, LabelledTexts(*map(torch.from_numpy, batch)))
    one_by_one, right = [], 0
    for number in range(7):
        ids = torch.from_numpy(texts.text(number))[None]
        label = int(texts.labels[number])
        scores = model(ids, torch.tensor([ids.shape[1]]))[0]
        one_by_one.append(-scores.float().log_softmax(-1)[label].item())
        right += int(scores.argmax() == label)
    assert loss.item() == pytest.approx(np.mean(one_by_one), rel=1e-5)
    assert metrics["accuracy"].item() == pytest.approx(right / 7)


def test_real_messages_are_hardly_padded(shared_data: Path) -> None:
    texts = load_labelled(str(shared_data / "classification" / "SMSSpamCollection.tsv"))
    tok = Tokenizer.train([text.text for text in texts], 1024, show_progress=False)
    encoded = encode_texts(tok, texts, class_names(texts), 128, pooling="last")
    loader = TextLoader(encoded, 128, 16, seed=1)
    lengths = encoded.lengths
    alone = 1 - lengths.sum() / np.minimum(-(-lengths // 8) * 8, 128).sum()  # what rounding to 8 positions costs
    assert 0.05 < alone < loader.report()["padding"] < alone + 0.05
    assert 0 < encoded.cut < 100
