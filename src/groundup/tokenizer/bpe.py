"""The algorithm of bpe_reference.py, fast enough for real text.

Three ideas make training fast:

    One flat list     All distinct chunks lie one after another in a list with one place per byte. A token
                      writes its id on its first and on its last place, so both neighbours of a token are
                      found by adding or subtracting a length, and a merge touches two places, however long
                      the chunk is.
    Pair counts       A merge changes only the counts of the pairs beside it. Every pair keeps the places
                      where it was ever seen; a place that has changed since is recognised and passed over.
    A lazy heap       The heap's counts are never corrected in place: an outdated entry goes back in when it
                      comes out.

Encoding is fast because text repeats itself: a chunk is merged once and then looked up.
"""

from __future__ import annotations

import heapq
from array import array
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from groundup.tokenizer.alphabet import ALPHABET_ORDER
from groundup.tokenizer.rules import Pair, Rules

EDGE = -1  # what stands between two chunks, and on places inside a token
NEVER = 1 << 62  # the rank of a pair that is no merge


@dataclass
class Corpus:
    """All distinct chunks, laid out for merging. A place is an index into ``ids`` and ``weights``."""

    ids: list[int]
    """Per place: the token that begins or ends here, or ``EDGE``. The first and the last place are edges."""
    weights: list[int]
    """Per place: how often its chunk occurs in the text."""
    lengths: list[int]
    """Per token id: its bytes, which is also the number of places it covers."""
    counts: dict[Pair, int]
    """Per pair of neighbours: how often it occurs now."""
    places: dict[Pair, list[int]]
    """Per pair: every place where its left token began when it was seen, ascending; some are outdated."""


def lay_out(chunk_counts: Mapping[bytes, int]) -> Corpus:
    """Write every chunk as bytes, numbered by ``ALPHABET_ORDER``, so that comparing ids settles ties."""
    chunks = [chunk for chunk in chunk_counts if len(chunk) > 1]
    sizes = np.array([len(chunk) for chunk in chunks], dtype=np.int64)
    id_of_byte = np.argsort(np.frombuffer(ALPHABET_ORDER, dtype=np.uint8))
    # Chunk number k begins after k chunks and k + 1 edges.
    place = np.arange(sizes.sum()) + np.repeat(np.arange(1, len(chunks) + 1), sizes)
    ids = np.full(sizes.sum() + len(chunks) + 1, EDGE, dtype=np.int64)
    ids[place] = id_of_byte[np.frombuffer(b"".join(chunks), dtype=np.uint8)]
    weights = np.zeros_like(ids)
    weights[place] = np.repeat(np.array([chunk_counts[chunk] for chunk in chunks], dtype=np.int64), sizes)

    begins = np.flatnonzero((ids[:-1] != EDGE) & (ids[1:] != EDGE))
    pair_codes = ids[begins] * 256 + ids[begins + 1]
    order = np.argsort(pair_codes, kind="stable")
    begins = begins[order]
    codes, firsts = np.unique(pair_codes[order], return_index=True)
    totals = np.add.reduceat(weights[begins], firsts) if len(codes) else codes
    pairs = [divmod(code, 256) for code in codes.tolist()]
    return Corpus(
        ids=ids.tolist(),
        weights=weights.tolist(),
        lengths=[1] * 256,
        counts=defaultdict(int, zip(pairs, totals.tolist(), strict=True)),
        places=defaultdict(list, zip(pairs, (part.tolist() for part in np.split(begins, firsts[1:])), strict=False)),
    )


def learn(
    chunk_counts: Mapping[bytes, int],
    vocab_size: int,
    min_frequency: int = 2,
    reserved: Collection[bytes] = (),
    on_merge: Callable[[int], object] | None = None,
) -> tuple[list[bytes], list[Pair]]:
    """Learn merges from chunks: :func:`groundup.tokenizer.bpe_reference.train`, fast.

    Args:
        chunk_counts: each distinct chunk, and how often it occurs.
        vocab_size: how many tokens to stop at, the 256 bytes included.
        min_frequency: stop when no pair occurs this often.
        reserved: bytes that must not become a token.
        on_merge: called now and then with the number of tokens so far.

    Returns:
        The tokens by id (id ``b < 256`` is byte ``b``), and the merges as pairs of ids, in the order they
        were learned.
    """
    corpus = lay_out(chunk_counts)
    tokens = [bytes([byte]) for byte in ALPHABET_ORDER]
    merges: list[Pair] = []
    heap = [(-count, pair) for pair, count in corpus.counts.items() if count >= min_frequency]
    heapq.heapify(heap)
    while heap and len(tokens) < vocab_size:
        negative_count, pair = heapq.heappop(heap)
        count = corpus.counts.get(pair, 0)
        if count != -negative_count:
            if count >= min_frequency:
                heapq.heappush(heap, (-count, pair))
            continue
        glued = tokens[pair[0]] + tokens[pair[1]]
        if glued in reserved:
            continue
        merges.append(pair)
        tokens.append(glued)
        corpus.lengths.append(len(glued))
        for new_pair in merge_everywhere(corpus, pair, len(tokens) - 1):
            if (count := corpus.counts[new_pair]) >= min_frequency:
                heapq.heappush(heap, (-count, new_pair))
        if on_merge is not None and len(merges) % 64 == 0:
            on_merge(len(tokens))
    return _in_byte_order(tokens, merges)


def merge_everywhere(corpus: Corpus, pair: Pair, merged: int) -> set[Pair]:
    """Glue every occurrence of ``pair`` into the new token ``merged``; returns the pairs it is now in."""
    ids, weights, lengths, counts, places = (
        corpus.ids,
        corpus.weights,
        corpus.lengths,
        corpus.counts,
        corpus.places,
    )
    left, right = pair
    left_length, both_lengths = lengths[left], lengths[left] + lengths[right]
    new_pairs: set[Pair] = set()
    for place in places.pop(pair):
        middle = place + left_length
        if ids[place] != left or ids[middle] != right:
            continue  # outdated: one of the two has been merged with another neighbour
        end = place + both_lengths
        weight = weights[place]
        before, after = ids[place - 1], ids[end]
        if before != EDGE:
            counts[before, left] -= weight
            new_pair = (before, merged)
            counts[new_pair] += weight
            places[new_pair].append(place - lengths[before])
            new_pairs.add(new_pair)
        if after != EDGE:
            counts[right, after] -= weight
            new_pair = (merged, after)
            counts[new_pair] += weight
            places[new_pair].append(place)
            new_pairs.add(new_pair)
        ids[middle - 1] = ids[middle] = EDGE
        ids[place] = ids[end - 1] = merged
    del counts[pair]
    return new_pairs


def _in_byte_order(tokens: list[bytes], merges: list[Pair]) -> tuple[list[bytes], list[Pair]]:
    """Renumber the 256 bytes from ``ALPHABET_ORDER`` to their values."""
    final_id = [*ALPHABET_ORDER, *range(256, len(tokens))]
    by_value = [bytes([byte]) for byte in range(256)] + tokens[256:]
    return by_value, [(final_id[left], final_id[right]) for left, right in merges]


LONG_CHUNK = 200  # bytes; from here on a heap beats looking through all pairs after each merge
CACHED_CHUNK = 64  # characters; longer chunks hardly ever come back
CACHED_CHUNKS = 1 << 18  # 35 MB of short words, 100 MB at worst


class WordCache(dict[str, bytes]):
    """From a chunk of text to its token ids, packed as 32-bit integers.

    Looking up a chunk that is not there encodes it.

    Args:
        rules: tokens and merges.
        capacity: how many chunks are remembered. A full cache forgets all and begins again: what is frequent
            is back at once.
    """

    def __init__(self, rules: Rules, capacity: int = CACHED_CHUNKS) -> None:
        super().__init__()
        self._byte_ids, self._capacity = rules.byte_ids, capacity
        self._whole = rules.ids if rules.whole_words else {}
        self._ranks: dict[Pair, int] = {}
        self._products: dict[int, int] = {}
        for place, (left, right, product) in enumerate(rules.recovered() if rules.by_rank else rules.listed):
            rank = product if rules.by_rank else place
            self._ranks.setdefault((left, right), rank)
            self._products[rank] = product

    def __missing__(self, chunk: str) -> bytes:
        data = chunk.encode()
        whole = self._whole.get(data)
        if whole is not None:
            ids = [whole]
        else:
            merge = merge_short if len(data) < LONG_CHUNK else merge_long
            ids = merge([self._byte_ids[byte] for byte in data], self._ranks, self._products)
        packed = array("I", ids).tobytes()
        if len(chunk) <= CACHED_CHUNK:
            if len(self) >= self._capacity:
                self.clear()
            self[chunk] = packed
        return packed


def merge_short(ids: list[int], ranks: Mapping[Pair, int], products: Mapping[int, int]) -> list[int]:
    """Merge one chunk: the lowest rank first, leftmost first. Quadratic in its length, with a small constant.

    Args:
        ids: the chunk as the ids of its bytes; changed in place.
        ranks: the position of each merge.
        products: the token each merge makes, by rank.

    Returns:
        The chunk's token ids.
    """
    rank_of = ranks.get
    # found[i] is the rank of the pair (ids[i], ids[i + 1]).
    found = [rank_of(pair, NEVER) for pair in pairwise(ids)]
    while found:
        lowest = min(found)
        if lowest == NEVER:
            break
        here = found.index(lowest)
        ids[here : here + 2] = [products[lowest]]
        del found[here]
        if here < len(found):
            found[here] = rank_of((ids[here], ids[here + 1]), NEVER)
        if here > 0:
            found[here - 1] = rank_of((ids[here - 1], ids[here]), NEVER)
    return ids


def merge_long(ids: list[int], ranks: Mapping[Pair, int], products: Mapping[int, int]) -> list[int]:
    """What :func:`merge_short` does, in n log n: a linked list of tokens, and a heap of the merges that fit.

    A heap entry is ``rank * n + place``: one integer that sorts by rank, then from left to right.
    """
    n = len(ids)
    following, preceding = list(range(1, n + 1)), list(range(-1, n - 1))
    heap = [ranks[pair] * n + place for place, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, place = divmod(heapq.heappop(heap), n)
        after = following[place]
        if after >= n or ranks.get((ids[place], ids[after])) != rank:
            continue  # outdated: a neighbour, or the token itself, has been merged since
        ids[place], ids[after] = products[rank], EDGE
        following[place] = after = following[after]
        if after < n:
            preceding[after] = place
        for start in (preceding[place], place):
            if start >= 0 and following[start] < n:
                new_rank = ranks.get((ids[start], ids[following[start]]))
                if new_rank is not None:
                    heapq.heappush(heap, new_rank * n + start)
    return [token for token in ids if token != EDGE]
