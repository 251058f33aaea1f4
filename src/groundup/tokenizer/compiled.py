"""The memory that the kernels work on: tables and buffers, how large they are and when they grow.

Nothing in kernels/ checks bounds, so what each buffer must hold is said here, where it is made.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import numpy as np

from groundup.runtime.errors import GroundupError
from groundup.tokenizer.kernels import cut, merge, state, words
from groundup.tokenizer.pretokenize import Splitter
from groundup.tokenizer.rules import Rules
from groundup.tokenizer.unicode_classes import class_bits

PIECE = 1 << 14  # bytes of text worked on at once: they, and all about them, stay in the nearest cache
FIRST_SLOTS, MOST_SLOTS = 1 << 14, 1 << 20  # the word table grows from 0.5 MB to 32 MB, then it begins again
SLOTS_TO_COUNT = 1 << 16
LONGEST_KEPT = 256  # bytes; longer chunks hardly ever come back
PARTS_PER_THREAD = 4  # so that a thread that is held up does not hold up all
PER_THREAD = 400_000  # bytes; for less, starting a thread costs more than it brings
SPILL = 16  # bytes after the arena's end, for ids are copied four at a time
LISTED_AT_ONCE = 1 << 18  # bytes of text whose ids are made into lists while they are near
AT_ONCE = 1 << 28  # bytes of text whose ids are written into one buffer


Item = TypeVar("Item")
Result = TypeVar("Result")

_CALLED = {
    state.MERGE: merge.merge,
    state.NEXT_PIECE: words.next_piece,
    state.ENCODE_CHUNKS: words.encode_chunks,
    state.LEARN_CHUNKS: words.learn_chunks,
}


def check() -> None:
    """Compile the large functions, or read them from the cache: raises whatever Numba raises when it cannot be used."""
    for function in _CALLED.values():
        function.address  # noqa: B018


class Memory:
    """An array of fields for the kernels, and the arrays whose addresses it holds.

    Args:
        splitter: the pattern.
        slots: how many the word table has at first; a power of two.
        longest: bytes of the longest chunk that is kept in it.
    """

    def __init__(self, splitter: Splitter, slots: int, longest: int) -> None:
        self.fields = np.zeros(state.FIELDS, np.int64)
        self.address: int = self.fields.ctypes.data
        self.source_at, self.size_at = self.address + 8 * state.SOURCE, self.address + 8 * state.SIZE
        self._arrays: dict[int, np.ndarray] = {}
        self.hold(state.CLASSES, class_bits())
        masks = [(1 << 8 * size) - 1 for size in range(words.SHORT + 1)]
        self.hold(state.MASKS, np.array([(mask & (1 << 64) - 1, mask >> 64) for mask in masks], np.uint64))
        self.hold(state.BATCH, np.empty((words.CHUNKS_AT_ONCE, 3), np.int64))
        self.hold(state.LANES_AT, np.zeros(merge.LANES * merge.LANE_BYTES + 64, np.uint8))
        self.fields[state.LANES_AT] += -self.fields[state.LANES_AT] % 64  # what is read at once lies in one line
        self.fields[state.LONGEST] = longest
        if splitter.shape is not None:
            self.fields[[state.PATTERN, state.DIGITS, state.ALL_AT_END]] = splitter.shape
        self.set_capacity(PIECE)
        self._set_table(np.zeros((slots, 4), np.int64), np.empty(slots * words.SLOT + SPILL, np.uint8))

    def hold(self, field: int, values: np.ndarray) -> None:
        """Keep an array alive, and tell the kernels where it is."""
        self._arrays[field] = values
        self.fields[field] = values.ctypes.data

    def array(self, field: int) -> np.ndarray:
        """The array behind a field."""
        return self._arrays[field]

    def set_capacity(self, size: int) -> None:
        """Make room for pieces of text of ``size`` bytes."""
        self.capacity = size
        self.fields[state.CAPACITY] = size
        self.hold(state.SCRATCH, np.zeros(size + 64, np.uint8))  # loads reach up to 63 bytes past the text
        stride = (size // 64 + 2) * 8  # a bit for each byte, one more block that is empty, one partly filled
        self.fields[state.STRIDE] = stride
        self.hold(state.MAPS, np.zeros(cut.BITMAPS * stride, np.uint8))
        self.hold(state.ENDS, np.zeros(size + 2, np.uint32))
        self.fields[state.ENDS] += 4  # the place before is overwritten
        self.hold(state.SLOTS, np.empty(size, np.int64))
        self.hold(state.CLAIMS, np.empty((size, 3), np.int64))
        self.hold(state.MERGED, np.zeros(size + 5, np.uint32))  # one id before; four behind, which are copied at once
        self.fields[state.MERGED] += 4
        self.hold(state.WORK, np.zeros(32 * size + 128, np.uint8))  # some ranks before, some behind
        self.fields[state.WORK] += 64
        self.hold(state.IDS, np.zeros(size + 4, np.uint32))  # a store of four ids may reach past the last one
        self.ids_at = int(self.fields[state.IDS])

    def _set_table(self, table: np.ndarray, arena: np.ndarray) -> None:
        self.hold(state.TABLE, table)
        self.hold(state.ARENA, arena)
        self.fields[state.TABLE_SHIFT] = 65 - len(table).bit_length()
        self.fields[state.ARENA_SIZE] = arena.size - SPILL

    def grow(self, times: int) -> None:
        """Make the word table and its arena so many times larger, keeping what is in them."""
        old, old_arena, used = self.array(state.TABLE), self.array(state.ARENA), self.fields[state.ARENA_USED]
        slots = len(old) * times
        table, arena = np.zeros((slots, 4), np.int64), np.empty(slots * words.SLOT + SPILL, np.uint8)
        arena[:used] = old_arena[:used]
        self._set_table(table, arena)
        words.move_slots(old.ctypes.data, len(old), table.ctypes.data, np.uint64(self.fields[state.TABLE_SHIFT]))

    def forget(self) -> None:
        """Empty the word table."""
        self.array(state.TABLE)[:] = 0
        self.fields[[state.USED, state.ARENA_USED]] = 0

    def begin(self) -> None:
        """Set the place in a batch of texts to its beginning."""
        self.fields[[state.TEXT, state.DONE, state.WRITTEN]] = 0


def locate(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Addresses and sizes of the UTF-8 bytes of strings, which must be kept while they are used.

    Raises:
        UnicodeEncodeError: one holds a lone surrogate.
        TypeError: one is no string.
    """
    sources, sizes = np.empty(len(texts), np.int64), np.empty(len(texts), np.int64)
    found = words.find_texts(id(texts), len(texts), sources.ctypes.data, sizes.ctypes.data)
    if found < len(texts):
        if not isinstance(texts[found], str):
            raise TypeError(f"text {found} is {type(texts[found]).__name__}, not str")
        texts[found].encode()
        raise MemoryError("a text does not fit into memory a second time")
    return sources, sizes


class CompiledEncoder:
    """Byte-pair encoding by compiled functions. Threads may share it: each call takes a memory of its own."""

    def __init__(self, rules: Rules, splitter: Splitter) -> None:
        self._splitter = splitter
        self._vocab_size = len(rules.tokens)
        self._tables, self._exceptions = _tables(rules)
        self._idle = [self._new_memory()]

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        if self._splitter.shape is not None:
            memory = self._lease()
            size = words.find_text(memory.address, id(text))
            ids = None
            if 0 <= size <= memory.capacity:
                count = self._run(memory, memory.source_at, memory.size_at, 1, memory.size_at, memory.ids_at)
                ids = memory.array(state.IDS)[:count].tolist()
            self._give_back(memory)
            if ids is not None:
                return ids
        return self.encode_array([text], 1)[0].tolist()

    def encode_array(self, texts: Sequence[str], threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of all texts, one after another (uint32), and where each text begins (int64)."""
        kept = texts if isinstance(texts, list) else list(texts)
        if not kept:
            return np.empty(0, np.uint32), np.zeros(1, np.int64)
        sources, sizes = locate(kept)
        starts = np.zeros(len(kept) + 1, np.int64)
        done, arrays = 0, []
        reach = np.cumsum(sizes)
        while done < len(kept):
            limit = AT_ONCE + (reach[done - 1] if done else 0)
            stop = max(done + 1, int(np.searchsorted(reach, limit, "right")))
            if self._splitter.shape is not None:
                ids = self._encode_located(sources[done:stop], sizes[done:stop], starts[done : stop + 1], threads)
            else:
                ids = self._encode_cut(kept[done:stop], starts[done : stop + 1])
            arrays.append(ids)
            done = stop
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays), starts

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Token ids of each text, as lists that share their numbers: a new one for each would be most of the work."""
        kept = texts if isinstance(texts, list) else list(texts)
        lists: list = [None] * len(kept)
        if not kept:
            return lists
        if self._splitter.shape is None:
            self._list(*self.encode_array(kept), lists, 0)
            return lists
        sources, sizes = locate(kept)
        total = int(sizes.sum())

        def work(part: tuple[int, int]) -> None:
            first, stop = part
            ids, starts = np.empty(int(sizes[first:stop].sum()) + 4, np.uint32), np.zeros(stop - first + 1, np.int64)
            self._encode_part(sources[first:stop], sizes[first:stop], starts[1:], ids)
            self._list(ids, starts, lists, first)

        # While one thread makes lists, for which it needs the interpreter's lock, another one can encode.
        _in_threads(work, _even_parts(sizes, 1 + total // LISTED_AT_ONCE), _threads_for(total, threads))
        return lists

    def _list(self, ids: np.ndarray, starts: np.ndarray, lists: list, first: int) -> None:
        count = len(starts) - 1
        numbers = self._numbers.ctypes.data
        if words.list_ids(ids.ctypes.data, starts.ctypes.data, count, numbers, id(lists), first) < count:
            raise MemoryError

    @cached_property
    def _numbers(self) -> np.ndarray:
        return np.array(range(self._vocab_size), object)

    def _encode_located(
        self, sources: np.ndarray, sizes: np.ndarray, starts: np.ndarray, threads: int | None
    ) -> np.ndarray:
        """Encode texts at addresses; ``starts``, whose first is given, gets where each text's ids end."""
        total = int(sizes.sum())
        threads = _threads_for(total, threads)
        # As many ids as bytes is the most there can be; memory that is not written to costs nothing.
        parts = _even_parts(sizes, PARTS_PER_THREAD * threads if threads > 1 else 1)
        ids = np.empty(total + 4 * len(parts), np.uint32)
        reach = np.concatenate([[0], np.cumsum(sizes)])
        rooms = [int(reach[first]) + 4 * number for number, (first, _) in enumerate(parts)]
        ends = starts[1:]

        def work(number: int) -> int:
            first, stop = parts[number]
            return self._encode_part(sources[first:stop], sizes[first:stop], ends[first:stop], ids[rooms[number] :])

        counts = _in_threads(work, range(len(parts)), threads)
        written = 0
        for (first, stop), room, count in zip(parts, rooms, counts, strict=True):
            if room != written:
                ctypes.memmove(ids.ctypes.data + 4 * written, ids.ctypes.data + 4 * room, 4 * count)
            ends[first:stop] += starts[0] + written
            written += count
        ids.resize(written, refcheck=False)  # gives the rest of the memory back
        return ids

    def _encode_part(self, sources: np.ndarray, sizes: np.ndarray, ends: np.ndarray, ids: np.ndarray) -> int:
        memory = self._lease()
        memory.begin()
        count = self._run(memory, sources.ctypes.data, sizes.ctypes.data, len(sizes), ends.ctypes.data, ids.ctypes.data)
        self._give_back(memory)
        return count

    def _run(self, memory: Memory, sources: int, sizes: int, texts: int, ends: int, ids: int) -> int:
        """Encode texts, all arguments being addresses; returns how many ids there are."""
        while status := words.encode_texts(memory.address, sources, sizes, texts, ends, ids):
            if status == state.LONGER:
                memory.set_capacity(2 * memory.capacity)
            else:
                self._make_room(memory)
        return int(memory.fields[state.WRITTEN])

    def _encode_cut(self, texts: list[str], starts: np.ndarray) -> np.ndarray:
        """Encode texts that Python cuts: patterns that kernels/cut.py does not have."""
        memory = self._lease()
        arrays = []
        written = int(starts[0])
        for number, text in enumerate(texts):
            for data, ends in cut_in_python(self._splitter, text, memory):
                if 2 * memory.fields[state.USED] > len(memory.array(state.TABLE)):
                    self._make_room(memory)
                out = memory.array(state.IDS)
                scratch = memory.array(state.SCRATCH)
                scratch[: len(data)] = np.frombuffer(data, np.uint8)
                scratch[len(data) : len(data) + 16] = 0
                memory.array(state.ENDS)[1 : 1 + len(ends)] = ends
                end = words.encode_chunks(memory.address, scratch.ctypes.data, len(ends), out.ctypes.data)
                arrays.append(out[: (end - out.ctypes.data) // 4].copy())
                written += len(arrays[-1])
            starts[number + 1] = written
        self._give_back(memory)
        return np.concatenate(arrays) if arrays else np.empty(0, np.uint32)

    def _lease(self) -> Memory:
        try:
            return self._idle.pop()
        except IndexError:
            return self._new_memory()

    def _give_back(self, memory: Memory) -> None:
        if memory.capacity > 64 * PIECE:
            memory.set_capacity(PIECE)
        self._idle.append(memory)

    def _new_memory(self) -> Memory:
        longest = max([LONGEST_KEPT, *(len(chunk) for chunk, _ in self._exceptions)])
        slots = max(FIRST_SLOTS, 1 << (4 * len(self._exceptions)).bit_length())
        memory = Memory(self._splitter, slots, longest)
        for field, function in _CALLED.items():
            memory.fields[field] = function.address
        _share(memory, self._tables)
        self._remember_exceptions(memory)
        return memory

    def _make_room(self, memory: Memory) -> None:
        if len(memory.array(state.TABLE)) < MOST_SLOTS:
            memory.grow(4)
        else:
            memory.forget()
            self._remember_exceptions(memory)

    def _remember_exceptions(self, memory: Memory) -> None:
        for chunk, number in self._exceptions:
            padded = np.frombuffer(chunk + bytes(16), np.uint8)
            if not words.remember(memory.address, padded.ctypes.data, len(chunk), number):
                memory.grow(4)
                words.remember(memory.address, padded.ctypes.data, len(chunk), number)


def _threads_for(size: int, threads: int | None) -> int:
    """How many of the threads asked for (None for one per core) so many bytes of text are worth."""
    return max(1, min(threads or os.cpu_count() or 1, size // PER_THREAD))


def _in_threads(work: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """The result of ``work`` for each item, by so many threads."""
    if threads == 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def _even_parts(sizes: np.ndarray, count: int) -> list[tuple[int, int]]:
    """First and last (exclusive) place of ``count`` parts of texts with about as many bytes each."""
    reach = np.cumsum(sizes)
    cuts = np.searchsorted(reach, reach[-1] * np.arange(1, count) / count)
    places = [0, *cuts.tolist(), len(sizes)]
    return list(pairwise(places))


def cut_in_python(splitter: Splitter, text: str, memory: Memory) -> Iterator[tuple[bytes, np.ndarray]]:
    """The chunks of a text, some thousand at a time: their bytes, and where each ends. They fit into the memory."""
    waiting: list[bytes] = []
    size = 0
    for chunk in splitter.split(text):
        data = chunk.encode()
        if not data:
            continue
        if waiting and size + len(data) > memory.capacity:
            yield b"".join(waiting), np.cumsum([len(one) for one in waiting], dtype=np.uint32)
            waiting, size = [], 0
        while len(data) > memory.capacity:
            memory.set_capacity(2 * memory.capacity)
        waiting.append(data)
        size += len(data)
    if waiting:
        yield b"".join(waiting), np.cumsum([len(one) for one in waiting], dtype=np.uint32)


# ---- the tables of merges

_SHARED = (state.BYTE_IDS, state.BYTE_PAIRS, state.PAIRS, state.PRODUCTS, state.SEEN)


def _share(memory: Memory, tables: Memory) -> None:
    for field in _SHARED:
        memory.hold(field, tables.array(field))
    memory.fields[[state.PAIRS_SHIFT, state.PRODUCTS]] = tables.fields[[state.PAIRS_SHIFT, state.PRODUCTS]]


def _tables(rules: Rules) -> tuple[Memory, list[tuple[bytes, int]]]:
    """The tables of merges, and the chunks that become a token which merging would not make of them."""
    if rules.by_rank:
        found = _recover(rules)
        if found is not None:
            return found[0], []
        merges = rules.all_cuts()
    else:
        merges = rules.listed
    tables, byte_of = _empty_tables(rules, len(merges))
    listed = np.array(merges, np.uint32).reshape(-1, 3)
    products = np.ascontiguousarray(listed[:, 2])
    # A merge's rank may be its product's id, if that is in the same order; where ids are ranks it has to be.
    by_product = rules.by_rank or bool((np.diff(products.astype(np.int64)) > 0).all())
    if not by_product:
        tables.hold(state.PRODUCTS, products)
    merge.add_pairs(tables.address, listed.ctypes.data, len(listed), byte_of.ctypes.data, by_product)
    return tables, _exceptions(rules, tables) if rules.whole_words else []


def _empty_tables(rules: Rules, merges: int) -> tuple[Memory, np.ndarray]:
    if max(len(rules.tokens), merges >> 4) > merge.MOST_IDS:
        raise GroundupError(
            f"a vocabulary of {len(rules.tokens)} tokens is too large: at most {merge.MOST_IDS} can be."
        )
    slots = 1 << max(4, (3 * merges).bit_length())  # at most a third full: almost always one look is enough
    tables = Memory(Splitter(""), 1, 0)
    tables.fields[state.MERGE] = merge.merge.address
    tables.hold(state.BYTE_IDS, np.array(rules.byte_ids, np.uint32))
    tables.hold(state.BYTE_PAIRS, np.full(1 << 16, merge.NEVER, np.uint32))
    tables.hold(state.PAIRS, np.full(slots + 8, -1, np.int64))
    tables.hold(state.SEEN, np.zeros(1 << (61 - int(merge.SEEN_SHIFT)), np.uint8))
    tables.hold(state.PRODUCTS, np.zeros(0, np.uint32))
    tables.fields[state.PRODUCTS] = 0  # 0 means that ranks are the products' ids
    tables.fields[state.PAIRS_SHIFT] = 65 - slots.bit_length()
    byte_of = np.full(len(rules.tokens), 256, np.uint32)
    byte_of[rules.byte_ids] = np.arange(256)
    return tables, byte_of


def _recover(rules: Rules) -> tuple[Memory, np.ndarray] | None:
    """The tables and the merges (left, right, product) of ids that are ranks; None when some are not learned."""
    tables, byte_of = _empty_tables(rules, len(rules.ordinary))
    sizes = np.fromiter(map(len, rules.tokens), np.int64, len(rules.tokens))
    longest = int(sizes.max())
    if longest > PIECE:
        tables.set_capacity(longest)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    data = np.frombuffer(b"".join(rules.tokens) + bytes(16), np.uint8)
    order = np.array(rules.ordinary, np.uint32)
    merges = np.empty((len(order), 3), np.uint32)
    found = merge.recover_pairs(
        tables.address,
        data.ctypes.data,
        starts.ctypes.data,
        len(order),
        order.ctypes.data,
        byte_of.ctypes.data,
        merges.ctypes.data,
    )
    return None if found < 0 else (tables, merges[:found])


def recover_merges(rules: Rules) -> np.ndarray | None:
    """The merges behind ids that are ranks, as rows of left, right, product; None when some were not learned."""
    found = _recover(rules)
    return None if found is None else found[1]


def _exceptions(rules: Rules, tables: Memory) -> list[tuple[bytes, int]]:
    found = []
    merged = tables.array(state.MERGED)
    for number in rules.ordinary:
        token = rules.tokens[number]
        if len(token) > tables.fields[state.CAPACITY]:
            tables.set_capacity(len(token))
            merged = tables.array(state.MERGED)
        padded = np.frombuffer(token + bytes(16), np.uint8)
        if merge.merge(tables.address, padded.ctypes.data, len(token)) != 1 or merged[1] != number:
            found.append((token, number))
    return found


# ---- counting


class ChunkCounter:
    """Counts the distinct chunks of texts.

    Args:
        splitter: the pattern that cuts text into chunks.
        threads: how many work at once.
    """

    def __init__(self, splitter: Splitter, threads: int | None = None) -> None:
        self._splitter = splitter
        self._memories = [self._new_memory() for _ in range(threads or os.cpu_count() or 1)]

    def _new_memory(self) -> Memory:
        memory = Memory(self._splitter, SLOTS_TO_COUNT, longest=1 << 62)
        memory.fields[state.NEXT_PIECE] = words.next_piece.address
        return memory

    def add(self, texts: list[str]) -> None:
        """Count the chunks of texts.

        Raises:
            UnicodeEncodeError: one holds a lone surrogate. Some of the others may have been counted.
        """
        if not texts:
            return
        if self._splitter.shape is None:
            for text in texts:
                for data, ends in cut_in_python(self._splitter, text, self._memories[0]):
                    self._count(self._memories[0], data, ends, None)
            return
        sources, sizes = locate(texts)
        threads = _threads_for(int(sizes.sum()), len(self._memories))
        parts = _even_parts(sizes, threads)

        def work(number: int) -> None:
            first, stop = parts[number]
            self._count_part(self._memories[number], sources[first:stop], sizes[first:stop])

        _in_threads(work, range(threads), threads)

    @staticmethod
    def _count_part(memory: Memory, sources: np.ndarray, sizes: np.ndarray) -> None:
        memory.begin()
        while status := words.count_texts(memory.address, sources.ctypes.data, sizes.ctypes.data, len(sizes)):
            if status == state.LONGER:
                memory.set_capacity(2 * memory.capacity)
            else:
                memory.grow(2)

    @staticmethod
    def _count(memory: Memory, data: bytes, ends: np.ndarray, weights: np.ndarray | None) -> None:
        """Count chunks that are cut already."""
        # Room in the table for every chunk, and in the arena for all of them with 8 bytes each.
        while memory.fields[state.USED] + len(ends) > len(memory.array(state.TABLE)) * 3 // 4 or (
            memory.fields[state.ARENA_USED] + 2 * len(data) > memory.fields[state.ARENA_SIZE]
        ):
            memory.grow(2)
        padded = np.frombuffer(data + bytes(16), np.uint8)
        kept = memory.fields[state.ENDS]
        memory.fields[state.ENDS] = ends.ctypes.data
        words.count_chunks(
            memory.address, padded.ctypes.data, len(ends), weights.ctypes.data if weights is not None else 0
        )
        memory.fields[state.ENDS] = kept

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The distinct chunks one after another (uint8), where each ends (int64), how often it occurred (int64)."""
        first, *others = self._memories
        while others:
            data, ends, counts = _listed(others.pop())
            step = 1 << 16
            for start in range(0, len(ends), step):
                stop = min(start + step, len(ends))
                begin = int(ends[start - 1]) if start else 0
                self._count(
                    first,
                    data[begin : int(ends[stop - 1])].tobytes(),
                    (ends[start:stop] - begin).astype(np.uint32),
                    counts[start:stop].copy(),
                )
        self._memories = [first]
        return _listed(first)


def _listed(memory: Memory) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    used = int(memory.fields[state.USED])
    chunks = np.empty(words.list_chunks(memory.address, 0, 0, 0), np.uint8)
    ends, counts = np.empty(used, np.int64), np.empty(used, np.int64)
    words.list_chunks(memory.address, chunks.ctypes.data, ends.ctypes.data, counts.ctypes.data)
    return chunks, ends, counts
