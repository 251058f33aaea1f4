"""Adapters as PEFT keeps them: a folder of ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT knows layers by the names that transformers has for them, which the links of groundup.model.weights tell. Where
several of our layers are one there (queries, keys and values of GPT-2 or Phi-3), theirs is written as one adapter whose
A has the rows of all of ours, and whose B is block-diagonal: the same function, at their ranks' sum.

      q: Bq Aq            qkv:   Bq          Aq
      k: Bk Ak    ──►               Bk       Ak
      v: Bv Av                         Bv    Av

Rows for single tokens and whole weights: adapter_tables.py.
"""

# O outputs   I inputs   R rank

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from groundup.model.adapter_config import (
    BASE,
    CONFIG,
    base_fields,
    called,
    config_of,
    layer_config,
    read_adapter_config,
    wrong_base,
)
from groundup.model.adapter_tables import (
    PREFIX,
    Tables,
    adapter_families,
    module_name,
    tables_of,
    take_tables,
    written_tables,
)
from groundup.model.adapters import (
    Adapted,
    Lora,
    LoraConfig,
    adapted_layers,
    adapter_names,
    linear_layers,
    put_adapter,
)
from groundup.model.token_rows import add_token_rows, token_rows
from groundup.model.transformer import Transformer
from groundup.model.weights.families import Family
from groundup.model.weights.links import Link, same
from groundup.model.weights.tensor_file import TensorFile
from groundup.runtime import GroundupError, UsageError, warn, write_atomic, write_json
from groundup.runtime.errors import nearest

TENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_AMBIGUOUS = (
    ".gate_proj",
    ".up_proj",
    ".down_proj",
)  # to PEFT: transformers 5 fuses experts of these names


@dataclass(frozen=True)
class _Layer:
    """A linear layer of theirs.

    Args:
        theirs: its name there.
        ours: the layers that it is here, in order.
        rows_O: for each of their outputs, which of ours (one layer's after the other's) it is.
        transposed: whether its weight has inputs before outputs.
    """

    theirs: str
    ours: tuple[str, ...]
    rows_O: Tensor
    transposed: bool


def save_adapter(
    model: nn.Module, folder: Path, name: str = "default", *, base_model: str | None = None, family: str | None = None
) -> None:
    """Write one adapter into a folder, which is made if need be; PEFT loads it onto the same model saved by us.

    Args:
        base_model: what model it is for, for the config: a path, or a name on the hub (``hf:owner/name@revision``).
        family: the ``model_type`` whose names are used where a model is of several (Phi-3 is Llama with joined
            matrices); default that of the folder that :func:`groundup.model.save_model` writes.

    Raises:
        UsageError: there is no such adapter, or it is on some of several layers that are one for PEFT; the model is not
            of the family.
        GroundupError: the folder cannot be written.
    """
    write_adapter(folder, *adapter_contents(model, name, base_model=base_model, family=family))


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the two files of an adapter.

    Raises:
        GroundupError: the folder cannot be written.
    """
    write_atomic(folder / TENSORS, safetensors.torch.save(tensors, {"format": "pt"}))
    write_json(folder / CONFIG, config)


def adapter_contents(
    model: nn.Module, name: str = "default", *, base_model: str | None = None, family: str | None = None,
    whole: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # fmt: skip
    """What :func:`save_adapter` writes, with the same arguments and errors: the config, and copies of the tensors.

    Args:
        whole: weights by their names in the Transformer that take the place of the base's.
    """
    layers = adapted_layers(model)
    if name not in adapter_names(model):
        raise UsageError(f"there is no adapter called {name}.{nearest(name, adapter_names(model))}")
    prefix, transformer = transformer_in(model)
    loras = {key.removeprefix(prefix): layer.lora(name) for key, layer in layers.items() if name in layer.adapters}
    tensors: dict[str, Tensor] = {}
    configs: dict[str, LoraConfig] = {}
    usual, ways = next(iter(loras.values())).config, adapter_families(transformer.config)
    if family not in (None, *ways):
        raise UsageError(f"family {family!r}: this model is of {', '.join(map(str, ways))}.")
    way = ways[family or next(iter(ways))]
    known = _layers(transformer, way)
    for layer in known:
        have = [key for key in layer.ours if key in loras]
        if not have:
            continue
        if len(have) < len(layer.ours):
            raise UsageError(
                f"{prefix}{have[0]}: for PEFT this is a part of {layer.theirs}, and its format has no adapters on a "
                f"part. Adapt {', '.join(layer.ours)} together, or merge and save the whole model."
            )
        mine = [loras.pop(key) for key in have]
        configs[layer.theirs] = mine[0].config.at_rank(sum(lora.config.rank for lora in mine))
        tensors |= {f"{PREFIX}{layer.theirs}.{part}": tensor for part, tensor in _joined(layer, mine).items()}
    if loras:
        raise UsageError(
            f"{prefix}{next(iter(loras))}: other tools have no name for this layer, which PEFT's format needs."
        )
    if transformer.config.experts.count and any(key.endswith(_AMBIGUOUS) for key in configs):
        warn(
            "PEFT with transformers 5 takes adapters on the dense and shared feed-forwards of this model for those of "
            "its experts, and leaves them out. Merge and save the whole model to use them there."
        )
    transposed = any(layer.transposed for layer in known if layer.theirs in configs)
    content = config_of(usual, configs, {layer.theirs for layer in known})
    content |= {**base_fields(base_model), "fan_in_fan_out": transposed}
    rows = {
        table: (module.rows(name).places_M, module.rows(name).weight)
        for table, module in token_rows(transformer).items()
        if name in module.adapters and not (table == "head" and transformer.config.tie_embeddings)
    }
    try:
        fields, more = written_tables(transformer.config, way, rows, whole or {})
    except KeyError as error:
        raise UsageError(
            f"{prefix}{error.args[0]}: this weight is a part of another one for other tools, and PEFT's format has no "
            "place for it."
        ) from None
    return content | fields, tensors | more


def load_adapter(
    model: nn.Module, folder: Path, name: str = "default", *, base_model: str | None = None, trainable: bool = False,
    taken: bool = False,
) -> nn.Module:  # fmt: skip
    """Put an adapter that we or PEFT saved onto a model, active beside those that are there already.

    Args:
        base_model: what this model is called; an adapter for one of another name is refused. None does not ask.
        trainable: whether it is to be trained further.
        taken: whether the model has its tokens and its whole weights already
            (:func:`groundup.model.adapter_tables.take_tables`).

    Returns:
        The model itself. It is not changed if the adapter does not fit.

    Raises:
        UsageError: as for :func:`groundup.model.adapters.add_adapter`.
        GroundupError: a file is missing, damaged or pickled, uses what we do not have, or is for another model.
    """
    values = read_adapter_config(folder / CONFIG)
    path, wanted = folder / TENSORS, values.get(BASE)
    if base_model is not None and wanted and called(wanted).lower() != called(base_model).lower():
        raise wrong_base(folder, wanted, base_model)
    file = opened(path)
    prefix, transformer = transformer_in(model)
    tables = tables_of(transformer.config, values, path, file.shapes)
    rows = _rows(tables, file, transformer)
    tensors = {key: file.read(key) for key in tables.rest}
    linear = linear_layers(transformer)
    configs: dict[str, LoraConfig] = {}
    contents: dict[str, dict[str, Tensor]] = {}
    for layer in _layers_named(transformer, tensors):
        start = f"{PREFIX}{layer.theirs}."
        found = {key.removeprefix(start): tensors.pop(key) for key in list(tensors) if key.startswith(start)}
        if not found:
            if any(f".{layer.theirs}".endswith(f".{target}") for target in values["target_modules"]):
                raise GroundupError(f"{path}: the tensor {start}{A} is missing, though the config has it as a target.")
            continue
        config = layer_config(values, layer.theirs)
        _check(path, start, layer, found, [linear[key] for key in layer.ours], config)
        parts = _split(layer, found, [linear[key].out_features for key in layer.ours])
        for key, part in zip(layer.ours, parts, strict=True):
            configs[prefix + key], contents[prefix + key] = config.at_rank(len(part["A"])), part
    if tensors:
        raise GroundupError(f"{path}: the tensor {min(tensors)} has no place in this model. Is it for another?")
    if not configs:
        raise GroundupError(f"{path}: there is no adapter in this file.")
    if not taken:
        take_tables(transformer, tables)
    put_adapter(model, configs, name)
    with torch.no_grad():
        for key, part in contents.items():
            layer_here = model.get_submodule(key)
            assert isinstance(layer_here, Adapted)
            lora = layer_here.lora(name)
            for field, tensor in part.items():
                getattr(lora, field).copy_(tensor)
            lora.requires_grad_(trainable)
    for table, (ids_M, rows_ME) in rows.items():
        add_token_rows(transformer, name, ids_M, (table,), trainable=trainable)
        with torch.no_grad():
            token_rows(transformer)[table].rows(name).weight.copy_(rows_ME)
    return model


def _rows(tables: Tables, file: TensorFile, model: Transformer) -> dict[str, tuple[Tensor, Tensor]]:
    """The rows of each table with their ids, ascending.

    Raises:
        GroundupError: they are of another width; or head and embedding, which are one here, have different ones.
    """
    for one, other in tables.twins:
        if not torch.equal(file.read(one), file.read(other)):
            raise GroundupError(
                f"{tables.path}: {one} and {other} are different, and this model's head and embedding are one. "
                "Untie them in the base model first."
            )
    found = {}
    for table, key in tables.rows.items():
        ids_M = torch.tensor(tables.ids[table])
        if file.shapes[key][1:] != (model.config.n_embd,):
            raise GroundupError(
                f"{tables.path}: {key} has shape {list(file.shapes[key])}, the base model has {model.config.n_embd} "
                "numbers for each token. Is the adapter for another base model?"
            )
        order = ids_M.argsort()
        found[table] = ids_M[order], file.read(key)[order]
    return found


# ---- names


def transformer_in(model: nn.Module) -> tuple[str, Transformer]:
    """The language model within a module (a classifier has one below its labels), and the prefix of its names."""
    for name, module in model.named_modules():
        if isinstance(module, Transformer):
            return f"{name}." if name else "", module
    raise UsageError("adapters are saved and loaded for a Transformer, or for what holds one.")


def _layers_named(model: Transformer, tensors: Iterable[str]) -> list[_Layer]:
    """Their linear layers in the family whose names an adapter uses; in the first if there is no such."""
    modules = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in tensors}
    ways = [_layers(model, family) for family in adapter_families(model.config).values()]
    return next((layers for layers in ways if modules <= {layer.theirs for layer in layers}), ways[0])


def _layers(model: Transformer, family: Family | None) -> list[_Layer]:
    """Their linear layers and what they are of ours. A model that is groundup's own keeps its names."""
    linear = linear_layers(model)
    links: Iterable[Link] = (
        (same(f"{key}.weight", f"{key}.weight") for key in linear) if family is None else family.links(model.config)
    )
    found = []
    for link in links:
        ours = tuple(place.name.removesuffix(".weight") for place in link.ours)
        if link.theirs.endswith(".weight") and all(key in linear for key in ours):
            rows_O, transposed = _arrangement(link, [linear[key].out_features for key in ours])
            found.append(_Layer(module_name(link.theirs).removesuffix(".weight"), ours, rows_O, transposed))
    return found


def _arrangement(link: Link, outputs: list[int]) -> tuple[Tensor, bool]:
    """How a link arranges rows, found by sending their numbers through it, two inputs wide."""
    numbers = torch.arange(sum(outputs)).split(outputs)
    joined = link.join([part[:, None].expand(-1, 2) for part in numbers])
    transposed = joined.shape[-1] != 2 or bool((joined[0, 0] != joined[0, 1]).item())
    return (joined[0] if transposed else joined[:, 0]).contiguous(), transposed


# ---- tensors


def _joined(layer: _Layer, loras: list[Lora]) -> dict[str, Tensor]:
    """Their tensors of one layer."""
    found = {
        A: torch.cat([lora.A.detach() for lora in loras]),
        B: torch.block_diag(*(lora.B.detach() for lora in loras))[layer.rows_O.to(loras[0].B.device)],
    }
    magnitudes = [lora.magnitude.detach() for lora in loras if lora.magnitude is not None]
    if magnitudes:
        found[MAGNITUDE] = torch.cat(magnitudes)[layer.rows_O.to(magnitudes[0].device)]
    return {name: tensor.cpu().contiguous() for name, tensor in found.items()}


def _split(layer: _Layer, found: dict[str, Tensor], outputs: list[int]) -> list[dict[str, Tensor]]:
    """The other way round. A block-diagonal B is taken apart; of another, each part has the whole A."""
    back_O = layer.rows_O.argsort()
    b_parts = found[B][back_O].split(outputs)
    rank = len(found[A]) // len(outputs)
    blocks = rank * len(outputs) == len(found[A]) and torch.equal(
        torch.block_diag(*(part[:, n * rank : (n + 1) * rank] for n, part in enumerate(b_parts))), torch.cat(b_parts)
    )
    parts = []
    for n, part in enumerate(b_parts):
        own = slice(n * rank, (n + 1) * rank) if blocks else slice(None)
        parts.append({"A": found[A][own], "B": part[:, own]})
    if MAGNITUDE in found:
        for mine, magnitude_O in zip(parts, found[MAGNITUDE][back_O].split(outputs), strict=True):
            mine["magnitude"] = magnitude_O
    return parts


def _check(
    path: Path, start: str, layer: _Layer, found: dict[str, Tensor], linear: list[Any], config: LoraConfig
) -> None:
    outputs, inputs = sum(one.out_features for one in linear), linear[0].in_features
    shapes = {A: [config.rank, inputs], B: [outputs, config.rank]} | ({MAGNITUDE: [outputs]} if config.dora else {})
    for name, shape in shapes.items():
        if name not in found:
            raise GroundupError(f"{path}: the tensor {start}{name} is missing.")
        if list(found[name].shape) != shape:
            raise GroundupError(
                f"{path}: {start}{name} has shape {list(found[name].shape)}, this model's {', '.join(layer.ours)} and "
                f"the config ask for {shape}. Is the adapter for another base model?"
            )
    for name in found.keys() - shapes.keys():
        raise GroundupError(f"{path}: the tensor {start}{name} has no place in this model.")


def opened(path: Path) -> TensorFile:
    """The tensors of an adapter.

    Raises:
        GroundupError: it is missing, damaged or pickled.
    """
    pickle = path.with_name(PICKLE)
    if not path.exists() and pickle.exists():
        raise GroundupError(
            f"{pickle}: a pickled file, which can run code when opened: never read. "
            f"Save the adapter again as {TENSORS}, which PEFT does by itself since 0.8."
        )
    return TensorFile(path)
