"""``groundup demo``: the whole life of a small model on this machine, with a report at the end."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from groundup.cli.training_run import given_by, run
from groundup.runtime import say

DESCRIPTION = "Train a small language model on this machine: text, tokenizer, pretraining, samples, evaluation, report."


def main(arguments: Sequence[str]) -> None:
    """Run the demo recipe with the given flags."""
    given = given_by(arguments, "demo", DESCRIPTION, default_recipe="demo")
    if given is None:
        return
    folder = run(given)
    if folder is not None:
        say()
        say("Next:")
        for command in ("chat", "report"):
            say(f"  groundup {command} {shlex.quote(str(folder.path))}")
