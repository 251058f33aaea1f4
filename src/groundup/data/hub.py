"""Data sets of the Hugging Face hub: which of their files to read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from groundup.data.decode import COMPRESSIONS
from groundup.data.document import Document, Dropped
from groundup.data.files import read_file
from groundup.runtime import GroundupError
from groundup.runtime.errors import nearest
from groundup.runtime.hub import fetch_file, list_files, parse_hub_spec

_INSTEAD = "pass a local path with --data"

# Where a data set is published in several formats, one of them is read: the first of these that it has.
_FORMATS = (".parquet", ".jsonl", ".json", ".txt", ".csv", ".tsv")
_HELD_OUT = re.compile(r"(^|[^a-z])(test|valid|validation|val|dev|eval)([^a-z]|$)", re.IGNORECASE)
_TRAIN = re.compile(r"(^|[^a-z])train", re.IGNORECASE)


def hub_documents(spec: str, skip: Callable[[Dropped], None]) -> Iterator[Document]:
    """Yield the documents of a data set, downloading its files into the hub's cache as they are reached.

    Raises:
        GroundupError: as :func:`hub_files`, or a file holds no text.
    """
    for name, path in hub_files(spec):
        yield from read_file(path, skip, name=f"{parse_hub_spec(spec).repo}/{name}")


def hub_files(spec: str) -> Iterator[tuple[str, Path]]:
    """Yield the files of a data set, by name in it and path here, each downloaded when it is asked for.

    Without a network, files that the cache holds already are used, and a warning says so.

    Raises:
        GroundupError: the hub cannot be reached, or the data set or the path in it is unknown, gated or has no text.
    """
    wanted = parse_hub_spec(spec)
    listing = list_files(spec, wanted.repo, revision=wanted.revision, instead=_INSTEAD)
    for name in choose_files(spec, listing.files, wanted.inside):
        yield name, fetch_file(spec, wanted.repo, name, listing, instead=_INSTEAD)


def choose_files(spec: str, names: list[str], inside: str) -> list[str]:
    """Choose the files of a data set to read.

    Those at or below ``inside``, of the best format there is, of the training part where there is one, and
    never of parts called test or validation unless ``inside`` says so.

    Args:
        spec: as the person wrote it, for messages.
        names: all files of the repository.
        inside: a file or folder, or "" for all.

    Raises:
        GroundupError: nothing is left, or files of several folders are, between which we must not guess.
    """
    here = [name for name in names if not inside or name == inside or name.startswith(inside + "/")]
    if not here:
        folders = {str(parent) for name in names for parent in PurePosixPath(name).parents} - {"."}
        raise GroundupError(
            f"{spec}: there is no {inside} in this data set.{nearest(inside, sorted(folders | set(names)))}"
        )
    if inside in names:
        return [inside]
    readable = [name for name in here if _format(name) in _FORMATS and not PurePosixPath(name).name.startswith(".")]
    best = next((suffix for suffix in _FORMATS if any(_format(name) == suffix for name in readable)), None)
    files = [name for name in readable if _format(name) == best and name != "dataset_infos.json"]
    below = {name: name[len(inside) :] for name in files}
    training = [name for name in files if _TRAIN.search(below[name])]
    files = sorted(training or [name for name in files if not _HELD_OUT.search(below[name])] or files)
    if not files:
        raise GroundupError(
            f"{spec}: no text we can read in this data set (parquet, jsonl, json, txt, csv). Name a file in it."
        )
    folders = {str(PurePosixPath(name).parent) for name in files}
    if len(folders) > 1:
        shown = ", ".join(sorted(folders)[:8]) + (", …" if len(folders) > 8 else "")
        raise GroundupError(
            f"{spec}: this data set has several parts: {shown}. Choose one, as in hf:owner/name:{min(folders)}"
        )
    return files


def _format(name: str) -> str:
    path = PurePosixPath(name)
    return (PurePosixPath(path.stem) if path.suffix in COMPRESSIONS else path).suffix
