"""Where a run's measurements go: one interface over metrics.jsonl, TensorBoard, Weights & Biases and MLflow.

metrics.jsonl and samples.jsonl are always written: they are what the report and ``groundup compare`` read. The others
are views for people who are used to them; when one of them fails in the middle of a run it is left out, and training
goes on.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from threading import RLock
from typing import Any, Protocol

from groundup.report.jsonl import JsonlWriter, Row
from groundup.report.metrics import MetricsWriter, energy_so_far, is_number, truncate_metrics
from groundup.report.samples import FILE, truncate_samples, write_page
from groundup.runtime import GroundupError, UsageError, warn
from groundup.runtime.errors import nearest

# name: (package it is written with, what installs it)
TRACKERS = {
    "tensorboard": ("tensorboardX", "groundup"),
    "wandb": ("wandb", "groundup[track]"),
    "mlflow": ("mlflow", "groundup[track]"),
}


class Tracker(Protocol):
    """Takes what a run measures and writes."""

    def log(self, row: Row) -> None:
        """One row of metrics (see metrics.py); its ``kind`` and ``step`` say what and when."""

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """What the model wrote at ``step``: rows of :func:`groundup.report.add_samples`."""

    def rewind(self, step: int) -> None:
        """The run went back to ``step``: what came after it no longer holds."""

    def close(self) -> None:
        """Nothing more will come."""


def check_trackers(names: Iterable[str]) -> list[str]:
    """The names, each once, if there are such trackers and their packages are installed.

    Raises:
        UsageError: there is no such tracker, or its package is missing; the message says what to install.
    """
    chosen = list(dict.fromkeys(names))
    for name in chosen:
        if name not in TRACKERS:
            known = ", ".join(TRACKERS)
            raise UsageError(f"track = {name} is not known.{nearest(name, TRACKERS)} Known: {known}.")
        package, extra = TRACKERS[name]
        if find_spec(package) is None:
            raise UsageError(
                f"track = {name} needs the package {package}, which is not installed: pip install '{extra}'"
            )
    return chosen


def open_trackers(
    names: Iterable[str],
    run_folder: str | os.PathLike[str],
    run_name: str,
    config: Mapping[str, Any],
    *,
    step: int = 0,
) -> Trackers:
    """Open metrics.jsonl, samples.jsonl and whatever else is asked for.

    What was recorded after ``step`` is dropped from the files, and marked as void in TensorBoard: a run that resumes
    there records it again. The tracker may be used from several threads.

    Args:
        names: any of :data:`TRACKERS`.
        run_folder: of the run; TensorBoard's events go into its ``tensorboard/``, the offline files of the others into
            ``wandb/``, ``mlflow.db`` and ``mlartifacts/``.
        run_name: what the run is called where several are shown.
        config: the resolved recipe by dotted key, shown beside the curves.
        step: where the run resumes; 0 begins anew.

    Raises:
        UsageError: a name is not known, or its package is missing.
        GroundupError: metrics.jsonl cannot be written.
    """
    chosen = check_trackers(names)
    run = Path(run_folder)
    # What was computed after the checkpoint and is lost has still cost its energy.
    spent = energy_so_far(run / "metrics.jsonl") if step else 0.0
    trackers: dict[str, Tracker] = {"metrics.jsonl": RunFiles(run, step)}
    for name in chosen:
        try:
            trackers[name] = _open(name, run, run_name, config, step)
        except Exception as error:  # whatever a package throws when it finds no network, no login, no disk
            warn(f"{name} cannot be opened and is left out of this run: {_first_line(error)}")
    return Trackers(trackers, spent)


def _open(name: str, run: Path, run_name: str, config: Mapping[str, Any], step: int) -> Tracker:
    if name == "tensorboard":
        from groundup.report.tensorboard import TensorBoard

        return TensorBoard(run / "tensorboard", config, step)
    from groundup.report.hosted import MLflow, WeightsAndBiases

    service = WeightsAndBiases if name == "wandb" else MLflow
    return service(run, run_name, config, step)


class Trackers:
    """Several trackers as one; those beside the run's own files may fail without harm.

    Args:
        trackers: by the name that a warning calls them.
        energy_joules: what the run took in earlier sittings, for a monitor that goes on counting.
    """

    def __init__(self, trackers: Mapping[str, Tracker], energy_joules: float = 0.0) -> None:
        self.energy_joules = energy_joules
        self._trackers = dict(trackers)
        self._lock = RLock()  # the monitor's thread logs too

    def log(self, row: Row) -> None:
        """One row of metrics, to each."""
        self._each(lambda tracker: tracker.log(row))

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """What the model wrote, to each."""
        self._each(lambda tracker: tracker.samples(step, rows))

    def rewind(self, step: int) -> None:
        """Go back to ``step``, each."""
        self._each(lambda tracker: tracker.rewind(step))

    def close(self) -> None:
        """Close each. Closing twice does no harm."""
        self._each(lambda tracker: tracker.close())
        self._trackers.clear()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _each(self, do: Callable[[Tracker], None]) -> None:
        with self._lock:
            for name, tracker in list(self._trackers.items()):
                try:
                    do(tracker)
                except Exception as error:  # whatever it is, a picture of the run is not worth the run
                    del self._trackers[name]
                    warn(f"{name} failed and is left out from here on; training goes on. {_first_line(error)}")


class RunFiles:
    """``metrics.jsonl`` and ``samples.jsonl`` of a run.

    What cannot be written (a full disk) is kept in memory and tried again with the next row, so that a run whose disk
    was full for an hour has no hole in its curves.

    Raises:
        GroundupError: the files cannot be written when the run begins.
    """

    def __init__(self, run: Path, step: int) -> None:
        self._run = run
        self._rows: deque[Row] = deque()
        self._texts: deque[Row] = deque()
        self._failing = False
        truncate_metrics(run / "metrics.jsonl", step)
        truncate_samples(run, step)
        self._metrics = MetricsWriter(run / "metrics.jsonl")

    def log(self, row: Row) -> None:
        """Append a row, and those that could not be written before."""
        self._rows.append(dict(row))
        self._write()

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """Append samples, and write samples.md anew."""
        self._texts += [{"step": step} | row for row in rows]
        self._write()

    def rewind(self, step: int) -> None:
        """Drop the rows and samples after ``step``."""
        for kept in (self._rows, self._texts):
            before = [row for row in kept if not is_number(row.get("step")) or row["step"] <= step]
            kept.clear()
            kept += before
        self._metrics.close()  # the file is about to be replaced by another
        try:
            truncate_metrics(self._run / "metrics.jsonl", step)
            truncate_samples(self._run, step)
        except GroundupError as error:
            warn(f"what was recorded after step {step} stays in the metrics and will stand there twice. {error}")
        self._metrics = MetricsWriter(self._run / "metrics.jsonl")

    def close(self) -> None:
        """Try once more to write what could not be written, and close."""
        self._write()
        self._metrics.close()
        if self._rows or self._texts:
            warn(f"{self._run}: {len(self._rows)} rows of metrics and {len(self._texts)} samples could not be written.")

    def _write(self) -> None:
        try:
            while self._rows:
                self._metrics.write(self._rows[0])
                self._rows.popleft()
            if self._texts:
                with JsonlWriter(self._run / FILE) as file:
                    while self._texts:
                        file.write(self._texts[0])
                        self._texts.popleft()
                write_page(self._run)
        except GroundupError as error:
            if not self._failing:
                warn(f"{error} Measurements are kept in memory until there is room; training goes on.")
            self._failing = True
        else:
            self._failing = False


def numbers(row: Row) -> dict[str, float]:
    """The finite numbers of a row but its step: what a curve can be drawn of."""
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in row.items() if key != "step"}
    return {key: float(value) for key, value in plain.items() if is_number(value)}


def _first_line(error: Exception) -> str:
    """An error of somebody else's package, in one line of bearable length."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
