"""What a person sees: numbers, lines, and progress with or without a terminal."""

from __future__ import annotations

import os
import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.runtime import console, progress, say, warn
from groundup.runtime.console import byte_size, clock, flop_rate, quantity

SUFFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9}


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0"), (950, "950"), (12_300, "12.3k"), (4_560_000, "4.56M"), (7_890_000_000, "7.89B"), (1.2e15, "1.2e+15"),
        (999, "999"), (999.4, "999"), (999.6, "1k"), (1000, "1k"), (999_999, "1M"), (1e12, "1e+12"), (0.25, "0.25"),
        (-1500, "-1.5k"), (1337.0, "1.34k"), (3.0, "3"), (float("inf"), "inf"), (float("nan"), "nan"),
    ],
)  # fmt: skip
def test_quantities(number: float, shown: str) -> None:
    assert quantity(number) == shown


@given(st.floats(-1e18, 1e18))
def test_a_quantity_is_within_half_a_percent_and_short(number: float) -> None:
    shown = quantity(number)
    found = re.fullmatch(r"(-?[\d.]+(?:e[-+]\d+)?)([kMB]?)", shown)
    assert found, shown
    assert float(found[1]) * SUFFIXES[found[2]] == pytest.approx(number, rel=0.0051)
    assert len(shown) <= 10


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0:00"), (9.6, "0:10"), (59.4, "0:59"), (59.6, "1:00"), (61, "1:01"), (3599.6, "1:00:00"),
        (3600 * 25 + 61, "25:01:01"), (-3, "0:00"), (float("inf"), "?"), (float("nan"), "?"),
    ],
)  # fmt: skip
def test_clocks(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


@given(st.floats(0, 1e7))
def test_a_clock_reads_back_to_the_second(seconds: float) -> None:
    parts = [int(part) for part in clock(seconds).split(":")]
    assert all(part < 60 for part in parts[1:])
    hours, minutes, rest = [0, *parts] if len(parts) == 2 else parts
    assert abs(3600 * hours + 60 * minutes + rest - seconds) <= 0.5


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 bytes"), (950, "950 bytes"), (999.6, "1.00 kB"), (12_300, "12.3 kB"), (4e6, "4.00 MB"), (123e6, "123 MB"),
     (7.89e9, "7.89 GB"), (5.5e12, "5.50 TB")],
)  # fmt: skip
def test_byte_sizes(count: float, shown: str) -> None:
    assert byte_size(count) == shown


# ---- lines


def test_lines_are_said_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console.console.cache_clear()
    long = "word " * 60 + "[bold]not markup[/bold] [data]"
    say(long)
    warn("[red]careful[/red]")
    captured = capsys.readouterr()
    assert captured.out == long + "\n"
    assert captured.err == "groundup: warning: [red]careful[/red]\n"


# ---- progress


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The console's clock, moved by hand."""
    hands = SimpleNamespace(now=100.0)
    hands.monotonic = lambda: hands.now
    monkeypatch.setattr(console, "time", hands)
    return hands


def test_without_a_terminal_a_line_comes_every_ten_seconds(
    clocked: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("reading", total=200, unit="documents") as bar:
        for _ in range(4):
            clocked.now += 4
            bar.advance(10, note=f"{clocked.now:.0f} s")
        assert capsys.readouterr().out == "  reading:  15%  1:08 left  112 s\n"  # 30 of 200 in 12 s: 170 at 2.5/s
        clocked.now += 8
        bar.update(200)
    assert capsys.readouterr().out == "  reading: 100%  0:00 left  116 s\n"


def test_without_a_total_the_amount_is_shown(clocked: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("reading", unit="bytes") as bar:
        clocked.now += 10
        bar.advance(1_500_000)
        clocked.now += 10
        bar.update(0.0, total=50.0)
    assert capsys.readouterr().out == "  reading: 1.5M bytes\n  reading:   0%  ? left\n"


def test_the_interval_can_be_changed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "LOG_EVERY_SECONDS", 0.0)
    with progress("training", total=4) as bar:
        for _ in range(4):
            bar.advance(note="loss 3.141")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("%")[0].split()[-1] for line in lines] == ["25", "50", "75", "100"]
    assert all(re.fullmatch(r"  training: +\d+%  \d+:\d\d left  loss 3.141", line) for line in lines), lines


ON_A_TERMINAL = """
import time
from groundup.runtime import progress
with progress("reading [x]", total=8) as bar:
    for number in range(8):
        bar.advance(note=f"loss [{number}]")
        time.sleep(0.05)
"""


def test_on_a_terminal_there_is_a_bar(child: Any) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    process = child(ON_A_TERMINAL, stderr=theirs, stdout=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65_536)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown.decode())
    assert "━" in text
    assert "reading [x]" in text
    assert "loss [7]" in text
    assert "left" in text
    percentages = [int(number) for number in re.findall(r"(\d+)%", text)]
    assert percentages == sorted(percentages)
    assert percentages[-1] == 100


@pytest.mark.parametrize(
    ("rate", "shown"), [(4.2e6, "4.2 MFLOP/s"), (9.68e11, "968 GFLOP/s"), (9.999e11, "1 TFLOP/s"), (2e15, "2 PFLOP/s")]
)
def test_speed_for_people(rate: float, shown: str) -> None:
    assert flop_rate(rate) == shown
