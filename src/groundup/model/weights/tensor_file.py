"""One safetensors file, read straight to where its numbers belong.

The library checks the file (its header is bounded, offsets cannot overlap or point outside); the numbers are read by
ourselves, since its memory map would count, and hold, the file a second time beside the model.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from groundup.runtime import GroundupError, os_errors

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
AT_ONCE = 1 << 24  # numbers that are converted at a time


class TensorFile:
    """The tensors of one file by name.

    Args:
        path: the file.

    Raises:
        GroundupError: it cannot be read, is cut short, or holds numbers of a kind that we do not know.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._offsets: dict[str, int] = {}
        with _readable(path):
            with open(path, "rb") as file:
                offset = 8 + int.from_bytes(file.read(8), "little")
            with safe_open(path, framework="pt") as checked:
                for name in checked.offset_keys():
                    part = checked.get_slice(name)
                    kind = part.get_dtype()
                    if kind not in DTYPES:
                        raise GroundupError(f"{path}: {name} is of type {kind}, which groundup does not read.")
                    self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), DTYPES[kind]
                    self._offsets[name] = offset
                    offset += math.prod(self.shapes[name]) * DTYPES[kind].itemsize

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, target: Tensor) -> None:
        """Fill a contiguous tensor of the same shape; it may be of another dtype or on another device."""
        flat, dtype = target.detach().view(-1), self.dtypes[name]
        with _readable(self.path), open(self.path, "rb") as file:
            file.seek(self._offsets[name])
            if target.device.type == "cpu" and target.dtype == dtype:
                _fill(file, flat, self.path)
                return
            for part in flat.split(AT_ONCE):
                stored = torch.empty(part.shape, dtype=dtype)
                _fill(file, stored, self.path)
                part.copy_(stored)


def _fill(file: IO[bytes], flat: Tensor, path: Path) -> None:
    wanted = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    done = 0
    while done < len(wanted):
        count = file.readinto(wanted[done:])  # type: ignore[attr-defined]
        if not count:
            raise GroundupError(f"{path}: damaged or cut short (it ended while it was read).")
        done += count
    if sys.byteorder == "big" and flat.element_size() > 1:  # the file is little-endian
        single = flat.view(torch.uint8).view(-1, flat.element_size())
        single.copy_(single.flip(1))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    with os_errors(path, "cannot read"):
        try:
            yield
        except (SafetensorError, json.JSONDecodeError) as error:
            raise GroundupError(f"{path}: damaged or cut short ({error}).") from error
