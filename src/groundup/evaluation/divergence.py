"""How far a changed model is from the one it was made of: what quantizing cost, measured on a text.

Perplexity alone can hide a change, since some tokens become likelier by chance while others become less so. The
Kullback-Leibler divergence of the whole distributions cannot: it is 0 only where nothing changed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from groundup.evaluation.bits_per_byte import Window, _count_bytes, _inputs, sliding_windows
from groundup.runtime import UsageError, progress

if TYPE_CHECKING:
    import torch

# B windows of a batch   T positions of a window   V vocabulary   R rows compared at once

LOGITS_AT_ONCE = 2**25  # numbers of one model's logits that are held at a time
ROWS = 128  # tokens whose distributions are compared at a time


@dataclass(frozen=True)
class Divergence:
    """Two models on one text.

    Args:
        kl: mean of KL(original || changed) in nats per token.
        kl_99: what 99 of 100 tokens stay below.
        agreement: share of tokens for which both find the same one likeliest.
        loss: the original's mean nats per token.
        changed_loss: the changed model's.
        n_tokens: tokens compared.
        n_bytes: bytes those tokens stand for in UTF-8.
        seconds: wall clock of both models.
    """

    kl: float
    kl_99: float
    agreement: float
    loss: float
    changed_loss: float
    n_tokens: int
    n_bytes: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """The original's, per token."""
        return math.exp(self.loss)

    @property
    def changed_perplexity(self) -> float:
        """The changed model's, per token."""
        return math.exp(self.changed_loss)

    @property
    def bits_per_byte(self) -> float:
        """The original's."""
        return self.loss * self.n_tokens / math.log(2) / self.n_bytes

    @property
    def changed_bits_per_byte(self) -> float:
        """The changed model's."""
        return self.changed_loss * self.n_tokens / math.log(2) / self.n_bytes


def divergence(
    original: torch.nn.Module, changed: torch.nn.Module, tokens: npt.NDArray[np.integer],
    bytes_per_token: npt.NDArray[np.integer], context_length: int, *, start_id: int, stride: int | None = None,
    max_tokens: int | None = None, show_progress: bool = True,
) -> Divergence:  # fmt: skip
    """Read a text with both models in overlapping windows, each token counted once.

    Args:
        original, changed: their ``model(ids_BT)`` gives logits B T V of the same vocabulary. Each computes where its
            first parameter lies.
        tokens, bytes_per_token, context_length, start_id, stride, max_tokens, show_progress: as for
            :func:`groundup.evaluation.bits_per_byte`.

    Raises:
        UsageError: ``stride`` does not fit the context.
        GroundupError: there is nothing to compare on, or the ids do not belong to this vocabulary.
    """
    import torch

    stride = max(1, context_length // 2) if stride is None else stride
    if not 1 <= stride <= context_length:
        raise UsageError(f"stride = {stride} must be from 1 to the context length, {context_length}.")
    text = np.asarray(tokens[:max_tokens]).astype(np.int64)
    n_bytes = _count_bytes(text, bytes_per_token)
    started = time.perf_counter()
    rows: list[torch.Tensor] = []
    at_once = max(1, LOGITS_AT_ONCE // (min(context_length, len(text)) * len(bytes_per_token)))
    windows = sliding_windows(len(text), context_length, stride)
    with progress("compare", len(text), "tokens") if show_progress else nullcontext() as bar, torch.inference_mode():
        while batch := list(islice(windows, at_once)):
            rows.extend(_compared(original, changed, text, batch, start_id))
            if bar is not None:
                bar.update(batch[-1].end)
    found_4N = torch.cat(rows, dim=1).double()
    kl, agreement, loss, changed_loss = found_4N.mean(dim=1).tolist()
    kl_99 = float(np.quantile(found_4N[0].numpy(), 0.99))
    seconds = time.perf_counter() - started
    return Divergence(kl, kl_99, agreement, loss, changed_loss, len(text), n_bytes, seconds)


def _compared(
    original: torch.nn.Module, changed: torch.nn.Module, text: npt.NDArray[np.int64], batch: list[Window], start_id: int
) -> Iterator[torch.Tensor]:
    """Divergence, agreement and both losses of each new target of some windows, 4 R."""
    import torch

    inputs_BT = torch.from_numpy(_inputs(text, batch, start_id))
    ours_BTV, theirs_BTV = _logits(original, inputs_BT), _logits(changed, inputs_BT)
    for row, window in enumerate(batch):
        new = slice(window.first_new - window.start, None)
        targets_T = torch.from_numpy(text[window.first_new : window.end])
        parts = zip(
            ours_BTV[row, new].split(ROWS), theirs_BTV[row, new].split(ROWS), targets_T.split(ROWS), strict=True
        )
        for ours_RV, theirs_RV, targets_R in parts:
            yield _rows(ours_RV, theirs_RV.to(ours_RV.device), targets_R.to(ours_RV.device)).cpu()


def _rows(ours_RV: torch.Tensor, theirs_RV: torch.Tensor, targets_R: torch.Tensor) -> torch.Tensor:
    import torch

    p_RV, q_RV = ours_RV.float().log_softmax(dim=-1), theirs_RV.float().log_softmax(dim=-1)
    kl_R = (p_RV.exp() * (p_RV - q_RV)).sum(dim=-1)
    same_R = (p_RV.argmax(dim=-1) == q_RV.argmax(dim=-1)).float()
    losses = (-logs_RV.gather(1, targets_R[:, None])[:, 0] for logs_RV in (p_RV, q_RV))
    return torch.stack([kl_R, same_R, *losses])


def _logits(model: torch.nn.Module, inputs_BT: torch.Tensor) -> torch.Tensor:
    training = model.training
    model.eval()
    try:
        return model(inputs_BT.to(next(model.parameters()).device))
    finally:
        model.train(training)
