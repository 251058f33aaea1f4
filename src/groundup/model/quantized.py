"""Linear layers whose weights are kept in eight or four bits, and computed with as numbers of the input's dtype.

    int8  one byte per weight and one scale per output row
    int4  half a byte per weight; a scale, and if asked a zero point, per group of inputs
    nf4   half a byte per weight, at quantiles of a normal distribution; a scale per group (Dettmers et al. 2023, QLoRA)

The layout, the same for all: everything of one output row lies together, so that a product can read row after row.

    codes   int8: ``int8 O I``. int4 and nf4: ``uint8 O (C/2)`` with C = the inputs rounded up to whole groups; byte j
            holds the code of input 2j in its low four bits, and that of input 2j + 1 in its high four
    scale   ``float32 O 1`` for int8, ``float32 O (C/group)`` for the others; kept so whatever the model is cast to
    zero    ``uint8 O (C/group)``, only for int4 with a zero point

    int8    weight = scale * code                   int4                     weight = scale * (code - 8)
    nf4     weight = scale * NF4[code]              int4 with a zero point   weight = scale * (code - zero)

Codes past the last input decode to 0. Stacks of experts have one more axis, N, in front of O everywhere.
"""

# N experts   O outputs   I inputs   C inputs in whole groups   G groups of a row   R rows of all experts' tokens

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from groundup.model.experts import _Stack, grouped_linear
from groundup.runtime import UsageError
from groundup.runtime.errors import nearest

Kind = Literal["int8", "int4", "nf4"]
KINDS: tuple[Kind, ...] = ("int8", "int4", "nf4")
GROUPS = (32, 64, 128)
DOUBLE_BLOCK = 256  # scales that share one of their own, when they are quantized too


@dataclass(frozen=True)
class Scheme:
    """How weights are quantized.

    Args:
        kind: int8, int4 or nf4.
        group: inputs that share a scale in int4 and nf4: 32, 64 or 128.
        zero_point: int4: a zero point per group, for weights that are not centred on 0.
        double: nf4: keep the scales as int8 too, around their mean, with one scale per 256 of them (double
            quantization, section 3 of Dettmers et al. 2023, whose second one is to 8-bit floats instead).

    Raises:
        UsageError: a kind or group that there is not, or an option of another kind.
    """

    kind: Kind
    group: int = 64
    zero_point: bool = False
    double: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            known = ", ".join(KINDS)
            raise UsageError(f"quantization {self.kind!r} is not one of {known}.{nearest(str(self.kind), KINDS)}")
        if self.group not in GROUPS:
            raise UsageError(f"quantization group {self.group} is not one of {', '.join(map(str, GROUPS))}.")
        if self.zero_point and self.kind != "int4":
            raise UsageError(f"a zero point is an option of int4, not of {self.kind}.")
        if self.double and self.kind != "nf4":
            raise UsageError(f"double quantization is an option of nf4, not of {self.kind}.")


def nf4_values() -> Tensor:
    """The 16 values of NF4, float32, in order: quantiles of N(0, 1), divided by the largest (QLoRA, section 3, eq. 4).

    Eight above 0 and seven below, on either side evenly spaced in probability from the outermost quantile to the
    middle, and an exact 0. The outermost is the mean of what 15 and what 16 bins would have.
    """
    return torch.tensor(_nf4_numbers())


@cache
def _nf4_numbers() -> list[float]:
    outermost = 1 - (1 / (2 * 15) + 1 / (2 * 16)) / 2
    above, below = (
        torch.special.ndtri(torch.linspace(outermost, 0.5, count + 1, dtype=torch.float64)[:-1]) for count in (8, 7)
    )
    values = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return (values / values.max()).tolist()


# ---- weights to codes and back


def quantize(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """Round weights to the nearest code.

    Args:
        weight: O I, or N O I. On the meta device only names, shapes and types are found.

    Returns:
        The tensors that the top of this file describes, by name. With ``scheme.double``, ``scale`` is replaced by
        ``scale_codes`` (int8, the same shape), ``scale_step`` (float32, one per 256 of them) and ``scale_mean``.

    Raises:
        UsageError: a weight is not finite.
    """
    weight = weight.detach().to(torch.float32)
    if not weight.is_meta and not weight.isfinite().all():
        raise UsageError("a weight is infinite or not a number, which no code stands for. Was the training unstable?")
    if scheme.kind == "int8":
        scale = weight.abs().amax(dim=-1, keepdim=True) / 127
        return {"codes": _nearest(weight, scale).to(torch.int8), "scale": scale}
    missing = -weight.shape[-1] % scheme.group
    grouped = F.pad(weight, (0, missing)).unflatten(-1, (-1, scheme.group))
    if scheme.kind == "nf4":
        scale = grouped.abs().amax(dim=-1)
        values = nf4_values().to(weight.device)
        codes = torch.bucketize(grouped / _no_zeros(scale)[..., None], (values[1:] + values[:-1]) / 2)
        found = {"codes": _pack(codes.flatten(-2)), "scale": scale}
        return found if not scheme.double else {"codes": found["codes"], **_quantize_scales(scale)}
    if not scheme.zero_point:
        scale = grouped.abs().amax(dim=-1) / 7
        return {"codes": _pack((_nearest(grouped, scale[..., None]) + 8).flatten(-2)), "scale": scale}
    low, high = grouped.amin(dim=-1).clamp_max(0), grouped.amax(dim=-1).clamp_min(0)
    scale = (high - low) / 15
    zero = _nearest(-low, scale)
    codes = (_nearest(grouped, scale[..., None]) + zero[..., None]).clamp(0, 15)
    return {"codes": _pack(codes.flatten(-2)), "scale": scale, "zero": zero.to(torch.uint8)}


def dequantize(tensors: dict[str, Tensor], scheme: Scheme, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that codes stand for, computed in float32 and rounded to ``dtype``; O I, or N O I.

    Args:
        tensors: what :func:`quantize` returned.
        inputs: I, which codes in whole groups do not tell.
    """
    if tensors["codes"].device.type == "cpu" and not is_compiling():
        return _unpacked(tensors, scheme, inputs).to(dtype)
    if scheme.kind == "int8":
        return (tensors["codes"] * tensors["scale"]).to(dtype)
    codes = torch.stack([tensors["codes"] & 15, tensors["codes"] >> 4], dim=-1).flatten(-2)
    codes = codes.unflatten(-1, (-1, scheme.group))
    if scheme.kind == "nf4":
        scale = _dequantize_scales(tensors) if scheme.double else tensors["scale"]
        values = nf4_values().to(codes.device)[codes.int()]
    else:
        scale = tensors["scale"]
        values = codes.to(torch.float32) - (tensors["zero"][..., None] if scheme.zero_point else 8)
    return values.mul_(scale[..., None]).flatten(-2)[..., :inputs].to(dtype)


def _unpacked(tensors: dict[str, Tensor], scheme: Scheme, inputs: int) -> Tensor:
    """:func:`dequantize` on a CPU, compiled; float32."""
    from groundup.model.unpacking import unpack

    codes = tensors["codes"]
    scale = _dequantize_scales(tensors) if scheme.double else tensors["scale"]
    zero = tensors["zero"].flatten(0, -2) if scheme.zero_point else None
    made = unpack(
        codes.flatten(0, -2), scale.flatten(0, -2), zero, nf4_values() if scheme.kind == "nf4" else None,
        0 if scheme.kind == "int8" else scheme.group, inputs,
    )  # fmt: skip
    return made.unflatten(0, codes.shape[:-1])


def _nearest(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.round(weight / _no_zeros(scale))


def _no_zeros(scale: Tensor) -> Tensor:
    """A group of zeros has the scale 0, by which nothing can be divided."""
    return torch.where(scale == 0, 1.0, scale)


def _pack(codes: Tensor) -> Tensor:
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _quantize_scales(scale: Tensor) -> dict[str, Tensor]:
    mean = scale.mean()
    blocks = F.pad((scale - mean).flatten(), (0, -scale.numel() % DOUBLE_BLOCK)).unflatten(0, (-1, DOUBLE_BLOCK))
    step = blocks.abs().amax(dim=-1) / 127
    codes = _nearest(blocks, step[:, None]).to(torch.int8).flatten()[: scale.numel()].view_as(scale)
    return {"scale_codes": codes, "scale_step": step, "scale_mean": mean}


def _dequantize_scales(tensors: dict[str, Tensor]) -> Tensor:
    codes = tensors["scale_codes"]
    step = tensors["scale_step"].repeat_interleave(DOUBLE_BLOCK)[: codes.numel()].view_as(codes)
    return codes * step + tensors["scale_mean"]


# ---- layers


class _Quantized(nn.Module):
    """What a quantized layer and a quantized stack share: buffers only, nothing that an optimizer could move."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scheme: Scheme) -> None:
        super().__init__()
        self.scheme, (self.out_features, self.in_features) = scheme, weight.shape[-2:]
        found = quantize(weight, scheme)
        self.tensor_names = tuple(found)
        for name, tensor in found.items():
            self.register_buffer(name, tensor)
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        # Follows what the model is cast to, and so tells the dtype of ``weight``.
        self.cast: Tensor
        self.register_buffer("cast", torch.empty(0, dtype=weight.dtype, device=weight.device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of ``weight``: what the layer was made of, or cast to since."""
        return self.cast.dtype

    @property
    def weight(self) -> Tensor:
        """The weights as numbers, made anew at every look."""
        return self.dequantize()

    @property
    def nbytes(self) -> int:
        """Memory of the layer in bytes, its bias included."""
        return nbytes(self)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights in ``dtype`` (default: :attr:`dtype`); O I, or N O I."""
        tensors = {name: self.get_buffer(name) for name in self.tensor_names}
        return dequantize(tensors, self.scheme, self.in_features, dtype or self.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Quantized:
        """Casting a model to bf16 must not round the scales, which move between devices only."""
        before = {name: self.get_buffer(name) for name in self.tensor_names}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self


class QuantizedLinear(_Quantized):
    """``nn.Linear`` of quantized weights: weight-only, the product is computed in the input's dtype.

    Args:
        weight: O I; bias: O, or None. Both are copied.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: Scheme) -> QuantizedLinear:
        """The quantized layer of a linear one, which is left as it is."""
        return cls(linear.weight, linear.bias, scheme)

    def forward(self, x: Tensor) -> Tensor:
        """``... I`` to ``... O``, in the input's dtype (or autocast's)."""
        y: Tensor = _Product.apply(_autocast(x), self, None)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class QuantizedStack(_Quantized):
    """One quantized linear layer per expert, in the place of a stack in experts.py; every expert has its own scales.

    Args:
        weight: N O I; bias: N O, or None. Both are copied.
    """

    def forward(self, x_RI: Tensor, offsets_N: Tensor, expert_R: Tensor) -> Tensor:
        """Rows R inputs to R outputs; expert n has the rows before ``offsets_N[n]`` that no earlier one has."""
        y_RO: Tensor = _Product.apply(_autocast(x_RI), self, offsets_N)
        return y_RO if self.bias is None else y_RO + self.bias.to(y_RO.dtype)[expert_R]


class _Product(torch.autograd.Function):
    """The product with weights that exist only while it is computed: the backward pass makes them once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Quantized, offsets_N: Tensor | None) -> Tensor:
        ctx.layer, ctx.offsets_N = layer, offsets_N
        weight = layer.dequantize(x.dtype)
        return F.linear(x, weight) if offsets_N is None else grouped_linear(x, weight, offsets_N)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        grad = grad_outputs[0]
        weight = ctx.layer.dequantize(grad.dtype).transpose(-2, -1)
        if ctx.offsets_N is None:
            return F.linear(grad, weight), None, None
        return grouped_linear(grad, weight.contiguous(), ctx.offsets_N), None, None


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


# ---- whole models


def quantize_model(
    model: nn.Module, kind: Kind, *, group: int = 64, zero_point: bool = False, double: bool = False,
    skip: Iterable[str] = ("head", "embedding"),
) -> nn.Module:  # fmt: skip
    """Replace the linear layers and stacks of experts of a model by quantized ones, in place.

    Embeddings, norms and routers stay as they are. Adapters come after.

    Args:
        kind, group, zero_point, double: see :class:`Scheme`.
        skip: patterns of layers to leave, see :func:`matches`.

    Returns:
        The model itself.

    Raises:
        UsageError: a layer shares its weight with another (a tied head), or has adapters already, or nothing is left to
            quantize.
    """
    scheme, patterns = Scheme(kind, group, zero_point, double), tuple(skip)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, _Stack)) and not matches(name, patterns)
    }
    if not layers:
        raise UsageError("there is no linear layer left to quantize. Is the model quantized already, or all skipped?")
    shared = shared_parameters(model)
    for name, module in layers.items():
        if id(module.weight) in shared:
            raise UsageError(f"{name}: tied to another layer, quantizing it would untie them. Leave it in skip.")
        if hasattr(model.get_submodule(name.rpartition(".")[0]), "adapters"):
            raise UsageError(f"{name.rpartition('.')[0]}: has adapters. Quantize first, then add adapters.")
    for name, module in layers.items():
        made = QuantizedLinear if isinstance(module, nn.Linear) else QuantizedStack
        replace_module(model, name, made(module.weight, module.bias, scheme).train(module.training))
    return model


def nbytes(module: nn.Module) -> int:
    """Memory of all parameters and buffers in bytes, shared ones counted once."""
    tensors = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    return sum(tensor.nbytes for tensor in tensors.values())


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module's dotted name, or a whole ending of it, fits one of the patterns (``*`` stands for anything).

    ``q`` fits ``blocks.0.attention.q``; ``blocks.*`` everything in the blocks.
    """
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for pattern in patterns)


def shared_parameters(model: nn.Module) -> set[int]:
    """The ``id`` of every parameter that several modules hold, such as that of a tied head."""
    seen: set[int] = set()
    again: set[int] = set()
    for module in model.modules():
        for _, parameter in module.named_parameters(recurse=False):
            (again if id(parameter) in seen else seen).add(id(parameter))
    return again


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of this dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
