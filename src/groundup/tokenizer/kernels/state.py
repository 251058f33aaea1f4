"""What kernels are told: the places of an array of 64-bit integers, which compiled.py fills."""

from __future__ import annotations

(
    SCRATCH, CAPACITY,  # a copy of the piece of text at hand, and how long it may be
    MAPS, STRIDE, ENDS, CLASSES, PATTERN, DIGITS, ALL_AT_END,  # see cut.py
    BYTE_IDS, BYTE_PAIRS, PAIRS, PAIRS_SHIFT, PRODUCTS, SEEN, MERGED, WORK,  # see merge.py
    TABLE, TABLE_SHIFT, USED, ARENA, ARENA_SIZE, ARENA_USED, LONGEST,  # see words.py
    MASKS, BATCH, SLOTS, CLAIMS, LANES_AT,
    TEXT, DONE, WRITTEN,  # which text of a batch is at hand, how far it is done, how many ids were written
    NEW, CLAIMED, CLAIMED_LONG,  # the first new chunk of a piece, how many are claimed, and how many long ones
    SOURCE, SIZE, IDS,  # for one short text: where it is, its bytes, room for its ids
    MERGE, NEXT_PIECE, ENCODE_CHUNKS, LEARN_CHUNKS,  # addresses of functions
    SPARE,  # a slot of the word table, for a chunk that is not kept
) = range(43)  # fmt: skip
FIELDS = SPARE + 4

FINISHED, GROW, LONGER = range(3)
"""How a kernel stopped: at the end; before a table that is too full; before a piece of text that is too long."""
