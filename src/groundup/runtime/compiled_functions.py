"""Functions that Numba compiles once per machine, and that are called by their address."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.compiler import Compiler
from numba.core.runtime import rtsys  # type: ignore[attr-defined]
from numba.extending import intrinsic


def digest_of(files: Iterable[Path]) -> str:
    """What compiled functions are kept under: any change in the files compiles all of them anew."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class _Cache(FunctionCache):
    """Compiled functions on disk. Numba's own cache would not notice a change in another file than the function's."""

    def __init__(self, function: Callable, sources: str) -> None:
        self._sources = sources
        super().__init__(function)

    def _index_key(self, sig: Any, codegen: Any) -> tuple:
        return (*super()._index_key(sig, codegen), self._sources)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        # Without first loading all that the compiler knows: compiled code needs its memory manager and nothing else.
        rtsys.initialize(target_context)
        return self._load_overload(sig, target_context)

    def save_overload(self, sig: Any, data: Any) -> None:
        # Without the listing of all types for people: writing it took a twentieth of the time to compile.
        super().save_overload(sig, data._replace(type_annotation=""))


def keep_on_disk(compiled: Any, function: Callable, sources: str) -> None:
    """Have Numba look for a compiled function on the disk first, and write it there.

    Args:
        compiled: what Numba made of the function.
        sources: see :func:`digest_of`.
    """
    with suppress(RuntimeError):  # where no folder can be written to, each process compiles anew
        compiled._cache = _Cache(function, sources)


class CalledFunction:
    """A function that Python and compiled functions call, these by :func:`call` and its address.

    So it is compiled by itself, at first use, and only once: a function that calls another one the usual way is
    optimised together with all of it. Arguments and result are signed integers of 64 bits. Called by Python, it lets
    other threads run.

    Args:
        function: what it does.
        sources: see :func:`digest_of`.
        pipeline: Numba's compiler, or one with other passes.
    """

    def __init__(self, function: Callable[..., int], sources: str, pipeline: type[Compiler] = Compiler) -> None:
        self._function, self._sources, self._pipeline = function, sources, pipeline
        self.__doc__ = function.__doc__

    @cached_property
    def _compiled(self) -> Any:
        kinds = (types.int64,) * self._function.__code__.co_argcount
        options = {"error_model": "numpy"}
        compiled = CFunc(self._function, (kinds, types.int64), {}, options, pipeline_class=self._pipeline)
        keep_on_disk(compiled, self._function, self._sources)
        compiled.compile()
        return compiled

    @property
    def address(self) -> int:
        """Where the compiled function lies in memory."""
        return int(self._compiled.address)

    @property
    def ctypes(self) -> Callable[..., int]:
        """The compiled function, for Python."""
        found: Callable[..., int] = self._compiled.ctypes
        return found

    def __call__(self, *arguments: int) -> int:
        """Call it from Python."""
        return self.ctypes(*arguments)


@intrinsic
def call(typing_context: Any, address: Any, *arguments: Any) -> Any:
    """Call a :class:`CalledFunction` from compiled code."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        number = ir.IntType(64)
        kind = ir.FunctionType(number, [number] * len(arguments))
        passed = [builder.extract_value(values[1], place) for place in range(len(arguments))]
        return builder.call(builder.inttoptr(values[0], kind.as_pointer()), passed)

    return types.int64(types.int64, types.UniTuple(types.int64, len(arguments))), generate
