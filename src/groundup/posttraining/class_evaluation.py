"""What evaluation.json says of a classifier: how good it is beside a baseline, where it errs, what more texts bring.

The measures themselves are those of groundup.evaluation.classification. Whatever cannot be measured on these texts,
such as the ranking of a class that has none, is null.
"""

# N texts   C classes   K points of a curve

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from groundup.data import derive_key
from groundup.data.dedup import content_key
from groundup.evaluation.classification import (
    TEMPERATURES,
    Beside,
    Reliability,
    accuracy,
    accuracy_interval,
    beside,
    brier_score,
    class_scores,
    confident_errors,
    confusion_matrix,
    fit_temperature,
    log_loss,
    reliability,
    roc_areas,
    roc_curve,
    with_temperature,
)
from groundup.posttraining.baseline import BaselineResult, tfidf_baseline
from groundup.posttraining.labelled import LabelledText

LEVEL = 0.05  # below this p-value one of two classifiers counts as the better one
CURVES = 6  # classes whose ROC curve is kept
POINTS = 200  # of a curve
LONGEST = 2_000  # characters of a text that is shown

Ids = npt.NDArray[np.integer]
Floats = npt.NDArray[np.floating]
Float64Array = npt.NDArray[np.float64]


def evaluate_classifier(
    classes: Sequence[str], labels_N: Ids, probabilities_NC: Floats, texts: Sequence[LabelledText],
    baseline: BaselineResult | None = None, *, val: tuple[Ids, Floats] | None = None, train_labels: Ids | None = None,
    name: str = "this model", seconds: float | None = None, note: str = "", errors: int = 20, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Measure a classifier on test texts; the content of evaluation.json, learning curves aside.

    With ``val``, the measures are those of the calibrated probabilities, which is what the saved classifier says;
    the reliability diagram shows them before and after. The temperature is there as ``temperature``.

    Args:
        classes: the C names.
        labels_N, texts: the test texts and their true ids.
        probabilities_NC: what the classifier says of them, at temperature 1.
        baseline: what another says of the same texts.
        val: true ids and probabilities, at temperature 1, of other held-out texts, to find a temperature on.
        train_labels: ids of the texts that were learnt, for what is most frequent; the test texts' when None.
        name, seconds, note: for the row of the classifier.
        errors: how many of the most confident errors are shown.
        seed: of the intervals.

    Raises:
        GroundupError: there is no text, or a probability is not finite.
    """
    if len(texts) != len(labels_N):
        raise ValueError(f"{len(texts)} texts and {len(labels_N)} labels")
    if baseline is not None and (baseline.classes != list(classes) or not np.array_equal(baseline.labels, labels_N)):
        raise ValueError("the baseline was measured on other texts, or of other classes")
    temperature = 1.0 if val is None else held_out_temperature(*val)
    p_NC = with_temperature(probabilities_NC, temperature) if temperature != 1.0 else np.asarray(probabilities_NC)
    predicted_N = p_NC.argmax(axis=1)
    confusion_CC = confusion_matrix(labels_N, predicted_N, len(classes))
    rows = [measures(name, labels_N, p_NC, seconds=seconds, note=note, seed=seed)]
    compared: Beside | None = None
    if baseline is not None:
        theirs_NC, title = baseline.probabilities, "TF-IDF + logistic regression"
        note = f"{baseline.n_features:,} words and pairs of words"
        rows.append(measures(title, labels_N, theirs_NC, seconds=baseline.seconds, note=note, seed=seed))
        compared = beside(labels_N, predicted_N, baseline.predicted, seed=seed)
    common_NC = _frequencies(labels_N if train_labels is None else train_labels, len(classes), len(labels_N))
    note = f"always {classes[int(common_NC[0].argmax())]}"
    rows.append(measures("the most frequent class", labels_N, common_NC, note=note, seed=seed))
    diagrams = [_diagram("as it comes", 1.0, reliability(labels_N, np.asarray(probabilities_NC)))]
    if temperature != 1.0:
        diagrams.append(_diagram(f"temperature {temperature:.3g}", temperature, reliability(labels_N, p_NC)))
    return {
        "kind": "classify",
        "classes": list(classes),
        "test_texts": len(labels_N),
        "temperature": temperature,
        "rows": rows,
        "beside": None if compared is None else compared._asdict(),
        "verdict": None if compared is None else verdict(compared),
        "per_class": _per_class(classes, confusion_CC, labels_N, baseline),
        "confusion": confusion_CC.tolist(),
        "roc": _roc(classes, labels_N, p_NC, baseline),
        "reliability": diagrams,
        "errors": [
            {
                "where": texts[wrong.number].where,
                "text": _shown(texts[wrong.number].text),
                "label": classes[wrong.label],
                "predicted": classes[wrong.predicted],
                "probability": wrong.probability,
            }
            for wrong in confident_errors(labels_N, p_NC, errors)
        ],
    }


def held_out_temperature(labels_N: Ids, probabilities_NC: Floats) -> float:
    """The temperature that fits held-out texts best; 1 where they do not tell, for all of them are right or none is."""
    found = fit_temperature(labels_N, probabilities_NC)
    return 1.0 if found in TEMPERATURES else found


def measures(
    name: str, labels_N: Ids, probabilities_NC: Floats, *, seconds: float | None = None, note: str = "", seed: int = 0
) -> dict[str, Any]:
    """A row of the table: what one classifier is worth on the test texts.

    ``low`` and ``high`` are a 95% interval of the accuracy, ``roc_area`` the mean over the classes that occur.
    """
    predicted_N = probabilities_NC.argmax(axis=1)
    scores = class_scores(confusion_matrix(labels_N, predicted_N, probabilities_NC.shape[1]))
    low, high = accuracy_interval(labels_N, predicted_N, seed=seed)
    areas_C = roc_areas(labels_N, probabilities_NC)
    known_C = areas_C[~np.isnan(areas_C)]
    return {
        "name": name,
        "accuracy": accuracy(labels_N, predicted_N),
        "low": low,
        "high": high,
        "macro_f1": scores.macro_f1,
        "macro_precision": scores.macro_precision,
        "macro_recall": scores.macro_recall,
        "log_loss": log_loss(labels_N, probabilities_NC),
        "brier": brier_score(labels_N, probabilities_NC),
        "calibration_error": reliability(labels_N, probabilities_NC).expected_error,
        "roc_area": float(known_C.mean()) if len(known_C) else None,
        "seconds": seconds,
        "note": note,
    }


def verdict(found: Beside) -> str:
    """Whether a classifier is better than the baseline, by McNemar's test at 5%."""
    ahead = found.only_ours - found.only_theirs
    if found.p_value < LEVEL:
        return "better than the baseline" if ahead > 0 else "worse than the baseline"
    if ahead < 0:
        return "not better than the baseline"
    return "as good as the baseline, as far as these texts can tell"


def _frequencies(labels_N: Ids, n_classes: int, n_texts: int) -> Float64Array:
    """How frequent each class is, as what a classifier that looks at no text would say of so many texts."""
    counts_C = np.bincount(labels_N, minlength=n_classes)
    return np.tile(counts_C / counts_C.sum(), (n_texts, 1))


def _per_class(
    classes: Sequence[str], confusion_CC: npt.NDArray[np.int64], labels_N: Ids, baseline: BaselineResult | None
) -> list[dict[str, Any]]:
    ours, theirs_C = class_scores(confusion_CC), None
    if baseline is not None:
        theirs_C = class_scores(confusion_matrix(labels_N, baseline.predicted, len(classes))).f1_C
    return [
        {
            "name": name,
            "precision": float(ours.precision_C[number]),
            "recall": float(ours.recall_C[number]),
            "f1": float(ours.f1_C[number]),
            "support": int(ours.support_C[number]),
            "baseline_f1": None if theirs_C is None else float(theirs_C[number]),
        }
        for number, name in enumerate(classes)
    ]


def _diagram(name: str, temperature: float, found: Reliability) -> dict[str, Any]:
    return {
        "name": name,
        "temperature": temperature,
        "expected_error": found.expected_error,
        "edges": found.edges.tolist(),
        "count": found.count_M.tolist(),
        "confidence": [_number(value) for value in found.confidence_M],
        "accuracy": [_number(value) for value in found.accuracy_M],
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _shown(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


# ---- curves of ranking


def _roc(classes: Sequence[str], labels_N: Ids, p_NC: Floats, baseline: BaselineResult | None) -> list[dict[str, Any]]:
    """The curves of the classes with the most texts; of two classes the second one's, which the other's mirrors."""
    support_C = np.bincount(labels_N, minlength=len(classes))
    chosen = [1] if len(classes) == 2 else sorted(np.argsort(-support_C, kind="stable")[:CURVES].tolist())
    found = []
    for number in chosen:
        if not 0 < support_C[number] < len(labels_N):
            continue
        found.append(_curve(classes[number], labels_N == number, p_NC[:, number]))
        if baseline is not None:
            title, theirs_N = f"{classes[number]}, baseline", baseline.probabilities[:, number]
            found.append(_curve(title, labels_N == number, theirs_N))
    return found


def _curve(name: str, positive_N: npt.NDArray[np.bool_], scores_N: Floats) -> dict[str, Any]:
    curve = roc_curve(positive_N, scores_N)
    false_K, true_K = curve.false_K, curve.true_K
    area = float((np.diff(false_K) * (true_K[1:] + true_K[:-1]) / 2).sum())
    kept = _corners(false_K, true_K)
    if len(kept) > POINTS:
        kept = kept[np.unique(np.linspace(0, len(kept) - 1, POINTS).round().astype(int))]
    return {"name": name, "area": area, "false": false_K[kept].tolist(), "true": true_K[kept].tolist()}


def _corners(false_K: Float64Array, true_K: Float64Array) -> npt.NDArray[np.int64]:
    """The places of a curve that goes up or to the right where it does not just go on as before."""
    up_K, right_K = np.diff(true_K) > 0, np.diff(false_K) > 0
    straight_K = (~right_K[1:] & ~right_K[:-1]) | (~up_K[1:] & ~up_K[:-1])
    return np.flatnonzero(np.concatenate([[True], ~straight_K, [True]]))


# ---- what more texts would bring


def nested_parts(texts: Sequence[LabelledText], shares: Sequence[float], seed: int = 0) -> list[list[LabelledText]]:
    """For each share, so many of the texts of each class, one at least; a smaller part lies within a larger one.

    The order of the texts stays, and which are taken hangs on the seed and on what they say.

    Args:
        shares: above 0, at most 1.
    """
    of_class: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, text in enumerate(texts):
        rank = derive_key(seed, int.from_bytes(content_key(text.text), "big"))
        of_class[text.label].append((rank, number))
    parts = []
    for share in shares:
        kept = {
            number
            for ranked in of_class.values()
            for _, number in sorted(ranked)[: max(1, math.floor(share * len(ranked) + 0.5))]
        }
        parts.append([text for number, text in enumerate(texts) if number in kept])
    return parts


def learning_curve_rows(
    train: Sequence[LabelledText], test: Sequence[LabelledText], shares: Sequence[float],
    accuracy_of: Callable[[list[LabelledText]], float], *, whole: tuple[float, float | None] | None = None,
    with_baseline: bool = True, seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Accuracy on the test texts by how many texts were learnt, of the model and of the baseline.

    Args:
        train: what is learnt, without augmented copies.
        shares: parts of it, each above 0 and below 1; see :func:`nested_parts`.
        accuracy_of: trains on a part and tells the accuracy on the test texts.
        whole: both accuracies where all of it is learnt, if they are known; found here otherwise.
        with_baseline: whether the baseline is measured on the parts.
        seed: of the parts.

    Returns:
        A row for each part, from few texts to all: ``texts``, ``accuracy``, ``baseline`` (null without one).
    """

    def row(part: list[LabelledText]) -> dict[str, Any]:
        theirs = _baseline_accuracy(part, test) if with_baseline else None
        return {"texts": len(part), "accuracy": float(accuracy_of(part)), "baseline": theirs}

    rows = [row(part) for part in nested_parts(train, sorted(set(shares)), seed) if len(part) < len(train)]
    if whole is None:
        return [*rows, row(list(train))]
    return [*rows, {"texts": len(train), "accuracy": whole[0], "baseline": whole[1]}]


def _baseline_accuracy(train: Sequence[LabelledText], test: Sequence[LabelledText]) -> float:
    found = tfidf_baseline(train, test)
    return accuracy(found.labels, found.predicted)


def most_confused(confusion: Sequence[Sequence[int]], classes: Sequence[str], most: int = 5) -> list[dict[str, Any]]:
    """The pairs of classes of which the first is taken for the second most often, from a confusion matrix.

    Returns:
        For each: ``label``, ``predicted``, ``count``, and ``of``, the texts of that label.
    """
    pairs = Counter(
        {(row, column): count for row, counts in enumerate(confusion) for column, count in enumerate(counts)
         if row != column and count}
    )  # fmt: skip
    return [
        {"label": classes[row], "predicted": classes[column], "count": int(count), "of": int(sum(confusion[row]))}
        for (row, column), count in pairs.most_common(most)
    ]
