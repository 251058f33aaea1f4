"""What the terminal shows: lines, warnings, and progress bars that also say something useful in a log file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

LOG_EVERY_SECONDS = 10.0  # how often a progress bar prints a line where the output is not a terminal


@cache
def console(stderr: bool = False) -> Console:
    """The one rich console of a stream. Wraps at 120 columns where the output is not a terminal."""
    from rich.console import Console

    class PipeConsole(Console):
        def on_broken_pipe(self) -> None:
            raise

    stream_is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if stream_is_terminal or "COLUMNS" in os.environ else 120
    return PipeConsole(stderr=stderr, highlight=False, soft_wrap=True, width=width, quiet=not stderr and _is_helper())


def _is_helper() -> bool:
    """Whether another of several processes that train together speaks for all; see process_group.py."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"


def say(message: Any = "", *, style: str | None = None) -> None:
    """Print a line for the person who started the command. ``message`` is text (never markup) or a rich table."""
    if isinstance(message, str):
        console().print(message, style=style, markup=False)
    else:
        console().print(message)


def warn(message: str) -> None:
    """Print a one-line warning on standard error."""
    console(stderr=True).print(f"groundup: warning: {message}", style="yellow", markup=False)


class Progress:
    """A handle on one progress bar: advance it, and say what is going on beside it."""

    def __init__(self, label: str, total: float | None, unit: str, bar: Any = None, task: Any = None) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0.0
        self.note = ""
        self._bar, self._task = bar, task
        self._started = time.monotonic()
        self._last_line = self._started

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Count ``amount`` more units as done; ``note`` replaces the text beside the bar."""
        self.update(self.done + amount, note)

    def update(self, done: float, note: str | None = None, total: float | None = None) -> None:
        """Set how much is done; ``note`` replaces the text beside the bar, ``total`` the whole."""
        self.done = done
        self.note = self.note if note is None else note
        self.total = self.total if total is None else total
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self.total, note=self.note)
            return
        now = time.monotonic()
        if now - self._last_line >= LOG_EVERY_SECONDS:
            self._last_line = now
            self._print_line()

    def _print_line(self) -> None:
        elapsed = time.monotonic() - self._started
        rate = self.done / elapsed if elapsed > 0 else 0.0
        if self.total:
            left = (self.total - self.done) / rate if rate > 0 else float("inf")
            amount = f"{100 * self.done / self.total:3.0f}%  {clock(left)} left"
        else:
            amount = f"{quantity(self.done)} {self.unit}".rstrip()
        if _is_helper():
            return
        print(f"  {self.label}: {amount}{'  ' + self.note if self.note else ''}", flush=True)


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``; ``?`` when not known."""
    if seconds != seconds or seconds == float("inf"):
        return "?"
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def quantity(number: float) -> str:
    """A number for people: 950, 12.3k, 4.56M, 7.89B, 1.2e+15."""
    for limit, divisor, suffix in ((1e3, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (1e12, 1e9, "B")):
        if abs(number) < limit * 0.9995:
            scaled = number / divisor
            return f"{scaled:.3g}{suffix}" if divisor > 1 or scaled != int(scaled) else f"{int(scaled)}"
    return f"{number:.3g}"


def flop_rate(per_second: float) -> str:
    """Floating-point operations per second for people: 968 GFLOP/s, 1.2 TFLOP/s."""
    for divisor, unit in ((1e6, "M"), (1e9, "G"), (1e12, "T")):
        if per_second < 999.5 * divisor:
            return f"{per_second / divisor:.3g} {unit}FLOP/s"
    return f"{per_second / 1e15:.3g} PFLOP/s"


def byte_size(count: float) -> str:
    """Bytes for people, in powers of ten: 950 bytes, 12.3 kB, 4.00 MB, 7.89 GB."""
    if abs(count) < 999.5:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if abs(count) < 999.5:
            return f"{count:#.3g} {unit}".replace(". ", " ")
    return f"{count / 1000:#.3g} TB".replace(". ", " ")


@contextmanager
def progress(label: str, total: float | None = None, unit: str = "") -> Iterator[Progress]:
    """Show a progress bar with rate and time left while the block runs.

    On a terminal it is a live bar on standard error; elsewhere a line every ten seconds on standard output.
    """
    if not sys.stderr.isatty() or _is_helper():
        yield Progress(label, total, unit)
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with RichProgress(*columns, console=console(stderr=True), refresh_per_second=5, transient=True) as bar:
        task = bar.add_task(label, total=total, note="")
        yield Progress(label, total, unit, bar, task)
