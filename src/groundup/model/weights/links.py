"""How the tensors of a folder and the parameters of our model belong together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """A parameter or buffer of our model, or one of the matrices stacked in it.

    Args:
        name: its name in ``Transformer.state_dict()``.
        index: which expert's; None for all of it.
    """

    name: str
    index: int | None = None

    def of(self, tensors: dict[str, Tensor]) -> Tensor:
        """The tensor itself, sharing its memory."""
        tensor = tensors[self.name]
        return tensor if self.index is None else tensor[self.index]


def _itself(tensor: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    return [tensor]


def _only(parts: Sequence[Tensor]) -> Tensor:
    return parts[0]


@dataclass(frozen=True)
class Link:
    """One tensor of a folder and what it holds of ours.

    Args:
        theirs: its name there.
        ours: the places that it fills.
        split: their tensor to ours, one for each place, given the tensors that lie there (for their shapes).
        join: the other way round.
    """

    theirs: str
    ours: tuple[Place, ...]
    split: Callable[[Tensor, Sequence[Tensor]], list[Tensor]] = _itself
    join: Callable[[Sequence[Tensor]], Tensor] = _only

    @property
    def plain(self) -> bool:
        """Whether it is the same tensor by another name."""
        return self.split is _itself


def same(theirs: str, ours: str, index: int | None = None) -> Link:
    """The same tensor by two names."""
    return Link(theirs, (Place(ours, index),))


def transposed(theirs: str, *ours: str) -> Link:
    """Matrices side by side, inputs before outputs, as GPT-2 has them."""

    def split(tensor: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
        return list(tensor.T.split([len(part) for part in parts])) if tensor.ndim == 2 else [tensor]

    return Link(theirs, tuple(map(Place, ours)), split, lambda parts: torch.cat(list(parts)).T)


def by_rows(theirs: str, *ours: str) -> Link:
    """Matrices (or biases) one below the other in one tensor: outputs of several linear layers."""

    def split(tensor: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
        return list(tensor.split([len(part) for part in parts]))

    return Link(theirs, tuple(map(Place, ours)), split, lambda parts: torch.cat(list(parts)))


def by_head(theirs: str, n_head: int, *ours: str) -> Link:
    """Outputs of several linear layers, taken in turn for each head, as GPT-NeoX has them."""

    def split(tensor: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
        turns = tensor.unflatten(0, (n_head, len(parts), -1))
        return [turns[:, number].flatten(0, 1) for number in range(len(parts))]

    def join(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([part.unflatten(0, (n_head, -1)) for part in parts], dim=1).flatten(0, 2)

    return Link(theirs, tuple(map(Place, ours)), split, join)


def in_pairs(theirs: str, ours: str, heads: int, rotated: int) -> Link:
    """Rows whose last ``rotated`` of each head are rotary dimensions in neighbouring pairs, where ours are in halves.

    The convention of the RoPE paper, llama2.c and DeepSeek. The permutation is the same for queries and keys, so that
    their products are unchanged.
    """

    def reordered(tensor: Tensor, order: Callable[[Tensor], Tensor]) -> Tensor:
        by_heads = tensor.unflatten(0, (heads, -1))
        kept = by_heads.shape[1] - rotated
        return torch.cat([by_heads[:, :kept], order(by_heads[:, kept:])], dim=1).flatten(0, 1)

    def split(tensor: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
        return [reordered(tensor, lambda rows: torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=1))]

    def join(parts: Sequence[Tensor]) -> Tensor:
        return reordered(parts[0], lambda rows: torch.stack(rows.chunk(2, dim=1), dim=2).flatten(1, 2))

    return Link(theirs, (Place(ours),), split, join)


def alternating(theirs: str, first: str, second: str, *, inputs_first: bool) -> Link:
    """Outputs of two stacks of experts in turn, N ... 2F, as gpt-oss has them.

    Args:
        inputs_first: the tensor is N E 2F (ours N F E); otherwise a bias, N 2F.
    """

    def split(tensor: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
        halves = [tensor[..., 0::2], tensor[..., 1::2]]
        return [half.transpose(1, 2) for half in halves] if inputs_first else halves

    def join(parts: Sequence[Tensor]) -> Tensor:
        halves = [part.transpose(1, 2) for part in parts] if inputs_first else list(parts)
        return torch.stack(halves, dim=-1).flatten(-2)

    return Link(theirs, (Place(first), Place(second)), split, join)


def inputs_first(theirs: str, ours: str) -> Link:
    """A stack of matrices with inputs before outputs: N F E where ours is N E F."""
    return Link(theirs, (Place(ours),), lambda t, _: [t.transpose(1, 2)], lambda parts: parts[0].transpose(1, 2))
