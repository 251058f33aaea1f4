"""``groundup models list|get|verify|remove``: the models of the hub that are kept on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from groundup.cli.arguments import call_one_of
from groundup.cli.tables import add_row, figures_table
from groundup.runtime import GroundupError, say
from groundup.runtime.console import byte_size

NOTHING = "No models of the hub are kept here. Fetch one: groundup models get hf:owner/name"


def list_models() -> None:
    """List the models that were fetched, with their sizes."""
    from groundup.inference.models import kept_models

    kept = kept_models()
    if not kept:
        say(NOTHING)
        return
    table = figures_table("model", "files", "size", left=("commit", "state"))
    for model in kept:
        state = "ready" if model.problem("sizes") is None else "incomplete"
        add_row(table, model.name, model.commit[:12], state, len(model.files), byte_size(model.nbytes))
    say(table)
    say(f"{byte_size(sum(model.nbytes for model in kept))} in all")


def get(model: str) -> None:
    """Fetch a model of the hub, or its newest version, with resume and checksums, and print where it lies.

    Args:
        model: hf:owner/name, or hf:owner/name@revision for a branch, a tag or a commit
    """
    from groundup.inference.models import fetch_model

    say(str(fetch_model(model, refresh=True)))


def verify(model: str | None = None) -> None:
    """Read every file of a model, or of all models, and hold it against the hub's checksum.

    Args:
        model: hf:owner/name[@revision]; all models when not given
    """
    from groundup.inference.models import kept_model, kept_models, verify_model

    damaged = []
    chosen = [kept_model(model)] if model else kept_models()
    if not chosen:
        say(NOTHING)
    for kept in chosen:
        wrong = verify_model(kept)
        if wrong is None:
            say(f"{kept.name}: {len(kept.files)} files, {byte_size(kept.nbytes)}, as the hub has them")
        else:
            damaged.append(kept.name)
            say(f"{kept.name}: {wrong}")
    if damaged:
        raise GroundupError(f"damaged: {', '.join(damaged)}. Fetch it again: groundup models get {damaged[0]}")


def remove(model: str) -> None:
    """Remove a model from the hub's cache, which other tools of the hub share.

    Args:
        model: hf:owner/name[@revision], as models list has it
    """
    from groundup.inference.models import kept_model, remove_model

    name = kept_model(model).name
    say(f"{name}: removed, {byte_size(remove_model(model))} are free again")


COMMANDS: dict[str, Callable[..., None]] = {"list": list_models, "get": get, "verify": verify, "remove": remove}


def main(arguments: Sequence[str]) -> None:
    """Run the sub-command named first."""
    words = list(arguments)
    if len(words) == 2 and words[0] == "verify" and not words[1].startswith("-"):
        words[1] = f"--model={words[1]}"
    call_one_of(COMMANDS, "models", words)
