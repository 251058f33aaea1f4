"""Checkpoints: Hugging Face folders with what resuming needs beside the weights, written whole or not at all.

checkpoints/step-000120/
    config.json, model.safetensors, tokenizer.json, …            what other tools open
    training_state/adamw-exp_avg-00001-of-00001.safetensors, …   optimizer state: a file for each kind and rank
    training_state/state.json                                    the rest of what resuming needs
    checksums.json                                               SHA-256 of every file above
checkpoints/latest -> step-000120, checkpoints/best -> step-000100

Saving goes on in a thread while the model trains (checkpoint_writer.py). A folder has its name only after it was
written, flushed to the disk and read back from it; older ones are removed after that.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from groundup.model import Transformer, load_model
from groundup.runtime import GroundupError, atomic_folder, os_errors, read_json, warn
from groundup.runtime.files import (
    part_folder,
    point_link,
    remove_folder,
    remove_leftovers,
    verify_folder,
    write_checksums,
)
from groundup.runtime.process_group import RANK_TIMEOUT_SECONDS, World, from_main, gathered
from groundup.tokenizer import Tokenizer
from groundup.training.checkpoint_state import (
    EXTRA,
    OWN,
    RAW,
    STATE,
    Contents,
    Optimizers,
    Pieces,
    describe,
    optimizer_tensors,
    restore_optimizers,
)
from groundup.training.checkpoint_writer import Background, LiveWriter

__all__ = ["Checkpoints", "Optimizers", "Pieces", "Restored", "optimizer_tensors", "restore_optimizers"]

COPIES = 2  # times the weights in float32: the most memory that saving may take
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was loaded.

    Args:
        folder: where it lies.
        state: the JSON part: step, seconds, generators, …
        tensors: the optimizers' state, for :func:`restore_optimizers`.
        weights: the model's state dict, whole tensors in float32; empty where none was saved.
        extra: the further tensors that were saved; a mapping that can also give a rank its part of them.
    """

    folder: Path
    state: dict[str, Any]
    tensors: Pieces
    weights: dict[str, Tensor]
    extra: Pieces


class Checkpoints:
    """The ``checkpoints`` folder of a run.

    Its methods are called by the thread that trains, and on every rank of ``world`` alike.

    Args:
        folder: where checkpoints are kept; one that all ranks see.
        keep: how many to keep besides the best.
        keep_every: checkpoints whose step is a multiple of this are never removed; None for no such.
        world: the ranks that save together; this process alone when None.
    """

    def __init__(self, folder: Path, keep: int = 2, keep_every: int | None = None, world: World | None = None) -> None:
        self.folder, self.keep, self.keep_every = folder, max(1, keep), keep_every
        self.world = world or World()
        self._job: Background | None = None
        self._failure: GroundupError | None = None  # of the last save
        self._told = True

    def all(self) -> list[Path]:
        """Every checkpoint, newest first."""
        found = [path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)

    # ---- saving

    def save(
        self,
        model: Transformer | None,
        tokenizer: Tokenizer,
        optimizers: Optimizers,
        state: Mapping[str, Any],
        *,
        best: bool,
        extra: Mapping[str, Tensor] | None = None,
        exported: Mapping[str, Tensor] | None = None,
        trained: nn.Module | None = None,
        beside: Callable[[Path], None] | None = None,
    ) -> Path:
        """Begin to write a checkpoint, and return at once.

        In the background ``latest`` (and ``best``) are pointed at it when it is there, and the ones no longer kept are
        removed. What cannot be written (a full disk) is told as a warning: every earlier checkpoint stays, and the next
        save tries again. A save that is still going on is waited for.

        Until :meth:`settle` or :meth:`finish` the tensors must not change.

        Args:
            model: whose weights are saved for others to open; None where there is no whole model, as of adapters alone.
            state: what JSON can say; has ``step``.
            best: whether this is the best so far.
            extra: further tensors by name, such as averaged weights and the loss scale.
            exported: what ``model.safetensors`` is to hold instead of the model's own weights, by their names; those
                then go to ``training_state``.
            trained: whose parameters the optimizers hold, where that is not ``model`` itself but built around it.
            beside: writes further files into the folder, in the background.

        Returns:
            Where the checkpoint will be.

        Raises:
            UsageError: the model has adapters or quantized layers.
        """
        self._collect()
        self._tell()
        path = self.folder / f"step-{state['step']:06d}"
        text = json.dumps(dict(state), indent=2, ensure_ascii=False) + "\n"
        self._failure, self._told = None, True
        whole = model if trained is None else trained
        assert whole is not None, "nothing to save"
        contents = Contents(model, whole, self.world)
        weights, apart = contents.model_files(exported)
        files = weights + contents.state_files(optimizers, extra, apart)
        try:
            place = self._begin(path)
        except GroundupError as error:
            self._failure, self._told = error, False
            self._tell()
            return path
        numbers = sum(parameter.numel() for parameter in whole.parameters())
        live = LiveWriter(files, COPIES * 4 * numbers)

        def work() -> None:
            if not self.world.is_main:
                self._write_part(live, place)
                return
            with _known_as(path, place), atomic_folder(path, place):
                digests = live.write(place)
                if model is None:
                    tokenizer.save(place)
                else:
                    describe(model, tokenizer, weights, place)
                if beside is not None:
                    beside(place)
                (place / STATE).mkdir(exist_ok=True)
                (place / STATE / "state.json").write_text(text, encoding="utf-8")
                write_checksums(place, digests | self._others(place))
                verify_folder(place, from_disk=True)
            point_link(self.folder / "latest", path.name)
            if best:
                point_link(self.folder / "best", path.name)
            self._prune(path)

        self._job = Background(live, work)
        return path

    def settle(self) -> None:
        """Wait until weights and optimizer state may change; called before the optimizers step.

        What is not written by then is copied, up to twice the size of the weights, or waited for. Tells about a save
        that has failed since.

        Raises:
            Exception: whatever went wrong in the background that is not the disk's fault.
        """
        if self._job is None:
            return
        self._job.live.settle()
        if self._job.ended:
            self._collect()
            self._tell()

    def finish(self, quietly: bool = False) -> None:
        """Wait until the last save is written, verified and the old ones are removed.

        Args:
            quietly: tell what went wrong as a warning, since another error is on its way already.

        Raises:
            GroundupError: the last checkpoint could not be written; earlier ones are untouched.
        """
        try:
            self._collect()
        except Exception as error:
            if not quietly:
                raise
            warn(f"{type(error).__name__}: {error}. The last checkpoint was not saved.")
        if quietly:
            self._tell()
        failure, self._failure = self._failure, None
        if failure is not None and not quietly:
            raise failure

    def _collect(self) -> None:
        """Wait for the save that is going on, and keep its failure; what is no failure of the disk is raised."""
        job = self._job
        if job is None:
            return
        job.wait()
        self._job = None
        if isinstance(job.error, GroundupError):
            if self.world.is_main:  # who hears of the other ranks' failures
                self._failure, self._told = job.error, False
        elif job.error is not None:
            raise job.error

    def _tell(self) -> None:
        if self._failure is not None and not self._told:
            self._told = True
            if self.world.is_main:
                warn(f"{self._failure} This checkpoint was not saved; earlier ones stay.")

    def _begin(self, path: Path) -> Path:
        """Make the folder that all ranks write into.

        Raises:
            GroundupError: a rank cannot write there; on all ranks.
        """
        if self.world.size == 1:
            return part_folder(path)
        place, error = None, None
        if self.world.is_main:
            try:
                place = part_folder(path)
                (place / STATE).mkdir()
            except (GroundupError, OSError) as failure:
                error = str(failure)
        name, error = from_main(self.world, [place and place.name, error])
        if error is None:
            place = path.parent / name
            try:
                self._flag(place, "working").touch()
            except OSError as failure:
                error = (
                    f"rank {self.world.rank} cannot write {path}: {failure.strerror}. All ranks must see the folder."
                )
        errors = [error for error in gathered(self.world, error) if error]
        if errors:
            if place is not None and self.world.is_main:
                remove_folder(place)
            raise GroundupError(errors[0])
        assert place is not None
        return place

    def _flag(self, place: Path, what: str, rank: int | None = None) -> Path:
        """The file by which a rank says how far it is; it needs no room on the disk to change its name."""
        return place / f"rank-{self.world.rank if rank is None else rank:05}.{what}"

    def _write_part(self, live: LiveWriter, place: Path) -> None:
        """Write what this rank, not the first, has to write."""
        flag = self._flag(place, "working")
        try:
            digests = live.write(place)
            with os_errors(flag, "cannot write"):
                flag.write_text(json.dumps(digests), encoding="utf-8")
                os.replace(flag, self._flag(place, "done"))
        except BaseException as error:
            with suppress(OSError):
                os.replace(flag, self._flag(place, "failed"))
                self._flag(place, "failed").write_text(str(error), encoding="utf-8")
            raise

    def _others(self, place: Path) -> dict[str, str]:
        """Wait until every other rank has written its part; the checksums of what they wrote.

        Raises:
            GroundupError: one failed, or does not get done.
        """
        digests: dict[str, str] = {}
        deadline = time.monotonic() + RANK_TIMEOUT_SECONDS
        for rank in range(1, self.world.size):
            done, failed = self._flag(place, "done", rank), self._flag(place, "failed", rank)
            while not done.exists():
                if failed.exists():
                    said = failed.read_text(encoding="utf-8") or f"cannot write {place}"
                    raise GroundupError(f"rank {rank}: {said}")
                if time.monotonic() > deadline:
                    raise GroundupError(
                        f"rank {rank} did not write its part of {place} in {RANK_TIMEOUT_SECONDS:.0f} s."
                    )
                time.sleep(POLL_SECONDS)
            digests |= read_json(done, "list of what a rank wrote")
        for flag in place.glob("rank-*"):
            flag.unlink()
        return digests

    def _prune(self, newest: Path) -> None:
        """Remove checkpoints older than ``newest`` that are not kept."""
        best = (self.folder / "best").resolve()
        found = self.all()
        older = found[found.index(newest) + 1 :] if newest in found else []
        for path in older[self.keep - 1 :]:
            step = int(path.name.removeprefix("step-"))
            if path.resolve() != best and not (self.keep_every and step % self.keep_every == 0):
                remove_folder(path)

    # ---- loading

    def newest(self) -> Restored | None:
        """Load the newest checkpoint that is whole; a damaged one is told about, set aside and passed over.

        What a killed writer left is cleared away, so only one process (or one world, all ranks of it) at a time may ask
        (see ``folder_lock``).

        Returns:
            None where there is no checkpoint at all.

        Raises:
            GroundupError: there are checkpoints, and every one is damaged.
        """
        self._collect()
        self._tell()
        found, error = None, None
        if self.world.is_main:
            try:
                found = self._newest_whole()
            except GroundupError as failure:
                error = failure
        name, message = from_main(self.world, [found and found.folder.name, error and str(error)])
        if message is not None:
            raise error or GroundupError(message)
        return found if self.world.is_main or name is None else self._load(self.folder / name)

    def _newest_whole(self) -> Restored | None:
        remove_leftovers(self.folder)
        damaged: list[Path] = []
        for path in self.all():
            try:
                verify_folder(path)
                restored = self._load(path)
            except GroundupError as error:
                damaged.append(path)
                warn(f"{error} Trying the checkpoint before it.")
                continue
            self._set_aside(damaged)
            with suppress(GroundupError, OSError):  # a folder that may only be read can still be resumed from
                if os.readlink(self.folder / "latest") != path.name:
                    point_link(self.folder / "latest", path.name)
            return restored
        if damaged:
            raise GroundupError(
                f"{self.folder}: none of the {len(damaged)} checkpoints can be read. Move the folder to begin anew, "
                "or put back a copy of a checkpoint."
            )
        return None

    def _set_aside(self, damaged: list[Path]) -> None:
        """Rename damaged checkpoints, so that the run that goes on from an older one is not measured against them."""
        for path in damaged:
            with suppress(OSError):
                if (self.folder / "best").resolve() == path.resolve():
                    (self.folder / "best").unlink()
                os.replace(path, path.with_name(f"damaged-{path.name}"))

    def _load(self, path: Path) -> Restored:
        state = read_json(path / STATE / "state.json", "training state")
        pieces = Pieces.open(path / STATE)
        # Where there are parameters of the run's own, they may be all that it trains.
        alone = any(pieces.below(EXTRA).below(OWN)) and not (path / "config.json").exists()
        weights: dict[str, Tensor] = {} if alone else dict(load_model(path).state_dict())
        raw = pieces.below(RAW)
        for name in raw:
            if name not in weights or tuple(weights[name].shape) != raw.shape(name):
                raise GroundupError(f"{path / STATE}: the tensor {name} does not fit the model beside it.")
            weights[name].copy_(raw[name])  # where it lies: a tied head has the same memory
        tensors = pieces.below(EXTRA, but=True).below(RAW, but=True)
        return Restored(path, state, tensors, weights, pieces.below(EXTRA))


@contextmanager
def _known_as(path: Path, place: Path) -> Iterator[None]:
    """Name a folder in errors by what it will be called, not by where it is being built."""
    try:
        yield
    except GroundupError as error:
        raise GroundupError(str(error).replace(str(place), str(path))) from error
