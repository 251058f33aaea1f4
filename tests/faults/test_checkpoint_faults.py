"""Checkpoints and everything that can happen to a disk, a folder or a process while one is written."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from groundup.model import ModelConfig, Transformer
from groundup.optim import OptimConfig, build_optimizers
from groundup.runtime import GroundupError
from groundup.runtime.files import verify_folder
from groundup.runtime.interrupt import stop_on_signals
from groundup.tokenizer import Tokenizer
from groundup.training.checkpoint import Checkpoints, optimizer_tensors
from groundup.training.checkpoint_writer import Entry, LiveWriter

Setting = tuple[Transformer, Tokenizer, dict[str, torch.optim.Optimizer]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat and the dog sat on the log " * 9], 270, show_progress=False)


@pytest.fixture
def setting(tokenizer: Tokenizer) -> Setting:
    torch.manual_seed(3)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, context_length=13, n_layer=3, n_head=3, n_embd=66, n_ff=131)
    model = Transformer(config)
    optimizers = build_optimizers(model, OptimConfig(optimizer="adamw"))
    model(torch.arange(13)[None]).square().mean().backward()
    for optimizer in optimizers.values():
        optimizer.step()
    return model, tokenizer, optimizers


def save(checkpoints: Checkpoints, setting: Setting, step: int) -> Path:
    model, tokenizer, optimizers = setting
    return checkpoints.save(model, tokenizer, optimizers, {"step": step}, best=False)


def settle(checkpoints: Checkpoints) -> None:
    """Train on for as long as the save takes."""
    deadline = time.monotonic() + 60
    while checkpoints._job is not None and time.monotonic() < deadline:
        checkpoints.settle()
        time.sleep(0.01)
    assert checkpoints._job is None


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The writer stops ahead of its fourth tensor until the event is set."""
    go_on, seen = threading.Event(), []
    write = LiveWriter._write_entry

    def wait(self: LiveWriter, entry: Entry, add: Any) -> None:
        seen.append(entry)
        if len(seen) == 4:
            assert go_on.wait(60)
        write(self, entry, add)

    monkeypatch.setattr(LiveWriter, "_write_entry", wait)
    return go_on


# ---- disks


def test_a_full_disk_is_one_warning_and_the_next_save_tries_again(
    small_disk: Callable[[str], Path], setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk("size=8m")
    checkpoints = Checkpoints(disk / "checkpoints")
    first = save(checkpoints, setting, 1)
    checkpoints.finish()
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(b"x" * (free - 700_000))
    second = save(checkpoints, setting, 2)
    settle(checkpoints)
    for _ in range(3):
        checkpoints.settle()
    said = capsys.readouterr().err
    assert said.count("warning") == 1, said
    assert "no space left on the disk" in said
    assert "step-000002" in said
    assert ".part" not in said
    assert "earlier ones stay" in said
    assert checkpoints.all() == [first]
    assert sorted(path.name for path in (disk / "checkpoints").iterdir()) == ["latest", first.name]
    verify_folder(first)
    (disk / "ballast").unlink()
    third = save(checkpoints, setting, 3)
    checkpoints.finish()
    assert checkpoints.all() == [third, first]
    assert not second.exists()


def test_a_full_disk_at_the_last_save_is_an_error(small_disk: Callable[[str], Path], setting: Setting) -> None:
    disk = small_disk("size=1m")
    checkpoints = Checkpoints(disk / "checkpoints")
    save(checkpoints, setting, 1)
    with pytest.raises(GroundupError, match=r"cannot write .*/step-000001.*no space left on the disk"):
        checkpoints.finish()
    checkpoints.finish()  # it was told
    assert list((disk / "checkpoints").iterdir()) == []


def test_beside_another_error_a_failed_save_is_only_a_warning(
    tmp_path: Path, setting: Setting, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "step-000001").write_text("in the way")
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, setting, 1)
    checkpoints.finish(quietly=True)
    assert capsys.readouterr().err.count("something of that name is there already") == 1

    def bug(self: Tokenizer, folder: Path) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Tokenizer, "save", bug)
    save(checkpoints, setting, 2)
    checkpoints.finish(quietly=True)
    assert "ZeroDivisionError: a bug. The last checkpoint was not saved." in capsys.readouterr().err
    checkpoints.finish()


def test_a_read_only_disk_is_a_warning_and_an_error_at_the_end(
    small_disk: Callable[[str], Path], setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk("size=9m")
    checkpoints = Checkpoints(disk)
    save(checkpoints, setting, 1)
    checkpoints.finish()
    os.unlink(disk / "latest")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    save(checkpoints, setting, 2)
    checkpoints.settle()
    assert "the file system is read-only" in capsys.readouterr().err
    with pytest.raises(GroundupError, match="the file system is read-only"):
        checkpoints.finish()
    restored = checkpoints.newest()  # what is there can be read
    assert restored is not None
    assert restored.state["step"] == 1


# ---- folders


def test_a_folder_removed_while_it_is_written_is_a_warning(
    tmp_path: Path, setting: Setting, held: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder)
    save(checkpoints, setting, 1)
    while not list(folder.glob(".step-000001.*.part/model.safetensors")):
        time.sleep(0.005)
    shutil.rmtree(folder)
    held.set()
    settle(checkpoints)
    said = capsys.readouterr().err
    assert "cannot write" in said
    assert "no such file or folder" in said
    path = save(checkpoints, setting, 2)
    checkpoints.finish()
    verify_folder(path)


def test_a_file_in_the_way_is_named(tmp_path: Path, setting: Setting) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    save(checkpoints, setting, 1)
    with pytest.raises(GroundupError, match="something of that name is there already"):
        checkpoints.finish()


def test_two_savers_leave_only_whole_checkpoints(tmp_path: Path, setting: Setting) -> None:
    failed: list[str] = []

    def work() -> None:
        checkpoints = Checkpoints(tmp_path)
        for step in range(1, 6):
            save(checkpoints, setting, step)
            try:
                checkpoints.finish()
            except GroundupError as error:  # the other's folder came in between
                failed.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) < 10
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.all()[0].name == "step-000005"
    for path in checkpoints.all():
        verify_folder(path)
    restored = checkpoints.newest()
    assert restored is not None
    assert restored.state["step"] == 5
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# ---- the thread


def test_a_bug_in_the_thread_comes_out_where_training_is(
    tmp_path: Path, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)

    def bug(self: Tokenizer, folder: Path) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Tokenizer, "save", bug)
    save(checkpoints, setting, 1)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        settle(checkpoints)
    save(checkpoints, setting, 2)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        checkpoints.finish()
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import sys, time
from pathlib import Path
import torch
from groundup.model import ModelConfig, Transformer
from groundup.optim import OptimConfig, build_optimizers
from groundup.tokenizer import Tokenizer
from groundup.training import checkpoint_writer
from groundup.training.checkpoint import Checkpoints

folder = Path(sys.argv[1])
tokenizer = Tokenizer.train(["the cat sat on the mat and the dog sat on the log " * 9], 270, show_progress=False)
config = ModelConfig(vocab_size=tokenizer.vocab_size, context_length=13, n_layer=3, n_head=3, n_embd=66, n_ff=131)
torch.manual_seed(3)
model = Transformer(config)
optimizers = build_optimizers(model, OptimConfig(optimizer="adamw"))
model(torch.arange(13)[None]).square().mean().backward()
for optimizer in optimizers.values():
    optimizer.step()

def fill(step):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
        for optimizer in optimizers.values():
            for state in optimizer.state.values():
                for tensor in state.values():
                    tensor.fill_(step)
"""

FOREVER = (
    SCRIPT
    + """
import os, random, signal

def train(after, ready):
    checkpoints = Checkpoints(folder)
    for step in range(after + 1, 100_000):
        checkpoints.settle()
        fill(step)
        checkpoints.save(model, tokenizer, optimizers, {"step": step}, best=step % 3 == 0)
        if step == after + 2:  # one is there
            os.write(ready, b"!")

torch.set_num_threads(1)
checkpoint_writer.SMALL = 0  # nothing is so small that it is copied at once
after = 0
for moment in range(int(sys.argv[2])):
    listening, ready = os.pipe()
    child = os.fork()
    if not child:
        train(after, ready)
    os.read(listening, 1)
    time.sleep(random.uniform(0, 0.3))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    half = any(folder.glob(".step-*.part"))
    found = Checkpoints(folder).newest()
    assert found.state["step"] > after
    after = found.state["step"]
    values = {after}
    for tensors in (found.weights, found.tensors):
        values |= {value for name in tensors for value in tensors[name].unique().tolist()}
    assert values == {after}, values
    assert not any(folder.glob(".*"))
    print("half" if half else "between", flush=True)
"""
)


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_killed_at_any_moment_a_whole_checkpoint_is_there(tmp_path: Path) -> None:
    """Each tensor of a checkpoint is full of its step's number: a torn one would show two."""
    done = run(FOREVER, str(tmp_path), "13")
    assert done.returncode == 0, done.stderr
    said = done.stdout.split()
    assert len(said) == 13
    assert "half" in said  # some were killed in the middle of writing
    assert "warning" not in done.stderr  # no checkpoint was damaged


def test_a_process_that_ends_waits_for_its_save(tmp_path: Path) -> None:
    done = run(SCRIPT + "Checkpoints(folder).save(model, tokenizer, optimizers, {'step': 1}, best=True)", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in Checkpoints(tmp_path).all()] == ["step-000001"]
    verify_folder(tmp_path / "step-000001")


def test_a_failure_that_nobody_asked_for_is_told_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "step-000001").write_text("in the way")
    done = run(SCRIPT + "Checkpoints(folder).save(model, tokenizer, optimizers, {'step': 1}, best=True)", str(tmp_path))
    assert "something of that name is there already" in done.stderr
    assert "The last checkpoint was not saved" in done.stderr
    assert "Traceback" not in done.stderr


# ---- signals


def test_a_signal_that_asks_to_save_stops_nothing() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with stop_on_signals() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.save
            assert not stop
            stop.save = False
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)  # whose usual action would end the process
        assert stop
        assert stop.save
    assert signal.getsignal(signal.SIGUSR1) is before


def test_the_state_is_that_of_the_save(tmp_path: Path, setting: Setting, held: threading.Event) -> None:
    """A step that comes while the writer stands still changes nothing of what is written."""
    model, _, optimizers = setting
    expected = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizers).items()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, setting, 1)
    threading.Timer(0.2, held.set).start()
    checkpoints.settle()
    with torch.no_grad():
        for tensor in [*model.parameters(), *optimizer_tensors(model, optimizers).values()]:
            tensor.fill_(-7)
    restored = checkpoints.newest()
    assert restored is not None
    assert all(torch.equal(restored.weights[name], tensor) for name, tensor in weights.items())
    assert all(torch.equal(restored.tensors[name], tensor) for name, tensor in expected.items())
