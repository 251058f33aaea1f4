"""``groundup compare RUN RUN …``: runs side by side, in the terminal and on a page."""

from __future__ import annotations

import json
from collections.abc import Sequence

from groundup.cli.arguments import call
from groundup.runtime import say


def compare(run: str, other: str, more: list[str] | None = None, out: str | None = None) -> None:
    """Show runs side by side: held-out loss, bits per byte, cost, and what differs in their recipes.

    Bits per byte compare only on the same held-out text; whether it is the same is told by its fingerprint.

    Args:
        run: a run folder
        other: another one
        more: further ones; simply name them behind the first two
        out: a page to write, with the curves of all runs over steps, tokens and time
    """
    from groundup.report import compare_runs, figures_of_runs, write_comparison

    found = compare_runs([run, other, *(more or [])])
    say(figures_of_runs("Runs side by side (* the lowest, where all may be compared)", found.runs, found.figures))
    for note in found.notes:
        say(f"  {note}")
    say()
    if found.differences:
        say(figures_of_runs("What differs in the recipes", found.runs, found.differences))
    else:
        say("The recipes say the same.")
    if out is not None:
        say(f"Page: {write_comparison(found, out)}")


def main(arguments: Sequence[str]) -> None:
    """Parse the flags and compare."""
    call(compare, "compare", _more_as_flag(arguments))


def _more_as_flag(arguments: Sequence[str]) -> list[str]:
    """Let a third and further words stand for ``--more``, wherever the flags stand."""
    runs: list[str] = []
    flags: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            runs.append(word)
            continue
        flags.append(word)
        if word.startswith("--") and word != "--help" and "=" not in word and words and not words[0].startswith("-"):
            flags.append(words.pop(0))
    return [*runs[:2], *flags, *([f"--more={json.dumps(runs[2:])}"] if runs[2:] else [])]
