"""Decoding few texts on a CUDA device: a step that is recorded once and replayed (CUDA graphs).

A step of one token asks the device for some ten small pieces of work per layer, and asking takes longer than doing
them. A graph asks once for all. What is recorded reads and writes where it did at first, so a graph belongs to a number
of texts and to a length that they are padded to, and each step copies what is new to its places.

Not tested on a device yet: the tests make the same steps on a CPU, where there is nothing to record.
"""

# B texts   M tokens of the step: one of each   S positions seen   V vocabulary

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from groundup.inference.paged import PagedCache, Piece, aligned_slots
from groundup.model import Transformer
from groundup.model.cache import Part, Ragged

MOST = 8  # texts: with more, the work takes longer than asking for it
SHORTEST = 128  # positions; longer texts go to graphs of twice as many, and so on


class StepGraphs:
    """The graphs of a model, recorded as they are needed.

    Args:
        model: one that :meth:`refusal` does not speak of.
        paged: its cache.
        vocab_size: logits of ids below this one only.
    """

    def __init__(self, model: Transformer, paged: PagedCache, vocab_size: int) -> None:
        self._model, self._paged, self._vocab_size = model, paged, vocab_size
        self._graphs: dict[tuple[int, int], _StepGraph] = {}

    @staticmethod
    def refusal(model: Transformer) -> str | None:
        """Why a model's steps cannot be recorded; None if they can."""
        if any(model.config.expert_layers):
            return "where tokens of a mixture of experts go is known on the device alone"
        rotaries = [rotary for rotary in (model.rotary, model.local_rotary) if rotary is not None]
        if any(rotary.grows or rotary.scaling.kind == "longrope" for rotary in rotaries):
            return "its rotary positions hang on how long the text is"
        return None

    def logits(self, pieces: Sequence[Piece], tokens: Sequence[int]) -> Tensor | None:
        """Logits after one new token of each sequence, B V; None where there is no graph for so many."""
        if len(pieces) > MOST or any(piece.queries != 1 for piece in pieces):
            return None
        longest, positions = max(piece.begin for piece in pieces) + 1, SHORTEST
        while positions < longest:
            positions *= 2
        key = len(pieces), min(positions, self._model.config.context_length)
        if key not in self._graphs:
            self._graphs[key] = _StepGraph(self._model, self._paged, self._vocab_size, *key)
        return self._graphs[key].logits(pieces, tokens)


class _StepGraph:
    """One step of so many texts, padded to so many positions."""

    def __init__(self, model: Transformer, paged: PagedCache, vocab_size: int, texts: int, positions: int) -> None:
        self._model, self._paged, self._vocab_size = model, paged, vocab_size
        self._cache = _FixedCache(paged, texts, positions)
        self._ids_1M, self._positions_1M = (
            torch.zeros(1, texts, dtype=torch.int64, device=paged.device) for _ in range(2)
        )
        part = Part(0, texts, 1, model.config.context_length, self._cache)
        self._batch = Ragged(self._positions_1M, (part,))
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits_BV: Tensor | None = None

    def logits(self, pieces: Sequence[Piece], tokens: Sequence[int]) -> Tensor:
        """Logits of this step's tokens, B V: in memory of their own."""
        self._cache.fill(pieces)
        self._ids_1M.copy_(torch.tensor([list(tokens)]))
        self._positions_1M.copy_(torch.tensor([[piece.begin for piece in pieces]]))
        if self._paged.device.type != "cuda":
            return self._compute()
        if self._graph is None:
            self._record()
        assert self._graph is not None
        assert self._logits_BV is not None
        self._graph.replay()
        return self._logits_BV.clone()

    def _compute(self) -> Tensor:
        features_1ME = self._model.features(self._ids_1M, self._batch)
        return self._model.logits(features_1ME)[0, :, : self._vocab_size]

    def _record(self) -> None:
        """Record a step, after one that only prepares what libraries make at their first call.

        Both write the same keys and values as the replay does: nothing is spoilt.
        """
        stream = torch.cuda.Stream(self._paged.device)
        stream.wait_stream(torch.cuda.current_stream(self._paged.device))
        with torch.cuda.stream(stream):
            self._compute()
        torch.cuda.current_stream(self._paged.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits_BV = self._compute()


class _FixedCache:
    """What the model is shown of the pages, by tensors that stay where they are. See :class:`model.cache.Cache`."""

    def __init__(self, paged: PagedCache, texts: int, positions: int) -> None:
        self._paged, device = paged, paged.device
        self.length, self.capacity = positions - 1, positions
        self.pad_B: Tensor | None = torch.zeros(texts, dtype=torch.int64, device=device)
        self._places = []
        for group in paged.groups:
            first = 0 if group.window is None else max(0, self.length - group.window + 1)
            new_B = torch.zeros(texts, dtype=torch.int64, device=device)
            seen_BS = torch.zeros(texts, positions - first, dtype=torch.int64, device=device)
            self._places.append((new_B, seen_BS, first))

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Write where the keys of these sequences lie."""
        assert self.pad_B is not None
        self.pad_B.copy_(torch.tensor([self.length - piece.begin for piece in pieces]))
        for number, (new_B, seen_BS, _) in enumerate(self._places):
            new, seen, _ = aligned_slots(self._paged, number, pieces, self.length)
            new_B.copy_(torch.from_numpy(np.concatenate(new)))
            seen_BS.copy_(torch.from_numpy(np.stack(seen)))

    def append(self, layer: int, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor, int]:
        """Write the new keys and values to their pages; all that may be seen, B S G D, and the place of the first."""
        new_B, seen_BS, first = self._places[self._paged.group_of[layer]]
        found = []
        for pages, x_BTGD in zip(self._paged.pages[layer], (k_BTGD, v_BTGD), strict=True):
            pages[new_B] = x_BTGD.flatten(0, 1).to(pages.dtype)
            found.append(pages[seen_BS])
        return found[0], found[1], first

    def advance(self, positions: int) -> None:
        """Nothing is counted here: whoever made the pieces does."""
