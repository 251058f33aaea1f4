"""The default corpus: the Python standard library's documentation and source, as it lies on this machine.

Three parts: the topics of ``help()``, the docstrings of modules written in C, and the source of all others
(whose docstrings it contains), but for tables such as character maps. About 0.5, 0.6 and 9.9 MB with CPython 3.11;
smaller where a distribution leaves some of it out.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
import types
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from groundup.data.document import Document, Dropped
from groundup.runtime import GroundupError

# Tests, other people's packages, what was generated for this one machine, and the topics that are read as
# text already.
_LEFT_OUT = re.compile(
    r"^(tests?|idle_test|site-packages|dist-packages|__pycache__|pydoc_data|config-.*|_sysconfigdata.*)$"
)

# Importing these does something: readline writes to the terminal, _tkinter looks for a display; the others
# are CPython's own tests.
_NOT_IMPORTED = re.compile(r"^(readline|_tkinter|_test.*|_xx.*|xx.*|_ctypes_test)$")


TABLE = "a table of literals"
# A line that is one or more literals: '\u0041',  # LATIN …   0x80: None,   ('name', 12),
_ROW = re.compile(r"""^\s*[\[({]*\s*(u?b?['"]|0x|-?\d|\\).*[,:\])}'"]\s*(#.*)?$""")
_TABLE_LINES = 50  # shorter modules are kept whatever they hold


def stdlib_documents(skip: Callable[[Dropped], None]) -> Iterator[Document]:
    """Yield the standard library's topics, docstrings and modules, in a fixed order.

    Raises:
        GroundupError: this Python has none of them.
    """
    found = False
    for part in (_topics(), _docstrings(skip), _sources(skip)):
        for document in part:
            found = True
            yield document
    if not found:
        raise GroundupError(
            "this Python carries no source or documentation of its library. Pass your own text with --data."
        )


def stdlib_sources() -> Iterator[tuple[str, str]]:
    """Yield the modules written in Python, each with its dotted name, in a fixed order.

    Raises:
        GroundupError: this Python has none.
    """
    found = False
    for document in _sources(lambda dropped: None):
        found = True
        yield document.name.removeprefix("stdlib/").removesuffix(".py").replace("/", "."), document.text
    if not found:
        raise GroundupError("this Python carries no source of its library. Pass your own examples with --data.")


def stdlib_identity() -> dict[str, Any]:
    """The interpreter that the library belongs to."""
    return {"python": sys.version, "folder": sysconfig.get_paths()["stdlib"]}


def module_group(module: str) -> str:
    """The group of a module: its top-level name, where ``_io`` and ``_pyio`` belong to ``io``."""
    top = module.partition(".")[0]
    return "stdlib/" + (re.sub(r"^_(py)?(?=[a-z])", "", top) or top)


def _topics() -> Iterator[Document]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):  # some distributions leave it out
        return
    for name in sorted(topics):
        yield Document(topics[name], f"pydoc/{name}")


def _docstrings(skip: Callable[[Dropped], None]) -> Iterator[Document]:
    described: set[int] = set()  # what is described once is not described again under a second name
    for name in sorted(sys.stdlib_module_names):
        if _NOT_IMPORTED.match(name) or not _is_compiled(name):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # that a module is deprecated is no news to someone reading its documentation
                module = importlib.import_module(name)
        except Exception as error:  # an optional library is missing, or refuses to load: the corpus is smaller, no more
            skip(Dropped(f"docs/{name}", "cannot be imported", str(error)))
            continue
        text = "\n\n".join(_describe_module(module, described))
        if text:
            yield Document(text + "\n", f"docs/{name}", group=module_group(name))


def _is_compiled(name: str) -> bool:
    """Whether a module is built into the interpreter or is an extension, and so has no Python source."""
    if name in sys.builtin_module_names:
        return True
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None and spec.origin.endswith(tuple(EXTENSION_SUFFIXES))


def _describe_module(module: types.ModuleType, described: set[int]) -> Iterator[str]:
    """The module's own docstring, then its public functions, and classes with their members."""
    name = module.__name__
    if module.__doc__:
        yield f"{name}\n{'=' * len(name)}\n\n{inspect.cleandoc(module.__doc__)}"
    for attribute in sorted(vars(module)):
        value = getattr(module, attribute)
        if attribute.startswith("_") or id(value) in described:
            continue
        if inspect.isbuiltin(value):
            described.add(id(value))
            yield from _describe(value, f"{name}.{attribute}")
        elif inspect.isclass(value):
            described.add(id(value))
            yield from _describe(value, f"class {name}.{attribute}")
            for member in sorted(vars(value)):
                if not member.startswith("_"):  # __eq__ and the like have the same words in every class
                    yield from _describe(vars(value)[member], f"{name}.{attribute}.{member}")


def _describe(value: Any, title: str) -> Iterator[str]:
    text = getattr(value, "__doc__", None)
    if (
        isinstance(text, str) and text.strip() and text != type(value).__doc__
    ):  # a constant has only its type's docstring
        # The C signature is a plain string; inspect.signature would print default values with their
        # addresses.
        signature = getattr(value, "__text_signature__", None) or ""
        signature = re.sub(r"\(\$(self|module|type)(, )?/?(, )?", "(", signature)
        body = "\n".join("    " + line if line else "" for line in inspect.cleandoc(text).split("\n"))
        yield f"{title}{signature}\n{body}"


def _is_table(source: str) -> bool:
    """Whether most lines of a module are rows of a table: character maps, entity names, locale aliases.

    There are 1.4 MB of those, near-copies of one another. They are neither documentation nor source that anyone reads,
    and one of them in the held-out text would outweigh everything else there.
    """
    lines = [line for line in source.split("\n") if line.strip()]
    return len(lines) >= _TABLE_LINES and sum(map(bool, map(_ROW.match, lines))) > len(lines) / 2


def _sources(skip: Callable[[Dropped], None]) -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])  # of the base interpreter, also inside a virtual environment
    for here, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not _LEFT_OUT.match(name))
        for name in sorted(names):
            if not name.endswith(".py") or _LEFT_OUT.match(name.removesuffix(".py")):
                continue
            path = Path(here, name)
            label = path.relative_to(root).as_posix()
            try:
                text = path.read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                skip(Dropped(f"stdlib/{label}", "cannot be read", str(error)))
                continue
            if _is_table(text):
                skip(Dropped(f"stdlib/{label}", TABLE))
                continue
            module = label.removesuffix(".py").replace("/", ".")
            yield Document(text, f"stdlib/{label}", group=module_group(module))
