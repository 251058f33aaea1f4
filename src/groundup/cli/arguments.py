"""A command's flags come from its function's signature, their help from its docstring."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

from groundup.config import keys_of, make_parser, parse_flags
from groundup.runtime import UsageError
from groundup.runtime.errors import nearest


def call(function: Callable[..., None], command: str, arguments: Sequence[str]) -> None:
    """Parse ``arguments`` for ``function`` (parameters without a default are positional) and call it.

    A parameter that is a dataclass becomes a flag for each of its fields.

    Raises:
        UsageError: a flag or value is wrong.
        SystemExit: after printing ``--help``.
    """
    description = (inspect.getdoc(function) or "").split("\n\n")[0]
    parser = make_parser(command, " ".join(description.split()))
    hints: dict[str, Any] = get_type_hints(function)
    bundles: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=set(bundles))
    keys = {key: kind for key, kind in keys_of(function).items() if key.partition(".")[0] not in bundles}
    for name, kind in bundles.items():
        parser.add_class_arguments(kind)
        default = inspect.signature(function).parameters[name].default
        parser.set_defaults({field.name: getattr(default, field.name) for field in fields(kind)})
        keys |= keys_of(kind)
    values = parse_flags(parser, _lists(arguments, keys), keys, defaults=True).as_dict()
    for name, kind in bundles.items():
        given = {field.name: values.pop(field.name) for field in fields(kind)}
        values[name] = kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})
    function(**values)


def _lists(arguments: Sequence[str], keys: Mapping[str, Any]) -> list[str]:
    """A flag that takes texts may be given one as it is, and again: ``--stop ### --stop END`` for
    ``--stop '["###", "END"]'``.
    """
    flags = {
        f"--{spelt}": key
        for key, kind in keys.items()
        if kind == tuple[str, ...]
        for spelt in (key, key.replace("_", "-"))
    }
    words, waiting = list[str](), list(arguments)
    texts: dict[str, tuple[int, list[str]]] = {}  # by key: where it was first given, and all that was
    while waiting:
        word = waiting.pop(0)
        flag, equals, value = word.partition("=")
        if flag not in flags or not (equals or waiting):
            words.append(word)
            continue
        value = value if equals else waiting.pop(0)
        if value.startswith("["):
            words.append(f"{flag}={value}")
            continue
        if flags[flag] not in texts:
            texts[flags[flag]] = (len(words), [])
            words.append("")
        texts[flags[flag]][1].append(value)
    for key, (place, given) in texts.items():
        words[place] = f"--{key}={json.dumps(given)}"
    return words


Bundle = TypeVar("Bundle")


def with_field(bundle: Bundle, key: str, text: str, where: str) -> Bundle:
    """A dataclass with one field changed to what somebody has typed.

    Raises:
        UsageError: the field takes no such value.
    """
    kind: Any = type(bundle)
    parser = make_parser(where, "")
    parser.add_class_arguments(kind)
    keys = keys_of(kind)
    value: Any = parse_flags(parser, _lists([f"--{key}={text}"], keys), keys, defaults=False).as_dict()[key]
    return replace(bundle, **{key: tuple(value) if isinstance(value, list) else value})  # type: ignore[type-var]


def call_one_of(functions: Mapping[str, Callable[..., None]], command: str, arguments: Sequence[str]) -> None:
    """Run the sub-command that the first argument names.

    Raises:
        UsageError: no sub-command has that name.
        SystemExit: after printing the list of them.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: groundup {command} COMMAND [ARGUMENTS]\n\ncommands:")
        for name, function in functions.items():
            print(f"  {name:<10} {' '.join((inspect.getdoc(function) or '').split(chr(10) * 2)[0].split())}")
        raise SystemExit(0 if arguments else 2)
    name = arguments[0]
    if name not in functions:
        raise UsageError(
            f"groundup {command} {name}: no such command.{nearest(name, functions)} Known: {', '.join(functions)}."
        )
    call(functions[name], f"{command} {name}", arguments[1:])


def second_as_flag(arguments: Sequence[str], flag: str) -> list[str]:
    """Let an optional second word stand for ``flag``: ``generate MODEL PROMPT``, as everybody types it."""
    words = list(arguments)
    if len(words) >= 2 and all(word == "-" or not word.startswith("-") for word in words[:2]):
        words[1] = f"{flag}={words[1]}"
    return words


def read_stdin() -> str:
    """All of standard input.

    Raises:
        UsageError: it is not text in UTF-8.
    """
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input: byte {error.start} is not UTF-8 text. Convert it first, with iconv."
        ) from error


def recipe_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split ``RECIPE --key value …`` into the recipe, if there is one, and the flags."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], list(arguments[1:])
    return None, list(arguments)


def print_config(values: Mapping[str, Any]) -> None:
    """Print a resolved recipe, as ``--print-config`` does."""
    from groundup.config import dump_recipe

    print(dump_recipe(values), end="")
