"""The page of a run that learnt to sort texts into classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from groundup.report.classes import contest, contestants, difference, headline, verdict
from groundup.report.classes_plots import draw_class_plots
from groundup.report.confusion import MOST_CLASSES, confused_pairs, found_of_classes, matrix_of, shaded
from groundup.report.examples import caution, learnt_from
from groundup.report.facts import Fact, effort
from groundup.report.measures import Measure, exact, lines, percent, shown
from groundup.report.plots import draw_plots
from groundup.report.run_folder import RunFolder, number_of, rows_of, words_of

WEAKEST = 10  # of many classes, how many are shown at once
OPEN_ERRORS = 6  # likewise, of the errors
LONGEST_NAME = 6  # of a class, in letters, for its column to be headed by a level line
CAPTIONS = {
    "loss": "Nats per text: points as measured, line smoothed.",
    "accuracy": "Share of texts sorted right: points as measured, line smoothed.",
}

MEASURES = (
    Measure("accuracy", "accuracy", "share that is right; higher is better", percent, "higher"),
    Measure("macro_f1", "macro F1", "mean over classes; higher is better", percent, "higher"),
    Measure("macro_precision", "precision", "mean over classes; higher is better", percent, "higher"),
    Measure("macro_recall", "recall", "mean over classes; higher is better", percent, "higher"),
    Measure("roc_area", "ROC area", "mean over classes, 0.5 is chance; higher is better", exact, "higher"),
    Measure("log_loss", "log loss", "nats per text; lower is better", exact, "lower"),
    Measure("brier", "Brier score", "squared error of the probabilities; lower is better", exact, "lower"),
    Measure("calibration_error", "calibration error", "confidence less accuracy; lower is better", percent, "lower"),
)


@dataclass(frozen=True)
class Mistake:
    """A text that is taken for another class."""

    where: str
    text: str
    label: str
    predicted: str
    probability: str


def page(run: RunFolder) -> dict[str, Any]:
    """What the page shows, for ``templates/classify.html.j2``."""
    evaluation = run.evaluation
    table = contestants(run.evaluation_rows)
    model, baseline, _ = contest(table)
    names, matrix = matrix_of(evaluation)
    found, mistakes = found_of_classes(evaluation), mistakes_of(run)
    weakest = WEAKEST if len(found) > MOST_CLASSES else len(found)
    return {
        "headline": headline(run),
        "warning": model is not None and not verdict(run).good,
        "facts": facts(run),
        "plots": draw_plots(run.metrics, captions=CAPTIONS),
        "table": table,
        "model": model,
        "difference": difference(run),
        "caution": caution(run.data),
        "names": [one.name for one in table],
        "measures": lines([one.row for one in table], MEASURES[1:]),
        "class_plots": draw_class_plots(evaluation, None if baseline is None else baseline.accuracy),
        "found": found[:weakest],
        "more_found": found[weakest:],
        "with_baseline": any("baseline_f1" in row for row in rows_of(evaluation, "per_class")),
        "classes": names,
        "matrix": shaded(names, matrix) if len(names) <= MOST_CLASSES else [],
        "upright": any(len(name) > LONGEST_NAME for name in names) and len(names) > 3,
        "pairs": confused_pairs(names, matrix) if len(names) > MOST_CLASSES else [],
        "mistakes": mistakes[:OPEN_ERRORS],
        "more_mistakes": mistakes[OPEN_ERRORS:],
        "learnt": learnt_from(run.data),
    }


def mistakes_of(run: RunFolder) -> list[Mistake]:
    """The errors of a run, in the order of its file: the most certain first."""
    return [
        Mistake(
            where=words_of(row, "where"),
            text=words_of(row, "text"),
            label=words_of(row, "label"),
            predicted=words_of(row, "predicted"),
            probability=shown(row.get("probability"), percent),
        )
        for row in rows_of(run.evaluation, "errors")
    ]


def facts(run: RunFolder) -> list[Fact]:
    """The figures at the top."""
    model, baseline, _ = contest(contestants(run.evaluation_rows))
    found = []
    if model is not None and model.accuracy is not None:
        texts = number_of(run.evaluation, "test_texts")
        found.append(Fact(model.accuracy_text, "right" if texts is None else f"right, of {texts:,.0f} test texts"))
    if baseline is not None and baseline.accuracy is not None:
        found.append(Fact(baseline.accuracy_text, "the baseline"))
    if model is not None and (f1 := number_of(model.row, "macro_f1")) is not None:
        found.append(Fact(percent(f1), "macro F1"))
    return found + effort(run, per_second=False)
