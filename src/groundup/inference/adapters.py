"""Models that are adapters: which model each is on, and how they are put together.

runs/answers (adapter) ──► runs/base (adapter) ──► hf:owner/plain       what an adapter is on is merged first:
    └── stacked on top         └── merged              └── loaded       that is what it has learnt above
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from groundup.inference.models import find_model
from groundup.model import Transformer, load_model
from groundup.model.adapter_config import called, wrong_base
from groundup.model.adapter_model import AdapterNote, absorb, is_adapter, stack_adapters
from groundup.model.weights.gguf import load_gguf
from groundup.model.weights.llama2c import load_llama2c
from groundup.runtime import GroundupError, UsageError
from groundup.runtime.files import verify_folder

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "encoder.json")


@dataclass(frozen=True)
class Parts:
    """What a model is put together from.

    Args:
        base: the folder or file of a plain model.
        below: folders of adapters that are merged into it one after the other, before there are others on top.
        adapters: folders of those on top by name; they are summed.
    """

    base: Path
    below: tuple[Path, ...]
    adapters: dict[str, Path]

    @property
    def folders(self) -> list[Path]:
        """All of them, in the order in which a tokenizer is looked for: the top first, and there those with tokens."""
        top = sorted(self.adapters.values(), key=lambda folder: not AdapterNote.read(folder).tokens)
        return [*top, *reversed(self.below), self.base]

    @property
    def tokenizer(self) -> Path:
        """The folder or file that holds the tokenizer; the base's if no adapter has one."""
        own = (folder for folder in self.folders[:-1] if _has_tokenizer(folder))
        return next(own, self.base)

    @property
    def tokenizers(self) -> list[Path]:
        """The folders on top that bring tokens and a tokenizer that has them: all of them must be the same."""
        return [one for one in self.adapters.values() if _has_tokenizer(one) and AdapterNote.read(one).tokens]

    @property
    def weights(self) -> list[Path]:
        """All files with weights."""
        found = ([one] if one.is_file() else sorted(one.glob("*.safetensors")) for one in self.folders)
        return [file for files in found for file in files]

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Transformer:
        """The model, with the adapters on top put on and active.

        Raises:
            GroundupError: a file is damaged, or an adapter does not fit.
        """
        for folder in self.folders:
            if folder.is_dir():
                verify_folder(folder)
        model = _load_plain(self.base, device, dtype)
        for folder in self.below:
            absorb(stack_adapters(model, {"below": folder}))
        return stack_adapters(model, self.adapters) if self.adapters else model


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZERS)


def _load_plain(path: Path, device: torch.device | str, dtype: torch.dtype | None) -> Transformer:
    if path.is_dir():
        return load_model(path, device=device, dtype=dtype)
    return (load_gguf if path.suffix == ".gguf" else load_llama2c)(path, device=device, dtype=dtype)


def find_parts(name: str | os.PathLike[str], adapters: Iterable[str | os.PathLike[str]] = ()) -> Parts:
    """What MODEL and further adapters are put together from.

    Adapters that are for the same base as MODEL, where that is an adapter itself, are stacked beside it. Those that are
    for MODEL itself are stacked on it.

    Args:
        adapters: as MODEL: folders, runs, or ``hf:owner/name``.

    Raises:
        UsageError: there is nothing by a name, or what is given as an adapter is none.
        GroundupError: a base is not found, or an adapter is for another one.
    """
    chain, further = base_chain(find_model(name)), _found(adapters)
    names = [os.fspath(name), *(str(AdapterNote.read(path).base) for path in chain[:-1])]
    notes = [AdapterNote.read(folder) for _, folder in further]
    beside = len(chain) > 1 and not (notes and all(note.base and _is_for(note, names[0], chain[0]) for note in notes))
    for note in notes:
        if not _is_for(note, names[beside], chain[beside]):
            raise wrong_base(note.folder, str(note.base), names[beside])
    stacked: dict[str, Path] = {}
    for given, folder in [(names[0], chain[0]), *further] if beside else further:
        stacked[_free(called(given).replace(".", "_"), stacked)] = folder
    return Parts(chain[-1], tuple(reversed(chain[beside:-1])), stacked)


def base_chain(path: Path) -> list[Path]:
    """A model as :func:`find_model` finds it, the one that it is an adapter on, and so on down to a plain one.

    Raises:
        GroundupError: a base is not found.
    """
    chain = [path]
    while is_adapter(chain[-1]):
        base = _find_base(chain[-1])
        if base.resolve() in [one.resolve() for one in chain]:
            raise GroundupError(f"{chain[-1]}: this adapter is on itself: its config names it as its own base.")
        chain.append(base)
    return chain


def _find_base(folder: Path) -> Path:
    note = AdapterNote.read(folder)
    place, spec = note.local_base(), note.hub_base()
    if place is None and spec is None:
        raise note.missing_base()
    try:
        return find_model(str(spec) if place is None else place)
    except GroundupError as error:
        raise GroundupError(f"{note.missing_base() if place is None else f'{folder}: its base:'} {error}") from error


def _found(adapters: Iterable[str | os.PathLike[str]]) -> Sequence[tuple[str, Path]]:
    found = [(os.fspath(given), find_model(given)) for given in adapters]
    for given, path in found:
        if not is_adapter(path):
            raise UsageError(f"{given}: this is no adapter (no adapter_config.json), but a model. Name it as MODEL.")
    return found


def _is_for(note: AdapterNote, name: str, path: Path) -> bool:
    """Whether an adapter may be on the model of this name, which lies there."""
    if note.base is None or called(note.base).lower() == called(name).lower():
        return True
    place = note.local_base()
    try:
        return place is not None and find_model(place).resolve() == path.resolve()
    except GroundupError:
        return False


def _free(name: str, taken: Iterable[str]) -> str:
    """A name that no other has: the second ``style`` is ``style-2``."""
    number, wanted, names = 1, name, set(taken)
    while wanted in names:
        number += 1
        wanted = f"{name}-{number}"
    return wanted
