"""From what is planned to logits: one forward pass over the new tokens of all sequences."""

# M tokens of the step   R rows whose logits are wanted   E embedding   V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from groundup.inference.graphs import StepGraphs
from groundup.inference.paged import Held, PagedCache, Piece
from groundup.inference.scheduler import Work
from groundup.model import Transformer

if TYPE_CHECKING:
    from groundup.inference.small_batch import SmallBatch


class Runner:
    """Runs a model on the pieces of sequences.

    Where the model can, tokens go through compiled kernels on a CPU (small_batch.py); all else through PyTorch.

    Args:
        model: the weights.
        paged: where keys and values lie.
        vocab_size: logits of ids below this one only.
        alone: give each sequence numbers that do not hang on who else is there. Kernels do so by themselves; in PyTorch
            a product of more rows may add up in another order, and so each sequence runs by itself.
        compiled: use the kernels on a CPU, recorded steps on a CUDA device (graphs.py).
    """

    def __init__(
        self, model: Transformer, paged: PagedCache, vocab_size: int, *, alone: bool = False, compiled: bool = True
    ) -> None:
        self.model, self.paged, self.vocab_size, self.alone = model, paged, vocab_size, alone
        self._grows = any(rotary is not None and rotary.grows for rotary in (model.rotary, model.local_rotary))
        self.kernels = _kernels(model, paged) if compiled else None
        recorded = compiled and paged.device.type == "cuda" and StepGraphs.refusal(model) is None
        self.graphs = StepGraphs(model, paged, vocab_size) if recorded else None

    def renew(self) -> None:
        """The model computes with other weights: what was recorded with those before is recorded anew."""
        if self.graphs is not None:
            self.graphs = StepGraphs(self.model, self.paged, self.vocab_size)

    @torch.inference_mode()
    def run(self, works: Sequence[Work], wanted: Sequence[int]) -> list[Tensor]:
        """Compute the planned tokens.

        Args:
            wanted: for each sequence, after how many of its last tokens logits are asked for.

        Returns:
            For each sequence its logits, wanted V, float32 or the model's dtype.
        """
        if self.alone:
            return self._one_by_one(works, wanted)
        kernels = self.kernels
        if kernels is not None and (kernels.fast or sum(work.queries for work in works) <= kernels.most):
            return self._compiled(works, wanted)
        return self._by_pytorch(works, wanted)

    def _one_by_one(self, works: Sequence[Work], wanted: Sequence[int]) -> list[Tensor]:
        """Each sequence as if it were alone."""
        found: list[Tensor] = [torch.empty(0)] * len(works)
        single = [i for i, work in enumerate(works) if work.queries == 1 and self.kernels is not None]
        if single:
            logits = self._compiled([works[i] for i in single], [wanted[i] for i in single])
            for i, rows in zip(single, logits, strict=True):
                found[i] = rows
        for i in set(range(len(works))) - set(single):
            (found[i],) = self._by_pytorch([works[i]], [wanted[i]])
        return found

    def _compiled(self, works: Sequence[Work], wanted: Sequence[int]) -> list[Tensor]:
        """By kernels, so many tokens at once as they take."""
        assert self.kernels is not None
        kernels, most = self.kernels, self.kernels.most
        ids = np.array([token for work in works for token in _new_tokens(work)])
        positions = np.array([work.text.computed + n for work in works for n in range(work.queries)])
        rows = np.array([row for row, work in enumerate(works) for _ in range(work.queries)])
        lengths = np.array([works[row].text.length for row in rows]) if self._grows else None
        helds = [_held(work) for work in works]
        tables = [np.stack([held.tables[group] for held in helds]) for group in range(len(self.paged.groups))]
        if sum(wanted) == len(ids) <= most:
            features_NE, logits_RV = kernels.features_and_logits(ids, positions, rows, tables, lengths)
        else:
            parts = [slice(begin, begin + most) for begin in range(0, len(ids), most)]
            features_NE = np.concatenate([
                kernels.features(
                    ids[part], positions[part], rows[part], tables, None if lengths is None else lengths[part]
                )
                for part in parts
            ])  # fmt: skip
            ends = accumulate(work.queries for work in works)
            chosen = [n for end, count in zip(ends, wanted, strict=True) for n in range(end - count, end)]
            found = [kernels.logits(features_NE[chosen[i : i + most]]) for i in range(0, len(chosen), most)]
            logits_RV = np.concatenate(found) if found else np.empty((0, self.vocab_size), np.float32)
        for work, end in zip(works, accumulate(work.queries for work in works), strict=True):
            _show(work, features_NE, end)
        return list(torch.from_numpy(logits_RV[:, : self.vocab_size]).split(list(wanted)))

    def _by_pytorch(self, works: Sequence[Work], wanted: Sequence[int]) -> list[Tensor]:
        pieces = [self._piece(work) for work in works]
        if self.graphs is not None and all(work.text.search is None for work in works):
            logits_BV = self.graphs.logits(pieces, [token for work in works for token in _new_tokens(work)])
            if logits_BV is not None:
                return [logits_BV[i : i + 1] for i in range(len(works))]
        batch, order = self.paged.ragged(pieces, alone=self._grows)
        tokens = [token for index in order for token in _new_tokens(works[index])]
        device = self.paged.device
        features_ME = self.model.features(torch.tensor([tokens], device=device), batch)[0]
        rows: list[int] = []
        counts: list[int] = []
        end = 0
        for index in order:
            end += works[index].queries
            _show(works[index], features_ME, end)
            rows += range(end - wanted[index], end)
            counts.append(wanted[index])
        chosen_RE = features_ME[torch.tensor(rows, dtype=torch.int64, device=device)]
        logits_RV = self.model.logits(chosen_RE[None])[0, :, : self.vocab_size]
        found: list[Tensor] = [logits_RV] * len(works)
        for index, logits in zip(order, logits_RV.split(counts), strict=True):
            found[index] = logits
        return found

    @staticmethod
    def _piece(work: Work) -> Piece:
        return Piece(_held(work), work.text.computed, work.queries, work.text.length)


def _kernels(model: Transformer, paged: PagedCache) -> SmallBatch | None:
    """Compiled kernels for a model, if it can be run by them and Numba is there."""
    try:
        from groundup.inference.small_batch import SmallBatch
    except ImportError:
        return None
    if SmallBatch.refusal(model) is not None:
        return None
    return SmallBatch(model, paged.pages, paged.size, paged.group_of)


def _show(work: Work, features_ME: np.ndarray | Tensor, end: int) -> None:
    """Let a search see the features of a sequence's new tokens, the last of which stand before row ``end``."""
    search = work.text.search
    if search is not None and search.sees:
        search.see(work.text, torch.as_tensor(features_ME[end - work.queries : end]))


def _held(work: Work) -> Held:
    assert work.text.held is not None
    return work.text.held


def _new_tokens(work: Work) -> list[int]:
    text = work.text
    begin = text.start + text.computed
    return (text.tokens[begin:] + text.drafts)[: work.queries]
