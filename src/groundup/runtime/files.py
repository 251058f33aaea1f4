"""How anything is written: whole or not at all, and on the disk before it is relied on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from groundup.runtime.errors import GroundupError, os_errors

# What stands beside a path while it is written (part) or replaced (old); errors.py knows the same pattern.
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<kind>part|old)")


def _beside(path: Path, kind: str) -> Path:
    """A hidden name in the same folder, and so on the same file system, that no other writer has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")


def fsync_folder(folder: Path) -> None:
    """Make the folder's own entries (new names, renames) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file beside ``path`` and rename it into place, flushed to the disk, when the block ends well.

    A reader, or a crash, sees the old content or the new, never a part. If the block raises, nothing at ``path`` has
    changed.

    Raises:
        GroundupError: the place cannot be written (no space, no permission, …).
    """
    path = Path(path)
    temporary = _beside(path, "part")
    with os_errors(path, "cannot write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Raises:
        GroundupError: the place cannot be written (no space, no permission, …); an older file there is untouched.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as readable JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str], what: str = "file") -> Any:
    """Read a JSON file.

    Args:
        what: what the file is to a person, for the message ("checkpoint state", "data manifest").

    Raises:
        GroundupError: it is missing, cut short, or not JSON.
    """
    with os_errors(path, f"cannot read {what}"):
        raw = Path(path).read_bytes()
    try:
        return json.loads(raw)
    except (UnicodeDecodeError, ValueError) as error:
        raise GroundupError(f"{path}: this {what} is damaged or is not JSON ({error}).") from error


def part_folder(path: str | os.PathLike[str]) -> Path:
    """Make the hidden folder beside ``path`` in which several writers build what :func:`atomic_folder` puts in place.

    Raises:
        GroundupError: the place cannot be written.
    """
    path = Path(path)
    place = _beside(path, "part")
    with os_errors(path, "cannot write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir()
    return place


@contextmanager
def atomic_folder(path: str | os.PathLike[str], place: Path | None = None) -> Iterator[Path]:
    """Build a folder beside ``path`` and rename it into place when the block ends well.

    Every file in it is flushed to the disk before the rename, so that after a crash the folder is whole or absent.
    A folder that stood at ``path`` is replaced; killed between the two renames of that, it waits beside ``path`` for
    :func:`remove_leftovers` to put it back. If the block raises, nothing at ``path`` has changed.

    Args:
        place: where it is being built already, by :func:`part_folder`.

    Raises:
        GroundupError: the place cannot be written, or holds a file.
    """
    path = Path(path)
    temporary, retired = place or _beside(path, "part"), _beside(path, "old")
    with os_errors(path, "cannot write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_dir():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        if place is None:
            temporary.mkdir()
        try:
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    with open(os.path.join(folder, name), "rb") as file:
                        os.fsync(file.fileno())
                fsync_folder(Path(folder))
            if path.exists():
                os.replace(path, retired)
            os.replace(temporary, path)
            fsync_folder(path.parent)
        except BaseException:
            if retired.exists() and not path.exists():
                os.replace(retired, path)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            if path.exists():
                shutil.rmtree(retired, ignore_errors=True)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what writers killed in the middle left in ``folder`` (``.name.xxxxxxxx.part`` and ``.name.xxxxxxxx.old``).

    A folder that was being replaced and has no successor yet goes back to its place.

    Args:
        folder: where to look.
        name: only what was left of this file or folder.
    """
    if not folder.is_dir():
        return
    for entry in list(folder.iterdir()):
        left = _LEFTOVER.fullmatch(entry.name)
        if left is None or name not in (None, left["name"]):
            continue
        with suppress(OSError):  # what cannot be removed is in nobody's way
            if left["kind"] == "old" and not (folder / left["name"]).exists():
                os.replace(entry, folder / left["name"])
            elif entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def remove_folder(path: Path) -> None:
    """Remove a folder so that under its name it is whole or gone; :func:`remove_leftovers` takes the rest."""
    aside = _beside(path, "part")
    with suppress(OSError):  # somebody else removed it, or it is in nobody's way
        os.replace(path, aside)
        shutil.rmtree(aside)


def point_link(link: Path, target: str) -> None:
    """Let the symbolic link at ``link`` point to ``target``, a name in the same folder; at no moment is there none.

    Raises:
        GroundupError: the place cannot be written.
    """
    temporary = _beside(link, "part")
    with os_errors(link, "cannot write"):
        os.symlink(target, temporary)
        try:
            os.replace(temporary, link)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        GroundupError: the file cannot be read.
    """
    with os_errors(path, "cannot read"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write ``checksums.json``: the SHA-256 of every other file below ``folder``.

    Args:
        known: by file name below ``folder``, what was found while writing it and need not be read for.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "checksums.json")
    names = {path.relative_to(folder).as_posix(): path for path in files}
    found = known or {}
    write_json(folder / "checksums.json", {name: found.get(name) or sha256_file(path) for name, path in names.items()})


def verify_folder(folder: Path, from_disk: bool = False) -> None:
    """Hold a folder against its ``checksums.json``; a folder without one (not ours) passes.

    Args:
        from_disk: read what lies on the disk, not what the system still remembers of writing it (where it lets us ask;
            the files must have been flushed).

    Raises:
        GroundupError: a file is missing or its content changed.
    """
    if not (folder / "checksums.json").exists():
        return
    listed = read_json(folder / "checksums.json", "checksum list")
    if not isinstance(listed, dict):
        raise GroundupError(f"{folder / 'checksums.json'}: this checksum list is damaged: it lists nothing.")
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file():
            raise GroundupError(f"{path}: missing, though the checkpoint lists it.")
        if from_disk:
            _forget_cached(path)
        if sha256_file(path) != expected:
            raise GroundupError(f"{path}: damaged (its SHA-256 is not the one noted when it was written).")


def _forget_cached(path: Path) -> None:
    """Ask the system to drop its copy of a file from memory."""
    if not hasattr(os, "posix_fadvise"):
        return
    with os_errors(path, "cannot read"), open(path, "rb") as file, suppress(OSError):  # only a wish
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def folder_lock(folder: Path, doing: str) -> Iterator[None]:
    """Hold ``folder`` for this process while the block runs; the lock goes with the process, however it ends.

    Raises:
        GroundupError: another process holds it.
    """
    import fcntl

    with os_errors(folder, "cannot write"):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115 (held open for the whole block)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise GroundupError(
                f"{folder}: another process is {doing} here. Wait for it, or choose another --out."
            ) from error
        yield
