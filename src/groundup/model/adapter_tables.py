"""What an adapter's file holds besides LoRA: rows for single tokens, and whole weights that take the place of a base's.

    adapter_config.json                       adapter_model.safetensors, below base_model.model.
    trainable_token_indices                   {table}.token_adapter.trainable_tokens_delta     rows, one for each id
    modules_to_save                           {module}.weight                                  a whole weight
    (nothing: the base had been resized)      {table}.token_adapter.base_layer.weight          a whole weight
                                              {module}.original_module.weight                  of the base: passed over

The first two are what PEFT documents; the others are what its versions up to 0.21 add to them.
"""

# V vocabulary   M tokens with rows   E embedding

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundup.model.config import ModelConfig
from groundup.model.resizing import resize_embeddings
from groundup.model.token_rows import TABLES
from groundup.model.transformer import Transformer
from groundup.model.weights.config_json import SECTION, families_of
from groundup.model.weights.families import Family
from groundup.model.weights.folder import links_of
from groundup.model.weights.tensor_file import TensorFile
from groundup.runtime import GroundupError

PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"
INDICES, WHOLE, TYING = "trainable_token_indices", "modules_to_save", "ensure_weight_tying"
_AROUND = re.compile(r"\.(token_adapter\.base_layer|modules_to_save)(?=\.\w+$)")
_PASSED_OVER = ".original_module."
_TABLE_WEIGHTS = tuple(f"{name}.weight" for name in TABLES)
_HEADS = ("lm_head.weight", "embed_out.weight", "head.weight")  # which a model with a tied head has no name for


def adapter_families(config: ModelConfig) -> dict[str, Family | None]:
    """All families that this config is of, first the one that it is saved as; groundup's own alone if it is of none."""
    found: dict[str, Family | None] = {family.model_type: family for family in families_of(config)}
    return found or {SECTION: None}


def whole_names(config: ModelConfig, family: Family | None) -> dict[str, str]:
    """The weights that have one name there and one here, theirs (as its modules are called) to ours."""
    if family is None:
        with torch.device("meta"):
            links = links_of(Transformer(config))
    else:
        links = family.links(config)
    return {module_name(link.theirs): link.ours[0].name for link in links if link.plain and link.ours[0].index is None}


def module_name(theirs: str) -> str:
    """What transformers calls the module of a tensor in a file: GPT-NeoX's head has another name there since 5."""
    return re.sub(r"^embed_out\b", "lm_head", theirs)


@dataclass(frozen=True)
class Tables:
    """Where in its file an adapter's rows and whole weights are.

    Args:
        path: the file.
        shapes: of all its tensors.
        ids: of each table with rows (``embedding``, ``head``) the ids, in the order of its rows.
        rows: of each such table the tensor's name.
        whole: of each of our weights that is replaced the tensor's name.
        twins: pairs of tensors that must be the same, since head and embedding are one here.
        rest: names of the other tensors.
    """

    path: Path
    shapes: Mapping[str, Sequence[int]]
    ids: dict[str, list[int]]
    rows: dict[str, str]
    whole: dict[str, str]
    twins: list[tuple[str, str]]
    rest: list[str]

    @property
    def vocab_size(self) -> int:
        """How many tokens a model needs to take it; 0 where it says nothing of them."""
        tables = [self.shapes[key][0] for name, key in self.whole.items() if name in _TABLE_WEIGHTS]
        return max([*tables, *(max(ids) + 1 for ids in self.ids.values())], default=0)

    def brings(self, first: int, last: int) -> bool:
        """Whether it has embeddings for all ids from ``first`` to the one before ``last``."""
        key = self.whole.get("embedding.weight")
        known = set(self.ids.get("embedding", ())) | set(range(0 if key is None else self.shapes[key][0]))
        return set(range(first, last)) <= known


def tables_of(
    config: ModelConfig, values: Mapping[str, Any], path: Path, shapes: Mapping[str, Sequence[int]]
) -> Tables:
    """Sort the tensors of an adapter's file.

    Args:
        config: of the model that it is put on.
        values: the adapter's config.
        shapes: of the tensors.

    Raises:
        GroundupError: rows or a whole weight have no place in this model, or not so many ids.
    """
    ours = _names(config, shapes)
    ids: dict[str, list[int]] = {}
    rows: dict[str, str] = {}
    whole: dict[str, str] = {}
    twins: list[tuple[str, str]] = []
    rest: list[str] = []
    for key in sorted(shapes):
        theirs = _AROUND.sub("", key.removeprefix(PREFIX))
        if ".lora_" in key:
            rest.append(key)
        elif _PASSED_OVER in key:
            continue
        elif key.endswith(ROWS):
            name = ours.get(f"{theirs.removesuffix(ROWS)}.weight", "").removesuffix(".weight")
            if name not in TABLES:
                raise GroundupError(f"{path}: the tensor {key} has no place in this model. Is it for another?")
            _first_or_twin(rows, name, key, twins)
            ids[name] = _ids(values, theirs.removesuffix(ROWS), shapes[key], path, key)
        elif theirs in ours:
            _first_or_twin(whole, ours[theirs], key, twins)
        else:
            raise GroundupError(f"{path}: the tensor {key} has no place in this model. Is it for another?")
    return Tables(path, shapes, ids, rows, whole, twins, rest)


def _names(config: ModelConfig, names: Iterable[str]) -> dict[str, str]:
    """Theirs to ours, in the family that knows most of an adapter's weights."""
    wanted = {_AROUND.sub("", name.removeprefix(PREFIX)).replace(ROWS, ".weight") for name in names}
    ways = [whole_names(config, family) for family in adapter_families(config).values()]
    best = max(ways, key=lambda found: len(wanted & found.keys()))
    return best | (dict.fromkeys(_HEADS, "embedding.weight") if config.tie_embeddings else {})


def _first_or_twin(found: dict[str, str], name: str, key: str, twins: list[tuple[str, str]]) -> None:
    if name in found:
        twins.append((key, found[name]))
    else:
        found[name] = key


def _ids(values: Mapping[str, Any], module: str, shape: Sequence[int], path: Path, key: str) -> list[int]:
    said = values.get(INDICES) or []
    if isinstance(said, Mapping):  # by the end of a module's name; a tied head goes by its embedding's
        fitting = [ids for name, ids in said.items() if module.endswith(str(name))]
        said = fitting[0] if fitting else next(iter(said.values()), [])
    right = isinstance(said, Sequence) and all(isinstance(one, int) and one >= 0 for one in said)
    if not right or len(set(said)) != len(said) or len(said) != shape[0]:
        raise GroundupError(f"{path}: {key} has {shape[0]} rows; {INDICES} of the config does not name as many tokens.")
    return list(said)


@torch.no_grad()
def take_tables(model: Transformer, tables: Tables, *, size: int = 0, base_size: int | None = None) -> list[str]:
    """Give a model as many tokens as an adapter needs, and the adapter's whole weights in the place of its own.

    Args:
        model: changed in place, before anything is put on it.
        size: how many tokens the adapter says that its model had; 0 where it says nothing.
        base_size: how many the base had as it came, where it has grown since.

    Returns:
        The names of the weights that were replaced.

    Raises:
        GroundupError: the adapter was made on a model of another size, or with other tokens; or the file is damaged.
        UsageError: the model has to grow, and has adapters already.
    """
    had, has = base_size or model.config.vocab_size, max(size, tables.vocab_size)
    if 0 < size < had or (has > had and not tables.brings(had, has)):
        more = ", and it has no embeddings for the others" if has > had else ""
        raise GroundupError(
            f"{tables.path}: this adapter was made on a model of {has} tokens, this one has {had}{more}. "
            "Is the adapter for another base model?"
        )
    own = dict(model.named_parameters())
    for name, key in tables.whole.items():
        shape, wanted = list(tables.shapes[key]), list(own[name].shape) if name in own else []
        fits = shape[1:] == wanted[1:] if name in _TABLE_WEIGHTS else shape == wanted
        if name not in own or not fits:
            raise GroundupError(
                f"{tables.path}: {key} has shape {shape}, the base model asks for {wanted}. "
                "Is the adapter for another base model?"
            )
    if has > model.config.vocab_size:
        resize_embeddings(model, has)
    file, own = TensorFile(tables.path), dict(model.named_parameters())
    for name, key in tables.whole.items():  # another adapter, or the base as it has grown, may have more tokens
        file.read_into(key, own[name][: tables.shapes[key][0]])
    return list(tables.whole)


def written_tables(
    config: ModelConfig, family: Family | None, rows: Mapping[str, tuple[Tensor, Tensor]], whole: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields and the tensors of rows and whole weights, as copies.

    Args:
        rows: of each table, ids M and rows M E; of a tied head none.
        whole: weights by our names.

    Raises:
        KeyError: a weight has no name of its own in the family; its argument is our name.
    """
    theirs = {ours: name for name, ours in whole_names(config, family).items()}
    fields: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for table, (places_M, rows_ME) in rows.items():
        module = theirs[f"{table}.weight"].removesuffix(".weight")
        fields.setdefault(INDICES, {})[module] = places_M.tolist()
        tensors[f"{PREFIX}{module}{ROWS}"] = rows_ME.detach().cpu().clone()
    for name, tensor in whole.items():
        fields.setdefault(WHOLE, []).append(theirs[name].rpartition(".")[0])
        tensors[f"{PREFIX}{theirs[name]}"] = tensor.detach().cpu().clone()
    if whole:
        fields[WHOLE] = sorted(set(fields[WHOLE]))
    if config.tie_embeddings and "embedding.weight" in whole:
        fields[TYING] = True  # else PEFT trains a copy of it, and leaves the head as it was
    return fields, tensors
