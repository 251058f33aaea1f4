"""Tensors as folders store them: plainly, or in blocks of a few bits with scales beside them.

Two ways that published checkpoints use are undone while they are read: MXFP4 (gpt-oss; Open Compute Project, OCP
Microscaling Formats 1.0, 2023), numbers of four bits in blocks of 32 with a power of two each, and FP8 in squares of
128 x 128 with a float32 scale each (DeepSeek-V3, section 3.3.2). What is read is what the scales make of it, in float32
or the dtype of its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from groundup.model.weights.tensor_file import TensorFile
from groundup.runtime import GroundupError

BLOCKS, SCALES, FP8_SCALES = "_blocks", "_scales", "_scale_inv"
# Sign, two bits of exponent, one of mantissa.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class Stored(Protocol):
    """One tensor of a folder, before it is read."""

    @property
    def path(self) -> Path:
        """The file it is in."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape once it is read."""

    @property
    def dtype(self) -> torch.dtype:
        """Its type once it is read, if nobody asks for another."""

    def read_into(self, target: Tensor) -> None:
        """Fill a contiguous tensor of its shape."""


@dataclass(frozen=True)
class Plain:
    """A tensor as it is in its file."""

    file: TensorFile
    name: str

    @property
    def path(self) -> Path:
        """See :class:`Stored`."""
        return self.file.path

    @property
    def shape(self) -> tuple[int, ...]:
        """See :class:`Stored`."""
        return self.file.shapes[self.name]

    @property
    def dtype(self) -> torch.dtype:
        """See :class:`Stored`."""
        return self.file.dtypes[self.name]

    def read_into(self, target: Tensor) -> None:
        """See :class:`Stored`."""
        self.file.read_into(self.name, target)

    def read(self) -> Tensor:
        """It, in memory of its own and its own type."""
        return self.file.read(self.name)


@dataclass(frozen=True)
class MicroScaled:
    """A stack of matrices in MXFP4: blocks N O I/32 16, the low four bits of a byte first, and scales N O I/32.

    As gpt-oss has it, the tensor that they stand for is transposed: N I O.
    """

    blocks: Plain
    scales: Plain
    dtype: torch.dtype = torch.bfloat16  # which holds every such number exactly

    @property
    def path(self) -> Path:
        """See :class:`Stored`."""
        return self.blocks.path

    @property
    def shape(self) -> tuple[int, ...]:
        """See :class:`Stored`."""
        *outer, outputs, groups, half = self.blocks.shape
        return (*outer, groups * half * 2, outputs)

    def read_into(self, target: Tensor) -> None:
        """See :class:`Stored`."""
        if self.blocks.shape[:-1] != self.scales.shape:
            raise GroundupError(f"{self.path}: {self.scales.name} does not fit {self.blocks.name}.")
        values, blocks, scales = torch.tensor(FP4), self.blocks.read(), self.scales.read()
        for part, block, scale in zip(target, blocks, scales, strict=True):  # an expert at a time, to hold little
            numbers = torch.stack([values[(block & 15).int()], values[(block >> 4).int()]], dim=-1).flatten(-2)
            numbers = torch.ldexp(numbers, (scale.int() - 127)[..., None])
            part.copy_(numbers.flatten(-2).T)


@dataclass(frozen=True)
class BlockScaled:
    """A matrix in FP8, and the scales of its squares of ``size``; those at the edges may be smaller."""

    numbers: Plain
    scales: Plain
    size: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16

    @property
    def path(self) -> Path:
        """See :class:`Stored`."""
        return self.numbers.path

    @property
    def shape(self) -> tuple[int, ...]:
        """See :class:`Stored`."""
        return self.numbers.shape

    def read_into(self, target: Tensor) -> None:
        """See :class:`Stored`."""
        rows, columns = self.size
        wanted = (-(-self.shape[0] // rows), -(-self.shape[1] // columns))
        if self.scales.shape != wanted:
            raise GroundupError(
                f"{self.path}: {self.scales.name} has shape {list(self.scales.shape)}, should be {list(wanted)}."
            )
        numbers, scales = self.numbers.read(), self.scales.read().float()
        for number, row in enumerate(scales):
            part = slice(number * rows, (number + 1) * rows)
            each = row.repeat_interleave(columns)[: self.shape[1]]
            target[part].copy_(numbers[part].float() * each)


def stored_tensors(files: Iterable[TensorFile], quantization: Mapping[str, Any] | None) -> dict[str, Stored]:
    """Every tensor of a folder by name, those of blocks and scales as the one that they stand for.

    Args:
        quantization: ``quantization_config`` of the folder's config.json; None for none.

    Raises:
        GroundupError: a name is there twice, or scales without what they belong to.
    """
    plain: dict[str, Plain] = {}
    for file in files:
        for name in file.shapes:
            if name in plain:
                raise GroundupError(f"{file.path}: the tensor {name} is here a second time.")
            plain[name] = Plain(file, name)
    method = (quantization or {}).get("quant_method")
    found: dict[str, Stored] = {}
    for name, tensor in plain.items():
        if method == "mxfp4" and name.endswith(BLOCKS):
            found[name.removesuffix(BLOCKS)] = MicroScaled(tensor, _beside(plain, name, BLOCKS, SCALES))
        elif method == "fp8" and f"{name}{FP8_SCALES}" in plain:
            rows, columns = (quantization or {}).get("weight_block_size") or (128, 128)
            found[name] = BlockScaled(tensor, _beside(plain, name, "", FP8_SCALES), (int(rows), int(columns)))
        elif not (method == "mxfp4" and name.endswith(SCALES)) and not (method == "fp8" and name.endswith(FP8_SCALES)):
            found[name] = tensor
    return found


def _beside(plain: Mapping[str, Plain], name: str, ending: str, other: str) -> Plain:
    wanted = name.removesuffix(ending) + other
    if wanted not in plain:
        raise GroundupError(f"{plain[name].path}: the tensor {wanted} is missing from the weights.")
    return plain[wanted]
