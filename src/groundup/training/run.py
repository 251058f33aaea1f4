"""The run folder: where everything of a run is found again.

recipe.yaml        every key, given or derived, with the reason behind each derived one
plan.json          the same as a table, with what the model costs; what was derived, and why
environment.json   versions and machine
data/              the prepared text: tokenizer, shards, statistics (unless --data is a prepared folder)
metrics.jsonl      one row per logged step and per evaluation
samples.jsonl      what the model wrote on the way; samples.md for reading
horizon.json       the number of steps that a budget of time came to, and when that was decided
checkpoints/       see checkpoint.py
report.html        see the report room
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from groundup.config import Given, flatten, keys_of, read_recipe, save_recipe
from groundup.optim import Horizon
from groundup.runtime import UsageError, read_json, say, write_json
from groundup.runtime.environment import describe_environment
from groundup.training.scaling import Derived

# These choose where and whether to go on, not what is computed.
NOT_COMPARED = ("out", "resume", "data_dir", "keep")


@dataclass(frozen=True)
class RunFolder:
    """Paths and small files of one run."""

    path: Path

    @property
    def metrics(self) -> Path:
        """The metrics file."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def data(self) -> Path:
        """The prepared text."""
        return self.path / "data"

    def saved(self, cls: type) -> Given | None:
        """The resolved recipe, a ``cls``, of the run that is here, or None."""
        recipe = self.path / "recipe.yaml"
        return read_recipe(recipe, cls) if recipe.is_file() else None

    def save_recipe(self, values: Mapping[str, Any], derived: list[Derived]) -> None:
        """Write recipe.yaml, each derived value with its reason."""
        save_recipe(self.path / "recipe.yaml", values, {entry.key: entry.why for entry in derived})

    def save_plan(self, rows: list[dict[str, Any]], derived: list[Derived]) -> None:
        """Write plan.json: the table that was shown, and what was derived."""
        write_json(self.path / "plan.json", {"rows": rows, "derived": [asdict(entry) for entry in derived]})

    def save_environment(self, device: str, precision: str, processes: int) -> None:
        """Write environment.json: versions, machine, and what the run computes on."""
        told = {"device": device, "precision": precision, "processes": processes}
        write_json(self.path / "environment.json", describe_environment() | told)

    def derived(self, given: Given) -> list[Derived]:
        """What the run that is here derived when it began, less what is now given otherwise."""
        path = self.path / "plan.json"
        entries = read_json(path, "plan").get("derived", []) if path.is_file() else []
        return [Derived(**entry) for entry in entries if entry["key"] not in given.values]

    def horizons(self) -> list[Horizon]:
        """The numbers of steps that a budget of time was turned into, in the order they were decided."""
        path = self.path / "horizon.json"
        return [Horizon(**one) for one in read_json(path, "horizon")] if path.is_file() else []

    def save_horizon(self, horizon: Horizon) -> None:
        """Note one more, durably: the steps after it depend on it, and a crash must not change it."""
        write_json(self.path / "horizon.json", [asdict(one) for one in (*self.horizons(), horizon)])

    def forget_evaluation(self) -> None:
        """The weights are about to change: what was measured on them no longer holds."""
        (self.path / "evaluation.json").unlink(missing_ok=True)

    def forget_horizon(self) -> None:
        """The budget has changed: the horizon is to be found anew."""
        (self.path / "horizon.json").unlink(missing_ok=True)


LENGTH = ("max_steps", "minutes", "budget")


def settle_length(given: Given) -> Given:
    """Leave one of ``max_steps``, ``minutes`` and ``budget``: a flag beats a file, a number of steps beats the others.

    Raises:
        UsageError: minutes and a budget are given side by side.
    """
    named = [key for key in LENGTH if given.values.get(key) is not None]
    named = [key for key in named if given.sources.get(key) == "flag"] or named
    if named == ["minutes", "budget"]:
        raise UsageError("minutes and budget both say how long to train. Give one of them.")
    dropped = set(LENGTH) - set(named[:1])
    return Given({key: value for key, value in given.values.items() if key not in dropped}, given.sources)


def resume_values(run: RunFolder, given: Given, cls: type, fixed: Sequence[str], *, trained: bool) -> Given | None:
    """Given values over those of the run that is here; None where there is none, or none worth keeping.

    Args:
        cls: the dataclass of the recipe.
        fixed: keys, and sections with a dot behind them, that cannot change within a run.
        trained: the run has a checkpoint. One that has none gives way to a command that wants another.

    Raises:
        UsageError: a value that cannot change within a run differs, or resuming was refused.
    """
    saved = run.saved(cls)
    if saved is None:
        return None
    if trained and given.values.get("resume") is False:
        raise UsageError(
            f"{run.path}: already holds a run, and --resume is false. Choose another --out, or remove the folder."
        )
    for key, value in given.values.items():
        before = saved.values.get(key)
        if key in NOT_COMPARED or value == before or value is None or value == "auto":
            continue
        if any(key == one or (one.endswith(".") and key.startswith(one)) for one in fixed):
            if not trained:
                return None
            raise UsageError(
                f"{run.path}: the run here has {key} = {before}, the command says {value}. "
                "A run cannot change that on the way: choose another --out, or leave it as it was."
            )
        if trained:
            say(f"  {key}: was {before}, now {value}.")
    length_before = {key: saved.values.get(key) for key in LENGTH}
    length_now = {key: given.values.get(key) for key in LENGTH}
    if any(length_now.values()):
        if length_now != length_before:
            run.forget_horizon()
        saved = Given({key: value for key, value in saved.values.items() if key not in LENGTH}, saved.sources)
    kept = {key: value for key, value in given.values.items() if value is not None and value != "auto"}
    return Given({**saved.values, **kept}, {**saved.sources, **given.sources})


def undecided(recipe: Any, values: Mapping[str, Any], derived: Collection[str]) -> dict[str, Any]:
    """Every key of a recipe (a dataclass) with its value before anything is derived; null for what will be.

    Args:
        values: what was given, by dotted key.
        derived: the keys that need not be.
    """
    keys = keys_of(type(recipe))
    flat = flatten(asdict(recipe), keys)
    return {key: values.get(key, None if key in derived else flat[key]) for key in keys}


def resolved(recipe: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of a recipe (a dataclass) with the value it came to, in the order of its fields."""
    keys = keys_of(type(recipe))
    flat = flatten(asdict(recipe), keys)
    return {key: flat[key] for key in keys if flat.get(key) is not None or key in values}
