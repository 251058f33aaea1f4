"""How well a classifier sorts: what it gets right, how it ranks, how far its probabilities can be believed, and whether
it is better than another one.

Everything here takes the true ids of N texts and what the classifier says of them. Read class_scores for the errors,
roc_curve for the ranking, reliability and fit_temperature for the probabilities, and beside for two classifiers.
"""

# N texts   C classes   M bins   K points of a curve

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from groundup.runtime import GroundupError

Ids = npt.NDArray[np.integer]
Floats = npt.NDArray[np.floating]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

BINS = 15  # Guo et al. 2017, table 1
LEAST = float(np.finfo(np.float64).eps)  # what a probability of 0 counts as, so that one error leaves a loss finite
TEMPERATURES = 0.01, 100.0  # the bounds of a fitted one


# ---- what is right


def accuracy(labels_N: Ids, predicted_N: Ids) -> float:
    """Share of texts whose class is found.

    Raises:
        GroundupError: there is no text.
    """
    return float(_right(labels_N, predicted_N).mean())


def confusion_matrix(labels_N: Ids, predicted_N: Ids, n_classes: int) -> Int64Array:
    """How many texts of each class (rows) are taken for each (columns): int64 C C.

    Raises:
        GroundupError: there is no text.
        ValueError: an id is none of a class.
    """
    _right(labels_N, predicted_N)
    for ids in (labels_N, predicted_N):
        if ids.min() < 0 or ids.max() >= n_classes:
            raise ValueError(f"ids from {ids.min()} to {ids.max()} of {n_classes} classes")
    pairs = labels_N.astype(np.int64) * n_classes + predicted_N
    return np.bincount(pairs, minlength=n_classes**2).reshape(n_classes, n_classes).astype(np.int64)


@dataclass(frozen=True)
class ClassScores:
    """What is found of each class. What would be 0 divided by 0 is 0.

    Args:
        precision_C: right ones among the texts taken for the class.
        recall_C: right ones among its texts.
        f1_C: harmonic mean of both.
        support_C: its texts, int64.
        occurs_C: whether the class has a text or a text is taken for it; of others a mean knows nothing.
    """

    precision_C: Float64Array
    recall_C: Float64Array
    f1_C: Float64Array
    support_C: Int64Array
    occurs_C: BoolArray

    @property
    def macro_precision(self) -> float:
        """Mean over the classes that occur, each counting the same."""
        return float(self.precision_C[self.occurs_C].mean())

    @property
    def macro_recall(self) -> float:
        """Mean over the classes that occur."""
        return float(self.recall_C[self.occurs_C].mean())

    @property
    def macro_f1(self) -> float:
        """Mean over the classes that occur."""
        return float(self.f1_C[self.occurs_C].mean())


def class_scores(confusion_CC: Int64Array) -> ClassScores:
    """Precision, recall and F1 of each class, from a confusion matrix."""
    right_C = np.diagonal(confusion_CC).astype(np.float64)
    support_C, taken_C = confusion_CC.sum(axis=1), confusion_CC.sum(axis=0)
    return ClassScores(
        right_C / np.maximum(taken_C, 1),
        right_C / np.maximum(support_C, 1),
        2 * right_C / np.maximum(support_C + taken_C, 1),
        support_C,
        support_C + taken_C > 0,
    )


# ---- how it ranks


class RocCurve(NamedTuple):
    """What is caught, and what is caught by mistake, as the threshold falls.

    Args:
        false_K: share of the negatives at the threshold or above, from 0 to 1.
        true_K: share of the positives.
        thresholds_K: a score each, falling; the first is infinite.
    """

    false_K: Float64Array
    true_K: Float64Array
    thresholds_K: Float64Array


def roc_curve(positive_N: BoolArray, scores_N: Floats) -> RocCurve:
    """A point for each score that occurs: equal scores are passed at once. NaN where a kind has no text."""
    hits_K, misses_K, thresholds_K = _passed(positive_N, scores_N)
    with np.errstate(invalid="ignore"):
        true_K, false_K = hits_K / hits_K[-1], misses_K / misses_K[-1]
    return RocCurve(
        np.concatenate([[0.0], false_K]), np.concatenate([[0.0], true_K]), np.concatenate([[np.inf], thresholds_K])
    )


def roc_area(positive_N: BoolArray, scores_N: Floats) -> float:
    """The area below the curve: how often a positive text scores above a negative one, equal scores counting half.

    NaN where all texts are positive, or none is.
    """
    curve = roc_curve(positive_N, scores_N)
    return float((np.diff(curve.false_K) * (curve.true_K[1:] + curve.true_K[:-1]) / 2).sum())


def average_precision(positive_N: BoolArray, scores_N: Floats) -> float:
    """Mean precision over the positive texts, each at the threshold that just catches it; NaN where there is none."""
    hits_K, misses_K, _ = _passed(positive_N, scores_N)
    with np.errstate(invalid="ignore"):
        return float((np.diff(hits_K, prepend=0.0) / hits_K[-1] * hits_K / (hits_K + misses_K)).sum())


def roc_areas(labels_N: Ids, probabilities_NC: Floats) -> Float64Array:
    """The area of each class against the rest, float64 C; NaN for one without a text, or with all of them."""
    p_NC = _checked(labels_N, probabilities_NC)
    return np.array([roc_area(labels_N == number, p_NC[:, number]) for number in range(p_NC.shape[1])])


def average_precisions(labels_N: Ids, probabilities_NC: Floats) -> Float64Array:
    """The average precision of each class against the rest, float64 C; NaN for one without a text."""
    p_NC = _checked(labels_N, probabilities_NC)
    return np.array([average_precision(labels_N == number, p_NC[:, number]) for number in range(p_NC.shape[1])])


def _passed(positive_N: BoolArray, scores_N: Floats) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Positives and negatives that score at least as high as each threshold, and the thresholds, falling."""
    if not len(scores_N):
        raise GroundupError("there is no text to measure on. Give test texts.")
    order = np.argsort(-scores_N, kind="stable")
    scores = scores_N[order].astype(np.float64)
    last_K = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of each run of equal scores
    hits_K = np.cumsum(positive_N[order])[last_K].astype(np.float64)
    return hits_K, last_K + 1 - hits_K, scores[last_K]


# ---- how far its probabilities can be believed


def log_loss(labels_N: Ids, probabilities_NC: Floats) -> float:
    """Mean negative log of the true class's probability, in nats."""
    p_NC = _checked(labels_N, probabilities_NC)
    return float(-np.log(np.maximum(p_NC[np.arange(len(p_NC)), labels_N], LEAST)).mean())


def brier_score(labels_N: Ids, probabilities_NC: Floats) -> float:
    """Mean squared distance between the probabilities and what is true, summed over classes (Brier 1950): 0 to 2.

    Where there are two classes, many halve it.
    """
    p_NC = _checked(labels_N, probabilities_NC)
    return float(((p_NC - np.eye(p_NC.shape[1])[labels_N]) ** 2).sum(axis=1).mean())


@dataclass(frozen=True)
class Reliability:
    """Confidence beside accuracy, in bins of equal width: what a reliability diagram shows.

    Args:
        edges: M + 1, from 0 to 1; a bin holds its upper edge and not its lower one.
        count_M: texts whose confidence, the largest probability, falls into the bin.
        confidence_M: its mean there; NaN for an empty bin.
        accuracy_M: share of right ones there; NaN for an empty bin.
    """

    edges: Float64Array
    count_M: Int64Array
    confidence_M: Float64Array
    accuracy_M: Float64Array

    @property
    def expected_error(self) -> float:
        """The expected calibration error: the mean distance between both, over the texts (Guo et al. 2017, eq. 5)."""
        full = self.count_M > 0
        gaps = np.abs(self.accuracy_M - self.confidence_M)[full]
        return float((gaps * self.count_M[full]).sum() / self.count_M.sum())

    @property
    def largest_error(self) -> float:
        """The largest distance in a bin (their eq. 6)."""
        return float(np.nanmax(np.abs(self.accuracy_M - self.confidence_M)))


def reliability(labels_N: Ids, probabilities_NC: Floats, bins: int = BINS) -> Reliability:
    """Sort the texts into bins by confidence (Guo et al. 2017, section 2)."""
    p_NC = _checked(labels_N, probabilities_NC)
    edges = np.linspace(0.0, 1.0, bins + 1)
    confidence_N, right_N = p_NC.max(axis=1), p_NC.argmax(axis=1) == labels_N
    bin_N = np.clip(np.searchsorted(edges, confidence_N, side="left") - 1, 0, bins - 1)
    count_M = np.bincount(bin_N, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence_M = np.bincount(bin_N, confidence_N, bins) / count_M
        accuracy_M = np.bincount(bin_N, right_N, bins) / count_M
    return Reliability(edges, count_M, confidence_M, accuracy_M)


def fit_temperature(labels_N: Ids, probabilities_NC: Floats) -> float:
    """The temperature that makes the log loss of held-out texts least (Guo et al. 2017, section 4.2).

    The loss is convex in 1 / T, and its slope there is the mean over the texts of the expected logit less the true
    class's. Its sign is followed by bisection. Where the loss falls without end, as for texts that are all right, the
    bound 0.01 is given; 100 is the other one.

    Args:
        labels_N, probabilities_NC: of texts that are neither learnt nor measured on.
    """
    logs_NC = np.log(np.maximum(_checked(labels_N, probabilities_NC), np.finfo(np.float64).tiny))
    true_N = logs_NC[np.arange(len(logs_NC)), labels_N]

    def slope(temperature: float) -> float:
        return float(((_softmax(logs_NC / temperature) * logs_NC).sum(axis=1) - true_N).mean())

    low, high = TEMPERATURES
    if slope(low) <= 0:  # a still lower temperature is better
        return low
    if slope(high) >= 0:
        return high
    for _ in range(60):  # halves of the logarithm: as exact as a float64 is
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return float(np.sqrt(low * high))


def with_temperature(probabilities_NC: Floats, temperature: float) -> Float64Array:
    """What the probabilities are once the logits are divided by a temperature: float64 N C, the same class on top."""
    if temperature <= 0:
        raise ValueError(f"a temperature of {temperature}")
    p_NC = np.asarray(probabilities_NC, np.float64)
    return _softmax(np.log(np.maximum(p_NC, np.finfo(np.float64).tiny)) / temperature)


def _softmax(logits_NC: Float64Array) -> Float64Array:
    weights_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    return weights_NC / weights_NC.sum(axis=1, keepdims=True)


# ---- whether it is better


class Beside(NamedTuple):
    """A classifier beside another one, on the same texts.

    Args:
        accuracy, other_accuracy: of both.
        only_ours, only_theirs: texts that one alone gets right.
        p_value: of McNemar's test.
        low, high: interval of the difference of the accuracies.
    """

    accuracy: float
    other_accuracy: float
    only_ours: int
    only_theirs: int
    p_value: float
    low: float
    high: float


def beside(
    labels_N: Ids, predicted_N: Ids, other_N: Ids, *, level: float = 0.95, samples: int = 10_000, seed: int = 0
) -> Beside:
    """Compare two classifiers on the same texts.

    The interval is a percentile bootstrap (Efron and Tibshirani 1993, chapter 13): texts are drawn anew, with
    replacement and for both classifiers at once.

    Args:
        other_N: what the other one predicts.
        level: share of the drawn differences within the interval.
        samples: drawn.
        seed: of the draws.
    """
    right_N, theirs_N = _right(labels_N, predicted_N), _right(labels_N, other_N)
    ours, theirs, n = int((right_N & ~theirs_N).sum()), int((~right_N & theirs_N).sum()), len(right_N)
    # Of N texts drawn, all that the difference hangs on is how many are of each kind.
    drawn = np.random.default_rng(seed).multinomial(n, [ours / n, theirs / n, (n - ours - theirs) / n], samples)
    low, high = _percentiles((drawn[:, 0] - drawn[:, 1]) / n, level)
    return Beside(
        float(right_N.mean()), float(theirs_N.mean()), ours, theirs, mcnemar(ours, theirs), low, high
    )  # fmt: skip


def mcnemar(only_ours: int, only_theirs: int) -> float:
    """The exact p-value, two-sided, of McNemar's test (1947) that two classifiers are right equally often.

    Of the texts that one alone gets right, each is then one's or the other's with probability one half.

    Args:
        only_ours, only_theirs: how many one gets right and the other does not.
    """
    n, least = only_ours + only_theirs, min(only_ours, only_theirs)
    ways, total = 1, 1  # binomial coefficients, and their sum
    for k in range(least):
        ways = ways * (n - k) // (k + 1)
        total += ways
    return min(1.0, 2 * total / 2**n)


def accuracy_interval(
    labels_N: Ids, predicted_N: Ids, *, level: float = 0.95, samples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """An interval of the accuracy, by percentile bootstrap over the texts.

    Args:
        level, samples, seed: as for :func:`beside`.
    """
    right_N = _right(labels_N, predicted_N)
    drawn = np.random.default_rng(seed).binomial(len(right_N), right_N.mean(), samples)
    return _percentiles(drawn / len(right_N), level)


def _percentiles(values: Float64Array, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"a level of {level}: above 0 and below 1")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# ---- where to look


class ConfidentError(NamedTuple):
    """A text that is taken for another class: its place among the texts, both ids, and the wrong one's probability."""

    number: int
    label: int
    predicted: int
    probability: float


def confident_errors(labels_N: Ids, probabilities_NC: Floats, most: int = 10) -> list[ConfidentError]:
    """The errors that are most certain, the most certain first: often it is the label that is wrong."""
    p_NC = _checked(labels_N, probabilities_NC)
    predicted_N, confidence_N = p_NC.argmax(axis=1), p_NC.max(axis=1)
    wrong = np.flatnonzero(predicted_N != labels_N)
    wrong = wrong[np.argsort(-confidence_N[wrong], kind="stable")][:most]
    return [ConfidentError(int(n), int(labels_N[n]), int(predicted_N[n]), float(confidence_N[n])) for n in wrong]


def _right(labels_N: Ids, predicted_N: Ids) -> BoolArray:
    if len(labels_N) != len(predicted_N):
        raise ValueError(f"{len(labels_N)} labels and {len(predicted_N)} predictions")
    if not len(labels_N):
        raise GroundupError("there is no text to measure on. Give test texts.")
    return labels_N == predicted_N


def _checked(labels_N: Ids, probabilities_NC: Floats) -> Float64Array:
    """The probabilities in float64.

    Raises:
        GroundupError: there is no text, or a probability is not finite: the model has diverged.
        ValueError: they are no probabilities, or an id is none of a class.
    """
    p_NC = np.asarray(probabilities_NC, np.float64)
    if p_NC.ndim != 2 or len(p_NC) != len(labels_N):
        raise ValueError(f"probabilities of shape {p_NC.shape} of {len(labels_N)} labels")
    if not len(p_NC):
        raise GroundupError("there is no text to measure on. Give test texts.")
    if not np.isfinite(p_NC).all():
        raise GroundupError("a probability is not a finite number: the model has diverged. Lower its learning rate.")
    if p_NC.min() < 0 or np.abs(p_NC.sum(axis=1) - 1).max() > 1e-2:
        raise ValueError("each text's probabilities must be positive and sum to 1")
    if labels_N.min() < 0 or labels_N.max() >= p_NC.shape[1]:
        raise ValueError(f"ids from {labels_N.min()} to {labels_N.max()} of {p_NC.shape[1]} classes")
    return p_NC
