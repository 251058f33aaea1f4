"""Merging one chunk, byte by byte: bpe_reference.encode, compiled.

The table of merges is a hash table from a pair of ids to the merge's rank, both in 64 bits. Most pairs are in no merge,
and that is mostly known without it: each merge has set one bit, by its pair's hash, in a table of bits. Pairs of bytes,
where every chunk begins, have a table of their own with a place for each. What a merge makes is told by another table,
unless its rank is its product's id.
"""

from __future__ import annotations

import numpy as np

from groundup.runtime.compiled_functions import call
from groundup.tokenizer.kernels.machine import (
    ALL,
    ONE,
    ZERO,
    called,
    field,
    fill_16,
    inner,
    kernel,
    load8,
    load32,
    load64,
    look_in_4,
    lowest_of_16,
    prefetch,
    set_field,
    store8,
    store32,
    store64,
    u64,
    zeros_above,
    zeros_before,
)
from groundup.tokenizer.kernels.state import (
    BYTE_IDS,
    BYTE_PAIRS,
    MERGE,
    MERGED,
    PAIRS,
    PAIRS_SHIFT,
    PRODUCTS,
    SEEN,
    WORK,
)

ID_BITS, RANK_BITS = 20, 24  # of two ids and a rank in one number
MOST_IDS, NEVER = (1 << ID_BITS) - 1, (1 << RANK_BITS) - 1  # NEVER is the rank of a pair that is no merge
NO_ID = MOST_IDS  # the id of what stands before and behind a chunk: it has no merges
SEEN_SHIFT = u64(64 - 21)  # 2**21 bits, 256 kB, stay in the second-level cache
MIX = u64(0x9E37_79B9_7F4A_7C15)  # 2**64 divided by the golden ratio: multiplying spreads bits upwards


@inner
def find_pair(pairs, shift, pair):
    """The slot of a pair of ids in the table of merges, or the empty one where it would go."""
    mask = (ONE << (u64(64) - shift)) - ONE
    slot = (pair * MIX) >> shift
    while True:
        address = pairs + np.int64(slot << u64(3))
        found = load64(address)
        if found >> u64(RANK_BITS) == pair or found == ALL:
            return address
        slot = (slot + ONE) & mask


@inner
def rank_at(pairs, shift, slot, pair):
    """The rank of merging a pair (left << ID_BITS | right), searched from the address of a slot on, or NEVER."""
    found = look_in_4(slot, pair, RANK_BITS)
    while found > NEVER:
        slot = pairs + ((slot - pairs + 32) & ((8 << (64 - np.int64(shift))) - 1))
        found = look_in_4(slot, pair, RANK_BITS)
    return found


@inner
def rank_of(pairs, shift, pair):
    """The rank of merging a pair, or NEVER."""
    return rank_at(pairs, shift, pairs + 8 * np.int64((pair * MIX) >> shift), pair)


@inner
def product_of(products, rank):
    """The id of the token that a merge makes."""
    return load32(products + 4 * rank) if products else rank


# ---- several short chunks at once

# Merging is a chain of steps, and each of them waits for memory: the table of merges is large, and read here and there.
# So chunks are merged side by side, each in a lane of its own, and every lane asks for what it needs before the first
# one reads what it asked for. In a lane a token stays where its first byte was; a bit in LIVE says where tokens are.
# Each has the rank of the pair that it makes with the next one, and the lowest of all ranks is found at once.

LANES, LANE_BYTES, LANE_CHUNK = 8, 704, 63  # a chunk in a lane has at most 63 bytes
LIVE, LENGTH, OWNER, TAKEN, HERE, FRONT, PAIR_HERE, PAIR_FRONT, SLOT_HERE, SLOT_FRONT = range(10)  # fields of a lane
RANKS, IDS_IN_LANE = 128, 388  # where they lie in a lane; NO_ID stands before and behind the ids


@inner
def enter_lane(state, lane, text, size, owner):
    """Write a chunk into a lane as single bytes; ``owner`` is a number to know it by."""
    byte_ids, byte_pairs = field(state, BYTE_IDS), field(state, BYTE_PAIRS)
    ids, ranks = lane + IDS_IN_LANE, lane + RANKS
    for place in range(0, size, 16):
        fill_16(ranks + 4 * place, NEVER)
    before = load8(text)
    store32(ids - 4, NO_ID)
    store32(ids, load32(byte_ids + 4 * before))
    for i in range(1, size):
        byte = load8(text + i)
        store32(ids + 4 * i, load32(byte_ids + 4 * byte))
        store32(ranks + 4 * (i - 1), load32(byte_pairs + 4 * (before << 8 | byte)))
        before = byte
    store32(ids + 4 * size, NO_ID)
    set_field(lane, LIVE, (1 << size) - 1)
    set_field(lane, LENGTH, size)
    set_field(lane, OWNER, owner)


@inner
def slot_of(pairs, shift, seen, pair):
    """The address at which to search for a pair: behind the table, where nothing is, when it is surely no merge."""
    mixed = pair * MIX
    bit = np.int64(mixed >> SEEN_SHIFT)
    slot, nowhere = 8 * np.int64(mixed >> shift), (8 << (64 - np.int64(shift))) + 32
    return pairs + (slot if load8(seen + (bit >> 3)) >> (bit & 7) & 1 else nowhere)


@inner
def merge_in_lane(lane, pairs, shift, products, seen):
    """Merge the pair with the lowest rank, and ask for the ranks of the two new pairs.

    Returns:
        Whether there was a pair to merge.
    """
    ids, size = lane + IDS_IN_LANE, field(lane, LENGTH)
    lowest = lowest_of_16(lane + RANKS)
    for place in range(16, size, 16):
        lowest = min(lowest, lowest_of_16(lane + RANKS + 4 * place) | place)
    rank, here = lowest >> 8, lowest & 0xFF
    if rank == NEVER:
        return False
    live = load64(lane + 8 * LIVE)
    product = product_of(products, rank)
    taken = here + 1 + zeros_before(live >> u64(here + 1))
    live &= ~(ONE << u64(taken))
    # Where nothing stands before or behind, these are the places that hold NO_ID: no branch has to guess.
    after = min(here + 1 + zeros_before(live >> u64(here + 1)), size)
    front = 63 - zeros_above(live & ((ONE << u64(here)) - ONE))
    store32(ids + 4 * here, product)
    pair_here = u64(product << ID_BITS | load32(ids + 4 * after))
    pair_front = u64(load32(ids + 4 * front) << ID_BITS | product)
    slot_here = slot_of(pairs, shift, seen, pair_here)
    slot_front = slot_of(pairs, shift, seen, pair_front)
    prefetch(slot_here)
    prefetch(slot_front)
    set_field(lane, SLOT_HERE, slot_here)
    set_field(lane, SLOT_FRONT, slot_front)
    store64(lane + 8 * LIVE, live)
    store64(lane + 8 * PAIR_HERE, pair_here)
    store64(lane + 8 * PAIR_FRONT, pair_front)
    set_field(lane, TAKEN, taken)
    set_field(lane, HERE, here)
    set_field(lane, FRONT, front)
    return True


@inner
def rank_in_lane(lane, pairs, shift):
    """Write down the ranks that :func:`merge_in_lane` asked for."""
    ranks = lane + RANKS
    here = rank_at(pairs, shift, field(lane, SLOT_HERE), load64(lane + 8 * PAIR_HERE))
    front = rank_at(pairs, shift, field(lane, SLOT_FRONT), load64(lane + 8 * PAIR_FRONT))
    store32(ranks + 4 * field(lane, TAKEN), NEVER)
    store32(ranks + 4 * field(lane, HERE), here)
    store32(ranks + 4 * field(lane, FRONT), front)


@inner
def leave_lane(lane, ids):
    """Write the ids of a chunk that is merged to ``ids``; returns how many there are. The lane is free then."""
    live, count = load64(lane + 8 * LIVE), 0
    while live != ZERO:
        store32(ids + 4 * count, load32(lane + IDS_IN_LANE + 4 * zeros_before(live)))
        live &= live - ONE
        count += 1
    set_field(lane, LIVE, 0)
    return count


# ---- one chunk of any length


@inner
def sift_down(heap, size, place, entry):
    """Put an entry into a binary heap of 64-bit numbers at ``place``, or below."""
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        low = load64(heap + 8 * child)
        if child + 1 < size:
            other = load64(heap + 8 * (child + 1))
            if other < low:
                low, child = other, child + 1
        if low >= entry:
            break
        store64(heap + 8 * place, low)
        place = child
    store64(heap + 8 * place, entry)


@inner
def sift_up(heap, place, entry):
    """Put an entry into the heap at ``place``, or above."""
    while place > 0:
        parent = (place - 1) >> 1
        above = load64(heap + 8 * parent)
        if above <= entry:
            break
        store64(heap + 8 * place, above)
        place = parent
    store64(heap + 8 * place, entry)


@called
def merge(state, text, size):
    """Merge a chunk as in bpe_reference.encode: the lowest rank first, leftmost first.

    In n log n steps: a linked list of tokens, and a heap of the merges that fit. A heap entry is
    ``rank << 32 | place``. The rank is looked up again when the entry comes out, which tells whether the entry is
    outdated.

    Args:
        state: address of the array of fields.
        text, size: the chunk. WORK has room for 32 * size bytes: 8 for the list's links, 24 for at most three heap
            entries per byte.

    Returns:
        How many ids lie at MERGED.
    """
    byte_ids, byte_pairs = field(state, BYTE_IDS), field(state, BYTE_PAIRS)
    pairs, shift, products = field(state, PAIRS), u64(field(state, PAIRS_SHIFT)), field(state, PRODUCTS)
    ids, work = field(state, MERGED), field(state, WORK)
    none = np.int64(0xFFFF_FFFF)
    following, preceding, heap = work, work + 4 * size, work + 8 * size
    waiting = 0
    for i in range(size):
        store32(ids + 4 * i, load32(byte_ids + 4 * load8(text + i)))
        store32(following + 4 * i, i + 1)
        store32(preceding + 4 * i, i - 1)
        if i + 1 < size:
            rank = load32(byte_pairs + 4 * (load8(text + i) << 8 | load8(text + i + 1)))
            if rank != NEVER:
                store64(heap + 8 * waiting, u64(rank << 32 | i))
                waiting += 1
    for i in range((waiting >> 1) - 1, -1, -1):
        sift_down(heap, waiting, i, load64(heap + 8 * i))
    while waiting > 0:
        entry = load64(heap)
        waiting -= 1
        if waiting > 0:
            sift_down(heap, waiting, 0, load64(heap + 8 * waiting))
        place, rank = np.int64(entry & u64(0xFFFF_FFFF)), np.int64(entry >> u64(32))
        after = load32(following + 4 * place)
        left = load32(ids + 4 * place)
        if after >= size or left == none:
            continue
        if rank_of(pairs, shift, u64(left << ID_BITS | load32(ids + 4 * after))) != rank:
            continue
        product = product_of(products, rank)
        store32(ids + 4 * place, product)
        store32(ids + 4 * after, none)
        after = load32(following + 4 * after)
        store32(following + 4 * place, after)
        if after < size:
            store32(preceding + 4 * after, place)
            rank = rank_of(pairs, shift, u64(product << ID_BITS | load32(ids + 4 * after)))
            if rank != NEVER:
                sift_up(heap, waiting, u64(rank << 32 | place))
                waiting += 1
        if place > 0:
            before = load32(preceding + 4 * place)
            rank = rank_of(pairs, shift, u64(load32(ids + 4 * before) << ID_BITS | product))
            if rank != NEVER:
                sift_up(heap, waiting, u64(rank << 32 | before))
                waiting += 1
    count = 0
    place = 0
    while place < size:
        store32(ids + 4 * count, load32(ids + 4 * place))
        count += 1
        place = load32(following + 4 * place)
    return count


# ---- the tables, made once


@inner
def add_pair(state, left, right, rank, byte_of):
    """Write a merge into the tables, unless the pair is there already."""
    pair = u64(left << ID_BITS | right)
    slot = find_pair(field(state, PAIRS), u64(field(state, PAIRS_SHIFT)), pair)
    if load64(slot) != ALL:
        return
    value = pair << u64(RANK_BITS) | u64(rank)
    store64(slot, value)
    bit = np.int64((pair * MIX) >> SEEN_SHIFT)
    byte = field(state, SEEN) + (bit >> 3)
    store8(byte, load8(byte) | 1 << (bit & 7))
    place = (slot - field(state, PAIRS)) >> 3
    if place < 3:  # once more behind the end, where four slots can be read at once
        store64(slot + (8 << (64 - field(state, PAIRS_SHIFT))), value)
    first, second = load32(byte_of + 4 * left), load32(byte_of + 4 * right)
    if first < 256 and second < 256:
        store32(field(state, BYTE_PAIRS) + 4 * (first << 8 | second), rank)


@kernel
def add_pairs(state, merges, count, byte_of, by_product):
    """Write merges into the tables: left, right and product, 32 bits each.

    The rank of each is its place in the list or, ``by_product``, its product.
    """
    for i in range(count):
        here = merges + 12 * i
        add_pair(state, load32(here), load32(here + 4), load32(here + 8) if by_product else i, byte_of)


@kernel
def recover_pairs(state, tokens, starts, count, order, byte_of, merges):
    """Find and write the merge behind each token of a vocabulary whose ids are ranks.

    Args:
        tokens, starts: all tokens' bytes; where each begins and, after them, where the last one ends, 64 bits each.
        count, order: how many tokens text may become, and their ids ascending, 32 bits each.
        byte_of: per id, its byte value, 256 for tokens of more bytes; 32 bits each.
        merges: room for left, right and product of ``count`` merges, 32 bits each.

    Returns:
        How many merges there are, or -1 when a token is not made of two by the merges before it.
    """
    ids = field(state, MERGED)
    found = 0
    for i in range(count):
        token = load32(order + 4 * i)
        if load32(byte_of + 4 * token) < 256:
            continue
        begin = np.int64(load64(starts + 8 * token))
        if call(field(state, MERGE), state, tokens + begin, np.int64(load64(starts + 8 * token + 8)) - begin) != 2:
            return -1
        left, right = load32(ids), load32(ids + 4)
        add_pair(state, left, right, token, byte_of)
        store32(merges + 12 * found, left)
        store32(merges + 12 * found + 4, right)
        store32(merges + 12 * found + 8, token)
        found += 1
    return found
