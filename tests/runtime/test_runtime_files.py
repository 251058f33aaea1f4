"""Whatever is written is whole or not there, however the writer ends."""

# ruff: noqa: PT012 (what a folder's block does is what is tested)

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.runtime import GroundupError, atomic_folder, read_json, sha256_file, write_atomic, write_json
from groundup.runtime.files import folder_lock, remove_leftovers, verify_folder, write_checksums

OLD = {"a.txt": "old a", "inner/b.txt": "old b"}
NEW = {"a.txt": "new a", "inner/c.txt": "new c"}


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fail(call: str, number: int, code: int = errno.ENOSPC) -> Callable[..., Any]:
    """An os function that fails at its ``number``-th call."""
    real, calls = getattr(os, call), iter(range(1, 1000))

    def failing(*arguments: Any) -> Any:
        if next(calls) == number:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    return failing


# ---- one file


@given(st.one_of(st.text(st.characters(codec="utf-8")), st.binary()), st.one_of(st.none(), st.binary()))
@settings(max_examples=40, deadline=None)
def test_a_file_holds_what_was_written_whatever_was_there(
    tmp_path_factory: pytest.TempPathFactory, new: str | bytes, old: bytes | None
) -> None:
    path = tmp_path_factory.mktemp("file") / "deeper" / "file.bin"
    if old is not None:
        write_atomic(path, old)
    write_atomic(path, new)
    assert path.read_bytes() == (new.encode() if isinstance(new, str) else new)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("call", "number"), [("fsync", 1), ("replace", 1)])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_file_is_untouched_when_writing_fails(
    call: str, number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.txt"
    write_atomic(path, "old")
    monkeypatch.setattr(os, call, fail(call, number, code))
    with pytest.raises(GroundupError, match=r"cannot write .*file\.txt: ") as raised:
        write_atomic(path, "new")
    assert ".part" not in str(raised.value)
    assert content(tmp_path) == {"file.txt": "old"}


def test_a_file_is_untouched_when_the_writer_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_atomic(path, "old")

    def interrupt(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert content(tmp_path) == {"file.txt": "old"}


def test_a_folder_in_the_way_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "place" / "inner").mkdir(parents=True)
    with pytest.raises(GroundupError, match=f"cannot write {tmp_path}/place: this is a folder, a file was expected"):
        write_atomic(tmp_path / "place", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


# ---- a folder


def test_a_folder_appears_whole_and_replaces_the_one_before(tmp_path: Path) -> None:
    place = tmp_path / "parent" / "place"
    for files in (OLD, NEW):
        with atomic_folder(place) as folder:
            fill(folder, files)
            assert not place.exists() or content(place) == OLD
        assert content(place) == files
        assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("before", [{}, OLD], ids=["new", "replacing"])
def test_a_folder_is_untouched_when_the_block_raises(
    error: BaseException, before: dict[str, str], tmp_path: Path
) -> None:
    place = tmp_path / "place"
    fill(place, before)
    expected = GroundupError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), atomic_folder(place) as folder:
        fill(folder, NEW)
        raise error
    assert content(tmp_path) == {f"place/{name}": text for name, text in before.items()}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("call", "number"), [("fsync", 1), ("fsync", 2), ("fsync", 4), ("replace", 1), ("replace", 2)])
def test_a_folder_is_untouched_when_the_disk_fails(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    fill(place, OLD)
    monkeypatch.setattr(os, call, fail(call, number))
    with pytest.raises(GroundupError, match=f"cannot write {place}: no space left"), atomic_folder(place) as folder:
        fill(folder, NEW)
    assert content(place) == OLD
    assert list(tmp_path.iterdir()) == [place]


def test_a_file_in_the_way_of_a_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "place").write_text("somebody's")
    with (
        pytest.raises(GroundupError, match="place: something of that name is there"),
        atomic_folder(tmp_path / "place") as folder,
    ):
        fill(folder, NEW)
    assert content(tmp_path) == {"place": "somebody's"}


def test_an_error_inside_a_folder_is_told_by_the_name_it_would_have_had(tmp_path: Path) -> None:
    with (
        pytest.raises(GroundupError, match=f"cannot write {tmp_path}/place/a.txt/b.txt: "),
        atomic_folder(tmp_path / "place") as folder,
    ):
        fill(folder, OLD)
        (folder / "a.txt" / "b.txt").write_text("")


def test_leftovers_go_and_nothing_else_does(tmp_path: Path) -> None:
    fill(tmp_path, {".a.01234567.part/x": "", ".b.txt.89abcdef.part": "", ".c.00000000.old/x": "", "c/x": ""})
    kept = {"a/x": "", ".hidden": "", "notes.part": "", ".my.old": "", ".d.0123.part": "", "c/x": ""}
    fill(tmp_path, kept)
    remove_leftovers(tmp_path)
    assert content(tmp_path) == kept
    remove_leftovers(tmp_path / "absent")


def test_leftovers_of_one_name_only(tmp_path: Path) -> None:
    fill(tmp_path, {".a.01234567.part/x": "", ".b.txt.89abcdef.part": ""})
    remove_leftovers(tmp_path, "a")
    assert content(tmp_path) == {".b.txt.89abcdef.part": ""}


# ---- killed in the middle

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from groundup.runtime import atomic_folder, write_atomic

what, place, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
calls = 0

def counted(real):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call

for module, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree")):
    setattr(module, name, counted(getattr(module, name)))
if what == "file":
    write_atomic(place / "a.txt", "new a" * 10_000)
else:
    with atomic_folder(place) as folder:
        (folder / "a.txt").write_text("new a")
        (folder / "inner").mkdir()
        (folder / "inner" / "c.txt").write_text("new c")
"""


def killed_at_each_step(child: Any, what: str, place: Path, reset: Callable[[], None]) -> Iterator[int]:
    """Kill the writer just before its first, second, … system call, until it comes through."""
    for number in range(1, 30):
        reset()
        process: subprocess.Popen[str] = child(KILLED, what, place, number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), errors
        yield number
        if process.returncode == 0:
            return
    pytest.fail("the writer never came through")


def test_a_writer_of_a_file_killed_anywhere_leaves_old_or_new(child: Any, tmp_path: Path) -> None:
    place = tmp_path / "place"
    found = []
    for _ in killed_at_each_step(child, "file", place, lambda: fill(place, {"a.txt": "old a"})):
        found.append((place / "a.txt").read_text())
        remove_leftovers(place)
        assert list(place.iterdir()) == [place / "a.txt"]
    assert set(found) == {"old a", "new a" * 10_000}
    assert found == sorted(found, reverse=True), "old first, then new"


def test_a_writer_of_a_folder_killed_anywhere_leaves_old_or_new(child: Any, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    place = parent / "place"

    def reset() -> None:
        if place.exists():
            for path in sorted(place.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        fill(place, OLD)

    found = []
    for _ in killed_at_each_step(child, "folder", place, reset):
        remove_leftovers(parent)
        found.append(content(place))
        assert list(parent.iterdir()) == [place]
    assert [files for files in found if files not in (OLD, NEW)] == []
    assert found[0] == OLD
    assert found[-1] == NEW


# ---- real disks


def test_a_full_disk_leaves_what_was_there(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=64k")
    write_atomic(disk / "file.bin", b"o" * 20_000)
    with pytest.raises(GroundupError, match=f"cannot write {disk}/file.bin: no space left on the disk. Free some"):
        write_atomic(disk / "file.bin", b"n" * 100_000)
    with (
        pytest.raises(GroundupError, match=f"cannot write {disk}/place: no space"),
        atomic_folder(disk / "place") as folder,
    ):
        fill(folder, OLD)
        (folder / "big").write_bytes(b"n" * 100_000)
    assert (disk / "file.bin").read_bytes() == b"o" * 20_000
    assert list(disk.iterdir()) == [disk / "file.bin"]
    write_atomic(disk / "file.bin", b"n" * 20_000)
    assert (disk / "file.bin").read_bytes() == b"n" * 20_000


def test_a_read_only_disk_is_named(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=64k,ro")
    for write in (lambda: write_atomic(disk / "file", "x"), lambda: atomic_folder(disk / "f").__enter__()):
        with pytest.raises(GroundupError, match=f"cannot write {disk}/f.*: the file system is read-only"):
            write()
    with pytest.raises(GroundupError, match="read-only"), folder_lock(disk / "run", "training"):
        pass


# ---- JSON and checksums


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
        max_leaves=8,
    )
)
@settings(max_examples=40, deadline=None)
def test_json_comes_back(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("json") / "value.json"
    write_json(path, value)
    assert read_json(path) == value


@pytest.mark.parametrize("raw", [b"", b'{"a": 1', b"\xff\xfe", b"hello", b'{"a": NaN,}'])
def test_json_that_is_none_names_file_and_kind(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(raw)
    with pytest.raises(GroundupError, match=f"{path}: this checkpoint state is damaged or is not JSON"):
        read_json(path, "checkpoint state")
    with pytest.raises(GroundupError, match=r"cannot read checkpoint state .*other\.json: no such file"):
        read_json(tmp_path / "other.json", "checkpoint state")


def test_sha256_is_the_one_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()


@pytest.fixture
def checked(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    fill(folder, OLD)
    write_checksums(folder)
    return folder


def test_a_whole_folder_passes_and_its_list_is_what_sha256sum_says(checked: Path) -> None:
    verify_folder(checked)
    listed = json.loads((checked / "checksums.json").read_text())
    assert listed == {name: hashlib.sha256(text.encode()).hexdigest() for name, text in OLD.items()}
    write_checksums(checked)  # again, over its own list
    verify_folder(checked)


def test_a_folder_without_a_list_passes(tmp_path: Path) -> None:
    fill(tmp_path, OLD)
    verify_folder(tmp_path)
    assert not (tmp_path / "checksums.json").exists()  # looking makes no list either


def test_every_flipped_bit_is_found(checked: Path) -> None:
    """Of every file, the list itself included."""
    for path in [path for path in checked.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for bit in range(8 * len(whole)) if len(whole) < 50 else range(0, 8 * len(whole), 7):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(GroundupError):
                verify_folder(checked)
        path.write_bytes(whole)
    verify_folder(checked)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.unlink(), "a.txt: missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "a.txt: damaged"),
        (lambda path: path.write_bytes(b""), "a.txt: damaged"),
        (lambda path: (path.parent / "checksums.json").write_text("{"), "checksums.json: .*damaged"),
        (lambda path: (path.parent / "checksums.json").write_text("[1]"), "checksums.json: .*damaged"),
    ],
    ids=["removed", "cut short", "emptied", "list cut short", "no list"],
)
def test_damage_is_named(damage: Callable[[Path], Any], expected: str, checked: Path) -> None:
    damage(checked / "a.txt")
    with pytest.raises(GroundupError, match=expected):
        verify_folder(checked)


# ---- the lock

HOLD = """
import sys
from pathlib import Path
from groundup.runtime.files import folder_lock
with folder_lock(Path(sys.argv[1]), "training"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_by_one_process_and_freed_when_it_is_killed(child: Any, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "demo"
    holder = child(HOLD, run)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(GroundupError, match=f"{run}: another process is training here"), folder_lock(run, "training"):
        pass
    holder.kill()
    holder.wait()
    for _ in range(2):
        with folder_lock(run, "training"):
            pass
