"""An exponential moving average of the weights (Polyak & Juditsky 1992; as used by Karras et al. 2024 and others)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from groundup.optim.sharded import cut_like, local_part


class WeightAverage:
    """Follows a model's weights: after each step, average = decay average + (1 - decay) weights.

    While few steps are made the decay is smaller, (1 + step) / (10 + step), so that the average forgets where the
    weights began.

    Args:
        model: whose weights; sharded ones are averaged shard by shard.
        decay: how much of the average stays.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` (0-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self._parameters():
            local_part(self.tensors[name]).lerp_(local_part(parameter), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While the block runs, the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters():
            kept, here = local_part(self.tensors[name]), local_part(parameter)
            aside = here.clone()
            here.copy_(kept)
            kept.copy_(aside)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what :attr:`tensors` held: whole tensors."""
        for name, tensor in tensors.items():
            kept = self.tensors[name]
            local_part(kept).copy_(cut_like(tensor, kept))

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p) for name, p in self.model.named_parameters() if name in self.tensors)
