"""Where the files of a corpus can lie other than on this disk: the hub, a web server, object storage.

A place does one thing: it brings one of its files into a path here. What is known of the file, its size and its
SHA-256, is held against what arrived before the path exists, and a transfer that breaks off is tried again.
"""

from __future__ import annotations

import errno
import fcntl
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from groundup.runtime import GroundupError, UsageError, os_errors, sha256_file
from groundup.runtime.download import PART, TIMEOUT
from groundup.runtime.errors import mend
from groundup.runtime.hub import HubSpec, UnreachableError, list_files, parse_hub_spec

_PAUSES = (1.0, 5.0, 25.0, 60.0)  # seconds before a transfer is tried again; storage far away fails now and then
_CHUNK = 1 << 20
_OUR_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
_IN_FOLDER = re.compile(r"(hf:[\w.-]+/[\w.-]+(?:@[^:/\s]+)?)/(.+)")


class MissingError(GroundupError):
    """There is no such file in the place."""


class Place(Protocol):
    """Somewhere files can be read from."""

    @property
    def url(self) -> str:
        """As the person wrote it, for messages."""

    def read_into(self, name: str, part: Path) -> None:
        """Write a file's content to ``part``; where ``part`` holds a beginning of it, that may be gone on from.

        Raises:
            FileNotFoundError: there is no such file.
            PermissionError: it may not be read.
            Exception: whatever the place's own library raises when it cannot be reached.
        """


def is_remote(data: str) -> bool:
    """Whether ``data`` names something that does not lie on this disk: ``hf:owner/name``, ``s3://bucket/folder``."""
    return data.startswith("hf:") or "://" in data


def open_place(url: str) -> Place:
    """The place that ``url`` names. Of the hub the list of files is read, of others nothing.

    Args:
        url: ``hf:owner/name[@revision][/folder]`` (a data set; ``:folder`` means the same), ``https://…``, or whatever
            fsspec can read, such as ``s3://bucket/folder``.

    Raises:
        UsageError: nothing can read such an address, or it takes a package that is not there.
        GroundupError: the hub cannot be reached, or knows no such data set.
    """
    url = url.rstrip("/")
    if url.startswith("hf:"):
        return _Hub.open(url)
    if url.startswith(("http://", "https://")):
        return _Web(url)
    return _Storage.open(url)


def hub_folder(url: str) -> HubSpec:
    """Take ``hf:owner/name/folder`` or ``hf:owner/name:folder`` apart.

    Raises:
        UsageError: it is neither.
    """
    return parse_hub_spec(_IN_FOLDER.sub(r"\1:\2", url.strip().rstrip("/")))


def fetch(
    place: Place, name: str, path: Path, size: int | None = None, sha256: str | None = None, patient: bool = False
) -> Path:
    """Bring a file here, whole and checked. The caller holds ``path`` (:func:`locked`).

    Args:
        place: where it lies.
        name: the file's, in the place.
        path: where it goes; what is there is replaced.
        size: its bytes, where known.
        sha256: its SHA-256, where known; only then a transfer goes on where another broke off.
        patient: whether to try for minutes, as a run that trains should, or once again, as for somebody who waits.

    Returns:
        ``path``.

    Raises:
        MissingError: there is no such file.
        GroundupError: it cannot be read, arrives damaged, or cannot be written here.
    """
    part, where = path.with_name(path.name + PART), f"{place.url}/{name}"
    problem, pauses = "", _PAUSES if patient else _PAUSES[:1]
    with os_errors(path.parent, "cannot write"):
        path.parent.mkdir(parents=True, exist_ok=True)
    for pause in (*pauses, None):
        try:
            if sha256 is None:  # a beginning that lies here may be one of another file
                part.unlink(missing_ok=True)
            place.read_into(name, part)
            problem = _damage(part, size, sha256)
        except (UnreachableError, UsageError):
            raise
        except FileNotFoundError as error:
            raise MissingError(f"{where}: there is no such file. Check the address.") from error
        except PermissionError as error:
            raise GroundupError(f"{where}: it may not be read ({_short(error)}). Check your credentials.") from error
        except Exception as error:  # every storage's library has errors of its own
            if isinstance(error, OSError) and error.errno in _OUR_DISK:
                raise GroundupError(f"cannot write {path}: {mend(error)}.") from error
            problem = f"cannot be read ({_short(error)})"
        if not problem:
            with os_errors(path, "cannot write"):
                os.replace(part, path)
            return path
        if pause is not None:
            time.sleep(pause)
    raise GroundupError(f"{where}: {problem}, after {len(pauses) + 1} tries. Check the network, and run again.")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold ``path`` against other threads and processes while the block runs; waits for whoever holds it."""
    with os_errors(path, "cannot write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_name(f".{path.name}.lock"), "w")  # noqa: SIM115 (held open for the whole block)
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class _Web:
    """A folder of a web server."""

    url: str
    address: str | None = None
    authorization: str | None = None

    def read_into(self, name: str, part: Path) -> None:
        have = part.stat().st_size if part.exists() else 0
        headers = {"User-Agent": "groundup"} | ({"Range": f"bytes={have}-"} if have else {})
        request = urllib.request.Request(f"{self.address or self.url}/{quote(name)}", headers=headers)
        if self.authorization is not None:  # never sent to where the server redirects
            request.add_unredirected_header("Authorization", self.authorization)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                begun = have if answer.status == 206 else 0  # a server that knows no ranges sends all of it again
                with open(part, "ab" if begun else "wb") as file:
                    shutil.copyfileobj(answer, file, _CHUNK)
                    arrived = file.tell() - begun
        except urllib.error.HTTPError as error:
            if error.code == 416:  # what lies here is no beginning of what the server has
                part.unlink()
            if error.code in (404, 410):
                raise FileNotFoundError(error.code, error.reason) from error
            if error.code in (401, 403):
                raise PermissionError(error.code, error.reason) from error
            raise
        expected = answer.headers.get("Content-Length")
        if expected is not None and arrived < int(expected):
            raise http.client.IncompleteRead(b"", int(expected) - arrived)


@dataclass(frozen=True)
class _Hub:
    """A folder of a data set of the hub, at one commit."""

    url: str
    web: _Web
    inside: str
    files: frozenset[str]

    @classmethod
    def open(cls, url: str) -> _Hub:
        from huggingface_hub import get_token, hf_hub_url

        spec = hub_folder(url)
        listing = list_files(url, spec.repo, revision=spec.revision)
        if listing.commit is None:  # the hub's own cache, of files that are read otherwise
            raise UnreachableError(f"{url}: the hub cannot be reached. Check the network.")
        endpoint = os.environ.get("HF_ENDPOINT")
        base = hf_hub_url(spec.repo, "x", repo_type="dataset", revision=listing.commit, endpoint=endpoint)
        token = get_token()
        web = _Web(url, base.removesuffix("/x"), f"Bearer {token}" if token else None)
        return cls(url, web, f"{spec.inside}/" if spec.inside else "", frozenset(listing.files))

    def read_into(self, name: str, part: Path) -> None:
        if self.inside + name not in self.files:
            raise FileNotFoundError(name)
        self.web.read_into(self.inside + name, part)


@dataclass(frozen=True)
class _Storage:
    """A folder of whatever fsspec has a package for."""

    url: str
    files: Any
    root: str

    @classmethod
    def open(cls, url: str) -> _Storage:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]  # torch and the hub's library bring it
        from fsspec.registry import known_implementations  # type: ignore[import-untyped]

        protocol = url.partition("://")[0]
        try:
            files, root = url_to_fs(url)
        except ImportError as error:
            package = known_implementations.get(protocol, {"class": ""})["class"].partition(".")[0]
            needs = f"needs {package}: pip install {package}" if package not in ("", "fsspec") else str(error)
            raise UsageError(f"{url}: reading {protocol}:// {needs}") from error
        except ValueError as error:
            raise UsageError(
                f"{url}: nothing here reads {protocol}://. There are hf:owner/name, https://, s3://, gs:// and others "
                "of fsspec."
            ) from error
        return cls(url, files, str(root).rstrip("/"))

    def read_into(self, name: str, part: Path) -> None:
        part.unlink(missing_ok=True)
        self.files.get_file(f"{self.root}/{name}", str(part))


@dataclass(frozen=True)
class Unreachable:
    """A place that did not answer when it was opened: only what was fetched before can be used."""

    url: str
    why: str

    def read_into(self, name: str, part: Path) -> None:
        """Say again why."""
        raise UnreachableError(self.why)


def _damage(part: Path, size: int | None, sha256: str | None) -> str:
    """What is wrong with what arrived, "" where nothing is. What is wrong otherwise than by its end is removed."""
    got = part.stat().st_size
    if size is not None and got < size:
        return f"broke off after {got:,} of {size:,} bytes"
    if (size is not None and got > size) or (sha256 is not None and sha256_file(part) != sha256):
        part.unlink()
        return "arrives damaged, not with the manifest's size and SHA-256"
    return ""


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
