"""Objectives: model and batch in, loss and metrics out. The loop knows nothing else of what is being learnt."""

# B batch   T positions   V vocabulary

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.model.experts import Routing

Metrics = dict[str, Tensor]


class Objective(Protocol):
    """A function of a model and one micro-batch."""

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Metrics]:
        """Return a scalar loss, averaged over the micro-batch, and further scalars to log (detached)."""
        ...


def next_token(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Metrics]:
    """Cross-entropy of the next token: -1/(B T) sum log p(target | what comes before it), in nats per token.

    Args:
        model: ids B T to logits B T V.
        batch: inputs and targets, int64 B T; the targets are the inputs shifted by one. -100 is not counted.

    Returns:
        The loss, computed in float32 whatever the forward pass ran in, with the routers' losses of a mixture of experts
        added; the cross-entropy alone is then among the metrics.
    """
    inputs_BT, targets_BT = batch
    logits_BTV = model(inputs_BT)
    loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())
    routings: list[Routing] = getattr(model, "routings", list)()
    if not routings:
        return loss, {}
    return loss + torch.stack([routing.loss for routing in routings]).sum(), {"cross_entropy": loss.detach()}
