"""What the kernels need of the machine: bytes at an address, sixty-four of them at once, and Python's strings.

Kernels work on addresses, plain integers: passing NumPy arrays around would count references and halve the speed.
The price is that nothing checks bounds. Every buffer's size is fixed in compiled.py, beside the reason why it suffices.

Integers are signed and of 64 bits, but bitmaps, hashes and keys are unsigned: Numba would turn a mixture of both into
floating point.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, config
from numba.core.compiler import Compiler
from numba.extending import intrinsic

from groundup.runtime.compiled_functions import CalledFunction, digest_of, keep_on_disk

u64 = np.uint64
ZERO, ONE, ALL = u64(0), u64(1), u64(0xFFFF_FFFF_FFFF_FFFF)

SOURCES = digest_of(sorted(Path(__file__).parent.glob("*.py")))

Function = TypeVar("Function", bound=Callable)


class _Scalar(Compiler):
    """Numba's compiler without its vectorizer of loops. Ours are short; what shall be a vector is written as one."""

    def compile_extra(self, func: Any) -> Any:
        kept, config.LOOP_VECTORIZE = config.LOOP_VECTORIZE, 0
        try:
            return super().compile_extra(func)
        finally:
            config.LOOP_VECTORIZE = kept


def _compiled(function: Callable, **options: bool) -> Any:
    """A function that is compiled at its first call, and once: not again for each constant among its arguments."""
    compiled = njit(error_model="numpy", pipeline_class=_Scalar, **options)(function)
    template = compiled.get_call_template
    compiled.get_call_template = lambda kinds, kws: template([types.unliteral(kind) for kind in kinds], kws)
    return compiled


def inner(function: Function) -> Function:
    """Decorates a function that only other compiled functions call, and which becomes part of each of them."""
    return _compiled(function, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def kernel(function: Function, nogil: bool = True) -> Function:
    """Decorates a function that Python calls: compiled once per machine, it lets other threads run."""
    compiled = _compiled(function, nogil=nogil)
    keep_on_disk(compiled, function, SOURCES)
    return compiled


called: Callable[[Callable[..., int]], CalledFunction] = partial(CalledFunction, sources=SOURCES, pipeline=_Scalar)


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
store8, store32, store64 = _storer(8), _storer(32), _storer(64)


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
def fill_16(typing_context, address, value):
    """Write a number to sixteen places of 32 bits."""

    def generate(context, builder, signature, arguments):
        vector = ir.VectorType(ir.IntType(32), 16)
        values = _everywhere(builder, vector, builder.trunc(arguments[1], ir.IntType(32)))
        builder.store(values, builder.inttoptr(arguments[0], vector.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


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


def _python(builder, name, arguments, returns=True):
    """Call a function of Python's; arguments are numbers or addresses. The caller holds the interpreter's lock."""
    number = ir.IntType(64)
    kind = ir.FunctionType(number if returns else ir.VoidType(), [number] * len(arguments))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


@intrinsic
def item_of(typing_context, a_list, place):
    """The address of an item of a Python list. The caller holds the interpreter's lock, and keeps the list."""

    def generate(context, builder, signature, arguments):
        return _python(builder, "PyList_GetItem", arguments)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def new_list(typing_context, size):
    """The address of a new Python list with empty places, all of which must be filled; 0 when there is no memory."""

    def generate(context, builder, signature, arguments):
        return _python(builder, "PyList_New", arguments)

    return types.int64(types.int64), generate


@intrinsic
def give_item(typing_context, a_list, place, item):
    """Put an object into a Python list, which owns it from now on."""

    def generate(context, builder, signature, arguments):
        _python(builder, "PyList_SetItem", arguments)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def share_item(typing_context, a_list, place, item):
    """Put an object into a Python list that others own as well."""

    def generate(context, builder, signature, arguments):
        _python(builder, "Py_IncRef", arguments[2:], returns=False)
        _python(builder, "PyList_SetItem", arguments)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def utf8_of(typing_context, string, size):
    """The address of a Python string's UTF-8 bytes, whose number is written to ``size``; 0 when it has none.

    They live as long as the string. The caller holds the interpreter's lock.
    """

    def generate(context, builder, signature, arguments):
        address = _python(builder, "PyUnicode_AsUTF8AndSize", arguments)
        with builder.if_then(builder.icmp_signed("==", address, ir.IntType(64)(0))):
            _python(builder, "PyErr_Clear", [], returns=False)
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
