"""Merging one chunk, byte by byte: bpe_reference.encode, compiled.

The table of merges is a hash table from a pair of ids to the merge's rank, both in 64 bits. Pairs of bytes, where every
chunk begins, have a table of their own with a place for each. What a merge makes is told by a third table, unless
its rank is its product's id.
"""

from __future__ import annotations

import numpy as np

from groundup.tokenizer.kernels.machine import (
    ALL,
    ONE,
    ZERO,
    field,
    inner,
    kernel,
    load8,
    load32,
    load64,
    look_in_4,
    lowest_of_16,
    prefetch,
    put_in_16,
    set_field,
    store32,
    store64,
    u64,
    zeros_above,
    zeros_before,
)
from groundup.tokenizer.kernels.state import BYTE_IDS, BYTE_PAIRS, MERGED, PAIRS, PAIRS_SHIFT, PRODUCTS, WORK

ID_BITS, RANK_BITS = 20, 24  # of two ids and a rank in one number
MOST_IDS, NEVER = (1 << ID_BITS) - 1, (1 << RANK_BITS) - 1  # NEVER is the rank of a pair that is no merge
NO_ID = MOST_IDS  # the id of what stands before and behind a chunk: it has no merges
SHORT_CHUNK = 48  # bytes; from here on a heap beats looking through all pairs after each merge
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
def rank_of(pairs, shift, pair):
    """The rank of merging a pair (left << ID_BITS | right), or NEVER."""
    slot = np.int64((pair * MIX) >> shift)
    found = look_in_4(pairs + 8 * slot, pair, RANK_BITS)
    while found > NEVER:
        slot = (slot + 4) & ((1 << (64 - np.int64(shift))) - 1)
        found = look_in_4(pairs + 8 * slot, pair, RANK_BITS)
    return found


@inner
def product_of(products, rank):
    """The id of the token that a merge makes."""
    return load32(products + 4 * rank) if products else rank


# ---- several short chunks at once

# Merging is a chain of steps, and each of them waits for memory: the table of merges is large, and read here and there.
# So chunks are merged side by side, each in a lane of its own, and every lane asks for what it needs before the first
# one reads what it asked for. In a lane a token stays where its first byte was; a bit in LIVE says where tokens are.
# Each has the rank of the pair that it makes with the next one, and the lowest of all ranks is found at once.

LANES, LANE_BYTES, LANE_CHUNK = 8, 256, 16  # a chunk in a lane has at most 16 bytes
LIVE, LENGTH, OWNER, TAKEN, HERE, FRONT, PAIR_HERE, PAIR_FRONT = range(8)  # fields of a lane
RANKS, IDS_IN_LANE = 64, 132  # where they lie in a lane; NO_ID stands before and behind the ids


@inner
def enter_lane(state, lane, text, size, owner):
    """Write a chunk into a lane as single bytes; ``owner`` is a number to know it by."""
    byte_ids, byte_pairs = field(state, BYTE_IDS), field(state, BYTE_PAIRS)
    ids, ranks = lane + IDS_IN_LANE, lane + RANKS
    before = load8(text)
    store32(ids - 4, NO_ID)
    store32(ids, load32(byte_ids + 4 * before))
    for i in range(1, size):
        byte = load8(text + i)
        store32(ids + 4 * i, load32(byte_ids + 4 * byte))
        store32(ranks + 4 * (i - 1), load32(byte_pairs + 4 * (before << 8 | byte)))
        before = byte
    store32(ids + 4 * size, NO_ID)
    for i in range(size - 1, LANE_CHUNK):
        store32(ranks + 4 * i, NEVER)
    set_field(lane, LIVE, (1 << size) - 1)
    set_field(lane, LENGTH, size)
    set_field(lane, OWNER, owner)


@inner
def merge_in_lane(lane, pairs, shift, products):
    """Merge the pair with the lowest rank, and ask for the ranks of the two new pairs.

    Returns:
        Whether there was a pair to merge.
    """
    ids = lane + IDS_IN_LANE
    lowest = lowest_of_16(lane + RANKS)
    rank, here = lowest >> 8, lowest & 0xFF
    if rank == NEVER:
        return False
    live = load64(lane + 8 * LIVE)
    product = product_of(products, rank)
    taken = here + 1 + zeros_before(live >> u64(here + 1))
    live &= ~(ONE << u64(taken))
    # Where nothing stands before or behind, these are the places that hold NO_ID: no branch has to guess.
    after = min(here + 1 + zeros_before(live >> u64(here + 1)), field(lane, LENGTH))
    front = 63 - zeros_above(live & ((ONE << u64(here)) - ONE))
    store32(ids + 4 * here, product)
    pair_here = u64(product << ID_BITS | load32(ids + 4 * after))
    pair_front = u64(load32(ids + 4 * front) << ID_BITS | product)
    prefetch(pairs + 8 * np.int64((pair_here * MIX) >> shift))
    prefetch(pairs + 8 * np.int64((pair_front * MIX) >> shift))
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
    put_in_16(ranks, field(lane, TAKEN), NEVER)
    put_in_16(ranks, field(lane, HERE), rank_of(pairs, shift, load64(lane + 8 * PAIR_HERE)))
    put_in_16(ranks, field(lane, FRONT), rank_of(pairs, shift, load64(lane + 8 * PAIR_FRONT)))


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
def merge_short(text, size, byte_ids, byte_pairs, pairs, shift, products, ids, ranks):
    """Merge a chunk as in bpe_reference.encode: the lowest rank first, leftmost first.

    Quadratic in the chunk's length, which is small here.

    Args:
        text, size: the chunk.
        byte_ids: the id of each byte, 32 bits each.
        byte_pairs: the rank of each pair of bytes, 32 bits each.
        pairs, shift: the table of merges.
        products: the product of each rank, 32 bits each; 0 when it is the rank.
        ids: room for the result, ``size`` ids of 32 bits.
        ranks: room for as many ranks.

    Returns:
        How many ids there are.
    """
    before = load8(text)
    store32(ids, load32(byte_ids + 4 * before))
    for i in range(1, size):
        byte = load8(text + i)
        store32(ids + 4 * i, load32(byte_ids + 4 * byte))
        store32(ranks + 4 * (i - 1), load32(byte_pairs + 4 * (before << 8 | byte)))
        before = byte
    left = size - 1  # pairs
    while left > 0:
        lowest, here = NEVER, 0
        for i in range(left):
            rank = load32(ranks + 4 * i)
            if rank < lowest:
                lowest, here = rank, i
        if lowest == NEVER:
            break
        product = product_of(products, lowest)
        store32(ids + 4 * here, product)
        left -= 1
        for i in range(here, left):
            store32(ids + 4 * (i + 1), load32(ids + 4 * (i + 2)))
            store32(ranks + 4 * i, load32(ranks + 4 * (i + 1)))
        if here < left:
            store32(ranks + 4 * here, rank_of(pairs, shift, u64(product << ID_BITS | load32(ids + 4 * (here + 1)))))
        if here > 0:
            pair = u64(load32(ids + 4 * (here - 1)) << ID_BITS | product)
            store32(ranks + 4 * (here - 1), rank_of(pairs, shift, pair))
    return left + 1


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


@inner
def merge_long(text, size, byte_ids, byte_pairs, pairs, shift, products, ids, work):
    """What :func:`merge_short` does, in n log n: a linked list of tokens, and a heap of the merges that fit.

    ``work`` is room for 32 * size bytes: 8 for the list's links, 24 for at most three heap entries per byte.
    A heap entry is ``rank << 32 | place``. The rank is looked up again when the entry comes out, which tells
    whether the entry is outdated.
    """
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


@kernel
def merge(state, text, size):
    """Merge one chunk; returns how many ids lie at ``MERGED``."""
    byte_ids, byte_pairs = field(state, BYTE_IDS), field(state, BYTE_PAIRS)
    pairs, shift = field(state, PAIRS), u64(field(state, PAIRS_SHIFT))
    products, ids, work = field(state, PRODUCTS), field(state, MERGED), field(state, WORK)
    if size <= SHORT_CHUNK:
        return merge_short(text, size, byte_ids, byte_pairs, pairs, shift, products, ids, work)
    return merge_long(text, size, byte_ids, byte_pairs, pairs, shift, products, ids, work)


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
        if merge(state, tokens + begin, np.int64(load64(starts + 8 * token + 8)) - begin) != 2:
            return -1
        left, right = load32(ids), load32(ids + 4)
        add_pair(state, left, right, token, byte_of)
        store32(merges + 12 * found, left)
        store32(merges + 12 * found + 4, right)
        store32(merges + 12 * found + 8, token)
        found += 1
    return found
