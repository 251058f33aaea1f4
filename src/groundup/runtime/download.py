"""One file from the web: goes on where it was cut off, and is in place only when it is whole."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from groundup.runtime.console import progress
from groundup.runtime.errors import GroundupError, os_errors
from groundup.runtime.files import fsync_folder, sha256_file

TIMEOUT = 8.0  # seconds without a connection or a byte: who is offline learns it soon
PART = ".part"
_CHUNK = 1 << 20


class BrokenOffError(GroundupError):
    """The connection was cut in the middle of a file; what has arrived is kept for the next try."""


def default_data_dir() -> Path:
    """Where downloads are kept: ``$GROUNDUP_DATA``, else ``~/.cache/groundup/data``."""
    chosen = os.environ.get("GROUNDUP_DATA")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "groundup" / "data"


def download(
    url: str,
    path: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    instead: str = "pass a file you have with --data PATH",
    authorization: str | None = None,
    label: str | None = None,
) -> Path:
    """Download ``url`` to ``path``; a file that is there and whole is kept.

    What has arrived lies in ``<name>.part`` beside it until it is whole, so the same call later goes on from
    there.

    Args:
        url: http or https.
        path: where the file goes.
        size: its bytes, where known.
        sha256: its SHA-256, where known.
        instead: what a person who has the file already can do, for messages.
        authorization: a header of that name; sent to this server only, never to where it redirects.
        label: what the progress bar calls it; None for the name of ``path``.

    Returns:
        ``path``.

    Raises:
        BrokenOffError: the connection was cut; what arrived is kept.
        GroundupError: no connection, the server's refusal, a wrong file, or no place to write.
    """
    if path.is_file() and (sha256 is None or sha256_file(path) == sha256):
        return path
    part = path.with_name(path.name + PART)
    with os_errors(path, "cannot write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, part, size, instead, authorization, label or path.name)
    try:
        _check(url, part, size, sha256, instead)
    except GroundupError:
        part.unlink(missing_ok=True)
        raise
    with os_errors(path, "cannot write"):
        os.replace(part, path)
        fsync_folder(path.parent)
    return path


def _fetch(url: str, part: Path, size: int | None, instead: str, authorization: str | None, label: str) -> None:
    """Append to ``part`` what is missing of it."""
    have = part.stat().st_size if part.exists() else 0
    if size is not None and have >= size:  # whole, or wrong: _check tells
        return
    try:
        with _open_from(url, have, authorization) as answer, open(part, "ab" if answer.status == 206 else "wb") as file:
            have = have if answer.status == 206 else 0  # a server that knows no ranges sends all of it again
            expected = have + int(answer.headers.get("Content-Length") or 0)
            with progress(f"downloading {label}", size or expected or None, "bytes") as bar:
                bar.update(have)
                while block := _read(answer, url, part):
                    file.write(block)
                    bar.advance(len(block))
            file.flush()
            os.fsync(file.fileno())
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # the part is not a beginning of what the server has now
            part.unlink()
            _fetch(url, part, size, instead, authorization, label)
            return
        raise GroundupError(
            f"{url}: the server answered {error.code} {error.reason}. Try again later, or {instead}."
        ) from error
    except (urllib.error.URLError, TimeoutError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise GroundupError(f"{url}: no connection ({reason}). Check the network, or {instead}.") from error
    got = part.stat().st_size
    if got < (size or expected):
        raise _cut_off(url, got)


def _open_from(url: str, offset: int, authorization: str | None) -> Any:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"not a web address: {url}")
    headers = {"User-Agent": "groundup"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    request = urllib.request.Request(url, headers=headers)
    if authorization is not None:
        request.add_unredirected_header("Authorization", authorization)
    return urllib.request.urlopen(request, timeout=TIMEOUT)


def _read(answer: Any, url: str, part: Path) -> bytes:
    try:
        return bytes(answer.read1(_CHUNK))
    except (OSError, http.client.HTTPException) as error:
        raise _cut_off(url, part.stat().st_size) from error


def _cut_off(url: str, got: int) -> BrokenOffError:
    return BrokenOffError(
        f"{url}: the connection broke off. Run the same command again: it goes on after {got:,} bytes."
    )


def _check(url: str, part: Path, size: int | None, sha256: str | None, instead: str) -> None:
    got = part.stat().st_size
    if size is not None and got != size:
        raise GroundupError(f"{url}: {got:,} bytes arrived, {size:,} expected. Run the same command again.")
    if sha256 is not None:
        digest = sha256_file(part)
        if digest != sha256:
            raise GroundupError(
                f"{url}: not the file it should be (SHA-256 {digest[:12]}…, expected {sha256[:12]}…). "
                f"Run the same command again; if it stays so, the file has changed: {instead}."
            )
