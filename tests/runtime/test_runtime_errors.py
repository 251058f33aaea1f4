"""Every error of the operating system ends in one line that names the path and the mend."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.runtime import GroundupError, UsageError, os_errors
from groundup.runtime.errors import nearest

MENDS = {
    "ENOSPC": "no space left on the disk. Free some or choose another --out",
    "EDQUOT": "the disk quota is used up. Free some",
    "EACCES": "no permission. Choose a folder you may write to",
    "EPERM": "not permitted. Choose a folder you may write to",
    "EROFS": "the file system is read-only. Choose another folder",
    "ENOENT": "no such file or folder. Check the path",
    "ENOTDIR": "a part of this path is a file, not a folder. Choose another path",
    "EISDIR": "this is a folder, a file was expected",
    "EEXIST": "something of that name is there already. Choose another path",
    "ENAMETOOLONG": "the name is too long. Choose a shorter path",
    "EFBIG": "ulimit -f",
    "EIO": "the disk reported an error. Check the disk",
    "EMFILE": "too many open files. Raise the limit (ulimit -n)",
}


@pytest.mark.parametrize(("name", "mend"), MENDS.items())
def test_each_known_error_names_path_and_mend(name: str, mend: str) -> None:
    code = getattr(errno, name)
    for error in (OSError(code, os.strerror(code)), OSError(code, os.strerror(code), "runs/mine/recipe.yaml")):
        with pytest.raises(GroundupError) as raised, os_errors(Path("runs/mine"), "cannot write"):
            raise error
        line = str(raised.value)
        assert line.startswith(f"cannot write {error.filename or 'runs/mine'}: ")
        assert mend in line
        assert line.endswith(".")
        assert "\n" not in line
        assert raised.value.exit_code == 1
        assert raised.value.__cause__ is error


def test_an_unknown_error_keeps_its_own_words() -> None:
    with pytest.raises(GroundupError, match=f"^cannot use x: {os.strerror(errno.ELOOP)}.$"), os_errors("x"):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    with pytest.raises(GroundupError, match=r"^cannot use x: socket closed\.$"), os_errors("x"):
        raise OSError("socket closed")


def test_other_errors_pass_through() -> None:
    with pytest.raises(ZeroDivisionError), os_errors("x"):
        raise ZeroDivisionError
    with pytest.raises(UsageError, match=r"^as it was$"), os_errors("x"):
        raise UsageError("as it was")


REAL = {
    "absent/file": "no such file or folder",
    "file/below": "a part of this path is a file",
    "folder": "this is a folder",
    "n" * 300: "the name is too long",
}


@pytest.mark.parametrize(("path", "mend"), REAL.items())
def test_the_real_errors_of_opening_a_file(path: str, mend: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(GroundupError, match=f"cannot read {tmp_path / path}: {mend}"), os_errors("?", "cannot read"):
        (tmp_path / path).open()


LIMITED = """
import os, resource, signal, sys
from pathlib import Path
from groundup.runtime import GroundupError, write_atomic

limit, place = sys.argv[1], Path(sys.argv[2])
if limit == "size":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
elif limit == "files":
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
elif os.geteuid() == 0:
    os.setuid(65534)
try:
    write_atomic(place / "file", b"x" * 2000)
except GroundupError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("limit", "mend"), [("size", "ulimit -f"), ("files", "ulimit -n"), ("rights", "no permission")]
)
def test_the_limits_of_a_process_are_named(limit: str, mend: str, child: Any, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir(mode=0o555)
    output, errors = child(LIMITED, limit, place).communicate(timeout=60)
    if limit != "rights" and os.geteuid() != 0:
        place.chmod(0o755)
        output, errors = child(LIMITED, limit, place).communicate(timeout=60)
    assert errors == ""
    assert f"cannot write {place}/file: " in output or f"cannot write {place}: " in output
    assert mend in output
    assert list(place.iterdir()) == []


# ---- the nearest known word


@pytest.mark.parametrize(
    ("word", "nearest_one"),
    [
        ("pretrian", "pretrain"),
        ("n_layers", "model.n_layer"),
        ("modle.n_layer", "model.n_layer"),
        ("optim.n_layer", "model.n_layer"),
        ("learning_rat", "optim.learning_rate"),
        ("rates", "model.rate"),
        ("zzz", None),
        ("", None),
    ],
)
def test_the_nearest_known_word(word: str, nearest_one: str | None) -> None:
    known = ["pretrain", "generate", "model.n_layer", "model.n_head", "optim.learning_rate", "model.rate"]
    assert nearest(word, known) == (f" Did you mean {nearest_one}?" if nearest_one else "")


@given(st.text(), st.lists(st.text(min_size=1), unique=True))
def test_a_known_word_is_its_own_nearest(word: str, known: list[str]) -> None:
    if word:
        assert nearest(word, [*known, word]) == f" Did you mean {word}?"
    found = nearest(word, known)
    assert found == "" or found.removeprefix(" Did you mean ").removesuffix("?") in known
