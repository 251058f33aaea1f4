"""NEFTune: noise on the embeddings while training (Jain et al. 2023), around any objective over rows of tokens."""

# B batch   T positions   E embedding

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from groundup.data import TokenBatch
from groundup.runtime import UsageError
from groundup.training.objectives import Metrics, Objective


@dataclass(frozen=True)
class NoisyEmbeddings:
    """Another objective, of a model whose embeddings are shaken in training.

    To each number of a token's embedding is added alpha / sqrt(L E) times one from the uniform distribution on [-1, 1]
    (Jain et al. 2023, algorithm 1), so that what is added to a text of L tokens has a length near alpha / sqrt(3). L
    is the length of each text by itself, as in the paper, also where several are packed into a row. Nothing is added
    when the model is in evaluation mode.

    The noise is drawn from PyTorch's generator, which the loop seeds for each micro-batch by its place in the data, as
    for dropout: a resumed run repeats it.

    Args:
        objective: what is learnt.
        alpha: 5 to 15 in the paper.

    Raises:
        UsageError: ``alpha`` is not above 0.
    """

    objective: Objective
    alpha: float = 5.0

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < float("inf"):
            raise UsageError(f"embedding noise = {self.alpha} must be above 0, such as 5.")

    def count(self, batch: TokenBatch) -> Tensor | int:
        """What the objective counts."""
        return self.objective.count(batch)

    def __call__(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """The loss of a micro-batch, and the objective's metrics.

        Args:
            model: with its token embedding as ``embedding``.
            batch: of tensors on the model's device.
        """
        if not model.training:
            return self.objective(model, batch)
        lengths_BT = text_lengths(batch)
        embedding: Any = model.embedding

        def shake(module: nn.Module, given: Any, x_BTE: Tensor) -> Tensor:
            # Tokens further on (multi-token prediction) are embedded again, without the first ones of the row.
            lengths_BT1 = lengths_BT[:, -x_BTE.shape[1] :, None]
            most_BT1 = self.alpha / (lengths_BT1 * x_BTE.shape[2]).sqrt()
            return x_BTE + (torch.rand_like(x_BTE) * 2 - 1) * most_BT1.to(x_BTE.dtype)

        handle = embedding.register_forward_hook(shake)
        try:
            return self.objective(model, batch)
        finally:
            handle.remove()


def text_lengths(batch: TokenBatch) -> Tensor:
    """For each position, how many tokens the text that it belongs to has in its row; float32 B T."""
    inputs_BT: Tensor = batch.inputs
    ones_BT = torch.ones(inputs_BT.shape, device=inputs_BT.device)
    texts_BT = torch.zeros_like(inputs_BT)
    if batch.documents is not None:  # numbered anew, so that the numbers are below T
        texts_BT[:, 1:] = (batch.documents[:, 1:] != batch.documents[:, :-1]).cumsum(dim=1)
    return torch.zeros_like(ones_BT).scatter_add_(1, texts_BT, ones_BT).gather(1, texts_BT)
