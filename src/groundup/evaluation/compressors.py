"""What the compressors everyone has make of the same text."""

from __future__ import annotations

import lzma
import time
import zlib
from collections.abc import Callable
from typing import Any

from groundup.runtime import GroundupError

GZIP_WINDOW = 31  # zlib's code for its largest window (2**15 bytes) in a gzip wrapper
# GNU gzip's buffer. zlib's default of 8 ends blocks earlier and comes out up to 0.2% larger.
GZIP_MEMORY_LEVEL = 9


def gzip_size(data: bytes) -> int:
    """The size in bytes of ``gzip -9 -n`` of ``data``."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, GZIP_WINDOW, GZIP_MEMORY_LEVEL)
    return len(compressor.compress(data)) + len(compressor.flush())


def xz_size(data: bytes) -> int:
    """The size in bytes of ``xz -9e`` of ``data``."""
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME))


def compressor_rows(data: bytes) -> list[dict[str, Any]]:
    """Bits per byte of ``data`` under ``gzip -9`` and ``xz -9e``, headers included.

    Returns:
        Rows of ``evaluation.json``.

    Raises:
        GroundupError: there is no text.
    """
    if not data:
        raise GroundupError("the held-out text is empty, so bits per byte are not defined. Hold out some text.")
    programs: list[tuple[str, Callable[[bytes], int]]] = [("gzip -9", gzip_size), ("xz -9e", xz_size)]
    return [_row(name, size, data) for name, size in programs]


def _row(name: str, size: Callable[[bytes], int], data: bytes) -> dict[str, Any]:
    started = time.perf_counter()
    bits = 8 * size(data) / len(data)
    return {
        "name": name,
        "kind": "compressor",
        "bits_per_byte": bits,
        "seconds": time.perf_counter() - started,
        "note": "compresses the held-out text by itself; has seen no other text",
    }
