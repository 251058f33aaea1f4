"""``groundup finetune RECIPE``: fine-tune a model on examples or labelled texts."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from groundup.cli.training_run import announce, given_by, is_at_its_end, processes
from groundup.config import Given
from groundup.posttraining import FinetuneRecipe
from groundup.runtime import say

if TYPE_CHECKING:
    from groundup.posttraining.plan import Finetuning
    from groundup.training.run import RunFolder

DESCRIPTION = (
    "Teach a model to answer as examples do, or to sort texts into classes, from a recipe (a YAML file, or the name of "
    "one that comes with groundup); every key is also a flag."
)


def main(arguments: Sequence[str]) -> None:
    """Run a recipe with the given flags over it."""
    from groundup.posttraining.derive import DERIVED

    given = given_by(arguments, "finetune", DESCRIPTION, cls=FinetuneRecipe, derived=DERIVED)
    if given is not None:
        run(given)


def run(given: Given) -> RunFolder | None:
    """Read the data, plan, measure, train, measure again and report.

    Returns:
        The run folder; None when training was stopped before its end.
    """
    from groundup.posttraining.finetuning import conclude, finetune
    from groundup.posttraining.plan import plan_finetuning
    from groundup.report import console_table, write_report

    started = time.monotonic()
    with processes(given) as world:
        planned = plan_finetuning(given, world)
        if world.is_main:
            _show_data(planned)
            announce(planned.plan_rows(), "Any of these can be set: --learning-rate, --epochs, --batch-size …")
        done = finetune(planned)
    if not is_at_its_end(done, world, started):
        return None
    conclude(done)
    report = write_report(done.run.path)
    say()
    say(console_table(done.run.path))
    say(f"Report: {report}")
    return done.run


def _show_data(planned: Finetuning) -> None:
    """What is learnt: figures, what was left out, and one example with its mask in colours."""
    from groundup.posttraining.material import Answers
    from groundup.posttraining.preview import plain_preview, preview
    from groundup.runtime import read_json

    note = read_json(planned.run.path / "data.json")
    say(
        f"Data: {note['train']:,} to learn, {note['val']:,} held out"
        + (f", {note['test']:,} to test" if note["test"] else "")
    )
    for line in note["lines"]:
        say(f"  {line}")
    for one in note["left_out_examples"][:3]:
        say(f"  left out: {one['where']}: {one['reason']}. {one['detail']}")
    if note["shared_count"]:
        first = note["shared"][0]
        say(
            f"  {note['shared_count']:,} held-out records are learnt too, or nearly; the first: {first['held_out']} is "
            f"{first['alike']:.0%} like {first['train']}. Measures on them say little."
        )
    if planned.added:
        names = ", ".join(planned.added)
        say(f"  The tokenizer lacks tokens of the chat template: {names} were added, and the embeddings grew.")
    if isinstance(planned.material, Answers):
        example = planned.material.shown
        if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
            say("One example; what is learnt is green:")
            say(preview(planned.tokenizer, example))
        else:
            say("One example; what is learnt stands between >>> and <<<:")
            say(plain_preview(planned.tokenizer, example))
