"""Names that are imported when they are first used, so that a room can be opened without waiting for torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(room: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module whose public names live in files that are slow to import (PEP 562).

    Args:
        room: the module's ``__name__``.
        home: for each name, the file of the room it lives in (``"engine"``), or a whole module path.
    """

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        place = home[name]
        return getattr(import_module(place if "." in place else f"{room}.{place}"), name)

    return find
