"""A prepared corpus that lies elsewhere, read as if it were here.

The manifest comes first; it names every shard with its size and SHA-256. A shard comes when a token of it is wanted,
and the one after it in the background. Shards are kept in a folder here up to a number of bytes, those unused for the
longest time giving way, so that a corpus larger than the disk can be read from its beginning to its end. Batches in
random order want all of it: give the folder room for the whole corpus then, or each shard is fetched many times.
"""

from __future__ import annotations

import mmap
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from groundup.data.places import MissingError, Place, Unreachable, fetch, locked, open_place
from groundup.data.prepared import DOCUMENTS, PARTS, STATS, PreparedData, read_stats
from groundup.data.shards import MANIFEST, TokenArray, TokenSet, _read_manifest
from groundup.runtime import GroundupError, UsageError, sha256_file, warn
from groundup.runtime.console import byte_size
from groundup.runtime.download import default_data_dir
from groundup.runtime.hub import UnreachableError
from groundup.tokenizer import Tokenizer

CACHE_BYTES = 64 << 30
_FILE_NAME = re.compile(r"[\w-][\w.-]*")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")


class NotPreparedError(GroundupError):
    """A place answers, but holds no prepared corpus."""


def open_remote(url: str, cache: Path | None = None, cache_bytes: int | None = None) -> PreparedData:
    """Open a corpus that ``groundup data prepare`` wrote and somebody put elsewhere, as it is.

    Read at once are its statistics, its tokenizer and the manifests of its shards; without a network, those of the
    last time.

    Args:
        url: the folder: ``hf:owner/name[/folder]``, ``https://…``, or an address of fsspec (``s3://…``).
        cache: where what is fetched is kept, in a folder of its own; default ``remote`` in
            :func:`groundup.data.default_data_dir`.
        cache_bytes: most bytes of shards kept of each of the two parts; default ``$GROUNDUP_CACHE_BYTES``, else 64 GiB.

    Raises:
        UsageError: the address cannot be read with what is installed, or there is no room for a single shard.
        NotPreparedError: there is no prepared corpus.
        GroundupError: it cannot be reached, or its files are damaged.
    """
    try:
        mirror = _Mirror.open(url, cache, STATS)
    except MissingError as error:
        raise NotPreparedError(
            f"{url}: no prepared corpus (there is no {STATS}). Put there what groundup data prepare wrote."
        ) from error
    stats = read_stats(mirror.folder)
    found = [name for name in _TOKENIZER_FILES if mirror.renew(f"tokenizer/{name}")]
    if not found:
        raise GroundupError(f"{url}/tokenizer: no tokenizer in this prepared corpus. Copy the whole folder there.")
    tokenizer = Tokenizer.load(mirror.folder / "tokenizer")
    train, val = (_open_tokens(mirror.below(part), cache_bytes, tokenizer) for part in PARTS)
    return PreparedData(mirror.folder, tokenizer, train, val, stats, find=mirror.get)


def open_remote_tokens(
    url: str, cache: Path | None = None, cache_bytes: int | None = None, tokenizer: Tokenizer | None = None
) -> TokenSet:
    """Open a folder of token shards that lies elsewhere; nothing but the manifest is read.

    Args:
        url, cache, cache_bytes: as for :func:`open_remote`.
        tokenizer: where given, the one whose ids these must be.

    Raises:
        UsageError, GroundupError: as for :func:`open_remote`; or the ids are another tokenizer's.
    """
    try:
        mirror = _Mirror.open(url, cache, MANIFEST)
    except MissingError as error:
        raise NotPreparedError(f"{url}: no token shards (there is no {MANIFEST}).") from error
    return _open_tokens(mirror, cache_bytes, tokenizer)


@dataclass(frozen=True)
class _Mirror:
    """What is here of a folder that lies elsewhere."""

    place: Place
    folder: Path
    inside: str = ""

    @classmethod
    def open(cls, url: str, cache: Path | None, first: str) -> _Mirror:
        """Fetch ``first``, a small file; where that fails and it is here from an earlier time, that will do."""
        folder = _cache_of(url, cache)
        before = (folder / first).read_bytes() if (folder / first).is_file() else None
        try:
            mirror = cls(open_place(url), folder)
            mirror.renew(first, needed=True)
        except (MissingError, UsageError):
            raise
        except GroundupError as error:
            if not (folder / first).is_file():
                raise
            warn(f"{error} Using what was fetched before.")
            return cls(Unreachable(url, str(error)), folder)
        if before not in (None, (folder / first).read_bytes()):  # another corpus; shards are told by their SHA-256
            for texts in folder.rglob(DOCUMENTS):
                texts.unlink(missing_ok=True)
        return mirror

    @property
    def url(self) -> str:
        return f"{self.place.url}/{self.inside}".rstrip("/")

    def below(self, name: str) -> _Mirror:
        """The same for a folder in it."""
        return _Mirror(self.place, self.folder / name, f"{self.inside}{name}/")

    def get(self, name: str, size: int | None = None, digest: str | None = None) -> Path:
        """A file of it, fetched where it is not here yet."""
        path = self.folder / name
        with locked(path):
            return path if path.is_file() else fetch(self.place, self.inside + name, path, size, digest)

    def renew(self, name: str, needed: bool = False) -> bool:
        """Fetch a small file anew, since it may have changed; from a place that does not answer, the one here will do.

        Returns:
            Whether it is here now.

        Raises:
            MissingError: it is ``needed`` and not there.
            GroundupError: it cannot be fetched.
        """
        path = self.folder / name
        with locked(path):
            if isinstance(self.place, Unreachable) and path.is_file():
                return True
            try:
                fetch(self.place, self.inside + name, path)
            except (MissingError, UnreachableError):
                if needed:
                    raise
                path.unlink(missing_ok=True)
                return False
        return True


def _cache_of(url: str, cache: Path | None) -> Path:
    """The folder of what is fetched from ``url``."""
    url = url.rstrip("/")
    name = re.sub(r"[^\w.-]+", "-", url).strip("-.")[-48:]
    return (cache or default_data_dir() / "remote") / f"{name}-{sha256(url.encode()).hexdigest()[:12]}"


def _open_tokens(mirror: _Mirror, cache_bytes: int | None, tokenizer: Tokenizer | None) -> TokenSet:
    mirror.renew(MANIFEST, needed=True)
    manifest = _read_manifest(mirror.folder)
    if tokenizer is not None and tokenizer.fingerprint != manifest["tokenizer"]:
        raise GroundupError(
            f"{mirror.url}: these token ids were made by another tokenizer ({manifest['tokenizer'][:12]}…, not "
            f"{tokenizer.fingerprint[:12]}…). Use the one that lies beside the data."
        )
    listed = {name for entry in manifest["shards"] for name in (entry["file"], entry["index"])}
    for name in listed:
        if not _FILE_NAME.fullmatch(str(name)):  # from strangers: never a path out of the cache
            raise GroundupError(f"{mirror.url}/{MANIFEST}: damaged, {name!r} is not the name of a file.")
    for old in (*mirror.folder.glob("*.bin"), *mirror.folder.glob("*.idx")):  # of what lay there before
        if old.name not in listed:
            old.unlink(missing_ok=True)
    return _RemoteTokens(mirror, manifest, _most_bytes(cache_bytes))


def _most_bytes(given: int | None) -> int:
    told = os.environ.get("GROUNDUP_CACHE_BYTES")
    if given is not None or not told:
        return CACHE_BYTES if given is None else given
    if not told.isdecimal():
        raise UsageError(f"GROUNDUP_CACHE_BYTES = {told!r}: a whole number of bytes is expected.")
    return int(told)


class _RemoteTokens(TokenSet):
    """A token set whose shards are fetched when they are read."""

    def __init__(self, mirror: _Mirror, manifest: dict[str, Any], most_bytes: int) -> None:
        self._store = _ShardStore(mirror, manifest["shards"], np.dtype(manifest["dtype"]), most_bytes)
        shards = [_Shard(self._store, number, entry["tokens"]) for number, entry in enumerate(manifest["shards"])]
        super().__init__(mirror.folder, manifest, cast("Sequence[TokenArray]", shards))

    def verify(self) -> None:
        """Fetch every file and compare it with the manifest.

        Raises:
            GroundupError: naming the first that cannot be had as the manifest says.
        """
        for number in range(len(self._store.entries)):
            self._store.check_again(number)
            self._store.index(number)

    def release(self) -> None:
        """As :meth:`TokenSet.release`."""
        self._touched = 0
        self._store.release()

    def document_starts(self) -> npt.NDArray[np.int64]:
        """As :meth:`TokenSet.document_starts`; all indices are fetched first, 8 bytes per document."""
        for number in range(len(self._store.entries)):
            self._store.index(number)
        return super().document_starts()


@dataclass(frozen=True)
class _Shard:
    """The tokens of one shard, of which nothing may be here yet: what :class:`TokenSet` asks of an array."""

    store: _ShardStore
    number: int
    tokens: int

    def __len__(self) -> int:
        return self.tokens

    def __getitem__(self, places: Any) -> TokenArray:
        return self.store.array(self.number)[places]


class _ShardStore:
    """The shards of one token set that are here, and the fetching of those that are not.

    Args:
        mirror: the folder they belong to.
        entries: the manifest's, one per shard.
        dtype: of the ids.
        most_bytes: of shards kept here.

    Raises:
        UsageError: there is no room for the largest shard.
    """

    def __init__(self, mirror: _Mirror, entries: Sequence[dict[str, Any]], dtype: np.dtype, most_bytes: int) -> None:
        self.mirror, self.entries, self.most_bytes = mirror, entries, most_bytes
        self._dtype = dtype.newbyteorder("<")
        self._sizes = [entry["tokens"] * dtype.itemsize for entry in entries]
        self._mapped: OrderedDict[int, tuple[TokenArray, mmap.mmap]] = OrderedDict()  # the one used last at the end
        self._checked: set[int] = set()
        self._lock = threading.Lock()
        self._ahead: threading.Thread | None = None
        self._largest = max(self._sizes, default=0)
        if self._largest > most_bytes:
            raise UsageError(
                f"{mirror.url}: a shard has {self._largest:,} bytes, the cache {most_bytes:,}. "
                f"Set GROUNDUP_CACHE_BYTES to at least {2 * self._largest}."
            )
        if (whole := sum(self._sizes)) > most_bytes:
            warn(
                f"{mirror.url}: {byte_size(whole)} of shards, of which {byte_size(most_bytes)} are kept here. Batches "
                f"in random order fetch shards again and again: GROUNDUP_CACHE_BYTES={whole} keeps all of them."
            )

    def array(self, number: int) -> TokenArray:
        """The tokens of a shard, memory-mapped. The array stays good when the file gives way to another."""
        while True:
            with self._lock:
                if number in self._mapped:
                    self._mapped.move_to_end(number)
                    return self._mapped[number][0]
            path = self._bring(number)
            with suppress(FileNotFoundError):  # another process has just made room: fetch it again
                with open(path, "rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                with self._lock:
                    self._mapped[number] = np.frombuffer(mapped, self._dtype), mapped
                self._fetch_ahead((number + 1) % len(self.entries))

    def release(self) -> None:
        """Hand back the memory that the mapped shards take."""
        with self._lock:
            for _, mapped in self._mapped.values():
                mapped.madvise(mmap.MADV_DONTNEED)

    def index(self, number: int) -> Path:
        """The file that says where the documents of a shard start."""
        entry = self.entries[number]
        path = self.mirror.get(entry["index"], 8 * entry["documents"], entry["index_sha256"])
        if path.stat().st_size != 8 * entry["documents"] or sha256_file(path) != entry["index_sha256"]:
            path.unlink(missing_ok=True)
            return self.mirror.get(entry["index"], 8 * entry["documents"], entry["index_sha256"])
        return path

    def check_again(self, number: int) -> None:
        """Have a shard here that is as the manifest says, whatever was believed before."""
        self._checked.discard(number)
        self._bring(number)

    def _bring(self, number: int) -> Path:
        entry, size = self.entries[number], self._sizes[number]
        path = self.mirror.folder / entry["file"]
        with locked(path):
            if not self._is_whole(path, number):
                path.unlink(missing_ok=True)
                self._make_room(size, number)
                fetch(self.mirror.place, self.mirror.inside + entry["file"], path, size, entry["sha256"], patient=True)
            self._checked.add(number)
            with suppress(OSError):
                os.utime(path)
        return path

    def _is_whole(self, path: Path, number: int) -> bool:
        if not path.is_file() or path.stat().st_size != self._sizes[number]:
            return False
        return number in self._checked or sha256_file(path) == self.entries[number]["sha256"]

    def _make_room(self, size: int, coming: int) -> None:
        """Remove the shards unused for the longest time until ``size`` more bytes fit."""
        with self._lock:
            lying: list[tuple[int, float, int]] = []
            places = {number: place for place, number in enumerate(self._mapped)}
            for number, entry in enumerate(self.entries):
                with suppress(FileNotFoundError):
                    changed = (self.mirror.folder / entry["file"]).stat().st_mtime
                    lying.append((places.get(number, -1), changed, number))
            used = sum(self._sizes[number] for *_, number in lying)
            for *_, number in sorted(lying):
                if used + size <= self.most_bytes:
                    return
                if number == coming:
                    continue
                self._mapped.pop(number, None)
                self._checked.discard(number)
                (self.mirror.folder / self.entries[number]["file"]).unlink(missing_ok=True)
                used -= self._sizes[number]

    def _fetch_ahead(self, number: int) -> None:
        """Begin to fetch a shard; what goes wrong is told when it is wanted."""
        if self._ahead is not None and self._ahead.is_alive():
            return
        if 2 * self._largest > self.most_bytes or (self.mirror.folder / self.entries[number]["file"]).exists():
            return

        def quietly() -> None:
            with suppress(Exception):
                self._bring(number)

        self._ahead = threading.Thread(target=quietly, name="groundup-shards", daemon=True)
        self._ahead.start()
