"""Adapters: small trainable matrices beside frozen linear layers (LoRA and two of its relatives).

    x ──► base (frozen) ────────────► + ──► y          LoRA:  W' = W + s B A
    └──► dropout ──► A ──► B ──► x s ─┘                DoRA:  W' = m (W + s B A) / |W + s B A|, row by row

They are put on a model from outside, which does not know of it: a layer is replaced by an :class:`Adapted` that holds
it. A layer may have several adapters by name; what those that are active add to its weight is summed.

Rows of an adapter for single tokens: token_rows.py.

To save adapters for other tools, and to load theirs: adapter_folder.py. As whole models: adapter_model.py.
"""

# O outputs   I inputs   R rank

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.model.quantized import QuantizedLinear, matches, replace_module, shared_parameters
from groundup.model.token_rows import TokenRows, token_rows
from groundup.runtime import UsageError
from groundup.runtime.errors import nearest


@dataclass(frozen=True)
class LoraConfig:
    """What adapters are made of, and where they go.

    Args:
        rank: R, the width between A and B.
        alpha: what A and B are scaled by is alpha / rank (Hu et al. 2021, section 4.1).
        dropout: of the adapter's input, in training.
        targets: patterns of layers (``*`` stands for anything; ``q`` fits ``blocks.0.attention.q``, ``blocks.*`` all
            linear layers of the blocks).
        rslora: scale by alpha / sqrt(rank) instead, which keeps its size at high ranks (Kalajdzievski 2023).
        dora: give each row of the weight a magnitude of its own, so that A and B turn it only (Liu et al. 2024, eq. 5).

    Raises:
        UsageError: a rank below 1, a dropout outside of 0 to 1, no targets.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("blocks.*",)
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"adapter rank = {self.rank} is below 1. Usual are 4 to 64.")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"adapter dropout = {self.dropout} is not a probability below 1.")
        targets: object = self.targets
        if isinstance(targets, str) or not targets:  # a string's letters would be patterns
            raise UsageError('adapter targets is a list of patterns with at least one, such as ["q", "v"].')

    @property
    def scale(self) -> float:
        """What the product of B and A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def at_rank(self, rank: int) -> LoraConfig:
        """The same of another rank, at the same scale."""
        times = rank / self.rank
        return replace(self, rank=rank, alpha=self.alpha * (math.sqrt(times) if self.rslora else times))


class Lora(nn.Module):
    """One adapter of one layer. At first it changes nothing: B is 0, and a magnitude that of the row.

    Args:
        config: its rank, scale, dropout and kind.
        base: the layer that it is for.
    """

    def __init__(self, config: LoraConfig, base: nn.Linear | QuantizedLinear) -> None:
        super().__init__()
        self.config = config
        weight_OI = base.weight.detach()
        # bf16 cannot hold the small steps of training; the frozen weights may stay in it.
        weight_OI = weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32))
        self.A = nn.Parameter(weight_OI.new_empty(config.rank, base.in_features))
        self.B = nn.Parameter(weight_OI.new_zeros(base.out_features, config.rank))
        nn.init.uniform_(self.A, -(base.in_features**-0.5), base.in_features**-0.5)  # as the paper's published code
        self.magnitude = nn.Parameter(weight_OI.norm(dim=1)) if config.dora else None

    def turned(self, weight_OI: Tensor) -> Tensor:
        """``W + s B A``, in the adapter's dtype."""
        return weight_OI.to(self.B.dtype) + self.config.scale * (self.B @ self.A)

    def ratio(self, turned_OI: Tensor) -> Tensor:
        """DoRA: what each row is multiplied by. Its norm counts as a constant (Liu et al. 2024, section 4.3), O."""
        assert self.magnitude is not None
        norm_O = turned_OI.detach().norm(dim=1)
        return self.magnitude / norm_O.clamp_min(torch.finfo(norm_O.dtype).tiny)  # rows of zeros have no direction

    def delta(self, weight_OI: Tensor) -> Tensor:
        """What the adapter adds to a weight, O I."""
        if self.magnitude is None:
            return self.config.scale * (self.B @ self.A)
        turned_OI = self.turned(weight_OI)
        return self.ratio(turned_OI)[:, None] * turned_OI - weight_OI

    def forward(self, x: Tensor, y: Tensor, base: nn.Linear | QuantizedLinear) -> Tensor:
        """What the adapter adds to ``y``, the layer's result for ``x``; ``... I`` and ``... O`` to ``... O``."""
        dropout = self.config.dropout if self.training else 0.0
        seen = F.dropout(x, dropout, self.training)
        low = F.linear(F.linear(seen.to(self.A.dtype), self.A) * self.config.scale, self.B)
        if self.magnitude is None:
            return low
        with torch.no_grad():
            turned_OI = self.turned(base.weight)
        ratio_O = self.ratio(turned_OI)
        plain = base(seen) if dropout else y
        if base.bias is not None:  # which a magnitude leaves alone
            plain = plain - base.bias
        return ratio_O * low + (ratio_O - 1) * plain


class Adapted(nn.Module):
    """A linear layer with adapters on it.

    Attributes:
        base: the layer itself, frozen; while merged, one whose weight has the adapters in it.
        adapters: all adapters by name.
        active: the names of those that count.
        original: while merged, the layer as it was.
    """

    def __init__(self, base: nn.Linear | QuantizedLinear) -> None:
        super().__init__()
        self.base: nn.Linear | QuantizedLinear = base
        self.original: nn.Linear | QuantizedLinear | None = None
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, O I: of the base and the active adapters, dropout aside."""
        weight_OI = self.base.weight
        if self.original is not None or not self.active:
            return weight_OI
        total_OI = torch.stack([lora.delta(weight_OI) for lora in self._loras()]).sum(dim=0)
        return (weight_OI + total_OI).to(weight_OI.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, which adapters do not change."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """``... I`` to ``... O``, in the dtype of the base's result."""
        y = self.base(x)
        if self.original is not None:
            return y
        changes = [lora(x, y, self.base) for lora in self._loras()]
        return (y + sum(changes)).to(y.dtype) if changes else y

    def _loras(self) -> list[Lora]:
        return [self.lora(name) for name in self.active]

    def lora(self, name: str) -> Lora:
        """One of the layer's adapters."""
        found = self.adapters[name]
        assert isinstance(found, Lora)
        return found


# ---- whole models


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | QuantizedLinear | Adapted]:
    """Every layer that has adapters or could have them, by the name it had before it got any."""
    found: dict[str, nn.Linear | QuantizedLinear | Adapted] = {}
    inside: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, (Adapted, TokenRows)):
            inside |= {id(part) for part in module.modules()}
        linear = isinstance(module, (nn.Linear, QuantizedLinear)) and id(module) not in inside
        if linear or isinstance(module, Adapted):
            found[name] = module
    return found


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """The layers that have adapters.

    Raises:
        UsageError: there are none.
    """
    found = {name: layer for name, layer in linear_layers(model).items() if isinstance(layer, Adapted)}
    if not found:
        raise UsageError("this model has no adapters. Add or load one first.")
    return found


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters on a model, in the order they were added."""
    layers = linear_layers(model).values()
    return list(dict.fromkeys(name for layer in layers if isinstance(layer, Adapted) for name in layer.adapters))


def add_adapter(model: nn.Module, config: LoraConfig, name: str = "default") -> nn.Module:
    """Freeze a model and put an adapter on its linear layers, active beside those that are there already.

    All of the model but its adapters is frozen; what else is to be trained (the scores of a classifier) is unfrozen
    afterwards. Expert stacks and routers are no linear layers and get none.

    Returns:
        The model itself.

    Raises:
        UsageError: no layer fits the targets; one is tied to the embedding; the name is taken; adapters are merged.
    """
    layers = {key: layer for key, layer in linear_layers(model).items() if matches(key, config.targets)}
    if not layers:
        endings = {key.rpartition(".")[2] for key in linear_layers(model)}
        hint = nearest(config.targets[0], endings)
        raise UsageError(f"no linear layer fits the adapter targets {', '.join(config.targets)}.{hint}")
    return put_adapter(model, dict.fromkeys(layers, config), name)


def put_adapter(model: nn.Module, configs: dict[str, LoraConfig], name: str) -> nn.Module:
    """The same with a config for each layer, by the layer's name."""
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise UsageError(f"an adapter cannot be called {name!r}: the name is part of a parameter's. Choose another.")
    if name in adapter_names(model):
        raise UsageError(f"there is an adapter called {name} already. Remove it first, or choose another name.")
    layers, shared = linear_layers(model), shared_parameters(model)
    for key in configs:
        layer = layers[key]
        _not_merged(key, layer)
        if not isinstance(layer, QuantizedLinear) and id(_base(layer).weight) in shared:
            raise UsageError(
                f"{key}: its weight is tied to another layer's, and an adapter would untie them when it is merged. "
                "Leave it out of the targets, or build the model with tie_embeddings = false."
            )
    if not adapter_names(model):
        model.requires_grad_(False)
    for key, config in configs.items():
        layer = layers[key]
        if not isinstance(layer, Adapted):
            layer = Adapted(layer).train(layer.training)
            replace_module(model, key, layer)
        layer.base.requires_grad_(False)
        layer.adapters[name] = Lora(config, layer.base).train(layer.training)
        layer.active = (*layer.active, name)
    return model


def set_active(model: nn.Module, *names: str) -> None:
    """Let exactly these adapters count, and be trained; none of them for the model as it was.

    Raises:
        UsageError: there is no adapter of a name, or adapters are merged.
    """
    layers = adapted_layers(model)
    for name in names:
        _known(model, name)
    for key, layer in layers.items():
        _not_merged(key, layer)
    for layer in layers.values():
        layer.active = tuple(name for name in dict.fromkeys(names) if name in layer.adapters)
        for name, lora in layer.adapters.items():
            lora.requires_grad_(name in layer.active)
    for table in token_rows(model).values():
        table.active = tuple(name for name in dict.fromkeys(names) if name in table.adapters)
        for name, rows in table.adapters.items():
            rows.requires_grad_(name in table.active)


@torch.no_grad()
def merge(model: nn.Module, *, requantize: bool = False) -> nn.Module:
    """Put the active adapters into the weights, which are computed in float32 at least and rounded once.

    The layers as they were are kept, so that :func:`unmerge` gives back their very bits; :func:`remove` after it leaves
    a plain model. A quantized layer becomes a plain one in the dtype that it was made of.

    Args:
        requantize: quantize those layers again by their own scheme instead, at the cost of a second rounding.

    Raises:
        UsageError: there are no adapters, or they are merged already.
    """
    layers = adapted_layers(model)
    for key, layer in layers.items():
        _not_merged(key, layer)
    for layer in layers.values():
        layer.original, layer.base = layer.base, merged_layer(layer, requantize=requantize)
    for table in token_rows(model).values():
        table.merge()
    return model


def merged_layer(layer: Adapted, *, requantize: bool = False) -> nn.Linear | QuantizedLinear:
    """The layer that computes by itself what this one does with its active adapters; see :func:`merge`."""
    base, weight_OI = layer.base, layer.weight
    if layer.original is not None:
        return base
    if isinstance(base, QuantizedLinear) and requantize:
        return QuantizedLinear(weight_OI, base.bias, base.scheme).train(base.training)
    return plain_linear(weight_OI, base.bias).train(base.training)


def unmerge(model: nn.Module) -> nn.Module:
    """Undo :func:`merge`, exactly.

    Raises:
        UsageError: nothing is merged.
    """
    layers = adapted_layers(model)
    if all(layer.original is None for layer in layers.values()):
        raise UsageError("these adapters are not merged.")
    for layer in layers.values():
        if layer.original is not None:
            layer.base, layer.original = layer.original, None
    for table in reversed(token_rows(model).values()):  # a tied head has seen its embedding's rows merged already
        table.unmerge()
    return model


def remove(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take adapters off: all of them (merged ones leave what they did in the weights), or the one of this name.

    A layer without any is again what it was. What was frozen stays frozen.

    Raises:
        UsageError: there are no adapters, none of this name, or it is merged.
    """
    layers = adapted_layers(model)
    if name is not None:
        _known(model, name)
        for key, layer in layers.items():
            _not_merged(key, layer)
    for key, layer in layers.items():
        if name is not None and name in layer.adapters:
            del layer.adapters[name]
            layer.active = tuple(other for other in layer.active if other != name)
        if name is None or not layer.adapters:
            replace_module(model, key, layer.base)
    for key, table in token_rows(model).items():
        if name is not None and name in table.adapters:
            del table.adapters[name]
            table.active = tuple(other for other in table.active if other != name)
        if name is None or not table.adapters:
            replace_module(model, key, table.base)
    return model


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What an optimizer moves, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _base(layer: nn.Linear | QuantizedLinear | Adapted) -> nn.Linear | QuantizedLinear:
    return layer.base if isinstance(layer, Adapted) else layer


def plain_linear(weight_OI: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen linear layer of these tensors, without filling in others first."""
    outputs, inputs = weight_OI.shape
    with torch.device("meta"):
        layer = nn.Linear(inputs, outputs, bias=bias is not None)
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    if bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
    return layer


def _known(model: nn.Module, name: str) -> None:
    names: Iterable[str] = adapter_names(model)
    if name not in names:
        raise UsageError(f"there is no adapter called {name}.{nearest(name, names)} There are {', '.join(names)}.")


def _not_merged(key: str, layer: nn.Module) -> None:
    if isinstance(layer, Adapted) and layer.original is not None:
        raise UsageError(f"{key}: its adapters are merged into the weight. Unmerge, or remove them, first.")
