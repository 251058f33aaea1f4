"""Everything a report reads from a run folder. Each part may be absent: a run that still goes on has no end yet."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groundup.report.jsonl import Row, read_jsonl
from groundup.report.metrics import is_number
from groundup.runtime import GroundupError, os_errors, read_json

# What the reader of a report goes without when a file is not there.
SHOWS = {
    "recipe.yaml": "the recipe",
    "environment.json": "the machine and the versions",
    "plan.json": "the plan and where its numbers come from",
    "data.json": "what the text went through",
    "data/stats.json": "what the text went through",
    "metrics.jsonl": "the curves",
    "samples.jsonl": "samples",
    "evaluation.json": "the comparison with gzip, xz and a 6-gram",
}
# What a run of another kind keeps in a file of that name; None for one that it does not write.
PRETRAIN, SFT, CLASSIFY = "pretrain", "sft", "classify"
SHOWS_OF: dict[str, dict[str, str | None]] = {
    PRETRAIN: {},
    SFT: {"data.json": "what it learnt from", "evaluation.json": "figures and answers, before and after"},
    CLASSIFY: {
        "data.json": "what it learnt from",
        "evaluation.json": "how well it sorts, beside a baseline",
        "samples.jsonl": None,
    },
}


@dataclass
class RunFolder:
    """The files of a run, read; an absent or damaged one is empty here and named in ``missing``.

    Args:
        path: the folder.
        name: its name, for people.
        recipe: the text of ``recipe.yaml``.
        environment: ``environment.json``.
        plan: the rows of ``plan.json``: section, key, value, why.
        data: ``data/stats.json`` or ``data.json``; of fine-tuning, what it learnt from.
        metrics, samples: the rows of the two growing files.
        evaluation: ``evaluation.json``: rows, and what belongs to them.
        missing: what is wrong with a file, by its name.
    """

    path: Path
    name: str
    recipe: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    plan: list[Row] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What kind of run it is: pretrain, sft or classify. A file that is not there is made up for by the next."""
        recipe = re.search(r"^task: *(\w+)", self.recipe, re.MULTILINE)
        said = (self.evaluation.get("kind"), self.data.get("task"), recipe and recipe[1])
        return next((str(kind) for kind in said if kind in (SFT, CLASSIFY)), PRETRAIN)

    @property
    def not_shown(self) -> list[str]:
        """What a report goes without, and why."""
        names = SHOWS | SHOWS_OF[self.kind]
        return [f"{names[name]}: {why}" for name, why in self.missing.items() if names[name] is not None]

    @property
    def evaluation_rows(self) -> list[Row]:
        """The rows of ``evaluation.json`` that can be shown."""
        return rows_of(self.evaluation)


def read_run(run: str | os.PathLike[str]) -> RunFolder:
    """Read what there is of a run.

    Raises:
        GroundupError: there is no such folder, or it has neither metrics nor an evaluation.
    """
    path = Path(run)
    if not path.is_dir():
        raise GroundupError(f"{path}: there is no run here. Name a run folder, such as runs/demo.")
    if not (path / "metrics.jsonl").exists() and not (path / "evaluation.json").exists():
        raise GroundupError(
            f"{path}: nothing to report: the folder has neither metrics.jsonl nor evaluation.json. "
            "Name a run folder in which training has begun."
        )
    found = RunFolder(path, path.resolve().name)
    found.recipe = _part(found, "recipe.yaml", _read_text, "")
    found.environment = _part(found, "environment.json", _read_dict, {})
    found.plan = rows_of(_part(found, "plan.json", _read_dict, {}))
    in_folder = (path / "data" / "stats.json").exists()
    found.data = _part(found, "data/stats.json" if in_folder else "data.json", _read_dict, {})
    found.metrics = _part(found, "metrics.jsonl", read_jsonl, [])
    found.samples = _part(found, "samples.jsonl", read_jsonl, [])
    found.evaluation = _part(found, "evaluation.json", _read_dict, {})
    return found


def rows_of(table: Mapping[str, Any], key: str = "rows") -> list[Row]:
    """The rows below a key of a file; whatever is not a row is left out."""
    return [row for row in list_of(table, key) if isinstance(row, dict)]


def list_of(table: Mapping[str, Any], key: str) -> list[Any]:
    """The list below a key; an empty one where there is none."""
    found = table.get(key)
    return found if isinstance(found, list) else []


def part_of(table: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object below a key; an empty one where there is none."""
    found = table.get(key)
    return found if isinstance(found, dict) else {}


def number_of(table: Mapping[str, Any], key: str) -> float | None:
    """The finite number below a key; None where there is none."""
    found = table.get(key)
    return float(found) if is_number(found) else None


def words_of(table: Mapping[str, Any], key: str) -> str:
    """The text below a key; empty where there is none."""
    found = table.get(key)
    return "" if found is None else str(found)


def _part(found: RunFolder, name: str, read: Any, absent: Any) -> Any:
    """One file's content, or ``absent`` and a note in ``missing``."""
    path = found.path / name
    if not path.exists():
        found.missing[name] = f"there is no {name}"
        return absent
    try:
        return read(path)
    except GroundupError as error:
        found.missing[name] = str(error).replace(f"{found.path}{os.sep}", "")  # a page may be handed on
        return absent


def _read_dict(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise GroundupError(f"{path}: a JSON object was expected here, not a {type(value).__name__}.")
    return value


def _read_text(path: Path) -> str:
    with os_errors(path, "cannot read"):
        return path.read_text(encoding="utf-8", errors="replace")
