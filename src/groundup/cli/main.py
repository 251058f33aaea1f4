"""How a command is found and run, and how every error ends: one line, never a traceback unless ``--debug``."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {  # name: (module, one line); the order is the life of a model
    "demo": ("demo", "train a small model on this machine, start to finish, with a report at the end"),
    "data": ("data", "list, get, prepare, inspect: text into token shards"),
    "tokenizer": ("tokenizer", "train, encode, decode, inspect, import, bench: text to token ids and back"),
    "models": ("models", "list, get, verify, remove: models of the hub on this machine"),
    "pretrain": ("pretrain", "train a model from a recipe"),
    "finetune": ("finetune", "teach a model to answer, or to sort texts into classes"),
    "generate": ("generate", "continue a prompt, or a file of them"),
    "chat": ("chat", "talk to a model in the terminal"),
    "classify": ("classify", "sort texts into the classes that a model has learnt"),
    "inspect": ("inspect_model", "a text as the model sees it: surprise, attention, logit lens"),
    "export": ("export", "a model as a folder or file: for other tools, or in eight or four bits"),
    "report": ("report", "write a run's report.html again and show its numbers"),
    "compare": ("compare", "runs side by side: loss, bits per byte, cost, recipes, curves"),
    "bench": ("bench", "decode: how fast a model reads and writes on this machine"),
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
    from groundup.runtime.errors import GroundupError, mend

    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:cut]
    words = [word for position, word in enumerate(words) if word != "--debug" or position > cut]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a character that the terminal lacks is no error
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe (head, less) has seen enough
        _discard_output()
        return 0
    except (GroundupError, KeyboardInterrupt, OSError, MemoryError, RuntimeError) as error:
        if debug or (isinstance(error, RuntimeError) and not _torch_is_out_of_memory(error)):
            raise
        if isinstance(error, GroundupError):
            return _tell(" ".join(str(error).split()), error.exit_code)
        if isinstance(error, KeyboardInterrupt):
            print(file=sys.stderr)  # the terminal has echoed ^C
            return _tell("stopped.", 130)
        if isinstance(error, OSError):
            return _tell(f"{error.filename or 'cannot write the output'}: {mend(error)}.", 1)
        return _tell("not enough memory. Use less data (--limit), a smaller --depth or --micro-batch.", 1)


def _torch_is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate: on a GPU it has its own kind of error, on the CPU only the words tell."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return any(part in str(error) for part in words)


def _run(words: Sequence[str]) -> int:
    from groundup.runtime.errors import UsageError, nearest

    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] in ("--version", "-V"):
        from groundup import __version__

        print(f"groundup {__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise UsageError(f"{words[0]} is not a command.{nearest(words[0], COMMANDS)} See groundup --help.")
    try:
        import_module(f"groundup.cli.{COMMANDS[words[0]][0]}").main(words[1:])
    except SystemExit as leaving:  # --help has printed
        return leaving.code if isinstance(leaving.code, int) else 0
    return 0


def _tell(message: str, code: int) -> int:
    """Say what went wrong in one line, below all that was printed before."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()
    print(f"groundup: {message}", file=sys.stderr)
    return code


def _discard_output() -> None:
    """Nobody can take standard output any more: let what is still to be flushed go nowhere, quietly."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
