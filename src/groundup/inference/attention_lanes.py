"""Attention of several queries to a piece of keys and values, sixteen numbers at once: what lanes.py is to products.

Keys lie in the cache one after the other, each a row. Here they are turned first, so that sixteen keys stand side by
side for each dimension (or, of bf16, each two): a query's dimension is then multiplied with sixteen keys at once, and
no sum runs across a vector. That pays from the third query on; one or two wait for the memory anyway. A query's sums
go through dimensions, and keys, one by one: its numbers are the same whatever is computed beside it.
"""

# Q queries that share keys   P positions of a piece   D head dimension; a "part" is 64 bytes of a key or value

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from groundup.inference.lanes import BFLOAT16, Writer, float32, float32s, int16s, int32, int32s, int64

KEYS = 16  # keys that are turned at once
PIECE = 128  # positions that are attended to at once


def _each_part(w: Writer, width: ir.Value, write: Callable[[ir.Value, ir.Value | None], None]) -> None:
    """For each part of vectors of ``width`` bytes: ``write(its number, what is left of it where that is less)``."""
    whole = w.b.lshr(width, int64(6))
    with cgutils.for_range(w.b, whole) as loop:
        write(loop.index, None)
    rest = w.b.and_(width, int64(63))
    with w.b.if_then(w.b.icmp_signed(">", rest, int64(0)), likely=False):
        write(whole, rest)


def _part(w: Writer, kind: ir.Type, address: ir.Value, part: ir.Value, rest: ir.Value | None) -> ir.Value:
    """A part of a vector, with zeros where it has ended."""
    address = w.b.add(address, w.b.shl(part, int64(6)))
    return w.load(kind, address if rest is None else w.padded(address, rest, 64))


def _turned(w: Writer, rows: Sequence[ir.Value]) -> list[ir.Value]:
    """Sixteen vectors of sixteen, as columns: blocks beside the diagonal change places, of 8, 4, 2, then 1."""
    found = list(rows)
    for size in (8, 4, 2, 1):
        upper = [lane + 16 - size if lane & size else lane for lane in range(16)]
        lower = [lane + 16 if lane & size else lane + size for lane in range(16)]
        for i in (i for i in range(16) if not i & size):
            a, b = found[i], found[i + size]
            found[i], found[i + size] = w.shuffled(a, b, upper), w.shuffled(a, b, lower)
    return found


@intrinsic
def turn_keys(typing_context, keys, places, width, turned):
    """Sixteen keys as columns of ``turned``, whose rows are a piece wide: 4 bytes of each key.

    Args:
        keys, places: a key lies so many bytes behind ``keys``, int64 each.
        width: bytes of a key.
    """

    def generate(context, builder, signature, values):
        w = Writer(builder)
        keys, places, width, turned = values
        addresses = [builder.add(keys, w.load(int64, places, 8 * i)) for i in range(KEYS)]

        def write(part, rest):
            target = builder.add(turned, builder.mul(part, int64(16 * 4 * PIECE)))
            columns = _turned(w, [_part(w, int32s, address, part, rest) for address in addresses])
            for row, column in enumerate(columns):
                w.store(column, target, 4 * PIECE * row)

        _each_part(w, width, write)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), generate


@intrinsic(prefer_literal=True)
def score_keys(typing_context, kind, count, queries, offset, turned, rows, result):
    """Products of some queries with 64 turned keys, float32, to ``result``, a piece's width for each query.

    Args:
        kind, count: known when this is compiled: of the keys, and how many queries.
        queries, offset: the address of a query lies at each int64 of ``queries``; so many bytes are added.
        turned, rows: where the first row of these keys is, and how many rows there are.
    """
    half, queries_Q = kind.literal_value == BFLOAT16, range(count.literal_value)

    def generate(context, builder, signature, values):
        w = Writer(builder)
        _, _, queries, offset, turned, rows, result = values
        addresses = [builder.add(w.load(int64, queries, 8 * i), offset) for i in queries_Q]
        totals = [[w.variable(float32s, w.all(float32s, 0.0)) for _ in range(4)] for _ in queries_Q]
        with cgutils.for_range(builder, rows) as loop:
            row = builder.add(turned, builder.mul(loop.index, int64(4 * PIECE)))
            keys = [w.load(int32s if half else float32s, row, 64 * i) for i in range(4)]
            for address, places in zip(addresses, totals, strict=True):
                at = builder.add(address, builder.shl(loop.index, int64(2)))
                query = _spread(w, half, at)
                for place, key in zip(places, keys, strict=True):
                    builder.store(_added(w, half, builder.load(place), query, key), place)
        for i, places in enumerate(totals):
            for j, place in enumerate(places):
                w.store(builder.load(place), result, 4 * PIECE * i + 64 * j)
        return context.get_dummy_value()

    return types.void(kind, count, *(types.int64,) * 5), generate


@intrinsic(prefer_literal=True)
def line_up(typing_context, kind, values, places, width, target):
    """Values as rows without gaps: one of float32, or two of bf16 side by side, dimension by dimension.

    Args:
        kind: known when this is compiled.
        values, places, width: as the keys of :func:`turn_keys`.
    """
    half = kind.literal_value == BFLOAT16

    def generate(context, builder, signature, arguments):
        w = Writer(builder)
        _, values, places, width, target = arguments
        addresses = [builder.add(values, w.load(int64, places, 8 * i)) for i in range(1 + half)]

        def write(part, rest):
            read = [_part(w, int16s if half else float32s, address, part, rest) for address in addresses]
            to = builder.add(target, builder.shl(part, int64(6 + half)))
            for i in range(1 + half):
                order = [lane + 32 * which for lane in range(16 * i, 16 * i + 16) for which in range(2)]
                w.store(w.shuffled(*read, order) if half else read[0], to, 64 * i)

        _each_part(w, width, write)
        return context.get_dummy_value()

    return types.void(kind, *(types.int64,) * 4), generate


@intrinsic(prefer_literal=True)
def mix_values(typing_context, kind, count, vectors, weights, rows, row, first, last, results, offset):
    """Sums of some dimensions of values, times the weights of some queries.

    Args:
        kind, count, vectors: known when this is compiled: of the values, how many queries, and how many times sixteen
            dimensions.
        weights: for each query, a piece's width: a float32 for each value; or, of bf16, two for each two, in bf16.
        rows, row: what :func:`line_up` made, rows of so many bytes.
        first, last: which rows are summed.
        results, offset: the address for a query's sums, float32, lies at each int64 of ``results``; so many bytes are
            added.
    """
    half = kind.literal_value == BFLOAT16
    queries_Q, parts = range(count.literal_value), range(vectors.literal_value)

    def generate(context, builder, signature, values):
        w = Writer(builder)
        weights, rows, row, first, last, results, offset = values[3:]
        totals = [[w.variable(float32s, w.all(float32s, 0.0)) for _ in parts] for _ in queries_Q]
        with cgutils.for_range_slice(builder, first, last, int64(1)) as (index, _):
            value = builder.add(rows, builder.mul(index, row))
            read = [w.load(int32s if half else float32s, value, 64 * i) for i in parts]
            weight_at = builder.add(weights, builder.shl(index, int64(2)))
            for i, places in enumerate(totals):
                weight = _spread(w, half, weight_at, 4 * PIECE * i)
                for place, value in zip(places, read, strict=True):
                    builder.store(_added(w, half, builder.load(place), weight, value), place)
        for i, places in enumerate(totals):
            to = builder.add(w.load(int64, results, 8 * i), offset)
            for j, place in enumerate(places):
                w.store(builder.load(place), to, 64 * j)
        return context.get_dummy_value()

    return types.void(kind, count, vectors, *(types.int64,) * 7), generate


def _spread(w: Writer, half: bool, address: ir.Value, offset: int = 0) -> ir.Value:
    """Four bytes, sixteen times: a float32, or two bf16."""
    return w.all(int32s if half else float32s, w.load(int32 if half else float32, address, offset))


def _added(w: Writer, half: bool, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    return w.dot_bf16(total, a, b) if half else w.fma(a, b, total)
