"""Where measurements go: the run's own files, TensorBoard, and what is asked for; through crashes and failures."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from groundup.report import check_trackers, open_trackers, read_metrics
from groundup.report import tracking as tracking_module
from groundup.report.jsonl import read_jsonl
from groundup.report.metrics import energy_so_far
from groundup.report.tracking import Trackers, numbers
from groundup.runtime import GroundupError, UsageError

CONFIG = {"model.n_layer": 3, "optim.learning_rate": 0.0007, "data": "a\n\udce9"}


def train(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "tokens": 64 * step, "loss": loss, "learning_rate": 0.001}


def held_out(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "tokens": 64 * step, "loss": loss}


def sample(text: str) -> dict[str, Any]:
    return {"temperature": 0.7, "prompt": "def ", "text": text}


# ---- names


def test_each_name_once_in_order() -> None:
    assert check_trackers([]) == []
    assert check_trackers(["tensorboard", "tensorboard"]) == ["tensorboard"]


def test_a_tracker_nobody_knows() -> None:
    with pytest.raises(
        UsageError, match=r"track = wanbd is not known. Did you mean wandb\? Known: tensorboard, wandb,"
    ):
        check_trackers(["tensorboard", "wanbd"])


@pytest.mark.parametrize(
    ("name", "extra"), [("tensorboard", "groundup"), ("wandb", "groundup[track]"), ("mlflow", "groundup[track]")]
)
def test_a_missing_package_says_what_to_install(
    name: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking_module, "find_spec", lambda package: None)
    with pytest.raises(UsageError) as caught:
        open_trackers([name], tmp_path / "run", "run", {})
    assert str(caught.value).startswith(f"track = {name} needs the package ")
    assert str(caught.value).endswith(f"pip install '{extra}'")
    assert not (tmp_path / "run").exists()


# ---- the run's own files


def test_rows_and_samples_go_to_the_runs_files(tmp_path: Path) -> None:
    tracker = open_trackers([], tmp_path, "run", CONFIG)
    tracker.log(train(1, 5.5))
    tracker.samples(1, [sample("one"), sample("two")])
    tracker.log(held_out(1, 5.25))
    tracker.close()
    tracker.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [train(1, 5.5), held_out(1, 5.25)]
    assert read_jsonl(tmp_path / "samples.jsonl") == [{"step": 1} | sample("one"), {"step": 1} | sample("two")]
    assert "def two" in (tmp_path / "samples.md").read_text()


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    with open_trackers([], tmp_path, "run", CONFIG) as tracker:
        for step in (1, 2, 3, 4, 5):
            tracker.log(train(step, 6 - step))
            tracker.samples(step, [sample(str(step))])
    with open_trackers([], tmp_path, "run", CONFIG, step=3) as tracker:
        tracker.log(train(4, 9.0))
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [5, 4, 3, 9.0]
    assert [row["step"] for row in read_jsonl(tmp_path / "samples.jsonl")] == [1, 2, 3]


def test_a_run_that_goes_back_writes_on_behind_that_place(tmp_path: Path) -> None:
    with open_trackers(["tensorboard"], tmp_path, "run", CONFIG) as tracker:
        for step in (1, 2, 3, 4, 5):
            tracker.log(train(step, 6 - step))
        tracker.samples(4, [sample("lost")])
        tracker.rewind(2)
        tracker.log(train(3, 7.0))
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 5),
        (2, 4),
        (3, 7.0),
    ]
    assert read_jsonl(tmp_path / "samples.jsonl") == []
    assert scalars(tmp_path)["train/loss"] == {1: 5.0, 2: 4.0, 3: 7.0}


def test_several_threads_may_log(tmp_path: Path) -> None:
    with open_trackers(["tensorboard"], tmp_path, "run", CONFIG) as tracker:

        def log(first: int) -> None:
            for step in range(first, first + 50):
                tracker.log(train(step, float(step)))

        threads = [threading.Thread(target=log, args=(start,)) for start in (0, 1000, 2000)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 150
    assert len(scalars(tmp_path)["train/loss"]) == 150


def test_a_full_disk_loses_no_row(tmp_path: Path, small_disk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    disk = small_disk("size=64k")
    tracker = open_trackers([], disk / "run", "run", CONFIG)
    tracker.log(train(1, 5.0))
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 512):
            pass
    for step in range(2, 200):  # far more than what is left of the last page
        tracker.log(train(step, 4.0))
    tracker.samples(199, [sample("text")])
    warned = capsys.readouterr().err
    assert warned.count("groundup: warning:") == 1
    assert "no space left on the disk" in warned
    assert len(read_metrics(disk / "run" / "metrics.jsonl")) < 199
    ballast.unlink()
    tracker.log(train(200, 3.0))
    tracker.close()
    assert [row["step"] for row in read_metrics(disk / "run" / "metrics.jsonl")] == list(range(1, 201))
    assert len(read_jsonl(disk / "run" / "samples.jsonl")) == 1


def test_a_full_disk_costs_tensorboard_and_nobody_waits(small_disk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_disk("size=64k") / "run"
    with open_trackers(["tensorboard"], run, "run", CONFIG) as tracker:
        for step in range(1, 2000):  # more than the disk holds
            tracker.log(train(step, 4.0))
        assert capsys.readouterr().err.count("tensorboard failed and is left out from here on") == 1
        for file in (run / "tensorboard").iterdir():
            file.unlink()
    assert "could not be written" in capsys.readouterr().err
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))


def test_what_could_never_be_written_is_told_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = open_trackers([], tmp_path, "run", CONFIG)

    def refuse(*_: object) -> None:
        raise GroundupError("cannot write metrics.jsonl: no space left on the disk.")

    monkeypatch.setattr("groundup.report.jsonl.JsonlWriter.write", refuse)
    tracker.log(train(1, 5.0))
    tracker.log(train(2, 5.0))
    tracker.close()
    assert "2 rows of metrics and 0 samples could not be written" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(GroundupError, match=r"cannot (read|write)"):
        open_trackers([], tmp_path / "run", "run", CONFIG)


def test_energy_goes_on_from_what_was_spent(tmp_path: Path) -> None:
    assert energy_so_far(tmp_path / "metrics.jsonl") == 0.0
    with open_trackers([], tmp_path, "run", CONFIG) as tracker:
        tracker.log({"kind": "hardware", "step": 3, "energy_joules": 70.5})
        tracker.log({"kind": "hardware", "step": 9, "energy_joules": 91.25})
        tracker.log({"kind": "hardware", "step": 9, "energy_joules": None})
    assert energy_so_far(tmp_path / "metrics.jsonl") == 91.25
    with open_trackers([], tmp_path, "run", CONFIG, step=5) as tracker:
        assert tracker.energy_joules == 91.25  # what is lost was paid for too
    assert energy_so_far(tmp_path / "metrics.jsonl") == 70.5
    with open_trackers([], tmp_path, "run", CONFIG) as tracker:
        assert tracker.energy_joules == 0.0


# ---- TensorBoard, read by TensorBoard itself


def scalars(run: Path) -> dict[str, dict[int, float]]:
    accumulator = events(run)
    return {tag: {one.step: one.value for one in accumulator.Scalars(tag)} for tag in accumulator.Tags()["scalars"]}


def events(run: Path) -> Any:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    import torch

    with open_trackers(["tensorboard"], tmp_path, "run", CONFIG) as tracker:
        tracker.log(train(1, 5.5) | {"loss": torch.tensor(5.5), "skipped_steps": 2, "note": "text", "ok": True})
        tracker.log(train(2, float("nan")))
        tracker.log(held_out(2, 5.25))
        tracker.log({"kind": "hardware", "step": 2, "cpu_percent": 93.5, "watts": None})
        tracker.samples(2, [sample("`code`\n```"), sample("half \udce9")])
        found = scalars(tmp_path)  # readable before it is closed
    assert found["train/loss"] == {1: 5.5}  # what is not a number is no point
    assert found["train/skipped_steps"] == {1: 2.0}
    assert found["train/learning_rate"] == {1: pytest.approx(0.001), 2: pytest.approx(0.001)}
    assert found["eval/loss"] == {2: 5.25}
    assert found["hardware/cpu_percent"] == {2: 93.5}
    assert not {"hardware/watts", "train/note", "train/ok", "train/step", "train/kind"} & found.keys()
    accumulator = events(tmp_path)
    texts = {tag: accumulator.Tensors(tag) for tag in accumulator.Tags()["tensors"]}
    (told,) = [texts[tag][0].tensor_proto.string_val[0].decode() for tag in texts if tag.startswith("samples")]
    assert "def `code`" in told
    (recipe,) = [texts[tag][0].tensor_proto.string_val[0].decode() for tag in texts if tag.startswith("recipe")]
    assert "model.n_layer: 3" in recipe


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    with open_trackers(["tensorboard"], tmp_path, "run", CONFIG) as tracker:
        for step in (1, 2, 3, 4, 5):
            tracker.log(train(step, 6.0 - step))
    with open_trackers(["tensorboard"], tmp_path, "run", CONFIG, step=3) as tracker:
        tracker.log(train(4, 9.0))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2  # though opened within one second
    assert scalars(tmp_path)["train/loss"] == {1: 5.0, 2: 4.0, 3: 3.0, 4: 9.0}


def test_a_run_begun_anew_in_the_same_folder_shows_nothing_of_the_old(tmp_path: Path) -> None:
    with open_trackers(["tensorboard"], tmp_path, "run", CONFIG) as tracker:
        tracker.log(train(1, 5.0))
        tracker.log(train(2, 4.0))
    with open_trackers(["tensorboard"], tmp_path, "run", CONFIG) as tracker:
        tracker.log(train(1, 8.0))
    assert scalars(tmp_path)["train/loss"] == {1: 8.0}


def test_the_names_of_event_files_tell_nothing_of_the_host(tmp_path: Path) -> None:
    import socket

    with open_trackers(["tensorboard"], tmp_path, "run", CONFIG):
        pass
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert socket.gethostname() not in file.name
    assert abs(int(file.name.split(".")[3]) - time.time()) < 60


# ---- one that fails


class Failing:
    """Fails from its second row on."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, row: dict[str, Any]) -> None:
        if self.rows:
            raise ConnectionError("no route\nto host")
        self.rows.append(row)

    def samples(self, step: int, rows: object) -> None:
        raise AssertionError("it was left out before")

    def rewind(self, step: int) -> None:
        raise AssertionError("it was left out before")

    def close(self) -> None:
        raise AssertionError("it was left out before")


def test_a_tracker_that_fails_is_left_out_with_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    class Fine(Failing):
        def log(self, row: dict[str, Any]) -> None:
            self.rows.append(row)

        def samples(self, step: int, rows: object) -> None: ...

        def rewind(self, step: int) -> None: ...

        def close(self) -> None: ...

    fine = Fine()
    with Trackers({"service": Failing(), "fine": fine}) as tracker:
        for step in (1, 2, 3):
            tracker.log(train(step, 1.0))
        tracker.samples(3, [])
        tracker.rewind(2)
    assert [row["step"] for row in fine.rows] == [1, 2, 3]
    warned = capsys.readouterr().err
    assert warned.count("groundup: warning: service failed and is left out from here on; training goes on.") == 1
    assert "ConnectionError: no route" in warned
    assert "to host" not in warned


def test_one_that_cannot_be_opened_costs_itself_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with open_trackers(["tensorboard"], tmp_path, "run", CONFIG) as tracker:
        tracker.log(train(1, 5.0))
    assert "tensorboard cannot be opened and is left out of this run" in capsys.readouterr().err
    assert read_metrics(tmp_path / "metrics.jsonl") == [train(1, 5.0)]


def test_numbers_of_a_row() -> None:
    row = {"kind": "x", "step": 3, "a": 1, "b": 2.5, "c": None, "d": True, "e": float("inf"), "f": "7", "g": [1]}
    assert numbers(row) == {"a": 1.0, "b": 2.5}
