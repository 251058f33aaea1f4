"""What a fine-tuning run is compared by with others."""

from __future__ import annotations

from collections.abc import Sequence

from groundup.report.classes import contest, contestants
from groundup.report.finetuning import KNEW, MEASURES, before_and_after
from groundup.report.jsonl import Row
from groundup.report.measures import Measure, exact, lines, percent
from groundup.report.metrics import series
from groundup.report.run_folder import CLASSIFY, SFT, RunFolder, part_of

OF_ANSWERS = [measure for measure in MEASURES if measure.key in ("loss", "perplexity", "bleu", "rouge_l")]
OF_MODEL = (Measure("accuracy", "accuracy, test texts", show=percent), Measure("macro_f1", "macro F1", show=percent))
OF_BASELINE = (Measure("accuracy", "accuracy of the baseline", show=percent),)


def figures_of_finetuning(run: RunFolder) -> dict[str, str]:
    """The figures of a run by name, as text: those that it has. None for a run of another kind."""
    if run.kind == SFT:
        before, after = before_and_after(run)
        knew = part_of(part_of(run.evaluation, "forgetting"), "after")
        return {
            **_of(before, OF_ANSWERS[:1], "answers, {}: before"),
            **_of(after, OF_ANSWERS, "answers, {}: after"),
            **_of(knew, KNEW[:1], "{} of what it knew: after"),
        }
    if run.kind != CLASSIFY:
        return {}
    model, baseline, _ = contest(contestants(run.evaluation_rows))
    found = {} if model is None else _of(model.row, OF_MODEL)
    found |= {} if baseline is None else _of(baseline.row, OF_BASELINE)
    accuracies, losses = (series(run.metrics, "eval", key, key)[0] for key in ("accuracy", "loss"))
    if accuracies:
        found["accuracy, on the way: best"] = percent(max(accuracies))
    if losses:
        found["held-out loss, nats per text: best"] = exact(min(losses))
    return found


def _of(row: Row, measures: Sequence[Measure], name: str = "{}") -> dict[str, str]:
    """What a row has of some measures."""
    return {name.format(line.name): line.cells[0] for line in lines([row], measures)}
