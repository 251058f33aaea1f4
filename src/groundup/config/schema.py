"""Which keys a dataclass or a command function has, and how its flags are read.

A key is the dotted path of a field (``model.n_layer``). Its flag is the same word (``--model.n_layer``; dashes and
underscores are the same, and the last part alone is enough where only one key ends in it: ``--n-layer``). Types, help
texts and conversions come from the annotations and docstrings, through jsonargparse; the messages are ours, because
they must fit on one line and name the mend.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import textwrap
import types
from argparse import ArgumentError, Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from groundup.runtime import UsageError
from groundup.runtime.errors import nearest


def keys_of(target: Callable[..., Any]) -> dict[str, Any]:
    """Every settable key of a dataclass (dotted through nested dataclasses) or of a function, with its type."""
    hints = get_type_hints(target)
    if dataclasses.is_dataclass(target):
        names = [field.name for field in dataclasses.fields(target)]
    else:
        names = list(inspect.signature(target).parameters)
    keys: dict[str, Any] = {}
    for name in names:
        hint = hints.get(name, str)
        if inspect.isclass(hint) and dataclasses.is_dataclass(hint):
            keys |= {f"{name}.{key}": inner for key, inner in keys_of(hint).items()}
        else:
            keys[name] = hint
    return keys


def flatten(values: Mapping[str, Any], keys: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys; what is no known section is kept whole as a leaf."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        is_section = any(known.startswith(f"{key}.") for known in keys)
        if isinstance(value, Mapping) and (is_section or key not in keys):
            flat |= flatten(value, keys, f"{key}.") if value else {}
        else:
            flat[key] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys back to nested dictionaries."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, leaf = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return nested


class _Help(DefaultHelpFormatter):
    """Shows flags with dashes, as they are usually typed."""

    def add_argument(self, action: Any) -> None:
        if action.metavar != "CONFIG":  # a whole section as a file: a second way to say what keys say
            super().add_argument(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: Any) -> str:
        text = str(super()._format_action_invocation(action))
        text = re.sub(r", --[\w.]+\+.*", "", text)  # appending to a list: jsonargparse's own form, which we do not take
        return re.sub(r"--[\w.]+", lambda match: match.group().replace("_", "-"), text)

    def _format_usage(self, *args: Any, **kwargs: Any) -> str:
        text = str(super()._format_usage(*args, **kwargs))
        return re.sub(r"--[\w.]+", lambda match: match.group().replace("_", "-"), text)


def make_parser(command: str, description: str, **options: Any) -> ArgumentParser:
    """An argument parser in the house's manner: errors are raised, help shows defaults.

    Args:
        options: argparse's own, such as ``usage`` and ``epilog``.
    """
    return ArgumentParser(
        **options,
        prog=f"groundup {command}",
        description=description,
        exit_on_error=False,
        formatter_class=_Help,
        default_env=False,
        print_config=None,
    )


def normalise_flags(arguments: Sequence[str], keys: Mapping[str, Any]) -> list[str]:
    """Bring flags into the form ``--section.key``: dashes, short last parts, and bare switches.

    Raises:
        UsageError: a flag is unknown (the nearest known one is named) or its short form could mean several keys.
    """
    normalised: list[str] = []
    for position, argument in enumerate(arguments):
        if argument == "--":
            return [*normalised, *arguments[position:]]
        if not argument.startswith("--"):
            normalised.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        key = _resolve(name.replace("-", "_"), keys)
        if keys.get(key) is bool and not equals:
            following = arguments[position + 1].lower() if position + 1 < len(arguments) else ""
            if following not in ("true", "false"):
                equals, value = "=", "true"
        normalised.append(f"--{key}{equals}{value}")
    return normalised


def _resolve(name: str, keys: Mapping[str, Any]) -> str:
    if name in keys or name == "help":
        return name
    matches = [key for key in keys if key.rsplit(".", 1)[-1] == name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UsageError(f"--{name} could mean {' or '.join(matches)}. Write it out.")
    raise UsageError(f"--{name} is not a known flag.{nearest(name, keys)}")


def parse_keys(parser: ArgumentParser, flat: Mapping[str, Any], keys: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check names and types of dotted keys and convert the values.

    A key or section that is null counts as left out, unless null is a value of its own.

    Args:
        where: what the message names first: a file, or ``--flag``'s command.

    Raises:
        UsageError: an unknown key (the nearest is named) or a value of the wrong type.
    """
    empty = {key for key, value in flat.items() if value is None and not _takes_null(key, keys)}
    flat = {key: value for key, value in flat.items() if key not in empty}
    for key, value in flat.items():
        if under := _keys_under(key, keys):
            raise UsageError(f"{where}: {key} = {value!r} should be a section of keys, such as {under[0]}.")
        if key not in keys:
            raise UsageError(f"{where}: unknown key {key}.{nearest(key, keys)}")
    try:
        parsed = parser.parse_object(nest(flat), defaults=False)
    except ArgumentError as error:
        raise _usage_error(error, keys, flat, where) from error
    values = flatten(parsed.as_dict(), keys) | {key: value for key, value in flat.items() if _is_text(key, value, keys)}
    _must_be_finite(values, keys, where)
    return values


def _is_text(key: str, value: Any, keys: Mapping[str, Any]) -> bool:
    """Whether a value is to be kept as it was written: jsonargparse reads ``str | None`` as YAML, "# a" as null."""
    hint = keys.get(key)
    return isinstance(value, str) and (hint is str or (_is_union(hint) and str in get_args(hint)))


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _keys_under(section: str, keys: Mapping[str, Any]) -> list[str]:
    """The keys of a section; none when it is no section."""
    return [key for key in keys if key.startswith(f"{section}.")]


def _takes_null(key: str, keys: Mapping[str, Any]) -> bool:
    """Whether null at this key means something, be it that the key is unknown."""
    return type(None) in get_args(keys[key]) if key in keys else not _keys_under(key, keys)


def _must_be_finite(values: Mapping[str, Any], keys: Mapping[str, Any], where: str) -> None:
    """No key means anything at infinity or at not-a-number, and a run only fails of it much later."""
    for key, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise UsageError(f"{where}: {key} = {value} should be {describe_type(keys[key])}, and a finite one.")


def parse_flags(
    parser: ArgumentParser, arguments: Sequence[str], keys: Mapping[str, Any], *, defaults: bool
) -> Namespace:
    """Parse flags, with one-line messages.

    Args:
        defaults: fill in what was not given.

    Raises:
        UsageError: an unknown flag, a missing or a mistyped value.
    """
    normalised, where = normalise_flags(arguments, keys), parser.prog.removeprefix("groundup ")
    try:
        parsed = parser.parse_args(normalised, defaults=defaults)
    except ArgumentError as error:
        raise _usage_error(error, keys, _flag_values(normalised), where) from error
    for key, value in _flag_values(normalised).items():
        if value != "null" and _is_text(key, value, keys):
            parsed[key] = value
    _must_be_finite(flatten(parsed.as_dict(), keys), keys, where)
    return parsed


def _flag_values(normalised: Sequence[str]) -> dict[str, Any]:
    values = {}
    for position, argument in enumerate(normalised):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            values[name] = value if equals else " ".join(normalised[position + 1 : position + 2])
    return values


def _usage_error(error: ArgumentError, keys: Mapping[str, Any], given: Mapping[str, Any], where: str) -> UsageError:
    message = str(error).strip()
    found = re.search(r'[Kk]ey "([\w.]+)"', message) or re.search(r"argument --([\w.]+)", message)
    key = found.group(1) if found else ""
    if key in keys and "expected one argument" not in message:
        got = given.get(key)
        return UsageError(f"{where}: {key} = {got!r} should be {describe_type(keys[key])}.")
    if key in keys:
        return UsageError(f"{where}: --{key} needs a value: {describe_type(keys[key])}.")
    one_line = " ".join(message.split())
    return UsageError(f"{where}: {one_line[0].lower()}{one_line[1:]}".rstrip(".") + ". See --help.")


def describe_type(hint: Any) -> str:
    """A type in words: ``a whole number``, ``one of a, b``, ``a number or null``."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if hint in words:
        return words[hint]
    origin = get_origin(hint)
    if origin is dict:
        return "a mapping, such as {one: 0.7, two: 0.3}"
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if _is_union(hint):
        return " or ".join(describe_type(part) for part in get_args(hint))
    if origin in (list, tuple):
        plural = {int: "whole numbers", float: "numbers", str: "texts"}
        item = get_args(hint)[0]
        return f"a list of {plural.get(item) or describe_type(item)}, such as {_list_example(item)}"
    return getattr(hint, "__name__", str(hint))


def _list_example(item: Any) -> str:
    return '["one", "two"]' if item is str else "[1, 2]"
