"""Your own text: a file, or a folder of files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from groundup.data import records
from groundup.data.decode import UnreadableFile, decoded, split_stream
from groundup.data.document import Document, Dropped, count_reasons, printable
from groundup.runtime import GroundupError, os_errors

SEPARATOR = "<|endoftext|>"  # between the documents of one .txt file, as TinyStories and others publish them

LONGEST_DOCUMENT = 1 << 25  # characters; a longer text becomes several documents, so that any file can be read

_TOOL_FOLDERS = {"node_modules", "__pycache__"}
_MACHINE_MADE = (  # what tells a folder no person wrote: a virtual environment, a run, a prepared corpus
    {"pyvenv.cfg"},
    {"recipe.yaml", "environment.json"},
    {"stats.json", "dropped.jsonl"},
)

Skip = Callable[[Dropped], None]


def read_file(path: Path, skip: Skip, name: str | None = None) -> Iterator[Document]:
    """Yield the documents of one file: its records, its parts between ``<|endoftext|>``, or the whole as one.

    A text that is longer than ``LONGEST_DOCUMENT`` becomes several documents, each ending with a line.

    Args:
        path: the file; .gz, .bz2, .xz (and .zst from Python 3.14 on) are decompressed.
        skip: is told of records without a text.
        name: what the documents are called; the file's own name where None.

    Raises:
        UnreadableFile: it is empty, binary, in another encoding than UTF-8, or damaged.
        GroundupError: it cannot be opened.
    """
    name = name or printable(path.name)
    suffix = records.suffix_of(path)
    found = False
    with os_errors(path, "cannot read"):
        documents = (
            records.read_records(path, suffix, name, skip)
            if suffix in records.SUFFIXES
            else _text_documents(path, suffix, name)
        )
        for document in documents:
            found = True
            yield document
    if not found:
        raise UnreadableFile(path, "empty", "there is no text in this file.")


def _text_documents(path: Path, suffix: str, name: str) -> Iterator[Document]:
    parts = split_stream(decoded(path), SEPARATOR if suffix == ".txt" else None, LONGEST_DOCUMENT)
    texts = (part for part in parts if part and not part.isspace())
    for number, text in enumerate(texts, 1):
        yield Document(text, name if number == 1 else f"{name}#{number}")


def read_folder(folder: Path, skip: Skip) -> Iterator[Document]:
    """Yield the documents of all text files in a folder and below, in the order of their sorted paths.

    A file that cannot be used (binary, not UTF-8, damaged, empty) is skipped and told to ``skip``, as are
    hidden folders and folders that tools made. Where a file is damaged in the middle, the records before that
    are kept.

    Raises:
        GroundupError: there is no text in the folder, or it cannot be opened.
    """
    skipped: list[Dropped] = []

    def note(dropped: Dropped) -> None:
        skipped.append(dropped)
        skip(dropped)

    found = False
    for path in _walk(folder, note):
        name = _label(path, folder)
        try:
            for document in read_file(path, skip, name):
                found = True
                yield document
        except UnreadableFile as error:
            note(Dropped(name, error.reason, error.detail))
        except GroundupError as error:
            note(Dropped(name, "cannot be read", str(error)))
    if not found:
        reasons = ", ".join(f"{count} {reason}" for reason, count in count_reasons(skipped).items())
        raise GroundupError(
            f"{folder}: no text in this folder ({reasons or 'it is empty'}). "
            "Put .txt, .md, .jsonl or other UTF-8 text files there."
        )


def files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """All files that :func:`read_folder` would look at, in its order, with their paths in the folder.

    Raises:
        GroundupError: the folder cannot be opened.
    """
    for path in _walk(folder, lambda _: None):
        yield _label(path, folder), path


def _walk(folder: Path, skip: Skip) -> Iterator[Path]:
    """All regular files below ``folder`` but those in hidden and tool-made folders, sorted."""
    with os_errors(folder, "cannot read"):
        os.listdir(folder)

    def unreadable(error: OSError) -> None:
        skip(Dropped(_label(error.filename, folder), "cannot be read", error.strerror or ""))

    for here, folders, names in os.walk(folder, onerror=unreadable):
        kept = []
        for name in sorted(folders):
            if name.startswith(".") or name in _TOOL_FOLDERS or _is_machine_made(Path(here, name)):
                skip(Dropped(_label(Path(here, name), folder), "hidden or tool folder"))
            else:
                kept.append(name)
        folders[:] = kept
        for name in sorted(names):
            path = Path(here, name)
            if name.startswith("."):
                skip(Dropped(_label(path, folder), "hidden file"))
            elif not path.is_file():
                skip(Dropped(_label(path, folder), "not a regular file"))
            else:
                yield path


def _label(path: str | Path, folder: Path) -> str:
    return printable(Path(os.path.relpath(path, folder)).as_posix())


def _is_machine_made(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in _MACHINE_MADE)


def path_identity(path: Path) -> dict[str, Any]:
    """What tells one state of a file or folder from another, unread: paths, sizes, times of change.

    Returns:
        The number of files, their bytes, and a hash over every file's relative path, size and mtime in
        nanoseconds.
    """
    listing = hashlib.sha256()
    count = size = 0
    files = _walk(path, lambda _: None) if path.is_dir() else iter([path])
    for file in files:
        with os_errors(file, "cannot read"):
            status = file.stat()
        listing.update(
            f"{file.relative_to(path)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape")
        )
        count += 1
        size += status.st_size
    return {"path": printable(str(path.resolve())), "files": count, "bytes": size, "sha256": listing.hexdigest()}
