"""What a folder says of quantized weights: its ``quantization_config``, and the empty model that they are read into.

The tensors of such a folder are the model's own, by its own names: ``blocks.0.attention.q.codes`` and ``.scale`` as
quantized.py lays them out, and every other parameter as it is. No other tool knows this layout, so the folder's
``model_type`` is ``groundup``: transformers, which passes over ways of quantizing that it does not know, would open a
folder of a known type with random weights in their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from groundup.model.experts import _Stack
from groundup.model.quantized import Scheme, _Quantized, quantize_model
from groundup.model.transformer import Transformer
from groundup.runtime import GroundupError, UsageError

METHOD = "groundup"
_FIELDS = tuple(field.name for field in fields(Scheme))


@dataclass(frozen=True)
class Quantization:
    """Which layers of a model are quantized, and how.

    Args:
        scheme: how, the same for all but the head.
        skipped: the names of linear layers and stacks of experts that are not.
        head: how the head is, where that is another way.
    """

    scheme: Scheme
    skipped: tuple[str, ...]
    head: Scheme | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Quantization | None:
        """What has been done to a model; None when none of its layers is quantized.

        Raises:
            UsageError: its layers are quantized in different ways, which a folder has no words for.
        """
        layers = {name: module.scheme for name, module in model.named_modules() if isinstance(module, _Quantized)}
        if not layers:
            return None
        head = layers.pop("head", None) if len(layers) > 1 else None
        (first, scheme), *others = layers.items()
        other = next((name for name, found in others if found != scheme), None)
        if other is not None:
            raise UsageError(
                f"{first} is {scheme}, {other} is {layers[other]}: only one way is saved. Use one for all."
            )
        left = tuple(name for name, module in model.named_modules() if isinstance(module, (nn.Linear, _Stack)))
        return cls(scheme, left, None if head == scheme else head)

    @classmethod
    def from_json(cls, values: Any, where: Path) -> Quantization | None:
        """What a ``quantization_config`` says; None when there is none, or one of another tool.

        Raises:
            GroundupError: it makes no sense.
        """
        if not isinstance(values, Mapping) or values.get("quant_method") != METHOD:
            return None
        skipped = values.get("skipped")
        try:
            scheme = Scheme(**{name: values[name] for name in _FIELDS})
            head = Scheme(**{name: values["head"][name] for name in _FIELDS}) if values.get("head") else None
        except (KeyError, TypeError, UsageError) as error:
            raise GroundupError(f"{where}: quantization_config is damaged: {error}") from error
        if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
            raise GroundupError(f"{where}: quantization_config is damaged: skipped is not a list of names.")
        return cls(scheme, tuple(skipped), head)

    def to_json(self) -> dict[str, Any]:
        """The content of ``quantization_config``."""
        head = {} if self.head is None else {"head": asdict(self.head)}
        return {"quant_method": METHOD} | asdict(self.scheme) | {"skipped": list(self.skipped)} | head

    def apply(self, model: Transformer, dtype: torch.dtype = torch.float32) -> None:
        """Give a model on the meta device the quantized layers, empty too; ``dtype`` is what they compute in.

        Raises:
            UsageError: it has no such layers.
        """
        others = () if self.head is None else ("head",)
        quantize_model(model, **asdict(self.scheme), skip=(*self.skipped, *others))
        if self.head is not None:
            quantize_model(model, **asdict(self.head), skip=self.skipped)
        for module in model.modules():
            if isinstance(module, _Quantized):
                module.to(dtype)
