"""A drawing as SVG that sits in a page: no background, the page's own font, colours from its CSS."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from groundup.runtime.console import byte_size, quantity

# matplotlib draws in these colours; in the SVG each becomes a CSS variable, with a fallback where there is no
# page around it.
INKS = {
    "#0a0001": "var(--plot-train, #3d78b8)",
    "#0a0002": "var(--plot-held-out, #d9722e)",
    "#0a0003": "var(--plot-yardstick, #6b8e5a)",
    "#0a0004": "var(--plot-axis, #808080)",
    "#0a0005": "var(--plot-grid, #80808040)",
    "#0a0006": "var(--plot-run-4, #8a63b8)",
    "#0a0007": "var(--plot-run-5, #b8476b)",
    "#0a0008": "var(--plot-run-6, #2f8f8f)",
}
TRAIN, HELD_OUT, YARDSTICK, AXIS, GRID, *_ = INKS
RUNS = [ink for ink in INKS if ink not in (AXIS, GRID)]  # one for each of several runs in one figure
INCHES = (5.2, 2.9)  # 374 CSS pixels wide as drawn, so that the text keeps its size on a telephone
MAX_POINTS = 300  # raw points drawn; more would only make the file large
SMOOTHING = 0.01  # half-life of the smoothing, as a share of the run

Array = npt.NDArray[np.float64]
Points = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Plot:
    """One figure: its title, one line on how to read it, and the drawing as an ``<svg>`` element."""

    title: str
    caption: str
    svg: str


def number_text(value: float) -> str:
    """A number at an axis."""
    return quantity(value) if abs(value) >= 1000 else f"{value:g}"


def x_axis(x: str, longest: float) -> tuple[str, float]:
    """What stands below the axis, and what values are divided by.

    Args:
        x: tokens, step or seconds.
        longest: the greatest value on it.
    """
    if x != "seconds":
        return {"tokens": "training tokens", "step": "steps"}[x], 1.0
    units = ((120.0, 1.0, "seconds"), (7200.0, 60.0, "minutes"), (float("inf"), 3600.0, "hours"))
    return next((f"{unit} of training", divisor) for limit, divisor, unit in units if longest <= limit)


Y_TEXTS: dict[str, Callable[[float], str]] = {
    "": number_text,
    "bytes": lambda value: byte_size(value) if value else "0",
    "share": lambda value: f"{100 * value:.3g}%",
    "percent": lambda value: f"{value:.3g}%",
    "watts": lambda value: f"{value:g} W",
}


def draw(key: str, label: str, paint: Callable[[Any], None], *, x_label: str, unit: str = "") -> str:
    """Draw one figure.

    Args:
        key: its name, different from the other figures' of the page.
        label: what a screen reader says.
        paint: draws into matplotlib's axes.
        x_label: what runs along the bottom.
        unit: of the values: bytes, share (0 … 1), percent, watts, or none.

    Returns:
        An ``<svg>`` element.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",  # text stays text: sharp at every size, and in the reader's own font
        "svg.hashsalt": key,  # ids are the same in every rendering, and differ between the figures of a page
        "text.usetex": False,
        "font.size": 8.5,
        "axes.unicode_minus": True,
    }
    with rc_context(settings):
        figure = Figure(figsize=INCHES, layout="constrained")
        axes = figure.add_subplot()
        _style(axes, x_label, unit)
        paint(axes)
        file = io.StringIO()
        # The canvas needs no display. No date and no version: equal runs give equal files.
        nothing = dict.fromkeys(("Date", "Creator", "Type", "Format"))
        FigureCanvasSVG(figure).print_svg(file, metadata=nothing)
    return _for_page(file.getvalue(), label)


def legend(axes: Any, place: str = "upper right") -> None:
    """Name the lines.

    Args:
        place: a corner, or ``best`` for wherever the lines leave room.
    """
    lines = axes.legend(frameon=False, labelcolor=AXIS, loc=place, handlelength=1.4)
    for text in lines.get_texts():
        text.set_parse_math(False)  # a name may hold dollar signs


def levels(axes: Any, lines: Sequence[tuple[str, float]], *, gap: float) -> None:
    """A dashed horizontal line for each yardstick, its text at the right end; texts that would touch are moved apart.

    Args:
        lines: texts and values.
        gap: the least distance of two texts, in units of the axis.
    """
    lines = sorted(lines, key=lambda line: line[1])
    places = spread([value for _, value in lines], gap)
    for (text, value), place in zip(lines, places, strict=True):
        axes.axhline(value, color=YARDSTICK, linewidth=1, linestyle=(0, (5, 3)))
        axes.annotate(
            text,
            (1.01, place),
            xycoords=("axes fraction", "data"),
            color=YARDSTICK,
            va="center",
            fontsize=7.5,
            parse_math=False,  # a name may hold dollar signs
        )


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


def _style(axes: Any, x_label: str, unit: str) -> None:
    """Quiet axes: no frame, a faint grid, numbers that people read."""
    axes.set_facecolor("none")
    axes.figure.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(AXIS)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.tick_params(colors=AXIS, length=0, pad=5)
    axes.locator_params(axis="both", nbins=5)
    y_text = Y_TEXTS[unit]
    axes.xaxis.set_major_formatter(lambda value, _: quantity(value))
    axes.yaxis.set_major_formatter(lambda value, _: y_text(value))
    axes.set_xlabel(x_label, color=AXIS)


def evenly(count: int) -> npt.NDArray[np.int64]:
    """Places of at most ``MAX_POINTS`` of ``count`` points, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(np.int64))


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
    frame = re.search(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', svg)
    assert frame is not None  # matplotlib writes one
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{frame[1]}" '
        f'stroke-linejoin="round" role="img" aria-label="{escape(label)}">'
    )
    return opening + svg[frame.end() :]
