"""What each position may look at: those before it, less padding, other documents, and what lies outside a window."""

# B batch   T query positions   S key positions

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """What the queries of one attention may see. A dense mask is made only when a backend asks for it.

    Places are counted from the start of the sequence, padding and cached positions included. A query sees the keys at
    its own place and before it, less those that the other fields hide; itself it always sees, so that the softmax of a
    padding position is finite (nothing reads its result).

    Args:
        queries: T; they are the last T of all places so far.
        past: places before the first query.
        first: the place of the first key; more than 0 when a cache has let go of what lies outside the window.
        window: how many places a query sees, its own included; None for all.
        pad_B: how many of a sequence's first places are padding.
        documents_BS: the number of the document at each place; a query sees its own document only.
        device: where masks are made.
    """

    queries: int
    past: int
    first: int
    window: int | None
    pad_B: Tensor | None
    documents_BS: Tensor | None
    device: torch.device
    made: dict[tuple[int, int | None], Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def keys(self) -> int:
        """S: the number of keys."""
        return self.past + self.queries - self.first

    @property
    def narrow(self) -> bool:
        """Whether the window hides anything."""
        return self.window is not None and self.past + self.queries - self.first > self.window

    @property
    def dense(self) -> bool:
        """Whether more is hidden than what comes later: whether a mask is needed at all."""
        several = self.queries > 1
        shifted = several and self.queries != self.keys
        return self.narrow or shifted or self.pad_B is not None or self.documents_BS is not None

    def at(self, window: int | None, first: int) -> View:
        """The same places seen through another window, by keys that begin elsewhere; masks are shared."""
        return self if (window, first) == (self.window, self.first) else replace(self, window=window, first=first)

    def mask(self) -> Tensor:
        """True where a query may look: bool, 1 1 T S, or B 1 T S where sequences differ."""
        key = (self.first, self.window if self.narrow else None)
        if key not in self.made:
            query_T1 = torch.arange(self.past, self.past + self.queries, device=self.device)[:, None]
            key_1S = torch.arange(self.first, self.past + self.queries, device=self.device)[None]
            self.made[key] = self.visible(query_T1, key_1S)
        return self.made[key]

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """True where the query at a place may see the key at another.

        Args:
            query: places, ... T 1; those of keys are ... 1 S. Places before 0 hold nothing.

        Returns:
            bool, B or 1, 1 for the heads, ... T S.
        """
        seen = (key <= query) & (key >= 0)
        if self.window is not None:
            seen = seen & (query - key < self.window)
        if self.pad_B is None and self.documents_BS is None:
            return seen[None, None]
        if self.pad_B is not None:
            pad = self.pad_B.view(-1, *[1] * seen.ndim)
            seen = seen & ((key >= pad) | (key == query))
        if self.documents_BS is not None:
            last = self.documents_BS.shape[1] - 1  # places past the end exist where queries are cut into blocks
            of_query = self.documents_BS[:, query.clamp(0, last)]
            of_key = self.documents_BS[:, key.clamp(0, last)]
            seen = seen & ((of_query == of_key) | (key == query))
        return seen[:, None]


def positions_in_documents(documents_BT: Tensor) -> Tensor:
    """The position of each token in its own document, int64: packed documents count from 0 each."""
    place_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return place_T - torch.where(begins_BT, place_T, 0).cummax(dim=1).values
