"""What came of learning to sort texts into classes: how often the model is right, and whether that is much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from groundup.report.jsonl import Row
from groundup.report.measures import exact, percent, shown
from groundup.report.metrics import is_number
from groundup.report.run_folder import RunFolder, number_of, part_of, words_of

OURS, MOST_FREQUENT = "this model", "the most frequent class"  # how the names of these rows begin
BETTER = "better than the baseline"
# The verdict of evaluation.json, as a sentence goes on that begins with "This model".
VERDICTS = {
    BETTER: "beats its baseline",
    "not better than the baseline": "does not beat its baseline",
    "worse than the baseline": "does not beat its baseline, it is worse",
    "as good as the baseline, as far as these texts can tell": (
        "does not beat its baseline, as far as these texts can tell"
    ),
}


@dataclass(frozen=True)
class Contestant:
    """One row of the table of accuracies.

    Args:
        name: who.
        note: how it came about.
        seconds: of learning and predicting, or None.
        accuracy: share of the texts that it gets right; None where that is not a finite number.
        low, high: its interval, or None.
        row: all that was measured of it.
    """

    name: str
    note: str
    seconds: float | None
    accuracy: float | None
    low: float | None
    high: float | None
    row: Row

    @property
    def accuracy_text(self) -> str:
        """The accuracy as it is shown."""
        return shown(self.row.get("accuracy"), percent)

    @property
    def interval(self) -> str:
        """``97.9% to 99.5%``; empty where it is not known."""
        return "" if self.low is None or self.high is None else f"{percent(self.low)} to {percent(self.high)}"


class Contest(NamedTuple):
    """Who is compared; None for whoever is not there."""

    model: Contestant | None
    baseline: Contestant | None
    most_frequent: Contestant | None


def contestants(rows: Sequence[Row]) -> list[Contestant]:
    """The rows of ``evaluation.json``, in their order."""
    return [
        Contestant(
            words_of(row, "name") or "?",
            words_of(row, "note"),
            number_of(row, "seconds"),
            number_of(row, "accuracy"),
            number_of(row, "low"),
            number_of(row, "high"),
            row,
        )
        for row in rows
    ]


def contest(table: Sequence[Contestant]) -> Contest:
    """Who is who, told by their names. Where none is called "this model", it is the first one."""
    most_frequent = next((one for one in table if one.name.startswith(MOST_FREQUENT)), None)
    others = [one for one in table if one is not most_frequent]
    model = next((one for one in others if one.name.startswith(OURS)), others[0] if others else None)
    return Contest(model, next((one for one in others if one is not model), None), most_frequent)


@dataclass(frozen=True)
class Verdict:
    """What is to be said of the model first of all.

    Args:
        said: how a sentence goes on that begins with "This model".
        good: whether it is better than what it is compared with.
    """

    said: str
    good: bool


def verdict(run: RunFolder) -> Verdict:
    """Whether the model beats its baseline, and naming the most frequent class every time.

    The first is as ``evaluation.json`` says; where it does not, as the accuracies that are shown do.
    """
    model, baseline, most_frequent = contest(contestants(run.evaluation_rows))
    ours = None if model is None else model.accuracy
    if ours is None:
        return Verdict("has no accuracy that is a finite number", False)
    said, good = "has been compared with no baseline", True
    if baseline is not None and baseline.accuracy is not None:
        found = words_of(run.evaluation, "verdict")
        relation = _relation(ours, baseline.accuracy)
        said, good = VERDICTS.get(found, f"is right {relation} its baseline"), found == BETTER
        if found not in VERDICTS:
            good = ours > baseline.accuracy
    if most_frequent is not None and most_frequent.accuracy is not None and ours <= most_frequent.accuracy:
        often = "as often" if ours == most_frequent.accuracy else "more often"
        said += f", and is of no use: naming the most frequent class every time is right {often}"
        good = False
    return Verdict(said, good)


def _relation(ours: float, theirs: float) -> str:
    """How two accuracies relate, true at the precision shown."""
    if percent(ours) == percent(theirs):
        return "as often as"
    return "more often than" if ours > theirs else "less often than"


def headline(run: RunFolder) -> str:
    """What came of the run, in one sentence that holds whatever did."""
    model, baseline, most_frequent = contest(contestants(run.evaluation_rows))
    if model is None:
        return _unfinished(run)
    said = verdict(run).said
    if model.accuracy is None:
        return f"This model {said}."
    texts = number_of(run.evaluation, "test_texts")
    of = "of the test texts" if texts is None else f"of {texts:,.0f} test texts"
    interval = f" (95% interval {model.interval})" if model.interval else ""
    told = [f"{of} it gets {model.accuracy_text} right{interval}"]
    if baseline is not None and baseline.accuracy is not None:
        told.append(f"the baseline, {baseline.name}, {baseline.accuracy_text}")
    if most_frequent is not None and most_frequent.accuracy is not None:
        told.append(f"the most frequent class alone {most_frequent.accuracy_text}")
    return f"This model {said}: {'; '.join(told)}."


def difference(run: RunFolder) -> str:
    """How the model and the baseline differ text by text; empty where nobody counted."""
    beside = part_of(run.evaluation, "beside")
    ours, theirs = number_of(beside, "only_ours"), number_of(beside, "only_theirs")
    p_value, low, high = (number_of(beside, key) for key in ("p_value", "low", "high"))
    told = []
    if ours is not None and theirs is not None:
        p = "" if p_value is None else f" (McNemar's test: p {'< 0.001' if p_value < 0.001 else f'= {p_value:.3f}'})"
        told.append(f"{ours:,.0f} texts are right with this model alone, {theirs:,.0f} with the baseline alone{p}.")
    if low is not None and high is not None:
        told.append(
            f"This model's accuracy differs from the baseline's by {100 * low:+.1f} to {100 * high:+.1f} points "
            "(95% interval)."
        )
    return " ".join(told)


def _unfinished(run: RunFolder) -> str:
    """The sentence for a run that has not come to its end."""
    measured = (("eval", "accuracy"), ("eval", "loss"), ("train", "accuracy"), ("train", "loss"))
    for kind, key in measured:
        rows = [row for row in run.metrics if row.get("kind") == kind and is_number(row.get(key))]
        if not rows:
            continue
        where = "held-out texts" if kind == "eval" else "texts of training"
        step, value = rows[-1].get("step", "?"), rows[-1][key]
        said = f"the loss on {where} was {exact(value)} nats per text"
        if key == "accuracy":
            said = f"{percent(value)} of the {where} were sorted right"
        return f"At step {step} {said}. Nothing has been measured on test texts yet."
    return "Nothing has been measured yet."
