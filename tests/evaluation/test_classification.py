"""The measures of a classifier equal scikit-learn's, or what can be worked out by hand."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest

from groundup.evaluation import classification as measure
from groundup.runtime import GroundupError

N, C = 211, 5


@pytest.fixture(scope="module")
def metrics():
    return pytest.importorskip("sklearn.metrics")


def said(
    seed: int, n: int = N, c: int = C, digits: int | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """True ids, and probabilities that know a little of them; rounded, so that many are equal."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, c, n)
    logits = rng.normal(size=(n, c)) + 1.2 * np.eye(c)[labels]
    if digits is not None:
        logits = np.round(logits, digits)
    weights = np.exp(logits)
    return labels, weights / weights.sum(axis=1, keepdims=True)


# ---- what is right


def test_scores_of_the_classes(metrics) -> None:
    for seed in range(5):
        labels, p = said(seed)
        predicted = p.argmax(axis=1)
        if seed == 3:
            labels, predicted = (
                np.minimum(labels, 2),
                np.minimum(predicted, 3),
            )  # a class without texts, one without any
        matrix = measure.confusion_matrix(labels, predicted, C)
        np.testing.assert_array_equal(matrix, metrics.confusion_matrix(labels, predicted, labels=range(C)))
        found = measure.class_scores(matrix)
        expected = metrics.precision_recall_fscore_support(labels, predicted, labels=range(C), zero_division=0)
        np.testing.assert_allclose([found.precision_C, found.recall_C, found.f1_C, found.support_C], expected)
        macro = metrics.precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
        np.testing.assert_allclose([found.macro_precision, found.macro_recall, found.macro_f1], macro[:3])
        assert measure.accuracy(labels, predicted) == pytest.approx(metrics.accuracy_score(labels, predicted))


def test_scores_by_hand() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 0])
    matrix = measure.confusion_matrix(labels, predicted, 3)
    assert matrix.tolist() == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    found = measure.class_scores(matrix)
    np.testing.assert_allclose(found.precision_C, [2 / 4, 1 / 2, 0])
    np.testing.assert_allclose(found.recall_C, [2 / 3, 1 / 2, 0])
    np.testing.assert_allclose(found.f1_C, [4 / 7, 1 / 2, 0])
    assert measure.accuracy(labels, predicted) == 0.5


# ---- how it ranks


@pytest.mark.parametrize("digits", [None, 1, 0])
def test_ranking(metrics, digits: int | None) -> None:
    labels, p = said(7, digits=digits)
    for number in range(C):
        positive, scores = labels == number, p[:, number] if digits is None else np.round(p[:, number], digits + 1)
        false, true, thresholds = measure.roc_curve(positive, scores)
        expected = metrics.roc_curve(positive, scores, drop_intermediate=False)
        np.testing.assert_allclose(false, expected[0])
        np.testing.assert_allclose(true, expected[1])
        np.testing.assert_allclose(thresholds, expected[2])
        assert measure.roc_area(positive, scores) == pytest.approx(metrics.roc_auc_score(positive, scores))
        assert measure.average_precision(positive, scores) == pytest.approx(
            metrics.average_precision_score(positive, scores)
        )


def test_equal_scores_count_half() -> None:
    rng = np.random.default_rng(1)
    positive, scores = rng.random(61) < 0.4, rng.integers(0, 4, 61).astype(np.float32)
    pairs = list(product(scores[positive], scores[~positive]))
    wins = sum((one > other) + 0.5 * (one == other) for one, other in pairs)
    assert measure.roc_area(positive, scores) == pytest.approx(wins / len(pairs))
    order = rng.permutation(61)
    assert measure.roc_area(positive[order], scores[order]) == pytest.approx(wins / len(pairs))
    assert measure.roc_area(positive, np.zeros(61)) == 0.5
    assert measure.average_precision(positive, np.zeros(61)) == pytest.approx(positive.mean())


def test_each_class_against_the_rest(metrics) -> None:
    labels, p = said(2)
    np.testing.assert_allclose(
        measure.roc_areas(labels, p), [metrics.roc_auc_score(labels == number, p[:, number]) for number in range(C)]
    )
    np.testing.assert_allclose(
        measure.average_precisions(labels, p),
        [metrics.average_precision_score(labels == number, p[:, number]) for number in range(C)],
    )
    labels = np.where(labels == 4, 0, labels)
    assert np.isnan(measure.roc_areas(labels, p)).tolist() == [False] * 4 + [True]
    assert np.isnan(measure.average_precisions(labels, p)).tolist() == [False] * 4 + [True]
    assert math.isnan(measure.roc_area(np.ones(3, bool), np.arange(3.0)))
    assert measure.average_precision(np.ones(3, bool), np.arange(3.0)) == 1.0


# ---- how far its probabilities can be believed


def test_losses(metrics) -> None:
    labels, p = said(4)
    assert measure.log_loss(labels, p) == pytest.approx(metrics.log_loss(labels, p, labels=range(C)))
    assert measure.brier_score(labels, p) == pytest.approx(((p - np.eye(C)[labels]) ** 2).sum() / N)
    labels, p = said(4, c=2)
    assert measure.brier_score(labels, p) == pytest.approx(2 * metrics.brier_score_loss(labels, p[:, 1]))
    certain = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert measure.log_loss(np.array([0, 1]), certain) == pytest.approx(52 * math.log(2) / 2)
    assert measure.brier_score(np.array([0, 1]), certain) == 1.0


def test_reliability_by_hand() -> None:
    p = np.array([[0.6, 0.4], [0.5, 0.5], [0.2, 0.8], [0.19, 0.81], [0.0, 1.0], [0.99, 0.01]])
    labels = np.array([0, 1, 1, 1, 0, 0])
    found = measure.reliability(labels, p, bins=5)
    np.testing.assert_allclose(found.edges, [0, 0.2, 0.4, 0.6, 0.8, 1])
    # 0.6 and 0.5 lie in ]0.4, 0.6], 0.8 in ]0.6, 0.8], the other three in ]0.8, 1]; of them 1.0 is wrong.
    assert found.count_M.tolist() == [0, 0, 2, 1, 3]
    np.testing.assert_allclose(found.confidence_M, [np.nan, np.nan, 0.55, 0.8, 2.8 / 3])
    np.testing.assert_allclose(found.accuracy_M, [np.nan, np.nan, 0.5, 1, 2 / 3])
    assert found.expected_error == pytest.approx((2 * 0.05 + 1 * 0.2 + 3 * (2.8 / 3 - 2 / 3)) / 6)
    assert found.largest_error == pytest.approx(2.8 / 3 - 2 / 3)


def test_reliability_equals_a_loop() -> None:
    labels, p = said(5)
    found = measure.reliability(labels, p)
    total = 0.0
    for number in range(15):
        inside = [n for n in range(N) if number / 15 < p[n].max() <= (number + 1) / 15]
        assert found.count_M[number] == len(inside)
        if inside:
            right = np.mean([p[n].argmax() == labels[n] for n in inside])
            total += len(inside) / N * abs(right - np.mean([p[n].max() for n in inside]))
    assert found.expected_error == pytest.approx(total)
    assert measure.reliability(labels, p, bins=1).expected_error == pytest.approx(
        abs(p.max(axis=1).mean() - (p.argmax(axis=1) == labels).mean())
    )


def test_a_temperature_makes_the_loss_least() -> None:
    labels, p = said(6)
    for sharpened in (0.2, 1.0, 5.0):
        wrong = measure.with_temperature(p, sharpened)
        fitted = measure.fit_temperature(labels, wrong)
        best = measure.log_loss(labels, measure.with_temperature(wrong, fitted))
        grid = np.exp(np.linspace(np.log(0.02), np.log(50), 2001))
        losses = [measure.log_loss(labels, measure.with_temperature(wrong, one)) for one in grid]
        assert best <= min(losses) + 1e-12
        assert fitted == pytest.approx(grid[int(np.argmin(losses))], rel=0.005)
        assert fitted * sharpened == pytest.approx(measure.fit_temperature(labels, p), rel=1e-6)


def test_a_temperature_leaves_the_class_and_divides_the_logits() -> None:
    logits = np.random.default_rng(3).normal(size=(7, 3))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = np.exp(logits / 2.5) / np.exp(logits / 2.5).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(measure.with_temperature(p.astype(np.float32), 2.5), expected, rtol=1e-5)
    np.testing.assert_array_equal(measure.with_temperature(p, 30.0).argmax(axis=1), p.argmax(axis=1))
    with pytest.raises(ValueError, match="a temperature of 0"):
        measure.with_temperature(p, 0)


def test_temperatures_without_an_end() -> None:
    p = np.array([[0.7, 0.3], [0.2, 0.8], [1.0, 0.0]])
    assert measure.fit_temperature(np.array([0, 1, 0]), p) == 0.01
    assert measure.fit_temperature(np.array([1, 0, 1]), p) == 100.0
    # Two classes, 3 of 4 right with the same confidence: the temperature that gives 3/4.
    p = np.tile([[0.9, 0.1]], (4, 1))
    fitted = measure.fit_temperature(np.array([0, 0, 0, 1]), p)
    assert measure.with_temperature(p, fitted)[0, 0] == pytest.approx(0.75)


# ---- whether it is better


def test_mcnemar_is_exact() -> None:
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for ours, theirs in ((0, 0), (1, 0), (5, 5), (3, 11), (40, 13), (400, 520)):
        expected = binomtest(ours, ours + theirs).pvalue if ours + theirs else 1.0
        assert measure.mcnemar(ours, theirs) == pytest.approx(expected)
        assert measure.mcnemar(theirs, ours) == measure.mcnemar(ours, theirs)
    assert measure.mcnemar(0, 6) == 2 / 64


def test_beside_another_classifier() -> None:
    labels = np.zeros(500, np.int64)
    ours, theirs = np.zeros(500, np.int64), np.zeros(500, np.int64)
    ours[:20], theirs[15:75] = 1, 1
    found = measure.beside(labels, ours, theirs)
    assert (found.accuracy, found.other_accuracy) == (0.96, 0.88)
    assert (found.only_ours, found.only_theirs) == (55, 15)
    assert found.p_value == measure.mcnemar(55, 15) < 1e-5
    error = math.sqrt((70 / 500 - 0.08**2) / 500)
    assert found.low == pytest.approx(0.08 - 1.96 * error, abs=0.004)
    assert found.high == pytest.approx(0.08 + 1.96 * error, abs=0.004)
    assert measure.beside(labels, ours, theirs) == found
    same = measure.beside(labels, ours, ours)
    assert (same.p_value, same.low, same.high) == (1.0, 0.0, 0.0)


def test_the_interval_is_that_of_texts_drawn_anew() -> None:
    labels, p = said(8)
    predicted = p.argmax(axis=1)
    right = (predicted == labels).astype(float)
    rng = np.random.default_rng(11)
    drawn = [right[rng.integers(0, N, N)].mean() for _ in range(4000)]
    for level in (0.5, 0.95):
        low, high = measure.accuracy_interval(labels, predicted, level=level)
        expected = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        np.testing.assert_allclose([low, high], expected, atol=1.01 / N)
    assert low < right.mean() < high
    assert measure.accuracy_interval(labels, labels) == (1.0, 1.0)
    with pytest.raises(ValueError, match=r"a level of 95"):
        measure.accuracy_interval(labels, predicted, level=95)


# ---- where to look, and what is refused


def test_the_most_confident_errors_come_first() -> None:
    p = np.array([[0.9, 0.1], [0.3, 0.7], [0.8, 0.2], [0.05, 0.95], [0.7, 0.3]])
    labels = np.array([1, 1, 1, 0, 1])
    expected = [(3, 0, 1, 0.95), (0, 1, 0, 0.9), (2, 1, 0, 0.8), (4, 1, 0, 0.7)]
    assert measure.confident_errors(labels, p) == expected
    assert measure.confident_errors(labels, p, 2) == expected[:2]
    assert measure.confident_errors(p.argmax(axis=1), p) == []


def test_what_is_refused() -> None:
    none, p = np.zeros(0, np.int64), np.full((3, 2), 0.5)
    for call in (lambda: measure.accuracy(none, none), lambda: measure.log_loss(none, np.zeros((0, 2))),
                 lambda: measure.roc_area(none > 0, np.zeros(0))):  # fmt: skip
        with pytest.raises(GroundupError, match="there is no text to measure on"):
            call()
    with pytest.raises(GroundupError, match="the model has diverged"):
        measure.log_loss(np.array([0, 0, 1]), np.where(np.eye(3, 2) > 0, np.nan, p))
    for labels, wrong in (([0, 1], p), ([0, 1, 2], p), ([0, 1, 1], 2 * p), ([0, 1, 1], p - [[1, -1]]), ([0, -1, 1], p)):
        with pytest.raises(ValueError):
            measure.brier_score(np.array(labels), wrong)
    with pytest.raises(ValueError, match="2 labels and 3 predictions"):
        measure.accuracy(np.array([0, 1]), np.array([0, 1, 1]))
    with pytest.raises(ValueError, match="ids from 0 to 2 of 2 classes"):
        measure.confusion_matrix(np.array([0, 1]), np.array([0, 2]), 2)
