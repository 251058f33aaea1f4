"""Where the time of a step goes: PyTorch's profiler over a few steps of a run."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from groundup.runtime import GroundupError, UsageError, os_errors, say, warn, write_atomic

if TYPE_CHECKING:
    from torch.profiler import profile

FOLDER = "profile"
ROWS = 30  # of the table of operators


def parse_steps(text: str) -> tuple[int, int]:
    """``10:15`` as (10, 15), ``10`` as (10, 10): the first and the last step, both included, counted from 1.

    Raises:
        UsageError: it is neither, or the last is before the first.
    """
    found = re.fullmatch(r"\s*(\d{1,12})\s*(?::\s*(\d{1,12})\s*)?", text, re.ASCII)
    if found is None:
        raise UsageError(f"profile = {text} should be the first and the last step to look at, such as 10:15.")
    first, last = int(found[1]), int(found[2] or found[1])
    if not 1 <= first <= last:
        raise UsageError(
            f"profile = {text}: steps count from 1, and the last cannot be before the first. Give one such as 10:15."
        )
    return first, last


class StepProfiler:
    """Profiles the steps from ``first`` to ``last`` and writes what it saw into the run folder.

    ``profile/step-10-15.json.gz`` is a trace for ui.perfetto.dev or chrome://tracing, ``profile/step-10-15.txt`` a
    table of the operators that took longest. The step before the first warms the profiler up, where there is one; what
    it sees is thrown away. A run that ends or resumes among the steps leaves the part it made, named by the steps in
    it. Steps take longer while they are watched: tokens per second of these rows are not the run's.

    Args:
        steps: as :func:`parse_steps` reads them; None watches nothing, and costs nothing.
        run: the run folder.
        position: steps made before this sitting.

    Raises:
        UsageError: ``steps`` cannot be read.
    """

    def __init__(self, steps: str | None, run: str | os.PathLike[str], *, position: int = 0) -> None:
        self._folder = Path(run) / FOLDER
        self._first, self._last = parse_steps(steps) if steps is not None else (0, 0)
        self._done = position
        self._profile: profile | None = None
        self._seen = 0

    def __enter__(self) -> StepProfiler:
        self._first = max(self._first, self._done + 1)
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def step(self, step: int) -> None:
        """``step`` has been made. A run that went back to a checkpoint ends what was being watched."""
        went_back, self._done = step != self._done + 1, step
        if self._profile is None:
            if self._last:
                self._begin()
            return
        if went_back:
            self._end()
            return
        if step >= self._first:
            self._seen += 1
        if step >= self._last:
            self._end()
        else:
            self._profile.step()

    def _begin(self) -> None:
        """Start if the next step is the first to be watched, or the one before it."""
        if not self._first - 2 <= self._done < self._last or self._last < self._first:
            return
        # The library below torch's profiler would print its own lines into the progress bar.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

        activities = [one for one in (ProfilerActivity.CPU, ProfilerActivity.CUDA) if one in supported_activities()]
        active = self._last - self._first + 1
        warm_up = schedule(wait=0, warmup=1, active=active, repeat=1) if self._done == self._first - 2 else None
        self._profile = profile(activities=activities, schedule=warm_up, acc_events=True)
        self._profile.start()
        self._started = time.monotonic()

    def _end(self) -> None:
        """Stop, and write what was seen; a failure to write costs the profile, not the run."""
        watched, self._profile, self._last = self._profile, None, 0
        if watched is None:
            return
        seconds = time.monotonic() - self._started
        watched.stop()
        if not self._seen:
            return
        name = f"step-{self._first}-{self._first + self._seen - 1}"
        try:
            self._write(watched, name, seconds)
        except GroundupError as error:
            warn(f"the profile is lost; the run goes on. {error}")
        else:
            say(f"  profile: {self._folder / name}.txt; the trace beside it opens in ui.perfetto.dev")

    def _write(self, watched: Any, name: str, seconds: float) -> None:
        trace = self._folder / f"{name}.json.gz"
        # A name of its own until it is whole; its end tells torch to compress.
        part = trace.with_name(f".{name}.part.json.gz")
        with os_errors(trace, "cannot write"):
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                watched.export_chrome_trace(str(part))
                os.replace(part, trace)
            finally:
                part.unlink(missing_ok=True)
        averages = watched.key_averages()
        on_gpu = any(entry.self_device_time_total for entry in averages)
        table = averages.table(sort_by="self_device_time_total" if on_gpu else "self_cpu_time_total", row_limit=ROWS)
        head = (
            f"{name}: {self._seen} steps watched, {seconds:.3f} s with the profiler's own time and its warm-up.\n"
            "ProfilerStep*, where it stands, is a whole step; its own time is what no operator accounts for, such as "
            "Python's.\n\n"
        )
        write_atomic(self._folder / f"{name}.txt", head + table + "\n")
