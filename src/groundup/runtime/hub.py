"""The Hugging Face hub: what a repository holds, and how not reaching it is told."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from groundup.runtime.console import warn
from groundup.runtime.errors import GroundupError, UsageError

TIMEOUT = 8.0  # seconds to answer before we call it offline

RepositoryType = Literal["dataset", "model"]
_CALLED = {"dataset": "data set", "model": "repository"}
_SPEC = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<inside>.*))?")


@dataclass(frozen=True)
class HubSpec:
    """What ``hf:owner/name:path/inside`` names: the repository, and a file or folder in it ("" for all)."""

    repo: str
    inside: str


def parse_hub_spec(spec: str, what: str = "a data set") -> HubSpec:
    """Take an ``hf:`` spec apart.

    Args:
        spec: as the person wrote it.
        what: what it should name, for the message.

    Raises:
        UsageError: it is not one.
    """
    match = _SPEC.fullmatch(spec.strip())
    if match is None:
        raise UsageError(f"{spec}: {what} of the hub is written hf:owner/name or hf:owner/name:path/inside.")
    return HubSpec(match["repo"], (match["inside"] or "").strip("/"))


@dataclass(frozen=True)
class Listing:
    """The files of a repository, by name in it."""

    cached: Path | None
    """The folder where they lie, when the hub did not answer and they were downloaded before."""
    files: list[str]
    commit: str | None
    """What they belong to, when the hub answered."""
    checksums: dict[str, str]
    """Per file that has one: ``sha256:`` or ``git-sha1:`` and the digest in hexadecimal, where asked for."""


def list_files(
    spec: str, repo: str, kind: RepositoryType = "dataset", *, checksums: bool = False, instead: str = ""
) -> Listing:
    """The files of a repository: from the hub, else those in the cache.

    Args:
        spec: as the person wrote it, for messages.
        repo: ``owner/name``.
        kind: of the repository.
        checksums: whether to ask for the files' digests.
        instead: what else a person can do without a network, for messages.

    Raises:
        GroundupError: the hub does not answer and nothing is cached, or there is no such repository.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        with hub_errors(spec, kind, instead):
            # These, unlike list_repo_files, give up at once where there is no network.
            ask = api.dataset_info if kind == "dataset" else api.model_info
            info: Any = ask(repo, timeout=TIMEOUT, files_metadata=checksums)
    except UnreachableError:
        folder = _cached_snapshot(repo, kind)
        if folder is None:
            raise
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        warn(f"{spec}: the hub cannot be reached; using its {len(names)} files that were downloaded before.")
        return Listing(folder, names, None, {})
    siblings = info.siblings or []
    digests = {entry.rfilename: digest for entry in siblings if (digest := _digest(entry))}
    return Listing(None, [entry.rfilename for entry in siblings], info.sha, digests)


def _digest(entry: Any) -> str | None:
    if entry.lfs is not None:
        return f"sha256:{entry.lfs.sha256}"
    return f"git-sha1:{entry.blob_id}" if entry.blob_id else None


def _cached_snapshot(repo: str, kind: RepositoryType) -> Path | None:
    """The folder of the newest commit of a repository that the hub's cache holds files of."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        cached = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, OSError):
        return None
    commits = [commit for one in cached if (one.repo_type, one.repo_id) == (kind, repo) for commit in one.revisions]
    newest = max((commit for commit in commits if commit.files), key=lambda one: one.last_modified, default=None)
    return Path(newest.snapshot_path) if newest is not None else None


class UnreachableError(GroundupError):
    """The hub does not answer, or offline mode is set."""


@contextmanager
def hub_errors(spec: str, kind: RepositoryType = "dataset", instead: str = "") -> Iterator[None]:
    """Turn what huggingface_hub raises into one line each.

    Args:
        spec: as the person wrote it.
        kind: of the repository.
        instead: what else a person can do without a network.

    Raises:
        GroundupError: the block raised.
    """
    from huggingface_hub import errors

    called = _CALLED[kind]
    otherwise = f", or {instead}" if instead else ""

    # Before 1.0 it raised the errors of requests, which are OSErrors; now those of httpx, which are not.
    network: tuple[Any, ...] = (OSError, getattr(errors, "HTTPError", OSError))
    try:
        yield
    except errors.GatedRepoError as error:
        raise GroundupError(
            f"{spec}: this {called} is gated. Accept its terms on its page, then run: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise GroundupError(
            f"{spec}: the hub knows no such {called}, or it is private. "
            "Check the name; for a private one run: hf auth login"
        ) from error
    except errors.HFValidationError as error:
        raise UsageError(f"{spec}: {error}") from error
    except errors.OfflineModeIsEnabled as error:
        raise UnreachableError(
            f"{spec}: HF_HUB_OFFLINE is set and this {called} is not in the cache. Unset it{otherwise}."
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise GroundupError(f"{spec}: the hub answered {status}. Check the name, or try again later.") from error
    except network as error:
        raise UnreachableError(
            f"{spec}: the hub cannot be reached ({_short(error)}). Check the network{otherwise}."
        ) from error


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
