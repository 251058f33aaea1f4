"""Questions and answers, and labelled texts, out of the standard library's docstrings: records that need no download.

    {"prompt": "What does shutil.copytree do?", "completion": "Recursively copy a directory tree and return …",
     "text": the same words, "label": "function"}

A model pretrained on the library's source has read these words, in another form. The labels say what is described: a
class, a function or a method. The sources are parsed and nothing is imported.
"""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

from groundup.data.stdlib_source import stdlib_sources

LONGEST = 400  # characters of an answer
SHORTEST = 15
_PRIVATE = re.compile(r"(^|\.)_")


def stdlib_records() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield records, each with its name, in an order that is the same for one Python and follows no module, so that the
    first thousand are of all of them.

    Raises:
        GroundupError: this Python carries no source of its library.
    """
    found: dict[str, tuple[str, str]] = {}
    for module, source in stdlib_sources():
        if _PRIVATE.search(module) or module.startswith(("idlelib", "lib2to3", "turtledemo")):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an escape that a later Python refuses
                tree = ast.parse(source)
        except (SyntaxError, ValueError):  # templates, such as those of lib2to3's tests
            continue
        for name, kind, text in _described(tree.body, module.removesuffix(".__init__"), "function"):
            found.setdefault(text, (name, kind))  # the same words again say nothing new
    ranked = sorted(found, key=lambda text: blake2b(text.encode("utf-8", "replace"), digest_size=8).digest())
    for number, text in enumerate(ranked, 1):
        name, kind = found[text]
        asked = f"What is {name}?" if kind == "class" else f"What does {name} do?"
        yield f"stdlib#{number}", {"prompt": asked, "completion": text, "text": text, "label": kind}


def _described(body: list[ast.stmt], where: str, kind: str) -> Iterator[tuple[str, str, str]]:
    """Public definitions with a docstring: name, kind, and the docstring's first paragraph on one line."""
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        is_class, name = isinstance(node, ast.ClassDef), f"{where}.{node.name}"
        text = " ".join(inspect.cleandoc(ast.get_docstring(node) or "").partition("\n\n")[0].split())
        if SHORTEST <= len(text) <= LONGEST and not text.startswith((">>>", node.name + "(")):
            yield name, "class" if is_class else kind, text
        if is_class:
            yield from _described(node.body, name, "method")
