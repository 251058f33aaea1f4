"""The baseline: what it predicts follows from the training texts, and on real data sets it is as good as expected."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from groundup.posttraining.baseline import tfidf_baseline
from groundup.posttraining.labelled import LabelledText, load_labelled, split_labelled
from groundup.runtime import GroundupError


def texts_of(*pairs: tuple[str, str]) -> list[LabelledText]:
    return [LabelledText(f"x#{number}", text, label) for number, (text, label) in enumerate(pairs, 1)]


TRAIN = texts_of(
    *[("not good", "bad"), ("good", "fine"), ("so bad", "bad"), ("not bad", "fine"), ("I like", "like")] * 3
)


def test_pairs_of_words_count() -> None:
    pytest.importorskip("sklearn")
    test = texts_of(("good", "fine"), ("not good", "bad"), ("not bad", "fine"), ("I", "like"))
    found = tfidf_baseline(TRAIN, test, inverse_penalty=100.0)
    assert found.classes == ["bad", "fine", "like"]
    assert (
        found.labels.tolist()
        == found.predicted.tolist()
        == [0 if text.label == "bad" else 1 if text.label == "fine" else 2 for text in test]
    )
    assert found.n_features == 10
    assert found.probabilities.shape == (4, 3)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1.0)
    np.testing.assert_array_equal(found.probabilities.argmax(axis=1), found.predicted)


def test_an_unknown_text_gets_what_is_common() -> None:
    pytest.importorskip("sklearn")
    train = [*TRAIN, *texts_of(*[(f"word{n}", "like") for n in range(30)])]
    found = tfidf_baseline(train, texts_of(("never seen", "bad")))
    assert found.predicted.tolist() == [2]


def test_what_it_cannot_learn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GroundupError, match="there is no text to measure the baseline on"):
        tfidf_baseline(TRAIN, [])
    with pytest.raises(GroundupError, match="all 1 texts have the label 'a'"):
        tfidf_baseline(texts_of(("x", "a")), TRAIN)
    with pytest.raises(GroundupError, match=r"x#1: the label 'other' is none of the 3"):
        tfidf_baseline(TRAIN, texts_of(("x", "other")))
    with pytest.raises(GroundupError, match="there are no words"):
        tfidf_baseline(texts_of(("!", "a"), ("?", "b")), texts_of(("x", "a")))
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(GroundupError, match=r"scikit-learn: pip install 'groundup\[finetune\]'"):
        tfidf_baseline(TRAIN, TRAIN)


@pytest.mark.parametrize(
    ("name", "least", "most"), [("SMSSpamCollection.tsv", 0.97, 0.995), ("sentence_polarity_10k.jsonl.gz", 0.74, 0.82)]
)
def test_real_data_sets(shared_data: Path, name: str, least: float, most: float) -> None:
    pytest.importorskip("sklearn")
    parts = split_labelled(load_labelled(str(shared_data / "classification" / name)))
    found = tfidf_baseline(parts.train, parts.test)
    assert least < (found.predicted == found.labels).mean() < most


def test_real_intents(shared_data: Path) -> None:
    pytest.importorskip("sklearn")
    folder = shared_data / "classification" / "banking77"
    train, test = (load_labelled(str(folder / f"{part}.csv")) for part in ("train", "test"))
    few = {text.label for text in train[:3000]}
    found = tfidf_baseline([text for text in train if text.label in few], [text for text in test if text.label in few])
    assert 0.85 < (found.predicted == found.labels).mean() < 0.98
