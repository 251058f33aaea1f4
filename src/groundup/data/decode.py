"""From a file's bytes to text: decompressed, decoded in pieces, and told apart from what is no text."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from groundup.runtime import GroundupError

CHUNK = 1 << 20  # bytes decoded at a time: a file of many documents is never wholly in memory

_MARKS = (  # byte order marks; UTF-32 first, because its mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSIONS = (*_OPENERS, ".zst")


class UnreadableFile(GroundupError):  # noqa: N818 - it is the file that is unreadable
    """A file that is no text: an error when it was asked for by name, skipped and counted in a folder.

    Args:
        path: the file.
        reason: a few words that can be counted.
        detail: what exactly, and how to mend it.
    """

    def __init__(self, path: Path, reason: str, detail: str) -> None:
        super().__init__(f"{path}: {detail}")
        self.reason, self.detail = reason, detail


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed by its suffix: .gz, .bz2, .xz, and .zst where Python has zstd."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        try:
            return import_module("compression.zstd").open(path)  # in the standard library from Python 3.14 on
        except ImportError:
            mend = f"Unpack it first: zstd -d {path}"
            raise UnreadableFile(path, "zstd needs Python 3.14", f"this Python cannot read zstd. {mend}") from None
    return _OPENERS[suffix](path) if suffix in _OPENERS else open(path, "rb")


def decoded(path: Path) -> Iterator[str]:
    """Yield a file's text in pieces: UTF-8, or what its byte order mark says; the mark itself is left out.

    Raises:
        UnreadableFile: it is binary, in another encoding (with the byte offset), or its compression is
            damaged.
    """
    try:
        with open_bytes(path) as stream:
            yield from _decode_stream(stream, path)
    except Exception as error:
        if not _tells_damage(error):
            raise
        detail = f"this compressed file is damaged or cut short ({error}). Download or pack it again."
        raise UnreadableFile(path, "damaged", detail) from error


def _tells_damage(error: Exception) -> bool:
    """Whether a decompressor means that its input is damaged. Bz2 raises an OSError without a number."""
    if isinstance(error, OSError):
        return isinstance(error, gzip.BadGzipFile) or error.errno is None
    return isinstance(error, (EOFError, zlib.error, lzma.LZMAError)) or type(error).__name__ == "ZstdError"


def _decode_stream(stream: IO[bytes], path: Path) -> Iterator[str]:
    raw = stream.read(CHUNK)
    mark, encoding = next(((mark, name) for mark, name in _MARKS if raw.startswith(mark)), (b"", "utf-8"))
    if raw.startswith(b"%PDF-"):
        raise UnreadableFile(path, "binary", "this is a PDF, not text. Extract its text first, with pdftotext.")
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    raw, position = raw[len(mark) :], len(mark)
    while True:
        if encoding == "utf-8" and (zero := raw.find(b"\0")) >= 0:
            raise UnreadableFile(path, "binary", _binary(position + zero))
        waiting = len(decoder.getstate()[0])  # bytes of a character begun in the piece before
        try:
            text = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            offset = position - waiting + error.start
            bad = error.object[error.start]
            raise UnreadableFile(path, f"not {encoding.upper()}", _misencoded(path, encoding, offset, bad)) from error
        yield text
        if not raw:
            return
        position += len(raw)
        raw = stream.read(CHUNK)


def _binary(offset: int) -> str:
    return (
        f"binary, not text (NUL at byte {offset:,}). Give a text file; UTF-16 without a byte order mark "
        "is converted by iconv -f UTF-16LE -t UTF-8."
    )


def _misencoded(path: Path, encoding: str, offset: int, bad: int) -> str:
    return (
        f"not {encoding.upper()} at byte {offset:,} (0x{bad:02X}). "
        "Convert it from its own encoding, for example: "
        f"iconv -f WINDOWS-1252 -t UTF-8 {path.name} > {path.stem}.utf8{path.suffix}"
    )


def split_stream(chunks: Iterable[str], separator: str | None, longest: int | None = None) -> Iterator[str]:
    """Yield what ``"".join(chunks).split(separator)`` would, with one part in memory at a time.

    Args:
        chunks: the text, piece by piece.
        separator: what ends a part; None for nothing.
        longest: a part that has grown to so many characters ends after its last line, so that no part is too
            large for memory.
    """
    overlap = len(separator) - 1 if separator else 0  # a separator may lie across two chunks
    parts: list[str] = []
    size = 0
    carry = ""
    for chunk in chunks:
        *ended, rest = (carry + chunk).split(separator) if separator else [carry + chunk]
        for part in ended:
            yield "".join((*parts, part))
            parts.clear()
            size = 0
        cut = len(rest) - overlap if len(rest) > overlap else 0
        if longest is not None and size + cut >= longest:
            end = rest.rfind("\n", 0, cut) + 1 or cut
            yield "".join((*parts, rest[:end]))
            parts.clear()
            size, rest, cut = 0, rest[end:], cut - end
        parts.append(rest[:cut])
        size += cut
        carry = rest[cut:]
    yield "".join((*parts, carry))
