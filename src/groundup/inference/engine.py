"""From prompts to tokens: a batch of requests decoded together over one cache."""

# B batch   T positions   V vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from groundup.inference.sampling import SamplingParams, choose
from groundup.model import KVCache, Transformer
from groundup.runtime import UsageError

Finish = Literal["length", "end_of_text", "stopped"]


@dataclass
class Request:
    """One prompt on its way.

    Args:
        prompt: token ids, at least one.
        params: how its tokens are chosen.
        tokens: what was generated so far.
        finish: why it ended; None while it has not. ``stopped`` is set from outside, by whoever watches the text.
    """

    prompt: list[int]
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None

    def __post_init__(self) -> None:
        self.generator = torch.Generator()
        if self.params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.params.seed)


def window_start(length: int, context: int) -> int:
    """Where the window of a sequence of ``length`` tokens starts: 0 while it fits, then moved on by half a context each
    time it is full. It depends on nothing else, so that neither the prompt's share nor the batch changes a result.
    """
    hop = context - context // 2
    return 0 if length <= context else -(-(length - context) // hop) * hop


class Engine:
    """Decodes requests on one model.

    The context is a window (:func:`window_start`): when a sequence outgrows ``context_length``, its second half is read
    again from the start of a fresh cache and decoding goes on. Greedy decoding gives the tokens of the plain loop that
    recomputes the whole window for every token, and a request gets the same tokens alone and in any batch.

    Args:
        model: the weights; put into evaluation mode.
        end_of_text: the token that ends a request, and is not part of its result; None for none.
        vocab_size: choose among the ids below this one only, for a model whose vocabulary was padded past its
            tokenizer's; None for all.
    """

    def __init__(self, model: Transformer, *, end_of_text: int | None = None, vocab_size: int | None = None) -> None:
        self.model = model.eval()
        self.end_of_text = end_of_text
        self.vocab_size = model.config.vocab_size if vocab_size is None else vocab_size

    def run(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, int]]]:
        """Decode until every request has finished, all of them one token a step.

        Yields:
            After each step, (index of the request, new token id) for each request that got one. Setting ``finish`` on
            a request between steps ends it.

        Raises:
            UsageError: a prompt is empty or holds ids the model does not know.
            GroundupError: the model computes values that are not finite.
        """
        for request in requests:
            self._check(request)
        active = list(range(len(requests)))
        cache: KVCache | None = None
        while active:
            with torch.inference_mode():
                if cache is None or cache.length >= self.model.config.context_length:
                    cache, logits_BV = self._read([requests[i].prompt + requests[i].tokens for i in active])
                else:
                    ids_B1 = torch.tensor([[requests[i].tokens[-1]] for i in active], device=self._device)
                    logits_BV = self.model(ids_B1, cache, last_only=True)[:, -1]
                step = self._choose(requests, active, logits_BV)
            yield step
            rows = [row for row, index in enumerate(active) if requests[index].finish is None]
            if len(rows) < len(active):
                active = [active[row] for row in rows]
                if active:
                    cache.keep(torch.tensor(rows, device=self._device))

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.weight.device

    def _check(self, request: Request) -> None:
        if not request.prompt:
            raise UsageError("the prompt is empty: give at least one token.")
        outside = [token for token in request.prompt if not 0 <= token < self.model.config.vocab_size]
        if outside:
            raise UsageError(
                f"the token id {outside[0]} is outside the model's vocabulary of {self.model.config.vocab_size}."
            )

    def _choose(self, requests: Sequence[Request], active: Sequence[int], logits_BV: Tensor) -> list[tuple[int, int]]:
        step = []
        for row, index in enumerate(active):
            request = requests[index]
            token = choose(logits_BV[row, : self.vocab_size], request.params, request.generator)
            if token == self.end_of_text:
                request.finish = "end_of_text"
                continue
            request.tokens.append(token)
            step.append((index, token))
            if len(request.tokens) >= request.params.max_tokens:
                request.finish = "length"
        return step

    def _read(self, sequences: Sequence[list[int]]) -> tuple[KVCache, Tensor]:
        """Read the window of each sequence into a fresh cache; the logits after the last token of each, B V."""
        context = self.model.config.context_length
        windows = [sequence[window_start(len(sequence), context) :] for sequence in sequences]
        longest = max(map(len, windows))
        dtype = self.model.embedding.weight.dtype
        cache = KVCache(self.model.config, len(windows), context, device=self._device, dtype=dtype)
        if any(len(window) < longest for window in windows):
            cache.pad_B = torch.tensor([longest - len(window) for window in windows], device=self._device)
        ids_BT = torch.tensor([[0] * (longest - len(window)) + window for window in windows], device=self._device)
        return cache, self.model(ids_BT, cache, last_only=True)[:, -1]
