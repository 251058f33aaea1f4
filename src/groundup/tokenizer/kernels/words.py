"""Encoding and counting: text is cut, and every chunk is looked up in a table of chunks seen before.

Text repeats itself, so hardly any chunk has to be merged. The table's slots are of 32 bytes: 16 that tell the chunk,
16 that say what is known of it.

    a short chunk   its bytes, up to 15, and their number in the last byte
    a long chunk    a hash; then where in the arena its size (8 bytes) and its bytes lie, with the LONG bit
    when encoding   up to three ids and how many, 32 bits each; when there are more than three, the first 64 bits
                    tell where in the arena they lie
    when counting   how often the chunk occurred
"""

from __future__ import annotations

import numpy as np

from groundup.runtime.compiled_functions import call
from groundup.tokenizer.kernels.cut import LETTERS, LOWERS, OTHERS, cut, has
from groundup.tokenizer.kernels.machine import (
    ONE,
    ZERO,
    called,
    copy_bytes,
    field,
    give_item,
    holding_lock,
    inner,
    item_of,
    kernel,
    load8,
    load32,
    load64,
    new_list,
    prefetch,
    set_field,
    share_item,
    store32,
    store64,
    u64,
    utf8_of,
)
from groundup.tokenizer.kernels.merge import (
    LANE_BYTES,
    LANE_CHUNK,
    LANES,
    LIVE,
    MIX,
    OWNER,
    enter_lane,
    leave_lane,
    merge_in_lane,
    rank_in_lane,
)
from groundup.tokenizer.kernels.state import (
    ALL_AT_END,
    ARENA,
    ARENA_SIZE,
    ARENA_USED,
    BATCH,
    CAPACITY,
    CLAIMED,
    CLAIMED_LONG,
    CLAIMS,
    CLASSES,
    DIGITS,
    DONE,
    ENCODE_CHUNKS,
    ENDS,
    FINISHED,
    GROW,
    LANES_AT,
    LEARN_CHUNKS,
    LONGER,
    LONGEST,
    MAPS,
    MASKS,
    MERGE,
    MERGED,
    NEW,
    NEXT_PIECE,
    PAIRS,
    PAIRS_SHIFT,
    PATTERN,
    PRODUCTS,
    SCRATCH,
    SEEN,
    SIZE,
    SLOTS,
    SOURCE,
    SPARE,
    STRIDE,
    TABLE,
    TABLE_SHIFT,
    TEXT,
    USED,
    WRITTEN,
)

CHUNKS_AT_ONCE = 64
STRIDE_OF_SLOTS = 7_654_321  # odd, so that every slot's turn comes
SLOT, SHORT, LONG = 32, 15, u64(1 << 63)


@inner
def slot_number(low, high, shift):
    """The place in the table where the search for a key begins."""
    return ((low ^ (high << u64(29) | high >> u64(35))) * MIX) >> shift


@inner
def short_slot(table, shift, low, high):
    """The slot of a short chunk, or the empty one where it would go."""
    mask = (ONE << (u64(64) - shift)) - ONE
    slot = slot_number(low, high, shift)
    while True:
        address = table + np.int64(slot << u64(5))
        found = load64(address + 8)
        if (found == high and load64(address) == low) or found == ZERO:
            return address
        slot = (slot + ONE) & mask


@inner
def hash_bytes(text, size):
    """A hash of at least eight bytes; never zero, which is what an empty slot holds."""
    value = u64(size)
    for i in range(0, size - 7, 8):
        value = (value ^ load64(text + i)) * MIX
        value ^= value >> u64(29)
    value = (value ^ load64(text + size - 8)) * MIX
    return (value ^ value >> u64(32)) | ONE


@inner
def same_bytes(one, other, size):
    """Whether at least eight bytes are the same at two places."""
    for i in range(0, size - 7, 8):
        if load64(one + i) != load64(other + i):
            return False
    return load64(one + size - 8) == load64(other + size - 8)


@inner
def long_slot(table, shift, text, size, hashed, arena):
    """The slot of a long chunk, or the empty one where it would go."""
    mask = (ONE << (u64(64) - shift)) - ONE
    slot = slot_number(hashed, ZERO, shift)
    while True:
        address = table + np.int64(slot << u64(5))
        found = load64(address + 8)
        if found == ZERO:
            return address
        if found & LONG and load64(address) == hashed:
            kept = arena + np.int64(found ^ LONG)
            if np.int64(load64(kept)) == size and same_bytes(kept + 8, text, size):
                return address
        slot = (slot + ONE) & mask


@kernel
def move_slots(table, slots, new_table, shift):
    """Fill an empty table from a smaller one."""
    mask = (ONE << (u64(64) - shift)) - ONE
    for i in range(slots):
        address = table + SLOT * i
        low, high = load64(address), load64(address + 8)
        if high == ZERO:
            continue
        slot = slot_number(low, ZERO if high & LONG else high, shift)
        target = new_table + np.int64(slot << u64(5))
        while load64(target + 8) != ZERO:
            slot = (slot + ONE) & mask
            target = new_table + np.int64(slot << u64(5))
        copy_bytes(target, address, SLOT)


@inner
def keep(state, slot, low, high, text, size, more):
    """Write a chunk into an empty slot, if then there are still ``more`` bytes left in the arena.

    Returns:
        Whether there was room in the table and in the arena; if not, nothing is written.
    """
    slots = 1 << (64 - field(state, TABLE_SHIFT))
    used, arena_used = field(state, USED), field(state, ARENA_USED)
    needed = 8 + size if size > SHORT else 0
    if (
        used > slots - (slots >> 3)
        or arena_used + needed + more > field(state, ARENA_SIZE)
        or size > field(state, LONGEST)
    ):
        return False
    if size > SHORT:
        high = LONG | u64(arena_used)
        kept = field(state, ARENA) + arena_used
        store64(kept, u64(size))
        copy_bytes(kept + 8, text, size)
    store64(slot, low)
    store64(slot + 8, high)
    set_field(state, USED, used + 1)
    set_field(state, ARENA_USED, arena_used + needed)
    return True


@inner
def copy_ids(target, source, count):
    """Copy ids four at a time; up to 12 bytes behind the last one are read and overwritten."""
    for i in range(0, 4 * count, 16):
        low, high = load64(source + i), load64(source + i + 8)
        store64(target + i, low)
        store64(target + i + 8, high)


@inner
def tell_ids(state, slot, ids, count):
    """Write into a slot what its chunk's ids are. The arena has room for them."""
    if count <= 3:
        for i in range(count):
            store32(slot + 16 + 4 * i, load32(ids + 4 * i))
    elif slot == state + 8 * SPARE:
        store64(slot + 16, u64(ids - field(state, ARENA)))
    else:
        used = field(state, ARENA_USED)
        copy_ids(field(state, ARENA) + used, ids, count)
        store64(slot + 16, u64(used))
        set_field(state, ARENA_USED, used + 4 * count)
    store32(slot + 28, count)


@inner
def merge_claimed(state, claim, claims):
    """Merge the chunks of so many claims (slot, text, size), several at a time, and tell their slots."""
    pairs, shift, products = field(state, PAIRS), u64(field(state, PAIRS_SHIFT)), field(state, PRODUCTS)
    lanes, ids, seen = field(state, LANES_AT), field(state, MERGED), field(state, SEEN)
    stop = claim + 24 * claims
    busy = min(LANES, claims)
    for number in range(LANES):
        lane = lanes + LANE_BYTES * number
        set_field(lane, LIVE, 0)
        if number < busy:
            enter_lane(state, lane, field(claim, 1), field(claim, 2), field(claim, 0))
            claim += 24
    while busy > 0:
        for number in range(LANES):
            lane = lanes + LANE_BYTES * number
            while field(lane, LIVE) and not merge_in_lane(lane, pairs, shift, products, seen):
                tell_ids(state, field(lane, OWNER), ids, leave_lane(lane, ids))
                if claim < stop:
                    enter_lane(state, lane, field(claim, 1), field(claim, 2), field(claim, 0))
                    claim += 24
                else:
                    busy -= 1
        for number in range(LANES):
            lane = lanes + LANE_BYTES * number
            if field(lane, LIVE):
                rank_in_lane(lane, pairs, shift)


@inner
def find_slot(table, shift, arena, low, high, text, size):
    """The slot of a chunk of any length, or the empty one where it would go."""
    if high != ZERO:
        return short_slot(table, shift, low, high)
    return long_slot(table, shift, text, size, low, arena)


@inner
def key_of(masks, text, size):
    """The 16 bytes that tell a chunk: a short one's bytes and their number, a long one's hash and nothing."""
    if size > SHORT:
        return hash_bytes(text, size), ZERO
    mask = masks + 16 * size
    return load64(text) & load64(mask), load64(text + 8) & load64(mask + 8) | u64(size) << u64(56)


@inner
def emit(slot, arena, ids):
    """Write the ids that a slot tells; returns the address behind them."""
    count = load32(slot + 28)
    if count > 3:
        copy_ids(ids, arena + np.int64(load64(slot + 16)), count)
    else:
        store64(ids, load64(slot + 16))
        store64(ids + 8, load64(slot + 24))
    return ids + 4 * count


@called
def learn_chunks(state, text, chunks, ids):
    """Finish a piece of text that holds new chunks: merge the claimed ones, then write all ids from NEW on.

    Args:
        state: address of the array of fields, as :func:`encode_chunks` left it.
        text, chunks: as there.
        ids: where the ids of the first new chunk go.

    Returns:
        The address after the last id.
    """
    chunk, out = field(state, NEW), ids
    table, shift, arena = field(state, TABLE), u64(field(state, TABLE_SHIFT)), field(state, ARENA)
    ends, slots, masks = field(state, ENDS), field(state, SLOTS), field(state, MASKS)
    for number in range(2):
        claims = field(state, CLAIMED + number)
        merge_claimed(state, field(state, CLAIMS) + (24 * (field(state, CAPACITY) - claims) if number else 0), claims)
    start = load32(ends + 4 * chunk - 4) if chunk else 0
    for i in range(chunk, chunks):
        end, slot = load32(ends + 4 * i), field(slots, i)
        if slot == 0:  # a long chunk, or one for which there was no room
            here, size = text + start, end - start
            low, high = key_of(masks, here, size)
            slot = find_slot(table, shift, arena, low, high, here, size)
            if load64(slot + 8) == ZERO:
                count = call(field(state, MERGE), state, here, size)
                if not keep(state, slot, low, high, here, size, 4 * count):
                    slot = state + 8 * SPARE
                tell_ids(state, slot, field(state, MERGED), count)
        out = emit(slot, arena, out)
        start = end
    return out


@called
def encode_chunks(state, text, chunks, ids):
    """Write the ids of chunks, 32 bits each.

    Looking a chunk up means waiting for memory, so many are looked up together: first every slot is found and
    asked for, then they are read one after another. From the first chunk on that is not there nothing is written: new
    chunks are claimed, to be merged together by :func:`learn_chunks`, for merging means waiting, too.

    Args:
        state: address of the array of fields.
        text: address of the chunks, which end where ``ENDS`` says, with 16 bytes after them.
        chunks: how many there are.
        ids: address for the ids; up to 12 bytes after the last one are overwritten.

    Returns:
        The address after the last id.
    """
    table, shift, arena = field(state, TABLE), u64(field(state, TABLE_SHIFT)), field(state, ARENA)
    ends, masks, batch = field(state, ENDS), field(state, MASKS), field(state, BATCH)
    slots, claim = field(state, SLOTS), field(state, CLAIMS)
    last = claim + 24 * field(state, CAPACITY)
    new, promised = -1, 0
    begin = 0
    for first in range(0, chunks, CHUNKS_AT_ONCE):
        stop = min(first + CHUNKS_AT_ONCE, chunks)
        start, note = begin, batch
        for chunk in range(first, stop):
            end = load32(ends + 4 * chunk)
            size, here = end - start, text + start
            start = end
            low, high = key_of(masks, here, size)
            slot = table + np.int64(slot_number(low, high, shift) << u64(5))
            prefetch(slot)
            store64(note, low)
            store64(note + 8, high)
            store64(note + 16, u64(slot))
            note += 24
        start, note = begin, batch
        if new < 0:
            for chunk in range(first, stop):
                low, high, slot = load64(note), load64(note + 8), field(note, 2)
                end = load32(ends + 4 * chunk)
                if load64(slot + 8) != high or load64(slot) != low:
                    slot = find_slot(table, shift, arena, low, high, text + start, end - start)
                    if load64(slot + 8) == ZERO:
                        new = first = chunk
                        break
                ids = emit(slot, arena, ids)
                start = end
                note += 24
        if new >= 0:
            for chunk in range(first, stop):
                low, high, slot = load64(note), load64(note + 8), field(note, 2)
                end = load32(ends + 4 * chunk)
                if load64(slot + 8) != high or load64(slot) != low:
                    slot = find_slot(table, shift, arena, low, high, text + start, end - start)
                if load64(slot + 8) == ZERO:
                    # What is claimed is told its ids later: the arena must have room for as many as there may be.
                    size = end - start
                    if size <= LANE_CHUNK and keep(state, slot, low, high, text + start, size, promised + 4 * size):
                        promised += 4 * size
                        if size <= SHORT:
                            place = claim
                            claim += 24
                        else:
                            last -= 24
                            place = last
                        set_field(place, 0, slot)
                        set_field(place, 1, text + start)
                        set_field(place, 2, size)
                    else:
                        slot = 0
                set_field(slots, chunk, slot)
                start = end
                note += 24
        begin = start
    if new < 0:
        return ids
    set_field(state, NEW, new)
    set_field(state, CLAIMED, (claim - field(state, CLAIMS)) // 24)
    set_field(state, CLAIMED_LONG, field(state, CAPACITY) - (last - field(state, CLAIMS)) // 24)
    return call(field(state, LEARN_CHUNKS), state, text, chunks, ids)


@inner
def last_seam(state, text, chunks):
    """How many chunks end at or before the last place where every pattern cuts, whatever follows.

    Such a place lies after a letter and before a space, a newline or a sign (but apostrophes and marks belong
    to words), or between a newline and a letter. 0 when there is none.
    """
    maps, stride, ends = field(state, MAPS), field(state, STRIDE), field(state, ENDS)
    for chunk in range(chunks - 2, -1, -1):
        end = load32(ends + 4 * chunk)
        byte = load8(text + end)
        if has(maps + stride * LETTERS, end - 1):
            if byte == 32 or byte == 10:
                return chunk + 1
            if byte != 39 and has(maps + stride * OTHERS, end) and not has(maps + stride * LOWERS, end):
                return chunk + 1
        elif load8(text + end - 1) == 10 and has(maps + stride * LETTERS, end):
            return chunk + 1
    return 0


@called
def next_piece(state, source, size):
    """Bring the next piece of a text into the scratch buffer and cut it.

    Returns:
        How many chunks the piece has; 0 when the scratch buffer is too small to tell.
    """
    scratch, part = field(state, SCRATCH), min(size, field(state, CAPACITY))
    if part < size:
        while load8(source + part) & 0xC0 == 0x80:  # half a character would be taken for another
            part -= 1
    copy_bytes(scratch, source, part)
    for i in range(8):
        store64(scratch + part + 8 * i, ZERO)
    chunks = cut(
        scratch,
        part,
        field(state, MAPS),
        field(state, STRIDE),
        field(state, CLASSES),
        field(state, PATTERN),
        field(state, DIGITS),
        field(state, ALL_AT_END),
        field(state, ENDS),
    )
    return chunks if part == size else last_seam(state, scratch, chunks)


@kernel
def encode_texts(state, sources, sizes, texts, starts, ids):
    """Encode texts one after another.

    Stops early when a buffer is too small; called again after that was seen to, it goes on where it stopped.

    Args:
        state: address of the array of fields; TEXT, DONE and WRITTEN are 0 at first.
        sources, sizes: addresses of the texts' addresses and of their bytes, 64 bits each.
        texts: how many there are.
        starts: address for where each text's ids end, 64 bits each.
        ids: address for the ids, with room for as many as there are bytes in the texts, and 4 more.
    """
    out = ids + 4 * field(state, WRITTEN)
    scratch, ends = field(state, SCRATCH), field(state, ENDS)
    slots, arena_size = 1 << (64 - field(state, TABLE_SHIFT)), field(state, ARENA_SIZE)
    text, done = field(state, TEXT), field(state, DONE)
    status = FINISHED
    while text < texts:
        source, size = np.int64(load64(sources + 8 * text)), np.int64(load64(sizes + 8 * text))
        while done < size:
            if 2 * field(state, USED) > slots or 2 * field(state, ARENA_USED) > arena_size:
                status = GROW
                break
            chunks = call(field(state, NEXT_PIECE), state, source + done, size - done)
            if chunks == 0:
                status = LONGER
                break
            out = call(field(state, ENCODE_CHUNKS), state, scratch, chunks, out)
            done += load32(ends + 4 * (chunks - 1))
        if status != FINISHED:
            break
        store64(starts + 8 * text, u64((out - ids) >> 2))
        text, done = text + 1, 0
    set_field(state, TEXT, text)
    set_field(state, DONE, done)
    set_field(state, WRITTEN, (out - ids) >> 2)
    return status


@holding_lock
def find_text(state, text):
    """Make the Python string at the address ``text`` the only text to encode; returns its bytes, -1 if it has none."""
    source = utf8_of(text, state + 8 * SIZE)
    set_field(state, SOURCE, source)
    set_field(state, TEXT, 0)
    set_field(state, DONE, 0)
    set_field(state, WRITTEN, 0)
    return field(state, SIZE) if source else -1


# ---- counting chunks, for training


@kernel
def count_chunks(state, text, chunks, weights):
    """Add to the count of each chunk.

    Args:
        state, text, chunks: as in :func:`encode_chunks`; table and arena have room for all of them.
        weights: address of what to add for each chunk, 64 bits each; 0 adds one.
    """
    table, shift, arena = field(state, TABLE), u64(field(state, TABLE_SHIFT)), field(state, ARENA)
    ends, masks = field(state, ENDS), field(state, MASKS)
    start = 0
    for chunk in range(chunks):
        end = load32(ends + 4 * chunk)
        size, here = end - start, text + start
        start = end
        low, high = key_of(masks, here, size)
        slot = find_slot(table, shift, arena, low, high, here, size)
        if load64(slot + 8) == ZERO:
            keep(state, slot, low, high, here, size, 0)
        weight = load64(weights + 8 * chunk) if weights else ONE
        store64(slot + 16, load64(slot + 16) + weight)


@kernel
def count_texts(state, sources, sizes, texts):
    """Count the chunks of texts; arguments and early stops as in :func:`encode_texts`."""
    scratch, ends = field(state, SCRATCH), field(state, ENDS)
    slots, arena_size, most = 1 << (64 - field(state, TABLE_SHIFT)), field(state, ARENA_SIZE), field(state, CAPACITY)
    text, done = field(state, TEXT), field(state, DONE)
    status = FINISHED
    while text < texts:
        source, size = np.int64(load64(sources + 8 * text)), np.int64(load64(sizes + 8 * text))
        while done < size:
            if field(state, USED) + most > slots - (slots >> 3) or field(state, ARENA_USED) + 2 * most > arena_size:
                status = GROW
                break
            chunks = call(field(state, NEXT_PIECE), state, source + done, size - done)
            if chunks == 0:
                status = LONGER
                break
            count_chunks(state, scratch, chunks, 0)
            done += load32(ends + 4 * (chunks - 1))
        if status != FINISHED:
            break
        text, done = text + 1, 0
    set_field(state, TEXT, text)
    set_field(state, DONE, done)
    return status


@kernel
def list_chunks(state, chunks, ends, counts):
    """Write all counted chunks one after another, where each ends and how often it occurred, 64 bits each.

    Returns:
        How many bytes the chunks have. Where the addresses are 0, nothing is written.
    """
    table, slots, arena = field(state, TABLE), 1 << (64 - field(state, TABLE_SHIFT)), field(state, ARENA)
    size = number = 0
    place = 0
    for _ in range(slots):
        # Not in the table's order: chunks that came to another table sorted by hash would crowd its beginning.
        place = (place + STRIDE_OF_SLOTS) & (slots - 1)
        slot = table + SLOT * place
        high = load64(slot + 8)
        if high == ZERO:
            continue
        if high & LONG:
            source = arena + np.int64(high ^ LONG)
            length = np.int64(load64(source))
            source += 8
        else:
            source, length = slot, np.int64(high >> u64(56))
        if chunks:
            copy_bytes(chunks + size, source, length)
            store64(ends + 8 * number, u64(size + length))
            store64(counts + 8 * number, load64(slot + 16))
        size += length
        number += 1
    return size


@kernel
def remember(state, text, size, token):
    """Make a chunk this token whatever the merges say. Returns whether there was room for it."""
    masks = field(state, MASKS)
    table, shift = field(state, TABLE), u64(field(state, TABLE_SHIFT))
    low, high = key_of(masks, text, size)
    slot = find_slot(table, shift, field(state, ARENA), low, high, text, size)
    if not keep(state, slot, low, high, text, size, 0):
        return False
    store32(slot + 16, token)
    store32(slot + 28, 1)
    return True


@holding_lock
def find_texts(texts, count, sources, sizes):
    """Where the strings of a list lie in memory.

    Args:
        texts: address of the list.
        count: its length.
        sources, sizes: addresses for each string's address and bytes, 64 bits each.

    Returns:
        How many were found: fewer than ``count`` when the next one is no string, or not one of UTF-8.
    """
    for i in range(count):
        address = utf8_of(item_of(texts, i), sizes + 8 * i)
        if address == 0:
            return i
        store64(sources + 8 * i, u64(address))
    return count


@holding_lock
def list_ids(ids, starts, texts, numbers, lists, first):
    """Make a Python list of each text's ids.

    Args:
        ids, starts: addresses of all ids, 32 bits each, and of where each text's ids begin and the last one's end, 64
            bits each.
        texts: how many there are.
        numbers: address of the addresses of Python's integers from 0 on, which all lists share.
        lists, first: address of a list, and the place in it where the new lists begin to replace its items.

    Returns:
        How many lists were made: fewer than ``texts`` when there is no memory for the next one.
    """
    for text in range(texts):
        begin = np.int64(load64(starts + 8 * text))
        size = np.int64(load64(starts + 8 * text + 8)) - begin
        made = new_list(size)
        if made == 0:
            return text
        for i in range(size):
            share_item(made, i, field(numbers, load32(ids + 4 * (begin + i))))
        give_item(lists, first + text, made)
    return texts
