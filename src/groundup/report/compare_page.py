"""The page of a comparison: one file that needs no network, no script and no other file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from groundup.report.compare import Comparison
from groundup.report.figure import RUNS, SMOOTHING, Plot, Points, draw, evenly, legend, smooth, x_axis
from groundup.report.html import templates
from groundup.report.metrics import series
from groundup.report.run_folder import CLASSIFY, PRETRAIN, SFT
from groundup.runtime import write_atomic

DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # for more runs than there are colours
LONGEST_NAME = 28  # in a legend


@dataclass(frozen=True)
class Measure:
    """What one row of figures shows, over steps, tokens and time."""

    kind: str
    key: str
    title: str
    caption: str
    of: tuple[str, ...] = (PRETRAIN, SFT, CLASSIFY)  # kinds of runs whose lines are drawn


MEASURES = (
    Measure("eval", "bits_per_byte", "Bits per byte", "On held-out text; lower is better."),
    Measure("train", "loss", "Training loss", "Nats per token, smoothed.", (PRETRAIN, SFT)),
    Measure("eval", "loss", "Held-out loss", "Nats per token of held-out answers; lower is better.", (SFT,)),
    Measure("train", "loss", "Training loss of classifiers", "Nats per text, smoothed.", (CLASSIFY,)),
    Measure("eval", "accuracy", "Accuracy", "Share of held-out texts that is right; higher is better.", (CLASSIFY,)),
)
OVER = {"step": "steps", "tokens": "tokens", "seconds": "time"}


def write_comparison(comparison: Comparison, path: str | os.PathLike[str]) -> Path:
    """Write a comparison as a page.

    Returns:
        The path of the page.

    Raises:
        GroundupError: it cannot be written.
    """
    page = Path(path)
    text = templates().get_template("compare.html.j2").render(comparison=comparison, plots=draw_comparison(comparison))
    write_atomic(page, text.encode("utf-8", "replace"))
    return page


def draw_comparison(comparison: Comparison) -> list[Plot]:
    """The curves of all runs in one figure each: those of which any run has two points."""
    plots = []
    for measure in MEASURES:
        caption = measure.caption + _caution(comparison, measure)
        for x, over in OVER.items():
            lines = [
                series(run.folder.metrics if run.folder.kind in measure.of else [], measure.kind, x, measure.key)
                for run in comparison.runs
            ]
            if max(len(line[0]) for line in lines) < 2:
                continue
            title = f"{measure.title} over {over}"
            x_label, divisor = x_axis(x, max(max(line[0], default=0.0) for line in lines))
            names, rises = [run.name for run in comparison.runs], measure.key == "accuracy"
            paint = _painter(names, lines, divisor, smoothed=measure.kind == "train", rises=rises)
            unit = "share" if rises else ""
            svg = draw(f"{measure.title} {x}", f"{title}. {caption}", paint, x_label=x_label, unit=unit)
            plots.append(Plot(title, caption, svg))
    return plots


def _caution(comparison: Comparison, measure: Measure) -> str:
    """A sentence for a figure whose lines must not be compared."""
    if PRETRAIN not in measure.of:
        return " Compare the lines only where the held-out examples are the same." if measure.kind == "eval" else ""
    if measure.key == "loss":
        return "" if comparison.same_tokenizer else " Compare the lines only where the tokenizer is the same."
    return "" if comparison.same_text else " Compare the lines only where the held-out text is the same."


def _painter(
    names: list[str], lines: list[Points], divisor: float, *, smoothed: bool, rises: bool
) -> Callable[[Any], None]:
    def paint(axes: Any) -> None:
        for number, (name, (places, values)) in enumerate(zip(names, lines, strict=True)):
            if not places:
                continue
            few = evenly(len(places))
            x, y = np.array(places)[few] / divisor, np.array(values)
            y = (smooth(values, SMOOTHING * len(values)) if smoothed else y)[few]
            style = {"color": RUNS[number % len(RUNS)], "linestyle": DASHES[number // len(RUNS)], "linewidth": 1.4}
            axes.plot(x, y, marker="" if smoothed else "o", markersize=3, label=_short(name), **style)
        if smoothed:  # the fall of the first few steps would flatten everything after; but every run is to be seen
            low, high = _range([values for _, values in lines if values])
            margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
            axes.set_ylim(low - margin, high + margin)
        legend(axes, "best" if rises else "upper right")

    return paint


def _range(lines: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The lowest value, and what nearly all values are below, of each line its later half at least."""
    everything = np.concatenate([np.array(values) for values in lines])
    later = max(float(np.median(values)) for values in lines)
    return float(everything.min()), max(float(np.quantile(everything, 0.97)), later)


def _short(name: str) -> str:
    """A name for a legend; its first sign must not be the underscore that hides a line there."""
    shown = name if len(name) <= LONGEST_NAME else f"…{name[-LONGEST_NAME + 1 :]}"
    return f"\u200b{shown}" if shown.startswith("_") else shown
