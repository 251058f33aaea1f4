"""What a person gave, as the kind of value that is meant, or one line that says what is wrong with it."""

from __future__ import annotations

import math
import operator
from typing import Any

from groundup.runtime import UsageError


def check_number(name: str, value: Any) -> float:
    """A finite number."""
    try:
        if isinstance(value, bool | str):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{name} = {value!r} must be a number.") from None
    if not math.isfinite(number):
        raise UsageError(f"{name} = {value} must be a finite number.")
    return number


def whole(name: str, value: Any) -> int:
    """A whole number as a plain int."""
    if type(value) is int:
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise UsageError(f"{name} = {value!r} must be a whole number.") from None


def check_count(name: str, value: Any, least: int) -> None:
    """A whole number that is no less than ``least``."""
    if whole(name, value) < least:
        raise UsageError(f"{name} = {value} must be at least {least}.")


def listed(name: str, values: Any) -> tuple[Any, ...]:
    """Any sequence, but a text, as a tuple."""
    try:
        if isinstance(values, str):
            raise TypeError
        return tuple(values)
    except TypeError:
        raise UsageError(f"{name} = {values!r} must be a list.") from None


def token_ids(name: str, values: Any) -> tuple[int, ...]:
    """Token ids as plain ints, each at least 0."""
    if values == ():
        return ()
    found = tuple(whole(f"{name}: the token id", value) for value in listed(name, values))
    if found and min(found) < 0:
        raise UsageError(f"{name}: the token id {min(found)} must be at least 0.")
    return found
