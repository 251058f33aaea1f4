"""A model's forward pass over a few tokens on a CPU, compiled: a program of regions that threads work on together.

Read small_batch.py first: it writes the program, one row of numbers per region, and holds all memory. A region is some
items, such as parts of a matrix or heads of tokens, of which every thread takes the next one that nobody has; the next
region begins when all items are done. So a thread that comes late, or is held up, is waited for only while it holds an
item, and each number is computed by one thread alone, in an order that hangs on nothing but its own token.

What limits a step of one token is memory: it reads every weight once, and all keys and values that it sees.

    float32, bf16    4 and 2 bytes a weight; bf16 in one instruction for two products, where there is one
    int8, int4       1 and 0.5 bytes, and 4 for each scale; inputs are two bytes, of which each is multiplied by itself
    attention        2 x layers x key/value heads x head width x size of a number, for each position seen

Measured on two threads of one core (Zen 4, AVX-512, 33 GB/s at best) with 110M parameters, the whole step of one token
reads 25 to 28 GB/s, of any kind of weights. Eight tokens are limited by products: one thread multiplies and adds 44
pairs of float32, 85 of bf16 or int8 and 65 of int4 in a nanosecond as long as the weights are in the cache.
"""

# N tokens   E embedding   H query heads   G key/value heads   D head dimension   P positions of a piece of attention

from __future__ import annotations

from functools import cache

import numpy as np

from groundup.inference.attention_lanes import KEYS, PIECE, line_up, mix_values, score_keys, turn_keys
from groundup.inference.lanes import (
    BFLOAT16,
    FLOAT32,
    HEADER,
    INT4,
    INT8,
    ROW,
    WEIGHT,
    WIDE,
    add_shared,
    ask_for,
    called,
    fma,
    give_way,
    highest,
    inner,
    least,
    load,
    magnitude,
    most,
    multiply,
    number,
    number32,
    pack_bf16,
    pack_int4,
    pack_int8,
    pause,
    read_shared,
    real,
    real_bf16,
    set_bf16,
    set_number,
    set_real,
    splat,
    store,
    times_power,
    total,
    touch,
    where_positive,
)  # fmt: skip
from groundup.runtime.compiled_functions import CalledFunction, call

TOGETHER = 16  # tokens of a text that attend to a piece while it is in the cache of a core
ENOUGH_TO_ASK = 12  # tokens of a step that give the memory time for the weights that come next
SPARE = 16  # rows that the last tile of a chunk may have too many
MOST = 64  # tokens; a multiple of four

# ---- numbers of the state: what is new at each step (the first two have a line of the cache of their own)
STATE = 96
OPEN, INSIDE, COUNTERS, PROGRAM, REGIONS, TOKENS, IDS, POSITIONS, ROWS_OF, ROPE_AT, PARTS, THREADS = (
    0,
    8,
    *range(16, 26),
)
TABLES, TURNS = 32, 64  # for each group: address and row's size of its tables; for each rotation: cosines and sines

# ---- numbers of a region
FIELDS = 40
FUNCTION, ITEMS, PER_TOKEN = range(3)  # its address; how many items: so many, and so many for each token
# embed: token embeddings and their kind, scale; positions' and their kind; the stream, its bytes per token, width
TABLE, TABLE_KIND, SCALE, PLACES, PLACES_KIND, STREAM, STREAM_ROW, WIDTH = range(3, 11)
# prepare (also the four above): what is added, how; norms of it and of two inputs (three numbers each); the inputs
ADDED, HOW, ADDED_NORM, FIRST_NORM, FIRST, SECOND_NORM, SECOND = 11, 12, 13, 16, 19, 20, 23
NORM, PLUS_ONE, EPSILON = 24, 25, 26  # of all regions that normalise
# rows and gated: how many matrices, their addresses, the inputs
COUNT, MATRICES, INPUTS, ACTIVATION = 3, 4, 8, 9
# heads, attend and merge
QUERIES, NEW_KEYS, NEW_VALUES, QUERY_ROW, KEY_ROW = range(3, 8)
GROUPS, SHARED, HEAD, GROUP, WINDOW, BLOCK, PAGE_KEYS, PAGE_VALUES, PAGE_KIND = range(8, 17)
QUERY_NORM, KEY_NORM, WHOLE, TURN, TURNED, PACKED, PACKED_HEAD, SCORE_SCALE, CAP, MIXED = 17, 20, 23, *range(27, 34)

# ---- numbers of a matrix, behind those of lanes.py
PRODUCT, PACKING, BIAS, BIAS_KIND, OUTPUTS, CHUNK, TARGET, TARGET_ROW, MODE, LOGIT_CAP = range(9, 19)
MATRIX = 19
STORE, ADD, ACTIVATE = range(3)

# ---- numbers of inputs: addresses and bytes per token of each kind, width
STRIDE, LENGTH = 4, 8

SWIGLU, GEGLU, CLAMPED_SWIGLU, GELU, GELU_EXACT, RELU, RELU2 = range(7)
RMSNORM, LAYERNORM = range(2)
PLAIN, NORMED, POST = range(3)


# ---- functions of sixteen numbers


@inner
def exp(x):
    """The exponential, within 2 units in the last place; of what would overflow, the largest that does not."""
    x = most(splat(-87.3), least(splat(88.3), x))
    power = fma(x, splat(1.44269504), splat(12582912.0))
    whole = power - splat(12582912.0)
    rest = fma(whole, splat(2.12194440e-4), fma(whole, splat(-0.693359375), x))
    found = fma(rest, splat(1.9875691500e-4), splat(1.3981999507e-3))
    found = fma(found, rest, splat(8.3334519073e-3))
    found = fma(found, rest, splat(4.1665795894e-2))
    found = fma(found, rest, splat(1.6666665459e-1))
    found = fma(found, rest, splat(5.0000001201e-1))
    return times_power(fma(found, rest * rest, rest + splat(1.0)), power)


@inner
def sigmoid(x):
    """``1 / (1 + exp(-x))``."""
    return splat(1.0) / (splat(1.0) + exp(splat(0.0) - x))


@inner
def capped(x, bound):
    """``bound tanh(x / bound)``."""
    return splat(bound) * (splat(1.0) - splat(2.0) / (splat(1.0) + exp(x * splat(np.float32(2.0) / bound))))


@inner
def gelu(x):
    """GELU in its tanh form: ``(1 + tanh(y)) / 2`` is ``sigmoid(2 y)``."""
    cubic = fma(x * x, splat(0.044715), splat(1.0))
    return x * sigmoid(splat(1.5957691216) * x * cubic)


@inner
def gelu_exact(x):
    """GELU, with the error function of Abramowitz & Stegun, 7.1.26, within 1.5e-7."""
    z = magnitude(x) * splat(0.7071067812)
    t = splat(1.0) / fma(z, splat(0.3275911), splat(1.0))
    found = fma(t, splat(1.061405429), splat(-1.453152027))
    found = fma(found, t, splat(1.421413741))
    found = fma(found, t, splat(-0.284496736))
    found = fma(found, t, splat(0.254829592))
    tail = splat(0.5) * found * t * exp(splat(0.0) - z * z)
    return x * where_positive(x, splat(1.0) - tail, tail)


@inner
def activated(kind, gate, up):
    """What a feed-forward makes of its two halves, or of its one (``gate``): feed_forward.py."""
    if kind == SWIGLU:
        return gate * sigmoid(gate) * up
    if kind == GEGLU:
        return gelu(gate) * up
    if kind == CLAMPED_SWIGLU:
        gate, up = least(splat(7.0), gate), most(splat(-7.0), least(splat(7.0), up))
        return gate * sigmoid(splat(1.702) * gate) * (up + splat(1.0))
    if kind == GELU:
        return gelu(gate)
    if kind == GELU_EXACT:
        return gelu_exact(gate)
    gate = most(splat(0.0), gate)
    return gate * gate if kind == RELU2 else gate


# ---- rows of numbers


@inner
def value_of(address, kind, place):
    """A float32 or bf16 of an array."""
    return real(address + 4 * place) if kind == FLOAT32 else real_bf16(address + 2 * place)


@inner
def statistics(source, count, centred, epsilon):
    """Mean (0 unless ``centred``) and one by the root of the mean square around it."""
    mean = np.float32(0.0)
    for again in range(0 if centred else 1, 2):
        middle, sums, rest = splat(mean), splat(0.0), np.float32(0.0)
        whole = count - count % 16
        for i in range(0, whole, 16):
            x = load(source + 4 * i) - middle
            sums = fma(x, x, sums) if again else sums + x
        for i in range(whole, count):
            x = real(source + 4 * i) - mean
            rest += x * x if again else x
        found = (total(sums) + rest) / np.float32(count)
        if not again:
            mean = found
    return mean, np.float32(1.0) / np.sqrt(found + epsilon)


@inner
def scaled(source, target, count, mean, factor, norm, offset, plus_one):
    """``(source - mean) factor weight + bias``; ``norm`` is the address of: weights, biases (or 0) and their kind."""
    weights, biases, kind = number(norm), number(norm + 8), number(norm + 16)
    for i in range(count):
        weight = value_of(weights, kind, offset + i) + plus_one
        found = (real(source + 4 * i) - mean) * factor * weight
        if biases:
            found += value_of(biases, kind, offset + i)
        set_real(target + 4 * i, found)


@inner
def normalise(region, norm, source, target, count):
    """A norm of a row of numbers, or a copy where there is no norm."""
    if number(norm) == 0:
        for i in range(count):
            set_real(target + 4 * i, real(source + 4 * i))
        return
    mean, factor = statistics(source, count, number(region + 8 * NORM) == LAYERNORM, real(region + 8 * EPSILON))
    scaled(source, target, count, mean, factor, norm, 0, np.float32(number(region + 8 * PLUS_ONE)))


@inner
def pack(inputs, token):
    """Make of a row of inputs, float32, what the kinds of weights that it meets want: bf16, or integers and a scale."""
    source = number(inputs) + number(inputs + 8 * STRIDE) * token + HEADER
    length = number(inputs + 8 * LENGTH)
    for kind in range(BFLOAT16, INT4 + 1):
        target = number(inputs + 8 * kind)
        if target == 0:
            continue
        target += number(inputs + 8 * (STRIDE + kind)) * token
        if kind == BFLOAT16:
            for i in range(0, length, 32):
                pack_bf16(source + 4 * i, target + HEADER + 2 * i)
            continue
        largest, wrong = splat(0.0), splat(0.0)
        store(target + 64, largest)
        store(target + 128, largest)
        for i in range(0, length, 16):
            x = load(source + 4 * i)
            largest = most(magnitude(x), largest)
            wrong = fma(x, splat(0.0), wrong)  # not a number, if one is none
        most_of_all = highest(largest)
        factor = np.float32(32512.0) / most_of_all if most_of_all > 0 else np.float32(0.0)
        set_real(target, most_of_all / np.float32(32512.0) + total(wrong))
        if kind == INT8:
            for i in range(0, length, 64):
                pack_int8(source + 4 * i, target + HEADER + 2 * i, target + 64, factor)
        else:
            for i in range(0, length, 128):
                pack_int4(source + 4 * i, target + HEADER + i // 2 * 5, factor)


# ---- products


def _rows(kind, group, zero, few):
    """The product of a chunk of rows with all tokens, four of them at a time.

    A weight is multiplied with all four as it is read, an input with two or three rows. Those are far apart, so that
    each is followed by the next one in memory: processors guess what will be read from bytes that follow each other,
    not from the rows of a small tile. An odd distance keeps them out of each other's places in the cache.
    """
    one, two, four = (1, 1, 1) if few else (2, 3, 3)

    def rows(matrix, row, count, tokens, x, x_stride, result, stride, ahead, lines):
        token = asked = 0
        # The first tokens wait for the memory, the others compute: they ask it for what this thread will have next.
        # Few tokens would ask it for too much at once.
        lines = lines if tokens >= ENOUGH_TO_ASK else 0
        share = lines // ((count + four - 1) // four * max(1, (tokens - 1) // 4)) + 1
        while tokens - token >= 3:  # three are computed as four: the last one's numbers are nobody's
            apart = (count + four - 1) // four | 1
            for i in range(apart):
                at, to = x + x_stride * token, result + stride * token + 4 * i
                multiply(kind, group, zero, four, 4, matrix, row + i, apart, at, x_stride, to, stride)
                if token:
                    end = min(asked + share, lines)
                    for line in range(asked, end):
                        ask_for(ahead + 64 * line)
                    asked = end
            token += 4
        if tokens - token >= 2:
            apart = (count + two - 1) // two | 1
            for i in range(apart):
                at, to = x + x_stride * token, result + stride * token + 4 * i
                multiply(kind, group, zero, two, 2, matrix, row + i, apart, at, x_stride, to, stride)
            token += 2
        if tokens - token >= 1:
            apart = (count + one - 1) // one | 1
            for i in range(apart):
                at, to = x + x_stride * token, result + stride * token + 4 * i
                multiply(kind, group, zero, one, 1, matrix, row + i, apart, at, x_stride, to, stride)
        return 0

    return called(rows)


@inner
def product(matrix, inputs, tokens, row, count, result, stride, following, following_row, following_count):
    """Some rows of a matrix times all tokens, and its biases, to ``result``; the following ones come soon."""
    kind = number(matrix + 8 * PACKING)
    x, x_stride = number(inputs + 8 * kind), number(inputs + 8 * (STRIDE + kind))
    width = number(following + 8 * ROW)
    ahead, lines = number(following + 8 * WEIGHT) + following_row * width, following_count * width // 64
    call(number(matrix + 8 * PRODUCT), matrix, row, count, tokens, x, x_stride, result, stride, ahead, lines)
    biases, bias_kind = number(matrix + 8 * BIAS), number(matrix + 8 * BIAS_KIND)
    if biases:
        for token in range(tokens):
            for i in range(count):
                at = result + stride * token + 4 * i
                set_real(at, real(at) + value_of(biases, bias_kind, row + i))


@inner
def found_rows(region, item):
    """The matrix of an item, its first row and how many; none of the first matrix where there is no such item."""
    first, which = number(region + 8 * MATRICES), 0
    while which < abs(number(region + 8 * COUNT)):
        matrix = number(region + 8 * (MATRICES + which))
        chunk, outputs = number(matrix + 8 * CHUNK), number(matrix + 8 * OUTPUTS)
        chunks = (outputs + chunk - 1) // chunk
        if item < chunks:
            return matrix, item * chunk, min(chunk, outputs - item * chunk)
        item -= chunks
        which += 1
    return first, 0, 0


@called
def part_of_rows(state, region, item, scratch):
    """A chunk of rows of one of a region's matrices."""
    matrix, row, count = found_rows(region, item)
    next_matrix, next_row, next_count = found_rows(region, item + number(state + 8 * THREADS))
    tokens, stride = number(state + 8 * TOKENS), 4 * (number(matrix + 8 * CHUNK) + SPARE)
    inputs = number(region + 8 * INPUTS)
    product(matrix, inputs, tokens, row, count, scratch, stride, next_matrix, next_row, next_count)
    gated = number(region + 8 * COUNT) < 0
    if gated:
        other = number(region + 8 * (MATRICES + 1))
        product(other, inputs, tokens, row, count, scratch + MOST * stride, stride, other, next_row, next_count)
    activation, mode = number(region + 8 * ACTIVATION), number(matrix + 8 * MODE)
    target, width, cap = (
        number(matrix + 8 * TARGET) + 4 * row,
        number(matrix + 8 * TARGET_ROW),
        real(matrix + 8 * LOGIT_CAP),
    )
    for token in range(tokens):
        source, to = scratch + stride * token, target + width * token
        if gated or mode == ACTIVATE or cap > 0:
            for i in range(0, count, 16):
                at = source + 4 * i
                x = load(at)
                store(at, capped(x, cap) if cap > 0 else activated(activation, x, load(at + MOST * stride)))
        if mode == ADD:
            for i in range(count):
                set_real(to + 4 * i, real(to + 4 * i) + real(source + 4 * i))
        else:
            for i in range(count):
                set_real(to + 4 * i, real(source + 4 * i))
    return 0


# ---- what is done for each token


@called
def embed(state, region, token, scratch):
    """A token's embedding, scaled, with its position's where there is one."""
    width, scale = number(region + 8 * WIDTH), real(region + 8 * SCALE)
    identity, position = number(number(state + 8 * IDS) + 8 * token), number(number(state + 8 * POSITIONS) + 8 * token)
    table, kind = number(region + 8 * TABLE), number(region + 8 * TABLE_KIND)
    places, places_kind = number(region + 8 * PLACES), number(region + 8 * PLACES_KIND)
    target = number(region + 8 * STREAM) + number(region + 8 * STREAM_ROW) * token
    for i in range(width):
        found = value_of(table, kind, identity * width + i) * scale
        if places:
            found += value_of(places, places_kind, position * width + i)
        set_real(target + 4 * i, found)
    return 0


@called
def prepare(state, region, token, scratch):
    """Add to the stream what the last sub-layer made, if its norm had to wait for all of it; then the next inputs."""
    stream = number(region + 8 * STREAM) + number(region + 8 * STREAM_ROW) * token
    width, how = number(region + 8 * WIDTH), number(region + 8 * HOW)
    if how != PLAIN:
        added = number(region + 8 * ADDED) + number(region + 8 * STREAM_ROW) * token
        if how == NORMED:
            normalise(region, region + 8 * ADDED_NORM, added, added, width)
        for i in range(width):
            set_real(stream + 4 * i, real(stream + 4 * i) + real(added + 4 * i))
        if how == POST:
            normalise(region, region + 8 * ADDED_NORM, stream, stream, width)
    for field, norm in ((FIRST, FIRST_NORM), (SECOND, SECOND_NORM)):
        inputs = number(region + 8 * field)
        if inputs:
            target = number(inputs) + number(inputs + 8 * STRIDE) * token + HEADER
            normalise(region, region + 8 * norm, stream, target, width)
            pack(inputs, token)
    return 0


@called
def repack(state, region, token, scratch):
    """Inputs that a product has left as float32."""
    pack(number(region + 8 * INPUTS), token)
    return 0


@inner
def turn(state, region, token, x):
    """Rotate a head's first dimensions by its token's position: positions.py."""
    turned, which = number(region + 8 * TURNED), number(region + 8 * TURN)
    if which < 0:
        return
    at = number(number(state + 8 * ROPE_AT) + 8 * token) * turned * 4
    cosines, sines = number(state + 8 * (TURNS + 2 * which)) + at, number(state + 8 * (TURNS + 2 * which + 1)) + at
    half = 2 * turned  # bytes
    for i in range(0, half, 4):
        a, b = real(x + i), real(x + half + i)
        set_real(x + i, a * real(cosines + i) - b * real(sines + i))
        set_real(x + half + i, b * real(cosines + half + i) + a * real(sines + half + i))


@inner
def head_of(state, region, token, norm, source, head, heads, target):
    """One head of a query or key: normalised, then turned."""
    width = number(region + 8 * HEAD)
    at = source + 4 * head * width
    if number(norm) and number(region + 8 * WHOLE):
        centred, epsilon = number(region + 8 * NORM) == LAYERNORM, real(region + 8 * EPSILON)
        mean, factor = statistics(source, heads * width, centred, epsilon)
        plus_one = np.float32(number(region + 8 * PLUS_ONE))
        scaled(at, target, width, mean, factor, norm, head * width, plus_one)
    else:
        normalise(region, norm, at, target, width)
    turn(state, region, token, target)


@called
def heads_of_group(state, region, item, scratch):
    """The queries of a token that share a key, and that key and its value, which go to their pages."""
    groups, shared, width = number(region + 8 * GROUPS), number(region + 8 * SHARED), number(region + 8 * HEAD)
    token, group = item // groups, item % groups
    kind = number(region + 8 * PAGE_KIND)
    queries = number(region + 8 * QUERIES) + number(region + 8 * QUERY_ROW) * token
    packed, packed_head = number(region + 8 * PACKED), number(region + 8 * PACKED_HEAD)
    for head in range(group * shared, (group + 1) * shared):
        head_of(state, region, token, region + 8 * QUERY_NORM, queries, head, groups * shared, scratch)
        target = packed + (token * groups * shared + head) * packed_head
        for i in range(width):
            if kind == FLOAT32:
                set_real(target + 4 * i, real(scratch + 4 * i))
            else:
                set_bf16(target + 2 * i, real(scratch + 4 * i))
    row = number(region + 8 * KEY_ROW) * token
    head_of(state, region, token, region + 8 * KEY_NORM, number(region + 8 * NEW_KEYS) + row, group, groups, scratch)
    at = slot_of(state, region, token, number(number(state + 8 * POSITIONS) + 8 * token)) * groups + group
    values = number(region + 8 * NEW_VALUES) + row + 4 * group * width
    for source, pages in ((scratch, number(region + 8 * PAGE_KEYS)), (values, number(region + 8 * PAGE_VALUES))):
        for i in range(width):
            if kind == FLOAT32:
                set_real(pages + 4 * (at * width + i), real(source + 4 * i))
            else:
                set_bf16(pages + 2 * (at * width + i), real(source + 4 * i))
    return 0


# ---- attention


@inner
def slot_of(state, region, token, position):
    """Where in the pages a position of a token's text lies."""
    block, group = number(region + 8 * BLOCK), number(region + 8 * GROUP)
    row = number(number(state + 8 * ROWS_OF) + 8 * token)
    table = number(state + 8 * (TABLES + 2 * group)) + number(state + 8 * (TABLES + 2 * group + 1)) * row
    return number32(table + 4 * (position // block)) * block + position % block


@inner
def pieces_of(state, region, token):
    """First position that a token sees, the number of the piece it lies in, and how many pieces there are."""
    position, window = number(number(state + 8 * POSITIONS) + 8 * token), number(region + 8 * WINDOW)
    first = max(0, position - window + 1) if window else 0
    return first, first // PIECE, position // PIECE - first // PIECE + 1


@inner
def together(state, token):
    """The end of a run of tokens of one text, whose attention to a piece is one item: they read the same keys."""
    rows, end = number(state + 8 * ROWS_OF), token + 1
    last = min(number(state + 8 * TOKENS), token + TOGETHER)
    while end < last and number(rows + 8 * end) == number(rows + 8 * token):
        end += 1
    return end


@inner
def pieces_together(state, region, token, end):
    """The first piece that any of a run of tokens sees, and how many there are up to the last one."""
    low, count = pieces_of(state, region, token)[1:]
    high = low + count
    for other in range(token + 1, end):
        own_low, own_count = pieces_of(state, region, other)[1:]
        low, high = min(low, own_low), max(high, own_low + own_count)
    return low, high - low


@inner
def attention_items(state, region):
    """How many items a region of attention has: for each run of tokens, the pieces that they see."""
    count, token = 0, 0
    while token < number(state + 8 * TOKENS):
        end = together(state, token)
        count += pieces_together(state, region, token, end)[1]
        token = end
    return count


@inner
def seen_of(state, region, token, piece):
    """The first and the last position of a piece that a token sees, counted from the piece's first."""
    begin, end = pieces_of(state, region, token)[0], number(number(state + 8 * POSITIONS) + 8 * token) + 1
    return max(begin - piece * PIECE, 0), min(end - piece * PIECE, PIECE)


@inner
def locate(state, region, token, start, first, last, row, places):
    """Where the keys of a piece lie, counted from the beginning of the pages; before the first and behind the last one,
    these again.

    Keys and values are read once in the order in which they lie: processors guess what comes next from that, not from
    one head's part of each position.
    """
    block, done = number(region + 8 * BLOCK), first
    while done < last:
        at = slot_of(state, region, token, start + done) * row
        run = min(block - (start + done) % block, last - done)
        for i in range(run):
            set_number(places + 8 * (done + i), at + i * row)
        done += run
    for i in range(first // KEYS * KEYS, first):
        set_number(places + 8 * i, number(places + 8 * first))
    for i in range(last, (last + KEYS - 1) // KEYS * KEYS):
        set_number(places + 8 * i, number(places + 8 * (last - 1)))
    for pages in (number(region + 8 * PAGE_KEYS), number(region + 8 * PAGE_VALUES)):
        for i in range(first, last):
            at = pages + number(places + 8 * i)
            for byte in range(0, row, 64):
                touch(at + byte)


@inner
def foresee(state, region, item, row, found):
    """Where the keys and values lie of the piece that this thread will have next, most likely: how many stretches."""
    if item >= attention_items(state, region):
        return 0
    token, end, _, piece = found_item(state, region, item)
    block, last = number(region + 8 * BLOCK), number(number(state + 8 * POSITIONS) + 8 * (end - 1))
    start = max(pieces_of(state, region, token)[0], piece * PIECE) // block
    count = min(last, (piece + 1) * PIECE - 1) // block - start + 1
    for i in range(count):
        at = slot_of(state, region, token, (start + i) * block) * row
        set_number(found + 16 * i, number(region + 8 * PAGE_KEYS) + at)
        set_number(found + 16 * i + 8, number(region + 8 * PAGE_VALUES) + at)
    return 2 * count


@inner
def ask(places, count, size, asked, share):
    """Ask for the next lines of the cache of some stretches of memory, and give how many have been asked for.

    They come while this thread computes: without, memory and arithmetic take turns.
    """
    lines = size // 64
    end = min(asked + share, count * lines)
    while asked < end:
        which = asked // lines
        at, line = number(places + 8 * which), asked % lines
        stop = min(lines, line + end - asked)
        asked += stop - line
        for i in range(line, stop):
            ask_for(at + 64 * i)
    return asked


@inner
def soften(kind, row, low, first, last, high, scale, cap, part):
    """Scores from ``first`` to ``last`` to exp(score - highest), in place, in the form of weights; zeros around them
    from ``low`` to ``high``. The highest and the sum to ``part``.
    """
    for i in range(low, high, 16):
        x = load(row + 4 * i) * splat(scale)
        store(row + 4 * i, capped(x, cap) if cap > 0 else x)
    for begin, end in ((low, first), (last, high)):
        for i in range(begin, end):
            set_real(row + 4 * i, np.float32(-np.inf))
    best = splat(np.float32(-np.inf))
    for i in range(low, high, 16):
        best = most(load(row + 4 * i), best)
    middle, sums = highest(best), splat(0.0)
    for i in range(low, high, 16):
        store(row + 4 * i, exp(load(row + 4 * i) - splat(middle)))
    for begin, end in ((low, first), (last, high)):
        for i in range(begin, end):
            set_real(row + 4 * i, np.float32(0.0))
    for i in range(low, high, 16):
        sums = sums + load(row + 4 * i)
    set_real(part, middle)
    set_real(part + 4, total(sums))
    if kind == BFLOAT16:
        for i in range(low // 32 * 32, high, 32):
            pack_bf16(row + 4 * i, row + 2 * i)


def _tile(kind, count):
    pair = 2 if kind == BFLOAT16 else 1

    def tile(region, table, most, group, turned, turned_rows, values, low, high, scores):
        """Some queries and a piece of keys and values that they share.

        Args:
            table, most: for each query the addresses of its first head and of what is computed for that, and the first
                and the last position that it sees: four numbers, ``most`` numbers from each other.
            group: of heads.
            turned, turned_rows, values: keys and values as attention_lanes.py has them.
            low, high: the positions that any query sees, in whole sixteens.
            scores: memory.
        """
        packed_head, shared = number(region + 8 * PACKED_HEAD), number(region + 8 * SHARED)
        offset = group * shared * (64 + packed_head)
        for i in range(low // 64 * 64, high, 64):
            query = group * shared * packed_head
            score_keys(kind, count, table, query, turned + 4 * i, turned_rows, scores + 4 * i)
        parts, first, last = table + 8 * most, table + 16 * most, table + 24 * most
        scale, cap = real(region + 8 * SCORE_SCALE), real(region + 8 * CAP)
        for i in range(count):
            begin, end, part = number(first + 8 * i), number(last + 8 * i), number(parts + 8 * i) + offset
            soften(kind, scores + 4 * PIECE * i, low, begin, end, high, scale, cap, part)
        begin, end, row, at = low // pair, high // pair, packed_head, 0
        while at + 256 <= packed_head:
            mix_values(kind, count, 4, scores, values + at, row, begin, end, parts, offset + 64 + at)
            at += 256
        if at < packed_head:
            mix_values(kind, count, 2, scores, values + at, row, begin, end, parts, offset + 64 + at)

    return inner(tile)


@inner
def found_item(state, region, item):
    """What an item of attention is: the first of its tokens and the one behind them, all parts before, a piece."""
    token, before, end = 0, 0, together(state, 0)
    low, count = pieces_together(state, region, 0, end)
    while item >= count:
        item -= count
        for other in range(token, end):
            before += pieces_of(state, region, other)[2]
        token, end = end, together(state, end)
        low, count = pieces_together(state, region, token, end)
    return token, end, before, low + item


@inner
def queries_of(state, region, token, end, before, piece, table, most_queries):
    """Write the table of a tile: all queries of a run that see something of a piece.

    Returns:
        How many there are, and the first and the last position that any sees, counted from the piece's first.
    """
    shared, packed_head = number(region + 8 * SHARED), number(region + 8 * PACKED_HEAD)
    heads = number(region + 8 * GROUPS) * shared
    low, high, queries = PIECE, 0, 0
    for other in range(token, end):
        first, last = seen_of(state, region, other, piece)
        own_piece, count = pieces_of(state, region, other)[1:]
        if first < last:
            low, high = min(low, first), max(high, last)
            query = number(region + 8 * PACKED) + other * heads * packed_head
            part = number(state + 8 * PARTS) + (before + piece - own_piece) * heads * (64 + packed_head)
            for i in range(shared):
                at = table + 8 * (queries + i)
                set_number(at, query + i * packed_head)
                set_number(at + 8 * most_queries, part + i * (64 + packed_head))
                set_number(at + 16 * most_queries, first)
                set_number(at + 24 * most_queries, last)
            queries += shared
        before += count
    return queries, low, high


def _attend(kind):
    one, two, three, four = (_tile(kind, count) for count in range(1, 5))
    size, pair = (2, 2) if kind == BFLOAT16 else (4, 1)

    def attend(state, region, item, scratch):
        """A piece of the keys of a text, and the queries of a run of its tokens: sums that :func:`merge` puts together.

        To the region's parts, for each token, piece and head: the highest score, the sum of exp(score - highest), and
        the same sum with values.
        """
        groups, width = number(region + 8 * GROUPS), size * number(region + 8 * HEAD)
        packed_head, most = number(region + 8 * PACKED_HEAD), TOGETHER * number(region + 8 * SHARED)
        places, scores, table = scratch, scratch + 8 * PIECE, scratch + 24 * PIECE
        turned = table + 32 * most
        values = turned + packed_head * PIECE
        ahead = values + packed_head * PIECE
        row, rows = groups * width, (width + 63) // 64 * 16

        token, end, before, piece = found_item(state, region, item)
        queries, low, high = queries_of(state, region, token, end, before, piece, table, most)
        if queries == 0:  # tokens of a text that lie further apart than they see: nobody sees what is between
            return 0
        locate(state, region, token, piece * PIECE, low, high, row, places)
        low, high = low // KEYS * KEYS, (high + KEYS - 1) // KEYS * KEYS
        stretch, asked = number(region + 8 * BLOCK) * row, 0
        stretches = foresee(state, region, item + number(state + 8 * THREADS), row, ahead)
        times = groups * (high - low) // KEYS
        share = (stretches * stretch // 64 + times - 1) // times
        for group in range(groups):
            keys, own = number(region + 8 * PAGE_KEYS) + group * width, number(region + 8 * PAGE_VALUES) + group * width
            for i in range(low, high, KEYS):
                turn_keys(keys, places + 8 * i, width, turned + 4 * i)
                asked = ask(ahead, stretches, stretch, asked, share)
            for i in range(low, high, pair):
                line_up(kind, own, places + 8 * i, width, values + i // pair * packed_head)
            for done in range(0, queries, 4):
                at, left = table + 8 * done, queries - done
                if left >= 4:
                    four(region, at, most, group, turned, rows, values, low, high, scores)
                elif left == 3:
                    three(region, at, most, group, turned, rows, values, low, high, scores)
                elif left == 2:
                    two(region, at, most, group, turned, rows, values, low, high, scores)
                else:
                    one(region, at, most, group, turned, rows, values, low, high, scores)
        return 0

    return called(attend)


@called
def merge(state, region, token, scratch):
    """The pieces of a token's attention put together, all heads, as inputs of the next product."""
    heads, width = number(region + 8 * GROUPS) * number(region + 8 * SHARED), number(region + 8 * HEAD)
    packed_head, inputs = number(region + 8 * PACKED_HEAD), number(region + 8 * MIXED)
    part_row, before = 64 + packed_head, 0
    for other in range(token):
        before += pieces_of(state, region, other)[2]
    count = pieces_of(state, region, token)[2]
    row = number(inputs) + number(inputs + 8 * STRIDE) * token + HEADER
    for head in range(heads):
        part, step = number(state + 8 * PARTS) + (before * heads + head) * part_row, heads * part_row
        best = real(part)
        for i in range(1, count):
            best = max(best, real(part + i * step))
        weight = np.float32(0.0)
        for i in range(packed_head // 64):
            store(scratch + 64 * i, splat(0.0))
        for i in range(count):
            at = part + i * step
            share = exp(splat(real(at) - best))
            weight += highest(share) * real(at + 4)
            for j in range(0, packed_head, 64):
                store(scratch + j, fma(share, load(at + 64 + j), load(scratch + j)))
        for i in range(width):
            found = real(scratch + 4 * i) / weight
            set_real(row + 4 * (head * width + i), found)
    pack(inputs, token)
    return 0


# ---- the program


@inner
def wait_for(address, value):
    """Wait until another thread has written a number."""
    tries = 0
    while read_shared(address) != value:
        pause()
        tries += 1
        if tries % 4096 == 0:
            give_way()


@inner
def end_step(state):
    """Let nobody begin any more, and wait for who has."""
    add_shared(state + 8 * OPEN, -read_shared(state + 8 * OPEN))
    wait_for(state + 8 * INSIDE, 0)


def _run(state, opened, scratch):
    """Work on the program until it is done.

    Args:
        state: address of the numbers of the state.
        opened: which step it is; 0 for the thread that began it, and ends it.
        scratch: memory of this thread.
    """
    if opened:
        add_shared(state + 8 * INSIDE, 1)
        if read_shared(state + 8 * OPEN) != opened:  # it is over
            add_shared(state + 8 * INSIDE, -1)
            return 0
    counter = number(state + 8 * COUNTERS)
    for step in range(number(state + 8 * REGIONS)):
        region = number(state + 8 * PROGRAM) + 8 * FIELDS * step
        items = number(region + 8 * ITEMS) + number(region + 8 * PER_TOKEN) * number(state + 8 * TOKENS)
        if items < 0:
            items = attention_items(state, region)
        item = add_shared(counter, 1)
        while item < items:
            call(number(region + 8 * FUNCTION), state, region, item, scratch)
            add_shared(counter + 64, 1)
            item = add_shared(counter, 1)
        wait_for(counter + 64, items)
        counter += 128
    if opened:
        add_shared(state + 8 * INSIDE, -1)
    else:
        end_step(state)
    return 0


run = called(_run)


@called
def close(state):
    """End a step that its thread has not: it was interrupted."""
    end_step(state)
    return 0


attend = {kind: _attend(kind) for kind in (FLOAT32, BFLOAT16)}


@cache
def rows_of(kind: int, group: int = 0, zero: bool = False) -> CalledFunction:
    """The product for matrices of a kind: FLOAT32, BFLOAT16, INT8, or INT4 with so many inputs to a scale."""
    return _rows(kind, group, int(zero), int(not WIDE))
