"""A command's flags come from its function's signature, their help from its docstring."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from groundup.config import keys_of, make_parser, parse_flags
from groundup.runtime import UsageError
from groundup.runtime.errors import nearest


def call(function: Callable[..., None], command: str, arguments: Sequence[str]) -> None:
    """Parse ``arguments`` for ``function`` (parameters without a default are positional) and call it.

    Raises:
        UsageError: a flag or value is wrong.
        SystemExit: after printing ``--help``.
    """
    description = (inspect.getdoc(function) or "").split("\n\n")[0]
    parser = make_parser(command, " ".join(description.split()))
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    function(**parse_flags(parser, arguments, keys_of(function), defaults=True).as_dict())


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
