"""evaluation.json of a classifier: its numbers are scikit-learn's, its verdict that of the test, its parts nested."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groundup.evaluation.classification import Beside, fit_temperature, with_temperature
from groundup.posttraining import evaluate_classifier, learning_curve_rows
from groundup.posttraining.baseline import BaselineResult, tfidf_baseline
from groundup.posttraining.class_evaluation import held_out_temperature, measures, most_confused, nested_parts, verdict
from groundup.posttraining.labelled import LabelledText, load_labelled, split_labelled
from groundup.runtime import GroundupError

NAMES = ["ham", "spam", "Übriges"]
SCHEMA = {
    "kind", "classes", "test_texts", "temperature", "rows", "beside", "verdict", "per_class", "confusion", "roc",
    "reliability", "errors",
}  # fmt: skip


def drawn(count: int, skill: float, seed: int = 0, n_classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and the probabilities that someone of some skill would give."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(n_classes, count, p=np.arange(1, n_classes + 1)[::-1] / np.arange(1, n_classes + 1).sum())
    logits = rng.normal(size=(count, n_classes)) + skill * np.eye(n_classes)[labels]
    return labels, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def texts_of(labels: np.ndarray) -> list[LabelledText]:
    return [LabelledText(f"x#{n}", f"text {n}", NAMES[label]) for n, label in enumerate(labels)]


def baseline_of(labels: np.ndarray, p_NC: np.ndarray, names: list[str] = NAMES) -> BaselineResult:
    return BaselineResult(names, labels, p_NC.argmax(axis=1), p_NC, 1234, 0.5)


def test_the_numbers_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    labels, p_NC = drawn(701, 2.0)
    theirs_NC = drawn(701, 1.0)[1]
    texts, baseline = texts_of(labels), baseline_of(labels, theirs_NC)
    found = evaluate_classifier(NAMES, labels, p_NC, texts, baseline, name="ours", seconds=3.0, note="step 7")
    json.dumps(found, allow_nan=False)
    assert found.keys() == SCHEMA
    assert [row["name"] for row in found["rows"]] == ["ours", "TF-IDF + logistic regression", "the most frequent class"]
    predicted = p_NC.argmax(axis=1)
    for row, probabilities in zip(found["rows"], (p_NC, theirs_NC), strict=False):
        taken = probabilities.argmax(axis=1)
        assert row["accuracy"] == pytest.approx(metrics.accuracy_score(labels, taken))
        for key, measure in (("macro_f1", "f1_score"), ("macro_precision", "precision_score")):
            assert row[key] == pytest.approx(getattr(metrics, measure)(labels, taken, average="macro"))
        assert row["macro_recall"] == pytest.approx(metrics.balanced_accuracy_score(labels, taken))
        assert row["log_loss"] == pytest.approx(metrics.log_loss(labels, probabilities))
        assert row["roc_area"] == pytest.approx(metrics.roc_auc_score(labels, probabilities, multi_class="ovr"))
        assert row["brier"] == pytest.approx(((probabilities - np.eye(3)[labels]) ** 2).sum(axis=1).mean())
        assert row["low"] < row["accuracy"] < row["high"]
    assert (found["rows"][0]["seconds"], found["rows"][0]["note"]) == (3.0, "step 7")
    assert found["confusion"] == metrics.confusion_matrix(labels, predicted).tolist()
    precision, recall, f1, support = metrics.precision_recall_fscore_support(labels, predicted)
    theirs = metrics.f1_score(labels, theirs_NC.argmax(axis=1), average=None)
    for number, row in enumerate(found["per_class"]):
        expected = [precision[number], recall[number], f1[number], support[number], theirs[number]]
        assert [row[key] for key in ("precision", "recall", "f1", "support", "baseline_f1")] == pytest.approx(expected)
    assert found["beside"]["accuracy"] == found["rows"][0]["accuracy"]
    assert found["beside"]["other_accuracy"] == found["rows"][1]["accuracy"]
    assert found["verdict"] == "better than the baseline"
    assert (found["test_texts"], found["temperature"]) == (701, 1.0)


def test_what_is_most_frequent_in_training() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    labels, p_NC = drawn(101, 2.0)
    train = np.array([0] * 30 + [1] * 50 + [2] * 20)
    found = evaluate_classifier(NAMES, labels, p_NC, texts_of(labels), train_labels=train)
    row = found["rows"][-1]
    assert row["accuracy"] == pytest.approx((labels == 1).mean())
    assert row["note"] == "always spam"
    assert row["log_loss"] == pytest.approx(metrics.log_loss(labels, np.tile([0.3, 0.5, 0.2], (101, 1))))
    assert row["roc_area"] == 0.5
    assert (found["beside"], found["verdict"]) == (None, None)
    assert [one["baseline_f1"] for one in found["per_class"]] == [None] * 3
    assert [one["name"] for one in found["roc"]] == NAMES


# ---- honest probabilities


def test_a_temperature_from_other_texts_mends_what_is_too_certain() -> None:
    labels, p_NC = drawn(2001, 2.0)
    certain_NC = with_temperature(p_NC, 0.3)
    val = drawn(997, 2.0, seed=1)
    found = evaluate_classifier(
        NAMES, labels, certain_NC, texts_of(labels), val=(val[0], with_temperature(val[1], 0.3))
    )
    # Logits of unit noise and a margin of 2: the right probabilities divide them by 1 / 2.
    before, after = found["reliability"]
    assert (before["name"], before["temperature"]) == ("as it comes", 1.0)
    assert after["temperature"] == found["temperature"] == fit_temperature(val[0], with_temperature(val[1], 0.3))
    assert after["name"] == f"temperature {after['temperature']:.3g}"
    assert after["expected_error"] < 0.5 * before["expected_error"]
    plain = measures("x", labels, with_temperature(certain_NC, found["temperature"]))
    for key in ("log_loss", "brier", "accuracy", "calibration_error"):
        assert found["rows"][0][key] == plain[key]
    assert plain["log_loss"] < measures("x", labels, certain_NC)["log_loss"]
    assert found["rows"][0]["calibration_error"] == after["expected_error"]
    assert len(before["edges"]) == 16
    assert sum(before["count"]) == sum(after["count"]) == 2001
    assert all((count == 0) == (value is None) for count, value in zip(after["count"], after["accuracy"], strict=True))
    assert found["errors"][0]["probability"] < p_NC.max()


def test_held_out_texts_that_tell_no_temperature() -> None:
    labels, p_NC = drawn(50, 30.0)
    assert (p_NC.argmax(axis=1) == labels).all()
    assert held_out_temperature(labels, p_NC) == 1.0
    found = evaluate_classifier(NAMES, labels, p_NC, texts_of(labels), val=(labels, p_NC))
    assert (found["temperature"], len(found["reliability"]), found["errors"]) == (1.0, 1, [])


# ---- the verdict


@pytest.mark.parametrize(
    ("ours", "theirs", "p_value", "said"),
    [
        (20, 5, 0.004, "better than the baseline"),
        (5, 20, 0.004, "worse than the baseline"),
        (7, 5, 0.8, "as good as the baseline, as far as these texts can tell"),
        (5, 5, 1.0, "as good as the baseline, as far as these texts can tell"),
        (5, 7, 0.8, "not better than the baseline"),
    ],
)
def test_the_verdict(ours: int, theirs: int, p_value: float, said: str) -> None:
    assert verdict(Beside(0.9, 0.9, ours, theirs, p_value, -0.1, 0.1)) == said


def test_a_baseline_of_other_texts_is_refused() -> None:
    labels, p_NC = drawn(20, 1.0)
    for other in (baseline_of(labels[::-1], p_NC), baseline_of(labels, p_NC, ["a", "b", "c"])):
        with pytest.raises(ValueError, match="the baseline was measured on other texts"):
            evaluate_classifier(NAMES, labels, p_NC, texts_of(labels), other)
    with pytest.raises(ValueError, match="19 texts and 20 labels"):
        evaluate_classifier(NAMES, labels, p_NC, texts_of(labels)[1:])
    with pytest.raises(GroundupError, match="the model has diverged"):
        evaluate_classifier(NAMES, labels, p_NC * np.nan, texts_of(labels))
    with pytest.raises(GroundupError, match="there is no text to measure on"):
        evaluate_classifier(NAMES, labels[:0], p_NC[:0], [])


# ---- curves and errors


def area(curve: dict[str, Any]) -> float:
    false, true = np.array(curve["false"]), np.array(curve["true"])
    return float((np.diff(false) * (true[1:] + true[:-1]) / 2).sum())


def test_curves_are_thinned_and_keep_their_area() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels, p_NC = drawn(5003, 1.0, n_classes=2)
    names = ["ham", "spam"]
    baseline = baseline_of(labels, rng.dirichlet([1, 1], 5003), names)
    found = evaluate_classifier(names, labels, p_NC, texts_of(labels), baseline)["roc"]
    assert [curve["name"] for curve in found] == ["spam", "spam, baseline"]
    for curve, scores in zip(found, (p_NC, baseline.probabilities), strict=True):
        assert curve["area"] == pytest.approx(metrics.roc_auc_score(labels, scores[:, 1]))
        assert 100 < len(curve["false"]) == len(curve["true"]) <= 200
        assert (curve["false"][0], curve["true"][0], curve["false"][-1], curve["true"][-1]) == (0, 0, 1, 1)
        assert area(curve) == pytest.approx(curve["area"], abs=0.003)


def test_a_curve_that_has_few_corners_is_kept_whole() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    labels, p_NC = drawn(301, 2.0, n_classes=2)
    (curve,) = evaluate_classifier(["ham", "spam"], labels, p_NC, texts_of(labels))["roc"]
    points = list(zip(curve["false"], curve["true"], strict=True))
    false, true, _ = metrics.roc_curve(labels, p_NC[:, 1], drop_intermediate=False)
    assert set(points) <= set(zip(false.tolist(), true.tolist(), strict=True))
    assert len(points) < len(false) / 5
    assert area(curve) == pytest.approx(metrics.roc_auc_score(labels, p_NC[:, 1]), abs=1e-12)


def test_of_many_classes_those_with_most_texts_have_curves() -> None:
    rng = np.random.default_rng(1)
    names = [f"c{n}" for n in range(9)]
    labels = np.repeat(np.arange(8), [3, 20, 30, 4, 40, 50, 60, 70])
    p_NC = rng.dirichlet([1] * 9, len(labels))
    texts = [LabelledText("x", "y", names[label]) for label in labels]
    found = evaluate_classifier(names, labels, p_NC, texts)
    json.dumps(found, allow_nan=False)
    assert [curve["name"] for curve in found["roc"]] == ["c1", "c2", "c4", "c5", "c6", "c7"]
    assert found["per_class"][8]["support"] == 0  # it has no text, and no area


def test_the_most_confident_errors_are_shown() -> None:
    labels = np.array([0, 1, 1, 0, 2])
    p_NC = np.array([[0.9, 0.1, 0], [0.8, 0.2, 0], [0.95, 0.05, 0], [0.3, 0.6, 0.1], [0.1, 0.1, 0.8]])
    texts = [LabelledText(f"x#{n}", "word " * 1000, NAMES[label]) for n, label in enumerate(labels)]
    found = evaluate_classifier(NAMES, labels, p_NC, texts, errors=2)["errors"]
    assert [(one["where"], one["label"], one["predicted"], one["probability"]) for one in found] == [
        ("x#2", "spam", "ham", 0.95), ("x#1", "spam", "ham", 0.8),
    ]  # fmt: skip
    assert found[0]["text"].endswith(" …")
    assert len(found[0]["text"]) == 2002


def test_what_is_confused_most() -> None:
    found = most_confused([[5, 2, 0], [7, 1, 1], [0, 0, 3]], NAMES, most=2)
    assert found == [
        {"label": "spam", "predicted": "ham", "count": 7, "of": 9},
        {"label": "ham", "predicted": "spam", "count": 2, "of": 7},
    ]
    assert most_confused([[5, 0], [0, 1]], ["a", "b"]) == []


# ---- more texts


def labelled(**counts: int) -> list[LabelledText]:
    return [
        LabelledText(f"{name}#{n}", f"{name} text {n}", name) for name, count in counts.items() for n in range(count)
    ]


def test_parts_are_nested_and_have_each_class_in_its_share() -> None:
    texts = labelled(a=200, b=50, c=7, d=1)
    tenth, third, whole = nested_parts(texts, [0.1, 0.3, 1.0], seed=2)
    assert Counter(text.label for text in tenth) == {"a": 20, "b": 5, "c": 1, "d": 1}
    assert Counter(text.label for text in third) == {"a": 60, "b": 15, "c": 2, "d": 1}
    assert whole == texts
    assert set(tenth) < set(third)
    assert third == sorted(third, key=texts.index)
    assert nested_parts(texts[::-1], [0.3], seed=2)[0] == third[::-1]
    assert nested_parts(texts, [0.3], seed=3)[0] != third


def test_a_learning_curve_has_a_row_for_each_part() -> None:
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    words = [f"w{n}" for n in range(300)]

    def some(count: int, where: str) -> list[LabelledText]:
        found = []
        for n in range(count):
            label = int(rng.integers(2))
            chosen = rng.choice(words[:150] if label else words[150:], 4)
            found.append(LabelledText(f"{where}#{n}", " ".join(chosen), "ab"[label]))
        return found

    train, test, asked = some(200, "train"), some(100, "test"), []

    def accuracy_of(part: list[LabelledText]) -> float:
        asked.append(part)
        return len(part) / 1000

    rows = learning_curve_rows(train, test, [0.3, 0.1, 0.3], accuracy_of, whole=(0.9, 0.8))
    assert [row["texts"] for row in rows] == [len(asked[0]), len(asked[1]), 200]
    assert set(asked[0]) < set(asked[1])
    assert [row["accuracy"] for row in rows] == [len(asked[0]) / 1000, len(asked[1]) / 1000, 0.9]
    for row, part in zip(rows, asked, strict=False):
        baseline = tfidf_baseline(part, test)
        assert row["baseline"] == (baseline.predicted == baseline.labels).mean()
    assert rows[-1]["baseline"] == 0.8
    asked.clear()
    rows = learning_curve_rows(train, test, [0.5], accuracy_of, with_baseline=False)
    assert [(row["accuracy"], row["baseline"]) for row in rows] == [(len(asked[0]) / 1000, None), (0.2, None)]
    assert asked[1] == train
    tiny = labelled(a=1, b=1)
    assert [row["texts"] for row in learning_curve_rows(tiny, test, [0.1], accuracy_of, with_baseline=False)] == [2]


def test_real_messages(shared_data: Path) -> None:
    pytest.importorskip("sklearn")
    parts = split_labelled(load_labelled(str(shared_data / "classification" / "SMSSpamCollection.tsv")), 0.2, 0.1)
    baseline, val = tfidf_baseline(parts.train, parts.test), tfidf_baseline(parts.train, parts.val)
    same = evaluate_classifier(
        baseline.classes, baseline.labels, baseline.probabilities, parts.test, baseline,
        val=(val.labels, val.probabilities),
    )  # fmt: skip
    json.dumps(same, allow_nan=False)
    assert same["verdict"] == "as good as the baseline, as far as these texts can tell"
    assert same["rows"][0]["accuracy"] == same["rows"][1]["accuracy"] > 0.96
    assert same["rows"][2]["accuracy"] == pytest.approx(0.866, abs=0.01)
    assert same["rows"][0]["log_loss"] < same["rows"][1]["log_loss"] < same["rows"][2]["log_loss"]
    rows = learning_curve_rows(parts.train, parts.test, [0.05, 0.3], lambda part: 0.0)
    measured = [row["baseline"] for row in rows]
    assert measured == sorted(measured)
    assert measured[-1] == same["rows"][1]["accuracy"]
