"""The pictures of an inspection, PNG files for a talk or a notebook: surprise, the logit lens, and attention by layer.

Pictures hold less than the page: the first ``MOST_SHOWN`` positions, with the tokens at the axes.
"""

# N positions that are looked into   L layers looked at   H heads

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from groundup.report.inspection import Inspection
from groundup.report.inspection_page import label
from groundup.runtime import write_atomic

MOST_SHOWN = 32  # positions; labels cannot be read beyond
MARGIN = 0.95  # inches around the axes, for the tokens beside them
DOTS_PER_INCH = 110
COLOURS = "Blues"


def write_inspection_plots(found: Inspection, folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``surprise.png``, ``lens.png`` and ``attention-layer-….png`` into a folder, which is made if need be.

    Returns:
        The paths of the pictures.

    Raises:
        GroundupError: they cannot be written.
    """
    paths = []
    for name, figure in _figures(found):
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
        paths.append(Path(folder) / f"{name}.png")
        write_atomic(paths[-1], file.getvalue())
    return paths


def _figures(found: Inspection) -> Iterator[tuple[str, Any]]:
    count = min(found.looked_into, MOST_SHOWN)
    labels = [drawable(label(token)) for token in found.tokens]
    yield "surprise", _surprise(found, labels[:MOST_SHOWN])
    yield "lens", _lens(found, labels, count)
    for number, layer in enumerate(found.layers):
        yield f"attention-layer-{layer:02}", _attention(found, number, labels[:count])


def _surprise(found: Inspection, labels: Sequence[str]) -> Any:
    figure = _figure(0.24 * len(labels) + 0.4, 2.0)
    axes = figure.add_subplot()
    axes.bar(range(len(labels)), np.nan_to_num(found.bits[: len(labels)]), color="#d2691e", width=0.8)
    axes.set_ylabel("surprise in bits")
    axes.set_xlim(-0.6, len(labels) - 0.4)
    _name(axes, labels, "x")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _lens(found: Inspection, labels: Sequence[str], count: int) -> Any:
    """Layers upwards, as in nostalgebraist's pictures; each cell has its likeliest token."""
    figure = _figure(0.62 * count + 0.8, 0.3 * len(found.layers))
    axes = figure.add_subplot()
    likeliest_LN = found.lens_probabilities_LNK[:, :count, 0]
    image = axes.imshow(likeliest_LN, cmap=COLOURS, vmin=0, vmax=1, aspect="auto", origin="lower")
    for layer in range(len(found.layers)):
        for position in range(count):
            text, probability = found.lens(layer, position)[0]
            follows = found.lens_rank_LN[layer, position] == 1
            colour = "white" if probability > 0.55 else "black"
            shown = axes.text(
                position, layer, drawable(label(text)), ha="center", va="center", size=6.5, color=colour,
                weight="bold" if follows else "normal",
            )  # fmt: skip
            shown.set_parse_math(False)
    _name(axes, labels[:count], "x")
    _name(axes, [f"layer {layer}" for layer in found.layers], "y")
    axes.set_title("likeliest next token after each layer; bold: the one that really follows", size=8)
    figure.colorbar(image, ax=axes, label="probability", pad=0.01, fraction=0.02)
    return figure


def _attention(found: Inspection, number: int, labels: Sequence[str]) -> Any:
    """All heads of a layer, on one scale."""
    heads, count = found.attention_LHNN.shape[1], len(labels)
    columns = min(heads, 4)
    rows = math.ceil(heads / columns)
    side = max(2.2, 0.13 * count)
    figure = _figure(side * columns * 1.15, side * rows * 1.15)
    grid = figure.subplots(rows, columns, squeeze=False)
    for head, axes in enumerate(grid.flat):
        if head >= heads:
            axes.set_axis_off()
            continue
        image = axes.imshow(np.sqrt(found.attention_LHNN[number, head, :count, :count]), cmap=COLOURS, vmin=0, vmax=1)
        axes.set_title(f"head {head}", size=8)
        _name(axes, labels if head // columns == rows - 1 or head + columns >= heads else [], "x")
        _name(axes, labels if head % columns == 0 else [], "y")
    figure.suptitle(f"layer {found.layers[number]}: a row looks at columns", size=9)
    bar = figure.colorbar(image, ax=grid, fraction=0.02, pad=0.02)
    bar.set_ticks([0, 0.5, math.sqrt(0.5), 1], labels=["0", "0.25", "0.5", "1"])
    bar.set_label("weight (colours by its square root)")
    return figure


def _figure(width: float, height: float) -> Any:
    """A figure whose axes together have this size in inches.

    The margins are fixed: matplotlib's layout engines draw everything twice to find them, seconds for many tokens.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    whole, high = width + 2 * MARGIN, height + 2 * MARGIN
    figure = Figure(figsize=(whole, high))
    figure.subplots_adjust(MARGIN / whole, MARGIN / high, 1 - MARGIN / whole, 1 - MARGIN / high, 0.12, 0.12)
    FigureCanvasAgg(figure)  # needs no display
    return figure


def _name(axes: Any, labels: Sequence[str], which: str) -> None:
    """Tokens along an axis; no marks where there are none."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(range(len(labels)), labels=labels)
    for text in axis.get_ticklabels():
        text.set_parse_math(False)  # a token may hold dollar signs
    axes.tick_params(axis=which, labelsize=6.5, length=2, rotation=90 if which == "x" else 0)


def drawable(text: str) -> str:
    r"""Text in characters that the font of the pictures has; others as ``\u4e2d``."""
    return "".join(c if _has_glyph(c) else c.encode("unicode_escape").decode() for c in text)


@cache
def _has_glyph(character: str) -> bool:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return bool(get_font(findfont(FontProperties())).get_char_index(ord(character)))
