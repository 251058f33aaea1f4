"""Learning merges as fast as the machine can: bpe_reference.py compiled by Numba.

Read bpe_reference.py first. This file learns the very same merges without ever counting the pairs of the whole
text again. One observation carries it:

    All occurrences of a pair come into being in one moment, when the younger of its two tokens is made. From
    then on they can only become fewer.

So a list of a pair's places that is written in that moment never lacks one, and the count that belongs to it
may have become too high since, but never too low. The pair with the highest count is taken from a queue and its
list is looked through. If it still has that count, no other pair can have more, and it is merged. If not, it
goes back into the queue with the count it really has. A table that finds a pair's count when a merge next to it
takes some away, the usual way, is not needed at all.

How the data lies:

    Text     All distinct chunks, one after another in one array, a place per byte. A token writes its id on its
             first and on its last place, so both neighbours of a token are found by adding or subtracting a
             length, and a merge writes on four places at most, however long the tokens are.
    Weights  How often a chunk occurs. Chunks lie sorted by that, so one weight serves a whole block of places.
    Lists    A list holds the distance from each place to the next. Most fit in 16 bits, so that the lists take
             half the memory of the places themselves. New lists are added at the end; when the array is full, the
             lists that still matter are pushed together.
    Queue    Most pairs are rare and never merged. Only those above a floor are in the queue, which is lowered
             when the queue is empty.

Ids in here begin at 1, the bytes first, in the order of ``ALPHABET_ORDER``: 0 is left for the edges of chunks,
and comparing ids settles ties as the reference does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np

from groundup.tokenizer.alphabet import ALPHABET_ORDER
from groundup.tokenizer.kernels.machine import inner, kernel

EDGE = 0  # what stands between two chunks, and on the places inside a token
BYTE_IDS = 257  # the edge and the 256 bytes
BLOCK_BITS = 5  # 32 places share a weight; smaller blocks cost memory, larger ones leave gaps between weights
SLICE = 10_000_000  # places walked, about a fifth of a second, before Python is asked
LEAST_PAIRS = 1 << 16  # how many the table of pairs holds at first, at least
GAP_BITS = 15  # of a distance in each number of a list
TOP_BIT = 1 << GAP_BITS  # set where the distance goes on in the next number
UNLIMITED = 1 << 62

# Why a slice of learning ended.
DONE, PAUSE, FULL, CHECK = range(4)

PAIR = np.dtype(
    [
        ("count", np.int64),  # how often it occurs, or did when last counted; 0 once it is merged
        ("start", np.int64),  # its list is places[start:stop]
        ("stop", np.int64),
        ("left", np.int32),
        ("right", np.int32),
    ]
)
NEIGHBOUR = np.dtype(
    [
        ("count", np.int64),  # how often the token stands beside the new one
        ("list_size", np.int64),  # numbers that the list of places will take
        ("last", np.int64),  # the place counted or written last
        ("cursor", np.int64),  # where in ``places`` the next distance goes; -1 when the pair is too rare to list
    ]
)
USED = np.dtype(
    [
        ("tokens", np.int64),  # the 256 bytes included
        ("pairs", np.int64),
        ("places", np.int64),
        ("queue", np.int64),
        ("floor", np.int64),  # all pairs with this count or more, and only they, are in the queue
    ]
)


class Corpus(NamedTuple):
    """The arrays that learning works on. A place is an index into ``ids``."""

    ids: np.ndarray
    """Per place: the id of the token that begins or ends here, or ``EDGE``."""
    weights: np.ndarray
    """Per block of places: how often its chunks occur in the text."""
    lengths: np.ndarray
    """Per token: its bytes, which is also the number of places it covers."""
    signatures: np.ndarray
    """Per token: the sum of a number for each of its bytes. Equal bytes have equal sums."""
    pairs: np.ndarray
    """Every pair that occurs often enough, as ``PAIR``, oldest first, so that their lists lie in order."""
    places: np.ndarray
    """The lists: for each pair the places where its left token begins, in ascending order, as distances."""
    queue: np.ndarray
    """A binary heap of indices into ``pairs``, the one to merge next at the top."""
    neighbours: np.ndarray
    """Per token: what is found out about it while the pairs of a new token are made, as ``NEIGHBOUR``."""
    beside: np.ndarray
    """The tokens that stand beside the new one, each once."""
    merges: np.ndarray
    """Per merge: its left and its right token."""
    used: np.ndarray
    """How much of the other arrays is in use: one ``USED``."""


def learn(
    chunks: np.ndarray,
    ends: np.ndarray,
    counts: np.ndarray,
    vocab_size: int,
    min_frequency: int = 2,
    reserved: Collection[bytes] = (),
    on_merge: Callable[[int], object] | None = None,
) -> tuple[np.ndarray, list[bytes]]:
    """Learn merges from chunks: :func:`groundup.tokenizer.bpe_reference.train`, compiled.

    Args:
        chunks: the bytes of all distinct chunks, one after another, uint8.
        ends: where each chunk ends in ``chunks``, int64.
        counts: how often each chunk occurs, int64.
        vocab_size: how many tokens to stop at, the 256 bytes included.
        min_frequency: stop when no pair occurs this often; at least 1.
        reserved: bytes that must not become a token.
        on_merge: called several times a second with the number of tokens so far. What it raises ends the
            learning.

    Returns:
        merges: int32 [merges, 2], pairs of ids in the order they were learned (id ``b < 256`` is byte ``b``).
        tokens: the bytes of each token by id.
    """
    corpus = _lay_out(chunks, ends, counts, vocab_size, min_frequency)
    signatures = np.array([_signature(token) for token in reserved], dtype=np.int64)
    tokens = [bytes([byte]) for byte in ALPHABET_ORDER]
    status, checked = PAUSE, -1
    while status != DONE:
        status = _learn_slice(corpus, min_frequency, signatures, checked, SLICE)
        for left, right in corpus.merges[len(tokens) - 256 : corpus.used["tokens"][0] - 256].tolist():
            tokens.append(tokens[left - 1] + tokens[right - 1])
        if on_merge is not None:
            on_merge(len(tokens))
        checked = -1
        if status == FULL:
            corpus = _make_room(corpus, min_frequency)
        elif status == CHECK:
            checked = int(corpus.queue[0])
            pair = corpus.pairs[checked]
            if tokens[pair["left"] - 1] + tokens[pair["right"] - 1] in reserved:
                corpus.pairs["stop"][checked] = pair["start"]  # it occurs nowhere, as far as we are concerned

    merges = corpus.merges[: len(tokens) - 256]
    final_id = np.array([EDGE, *ALPHABET_ORDER, *range(256, len(tokens))], dtype=np.int32)
    return final_id[merges], [bytes([byte]) for byte in range(256)] + tokens[256:]


def _signature(token: bytes) -> int:
    """What ``Corpus.signatures`` holds. Few tokens share one that are not the same letters in another order."""
    return sum((byte + 1) ** 5 for byte in token)


def _lay_out(chunks: np.ndarray, ends: np.ndarray, counts: np.ndarray, vocab_size: int, min_frequency: int) -> Corpus:
    """Write down all chunks as bytes, and all pairs of bytes."""
    # Every merge makes the text at least one token shorter, so no more than this can be learned.
    vocab_size = max(256, min(vocab_size, 256 + len(chunks)))
    order = np.argsort(-counts, kind="stable")
    different = 1 + np.count_nonzero(np.diff(counts[order]))
    size = 2 + len(chunks) + len(ends) + (different << BLOCK_BITS)
    # Two bytes for an id rather than four where they suffice: half the memory, and more of it in the cache.
    ids = np.zeros(size, dtype=np.uint16 if vocab_size < 1 << 16 else np.uint32)
    weights = np.zeros((size >> BLOCK_BITS) + 1, dtype=np.int64)
    id_of_byte = 1 + np.argsort(np.frombuffer(ALPHABET_ORDER, dtype=np.uint8))
    _write_chunks(chunks, ends, counts, order, id_of_byte, ids, weights)
    del order

    found = _find_byte_pairs(ids, weights)
    listed = found["count"] >= min_frequency
    # In text, half as much again as the first lists take is room enough until they have become shorter, and there
    # are fewer pairs than an eighth of that. Memory that is never written to costs nothing.
    room = int(found["list_size"][listed].sum()) * 3 // 2
    pairs = np.empty(max(LEAST_PAIRS, int(listed.sum()), room // 8), dtype=PAIR)
    used = np.zeros(1, dtype=USED)
    used[0] = (256, 0, 0, 0, UNLIMITED)
    corpus = Corpus(
        ids=ids,
        weights=weights,
        lengths=np.ones(vocab_size + 1, dtype=np.int64),
        signatures=np.zeros(vocab_size + 1, dtype=np.int64),
        pairs=pairs,
        places=np.empty(room, dtype=np.uint16),
        queue=np.empty(len(pairs), dtype=np.int64),
        neighbours=np.zeros(vocab_size + 1, dtype=NEIGHBOUR),
        beside=np.empty(vocab_size + 1, dtype=np.int64),
        merges=np.zeros((vocab_size - 256, 2), dtype=np.int32),
        used=used,
    )
    corpus.signatures[1:257] = [_signature(bytes([byte])) for byte in ALPHABET_ORDER]
    _list_byte_pairs(corpus, found, min_frequency)
    return corpus


def _make_room(corpus: Corpus, min_frequency: int) -> Corpus:
    """Push the lists together, and move to larger arrays if that leaves too little for the next merge."""
    _tidy(corpus, min_frequency)
    used = corpus.used[0]
    more_pairs, more_places = _room_for_merge(corpus, corpus.queue[0])
    enough_pairs, enough_places = int(used["pairs"] + more_pairs), int(used["places"] + more_places)
    # A full array that is tidied for a few merges only would soon be tidied all the time.
    if enough_pairs > len(corpus.pairs) * 0.8:
        pairs = np.empty(enough_pairs * 3 // 2, dtype=PAIR)
        pairs[: used["pairs"]] = corpus.pairs[: used["pairs"]]
        queue = np.empty(len(pairs), dtype=np.int64)
        queue[: used["queue"]] = corpus.queue[: used["queue"]]
        corpus = corpus._replace(pairs=pairs, queue=queue)
    if enough_places > len(corpus.places) * 0.8:
        places = np.empty(enough_places * 3 // 2, dtype=np.uint16)
        places[: used["places"]] = corpus.places[: used["places"]]
        corpus = corpus._replace(places=places)
    return corpus


# ---- The text and its first pairs


@kernel
def _write_chunks(
    chunks: np.ndarray,
    ends: np.ndarray,
    counts: np.ndarray,
    order: np.ndarray,
    id_of_byte: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
) -> None:
    """Write the chunks into ``ids`` in the given order, in which their counts descend, and fill ``weights``."""
    place, weight = 1, 0
    for chunk in order:
        begin = ends[chunk - 1] if chunk > 0 else 0
        end = ends[chunk]
        if end - begin < 2:
            continue  # has no pair
        if counts[chunk] != weight:
            weight = counts[chunk]
            place = ((place >> BLOCK_BITS) + 1) << BLOCK_BITS
        for source in range(begin, end):
            ids[place] = id_of_byte[chunks[source]]
            weights[place >> BLOCK_BITS] = weight
            place += 1
        place += 1  # an edge


@kernel
def _find_byte_pairs(ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Count all pairs of bytes. Pair (left, right) is item left * 257 + right of what is returned."""
    found = np.zeros(BYTE_IDS * BYTE_IDS, dtype=NEIGHBOUR)
    for place in range(1, ids.size - 1):
        if ids[place] != EDGE and ids[place + 1] != EDGE:
            _count_place(found[ids[place] * BYTE_IDS + ids[place + 1]], place, weights[place >> BLOCK_BITS])
    return found


@kernel
def _list_byte_pairs(corpus: Corpus, found: np.ndarray, min_frequency: int) -> None:
    """List the pairs of bytes that :func:`_find_byte_pairs` found often enough."""
    ids = corpus.ids
    for code in range(BYTE_IDS * BYTE_IDS):
        _add_pair(corpus, found[code], code // BYTE_IDS, code % BYTE_IDS, min_frequency)
    for place in range(1, ids.size - 1):
        if ids[place] != EDGE and ids[place + 1] != EDGE:
            _list_place(corpus.places, found[ids[place] * BYTE_IDS + ids[place + 1]], place)


# ---- Lists of places


@inner
def _count_place(neighbour: Any, place: int, weight: int) -> None:
    """Note that a pair occurs at ``place``, and how many numbers it takes to list that."""
    gap = place - neighbour.last
    neighbour.last = place
    neighbour.count += weight
    neighbour.list_size += 1
    while gap >= TOP_BIT:
        neighbour.list_size += 1
        gap >>= GAP_BITS


@inner
def _add_pair(corpus: Corpus, neighbour: Any, left: int, right: int, min_frequency: int) -> None:
    """Make room for the list of a pair whose places have all been counted, unless it is too rare."""
    if neighbour.count < min_frequency:
        neighbour.cursor = -1
        return
    used = corpus.used[0]
    pair = corpus.pairs[used.pairs]
    pair.count, pair.left, pair.right = neighbour.count, left, right
    pair.start, pair.stop = used.places, used.places + neighbour.list_size
    neighbour.cursor, neighbour.last = used.places, 0
    used.places += neighbour.list_size
    used.pairs += 1
    if pair.count >= used.floor:
        _enqueue(corpus, used.pairs - 1)


@inner
def _list_place(places: np.ndarray, neighbour: Any, place: int) -> None:
    """Write ``place`` into the list that :func:`_add_pair` made room for, if it did."""
    if neighbour.cursor >= 0:
        neighbour.cursor = _write_gap(places, neighbour.cursor, place - neighbour.last)
        neighbour.last = place


@inner
def _write_gap(places: np.ndarray, at: int, gap: int) -> int:
    """Write a distance in numbers of ``GAP_BITS``, the lowest first, with ``TOP_BIT`` on all but the last."""
    while gap >= TOP_BIT:
        places[at] = gap & (TOP_BIT - 1) | TOP_BIT
        at += 1
        gap >>= GAP_BITS
    places[at] = gap
    return at + 1


@inner
def _read_gap(places: np.ndarray, at: int) -> tuple[int, int]:
    """The distance that begins at ``at``, and where the next one begins."""
    gap, shift = 0, 0
    while places[at] >= TOP_BIT:
        gap |= (places[at] & (TOP_BIT - 1)) << shift
        shift += GAP_BITS
        at += 1
    return gap | places[at] << shift, at + 1


@inner
def _recount(corpus: Corpus, index: int, to: int) -> None:
    """Look through a pair's list; keep only the places where it still occurs, and set its count.

    The list moves to ``to``, which is not beyond its start. It never overtakes what is still to be read: where
    a place is left out two distances become one, which takes no more numbers than the two did.
    """
    ids, places = corpus.ids, corpus.places
    pair = corpus.pairs[index]
    left, right, length = pair.left, pair.right, corpus.lengths[pair.left]
    count, place, kept = 0, 0, 0
    at, stop = pair.start, pair.stop
    pair.start = to
    while at < stop:
        gap, at = _read_gap(places, at)
        place += gap
        if ids[place] == left and ids[place + length] == right:
            to = _write_gap(places, to, place - kept)
            kept = place
            count += corpus.weights[place >> BLOCK_BITS]
    pair.stop, pair.count = to, count


@kernel
def _tidy(corpus: Corpus, min_frequency: int) -> None:
    """Recount all pairs, forget those that are too rare now, and push the lists together."""
    used = corpus.used[0]
    many = used.pairs
    used.pairs, used.places = 0, 0
    for index in range(many):
        pair = corpus.pairs[index]
        if pair.count >= min_frequency:
            _recount(corpus, index, used.places)
            if pair.count >= min_frequency:
                used.places = pair.stop
                corpus.pairs[used.pairs] = pair
                used.pairs += 1
    _fill_queue(corpus)


# ---- The queue


@inner
def _comes_first(pairs: np.ndarray, index: int, other_index: int) -> bool:
    """Whether one pair is merged before another: by count, and of equals the one with the older tokens."""
    pair, other = pairs[index], pairs[other_index]
    if pair.count != other.count:
        return pair.count > other.count
    if pair.left != other.left:
        return pair.left < other.left
    return pair.right < other.right


@inner
def _enqueue(corpus: Corpus, index: int) -> None:
    """Put a pair into the queue."""
    queue, pairs = corpus.queue, corpus.pairs
    spot = corpus.used[0].queue
    corpus.used[0].queue += 1
    while spot > 0:
        above = (spot - 1) >> 1
        if not _comes_first(pairs, index, queue[above]):
            break
        queue[spot] = queue[above]
        spot = above
    queue[spot] = index


@inner
def _sink(corpus: Corpus, index: int) -> None:
    """Put a pair where it belongs, beginning from the top of the queue, whose pair is overwritten."""
    queue, pairs, used = corpus.queue, corpus.pairs, corpus.used[0]
    spot, below = 0, 1
    while below < used.queue:
        if below + 1 < used.queue and _comes_first(pairs, queue[below + 1], queue[below]):
            below += 1
        if not _comes_first(pairs, queue[below], index):
            break
        queue[spot] = queue[below]
        spot, below = below, 2 * below + 1
    queue[spot] = index


@inner
def _dequeue(corpus: Corpus) -> None:
    """Take the pair at the top out of the queue."""
    corpus.used[0].queue -= 1
    _sink(corpus, corpus.queue[corpus.used[0].queue])


@inner
def _fill_queue(corpus: Corpus) -> None:
    """Put all pairs into the queue that occur as often as its floor asks."""
    used = corpus.used[0]
    used.queue = 0
    for index in range(used.pairs):
        if corpus.pairs[index].count >= used.floor:
            _enqueue(corpus, index)


@inner
def _lower_floor(corpus: Corpus, min_frequency: int) -> None:
    """Refill the empty queue with pairs half as frequent as those that were in it."""
    used = corpus.used[0]
    highest = 0
    for index in range(used.pairs):
        highest = max(highest, corpus.pairs[index].count)
    used.floor = max(min_frequency, highest >> 1)
    _fill_queue(corpus)


# ---- Merging


@kernel
def _room_for_merge(corpus: Corpus, index: int) -> tuple[int, int]:
    """How many pairs, and how many numbers of lists, merging a pair may add at most."""
    pair = corpus.pairs[index]
    most_places = 2 * (pair.stop - pair.start)
    longest = 1
    while corpus.ids.size >> GAP_BITS * longest:
        longest += 1
    return min(most_places, 2 * corpus.used[0].tokens), most_places * longest


@kernel
def _learn_slice(corpus: Corpus, min_frequency: int, reserved: np.ndarray, checked: int, budget: int) -> int:
    """Learn until all is learned, ``budget`` places have been walked, or Python has to see to something.

    Args:
        corpus: the arrays, changed in place.
        min_frequency: pairs that occur less often are not merged.
        reserved: signatures of the reserved tokens.
        checked: the pair that is known not to make a reserved token, or -1.
        budget: when to pause.

    Returns:
        ``DONE``; ``PAUSE``; ``FULL`` when there is no room for the next merge; ``CHECK`` when the pair at the
        top of the queue may make a reserved token.
    """
    used = corpus.used[0]
    while used.tokens - 256 < len(corpus.merges):
        if used.queue == 0:
            _lower_floor(corpus, min_frequency)
            if used.queue == 0:
                break
        index = corpus.queue[0]
        pair = corpus.pairs[index]
        believed = pair.count
        budget -= pair.stop - pair.start
        _recount(corpus, index, pair.start)
        if pair.count < believed:
            if pair.count >= used.floor:
                _sink(corpus, index)
            else:
                _dequeue(corpus)
            continue
        signature = corpus.signatures[pair.left] + corpus.signatures[pair.right]
        if index != checked:
            for other in reserved:
                if signature == other:
                    return CHECK
        more_pairs, more_places = _room_for_merge(corpus, index)
        if used.pairs + more_pairs > len(corpus.pairs) or used.places + more_places > len(corpus.places):
            return FULL
        _dequeue(corpus)
        merge = used.tokens - 256
        corpus.merges[merge, 0], corpus.merges[merge, 1] = pair.left, pair.right
        used.tokens += 1
        new = used.tokens
        corpus.signatures[new] = signature
        _glue(corpus, index, new)
        for on_left in (True, False):
            _pair_up(corpus, index, new, on_left, min_frequency)
        budget -= 4 * (pair.stop - pair.start)
        if budget < 0:
            return PAUSE
    return DONE


@inner
def _glue(corpus: Corpus, index: int, new: int) -> None:
    """Write the token ``new`` wherever a pair occurs, from left to right; its list keeps the places."""
    ids, places = corpus.ids, corpus.places
    pair = corpus.pairs[index]
    left, right = pair.left, pair.right
    length = corpus.lengths[left]
    both = length + corpus.lengths[right]
    corpus.lengths[new] = both
    place, kept = 0, 0
    at, to = pair.start, pair.start
    while at < pair.stop:
        gap, at = _read_gap(places, at)
        place += gap
        middle = place + length
        if ids[place] != left or ids[middle] != right:
            continue  # of two that overlap, as in "aaa", the left one has been glued
        ids[middle - 1] = ids[middle] = EDGE
        ids[place] = ids[place + both - 1] = new
        to = _write_gap(places, to, place - kept)
        kept = place
    pair.stop, pair.count = to, 0


@inner
def _pair_up(corpus: Corpus, index: int, new: int, on_left: bool, min_frequency: int) -> None:
    """List the pairs of the token ``new`` with its neighbours on one side.

    Args:
        corpus: the arrays.
        index: the pair that became ``new``. Its list says where.
        new: the token that was just made.
        on_left: whether to look at the tokens before it rather than at those behind it.
        min_frequency: pairs that occur less often are never listed.
    """
    ids, places, neighbours, lengths = corpus.ids, corpus.places, corpus.neighbours, corpus.lengths
    pair = corpus.pairs[index]
    start, stop = pair.start, pair.stop
    step = -1 if on_left else lengths[new]

    many, place, at = 0, 0, start
    while at < stop:
        gap, at = _read_gap(places, at)
        place += gap
        token = ids[place + step]
        # Two new tokens side by side are one pair: the left one of them lists it.
        if token == EDGE or (on_left and token == new):
            continue
        neighbour = neighbours[token]
        if neighbour.list_size == 0:
            corpus.beside[many] = token
            many += 1
        _count_place(neighbour, place - lengths[token] if on_left else place, corpus.weights[place >> BLOCK_BITS])

    for number in range(many):
        token = corpus.beside[number]
        left, right = (token, new) if on_left else (new, token)
        _add_pair(corpus, neighbours[token], left, right, min_frequency)

    place, at = 0, start
    while at < stop:
        gap, at = _read_gap(places, at)
        place += gap
        token = ids[place + step]
        if token != EDGE and not (on_left and token == new):
            _list_place(places, neighbours[token], place - lengths[token] if on_left else place)

    for number in range(many):
        neighbour = neighbours[corpus.beside[number]]
        neighbour.count, neighbour.list_size, neighbour.last = 0, 0, 0
