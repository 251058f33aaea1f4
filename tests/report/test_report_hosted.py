"""Weights & Biases and MLflow: what is said to them, played; and they themselves where they are installed."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from groundup.report import open_trackers
from groundup.report import tracking as tracking_module

CONFIG = {"model.n_layer": 3, "optim.learning_rate": 0.0007, "data": "text.txt"}


def train(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "tokens": 64 * step, "loss": loss, "learning_rate": 0.001}


def sample(text: str) -> dict[str, Any]:
    return {"temperature": 0.7, "prompt": "def ", "text": text}


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As much of the package as is used, and what was said to it."""
    module: Any = types.ModuleType("wandb")
    module.said, module.begun = [], []

    class Run:
        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            module.said.append(("axis", name, step_metric))

        def log(self, row: dict[str, Any]) -> None:
            module.said.append(row)

        def finish(self) -> None:
            module.said.append("finished")

    def init(**options: Any) -> Run:
        module.begun.append(options)
        return Run()

    module.init = init
    module.Settings = lambda **options: options
    module.Table = lambda columns, data: [dict(zip(columns, cells, strict=True)) for cells in data]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(tracking_module, "find_spec", lambda package: object())
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return module


def test_weights_and_biases_is_offline_unless_told_otherwise(
    wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_trackers(["wandb"], tmp_path, "demo", CONFIG) as tracker:
        tracker.log(train(5, 2.5))
        tracker.log({"kind": "hardware", "step": 7, "watts": 41.5, "gpu_percent": None})
        tracker.samples(7, [sample("x")])
    (options,) = wandb.begun
    assert (options["mode"], options["resume"], options["name"]) == ("offline", None, "demo")
    assert (options["dir"], options["config"]) == (str(tmp_path), CONFIG)
    assert wandb.said[:2] == [("axis", "step", None), ("axis", "*", "step")]
    assert {"step": 5, "train/loss": 2.5, "train/tokens": 320.0, "train/learning_rate": 0.001} in wandb.said
    assert {"step": 7, "hardware/watts": 41.5} in wandb.said
    assert {"step": 7, "samples": [{"step": 7} | sample("x")]} in wandb.said
    assert wandb.said[-1] == "finished"
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    open_trackers(["wandb"], tmp_path, "demo", CONFIG, step=7).close()
    assert (wandb.begun[1]["mode"], wandb.begun[1]["resume"]) == ("online", "allow")
    assert (wandb.begun[1]["id"], wandb.begun[1]["project"]) == (options["id"], "mine")
    open_trackers(["wandb"], tmp_path, "demo", CONFIG).close()  # begun anew: another run
    assert wandb.begun[2]["id"] != options["id"]


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = types.ModuleType("mlflow")
    entities: Any = types.ModuleType("mlflow.entities")
    entities.Metric = lambda key, value, timestamp, step: (key, value, step)
    entities.Param = lambda key, value: (key, value)
    module.servers, module.metrics, module.parameters, module.texts = [], [], [], {}
    module.statuses, module.experiments, module.runs = [], {}, []

    class MlflowClient:
        def __init__(self, tracking_uri: str) -> None:
            module.servers.append(tracking_uri)

        def get_experiment_by_name(self, name: str) -> Any:
            return types.SimpleNamespace(experiment_id=name) if name in module.experiments else None

        def create_experiment(self, name: str, artifact_location: str | None) -> str:
            module.experiments[name] = artifact_location
            return name

        def create_run(self, experiment: str, run_name: str) -> Any:
            module.runs.append((experiment, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"run{len(module.runs)}"))

        def update_run(self, run: str, status: str) -> None:
            module.statuses.append((run, status))

        def log_batch(self, run: str, metrics: list = (), params: list = ()) -> None:  # type: ignore[assignment]
            assert len(params) <= 100
            module.metrics += [(run, *metric) for metric in metrics]
            module.parameters += params

        def log_text(self, run: str, text: str, file: str) -> None:
            module.texts[file] = text

        def set_terminated(self, run: str) -> None:
            module.statuses.append((run, "FINISHED"))

    module.MlflowClient = MlflowClient
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setattr(tracking_module, "find_spec", lambda package: object())
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return module


def test_mlflow_has_a_database_of_its_own_unless_a_server_is_named(
    mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {f"key{number}": "v" * 999 for number in range(123)}
    with open_trackers(["mlflow"], tmp_path, "demo", config) as tracker:
        tracker.log(train(5, 2.5))
        tracker.samples(7, [sample("x")])
    assert mlflow.servers == [f"sqlite:///{tmp_path / 'mlflow.db'}"]
    assert mlflow.experiments == {"groundup": (tmp_path / "mlartifacts").as_uri()}
    assert mlflow.runs == [("groundup", "demo")]
    assert len(mlflow.parameters) == 123
    assert {len(value) for _, value in mlflow.parameters} == {500}
    assert ("run1", "train/loss", 2.5, 5) in mlflow.metrics
    assert "def x" in mlflow.texts["samples/step-00000007.md"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://server")
    open_trackers(["mlflow"], tmp_path, "demo", config, step=7).close()
    assert mlflow.servers[1:] == ["https://server"]
    assert mlflow.runs == [("groundup", "demo")]  # the same run goes on
    assert mlflow.statuses == [("run1", "FINISHED"), ("run1", "RUNNING"), ("run1", "FINISHED")]
    open_trackers(["mlflow"], tmp_path, "again", config).close()
    assert mlflow.runs[1:] == [("groundup", "again")]


# ---- themselves


def two_sittings(name: str, run: Path) -> None:
    for step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with open_trackers([name], run, "demo", CONFIG, step=step) as tracker:
            for number in steps:
                tracker.log(train(number, 5.0 - number))
            tracker.samples(steps[-1], [sample("x")])
            assert list(tracker._trackers) == ["metrics.jsonl", name]  # it has not failed


def test_weights_and_biases_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    two_sittings("wandb", tmp_path)
    files = [path.name for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")]
    assert len(files) == 2
    assert len(set(files)) == 1  # one run, to be uploaded in two parts


def test_mlflow_itself_in_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    two_sittings("mlflow", tmp_path)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("groundup").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.n_layer"] == "3"
    points = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(points) == [(1, 4.0), (2, 3.0), (3, 2.0), (3, 2.0), (4, 1.0)]
    assert len(client.list_artifacts(run.info.run_id, "samples")) == 2
