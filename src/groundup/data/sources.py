"""Where text comes from: one string names the place, ``open_source`` turns it into documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundup.data.document import Document, Dropped, Source, printable
from groundup.data.files import path_identity, read_file, read_folder
from groundup.data.hub import hub_documents, hub_files
from groundup.data.stdlib_source import stdlib_documents, stdlib_identity
from groundup.runtime import GroundupError, UsageError
from groundup.runtime.download import default_data_dir, download
from groundup.runtime.errors import nearest
from groundup.runtime.hub import parse_hub_spec

__all__ = [
    "NAMED_SOURCES",
    "Document",
    "NamedSource",
    "Source",
    "default_data_dir",
    "get_source",
    "open_source",
]


@dataclass(frozen=True)
class NamedSource:
    """A corpus with a short name.

    Args:
        description: one line for people.
        licence: as its publisher states it.
        size: bytes to download; None where nothing is.
        url: the file to download, or None.
        hub: the ``hf:`` spec to read, or None.
        sha256: of the file at ``url``.
    """

    description: str
    licence: str
    size: int | None = None
    url: str | None = None
    hub: str | None = None
    sha256: str | None = None


NAMED_SOURCES: dict[str, NamedSource] = {
    "stdlib": NamedSource(
        description="documentation and source of the Python standard library on this machine; no download",
        licence="PSF-2.0",
    ),
    "shakespeare": NamedSource(
        description="tiny Shakespeare: 40,000 lines from the plays, as used by char-rnn and nanoGPT",
        licence="public domain",
        size=1_115_394,
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "tinystories": NamedSource(
        description="two million short stories in the words of a four-year-old (Eldan and Li 2023)",
        licence="CDLA-Sharing-1.0",
        size=1_000_000_000,
        hub="hf:roneneldan/TinyStories",
    ),
    "wikitext-103": NamedSource(
        description="good and featured articles of the English Wikipedia (Merity et al. 2016)",
        licence="CC-BY-SA-3.0",
        size=315_000_000,
        hub="hf:Salesforce/wikitext:wikitext-103-raw-v1",
    ),
    "fineweb-edu": NamedSource(
        description="educational web pages, ten billion tokens (Penedo et al. 2024); take a part with --limit",
        licence="ODC-By-1.0",
        size=28_500_000_000,
        hub="hf:HuggingFaceFW/fineweb-edu:sample/10BT",
    ),
}


def open_source(spec: str, data_dir: Path | None = None, limit: int | None = None) -> Source:
    """Find the source that ``spec`` names. Nothing is read or downloaded before it is iterated.

    Args:
        spec: ``stdlib``, another name of :data:`NAMED_SOURCES`, ``hf:owner/name[:path-inside]``, or a file or
            folder. A name wins over a path of the same name; write ``./name`` for the path.
        data_dir: where downloads are kept; default :func:`default_data_dir`.
        limit: at most so many documents.

    Raises:
        GroundupError: there is no such path; iterating raises it for what cannot be read.
        UsageError: ``spec`` or ``limit`` makes no sense.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: at least one document is needed.")
    if not spec.strip():
        raise UsageError(
            f"--data is empty. Give a file, a folder, hf:owner/name, or one of: {', '.join(NAMED_SOURCES)}."
        )
    if spec == "stdlib":
        return _source(spec, stdlib_documents, stdlib_identity, limit)
    if spec in NAMED_SOURCES:
        return _open_named(spec, data_dir or default_data_dir(), limit)
    if spec.startswith("hf:"):
        parse_hub_spec(spec)
        return Source(
            spec,
            "a data set of the Hugging Face hub",
            lambda skip: hub_documents(spec, skip),
            lambda: spec,
            limit,
        )
    if "://" in spec:
        raise UsageError(
            f"{spec}: text is read from this disk or from hf:owner/name; from elsewhere only what groundup data "
            "prepare wrote. Download it first."
        )
    return _open_path(spec, limit)


def get_source(spec: str, data_dir: Path | None = None) -> Path:
    """Download a named source or an ``hf:`` data set; whole files that are there are kept.

    Args:
        spec: a name of :data:`NAMED_SOURCES`, or ``hf:owner/name[:path-inside]``.
        data_dir: where a file with a url goes, in a folder of the source's name; the hub has its own cache.

    Returns:
        The file, or the folder where the files of a data set lie.

    Raises:
        UsageError: there is no such name, or nothing to download for it.
        GroundupError: it cannot be downloaded; the line says why and what to do.
    """
    entry = NAMED_SOURCES.get(spec)
    if entry is None and not spec.startswith("hf:"):
        known = ", ".join(NAMED_SOURCES)
        raise UsageError(f"{spec}: not a named source.{nearest(spec, NAMED_SOURCES)} There are: {known}.")
    hub = spec if entry is None else entry.hub
    if hub is not None:
        files = [path for _, path in hub_files(hub)]
        return files[0] if len(files) == 1 else files[0].parent  # they never lie in several folders
    if entry is None or entry.url is None:
        raise UsageError(f"{spec} is on this machine already: pass --data {spec}.")
    return _download_named(spec, data_dir or default_data_dir())


def _download_named(name: str, data_dir: Path) -> Path:
    entry = NAMED_SOURCES[name]
    assert entry.url is not None
    path = data_dir.expanduser() / name / Path(entry.url).name
    return download(entry.url, path, size=entry.size, sha256=entry.sha256)


def _source(
    name: str,
    read: Callable[[Callable[[Dropped], None]], Iterator[Document]],
    identity: Callable[[], Any],
    limit: int | None,
) -> Source:
    return Source(name, NAMED_SOURCES[name].description, read, identity, limit)


def _open_named(name: str, data_dir: Path, limit: int | None) -> Source:
    entry = NAMED_SOURCES[name]
    if entry.hub is not None:
        hub = entry.hub
        return _source(name, lambda skip: hub_documents(hub, skip), lambda: hub, limit)
    return _source(
        name, lambda skip: read_file(_download_named(name, data_dir), skip=skip), lambda: entry.sha256, limit
    )


def _open_path(spec: str, limit: int | None) -> Source:
    path = Path(spec).expanduser()
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
        there = path.exists()
    except OSError as error:  # a name too long for the file system, a folder that may not be entered
        raise GroundupError(f"cannot read {spec}: {error.strerror or error}.") from error
    if not there:
        raise GroundupError(f"{spec}: no such file or folder.{_suggestion(path, spec)}")
    if not (is_folder or is_file):
        raise GroundupError(f"{spec}: neither a file nor a folder. Save the text to a file and give its path.")
    read = read_folder if is_folder else read_file
    return Source(
        name=printable(path.resolve().name or str(path)),
        description=f"your own {'folder' if is_folder else 'file'} {printable(str(path))}",
        read=lambda skip: read(path, skip=skip),
        identity=lambda: path_identity(path),
        limit=limit,
    )


def _suggestion(path: Path, spec: str) -> str:
    """The nearest name in the folder the path points into, and the sources that have names."""
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        beside = []
    guess = nearest(path.name, beside) or nearest(spec, NAMED_SOURCES)
    return f"{guess} Named sources: {', '.join(NAMED_SOURCES)}."
