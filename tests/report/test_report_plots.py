"""The curves: what is drawn from what, and drawings that fit into a page."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.report.figure import MAX_POINTS, smooth, spread
from groundup.report.plots import draw_plots
from groundup.report.standing import standings


def training(steps: int) -> list[dict]:
    rows: list[dict] = []
    for step in range(1, steps + 1):
        loss = 3 + 6 * math.exp(-step / 20)
        rows.append({"kind": "train", "step": step, "tokens": 512 * step, "loss": loss, "bits_per_byte": loss / 2})
        rows[-1] |= {"tokens_per_second": 31_000.0, "learning_rate": 0.003}
        if step % 10 == 0:
            rows.append({"kind": "eval", "step": step, "tokens": 512 * step, "loss": loss, "bits_per_byte": loss / 2})
    return rows


YARDSTICKS = standings(
    [
        {"name": "gzip -9", "kind": "compressor", "bits_per_byte": 2.4},
        {"name": "<b>$\\frac$ & co", "kind": "compressor", "bits_per_byte": 2.39},
        {"name": "diverged", "kind": "model", "bits_per_byte": None},
    ]
)


def test_four_curves_with_the_yardsticks_on_one() -> None:
    plots = draw_plots(training(60), YARDSTICKS)
    assert [plot.title for plot in plots] == ["Bits per byte", "Loss", "Throughput", "Learning rate"]
    texts = ["".join(ElementTree.fromstring(plot.svg).itertext()) for plot in plots]  # each is well-formed XML
    assert "gzip -9 2.40" in texts[0]
    assert "<b>$\\frac$ & co 2.39" in texts[0]
    assert "diverged" not in texts[0]
    assert ["Dashed" in plot.caption for plot in plots] == [True, False, False, False]
    assert not any("Dashed" in plot.caption for plot in draw_plots(training(60)))
    assert all("gzip" not in text for text in texts[1:])
    assert ["held-out text" in text for text in texts] == [True, True, False, False]
    assert all("training tokens" in text for text in texts)


def test_axes_tell_units_that_people_read() -> None:
    rows = [{"kind": "train", "tokens": n, "memory_bytes": 3 * 10**8 * n, "mfu": 0.1 * n} for n in (1, 2, 3)]
    rows += [{"kind": "hardware", "seconds": 4000 * n, "cpu_percent": 90.0, "gpu_percent": 30 * n} for n in (1, 2, 3)]
    rows += [{"kind": "hardware", "seconds": 40 * n, "watts": 45.0} for n in (1, 2, 3)]
    texts = {plot.title: "".join(ElementTree.fromstring(plot.svg).itertext()) for plot in draw_plots(rows)}
    assert list(texts) == ["Model FLOPs utilisation", "Peak memory", "Processors", "Power"]
    assert "20%" in texts["Model FLOPs utilisation"]
    assert "MB" in texts["Peak memory"]
    assert "hours of training" in texts["Processors"]
    assert "GPU" in texts["Processors"]
    assert "80%" in texts["Processors"]
    assert "40 W" in texts["Power"]
    assert "seconds of training" in texts["Power"]


def test_a_drawing_suits_its_page() -> None:
    plots = draw_plots(training(60), YARDSTICKS)
    for plot in plots:
        assert plot.svg.startswith("<svg ")
        assert 'role="img"' in plot.svg
        assert "<style" not in plot.svg
        assert "font-family" not in plot.svg
        assert "var(--plot-train" in plot.svg
        assert "#0a00" not in plot.svg  # every ink became a variable
        assert "fill: #ffffff" not in plot.svg  # no background
    ids = [
        element.get("id") for plot in plots for element in ElementTree.fromstring(plot.svg).iter() if element.get("id")
    ]
    assert len(ids) == len(set(ids)) > 0
    assert [plot.svg for plot in draw_plots(training(60), YARDSTICKS)] == [plot.svg for plot in plots]


def test_a_long_run_gives_a_small_drawing() -> None:
    for plot in draw_plots(training(5_000)):
        assert len(plot.svg) < 120_000
        circles = sum(element.tag.endswith("use") for element in ElementTree.fromstring(plot.svg).iter())
        assert circles < 2 * MAX_POINTS + 10


def test_too_little_to_draw() -> None:
    assert draw_plots([]) == []
    assert draw_plots(training(1)) == []
    assert draw_plots([{"kind": "train", "step": 1, "loss": 2.0}] * 5) == []  # no tokens to draw it over
    only_held_out = [row for row in training(30) if row["kind"] == "eval"]
    assert [plot.title for plot in draw_plots(only_held_out)] == ["Bits per byte", "Loss"]
    flat = [{"kind": "train", "tokens": tokens, "loss": 0.0, "learning_rate": 0.0} for tokens in (1, 2)]
    assert [plot.title for plot in draw_plots(flat)] == ["Loss", "Learning rate"]


def test_smooth_is_a_weighted_mean_of_the_past() -> None:
    np.testing.assert_allclose(smooth([2.5] * 50, 10), 2.5)
    np.testing.assert_allclose(smooth([1.0, 5.0, -3.0], 0.001), [1.0, 5.0, -3.0])
    keep = 0.5  # the half-life of one value
    np.testing.assert_allclose(smooth([1.0, 4.0], 1), [1.0, (keep * 1.0 + 4.0) / (keep + 1)])
    values = np.random.default_rng(0).normal(size=2_000)
    assert smooth(list(values), 30)[500:].std() < 0.25 * values.std()


@given(st.lists(st.floats(-100, 100), max_size=8), st.floats(0.1, 10))
def test_spread_keeps_labels_apart_and_near(values: list[float], gap: float) -> None:
    values = sorted(values)
    places = spread(values, gap)
    assert len(places) == len(values)
    assert all(after - before >= gap - 1e-6 for before, after in itertools.pairwise(places))
    assert sum(places) == pytest.approx(sum(values), abs=1e-6)
    if all(after - before >= gap for before, after in itertools.pairwise(values)):
        assert places == pytest.approx(values)
