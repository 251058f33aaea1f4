"""The page in a real browser: the table and the curves are there, and something is to be seen."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from groundup.report import compare_runs, write_comparison, write_report

pytestmark = pytest.mark.browser

QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture
def chromium(tmp_path: Path) -> list[str]:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return [found, *QUIET, f"--user-data-dir={tmp_path / 'browser'}"]
    pytest.skip("needs chromium, chromium-browser or google-chrome")


@pytest.fixture
def comparison(measured_run: Path, tmp_path: Path) -> Path:
    """The page of two runs side by side."""
    other = tmp_path / "runs" / "a second run, not so short"
    shutil.copytree(measured_run, other)
    (other / "recipe.yaml").write_text("model:\n  n_layer: 6\n")
    metrics = (other / "metrics.jsonl").read_text().splitlines()
    (other / "metrics.jsonl").write_text("\n".join(metrics[: len(metrics) * 2 // 3]) + "\n")
    return write_comparison(compare_runs([measured_run, other]), tmp_path / "compare.html")


def open_page(chromium: list[str], page: Path, *options: str) -> str:
    command = [*chromium, *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_table_and_the_curves_are_in_the_document(chromium: list[str], finished_run: Path) -> None:
    dom = open_page(chromium, write_report(finished_run), "--dump-dom")
    assert dom.count("<svg") == 4
    assert dom.count('class="bar"') == 3
    assert "this model (1.3M)" in dom
    assert "alert(" in dom  # the sample is shown
    assert "<script" not in dom  # and is not a script


@pytest.mark.parametrize(
    ("width", "scheme", "bright"), [(1200, "light", True), (1200, "dark", False), (400, "light", True)]
)
def test_a_screenshot_shows_them(
    chromium: list[str], finished_run: Path, tmp_path: Path, width: int, scheme: str, bright: bool
) -> None:
    from matplotlib.image import imread

    picture = tmp_path / "page.png"
    preference = f"--blink-settings=preferredColorScheme={1 if bright else 0}"
    page = write_report(finished_run)
    open_page(chromium, page, preference, f"--window-size={width},1600", f"--screenshot={picture}")
    pixels = (imread(picture)[:, :, :3] * 255).round().astype(int).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    assert len(colours) > 200  # text and lines have smooth edges
    background = colours[counts.argmax()]
    assert (background > 230).all() if bright else (background < 50).all()
    red, green, blue = pixels.T
    assert ((blue - red > 60) & (blue - green > 20)).sum() > 500  # the model's bar and the training curve
    assert ((red - blue > 60) & (red - green > 40)).sum() > 20  # the held-out measurements


def test_a_watched_run_has_all_its_curves(chromium: list[str], measured_run: Path) -> None:
    dom = open_page(chromium, write_report(measured_run), "--dump-dom")
    assert dom.count("<svg") == 10
    assert dom.index("What it cost") > dom.index("Power")


@pytest.mark.parametrize(("scheme", "bright"), [("light", True), ("dark", False)])
def test_runs_side_by_side(chromium: list[str], comparison: Path, tmp_path: Path, scheme: str, bright: bool) -> None:
    from matplotlib.image import imread

    dom = open_page(chromium, comparison, "--dump-dom")
    assert dom.count("<svg") == 6
    assert dom.count("a second run, not so short") > 6  # in the tables and in each legend
    picture = tmp_path / "page.png"
    preference = f"--blink-settings=preferredColorScheme={1 if bright else 0}"
    open_page(chromium, comparison, preference, "--window-size=1200,2200", f"--screenshot={picture}")
    pixels = (imread(picture)[:, :, :3] * 255).round().astype(int).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    background = colours[counts.argmax()]
    assert (background > 230).all() if bright else (background < 50).all()
    red, green, blue = pixels.T
    assert ((blue - red > 60) & (blue - green > 20)).sum() > 500  # the first run's curves
    assert ((red - blue > 60) & (red - green > 40)).sum() > 500  # and the second's


def test_a_narrow_window_scrolls_tables_not_the_page(chromium: list[str], comparison: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    picture = tmp_path / "page.png"
    open_page(chromium, comparison, "--window-size=500,900", f"--screenshot={picture}")
    pixels = imread(picture)[:, :, :3]
    assert np.ptp(pixels[:, -4:], axis=0).max() < 0.02  # nothing but the page's own ground at its right edge
