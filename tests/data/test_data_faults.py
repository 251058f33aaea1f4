"""What must not be lost or left behind when the machine fails."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from groundup.data import PreparedData, prepare
from groundup.data import pipeline as pipeline_module
from groundup.runtime import GroundupError


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(random.Random(0).randbytes(200_000).hex(" ", 3))
    return path


def left_over(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith("."))


@pytest.mark.parametrize("broken", ["Spool", "write_json", "PartWriter", "split"])
def test_a_full_disk_keeps_the_corpus_that_was_there(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    out = tmp_path / "out"
    before = prepare(str(text), out, vocab_size=260).stats

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pipeline_module, broken, full)
    with pytest.raises(GroundupError, match="no space left on the disk"):
        prepare(str(text), out, vocab_size=261)
    assert PreparedData.open(out, verify=True).stats == before
    assert left_over(tmp_path) == []


def test_a_disk_that_is_really_full(text: Path, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=256k")
    with pytest.raises(GroundupError, match="no space left on the disk"):
        prepare(str(text), disk / "out", vocab_size=260)
    assert list(disk.iterdir()) == []


def test_a_disk_that_may_only_be_read(text: Path, small_disk: Callable[[str], Path]) -> None:
    with pytest.raises(GroundupError, match="the file system is read-only"):
        prepare(str(text), small_disk("size=256k,ro") / "out", vocab_size=260)


def test_no_permission_to_write(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    if os.geteuid() == 0:  # to whom permissions do not apply
        made = Path.mkdir

        def refuse(path: Path, *rest: object, **options: object) -> None:
            if path.parent == locked:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            made(path, *rest, **options)

        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        locked.chmod(0o500)
    with pytest.raises(GroundupError, match=r"cannot write .*locked.*no permission"):
        prepare(str(text), locked / "out", vocab_size=260)


def test_an_interruption_leaves_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline_module, "PartWriter", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(text), tmp_path / "out", vocab_size=260)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["text.txt"]


@pytest.mark.parametrize("stage", ["collect", "split", "write", "last"])
def test_kill_9_leaves_nothing_half_made(text: Path, tmp_path: Path, stage: str) -> None:
    """A process is killed the moment it enters a stage; then the same command runs again."""
    out = tmp_path / "out"
    script = f"""
import os, signal, sys
from pathlib import Path
from groundup.data import pipeline
name = {{"collect": "utf8_length", "split": "split", "write": "PartWriter", "last": "say"}}[{stage!r}]
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
if {stage!r} == "last":
    os.replace = die
else:
    setattr(pipeline, name, die)
pipeline.prepare({str(text)!r}, Path({str(out)!r}), vocab_size=260)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not out.exists()
    assert len(left_over(tmp_path)) == 1
    made = prepare(str(text), out, vocab_size=260)
    assert left_over(tmp_path) == []
    PreparedData.open(made.folder, verify=True)


@pytest.mark.slow
def test_kill_9_at_any_moment(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = prepare(str(text), out, vocab_size=260).stats["inputs"]
    script = "import sys; from pathlib import Path; from groundup.data import prepare\n"
    script += "while True:\n for size in (261, 262): prepare(sys.argv[1], Path(sys.argv[2]), vocab_size=size)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    chosen = random.Random(1)
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", script, str(text), str(out)], env=environment)
        time.sleep(0.4 + chosen.random() * 1.5)
        process.kill()
        process.wait()
        if out.exists():  # absent only between the two renames that replace it
            PreparedData.open(out, verify=True)
    assert prepare(str(text), out, vocab_size=260).stats["inputs"] == before
    assert left_over(tmp_path) == []
