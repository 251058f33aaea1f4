"""What a GGUF file (llama.cpp's format) says before its numbers: named values, and where each tensor lies.

Source: ggml's specification of the format, versions 2 and 3; little-endian. All lengths are checked against what is
left of the file before anything is made of them, so that a damaged file takes no more memory than its own size asks
for. Numbers of tensors are not read here.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from groundup.runtime.errors import GroundupError, os_errors

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes, where the file does not say
MAX_AXES = 4
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Args:
        shape: the slowest axis first, as torch has it (the file has it the other way round).
        kind: ggml's number for how its numbers are written.
        offset: of its first byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)


@dataclass
class GgufFile:
    """The head of a file.

    Args:
        path: the file.
        size: its bytes.
        fields: the named values: numbers, texts, and lists of them. A single float of 32 bits becomes the shortest
            number that is written the same, 1e-05 and not 9.999999747378752e-06.
        tensors: by name.
    """

    path: Path
    size: int
    fields: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, GgufTensor] = field(default_factory=dict)


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Read the head of a file.

    Raises:
        GroundupError: it cannot be read, is of another kind or version, or is damaged.
    """
    path = Path(path)
    with os_errors(path, "cannot read"), open(path, "rb") as opened:
        return _Head(opened, path).read()


class _Head:
    """The head of a file, from the front to the back."""

    def __init__(self, opened: IO[bytes], path: Path) -> None:
        self._opened = opened
        size = opened.seek(0, os.SEEK_END)
        opened.seek(0)
        self._found, self._left = GgufFile(path, size), size

    def read(self) -> GgufFile:
        if self._bytes(4) != MAGIC:
            raise self._damaged("it does not begin with the letters GGUF")
        version = self._number("I")
        if version not in VERSIONS:
            raise self._damaged(f"its version is {version}; little-endian files of versions 2 and 3 can be read")
        tensors, values = self._number("Q"), self._number("Q")
        self._expect(tensors * 24 + values * 13)  # the least that each takes
        for _ in range(values):
            name = self._text()
            if name in self._found.fields:
                raise self._damaged(f"it says twice what {name} is")
            self._found.fields[name] = self._value(self._number("I"))
        infos = [self._tensor() for _ in range(tensors)]
        self._place(infos)
        return self._found

    def _damaged(self, why: str) -> GroundupError:
        return GroundupError(f"{self._found.path}: this is not a whole GGUF file ({why}). Copy or download it again.")

    def _expect(self, count: int) -> None:
        if count > self._left:
            raise self._damaged(f"{count:,} bytes should follow, {self._left:,} are left")

    def _bytes(self, count: int) -> bytes:
        self._expect(count)
        self._left -= count
        return self._opened.read(count)

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack(f"<{form}", self._bytes(struct.calcsize(form)))
        return float(str(np.float32(value))) if form == "f" else value

    def _text(self) -> str:
        try:
            return self._bytes(self._number("Q")).decode()
        except UnicodeDecodeError as error:
            raise self._damaged("a text in it is not UTF-8") from error

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise self._damaged(f"it holds a value of kind {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner == _STRING:
            self._expect(8 * count)
            return [self._text() for _ in range(count)]
        if inner not in _NUMBERS:
            raise self._damaged(f"it holds a list of kind {inner}")
        form = np.dtype(_NUMBERS[inner]).newbyteorder("<")
        return np.frombuffer(self._bytes(form.itemsize * count), form).tolist()

    def _tensor(self) -> tuple[str, GgufTensor]:
        name, axes = self._text(), self._number("I")
        if axes > MAX_AXES:
            raise self._damaged(f"{name} has {axes} axes")
        shape = tuple(self._number("Q") for _ in range(axes))[::-1]
        return name, GgufTensor(shape, self._number("I"), self._number("Q"))

    def _place(self, infos: list[tuple[str, GgufTensor]]) -> None:
        """Tensors lie behind the head, from the next whole multiple of the alignment on."""
        alignment = self._found.fields.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment}")
        begin = -(-(self._found.size - self._left) // alignment) * alignment
        for name, tensor in infos:
            if name in self._found.tensors:
                raise self._damaged(f"it holds {name} twice")
            placed = GgufTensor(tensor.shape, tensor.kind, begin + tensor.offset)
            if placed.offset > self._found.size:
                raise self._damaged(f"{name} should begin at byte {placed.offset:,} of {self._found.size:,}")
            self._found.tensors[name] = placed
