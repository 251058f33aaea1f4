"""A job: what one kind of run has that the others have not. Whatever else a run is made of is in sitting.py."""

# B batch   T positions

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from groundup.data import Loader, Prefetcher
from groundup.model import Transformer
from groundup.runtime.device import Precision
from groundup.runtime.process_group import World
from groundup.tokenizer import Tokenizer
from groundup.training.objectives import Objective
from groundup.training.recipe import RunKeys
from groundup.training.run import RunFolder

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Measured:
    """What was found at a milestone, on what is held out.

    Args:
        loss: the lower, the better: it decides which checkpoint is the best, and whether the run still improves.
        metrics: what else the row of metrics gets.
        shown: what the progress bar says of it.
    """

    loss: float
    metrics: Mapping[str, Any] = field(default_factory=dict)
    shown: str = ""


@dataclass
class Job(ABC, Generic[M]):
    """What is trained, on what and towards what. A further kind of run is one more class below this one.

    Args:
        recipe: the keys that all runs have.
        run: its folder.
        values: the whole recipe by dotted key, which trackers show.
        tokenizer: is saved in every checkpoint.
        device: where the run computes.
        precision: of the forward pass.
        positions: T, positions of a sample: a step takes as many samples as fill the recipe's ``batch_tokens``.
        world: the processes it runs on.
        seconds: what it may take, where that is not said in steps.
        flops_per_token: of a training step; 0 where it is not known.
        flops_per_second: of one process's matrix products, measured; 0 where it is not known.
    """

    recipe: RunKeys
    run: RunFolder
    values: Mapping[str, Any]
    tokenizer: Tokenizer
    device: torch.device
    precision: Precision
    positions: int
    world: World = field(default_factory=World)
    seconds: float | None = None
    flops_per_token: float = 0.0
    flops_per_second: float = 0.0

    # ---- what is learnt

    @abstractmethod
    def build(self, *, fresh: bool) -> M:
        """The model, on the CPU. Random numbers have been seeded.

        Args:
            fresh: nothing has been trained yet; otherwise the weights of a checkpoint are laid over it.
        """

    @abstractmethod
    def objective(self) -> Objective:
        """What it is to learn."""

    @abstractmethod
    def loader(self, micro_batch: int, samples: int | None) -> Loader | Prefetcher:
        """What deals the training data.

        Args:
            micro_batch: B, samples at once.
            samples: how many the whole run takes, where that is known.
        """

    def on_device(self, batch: Any) -> Any:
        """A micro-batch, a named tuple of arrays, as tensors on the device; what is None in it stays so."""
        parts = (None if one is None else torch.from_numpy(one).to(self.device, non_blocking=True) for one in batch)
        return type(batch)(*parts)

    # ---- what is noted and measured

    def metrics(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What a row of training metrics gets besides its own."""
        return {}

    def shown(self, row: Mapping[str, Any]) -> str:
        """What the progress bar says of a row, between loss and speed."""
        return ""

    @abstractmethod
    def measure(self, model: M) -> Measured:
        """Evaluate, at a milestone, on every rank; the model has its averaged weights, where there are some."""

    def samples(self, model: M, step: int) -> list[dict[str, Any]]:
        """What the model says at a milestone: rows of :func:`groundup.report.add_samples`."""
        return []

    # ---- what checkpoints hold

    def transformer(self, model: M) -> Transformer | None:
        """The part of the model that Hugging Face tools shall open; None where checkpoints hold none, as of adapters on
        a model that stays as it was.
        """
        return model if isinstance(model, Transformer) else None

    def own(self, model: M) -> dict[str, Tensor]:
        """Parameters that are kept beside that part, by their names in the model: the trained ones that it lacks."""
        part = self.transformer(model)
        held = set() if part is None else {id(parameter) for parameter in part.parameters()}
        return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in held}

    def beside(self, model: M, own: Mapping[str, Tensor]) -> Callable[[Path], None] | None:
        """Further files for other tools to read: what is returned writes them into the folder of a checkpoint.

        It does so in the background, on the first rank, while the weights change: copy before what it is to write.

        Args:
            own: those of :meth:`own`, averaged where the run averages weights.
        """
        return None
