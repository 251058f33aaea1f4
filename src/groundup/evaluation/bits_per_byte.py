"""Bits per byte: how many bits a model needs for each byte of a text it has not seen. Fewer is better.

Unlike the loss per token it does not depend on the tokenizer, so models with different vocabularies,
compressors and n-grams stand on one scale: (sum of the losses in nats) / ln 2 / (bytes of the text).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from groundup.runtime import GroundupError, UsageError, progress

if TYPE_CHECKING:
    import torch

    from groundup.runtime.device import Precision
    from groundup.tokenizer import Tokenizer

# B windows of a batch   T positions of a window   V vocabulary

Score = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], npt.NDArray[np.floating]]
"""``score(inputs_BT, targets_BT) -> losses_BT``: nats for each target, from the inputs up to its place."""


@dataclass(frozen=True)
class BitsPerByte:
    """What scoring one text gave.

    Args:
        bits_per_byte: the measure; not finite where a loss was not.
        loss: mean nats per token.
        n_tokens: tokens scored, end-of-text tokens among them.
        n_bytes: bytes those tokens stand for in UTF-8.
        seconds: wall clock of the scoring.
    """

    bits_per_byte: float
    loss: float
    n_tokens: int
    n_bytes: int
    seconds: float


@dataclass(frozen=True)
class Window:
    """Targets ``start`` to ``end`` are predicted together; those from ``first_new`` on are new and count."""

    start: int
    end: int
    first_new: int


def sliding_windows(n_tokens: int, context_length: int, stride: int) -> Iterator[Window]:
    """Windows that count each of ``n_tokens`` targets exactly once.

    All have the same length. After the first, a counted target is predicted from more than ``context_length -
    stride`` tokens; the last window is moved back to be full rather than cut short.
    """
    counted = min(context_length, n_tokens)
    if counted:
        yield Window(0, counted, 0)
    while counted < n_tokens:
        end = min(counted + stride, n_tokens)
        yield Window(end - context_length, end, counted)
        counted = end


def bits_per_byte(
    score: Score,
    tokens: npt.NDArray[np.integer],
    bytes_per_token: npt.NDArray[np.integer],
    context_length: int,
    *,
    start_id: int,
    stride: int | None = None,
    batch_size: int = 16,
    max_tokens: int | None = None,
    show_progress: bool = True,
) -> BitsPerByte:
    """Score a text in overlapping windows, each token once.

    Special tokens inside the text (the ends of documents) are predicted and paid for like all others, though
    they stand for no bytes: a compressor pays for the line breaks between documents too.

    Args:
        score: the model; see :func:`model_scorer`.
        tokens: ids of the text, shape [n]; may be a memory map.
        bytes_per_token: UTF-8 bytes that each id stands for, 0 for special tokens, shape [V].
        context_length: tokens of one window.
        start_id: the token the text's first one is predicted from: end-of-text.
        stride: how many new tokens each further window counts, 1 to ``context_length``; half of it when None.
            Smaller gives each token more context and costs more time.
        batch_size: windows scored at once.
        max_tokens: score only the first so many tokens.
        show_progress: show a progress bar.

    Raises:
        UsageError: ``stride`` does not fit the context.
        GroundupError: there is nothing to score, or the ids do not belong to this vocabulary.
    """
    stride = max(1, context_length // 2) if stride is None else stride
    if not 1 <= stride <= context_length:
        raise UsageError(f"stride = {stride} must be from 1 to the context length, {context_length}.")
    text = np.asarray(tokens[:max_tokens]).astype(np.int64)
    n_bytes = _count_bytes(text, bytes_per_token)

    started = time.perf_counter()
    total = 0.0  # a Python float: tens of millions of losses add up without losing digits
    windows = sliding_windows(len(text), context_length, stride)
    with progress("evaluate", len(text), "tokens") if show_progress else nullcontext() as bar:
        while batch := list(islice(windows, batch_size)):
            targets_BT = np.stack([text[window.start : window.end] for window in batch])
            losses_BT = score(_inputs(text, batch, start_id), targets_BT)
            for window, losses_T in zip(batch, losses_BT, strict=True):
                total += float(losses_T[window.first_new - window.start :].sum(dtype=np.float64))
            if bar is not None:
                bar.update(batch[-1].end)
    return BitsPerByte(
        bits_per_byte=total / math.log(2) / n_bytes,
        loss=total / len(text),
        n_tokens=len(text),
        n_bytes=n_bytes,
        seconds=time.perf_counter() - started,
    )


def _count_bytes(text: npt.NDArray[np.int64], bytes_per_token: npt.NDArray[np.integer]) -> int:
    """The bytes the ids stand for, after checking that there are some."""
    if len(text) == 0:
        raise GroundupError("the held-out text is empty, so bits per byte are not defined. Hold out some text.")
    low, high = int(text.min()), int(text.max())
    if low < 0 or high >= len(bytes_per_token):
        wrong = low if low < 0 else high
        raise GroundupError(
            f"token id {wrong} is outside the vocabulary of {len(bytes_per_token)}: the text was encoded by "
            "another tokenizer. Prepare the data again with this model's tokenizer."
        )
    n_bytes = int(np.asarray(bytes_per_token)[text].sum(dtype=np.int64))
    if n_bytes == 0:
        raise GroundupError("the held-out text has only special tokens and no bytes. Hold out some text.")
    return n_bytes


def _inputs(text: npt.NDArray[np.int64], batch: list[Window], start_id: int) -> npt.NDArray[np.int64]:
    """The token before each target, shape [B, T]."""
    length = batch[0].end - batch[0].start
    inputs_BT = np.full((len(batch), length), start_id, dtype=np.int64)
    for row, window in enumerate(batch):
        first = 1 if window.start == 0 else 0  # before the first target of all stands start_id
        inputs_BT[row, first:] = text[window.start - 1 + first : window.end - 1]
    return inputs_BT


def model_scorer(model: torch.nn.Module, device: torch.device | str, precision: Precision = "float32") -> Score:
    """Wrap a model whose ``model(ids_BT)`` gives logits of shape B T V as a :data:`Score`.

    The model is put into evaluation mode for each call and back afterwards. The cross entropy is taken in
    float32.
    """
    import torch
    from torch.nn import functional as F

    from groundup.runtime.device import autocast

    device = torch.device(device)

    def score(inputs_BT: npt.NDArray[np.int64], targets_BT: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        ids_BT = torch.from_numpy(inputs_BT).to(device)
        labels_BT = torch.from_numpy(targets_BT).to(device)
        training = model.training
        model.eval()
        try:
            # no_grad, not inference_mode: a table the model caches in here must still serve a training step
            # afterwards.
            with torch.no_grad(), autocast(device, precision):
                logits_BTV = model(ids_BT)
            losses = F.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten(), reduction="none")
        finally:
            model.train(training)
        return losses.view(labels_BT.shape).cpu().numpy()

    return score


def bytes_per_token(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """UTF-8 bytes each token stands for, 0 for special tokens; shape [V]."""
    special = set(tokenizer.special_tokens.values())
    return np.array(
        [0 if i in special else len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)], dtype=np.int64
    )
