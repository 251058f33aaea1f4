"""The Hugging Face hub: what a repository holds, its files fetched and checked, and how not reaching it is told."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from groundup.runtime.console import warn
from groundup.runtime.download import PART, BrokenOffError, download
from groundup.runtime.errors import GroundupError, UsageError, os_errors
from groundup.runtime.files import sha256_file

TIMEOUT = 8.0  # seconds to answer before we call it offline

RepositoryType = Literal["dataset", "model"]
_CALLED = {"dataset": "data set", "model": "repository"}
_SPEC = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:@\s]+))?(?::(?P<inside>.*))?")


@dataclass(frozen=True)
class HubSpec:
    """What ``hf:owner/name@revision:path/inside`` names.

    The repository, a file or folder in it ("" for all), and a branch, tag or commit (None for the main branch).
    """

    repo: str
    inside: str
    revision: str | None = None


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
    return HubSpec(match["repo"], (match["inside"] or "").strip("/"), match["revision"])


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
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each file, where asked for checksums."""


def list_files(
    spec: str,
    repo: str,
    kind: RepositoryType = "dataset",
    *,
    revision: str | None = None,
    checksums: bool = False,
    instead: str = "",
) -> Listing:
    """The files of a repository: from the hub, else those in the cache.

    Args:
        spec: as the person wrote it, for messages.
        repo: ``owner/name``.
        kind: of the repository.
        revision: a branch, tag or commit; None for the main branch.
        checksums: whether to ask for the files' sizes and digests.
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
            info: Any = ask(repo, revision=revision, timeout=TIMEOUT, files_metadata=checksums)
    except UnreachableError:
        folder = _cached_snapshot(repo, kind, revision)
        if folder is None:
            raise
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        warn(f"{spec}: the hub cannot be reached; using its {len(names)} files that were downloaded before.")
        return Listing(folder, names, None, {})
    siblings = info.siblings or []
    digests = {entry.rfilename: digest for entry in siblings if (digest := _digest(entry))}
    sizes = {entry.rfilename: entry.size for entry in siblings if entry.size is not None}
    return Listing(None, [entry.rfilename for entry in siblings], info.sha, digests, sizes)


def fetch_file(
    spec: str, repo: str, name: str, listing: Listing, kind: RepositoryType = "dataset", *, instead: str = ""
) -> Path:
    """One file of a listing, in the hub's cache: downloaded where it is not there yet, and checked before use.

    A large file (one whose SHA-256 the hub gives) goes on where an earlier download broke off. A file whose size or
    digest is not the listing's is fetched anew, once.

    Args:
        spec, repo, kind, instead: as for :func:`list_files`.
        name: the file's, in the repository.
        listing: of that repository. One from the cache gives the file as it lies there, unchecked.

    Raises:
        GroundupError: it cannot be had, or comes damaged.
    """
    from huggingface_hub import hf_hub_download

    if listing.cached is not None:
        return listing.cached / name
    size, digest = listing.sizes.get(name), listing.checksums.get(name)
    blob = _fetch_blob(spec, repo, name, listing, kind, instead) if (digest or "").startswith("sha256:") else None
    problem: str | None = None
    for _ in range(2):
        with hub_errors(spec, kind, instead):
            path = Path(
                hf_hub_download(
                    repo,
                    name,
                    repo_type=kind,
                    revision=listing.commit,
                    endpoint=os.environ.get("HF_ENDPOINT"),
                    etag_timeout=TIMEOUT,
                )
            )
        if blob is not None and path.resolve() == blob.resolve():  # which has just been checked
            return path
        problem = damage(path, size, digest)
        if problem is None:
            return path
        with os_errors(path, "cannot remove"):
            path.resolve().unlink(missing_ok=True)  # the name in the cache is a link to the content
            path.unlink(missing_ok=True)
    raise GroundupError(
        f"{spec}: {name} is damaged ({problem}), also when fetched again, and was removed. Run the same command again "
        "later."
    )


def _fetch_blob(spec: str, repo: str, name: str, listing: Listing, kind: RepositoryType, instead: str) -> Path:
    """Put a large file into the hub's cache, where its library finds it by its SHA-256 and need not download it.

    The library itself begins a broken download anew.
    """
    from huggingface_hub import constants, get_token, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # it is there, but not in __all__

    sha256, endpoint = listing.checksums[name].removeprefix("sha256:"), os.environ.get("HF_ENDPOINT")
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=kind)
    with hub_errors(spec, kind, instead):
        url = hf_hub_url(repo, name, repo_type=kind, revision=listing.commit, endpoint=endpoint)
    token = get_token()
    blob, have = folder / "blobs" / sha256, -1
    lock = folder.parent / ".locks" / folder.name / f"{sha256}.lock"  # the library's own, for this content
    with os_errors(lock, "cannot write"):
        lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        while True:
            try:
                return download(
                    url,
                    blob,
                    size=listing.sizes.get(name),
                    sha256=sha256,
                    instead=instead or "try later",
                    authorization=f"Bearer {token}" if token else None,
                    label=name,
                )
            except BrokenOffError:
                part = blob.with_name(blob.name + PART)
                arrived = part.stat().st_size if part.exists() else 0
                if arrived <= have:  # twice in the same place
                    raise
                have = arrived


def damage(path: Path, size: int | None, digest: str | None) -> str | None:
    """What is wrong with a file; None when it has this size and this digest, as far as they are known.

    Args:
        digest: ``sha256:`` or ``git-sha1:`` and the digest in hexadecimal.

    Raises:
        GroundupError: it cannot be read.
    """
    if not path.is_file():
        return "it is missing"
    with os_errors(path, "cannot read"):
        got = path.stat().st_size
        if size is not None and got != size:
            return f"it has {got:,} bytes, the hub's {size:,}"
        if digest is None:
            return None
        algorithm, _, expected = digest.partition(":")
        found = sha256_file(path) if algorithm == "sha256" else _git_sha1(path, got)
    return None if found == expected else f"its digest is {found[:12]}…, the hub's {expected[:12]}…"


def _git_sha1(path: Path, size: int) -> str:
    """Git's own name of a file's content; the hub gives no other digest for small files."""
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(entry: Any) -> str | None:
    if entry.lfs is not None:
        return f"sha256:{entry.lfs.sha256}"
    return f"git-sha1:{entry.blob_id}" if entry.blob_id else None


def _cached_snapshot(repo: str, kind: RepositoryType, revision: str | None = None) -> Path | None:
    """The folder of the newest commit of a repository (or of this revision) that the hub's cache holds files of."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        cached = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, OSError):
        return None
    commits = [commit for one in cached if (one.repo_type, one.repo_id) == (kind, repo) for commit in one.revisions]
    if revision is not None:
        commits = [commit for commit in commits if revision == commit.commit_hash or revision in commit.refs]
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
    except errors.RevisionNotFoundError as error:
        raise GroundupError(
            f"{spec}: this {called} has no such revision. Name a branch, a tag or a whole commit after the @."
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
