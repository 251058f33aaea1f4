"""An adapter folder as a whole model: PEFT's two files, and beside them what its format has no place for.

    adapter_config.json, adapter_model.safetensors   see adapter_folder.py; for PEFT, all that it reads
    groundup_adapter.json       {"base_scheme": {"kind": "nf4", …} or null, "vocab_size": …}: how the linear layers of
                                the base were quantized while the adapter learnt, and how many tokens the model had

The base itself lies elsewhere: the config names it. What only PEFT wrote lacks the last file.
"""

# V vocabulary   E embedding

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groundup.model.adapter_config import BASE, CONFIG, REVISION, read_adapter_config
from groundup.model.adapter_folder import (
    TENSORS,
    A,
    adapter_contents,
    load_adapter,
    opened,
    transformer_in,
    write_adapter,
)
from groundup.model.adapter_tables import INDICES, ROWS, WHOLE, tables_of, take_tables
from groundup.model.adapters import Adapted, linear_layers, merged_layer, plain_linear
from groundup.model.experts import _Stack
from groundup.model.quantized import QuantizedLinear, QuantizedStack, Scheme, quantize_model, replace_module
from groundup.model.token_rows import TokenRows, token_rows
from groundup.model.transformer import Transformer
from groundup.model.weights.folder import load_model
from groundup.model.weights.tensor_file import TensorFile
from groundup.runtime import GroundupError, UsageError, os_errors, read_json, write_atomic, write_json

NOTE = "groundup_adapter.json"
_MODELS = ("model.safetensors", "model.safetensors.index.json")
_ON_HUB = re.compile(r"(hf:)?[\w.-]+/[\w.-]+")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model of its own."""
    return (folder / CONFIG).is_file() and not any((folder / name).is_file() for name in _MODELS)


@dataclass(frozen=True)
class AdapterNote:
    """What an adapter folder says of the model that it is for.

    Args:
        folder: it.
        base: that model's path, or its name on the hub; None where nothing is said.
        revision: its branch, tag or commit on the hub.
        scheme: how its linear layers were quantized before the adapter was put on; None for as they are.
        vocab_size: tokens of the model with the adapter; None where the folder is not ours.
        tokens: whether it has rows for tokens of its own, or a whole embedding.
        replaces: whether whole weights take the place of the base's.
    """

    folder: Path
    base: str | None
    revision: str | None
    scheme: Scheme | None
    vocab_size: int | None
    tokens: bool
    replaces: bool

    @classmethod
    def read(cls, folder: Path) -> AdapterNote:
        """Read it.

        Raises:
            GroundupError: a file of it is damaged, or says what we do not have.
        """
        config, path = read_adapter_config(folder / CONFIG), folder / NOTE
        values = read_json(path, "note of an adapter") if path.is_file() else {}
        try:
            scheme, size = values.get("base_scheme"), values.get("vocab_size")
            return cls(
                folder, config.get(BASE) or None, config.get(REVISION) or None, Scheme(**scheme) if scheme else None,
                None if size is None else int(size), bool(config.get(INDICES) or config.get(WHOLE)),
                bool(config.get(WHOLE)),
            )  # fmt: skip
        except (AttributeError, TypeError, ValueError, UsageError) as error:
            raise GroundupError(f"{path}: this note of an adapter is damaged: {error}") from error

    def local_base(self) -> Path | None:
        """Where the base lies on this machine: at an absolute path, or one from this folder or the working directory.

        None where nothing lies there.
        """
        if self.base is None or self.base.startswith("hf:"):
            return None
        places = (self.folder / self.base, self.folder.resolve() / self.base, Path(self.base))
        return next((place for place in places if place.exists()), None)

    def hub_base(self) -> str | None:
        """The base as ``hf:owner/name@revision``; None for what cannot be a name on the hub."""
        if self.base is None or _ON_HUB.fullmatch(self.base.partition("@")[0]) is None:
            return None
        spec = f"hf:{self.base.removeprefix('hf:')}"
        return spec if self.revision is None or "@" in spec else f"{spec}@{self.revision}"

    def missing_base(self) -> GroundupError:
        """The error of a base that is nowhere."""
        where = self.folder / CONFIG
        if self.base is None:
            return GroundupError(
                f"{where}: {BASE} is empty: it does not say which model the adapter is for. Write that model's path "
                "there, or name the model and give this folder as its adapter."
            )
        return GroundupError(
            f"{where}: the adapter's base model {self.base} is neither in the adapter's folder nor in this one. Write "
            f"its path there, as {BASE}, or name the model and give this folder as its adapter."
        )


# ---- out


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter folder holds, copied out of a model, which may go on learning while it is written."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    note: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write it into a folder, which is made if need be.

        Raises:
            GroundupError: it cannot be written.
        """
        write_json(folder / NOTE, self.note)
        write_adapter(folder, self.config, self.tensors)


def adapter_files(
    model: nn.Module, base_model: str, scheme: Scheme | None = None, extra: Iterable[str] = (), *,
    name: str = "default",
) -> AdapterFiles:  # fmt: skip
    """What :func:`save_adapter_model` writes, with the same arguments and errors."""
    prefix, transformer = transformer_in(model)
    whole = {key: _parameter(transformer, key, prefix) for key in extra}
    if transformer.config.tie_embeddings and "head.weight" in whole:
        whole["embedding.weight"] = whole.pop("head.weight")
    config, tensors = adapter_contents(model, name, base_model=base_model, whole=whole)
    note = {"base_scheme": None if scheme is None else asdict(scheme), "vocab_size": transformer.config.vocab_size}
    return AdapterFiles(config, tensors, note)


def save_adapter_model(
    model: nn.Module, folder: Path, base_model: str, scheme: Scheme | None = None, extra: Iterable[str] = (), *,
    name: str = "default",
) -> None:  # fmt: skip
    """Write an adapter with all that makes a model of it but the base: what :func:`load_adapter_model` reads.

    Args:
        model: a Transformer with the adapter on it, or what holds one.
        folder: is made if need be.
        base_model: where the base is: a path, or ``hf:owner/name@revision``.
        scheme: how the base was quantized after it was loaded, by
            :func:`groundup.model.quantized.quantize_model` with its usual exceptions; None where it was not.
        extra: names of whole parameters that are not the base's. Rows of the adapter
            (:func:`groundup.model.token_rows.add_token_rows`) are written without being named.
        name: which of the model's adapters.

    Raises:
        UsageError: as for :func:`groundup.model.save_adapter`; or ``extra`` names what is no parameter, or quantized.
        GroundupError: the folder cannot be written.
    """
    adapter_files(model, base_model, scheme, extra, name=name).write(folder)


def describe_adapter(folder: Path) -> str:
    """How large an adapter is, and what it is for, in words.

    Raises:
        GroundupError: a file is damaged.
    """
    note, shapes = AdapterNote.read(folder), TensorFile(folder / TENSORS).shapes
    ranks = sorted(shape[0] for name, shape in shapes.items() if name.endswith(A)) or [0]
    rank = f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
    numbers = sum(math.prod(shape) for name, shape in shapes.items() if ".lora_" in name)
    rows = next((f" and rows for {shape[0]} tokens" for name, shape in shapes.items() if name.endswith(ROWS)), "")
    whole = " and whole weights" if note.replaces else ""
    bits = "" if note.scheme is None else f" in {note.scheme.kind}"
    return f"adapter of rank {rank} on {len(ranks)} layers, {numbers:,} parameters{rows}{whole}, for {note.base}{bits}"


def copy_adapter(folder: Path, target: Path) -> None:
    """Copy the files of an adapter; a base that was found from its old folder is named by an absolute path.

    Raises:
        GroundupError: one cannot be read or written.
    """
    note, names = AdapterNote.read(folder), [TENSORS, NOTE]
    values = read_json(folder / CONFIG, "adapter config")
    found = note.local_base()
    if found is not None and found != Path(str(note.base)):
        values[BASE] = str(found.resolve())
    for name in names:
        if (folder / name).is_file():
            with os_errors(folder / name, "cannot read"):
                content = (folder / name).read_bytes()
            write_atomic(target / name, content)
    write_json(target / CONFIG, values)


# ---- in


def load_adapter_model(
    folder: Path, base: Path | None = None, *, name: str = "default", device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32, trainable: bool = False,
) -> Transformer:  # fmt: skip
    """The base of an adapter folder with the adapter on it, active.

    Args:
        base: the Hugging Face folder of the base; None for the one that the adapter names, on this machine.
            :func:`groundup.load` also finds runs, models of the hub, and bases that are adapters themselves.
        name: of the adapter on the model.
        dtype: of the base's weights; None for what they are in its files.
        trainable: whether adapter and extra weights are to be trained further.

    Raises:
        GroundupError: the base is not found, or a file is damaged or for another model.
    """
    place = base or AdapterNote.read(folder).local_base()
    if place is None:
        raise AdapterNote.read(folder).missing_base()
    return stack_adapters(load_model(place, device=device, dtype=dtype), {name: folder}, trainable=trainable)


def stack_adapters(
    model: Transformer, folders: Mapping[str, Path], *, trainable: bool = False, base_size: int | None = None
) -> Transformer:
    """Put adapters on the model that they are for, all active: what they add to a weight is summed (PEFT's rule).

    Before them the model gets what they learnt above: their tokens and whole weights, then quantized layers (unless it
    has some already).

    Args:
        model: the base, changed in place; no longer of use where this fails.
        folders: adapter folders by the names that the adapters get.
        trainable: whether adapters and whole weights of theirs are to be trained further.
        base_size: how many tokens the base had as it came, where it has grown since.

    Returns:
        The model itself.

    Raises:
        GroundupError: a file is damaged; an adapter is for another base; two of them want the same weight replaced, or
            the base quantized in different ways.
    """
    notes = [AdapterNote.read(folder) for folder in folders.values()]
    size, whose = base_size or model.config.vocab_size, dict[str, AdapterNote]()
    for note in notes:
        values, path = read_adapter_config(note.folder / CONFIG), note.folder / TENSORS
        tables = tables_of(model.config, values, path, opened(path).shapes)
        before = {name: _parameter(model, name).detach().clone() for name in tables.whole if name in whose}
        for name in take_tables(model, tables, size=note.vocab_size or 0, base_size=size):
            if name in before and not torch.equal(before[name], _parameter(model, name)):
                raise GroundupError(
                    f"{path}: {name} is replaced by {whose[name].folder.name} already. Merge one of the adapters first."
                )
            whose[name] = note
    scheme = _one_scheme(notes)
    if scheme is not None and not any(isinstance(one, (QuantizedLinear, QuantizedStack)) for one in model.modules()):
        quantize_model(model, **asdict(scheme))
    for name, folder in folders.items():
        load_adapter(model, folder, name, trainable=trainable, taken=True)
    for key in [key for key, note in whose.items() if trainable and note.replaces]:
        _parameter(model, key).requires_grad_(True)
    return model


def _one_scheme(notes: Iterable[AdapterNote]) -> Scheme | None:
    said = [note for note in notes if note.scheme is not None]
    other = next((note for note in said if note.scheme != said[0].scheme), None)
    if other is not None:
        raise GroundupError(
            f"{other.folder / NOTE}: this adapter was made on a base in {json.dumps(asdict(other.scheme))}, "  # type: ignore[arg-type]
            f"{said[0].folder.name} on one in {json.dumps(asdict(said[0].scheme))}. Merge one of them first."  # type: ignore[arg-type]
        )
    return said[0].scheme if said else None


def _parameter(model: Transformer, name: str, prefix: str = "") -> nn.Parameter:
    """A parameter by the name that it had before adapters were put on its layer.

    Raises:
        UsageError: there is none of that name, or it is quantized.
    """
    owner, _, field = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        module = nn.Module()
    module = module.base if isinstance(module, (Adapted, TokenRows)) else module
    found = module._parameters.get(field)
    if found is None:
        raise UsageError(f"{prefix}{name}: this model has no such parameter, or it is quantized.")
    return found


# ---- for good


@torch.no_grad()
def absorb(model: Transformer, *, requantize: bool = False) -> Transformer:
    """Merge the active adapters and take all adapters off: a plain model, whose parameters can be trained.

    That is :func:`groundup.model.adapters.merge` and ``remove``, one layer after the other, so that never more than one
    of them is there twice. All that is quantized becomes plain, in the dtype that it was made of.

    Args:
        model: changed in place.
        requantize: leave what is quantized so, and quantize layers again that adapters were merged into.

    Returns:
        The model itself.
    """
    for name in list(linear_layers(model)):
        layer = model.get_submodule(name)
        if isinstance(layer, Adapted):
            replace_module(model, name, merged_layer(layer, requantize=requantize))
        elif isinstance(layer, QuantizedLinear) and not requantize:
            replace_module(model, name, plain_linear(layer.weight, layer.bias).train(layer.training))
    for name, table in token_rows(model).items():
        table.merge()
        replace_module(model, name, table.base)
    stacks = [name for name, module in model.named_modules() if isinstance(module, QuantizedStack)]
    for name in stacks if not requantize else ():
        stack = model.get_submodule(name)
        assert isinstance(stack, QuantizedStack)
        replace_module(model, name, _plain_stack(stack).train(stack.training))
    return model.requires_grad_(True)


def _plain_stack(stack: QuantizedStack) -> _Stack:
    weight_NOI, bias_NO = stack.weight, stack.bias
    count, outputs, inputs = weight_NOI.shape
    with torch.device("meta"):
        plain = _Stack(count, inputs, outputs, bias=bias_NO is not None)
    plain.weight = nn.Parameter(weight_NOI)
    if bias_NO is not None:
        plain.bias = nn.Parameter(bias_NO)
    return plain
