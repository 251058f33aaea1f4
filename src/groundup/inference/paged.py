"""The paged cache: keys and values of all sequences in blocks, a pool for each kind of layer.

Layers that see the same (everything before, or a sliding window) are a group: their blocks are taken and given back
together. A group with a window gives blocks back as soon as they lie outside of it.
"""

# B sequences   M tokens of the step   T new positions of each   S kept positions   G key/value heads   D head dimension

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from groundup.inference.blocks import BlockPool, content_keys
from groundup.model.cache import Part, Ragged, cache_shapes
from groundup.model.config import ModelConfig

BLOCK = 8  # positions: half a block of each sequence is unused on average
LENGTHS_APART = 1.3  # sequences whose lengths differ by more than this factor are not read as one part


class Group(NamedTuple):
    """Layers whose attention sees the same positions.

    Args:
        window: how many, the query's own included; None for all.
        layers: their numbers.
        pool: their blocks; a block is the same number in each of the layers.
    """

    window: int | None
    layers: tuple[int, ...]
    pool: BlockPool


@dataclass
class Held:
    """The blocks of one sequence.

    Args:
        tables: for each group, the block of every ``size`` positions; -1 where there is none (yet, or any more).
        low, high: for each group, the first block that is held, and the number after the last.
        keys: of the whole blocks that have been computed.
    """

    tables: list[np.ndarray]
    low: list[int]
    high: list[int]
    keys: list[bytes] = field(default_factory=list)


class Piece(NamedTuple):
    """Some new tokens of a sequence.

    Args:
        held: its blocks, with room for the new tokens.
        begin: the place of the first new token.
        queries: how many new tokens.
        longest: positions of the whole text, its prompt read or not.
    """

    held: Held
    begin: int
    queries: int
    longest: int


class PagedCache:
    """Keys and values of many sequences in blocks.

    Args:
        config: of the model.
        tokens: positions that it has room for, all sequences together.
        size: positions of a block.
    """

    def __init__(
        self, config: ModelConfig, tokens: int, *, size: int = BLOCK, device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.size, self.blocks_each = size, -(-config.context_length // size)
        self.count = max(1, tokens // size)
        windows = [config.window(layer) for layer in range(config.n_layer)]
        kinds = sorted(set(windows), key=lambda window: (window is not None, window or 0))
        self.groups = [
            Group(window, tuple(layer for layer, own in enumerate(windows) if own == window), BlockPool(self.count))
            for window in kinds
        ]
        self.group_of = [kinds.index(window) for window in windows]
        self.device = torch.device(device)
        slots = (self.count + 1) * size
        k_shape, v_shape = ((slots, *shape) for shape in cache_shapes(config))
        self.pages = [(_zeros(k_shape, self.device, dtype), _zeros(v_shape, self.device, dtype)) for _ in windows]

    # ---- blocks of a sequence

    def open(self) -> Held:
        """A sequence without blocks."""
        tables = [np.full(self.blocks_each, -1, dtype=np.int32) for _ in self.groups]
        return Held(tables, [0] * len(self.groups), [0] * len(self.groups))

    def match(self, tokens: Sequence[int], salt: str) -> tuple[Held, int]:
        """Blocks of the longest beginning of a text that is in the cache, and how many of its tokens that are.

        At least one token is left to compute, since something must come out of the model.
        """
        held = self.open()
        keys = content_keys(tokens[:-1], self.size, salt)
        count = self._found(keys)
        held.keys = keys[:count]
        for number, group in enumerate(self.groups):
            low = self._first_seen(group, count * self.size) // self.size
            held.low[number], held.high[number] = low, count
            for place in range(low, count):
                block = group.pool.find(keys[place])
                assert block is not None
                group.pool.share(block)
                held.tables[number][place] = block
        return held, count * self.size

    def _found(self, keys: Sequence[bytes]) -> int:
        """How many first blocks are there, in each group as far back as it sees."""
        count = len(keys)
        for group in (group for group in self.groups if group.window is None):
            present = (place for place in range(count) if group.pool.find(keys[place]) is None)
            count = next(present, count)
        for length in range(count, 0, -1):
            if all(
                group.pool.find(keys[place]) is not None
                for group in self.groups
                if group.window is not None
                for place in range(self._first_seen(group, length * self.size) // self.size, length)
            ):
                return length
        return 0

    @staticmethod
    def _first_seen(group: Group, length: int) -> int:
        """The first place that a query at place ``length`` sees."""
        return 0 if group.window is None else max(0, length - group.window + 1)

    def missing(self, held: Held, begin: int, end: int, ahead: int = 0) -> list[int]:
        """For each group, blocks to be taken so that a sequence can write its places from ``begin`` to ``end``.

        Args:
            ahead: have room up to this place already, in groups without a window: blocks that are taken at once lie
                together, and then the keys of a long prompt are read where they are.
        """
        found = []
        for group, table, high in zip(self.groups, held.tables, held.high, strict=True):
            needed = self._needed(group, end, ahead)
            copies = sum(group.pool.shared(int(table[place])) for place in range(begin // self.size, min(high, needed)))
            found.append(max(0, needed - high) + copies)
        return found

    def _needed(self, group: Group, end: int, ahead: int) -> int:
        """Blocks up to a place."""
        return -(-(max(end, ahead) if group.window is None else end) // self.size)

    def reserve(self, held: Held, begin: int, end: int, ahead: int = 0) -> bool:
        """Give a sequence the blocks that are :meth:`missing`, or nothing at all.

        A block that others hold too is copied before it is written (copy on write).
        """
        missing = self.missing(held, begin, end, ahead)
        if any(count > group.pool.available for group, count in zip(self.groups, missing, strict=True)):
            return False
        for number, (group, table) in enumerate(zip(self.groups, held.tables, strict=True)):
            needed = self._needed(group, end, ahead)
            for place in range(begin // self.size, min(held.high[number], needed)):
                if group.pool.shared(block := int(table[place])):
                    table[place] = self._taken(group)
                    self._copy(group, block, int(table[place]))
                    group.pool.release(block)
            for place in range(held.high[number], needed):
                table[place] = self._taken(group)
            held.high[number] = max(held.high[number], needed)
        return True

    @staticmethod
    def _taken(group: Group) -> int:
        block = group.pool.take()
        assert block is not None
        return block

    def _copy(self, group: Group, source: int, target: int) -> None:
        size = self.size
        for layer in group.layers:
            for pages in self.pages[layer]:
                pages[target * size : (target + 1) * size] = pages[source * size : (source + 1) * size]

    def fork(self, held: Held) -> Held:
        """A sequence that goes on from the same text: it holds the same blocks."""
        for group, table, low, high in zip(self.groups, held.tables, held.low, held.high, strict=True):
            for block in table[low:high]:
                group.pool.share(int(block))
        return Held([table.copy() for table in held.tables], list(held.low), list(held.high), list(held.keys))

    def computed(self, held: Held, tokens: Sequence[int], length: int, salt: str | None) -> None:
        """The first ``length`` positions of a sequence are computed: whole blocks can be found by others (unless there
        is no salt), and what no query will see again is given back.
        """
        whole = length // self.size
        if salt is not None and whole > len(held.keys):
            before = len(held.keys)
            held.keys = content_keys(tokens[: whole * self.size], self.size, salt, held.keys)
            for group, table, low in zip(self.groups, held.tables, held.low, strict=True):
                for place in range(max(before, low), whole):
                    group.pool.remember(int(table[place]), held.keys[place])
        for number, group in enumerate(self.groups):
            if group.window is not None:
                self._give_back(held, number, range(held.low[number], self._first_seen(group, length) // self.size))
                held.low[number] = max(held.low[number], self._first_seen(group, length) // self.size)

    def release(self, held: Held) -> None:
        """Give back all blocks of a sequence, its last ones to be given up first."""
        for number, (low, high) in enumerate(zip(held.low, held.high, strict=True)):
            self._give_back(held, number, range(high - 1, low - 1, -1))
            held.low[number] = held.high[number] = 0
        held.keys = []

    def _give_back(self, held: Held, number: int, places: Iterable[int]) -> None:
        table, pool = held.tables[number], self.groups[number].pool
        for place in places:
            pool.release(int(table[place]))
            table[place] = -1

    # ---- what a model reads

    def slots(self, held: Held, group: int, places: np.ndarray) -> np.ndarray:
        """Where the keys of some places of a sequence lie in the group's pages; int64."""
        found: np.ndarray = held.tables[group][places // self.size].astype(np.int64) * self.size + places % self.size
        return found

    def ragged(self, pieces: Sequence[Piece], *, alone: bool = False) -> tuple[Ragged, list[int]]:
        """The row of tokens that pieces make, those that are read alike together.

        Args:
            alone: each sequence is a part of its own.

        Returns:
            The batch for the model, and the order of the pieces in it.
        """
        order = sorted(range(len(pieces)), key=lambda i: (pieces[i].queries, pieces[i].begin))
        parts: list[Part] = []
        begin, run = 0, list[int]()
        for i, index in enumerate(order):
            run.append(index)
            following = pieces[order[i + 1]] if i + 1 < len(order) else None
            if following is None or alone or not self._alike([pieces[index] for index in run], following):
                part = [pieces[index] for index in run]
                parts.append(
                    Part(begin, len(part), part[0].queries, max(p.longest for p in part), _PartCache(self, part))
                )
                begin, run = parts[-1].end, []
        places = np.concatenate([np.arange(pieces[i].begin, pieces[i].begin + pieces[i].queries) for i in order])
        return Ragged(torch.from_numpy(places)[None].to(self.device), tuple(parts)), order

    @staticmethod
    def _alike(part: Sequence[Piece], following: Piece) -> bool:
        """Whether a piece goes with others: as many new tokens, a text not much longer than the shortest of them."""
        first = part[0]
        return following.queries == first.queries and following.begin <= LENGTHS_APART * first.begin + 16


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros; on a CPU the system gives their memory when it is written first, so that a cache costs what is used of it.

    They must be zeros: what is hidden from attention is multiplied with 0, and must not be NaN.
    """
    if device.type != "cpu" or 0 in shape:
        return torch.zeros(shape, device=device, dtype=dtype)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def aligned_slots(
    paged: PagedCache, number: int, pieces: Sequence[Piece], length: int
) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """Where the keys of sequences with equally many new tokens lie, aligned at their ends.

    Args:
        number: of the group of layers.
        length: places before the new ones, padding included: at least those of the longest.

    Returns:
        For each sequence the slots of its new places and of all that are seen, and the place of the first of these.
    """
    window, T = paged.groups[number].window, pieces[0].queries
    first = 0 if window is None else max(0, length - window + 1)
    aligned = np.arange(first, length + T)
    new, seen = [], []
    for piece in pieces:
        places = aligned - (length - piece.begin)
        slots = paged.slots(piece.held, number, np.maximum(places, 0))
        slots = np.where((places >= 0) & (slots >= 0), slots, 0)  # padding, or outside the window: zeros
        seen.append(slots)
        new.append(slots[len(slots) - T :])
    return new, seen, first


class _PartCache:
    """What the model is shown of the pages: some sequences with equally many new tokens, aligned at their ends.

    See :class:`groundup.model.cache.Cache`.
    """

    def __init__(self, paged: PagedCache, pieces: Sequence[Piece]) -> None:
        self._paged = paged
        begins = [piece.begin for piece in pieces]
        self.length = max(begins)
        T = pieces[0].queries
        self.capacity = self.length + T
        pads = [self.length - begin for begin in begins]
        self.pad_B = torch.tensor(pads, device=paged.device) if any(pads) else None
        self._places: list[tuple[Tensor | slice, Tensor | slice, int]] = []
        for number in range(len(paged.groups)):
            new, seen, first = aligned_slots(paged, number, pieces, self.length)
            kept = seen[0] if len(seen) == 1 else np.stack(seen)
            self._places.append((self._index(np.concatenate(new)), self._index(kept), first))

    def _index(self, slots: np.ndarray) -> Tensor | slice:
        """Slots that lie one after the other are read and written without a copy."""
        if slots.ndim == 1 and slots[-1] - slots[0] == len(slots) - 1 and bool((np.diff(slots) == 1).all()):
            return slice(int(slots[0]), int(slots[-1]) + 1)
        return torch.from_numpy(slots).to(self._paged.device)

    def append(self, layer: int, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor, int]:
        """Write the new keys and values to their pages; all that may be seen, B S G D, and the place of the first."""
        new, seen, first = self._places[self._paged.group_of[layer]]
        found = []
        for pages, x_BTGD in zip(self._paged.pages[layer], (k_BTGD, v_BTGD), strict=True):
            pages[new] = x_BTGD.flatten(0, 1).to(pages.dtype)
            kept = pages[seen]
            found.append(kept[None] if kept.ndim == 3 else kept)
        return found[0], found[1], first

    def advance(self, positions: int) -> None:
        """Nothing is counted here: whoever made the pieces does."""
