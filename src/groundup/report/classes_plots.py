"""The curves of a classifier: how it ranks, how far it can be believed, and what more texts or pretraining bring."""

# K points   M bins

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from groundup.report.figure import AXIS, RUNS, Plot, draw, evenly, legend, levels
from groundup.report.measures import exact, percent
from groundup.report.metrics import is_number
from groundup.report.run_folder import list_of, number_of, rows_of, words_of
from groundup.runtime.console import quantity

OF_BASELINE = ", baseline"  # how the names of its curves end
CLOSEST = 0.09  # of an axis: ticks with numbers nearer to each other than that would touch

Pairs = list[tuple[float, float]]


def draw_class_plots(evaluation: Mapping[str, Any], baseline: float | None) -> list[Plot]:
    """The figures of which ``evaluation.json`` has the numbers.

    Args:
        evaluation: the file.
        baseline: its accuracy, drawn as a horizontal line beside that of more or less pretraining.
    """
    plots = [
        _roc(evaluation),
        _reliability(evaluation),
        _learning_curve(evaluation),
        _pretraining_curve(evaluation, baseline),
    ]
    return [plot for plot in plots if plot is not None]


def points(row: Mapping[str, Any], x: str, y: str) -> Pairs:
    """Two lists of a row as points (x, y), without those of which either is not a finite number."""
    pairs = zip(list_of(row, x), list_of(row, y), strict=False)
    return [(float(one), float(other)) for one, other in pairs if is_number(one) and is_number(other)]


def _short(name: str) -> str:
    """A name for a legend; its first sign must not be the underscore that hides a line there."""
    shown = name if len(name) <= 28 else f"{name[:27]}…"
    return f"\u200b{shown}" if shown.startswith("_") else shown


# ---- how it ranks


def _roc(evaluation: Mapping[str, Any]) -> Plot | None:
    curves = {
        words_of(row, "name") or "?": row for row in rows_of(evaluation, "roc") if len(points(row, "false", "true")) > 1
    }
    if not curves:
        return None
    names = list(dict.fromkeys(name.removesuffix(OF_BASELINE) for name in curves))[: len(RUNS)]

    def paint(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=AXIS, linewidth=0.8, linestyle=(0, (1, 3)))
        for ink, name in zip(RUNS, names, strict=False):
            ours, theirs = curves.get(name), curves.get(name + OF_BASELINE)
            for row, style in ((theirs, (0, (4, 2))), (ours, "-")):
                if row is not None:
                    x, y = zip(*points(row, "false", "true"), strict=True)
                    axes.plot(x, y, color=ink, linewidth=1.4, linestyle=style, label=_area(name, ours, theirs))
        _no_twins(axes)
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.02)
        legend(axes, "lower right")

    dashed = any(name.endswith(OF_BASELINE) for name in curves)
    caption = (
        "What is caught of a class, over what is taken for it by mistake; the area below is 1 at best, 0.5 by chance."
    )
    caption += " Dashed and in brackets: the baseline." if dashed else ""
    return Plot("ROC", caption, draw("roc", f"ROC. {caption}", paint, x_label="share of others taken for it"))


def _area(name: str, ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None) -> str:
    """A class for the legend, with the areas that are known."""
    areas = [None if row is None else number_of(row, "area") for row in (ours, theirs)]
    said = _short(name) if areas[0] is None else f"{_short(name)} {exact(areas[0])}"
    return said if areas[1] is None else f"{said} ({exact(areas[1])})"


def _no_twins(axes: Any) -> None:
    """Name a line in the legend once, the last one: the solid one of a pair."""
    drawn: dict[str, Any] = {}
    for line in axes.get_lines():
        name = line.get_label()
        if name in drawn:
            drawn[name].set_label("_nolegend_")
        drawn[name] = line


# ---- how far it can be believed


def _reliability(evaluation: Mapping[str, Any]) -> Plot | None:
    lines = [(row, points(row, "confidence", "accuracy")) for row in rows_of(evaluation, "reliability")]
    lines = [(row, line) for row, line in lines if line][: len(RUNS)]
    if not lines:
        return None

    def paint(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=AXIS, linewidth=0.8, linestyle=(0, (1, 3)))
        for ink, (row, line) in zip(RUNS, lines, strict=False):
            x, y = zip(*line, strict=True)
            error = number_of(row, "expected_error")
            name = _short(words_of(row, "name") or "?")
            axes.plot(
                x, y, color=ink, linewidth=1.2, label=name if error is None else f"{name}: {percent(error)} apart"
            )
            axes.scatter(x, y, s=_sizes(row), color=ink, alpha=0.55, linewidths=0)
        axes.set_xlim(-0.02 + min(0.98, *(x for _, line in lines for x, _ in line)) * 0.9, 1.02)
        axes.set_ylim(-0.02, 1.04)
        legend(axes, "best")

    caption = (
        "How often it is right, over how certain it is: on the dotted line it can be taken at its word, below it is "
        "too certain. The larger a point, the more texts."
    )
    label = f"Reliability. {caption}"
    return Plot("Reliability", caption, draw("reliability", label, paint, x_label="confidence", unit="share"))


def _sizes(row: Mapping[str, Any]) -> list[float]:
    """The area of each bin's point, in square points: as many as the points that are drawn."""
    bins = zip(list_of(row, "confidence"), list_of(row, "accuracy"), strict=False)
    drawn = [number for number, (x, y) in enumerate(bins) if is_number(x) and is_number(y)]
    counts = list_of(row, "count")
    sizes = [counts[n] if n < len(counts) and is_number(counts[n]) else 0 for n in drawn]
    most = max([*sizes, 1])
    return [6 + 60 * max(size, 0) / most for size in sizes]


# ---- what more would bring


def _learning_curve(evaluation: Mapping[str, Any]) -> Plot | None:
    rows = [row for row in rows_of(evaluation, "learning_curve") if (number_of(row, "texts") or 0) > 0]
    lines = {name: _over(rows, "texts", key) for key, name in (("accuracy", "this model"), ("baseline", "baseline"))}
    if max(map(len, lines.values())) < 2:
        return None

    def paint(axes: Any) -> None:
        for ink, (name, line) in zip(RUNS, lines.items(), strict=False):
            if line:
                x, y = zip(*line, strict=True)
                axes.plot(
                    x, y, "o-" if name == "this model" else "s--", color=ink, linewidth=1.4, markersize=4, label=name
                )
        _log_axis(axes, sorted({x for line in lines.values() for x, _ in line}))
        legend(axes, "lower right")

    caption = (
        "Accuracy on the test texts, over how many texts were learnt from. Where it still climbs, more would help."
    )
    label = f"Learning curve. {caption}"
    svg = draw("learning curve", label, paint, x_label="texts to learn from, a logarithmic scale", unit="share")
    return Plot("Learning curve", caption, svg)


def _pretraining_curve(evaluation: Mapping[str, Any], baseline: float | None) -> Plot | None:
    line = _over(rows_of(evaluation, "pretraining_curve"), "tokens", "accuracy")
    if len(line) < 2:
        return None

    def paint(axes: Any) -> None:
        x, y = zip(*(line[place] for place in evenly(len(line))), strict=True)
        axes.plot(x, y, "o-", color=RUNS[0], linewidth=1.4, markersize=4)
        _log_axis(axes, list(x))
        if baseline is not None:
            low, high = min([*y, baseline]), max([*y, baseline])
            margin = 0.08 * (high - low) or 0.05
            axes.set_ylim(low - margin, high + margin)
            levels(axes, [(f"baseline\n{percent(baseline)}", baseline)], gap=0.0)

    caption = "Accuracy on the test texts after the same fine-tuning, over how much text the model was pretrained on."
    caption += " Dashed: the baseline, which had no pretraining." if baseline is not None else ""
    label = f"What pretraining brings. {caption}"
    svg = draw("pretraining curve", label, paint, x_label="tokens of pretraining", unit="share")
    return Plot("What pretraining brings", caption, svg)


def _over(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> Pairs:
    """Points of one measure over another, in order of x."""
    found = [(number_of(row, x), number_of(row, y)) for row in rows]
    return sorted((one, other) for one, other in found if one is not None and other is not None)


def _log_axis(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic x axis, linear below the least value where 0 is one, with a number at each that has room for it."""
    positive = [value for value in values if value > 0]
    if not positive or positive[-1] == positive[0]:
        return
    least = positive[0]
    if min(values) <= 0:
        axes.set_xscale("symlog", linthresh=least)
    else:
        axes.set_xscale("log")
    places = axes.transScale.transform([(value, 0.5) for value in values])[:, 0]
    places = (places - places.min()) / (places.max() - places.min())
    kept: list[int] = []
    for number in reversed(range(len(values))):  # the last, all of it, is always named
        if not kept or places[kept[-1]] - places[number] >= CLOSEST:
            kept.append(number)
    axes.set_xticks([values[n] for n in kept], labels=[quantity(values[n]) for n in kept])
    axes.minorticks_off()
