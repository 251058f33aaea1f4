"""Checkpoints: Hugging Face folders with what resuming needs beside the weights, written whole or not at all.

checkpoints/step-000120/
    config.json, model.safetensors, tokenizer.json, …     what other tools open
    training_state/optimizer.safetensors, state.json      what resuming needs
    checksums.json                                        SHA-256 of every file above
checkpoints/latest -> step-000120, checkpoints/best -> step-000100
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from groundup.model import Transformer, load_model, save_model
from groundup.runtime import GroundupError, atomic_folder, os_errors, read_json, warn, write_json
from groundup.runtime.files import remove_leftovers, verify_folder, write_checksums
from groundup.tokenizer import Tokenizer

Optimizers = Mapping[str, torch.optim.Optimizer]


def optimizer_tensors(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """Every tensor of the optimizers' state, named ``optimizer/parameter/state``."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{kind}/{names[id(parameter)]}/{key}": value
        for kind, optimizer in optimizers.items()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizers(model: nn.Module, optimizers: Optimizers, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Put saved state back into freshly built optimizers.

    Raises:
        GroundupError: the state belongs to another optimizer or another model.
    """
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        kind, parameter, key = name.split("/")
        if kind not in optimizers or parameter not in parameters:
            raise GroundupError(
                f"{where}: the state of {kind} for {parameter} fits neither the model nor the optimizer of this run."
            )
        target = parameters[parameter]
        optimizers[kind].state[target][key] = value.to(target.device)  # a fused AdamW keeps its step counter there too


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was loaded.

    Args:
        folder: where it lies.
        state: the JSON part: step, seconds, generators, …
        tensors: the optimizers' state.
        weights: the model's state dict.
    """

    folder: Path
    state: dict[str, Any]
    tensors: dict[str, Tensor]
    weights: dict[str, Tensor]


class Checkpoints:
    """The ``checkpoints`` folder of a run.

    Args:
        folder: where checkpoints are kept.
        keep: how many to keep besides the best.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, max(1, keep)

    def all(self) -> list[Path]:
        """Every checkpoint, newest first."""
        found = [path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)

    def save(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        optimizers: Optimizers,
        state: Mapping[str, Any],
        *,
        best: bool,
    ) -> Path:
        """Write a checkpoint, point ``latest`` (and ``best``) at it, then remove the ones no longer kept.

        Raises:
            GroundupError: it cannot be written; every earlier checkpoint is untouched.
        """
        path = self.folder / f"step-{state['step']:06d}"
        with atomic_folder(path) as place:
            save_model(model, place, bos_id=tokenizer.end_of_text_id, eos_id=tokenizer.end_of_text_id)
            tokenizer.save(place)
            (place / "training_state").mkdir()
            tensors = {
                name: value.detach().cpu().contiguous() for name, value in optimizer_tensors(model, optimizers).items()
            }
            try:
                save_file(tensors, place / "training_state" / "optimizer.safetensors")
            except SafetensorError as error:
                code = re.search(r"os error (\d+)", str(error))
                raise (
                    OSError(int(code.group(1)), str(error), str(path))
                    if code
                    else GroundupError(f"cannot write {path}: {error}")
                ) from error
            write_json(place / "training_state" / "state.json", dict(state))
            write_checksums(place)
        self._point("latest", path)
        if best:
            self._point("best", path)
        self._prune()
        return path

    def _point(self, name: str, path: Path) -> None:
        pointer, temporary = self.folder / name, self.folder / f".{name}.part"
        with os_errors(pointer, "cannot write"):
            temporary.unlink(missing_ok=True)
            os.symlink(path.name, temporary)
            os.replace(temporary, pointer)

    def _prune(self) -> None:
        best = (self.folder / "best").resolve()
        for path in self.all()[self.keep :]:
            if path != best:
                shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> Restored | None:
        """Load the newest checkpoint that is whole; a damaged one is told about and passed over.

        What a killed writer left is cleared away, so only one process at a time may ask (see ``folder_lock``).

        Returns:
            None where there is no checkpoint at all.

        Raises:
            GroundupError: there are checkpoints, and every one is damaged.
        """
        remove_leftovers(self.folder)
        damaged = []
        for path in self.all():
            try:
                verify_folder(path)
                return self._load(path)
            except GroundupError as error:
                damaged.append(path)
                warn(f"{error} Trying the checkpoint before it.")
        if damaged:
            raise GroundupError(
                f"{self.folder}: none of the {len(damaged)} checkpoints can be read. Move the folder to begin anew, "
                "or put back a copy of a checkpoint."
            )
        return None

    def _load(self, path: Path) -> Restored:
        file = path / "training_state" / "optimizer.safetensors"
        with os_errors(file, "cannot read"):
            try:
                tensors = load_file(file)
            except SafetensorError as error:
                raise GroundupError(f"{file}: damaged or cut short ({error}).") from error
        state = read_json(path / "training_state" / "state.json", "training state")
        return Restored(path, state, tensors, load_model(path).state_dict())
