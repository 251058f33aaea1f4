"""``groundup pretrain RECIPE``: train a model from a recipe, or from flags alone."""

from __future__ import annotations

from collections.abc import Sequence

from groundup.cli.training_run import given_by, run

DESCRIPTION = (
    "Train a model from a recipe (a YAML file, or the name of one that comes with groundup); every key is also a flag."
)


def main(arguments: Sequence[str]) -> None:
    """Run a recipe with the given flags over it."""
    given = given_by(arguments, "pretrain", DESCRIPTION)
    if given is not None:
        run(given)
