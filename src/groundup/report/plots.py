"""The curves of a run, as SVG that sits in a page: no background, the page's own font, colours from its CSS."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from groundup.report.jsonl import Row
from groundup.report.metrics import series
from groundup.report.standing import Standing
from groundup.runtime.console import quantity

# matplotlib draws in these colours; in the SVG each becomes a CSS variable, with a fallback where there is no
# page around it.
INKS = {
    "#0a0001": "var(--plot-train, #3d78b8)",
    "#0a0002": "var(--plot-held-out, #d9722e)",
    "#0a0003": "var(--plot-yardstick, #6b8e5a)",
    "#0a0004": "var(--plot-axis, #808080)",
    "#0a0005": "var(--plot-grid, #80808040)",
}
TRAIN, HELD_OUT, YARDSTICK, AXIS, GRID = INKS
INCHES = (5.2, 2.9)  # 374 CSS pixels wide as drawn, so that the text keeps its size on a telephone
MAX_POINTS = 300  # raw points drawn; more would only make the file large
SMOOTHING = 0.01  # half-life of the smoothing, as a share of the run

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Plot:
    """One figure: its title, one line on how to read it, and the drawing as an ``<svg>`` element."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Curve:
    """What one figure shows: a measure of the training rows over tokens, and perhaps of the held-out rows."""

    key: str
    title: str
    caption: str
    smoothed: bool
    held_out: bool = False
    from_zero: bool = False


CURVES = (
    Curve("bits_per_byte", "Bits per byte", "Lower is better.", True, True),
    Curve("loss", "Loss", "Nats per token: points as measured, line smoothed.", True, True),
    Curve("tokens_per_second", "Throughput", "Training tokens per second.", True, from_zero=True),
    Curve("learning_rate", "Learning rate", "As scheduled.", False, from_zero=True),
)


def draw_plots(metrics: list[Row], yardsticks: Sequence[Standing] = ()) -> list[Plot]:
    """The curves that ``metrics`` has at least two points of.

    Args:
        metrics: the rows of ``metrics.jsonl``.
        yardsticks: drawn as horizontal lines where bits per byte are shown.
    """
    plots = []
    for curve in CURVES:
        train = series(metrics, "train", "tokens", curve.key)
        held_out = series(metrics, "eval", "tokens", curve.key) if curve.held_out else ([], [])
        if max(len(train[0]), len(held_out[0])) < 2:
            continue
        lines = [(row.short_name, row.bits_per_byte) for row in yardsticks if row.bits_per_byte is not None]
        if curve.key != "bits_per_byte":
            lines = []
        caption = f"{curve.caption} Dashed lines are the yardsticks." if lines else curve.caption
        svg = _for_page(_draw(curve, train, held_out, lines), f"{curve.title} over training tokens. {caption}")
        plots.append(Plot(curve.title, caption, svg))
    return plots


def smooth(values: Sequence[float], half_life: float) -> Array:
    """Exponential moving average without the pull towards the first value (bias-corrected as in Adam).

    Args:
        half_life: after so many values the weight of a value has halved. At the start, where a loss falls too
            fast for a slow average to follow, it is a twentieth of what came before.
    """
    smoothed, total, weight = np.empty(len(values)), 0.0, 0.0
    for index, value in enumerate(values):
        keep = 0.5 ** (1 / min(half_life, 1 + index / 20))
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed[index] = total / weight
    return smoothed


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Places for labels, as near to ``values`` (ascending) as keeps them ``gap`` apart."""
    groups: list[list[float]] = []  # labels that touch, as [sum of the first places they wish for, their count]
    for value in values:
        groups.append([value, 1])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            # A label's wish is restated as a wish for its group's first place, so the mean pleases all alike.
            groups[-1][0] += total - count * groups[-1][1] * gap
            groups[-1][1] += count
    return [total / count + index * gap for total, count in groups for index in range(int(count))]


def _top(group: list[float], gap: float) -> float:
    """The place of a group's last label."""
    return group[0] / group[1] + (group[1] - 1) * gap


def _draw(
    curve: Curve,
    train: tuple[list[float], list[float]],
    held_out: tuple[list[float], list[float]],
    lines: list[tuple[str, float]],
) -> str:
    """Draw one figure and return it as an SVG file."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",  # text stays text: sharp at every size, and in the reader's own font
        "svg.hashsalt": curve.key,  # ids are the same in every rendering, and differ between the figures of a page
        "text.usetex": False,
        "font.size": 8.5,
        "axes.unicode_minus": True,
    }
    with rc_context(settings):
        figure = Figure(figsize=INCHES, layout="constrained")
        axes = figure.add_subplot()
        _style(axes)
        _draw_series(axes, curve, train, held_out)
        low, high = _limits(curve, train[1], held_out[1], [value for _, value in lines])
        axes.set_ylim(low, high)
        _draw_lines(axes, lines, gap=0.062 * (high - low))
        if held_out[0]:
            axes.legend(frameon=False, labelcolor=AXIS, loc="upper right", handlelength=1.4)
        file = io.StringIO()
        # The canvas needs no display. No date and no version: equal runs give equal files.
        nothing = dict.fromkeys(("Date", "Creator", "Type", "Format"))
        FigureCanvasSVG(figure).print_svg(file, metadata=nothing)
    return file.getvalue()


def _style(axes: Any) -> None:
    """Quiet axes: no frame, a faint grid, numbers that people read."""
    axes.set_facecolor("none")
    axes.figure.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(AXIS)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.tick_params(colors=AXIS, length=0, pad=5)
    axes.locator_params(axis="both", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: quantity(value))
    axes.yaxis.set_major_formatter(lambda value, _: quantity(value) if value >= 1000 else f"{value:g}")
    axes.set_xlabel("training tokens", color=AXIS)


def _draw_series(
    axes: Any, curve: Curve, train: tuple[list[float], list[float]], held_out: tuple[list[float], list[float]]
) -> None:
    """Raw training points, the smoothed line through them, and the held-out measurements."""
    if train[0]:
        tokens, values = np.array(train)
        line = smooth(train[1], SMOOTHING * len(values)) if curve.smoothed else values
        few = _evenly(len(values))
        if curve.smoothed:
            axes.plot(tokens[few], values[few], ".", color=TRAIN, alpha=0.4, markersize=3, markeredgewidth=0)
        axes.plot(tokens[few], line[few], color=TRAIN, linewidth=1.6, label="training text")
    if held_out[0]:
        tokens, values = np.array(held_out)[:, _evenly(len(held_out[0]))]
        axes.plot(tokens, values, "o-", color=HELD_OUT, linewidth=1.2, markersize=3.4, label="held-out text")


def _evenly(count: int) -> npt.NDArray[np.int64]:
    """Places of at most ``MAX_POINTS`` of ``count`` points, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(np.int64))


def _limits(curve: Curve, train: list[float], held_out: list[float], lines: list[float]) -> tuple[float, float]:
    """The y range: all of it but the fall of the first few steps, which would flatten everything after."""
    values = np.array(train + held_out)
    high = max([float(np.quantile(values, 0.97)), *lines])
    low = 0.0 if curve.from_zero else min([float(values.min()), *lines])
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if curve.from_zero else low - margin), high + margin


def _draw_lines(axes: Any, lines: list[tuple[str, float]], gap: float) -> None:
    """A horizontal line for each yardstick, its name at the right end; names that would touch are moved apart."""
    lines = sorted(lines, key=lambda line: line[1])
    places = spread([value for _, value in lines], gap)
    for (name, value), place in zip(lines, places, strict=True):
        axes.axhline(value, color=YARDSTICK, linewidth=1, linestyle=(0, (5, 3)))
        axes.annotate(
            f"{name} {value:.2f}",
            (1.01, place),
            xycoords=("axes fraction", "data"),
            color=YARDSTICK,
            va="center",
            fontsize=7.5,
            parse_math=False,  # a name may hold dollar signs
        )


def _for_page(svg: str, label: str) -> str:
    """Turn matplotlib's SVG file into an element for a page, without what only a file needs."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>\s*", "", svg, flags=re.DOTALL)  # would style the whole page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every figure; nothing refers to them
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)  # the font is the page's
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)  # as older versions of matplotlib write it
    for ink, variable in INKS.items():
        svg = svg.replace(ink, variable)
    return re.sub(
        r'<svg[^>]*viewBox="([^"]*)"[^>]*>',
        rf'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="\1" '
        rf'stroke-linejoin="round" role="img" aria-label="{label}">',
        svg,
        count=1,
    )
