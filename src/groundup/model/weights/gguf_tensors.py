"""How numbers lie in a GGUF file: floats, or blocks of a few bits with a scale each, through the library ``gguf``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from groundup.runtime import GroundupError, UsageError, os_errors
from groundup.runtime.gguf_file import GgufTensor

Kind = Literal["f32", "f16", "q8_0", "q4_0"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BLOCK = 32  # weights that share a scale in q8_0 and q4_0
AT_ONCE = 1 << 22  # numbers that are turned back from their format at a time


def gguf_library() -> Any:
    """The module ``gguf``.

    Raises:
        GroundupError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise GroundupError("weights of GGUF files need the package gguf: pip install 'groundup[tokenizer]'") from error
    return gguf


def format_of(library: Any, name: str, shape: tuple[int, ...], kind: Kind) -> Any:
    """How a tensor is written."""
    formats = library.GGMLQuantizationType
    if len(shape) < 2 or kind == "f32" or name.startswith("position_embd"):
        return formats.F32
    if kind == "f16" or shape[-1] % BLOCK:
        return formats.F16
    if kind == "q4_0" and name.startswith("blk."):
        return formats.Q4_0
    return formats.Q8_0


def encoded(library: Any, name: str, tensor: Tensor, chosen: Any) -> np.ndarray:
    """A tensor as it lies in the file."""
    numbers = tensor.float().contiguous().numpy()
    if chosen == library.GGMLQuantizationType.F32:
        encoded = numbers
    else:
        with np.errstate(over="ignore"):
            encoded = library.quants.quantize(numbers, chosen)
    if not np.isfinite(encoded if encoded.dtype.kind == "f" else numbers).all():
        what = "not finite" if not np.isfinite(numbers).all() else "too large for f16"
        raise UsageError(f"{name}: a weight is {what}. Was the training unstable?")
    return encoded


@dataclass(frozen=True)
class StoredGguf:
    """One tensor of a file, before it is read (a ``Stored`` of stored.py)."""

    path: Path
    name: str
    found: GgufTensor
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape once it is read."""
        return self.found.shape

    def sizes(self) -> tuple[Any, int, int]:
        """Its format, the numbers of a block, and the bytes of one.

        Raises:
            GroundupError: the format is not one that can be read, or its rows are no whole blocks.
        """
        library = gguf_library()
        try:
            chosen = library.GGMLQuantizationType(self.found.kind)
        except ValueError as error:
            raise GroundupError(f"{self.path}: {self.name} is of format {self.found.kind}, not known here.") from error
        block, nbytes = library.GGML_QUANT_SIZES[chosen]
        try:
            library.quants.dequantize(np.zeros(nbytes, np.uint8), chosen)
        except NotImplementedError as error:
            raise GroundupError(
                f"{self.path}: {self.name} is of format {chosen.name}, which groundup does not read."
            ) from error
        if not self.shape or self.shape[-1] % block:
            raise GroundupError(
                f"{self.path}: {self.name} has shape {list(self.shape)}: no whole blocks of {chosen.name}."
            )
        return chosen, block, nbytes

    def read_into(self, target: Tensor) -> None:
        """Fill a contiguous tensor of its shape, some rows at a time."""
        chosen, block, nbytes = self.sizes()
        dequantize, flat = gguf_library().quants.dequantize, target.detach().view(-1)
        step = max(1, AT_ONCE // block) * block
        with os_errors(self.path, "cannot read"), open(self.path, "rb") as file:
            file.seek(self.found.offset)
            for part in flat.split(step):
                raw = np.fromfile(file, np.uint8, part.numel() // block * nbytes)
                if raw.size < part.numel() // block * nbytes:
                    raise GroundupError(f"{self.path}: damaged or cut short (it ended while it was read).")
                part.copy_(torch.from_numpy(np.asarray(dequantize(raw, chosen), np.float32)))
