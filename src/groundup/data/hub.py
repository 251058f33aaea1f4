"""Data sets of the Hugging Face hub: which of their files to read, and how not reaching them is told."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from groundup.data.decode import COMPRESSIONS
from groundup.data.document import Document, Dropped
from groundup.data.files import read_file
from groundup.runtime import GroundupError, UsageError, warn
from groundup.runtime.errors import nearest

TIMEOUT = 8.0  # seconds to answer before we call it offline

# Where a data set is published in several formats, one of them is read: the first of these that it has.
_FORMATS = (".parquet", ".jsonl", ".json", ".txt", ".csv", ".tsv")
_SPEC = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<inside>.*))?")
_HELD_OUT = re.compile(r"(^|[^a-z])(test|valid|validation|val|dev|eval)([^a-z]|$)", re.IGNORECASE)
_TRAIN = re.compile(r"(^|[^a-z])train", re.IGNORECASE)


@dataclass(frozen=True)
class HubSpec:
    """What ``hf:owner/name:path/inside`` names: the repository, and a file or folder in it ("" for all)."""

    repo: str
    inside: str


def parse_hub_spec(spec: str) -> HubSpec:
    """Take an ``hf:`` spec apart.

    Raises:
        UsageError: it is not one.
    """
    match = _SPEC.fullmatch(spec.strip())
    if match is None:
        raise UsageError(f"{spec}: a data set of the hub is written hf:owner/name or hf:owner/name:path/inside.")
    return HubSpec(match["repo"], (match["inside"] or "").strip("/"))


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
    from huggingface_hub import hf_hub_download

    wanted = parse_hub_spec(spec)
    cached, names, commit = _list_files(spec, wanted.repo)
    for name in choose_files(spec, names, wanted.inside):
        if cached is not None:
            yield name, cached / name
            continue
        with _hub_errors(spec):
            path = hf_hub_download(
                wanted.repo,
                name,
                repo_type="dataset",
                revision=commit,
                endpoint=os.environ.get("HF_ENDPOINT"),
                etag_timeout=TIMEOUT,
            )
        yield name, Path(path)


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


def _list_files(spec: str, repo: str) -> tuple[Path | None, list[str], str | None]:
    """The files of a data set: from the hub, else those in the cache.

    Returns:
        The cached snapshot's folder (None when the hub answered), the files' names, and the commit they
        belong to.
    """
    from huggingface_hub import HfApi

    try:
        with _hub_errors(spec):
            # dataset_info, unlike list_repo_files, gives up at once where there is no network.
            info = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).dataset_info(repo, timeout=TIMEOUT)
    except UnreachableError:
        folder = _cached_snapshot(repo)
        if folder is None:
            raise
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        warn(f"{spec}: the hub cannot be reached; using its {len(names)} files that were downloaded before.")
        return folder, names, None
    return None, [sibling.rfilename for sibling in info.siblings or []], info.sha


def _cached_snapshot(repo: str) -> Path | None:
    """The folder of the newest commit of a data set that the hub's cache holds files of."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        cached = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, OSError):
        return None
    commits = [
        commit for one in cached if (one.repo_type, one.repo_id) == ("dataset", repo) for commit in one.revisions
    ]
    newest = max((commit for commit in commits if commit.files), key=lambda one: one.last_modified, default=None)
    return Path(newest.snapshot_path) if newest is not None else None


class UnreachableError(GroundupError):
    """The hub does not answer, or offline mode is set."""


@contextmanager
def _hub_errors(spec: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line each."""
    from huggingface_hub import errors

    # Before 1.0 it raised the errors of requests, which are OSErrors; now those of httpx, which are not.
    network: tuple[Any, ...] = (OSError, getattr(errors, "HTTPError", OSError))
    try:
        yield
    except errors.GatedRepoError as error:
        raise GroundupError(
            f"{spec}: this data set is gated. Accept its terms on its page, then run: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise GroundupError(
            f"{spec}: the hub knows no such data set, or it is private. "
            "Check the name; for a private one run: hf auth login"
        ) from error
    except errors.HFValidationError as error:
        raise UsageError(f"{spec}: {error}") from error
    except errors.OfflineModeIsEnabled as error:
        raise UnreachableError(
            f"{spec}: HF_HUB_OFFLINE is set and this data set is not in the cache. "
            "Unset it, or pass a local path with --data."
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise GroundupError(f"{spec}: the hub answered {status}. Check the name, or try again later.") from error
    except network as error:
        raise UnreachableError(
            f"{spec}: the hub cannot be reached ({_short(error)}). Check the network, or pass a local path with --data."
        ) from error


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
