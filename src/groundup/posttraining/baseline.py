"""The baseline of text classification: weighted counts of words, and a line between the classes.

It takes seconds on a CPU. A fine-tuned model that is not better, on the same test texts, is not worth its cost.
"""

# N texts   C classes   F features

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from groundup.posttraining.labelled import LabelledText, class_names, label_ids
from groundup.runtime import GroundupError


@dataclass(frozen=True)
class BaselineResult:
    """What the baseline says of the texts to be measured on.

    Args:
        classes: the C names, of training; a class's id is its place.
        labels: the true ids, int64 N.
        predicted: ids, int64 N.
        probabilities: float64 N C; a row sums to 1.
        n_features: F, words and pairs of words that were counted.
        seconds: of learning and predicting.
    """

    classes: list[str]
    labels: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]
    n_features: int
    seconds: float


def tfidf_baseline(
    train: Sequence[LabelledText], test: Sequence[LabelledText], *, inverse_penalty: float = 10.0, max_steps: int = 1000
) -> BaselineResult:
    """Logistic regression on TF-IDF weights of words and pairs of neighbouring words.

    A weight is (1 + log count) * idf, each text's weights scaled to length 1 (Manning, Raghavan and Schütze 2008,
    sections 6.2 and 6.4). What is made least is the cross-entropy of all classes at once, summed over the texts, times
    ``inverse_penalty``, and half the sum of the squares of the F C coefficients.

    Args:
        train, test: the parts of one split. What is counted, and how common it is, is learnt from ``train`` alone.
        inverse_penalty: scikit-learn's C: the larger, the closer the fit.
        max_steps: of L-BFGS.

    Raises:
        GroundupError: scikit-learn is missing; there are no texts or one class; a label is not among those of training.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise GroundupError(
            "the baseline of classification needs the package scikit-learn: pip install 'groundup[finetune]'"
        ) from error
    classes = class_names(train)
    known, wanted = label_ids(train, classes), label_ids(test, classes)
    if not len(wanted):
        raise GroundupError("there is no text to measure the baseline on. Give test texts, or a larger test_fraction.")
    started = time.perf_counter()
    counter = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+")
    try:
        train_NF = counter.fit_transform([text.text for text in train])
    except ValueError as error:  # no text has a letter or a digit
        raise GroundupError(
            "there are no words in the texts to learn from, so the baseline has none to count."
        ) from error
    line = LogisticRegression(C=inverse_penalty, max_iter=max_steps)
    line.fit(train_NF, known)
    probabilities_NC = np.asarray(line.predict_proba(counter.transform([text.text for text in test])), np.float64)
    predicted_N = probabilities_NC.argmax(axis=1).astype(np.int64)
    seconds = time.perf_counter() - started
    return BaselineResult(classes, wanted, predicted_N, probabilities_NC, train_NF.shape[1], seconds)
