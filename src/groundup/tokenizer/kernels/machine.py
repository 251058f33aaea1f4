"""What the kernels need of the machine: bytes at an address, sixty-four of them at once, and Python's strings.

Kernels work on addresses, plain integers: passing NumPy arrays around would count references and halve the speed.
The price is that nothing checks bounds. Every buffer's size is fixed in compiled.py, beside the reason why it suffices.

Integers are signed and of 64 bits, but bitmaps, hashes and keys are unsigned: Numba would turn a mixture of both into
floating point.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

u64 = np.uint64
ZERO, ONE, ALL = u64(0), u64(1), u64(0xFFFF_FFFF_FFFF_FFFF)

SOURCES = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


class _Cache(FunctionCache):
    """Compiled functions on disk. Numba's own cache would not notice a change in another file than the function's."""

    def _index_key(self, sig: Any, codegen: Any) -> tuple:
        return (*super()._index_key(sig, codegen), SOURCES)


Function = TypeVar("Function", bound=Callable)


def inner(function: Function) -> Function:
    """Decorates a function that only other compiled functions call."""
    return njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


def kernel(function: Function, nogil: bool = True) -> Function:
    """Decorates a function that Python calls: compiled once per machine, it lets other threads run."""
    compiled = njit(error_model="numpy", nogil=nogil)(function)
    with suppress(RuntimeError):  # where no folder can be written to, each process compiles anew
        compiled._cache = _Cache(function)
    return compiled


def holding_lock(function: Function) -> Function:
    """Decorates a function that Python calls and that looks into Python objects: no other thread runs meanwhile."""
    return kernel(function, nogil=False)


# ---- bytes in memory


def _loader(bits):
    @intrinsic
    def load(typing_context, address):
        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            value = builder.load(pointer, align=1)
            return value if bits == 64 else builder.zext(value, ir.IntType(64))

        return (types.uint64 if bits == 64 else types.int64)(types.int64), generate

    return load


def _storer(bits):
    @intrinsic
    def store(typing_context, address, value):
        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            value = arguments[1] if bits == 64 else builder.trunc(arguments[1], ir.IntType(bits))
            builder.store(value, pointer, align=1)
            return context.get_dummy_value()

        return types.void(types.int64, value), generate

    return store


load8, load32, load64 = _loader(8), _loader(32), _loader(64)
store32, store64 = _storer(32), _storer(64)


@intrinsic
def bytes_between(typing_context, address, also, low, count):
    """A bit for each of the 64 bytes at ``address``: is ``(byte | also) - low`` within ``0 .. count - 1``?"""

    def generate(context, builder, signature, arguments):
        vector = ir.VectorType(ir.IntType(8), 64)
        value = builder.load(builder.inttoptr(arguments[0], vector.as_pointer()), align=1)
        also, low, count = (_everywhere(builder, vector, builder.trunc(a, ir.IntType(8))) for a in arguments[1:])
        shifted = builder.sub(builder.or_(value, also), low)
        return builder.bitcast(builder.icmp_unsigned("<", shifted, count), ir.IntType(64))

    return types.uint64(types.int64, types.int64, types.int64, types.int64), generate


def _everywhere(builder, vector, number):
    """A number as every element of a vector."""
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.IntType(32)(0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), lanes)


@intrinsic
def zeros_before(typing_context, bits):
    """How many zero bits stand before the first one bit, counted from the lowest; 64 when there is none."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@intrinsic
def zeros_above(typing_context, bits):
    """How many zero bits stand above the highest one bit; 64 when there is none."""

    def generate(context, builder, signature, arguments):
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), generate


@intrinsic
def lowest_of_16(typing_context, address):
    """The lowest of sixteen unsigned 32-bit numbers and the first place where it is: ``number << 8 | place``."""

    def generate(context, builder, signature, arguments):
        number, vector = ir.IntType(32), ir.VectorType(ir.IntType(32), 16)
        values = builder.load(builder.inttoptr(arguments[0], vector.as_pointer()), align=1)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(number, [vector]), "llvm.vector.reduce.umin.v16i32"
        )
        lowest = builder.call(function, [values])
        equal = builder.icmp_unsigned("==", values, _everywhere(builder, vector, lowest))
        place = builder.cttz(builder.bitcast(equal, ir.IntType(16)), ir.Constant(ir.IntType(1), 1))
        wide = ir.IntType(64)
        return builder.or_(builder.shl(builder.zext(lowest, wide), wide(8)), builder.zext(place, wide))

    return types.int64(types.int64), generate


@intrinsic
def put_in_16(typing_context, address, place, value):
    """Write one of sixteen 32-bit numbers by writing all of them; nothing changes when there is no such place.

    A processor that has just written a few bytes must wait before it can read more than those at once.
    """

    def generate(context, builder, signature, arguments):
        number, vector = ir.IntType(32), ir.VectorType(ir.IntType(32), 16)
        address, place, value = arguments
        pointer = builder.inttoptr(address, vector.as_pointer())
        places = ir.Constant(vector, list(range(16)))
        here = builder.icmp_signed("==", places, _everywhere(builder, vector, builder.trunc(place, number)))
        new = _everywhere(builder, vector, builder.trunc(value, number))
        builder.store(builder.select(here, new, builder.load(pointer, align=1)), pointer, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def look_in_4(typing_context, address, key, bits):
    """Look for a key in four 64-bit slots, each a key and then ``bits`` bits of value, or nothing but ones.

    All at once, so that no branch has to guess in which slot it is, or whether.

    Returns:
        The value, all ones when the key is not there; and bit 32 when it may be behind: none of the slots is empty.
    """

    def generate(context, builder, signature, arguments):
        wide, number = ir.VectorType(ir.IntType(64), 4), ir.VectorType(ir.IntType(32), 4)
        address, key, bits = arguments
        slots = builder.load(builder.inttoptr(address, wide.as_pointer()), align=1)
        none = builder.sub(builder.shl(ir.IntType(64)(1), bits), ir.IntType(64)(1))
        missing = _everywhere(builder, number, builder.trunc(none, ir.IntType(32)))
        keys = builder.lshr(slots, _everywhere(builder, wide, bits))
        values = builder.trunc(builder.and_(slots, _everywhere(builder, wide, none)), number)
        equal = builder.icmp_unsigned("==", keys, _everywhere(builder, wide, key))
        lowest = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.IntType(32), [number]), "llvm.vector.reduce.umin.v4i32"
        )
        value = builder.zext(builder.call(lowest, [builder.select(equal, values, missing)]), ir.IntType(64))
        empty = builder.bitcast(builder.icmp_signed("==", slots, ir.Constant(wide, [-1] * 4)), ir.IntType(4))
        behind = builder.and_(
            builder.icmp_unsigned("==", value, none), builder.icmp_unsigned("==", empty, ir.IntType(4)(0))
        )
        return builder.or_(value, builder.shl(builder.zext(behind, ir.IntType(64)), ir.IntType(64)(32)))

    return types.int64(types.int64, types.uint64, types.int64), generate


@intrinsic
def prefetch(typing_context, address):
    """Ask the processor to bring the bytes at ``address`` near, without waiting for them."""

    def generate(context, builder, signature, arguments):
        number, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        reading, keep, data = (ir.Constant(number, value) for value in (0, 3, 1))
        builder.call(function, [builder.inttoptr(arguments[0], pointer), reading, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def copy_bytes(typing_context, target, source, size):
    """Copy ``size`` bytes between places that do not overlap."""

    def generate(context, builder, signature, arguments):
        target, source = (builder.inttoptr(a, cgutils.voidptr_t) for a in arguments[:2])
        cgutils.raw_memcpy(builder, target, source, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


# ---- Python strings


@intrinsic
def item_of(typing_context, a_list, place):
    """The address of an item of a Python list. The caller holds the interpreter's lock, and keeps the list."""

    def generate(context, builder, signature, arguments):
        number = ir.IntType(64)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(number, [number, number]), "PyList_GetItem"
        )
        return builder.call(function, arguments)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def utf8_of(typing_context, string, size):
    """The address of a Python string's UTF-8 bytes, whose number is written to ``size``; 0 when it has none.

    They live as long as the string. The caller holds the interpreter's lock.
    """

    def generate(context, builder, signature, arguments):
        number = ir.IntType(64)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(number, [number, number]), "PyUnicode_AsUTF8AndSize"
        )
        address = builder.call(function, arguments)
        with builder.if_then(builder.icmp_signed("==", address, number(0))):
            clear = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), []), "PyErr_Clear")
            builder.call(clear, [])
        return address

    return types.int64(types.int64, types.int64), generate


@intrinsic
def field(typing_context, state, number):
    """Number ``number`` of an array of 64-bit integers."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load(builder.gep(pointer, [arguments[1]]))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def set_field(typing_context, state, number, value):
    """Write number ``number`` of an array of 64-bit integers."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store(arguments[2], builder.gep(pointer, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate
