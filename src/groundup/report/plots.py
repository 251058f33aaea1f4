"""The curves of a run: what is drawn from which rows of its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from groundup.report.figure import (
    HELD_OUT,
    SMOOTHING,
    TRAIN,
    Plot,
    Points,
    draw,
    evenly,
    legend,
    levels,
    smooth,
    x_axis,
)
from groundup.report.jsonl import Row
from groundup.report.metrics import series
from groundup.report.standing import Standing


@dataclass(frozen=True)
class Line:
    """A measure of one kind of row, and what a legend calls it."""

    kind: str
    key: str
    name: str


@dataclass(frozen=True)
class Curve:
    """What one figure shows.

    Args:
        title: of the figure.
        caption: how to read it.
        first: the line in the colour of training.
        second: the line in the colour of held-out text; its points are marked.
        smoothed: whether ``first`` is drawn as points with a smooth line through them.
        from_zero: whether the axis begins at zero.
        rises: whether more is better, so that the first values are the lowest.
        unit: of the values (see :func:`groundup.report.figure.draw`).
        x: what runs along the bottom.
    """

    title: str
    caption: str
    first: Line
    second: Line | None = None
    smoothed: bool = False
    from_zero: bool = False
    rises: bool = False
    unit: str = ""
    x: str = "tokens"


def _of_training(key: str, title: str, caption: str, *, held_out: bool = False, **options: Any) -> Curve:
    second = Line("eval", key, "held-out text") if held_out else None
    return Curve(title, caption, Line("train", key, "training text"), second, **options)


MFU = "Share of the machine's measured matrix speed that the model's own operations made use of."
CURVES = (
    _of_training("bits_per_byte", "Bits per byte", "Lower is better.", held_out=True, smoothed=True),
    _of_training("loss", "Loss", "Nats per token: points as measured, line smoothed.", held_out=True, smoothed=True),
    _of_training(
        "accuracy", "Accuracy", "Share that is right: points as measured, line smoothed.",
        held_out=True, smoothed=True, rises=True, unit="share",
    ),
    _of_training("tokens_per_second", "Throughput", "Training tokens per second.", smoothed=True, from_zero=True),
    _of_training("mfu", "Model FLOPs utilisation", MFU, smoothed=True, from_zero=True, unit="share"),
    _of_training("learning_rate", "Learning rate", "As scheduled.", from_zero=True),
    _of_training("grad_norm", "Gradient norm", "Before clipping: points as measured, line smoothed.", smoothed=True),
    _of_training("memory_bytes", "Peak memory", "The most that was held so far.", from_zero=True, unit="bytes"),
    Curve(
        "Processors", "How much of them was in use.",
        Line("hardware", "cpu_percent", "CPU"), Line("hardware", "gpu_percent", "GPU"),
        from_zero=True, unit="percent", x="seconds",
    ),
    Curve(
        "Memory in use", "By the run's processes; on the GPU by anybody.",
        Line("hardware", "memory_bytes", "main memory"), Line("hardware", "gpu_memory_bytes", "GPU"),
        from_zero=True, unit="bytes", x="seconds",
    ),
    Curve(
        "Power", "Of the parts that could be measured, whoever used them.", Line("hardware", "watts", "power"),
        from_zero=True, unit="watts", x="seconds",
    ),
)  # fmt: skip


def draw_plots(
    metrics: list[Row], yardsticks: Sequence[Standing] = (), captions: Mapping[str, str] | None = None
) -> list[Plot]:
    """The curves that ``metrics`` has at least two points of.

    Args:
        metrics: the rows of ``metrics.jsonl``.
        yardsticks: drawn as horizontal lines where bits per byte are shown.
        captions: how to read some of the curves instead, by the key of the measure.
    """
    plots = []
    for curve in CURVES:
        first = _points(metrics, curve, curve.first)
        second = _points(metrics, curve, curve.second) if curve.second else ([], [])
        if max(len(first[0]), len(second[0])) < 2:
            continue
        lines = [(row.short_name, row.bits_per_byte) for row in yardsticks if row.bits_per_byte is not None]
        if curve.first.key != "bits_per_byte":
            lines = []
        caption = (captions or {}).get(curve.first.key, curve.caption)
        caption = f"{caption} Dashed lines are the yardsticks." if lines else caption
        plots.append(Plot(curve.title, caption, _draw(curve, caption, first, second, lines)))
    return plots


def _points(metrics: list[Row], curve: Curve, line: Line) -> Points:
    return series(metrics, line.kind, curve.x, line.key)


def _draw(curve: Curve, caption: str, first: Points, second: Points, lines: list[tuple[str, float]]) -> str:
    x_label, divisor = x_axis(curve.x, max([*first[0], *second[0]]))

    def paint(axes: Any) -> None:
        _draw_series(axes, curve, first, second, divisor)
        low, high = _limits(curve, first[1], second[1], [value for _, value in lines])
        axes.set_ylim(low, high)
        levels(axes, [(f"{name} {value:.2f}", value) for name, value in lines], gap=0.062 * (high - low))
        if second[0] or (curve.second and curve.x == "seconds"):  # "Processors" alone does not say which
            free = "lower right" if curve.rises else "upper right"  # the corner that falling, or rising, lines leave
            legend(axes, "best" if curve.from_zero else free)

    label = f"{curve.title} over {x_label}. {caption}"
    key = f"{curve.first.kind} {curve.first.key}"
    return draw(key, label, paint, x_label=x_label, unit=curve.unit)


def _draw_series(axes: Any, curve: Curve, first: Points, second: Points, divisor: float) -> None:
    """The first line, smoothed through its raw points where that is wanted, and the second."""
    if first[0]:
        x, values = np.array(first[0]) / divisor, np.array(first[1])
        line = smooth(first[1], SMOOTHING * len(values)) if curve.smoothed else values
        few = evenly(len(values))
        if curve.smoothed:
            axes.plot(x[few], values[few], ".", color=TRAIN, alpha=0.4, markersize=3, markeredgewidth=0)
        axes.plot(x[few], line[few], color=TRAIN, linewidth=1.6, label=curve.first.name)
    if second[0] and curve.second is not None:
        few = evenly(len(second[0]))
        x, values = np.array(second[0])[few] / divisor, np.array(second[1])[few]
        mark = "o-" if curve.second.kind == "eval" else "-"
        axes.plot(x, values, mark, color=HELD_OUT, linewidth=1.2, markersize=3.4, label=curve.second.name)


def _limits(curve: Curve, first: list[float], second: list[float], lines: list[float]) -> tuple[float, float]:
    """The y range: all of it but, where values scatter, those of the first few steps, which would flatten the rest."""
    values = np.array(first + second)
    bottom, top = float(values.min()), float(values.max())
    if curve.smoothed and curve.rises:
        bottom = float(np.quantile(values, 0.03))
    elif curve.smoothed:
        top = float(np.quantile(values, 0.97))
    high = max([top, *lines])
    low = 0.0 if curve.from_zero else min([bottom, *lines])
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if curve.from_zero else low - margin), high + margin
