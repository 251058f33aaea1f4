"""What the kernels of kernels.py need of the machine: sixteen numbers at once, addresses, and what threads share.

A few functions here are written in LLVM's own language, through llvmlite: so every number is computed by the same
operations in the same order whatever stands beside it, which a compiler that rearranges loops does not promise. Where
the processor has instructions for products of bytes or of bf16 (AVX-512 VNNI and BF16), they are used; elsewhere the
same sums are made of ordinary ones.

Nothing here checks bounds: small_batch.py says how large each buffer is.
"""

# A kernel's weights come in units of 64 bytes: 16 float32, 32 bf16, 64 int8 or 128 int4.

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, config
from numba.core.typing.templates import ConcreteTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

from groundup.runtime.compiled_functions import CalledFunction, digest_of

SOURCES = digest_of(Path(__file__).parent / name for name in ("lanes.py", "attention_lanes.py", "kernels.py"))
# Who names another processor for Numba to compile for means to do without what this one has.
_FEATURES = {} if config.CPU_NAME else llvm.get_host_cpu_features()
VNNI, BF16, WIDE, AMX = (bool(_FEATURES.get(name)) for name in ("avx512vnni", "avx512bf16", "avx512f", "amx-bf16"))

int8, int16, int32, int64, float32 = (ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType())
int8s, int16s, int32s = ir.VectorType(int8, 64), ir.VectorType(int16, 32), ir.VectorType(int32, 16)
float32s = ir.VectorType(float32, 16)

# ---- compiled functions, kept on disk


Function = TypeVar("Function", bound=Callable)


def inner(function: Function) -> Function:
    """Decorates a function that only other compiled functions call."""
    return njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


called: Callable[[Callable[..., int]], CalledFunction] = partial(CalledFunction, sources=SOURCES)


# ---- writing instructions


class Writer:
    """Writes instructions: llvmlite's builder with what is needed again and again."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def at(self, address: ir.Value, kind: ir.Type, offset: int = 0) -> ir.Value:
        """A pointer."""
        moved = self.b.add(address, int64(offset)) if offset else address
        return self.b.inttoptr(moved, kind.as_pointer())

    def load(self, kind: ir.Type, address: ir.Value, offset: int = 0) -> ir.Value:
        """What lies at an address."""
        return self.b.load(self.at(address, kind, offset), align=1)

    def store(self, value: ir.Value, address: ir.Value, offset: int = 0) -> None:
        """Write to an address."""
        self.b.store(value, self.at(address, value.type, offset), align=1)

    def all(self, kind: ir.VectorType, value: ir.Value | int | float) -> ir.Value:
        """A number as every element of a vector."""
        if not isinstance(value, ir.Value):
            return ir.Constant(kind, [value] * kind.count)
        undefined = ir.Constant(kind, ir.Undefined)
        one = self.b.insert_element(undefined, value, int32(0))
        return self.b.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(int32, kind.count), [0] * kind.count))

    def shuffled(self, a: ir.Value, b: ir.Value, order: Sequence[int]) -> ir.Value:
        """Elements of two vectors by their numbers, those of the second behind those of the first."""
        return self.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(int32, len(order)), list(order)))

    def call(self, name: str, kind: ir.Type, *arguments: ir.Value) -> ir.Value:
        """Call one of LLVM's functions, or one of the system's library."""
        signature = ir.FunctionType(kind, [argument.type for argument in arguments])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, signature, name), list(arguments))

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """``a b + c``, rounded once."""
        return self.call("llvm.fma.v16f32", float32s, a, b, c)

    def variable(self, kind: ir.Type, first: ir.Value) -> ir.Value:
        """A place for a value that a loop changes."""
        place = cgutils.alloca_once(self.b, kind)
        self.b.store(first, place)
        return place

    def padded(self, address: ir.Value, size: ir.Value, room: int) -> ir.Value:
        """The address of a copy of ``size`` bytes, with zeros behind up to ``room``."""
        place = cgutils.alloca_once(self.b, ir.ArrayType(int8, room))
        place.align = 64
        self.b.store(ir.Constant(ir.ArrayType(int8, room), None), place)
        pointer = self.b.bitcast(place, int8.as_pointer())
        cgutils.raw_memcpy(self.b, pointer, self.at(address, int8), size, 1)
        return self.b.ptrtoint(place, int64)

    # ---- sums of products

    def dot_bytes(self, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        """Add to 16 int32 the products of 64 unsigned bytes with 64 signed ones, four neighbours to each."""
        if VNNI:
            return self.call("llvm.x86.avx512.vpdpbusd.512", int32s, total, a, b)
        one, other = (self.b.bitcast(value, int16s) for value in (a, b))
        eight, wide = self.all(int16s, 8), ir.VectorType(int32, 32)
        even = self.b.and_(one, self.all(int16s, 255)), self.b.ashr(self.b.shl(other, eight), eight)
        odd = self.b.lshr(one, eight), self.b.ashr(other, eight)
        for x, y in (even, odd):  # written so that LLVM finds its instruction for sums of two products of 16 bits
            products = self.b.mul(self.b.sext(x, wide), self.b.sext(y, wide))
            halves = [self.shuffled(products, products, range(begin, 32, 2)) for begin in (0, 1)]
            total = self.b.add(total, self.b.add(*halves))
        return total

    def dot_bf16(self, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        """Add to 16 float32 the products of 32 bf16 with 32 others, two neighbours to each."""
        if BF16:
            pairs = ir.VectorType(_BFloat(), 32)
            one, other = (self.b.bitcast(value, pairs) for value in (a, b))
            return self.call("llvm.x86.avx512bf16.dpbf16ps.512", float32s, total, one, other)
        (a_even, a_odd), (b_even, b_odd) = self.bf16_pairs(a), self.bf16_pairs(b)
        return self.fma(a_odd, b_odd, self.fma(a_even, b_even, total))

    def bf16_pairs(self, a: ir.Value) -> tuple[ir.Value, ir.Value]:
        """32 bf16, as 16 int32, in float32: the even ones, the odd ones."""
        even = self.b.bitcast(self.b.shl(a, self.all(int32s, 16)), float32s)
        return even, self.b.bitcast(self.b.and_(a, self.all(int32s, 0xFFFF0000)), float32s)

    def sums(self, values: Sequence[ir.Value]) -> list[ir.Value]:
        """The sum of the elements of each vector, float32: neighbours at distance 8, then 4, 2 and 1.

        Two vectors become one at each distance, so that sixteen sums cost little more than one.
        """
        level = list(values)
        for distance in (8, 4, 2, 1):
            order = [lane + 16 - distance if lane & distance else lane for lane in range(16)]
            other = [lane + 16 if lane & distance else lane + distance for lane in range(16)]
            pairs = [(level[i], level[min(i + 1, len(level) - 1)]) for i in range(0, len(level), 2)]
            level = [self.b.fadd(self.shuffled(a, b, order), self.shuffled(a, b, other)) for a, b in pairs]
        lanes = [int(f"{i % 16:04b}"[::-1], 2) for i in range(len(values))]  # its number's bits, reversed
        return [self.b.extract_element(level[i // 16], int32(lane)) for i, lane in enumerate(lanes)]


class _BFloat(ir.types.Type):
    """LLVM's bf16, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


# ---- sixteen numbers, as Numba sees them


class _Lanes(types.Type):
    """Sixteen float32."""

    def __init__(self) -> None:
        super().__init__("lanes")


lanes = _Lanes()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, float32s)


def _written(result, kinds, write, name=None):
    """A function of compiled code whose body ``write`` writes; or what compiled code takes ``name`` for."""

    def function(*arguments):
        raise NotImplementedError("only compiled code calls this")

    def generate(context, builder, signature, values):
        found = write(Writer(builder), *values)
        return context.get_dummy_value() if result is types.void else found

    known, name = name is not None, name or function
    lower_builtin(name, *kinds)(generate)
    typed = type("Typed", (ConcreteTemplate,), {"key": name, "cases": [result(*kinds)]})
    if known:
        infer_global(name)(typed)
    else:
        infer_global(name, types.Function(typed))
    return name


_NUMBERS = {types.float32: float32, types.int64: int64, types.int32: int32, lanes: float32s}
for _symbol, _name in (
    (operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv"),
):  # fmt: skip
    _written(lanes, (lanes, lanes), lambda w, a, b, name=_name: getattr(w.b, name)(a, b), _symbol)

splat = _written(lanes, (types.float32,), lambda w, value: w.all(float32s, value))
load = _written(lanes, (types.int64,), lambda w, address: w.load(float32s, address))
store = _written(types.void, (types.int64, lanes), lambda w, address, value: w.store(value, address))
fma = _written(lanes, (lanes, lanes, lanes), lambda w, a, b, c: w.fma(a, b, c))
total = _written(types.float32, (lanes,), lambda w, a: w.sums([a])[0])
# A number that is none stays what it is, where it is the second.
least = _written(lanes, (lanes, lanes), lambda w, a, b: w.b.select(w.b.fcmp_ordered("<", a, b), a, b))
most = _written(lanes, (lanes, lanes), lambda w, a, b: w.b.select(w.b.fcmp_ordered(">", a, b), a, b))
where_positive = _written(
    lanes, (lanes,) * 3, lambda w, x, a, b: w.b.select(w.b.fcmp_ordered(">", x, w.all(float32s, 0.0)), a, b)
)
magnitude = _written(lanes, (lanes,), lambda w, a: w.call("llvm.fabs.v16f32", float32s, a))

number = _written(types.int64, (types.int64,), lambda w, address: w.load(int64, address))
number32 = _written(types.int64, (types.int64,), lambda w, address: w.b.sext(w.load(int32, address), int64))
real = _written(types.float32, (types.int64,), lambda w, address: w.load(float32, address))
set_number = _written(types.void, (types.int64,) * 2, lambda w, address, value: w.store(value, address))
set_real = _written(types.void, (types.int64, types.float32), lambda w, address, value: w.store(value, address))


def _real_bf16(w, address):
    return w.b.bitcast(w.b.shl(w.b.zext(w.load(int16, address), int32), int32(16)), float32)


def _rounded(w, values):
    """float32 to the nearest bf16, of two equally near ones the even; as int32 in whose low half it stands."""
    kind = int32 if values.type == float32 else int32s
    bits = w.b.bitcast(values, kind)
    amount, one, half = (kind(n) if kind is int32 else w.all(kind, n) for n in (16, 1, 0x7FFF))
    high = w.b.lshr(bits, amount)
    up = w.b.lshr(w.b.add(bits, w.b.add(half, w.b.and_(high, one))), amount)
    none = kind(0x7FC0) if kind is int32 else w.all(kind, 0x7FC0)
    return w.b.select(w.b.fcmp_unordered("uno", values, values), none, up)


real_bf16 = _written(types.float32, (types.int64,), _real_bf16)
set_bf16 = _written(
    types.void, (types.int64, types.float32), lambda w, address, a: w.store(w.b.trunc(_rounded(w, a), int16), address)
)


def _times_power(w, a, power):
    """``a`` times 2 to the integer in the low bits of ``power``."""
    bits = w.b.shl(w.b.bitcast(power, int32s), w.all(int32s, 23))
    return w.b.bitcast(w.b.add(w.b.bitcast(a, int32s), bits), float32s)


times_power = _written(lanes, (lanes, lanes), _times_power)


def _highest(w, a):
    for distance in (8, 4, 2, 1):
        other = w.shuffled(a, a, [(lane + distance) % 16 for lane in range(16)])
        a = w.b.select(w.b.fcmp_ordered(">", a, other), a, other)
    return w.b.extract_element(a, int32(0))


highest = _written(types.float32, (lanes,), _highest)

# ---- what threads share


def _added(w, address, value):
    return w.b.atomic_rmw("add", w.at(address, int64), value, "seq_cst")


def _asked(w, address):
    """For reading, into the second level of the core's cache."""
    w.call("llvm.prefetch.p0", ir.VoidType(), w.at(address, int8), int32(0), int32(2), int32(1))


def _pause(w):
    """Leave the core to its other thread for a moment."""
    if llvm.get_default_triple().startswith("x86_64"):
        w.call("llvm.x86.sse2.pause", ir.VoidType())


def _give_way(w):
    """Leave the core to whoever waits for it."""
    if os.name == "posix":
        w.call("sched_yield", int32)


# Reads a byte that nobody wants: so the processor brings its line of the cache, and guesses the next ones.
touch = _written(types.void, (types.int64,), lambda w, a: w.b.load_atomic(w.at(a, int8), "monotonic", 1) and None)
# Asks for a byte, and does not wait for it.
ask_for = _written(types.void, (types.int64,), _asked)
add_shared = _written(types.int64, (types.int64,) * 2, _added)
read_shared = _written(
    types.int64, (types.int64,), lambda w, address: w.b.load_atomic(w.at(address, int64), "seq_cst", 8)
)
pause, give_way = _written(types.void, (), _pause), _written(types.void, (), _give_way)


# ---- packing: what a product makes of its inputs first


def _pack_bf16(w, source, target):
    """32 float32 to bf16."""
    halves = [w.b.trunc(_rounded(w, w.load(float32s, source, 64 * i)), ir.VectorType(int16, 16)) for i in (0, 1)]
    w.store(w.shuffled(*halves, range(32)), target)


def _codes(w, source, factor):
    """Sixteen numbers times ``factor``, rounded, as high and low bytes: code = 256 high + low, low from -128 to 127."""
    magic = 12_582_912.0  # 1.5 x 2^23: what is added to it is rounded to an integer in its low bits
    scaled = w.fma(w.load(float32s, source), w.all(float32s, factor), w.all(float32s, magic))
    code = w.b.sub(w.b.bitcast(scaled, int32s), w.all(int32s, 0x4B400000))
    high = w.b.ashr(w.b.add(code, w.all(int32s, 128)), w.all(int32s, 8))
    few = ir.VectorType(int8, 16)
    return w.b.trunc(high, few), w.b.trunc(code, few)


def _pack_int8(w, source, target, sums, factor):
    """64 float32 to 64 high and 64 low bytes; -128 times each four of them is added to sums of either kind."""
    for i in range(4):
        for part, found in enumerate(_codes(w, w.b.add(source, int64(64 * i)), factor)):
            w.store(found, target, 64 * part + 16 * i)
    weight = w.all(int8s, 128)
    for part in range(2):
        added = w.dot_bytes(w.all(int32s, 0), weight, w.load(int8s, target, 64 * part))
        w.store(w.b.sub(w.load(int32s, sums, 64 * part), added), sums, 64 * part)


def _pack_int4(w, source, target, factor):
    """128 float32 to bytes: high ones of even places and of odd ones, low ones; and the sums of each eight codes."""
    for i in range(4):
        pair = [_codes(w, w.b.add(source, int64(128 * i + 64 * half)), factor) for half in range(2)]
        for part in range(2):
            for odd in range(2):
                order = range(odd, 32, 2)
                w.store(w.shuffled(pair[0][part], pair[1][part], order), target, 128 * part + 64 * odd + 16 * i)
    weight = w.all(int8s, 1)
    sums = w.all(int32s, 0)
    for part in range(2):
        for odd in range(2):
            sums = w.dot_bytes(sums, weight, w.load(int8s, target, 128 * part + 64 * odd))
        sums = sums if part else w.b.shl(sums, w.all(int32s, 8))
    w.store(sums, target, 256)


pack_bf16 = _written(types.void, (types.int64,) * 2, _pack_bf16)
pack_int8 = _written(types.void, (types.int64,) * 3 + (types.float32,), _pack_int8)
pack_int4 = _written(types.void, (types.int64,) * 2 + (types.float32,), _pack_int4)

# ---- products: rows of weights with tokens

FLOAT32, BFLOAT16, INT8, INT4 = range(4)
WEIGHT, ROW, SCALE, SCALE_ROW, ZERO, ZERO_ROW, LAST, UNITS, TAIL = range(9)  # numbers that tell of a matrix
HEADER, UNIT = 192, (64, 64, 128, 320)  # bytes of a packed input: in front, and for each unit of weights


class _Tile:
    """A few rows of weights times a few tokens.

    Each weight is read once, and each pair of row and token has sums of its own: so the numbers of a token do not hang
    on how many others there are.

    Args:
        matrix: address of the numbers that tell of the weights.
        row, apart: the first row, and how far apart they are; rows past the last one are the last one.
        x, x_stride: packed inputs of the first token, and how far apart the tokens' are.
    """

    def __init__(self, w: Writer, kind: int, group: int, zero: int, rows: int, tokens: int, values: Any) -> None:
        self.w, self.kind, self.group, self.zero = w, kind, group, bool(zero)
        matrix, row, apart, x, x_stride = values
        fields = [w.load(int64, matrix, 8 * field) for field in range(9)]
        last, self.units, self.tail = fields[LAST], fields[UNITS], fields[TAIL]
        self.rows = []
        for i in range(rows):
            place = w.b.add(row, w.b.mul(apart, int64(i)))
            place = w.b.select(w.b.icmp_signed("<", place, last), place, last)
            addresses = [
                w.b.add(fields[base], w.b.mul(place, fields[stride]))
                for base, stride in ((WEIGHT, ROW), (SCALE, SCALE_ROW), (ZERO, ZERO_ROW))
            ]
            self.rows.append(addresses)
        self.tokens = [w.b.add(x, w.b.mul(x_stride, int64(i))) for i in range(tokens)]
        integers = kind == INT8
        first = w.all(int32s, 0) if integers else w.all(float32s, 0.0)
        self.totals = [
            [
                [
                    w.variable(first.type, w.load(int32s, token, 64 + 64 * part) if integers else first)
                    for part in range(1 + integers)
                ]
                for token in self.tokens
            ]
            for _ in self.rows
        ]

    def sums(self) -> list[ir.Value]:
        """The products, row after row."""
        w = self.w
        with cgutils.for_range(w.b, self.units) as loop:
            at = w.b.mul(loop.index, int64(64))
            self._unit([w.b.add(addresses[0], at) for addresses in self.rows], loop.index, None)
        with w.b.if_then(w.b.icmp_signed(">", self.tail, int64(0)), likely=False):
            at = w.b.mul(self.units, int64(64))
            self._unit([w.padded(w.b.add(a[0], at), self.tail, 64) for a in self.rows], self.units, self.tail)
        if self.kind != INT8:
            return w.sums([w.b.load(place) for row in self.totals for (place,) in row])
        found = []
        for row in self.totals:
            for high, low in row:
                parts = [w.b.sitofp(w.b.load(place), float32s) for place in (high, low)]
                found.append(w.fma(w.all(float32s, 256.0), *parts))
        return w.sums(found)

    def _unit(self, weights: Sequence[ir.Value], index: ir.Value, tail: ir.Value | None) -> None:
        w = self.w
        at = w.b.add(w.b.mul(index, int64(UNIT[self.kind])), int64(HEADER))
        tokens = [w.b.add(token, at) for token in self.tokens]
        if self.kind == INT4:
            self._unit_of_int4(weights, tokens, index, tail)
            return
        kind = {FLOAT32: float32s, BFLOAT16: int32s, INT8: int8s}[self.kind]
        read = [w.load(kind, address) for address in weights]
        if self.kind == INT8:
            read = [w.b.xor(value, w.all(int8s, 128)) for value in read]  # plus 128: unsigned
        for number, token in enumerate(tokens):
            for part in range(1 + (self.kind == INT8)):
                x = w.load(kind, token, 64 * part)
                for row, weight in enumerate(read):
                    place = self.totals[row][number][part]
                    w.b.store(self._product(w.b.load(place), weight, x), place)

    def _product(self, total: ir.Value, weight: ir.Value, x: ir.Value) -> ir.Value:
        if self.kind == FLOAT32:
            return self.w.fma(weight, x, total)
        return self.w.dot_bf16(total, weight, x) if self.kind == BFLOAT16 else self.w.dot_bytes(total, weight, x)

    def _unit_of_int4(
        self, weights: Sequence[ir.Value], tokens: Sequence[ir.Value], index: ir.Value, tail: ir.Value | None
    ) -> None:
        """Codes times 16-bit inputs in whole numbers, then times the scales of their groups."""
        w, fifteen = self.w, self.w.all(int8s, 15)
        rows = []
        for row, address in enumerate(weights):
            code = w.load(int8s, address)
            even, odd = w.b.and_(code, fifteen), w.b.lshr(code, w.all(int8s, 4))
            scale = self._of_groups(self.rows[row][1], float32, index, tail)
            zero = w.b.zext(self._of_groups(self.rows[row][2], int8, index, tail), int32s) if self.zero else None
            rows.append((even, odd, scale, zero))
        for number, token in enumerate(tokens):
            x = [w.load(int8s, token, 64 * part) for part in range(4)]
            sums = w.load(int32s, token, 256)
            less = w.b.shl(sums, w.all(int32s, 3))
            for row, (even, odd, scale, zero) in enumerate(rows):
                nothing = w.all(int32s, 0)
                high = w.dot_bytes(w.dot_bytes(nothing, even, x[0]), odd, x[1])
                low = w.dot_bytes(w.dot_bytes(nothing, even, x[2]), odd, x[3])
                whole = w.b.add(w.b.shl(high, w.all(int32s, 8)), low)
                whole = w.b.sub(whole, less if zero is None else w.b.mul(zero, sums))
                place = self.totals[row][number][0]
                w.b.store(w.fma(w.b.sitofp(whole, float32s), scale, w.b.load(place)), place)

    def _of_groups(self, address: ir.Value, kind: ir.Type, index: ir.Value, tail: ir.Value | None) -> ir.Value:
        """What each group of a unit has, for its share of 16 elements."""
        w, count, size = self.w, 128 // self.group, 4 if kind == float32 else 1
        at = w.b.add(address, w.b.mul(index, int64(count * size)))
        if tail is not None:
            at = w.padded(at, w.b.mul(w.b.udiv(tail, int64(self.group // 2)), int64(size)), 16)
        found = w.load(ir.VectorType(kind, count), at)
        return w.shuffled(found, found, [lane * count // 16 for lane in range(16)])


@intrinsic(prefer_literal=True)
def multiply(typing_context, kind, group, zero, rows, tokens, matrix, row, apart, x, x_stride, result, stride):
    """Products of rows, ``apart`` from each other, with tokens.

    Args:
        kind, group, zero, rows, tokens: known when this is compiled: the kind of the weights, inputs to a scale of
            int4, whether it has zero points, how many rows and tokens.
        matrix, row, apart, x, x_stride: as for a tile.
        result, stride: where the first float32 goes, those of other rows ``apart`` places behind it, and how many bytes
            lie between tokens.
    """
    shape = [value.literal_value for value in (kind, group, zero, rows, tokens)]

    def generate(context, builder, signature, values):
        w = Writer(builder)
        tile = _Tile(w, *shape, values[5:10])
        integers = shape[0] in (INT8, INT4)
        for number, found in enumerate(tile.sums()):
            of, token = divmod(number, shape[4])
            if integers:
                found = builder.fmul(found, w.load(float32, tile.tokens[token]))
            if shape[0] == INT8:
                found = builder.fmul(found, w.load(float32, tile.rows[of][1]))
            place = builder.add(values[10], builder.mul(values[11], int64(token)))
            w.store(found, builder.add(place, builder.mul(values[7], int64(4 * of))))
        return context.get_dummy_value()

    return types.void(kind, group, zero, rows, tokens, *(types.int64,) * 7), generate
