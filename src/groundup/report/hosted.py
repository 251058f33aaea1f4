"""A run's measurements in Weights & Biases and in MLflow, for those who ask for it.

Nothing leaves the machine unless the person says so: Weights & Biases writes offline files unless ``WANDB_MODE`` says
otherwise, MLflow a database in the run folder unless ``MLFLOW_TRACKING_URI`` names a server. A resumed run goes on as
the run it was: its number in each service stands in ``tracking.json``.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from groundup.report.jsonl import Row
from groundup.report.samples import sample_section
from groundup.report.tracking import numbers
from groundup.runtime import read_json, write_json

PROJECT = "groundup"
IDS = "tracking.json"
SAMPLE_COLUMNS = ["step", "temperature", "prompt", "text"]
MOST_PARAMETERS = 100  # that MLflow takes at once
MOST_CHARACTERS = 500  # of a parameter's value in MLflow


class WeightsAndBiases:
    """A run of Weights & Biases, by default offline.

    Args:
        run: the run folder; the files go into its ``wandb/``.
        run_name, config: what is shown.
        step: where the run resumes; 0 begins another run of theirs.
    """

    def __init__(self, run: Path, run_name: str, config: Mapping[str, Any], step: int) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE") or "offline"
        number = _known(run, "wandb", step) or secrets.token_hex(4)
        _remember(run, "wandb", number)
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=run_name,
            id=number,
            dir=str(run),
            config=dict(config),
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(console="off"),  # it would stand between the progress bar and the terminal
        )
        # A run that goes back would stand still in their own counting of steps, which only goes up.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Row) -> None:
        """The numbers of a row as ``kind/key``."""
        kind = row.get("kind", "train")
        named = {f"{kind}/{key}": value for key, value in numbers(row).items()}
        self._run.log(named | {"step": int(row.get("step") or 0)})

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """The samples of a step as a table."""
        cells = [[row.get(name, step if name == "step" else "") for name in SAMPLE_COLUMNS] for row in rows]
        self._run.log({"samples": self._wandb.Table(columns=SAMPLE_COLUMNS, data=cells), "step": step})

    def rewind(self, step: int) -> None:
        """Nothing: rows are drawn over their own step, and come again."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflow:
    """A run of MLflow, by default in a database of its own.

    Args:
        run: the run folder; the database is its ``mlflow.db``.
        run_name, config: what is shown.
        step: where the run resumes; 0 begins another run of theirs.
    """

    def __init__(self, run: Path, run_name: str, config: Mapping[str, Any], step: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        server = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=server or f"sqlite:///{run.resolve() / 'mlflow.db'}")
        self._metric = Metric
        known = _known(run, "mlflow", step)
        if known is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(experiment)
        place = None if server else (run.resolve() / "mlartifacts").as_uri()
        owner = found.experiment_id if found else self._client.create_experiment(experiment, artifact_location=place)
        self._id = self._client.create_run(owner, run_name=run_name).info.run_id
        _remember(run, "mlflow", self._id)
        parameters = [Param(key, str(value)[:MOST_CHARACTERS]) for key, value in config.items()]
        for first in range(0, len(parameters), MOST_PARAMETERS):
            self._client.log_batch(self._id, params=parameters[first : first + MOST_PARAMETERS])

    def log(self, row: Row) -> None:
        """The numbers of a row as ``kind/key``."""
        kind, step, now = row.get("kind", "train"), int(row.get("step") or 0), int(1000 * time.time())
        found = [self._metric(f"{kind}/{key}", value, now, step) for key, value in numbers(row).items()]
        self._client.log_batch(self._id, metrics=found)

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """The samples of a step as a text of its own."""
        text = "\n".join(map(sample_section, rows))
        self._client.log_text(self._id, text.encode("utf-8", "replace").decode(), f"samples/step-{step:08d}.md")

    def rewind(self, step: int) -> None:
        """Nothing: MLflow keeps both, and draws them over the same steps."""

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._id)


def _known(run: Path, service: str, step: int) -> str | None:
    """The number of the run in a service, where a run that resumes has one."""
    path = run / IDS
    found = read_json(path, "tracking file") if step and path.is_file() else {}
    number = found.get(service) if isinstance(found, dict) else None
    return number if isinstance(number, str) else None


def _remember(run: Path, service: str, number: str) -> None:
    """Note it beside the other services'."""
    path = run / IDS
    before = read_json(path, "tracking file") if path.is_file() else {}
    write_json(path, (before if isinstance(before, dict) else {}) | {service: number})
