"""How a command is found and run, and how every error ends: one line, never a traceback unless ``--debug``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {  # name: (module, one line); the order is the life of a model
    "demo": ("demo", "train a small model on this machine, start to finish, with a report at the end"),
    "data": ("data", "list, get, prepare, inspect: text into token shards"),
    "tokenizer": ("tokenizer", "train, encode, decode, inspect: text to token ids and back"),
    "pretrain": ("pretrain", "train a model from a recipe"),
    "generate": ("generate", "continue a prompt"),
    "chat": ("chat", "talk to a model in the terminal"),
    "report": ("report", "write a run's report.html again and show its numbers"),
    "explain": ("explain", "parameters, FLOPs, memory and time before you spend anything"),
    "doctor": ("doctor", "does this machine have what it takes"),
}


def usage() -> str:
    """What ``groundup --help`` prints."""
    lines = [
        "usage: groundup COMMAND [ARGUMENTS]",
        "",
        "A language model from the ground up: text in, tokenizer, pretraining, evaluation, chat.",
        "",
        "commands:",
        *(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()),
        "",
        "  groundup COMMAND --help   its flags",
        "  --debug                   with any command: show the traceback of an error",
        "  --version                 the version",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 1 for an error, 2 for a mistake in the command itself, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:cut]
    words = [word for position, word in enumerate(words) if word != "--debug" or position > cut]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] in ("--version", "-V"):
        from groundup import __version__

        print(f"groundup {__version__}")
        return 0
    return _run(words[0], words[1:], debug=debug)


def _run(name: str, rest: list[str], *, debug: bool) -> int:
    from groundup.runtime.errors import GroundupError, UsageError, nearest

    try:
        if name not in COMMANDS:
            raise UsageError(f"{name} is not a command.{nearest(name, COMMANDS)} See groundup --help.")
        import_module(f"groundup.cli.{COMMANDS[name][0]}").main(rest)
        sys.stdout.flush()
        return 0
    except GroundupError as error:
        if debug:
            raise
        print(f"groundup: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        print("\ngroundup: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as leaving:  # --help has printed
        return leaving.code if isinstance(leaving.code, int) else 0
    except MemoryError:
        if debug:
            raise
        print(
            "groundup: not enough memory. Use less data (--limit), a smaller --depth or --micro-batch.",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
