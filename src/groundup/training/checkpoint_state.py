"""What is in a checkpoint: which tensors, under which names, and how they come back at another world size.

``training_state/`` holds pieces. A rank writes what it has of each tensor, and notes in the header of the file where in
the tensor that begins. It is the layout in which ``torch.distributed.checkpoint`` writes safetensors
(``HuggingFaceStorageWriter`` with ``save_distributed=True``), whose reader opens these folders; that writer itself
copies everything twice and needs collectives, which a thread must not call.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from groundup.model import Transformer
from groundup.model.weights import config_to_json
from groundup.model.weights.folder import SHARD_BYTES, generation_config, links_of
from groundup.model.weights.links import Link
from groundup.model.weights.tensor_file import DTYPES
from groundup.optim.sharded import cut_like, local_part
from groundup.runtime import GroundupError, UsageError, os_errors, write_json
from groundup.runtime.process_group import World
from groundup.tokenizer import Tokenizer
from groundup.training.checkpoint_writer import Entry, LiveFile, Moment

Optimizers = Mapping[str, torch.optim.Optimizer]
STATE = "training_state"
EXTRA, RAW = "extra", "model"  # first part of the name of a tensor that is not an optimizer's
OWN = "own"  # and, among the extra ones, of a trained parameter that the saved model has no place for
_SHARDING, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # torch.distributed.checkpoint's words


# ---- saving


def optimizer_tensors(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """Every tensor of the optimizers' state, named ``optimizer/parameter/state``; sharded ones stay so."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{kind}/{names[id(parameter)]}/{key}": value
        for kind, optimizer in optimizers.items()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


@dataclass
class Contents:
    """The tensors of one save, as this rank sees them.

    Args:
        model: the one that is saved for others to open; None where there is none.
        trained: whose parameters the optimizers hold: that model, or what is built around it.
        world: the ranks that save together.
        moments: by GPU, when to read it.
    """

    model: Transformer | None
    trained: nn.Module
    world: World
    moments: dict[torch.device, Moment] = field(default_factory=dict)

    def entry(self, name: str, parts: Sequence[Tensor], link: Link | None = None, owned: bool = False) -> Entry:
        """An entry of a file, read at the moment of this save."""
        device = parts[0].device
        if device.type == "cuda" and device not in self.moments:
            self.moments[device] = Moment(device)
        moment = self.moments.get(device)
        if link is None:
            return Entry(name, parts, owned=owned, moment=moment)
        return Entry(name, parts, link.join, owned=owned, moment=moment)

    # ---- model.safetensors

    def model_files(self, exported: Mapping[str, Tensor] | None) -> tuple[list[LiveFile], list[str]]:
        """The files that Hugging Face tools open. Of sharded weights rank 0 gathers one after the other: all must ask.

        Args:
            exported: what to save instead of the model's own weights, by name.

        Returns:
            The files (on rank 0; elsewhere none), and the names of the model's tensors whose own value is not in them.

        Raises:
            UsageError: the model has adapters or quantized layers.
        """
        model = self.model
        if model is None:
            return [], []
        own: dict[str, Tensor] = dict(model.state_dict())
        links = links_of(model)
        needed = dict.fromkeys(place.name for link in links for place in link.ours)
        if lost := next((name for name in needed if name not in own), None):
            raise UsageError(
                f"{lost} is behind an adapter or quantized: only plain weights are saved as a model. Merge and remove "
                "adapters, or save them by themselves (groundup.model.save_adapter)."
            )
        given = own | dict(exported or {})
        tensors, owned = self._gathered(model, {name: given[name] for name in needed})
        tied = {"head.weight"} if model.config.tie_embeddings else set()
        apart = [name for name in own if name in (exported or {}) or (name not in needed and name not in tied)]
        if not self.world.is_main:
            return [], apart
        files = []
        groups = list(_shards(links, tensors))
        for number, group in enumerate(groups, start=1):
            several = f"model-{number:05}-of-{len(groups):05}.safetensors"
            entries = []
            for link in group:
                parts = [place.of(tensors) for place in link.ours]
                entries.append(self.entry(link.theirs, parts, link, all(place.name in owned for place in link.ours)))
            files.append(LiveFile("model.safetensors" if len(groups) == 1 else several, entries))
        return files, apart

    def _gathered(self, model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
        """Sharded tensors whole (on rank 0; elsewhere empty), and the names of those that are copies by now."""
        changing = {name for name, _ in model.named_buffers()}
        found, owned = dict(tensors), set()
        for name, tensor in tensors.items():
            if hasattr(tensor, "full_tensor"):
                whole: Tensor = tensor.full_tensor().detach()
                alias = whole.data_ptr() == local_part(tensor).data_ptr()  # it was whole before
                found[name] = whole.to("cpu", copy=alias) if self.world.is_main else torch.empty(0)
                owned.add(name)
            elif name in changing:  # a forward pass may change them
                found[name] = tensor.detach().to("cpu", copy=True)
                owned.add(name)
        return found, owned

    # ---- training_state

    def state_files(
        self, optimizers: Optimizers, extra: Mapping[str, Tensor] | None, apart: Sequence[str]
    ) -> list[LiveFile]:
        """The files of ``training_state`` that this rank writes: one for each kind of state, such as AdamW's mean.

        Args:
            extra: further tensors by name.
            apart: names of the model's tensors that belong here.
        """
        own = {} if self.model is None else self.model.state_dict()
        groups: dict[str, dict[str, Tensor]] = {RAW: {f"{RAW}/{name}": own[name] for name in apart}}
        for name, tensor in optimizer_tensors(self.trained, optimizers).items():
            kind, _, key = name.split("/")
            groups.setdefault(f"{kind}-{key}", {})[name] = tensor
        groups[EXTRA] = {f"{EXTRA}/{name}": tensor for name, tensor in (extra or {}).items()}
        ending = f"-{self.world.rank + 1:05}-of-{self.world.size:05}.safetensors"
        files = []
        for group, tensors in groups.items():
            entries, offsets = [], {}
            for name, tensor in tensors.items():
                begin = self._offsets(tensor)
                if begin is not None:
                    entries.append(self.entry(name, [local_part(tensor.detach())]))
                    offsets[name] = {_OFFSETS: begin}
            if entries:
                files.append(LiveFile(f"{STATE}/{group}{ending}", entries, {_SHARDING: json.dumps(offsets)}))
        return files

    def _offsets(self, tensor: Any) -> list[int] | None:
        """Where in the whole tensor this rank's part begins; None where another rank writes it, or it has none."""
        if not hasattr(tensor, "device_mesh"):
            return [0] * tensor.ndim if self.world.is_main else None
        place = tensor.device_mesh.get_coordinate()
        copy = place is None or any(
            at and placement.is_replicate() for at, placement in zip(place, tensor.placements, strict=True)
        )
        return None if copy or not tensor.to_local().numel() else _region(tensor)[0]


def describe(model: Transformer, tokenizer: Tokenizer, weights: Sequence[LiveFile], place: Path) -> None:
    """Write what other tools read beside the weights.

    Raises:
        GroundupError: the folder cannot be written.
    """
    end = tokenizer.end_of_text_id
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    write_json(place / "config.json", config_to_json(model.config, dtype=dtype, bos_id=end, eos_id=end))
    write_json(place / "generation_config.json", generation_config(end, end, tokenizer.end_ids))
    if len(weights) > 1:
        total = sum(entry.nbytes for file in weights for entry in file.entries)
        where = {entry.name: file.name for file in weights for entry in file.entries}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_json(place / "model.safetensors.index.json", index)
    tokenizer.save(place)


def _region(tensor: Any) -> tuple[list[int], list[int]]:
    """Offsets and sizes of this rank's part of a sharded tensor."""
    (chunk,) = tensor.__create_chunk_list__()  # the protocol by which torch.distributed.checkpoint asks
    return list(chunk.offsets), list(chunk.sizes)


def _shards(links: Sequence[Link], tensors: dict[str, Tensor]) -> Iterator[list[Link]]:
    """Links in groups of at most 5 GB, in order; a larger tensor has a group to itself."""
    group: list[Link] = []
    size = 0
    for link in links:
        nbytes = sum(place.of(tensors).nbytes for place in link.ours)
        if group and size + nbytes > SHARD_BYTES:
            yield group
            group, size = [], 0
        group.append(link)
        size += nbytes
    yield group


# ---- loading


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor: its file, its name there, where in the tensor it begins, its shape and its type."""

    path: Path
    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


class Pieces(Mapping[str, Tensor]):
    """The tensors of ``training_state``, read when they are asked for: whole, or only the part that a rank needs.

    Args:
        pieces: of each tensor.
    """

    def __init__(self, pieces: Mapping[str, Sequence[_Piece]]) -> None:
        self._pieces = pieces

    @classmethod
    def open(cls, folder: Path) -> Pieces:
        """All tensors in the safetensors files of a folder.

        Raises:
            GroundupError: a file is damaged.
        """
        found: dict[str, list[_Piece]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with _opened(path) as file:
                try:
                    noted = json.loads((file.metadata() or {}).get(_SHARDING, "{}"))
                    for name in file.keys():  # noqa: SIM118 (a safetensors handle is no dictionary)
                        part = file.get_slice(name)
                        shape, dtype = tuple(part.get_shape()), DTYPES[part.get_dtype()]
                        offsets = tuple(noted[name][_OFFSETS]) if name in noted else (0,) * len(shape)
                        if len(offsets) != len(shape):
                            raise ValueError(name)
                        found.setdefault(name, []).append(_Piece(path, name, offsets, shape, dtype))
                except (ValueError, KeyError, TypeError) as error:
                    raise GroundupError(f"{path}: damaged: it does not say where its tensors belong.") from error
        return cls(found)

    def below(self, first: str, *, but: bool = False) -> Pieces:
        """The tensors whose name begins with ``first/``, without that; or all others, if ``but``."""
        prefix = f"{first}/"
        if but:
            return Pieces({name: pieces for name, pieces in self._pieces.items() if not name.startswith(prefix)})
        mine = {name: pieces for name, pieces in self._pieces.items() if name.startswith(prefix)}
        return Pieces({name.removeprefix(prefix): pieces for name, pieces in mine.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        ends = [[o + s for o, s in zip(p.offsets, p.shape, strict=True)] for p in self._pieces[name]]
        return tuple(map(max, zip(*ends, strict=True)))

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shape(name)
        return self.region(name, [0] * len(shape), shape)

    def region(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The part of a tensor that begins at ``offsets`` and has ``sizes``, on the CPU.

        Raises:
            GroundupError: a file is damaged, or no file has some of it.
        """
        found = torch.empty(tuple(sizes), dtype=self._pieces[name][0].dtype)
        missing = found.numel()
        for piece in self._pieces[name] if missing else ():
            ends = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, piece.offsets, piece.shape, strict=True)]
            common = [(max(a, b), end) for a, b, end in zip(offsets, piece.offsets, ends, strict=True)]
            if any(begin >= end for begin, end in common):
                continue
            there = tuple(slice(begin - o, end - o) for (begin, end), o in zip(common, piece.offsets, strict=True))
            here = tuple(slice(begin - o, end - o) for (begin, end), o in zip(common, offsets, strict=True))
            with _opened(piece.path) as file:
                found[here] = file.get_slice(piece.name)[there] if there else file.get_tensor(piece.name)
            missing -= math.prod(end - begin for begin, end in common)
        if missing:
            raise GroundupError(f"{self._pieces[name][0].path.parent}: a part of the tensor {name} is missing.")
        return found

    def part_like(self, name: str, like: Tensor) -> Tensor:
        """This rank's part of a tensor, cut as ``like`` is; the whole tensor where that is not sharded.

        Raises:
            GroundupError: as :meth:`region`.
        """
        return self.region(name, *_region(like)) if hasattr(like, "device_mesh") else self[name]


def restore_optimizers(model: nn.Module, optimizers: Optimizers, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Put saved state back into optimizers; what state they had is forgotten.

    Of parameters that are sharded each rank takes its part, however the state was cut up when it was saved.

    Args:
        tensors: whole tensors by the names of :func:`optimizer_tensors`, or :class:`Pieces`.
        where: what to name in messages.

    Raises:
        GroundupError: the state belongs to another optimizer or another model.
    """
    parameters = dict(model.named_parameters())
    for name in tensors:
        kind, _, rest = name.partition("/")
        if kind not in optimizers or rest.rpartition("/")[0] not in parameters:
            raise GroundupError(
                f"{where}: the state of {kind} for {rest.rpartition('/')[0]} fits neither the model nor the optimizer "
                "of this run."
            )
    for optimizer in optimizers.values():
        optimizer.state.clear()
    for name in tensors:
        kind, parameter, key = name.split("/")
        target = parameters[parameter]
        optimizers[kind].state[target][key] = _restored(tensors, name, target)


@torch.no_grad()
def _restored(tensors: Mapping[str, Tensor], name: str, parameter: Tensor) -> Tensor:
    """One tensor of a parameter's state, where the parameter lies and sharded as it is."""
    shape = tensors.shape(name) if isinstance(tensors, Pieces) else tuple(tensors[name].shape)
    if not hasattr(parameter, "device_mesh") or shape != tuple(parameter.shape):
        return tensors[name].to(parameter.device)  # a fused AdamW keeps its step counter there too
    if isinstance(tensors, Pieces):
        part = tensors.part_like(name, parameter)
    else:
        part = cut_like(tensors[name].to(local_part(parameter).device), parameter)
    state = torch.empty_like(parameter, dtype=part.dtype)
    local_part(state).copy_(part)
    return state.detach()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with os_errors(path, "cannot read"):
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise GroundupError(f"{path}: damaged or cut short ({error}).") from error
