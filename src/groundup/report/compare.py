"""Runs side by side: what came of each, what it cost, in what they differ, and which of their figures may be compared.

Bits per byte mean the same under every tokenizer, but only on the same text; nats per token only under the same
tokenizer too. Which text and which tokenizer a run had is told by their fingerprints, not by their names.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from groundup.report.blocks import cell, duration
from groundup.report.cost import energy_text, largest, median, peak_memory
from groundup.report.finetuned import figures_of_finetuning
from groundup.report.jsonl import Row
from groundup.report.measures import ABSENT
from groundup.report.metrics import is_number, series
from groundup.report.run_folder import CLASSIFY, PRETRAIN, RunFolder, read_run
from groundup.report.standing import DIGITS, standings
from groundup.runtime import GroundupError, UsageError, read_json
from groundup.runtime.console import byte_size, quantity

MOST_RUNS = 18  # as many as can be told apart in a figure
NOT_COMPARED = ("out", "resume", "data_dir", "keep", "track")  # where a run lies and how it is watched, not what it is
UNKNOWN = "?"


@dataclass(frozen=True)
class Run:
    """One of the runs.

    Args:
        name: what it is called here: different for each.
        folder: what was read of it.
        recipe: its resolved recipe by dotted key.
        text: fingerprint of the held-out text; None where it cannot be told.
        tokens: fingerprint of its token ids and the tokenizer, likewise: equal ones are the same text.
        tokenizer: fingerprint of the tokenizer, likewise.
    """

    name: str
    folder: RunFolder
    recipe: dict[str, Any]
    text: str | None
    tokens: str | None
    tokenizer: str | None

    def measured(self, key: str) -> list[float]:
        """The held-out measurements on the way, in order."""
        return series(self.folder.metrics, "eval", key, key)[0]


@dataclass(frozen=True)
class Figures:
    """One measure of every run.

    Args:
        name: of the measure.
        cells: as text, one for each run.
        best: which of them is lowest, where lower is better and all may be compared; else None.
    """

    name: str
    cells: list[str]
    best: int | None = None


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side.

    Args:
        runs: in the order they were named.
        figures: what was measured.
        differences: keys of the recipes that are not the same everywhere, and their values.
        notes: what may be compared and what may not, in sentences.
        same_text: whether bits per byte may be compared.
        same_tokenizer: whether nats per token may be, too.
    """

    runs: list[Run]
    figures: list[Figures]
    differences: list[Figures]
    notes: list[str]
    same_text: bool
    same_tokenizer: bool


def compare_runs(paths: Sequence[str | os.PathLike[str]]) -> Comparison:
    """Read runs and lay them side by side.

    Args:
        paths: two or more run folders; running ones and those of older versions too.

    Raises:
        UsageError: fewer than two, too many, or one named twice.
        GroundupError: one of them is no run.
    """
    if len(paths) < 2:
        raise UsageError("compare needs two runs at least: groundup compare runs/one runs/other")
    if len(paths) > MOST_RUNS:
        raise UsageError(f"compare takes {MOST_RUNS} runs at most, these are {len(paths)}.")
    folders = [Path(path).resolve() for path in paths]
    twice = next((path for path, folder in zip(paths, folders, strict=True) if folders.count(folder) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice}: this run is named twice. Name each once.")
    unique = len({folder.name for folder in folders}) == len(folders)
    runs = [_read(path, folder.name if unique else str(path)) for path, folder in zip(paths, folders, strict=True)]
    if any(run.text is None for run in runs) and _all_same([run.tokens for run in runs]):
        runs = [replace(run, text=run.tokens) for run in runs]  # imported as tokens, the texts are not at hand
    same_text, same_tokenizer = _all_same([run.text for run in runs]), _all_same([run.tokenizer for run in runs])
    comparable = {"bits_per_byte": same_text, "loss": same_text and same_tokenizer}
    return Comparison(
        runs,
        [*_quality(runs, comparable), *_of_finetuning(runs), *_effort(runs), *_identities(runs)],
        _differences(runs),
        _notes(runs, same_text, same_tokenizer),
        same_text,
        same_tokenizer,
    )


def _read(path: str | os.PathLike[str], name: str) -> Run:
    folder = read_run(path)
    recipe = _flat(_parsed(folder.recipe))
    data = _data_folder(folder, recipe)
    if data is None:
        return Run(name, folder, recipe, None, None, None)
    text = _text_fingerprint(data / "val" / "documents.jsonl.gz")
    return Run(name, folder, recipe, text, *_token_fingerprints(data / "val" / "manifest.json"))


def _parsed(recipe: str) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(recipe)
    except (yaml.YAMLError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": _number(value)}
    return flat


def _number(value: Any) -> Any:
    """YAML 1.1 takes 3e-4 for text; a recipe means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


# ---- which text, which tokenizer


def _data_folder(run: RunFolder, recipe: Mapping[str, Any]) -> Path | None:
    """Where the run's prepared text lies: in the run, or where the recipe says."""
    places = [run.path / "data"]
    if isinstance(recipe.get("data"), str):
        places.append(Path(recipe["data"]))
    return next((place for place in places if (place / "val" / "manifest.json").is_file()), None)


def _text_fingerprint(documents: Path) -> str | None:
    """SHA-256 of the held-out texts, whatever packed them and whichever tokenizer cut them; None if unreadable."""
    digest = hashlib.sha256()
    try:
        with gzip.open(documents, "rb") as file:
            for line in file:
                text = json.loads(line)["text"].encode("utf-8", "surrogatepass")
                digest.update(len(text).to_bytes(8, "little") + text)
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError):
        return None
    return digest.hexdigest()


def _token_fingerprints(manifest: Path) -> tuple[str | None, str | None]:
    """Of the held-out token ids and of the tokenizer, as the manifest has them; None where it does not."""
    try:
        found = read_json(manifest, "manifest")
        tokenizer, shards = str(found["tokenizer"]), [str(shard["sha256"]) for shard in found["shards"]]
    except (GroundupError, KeyError, TypeError):
        return None, None
    return hashlib.sha256("\n".join([tokenizer, *shards]).encode()).hexdigest(), tokenizer


def _all_same(fingerprints: Sequence[str | None]) -> bool:
    return None not in fingerprints and len(set(fingerprints)) == 1


def letters(fingerprints: Sequence[str | None]) -> list[str]:
    """A, B, … for each different fingerprint in order of appearance; a question mark where there is none."""
    known = list(dict.fromkeys(one for one in fingerprints if one is not None))
    return [UNKNOWN if one is None else chr(ord("A") + known.index(one)) for one in fingerprints]


# ---- what came of them


def _quality(runs: list[Run], comparable: Mapping[str, bool]) -> list[Figures]:
    """Bits per byte and loss on held-out text."""
    whole = [
        next((row.bits_per_byte for row in standings(run.folder.evaluation_rows) if row.is_model), None) for run in runs
    ]
    found = [_lowest("bits per byte, all held-out text", whole, comparable["bits_per_byte"])]
    for key, name in (("bits_per_byte", "bits per byte, on the way"), ("loss", "held-out loss, nats per token")):
        values = [[] if run.folder.kind == CLASSIFY else run.measured(key) for run in runs]  # its loss is of texts
        best = [min(one) if one else None for one in values]
        last = [one[-1] if one else None for one in values]
        found.append(_lowest(f"{name}: best", best, comparable[key]))
        found.append(_lowest(f"{name}: last", last, comparable[key]))
    return [figures for figures in found if set(figures.cells) != {ABSENT}]


def _of_finetuning(runs: list[Run]) -> list[Figures]:
    """What fine-tuning brought. No best is marked: nothing tells whether runs were measured on the same examples."""
    measured = [figures_of_finetuning(run.folder) for run in runs]
    names = dict.fromkeys(name for one in measured for name in one)
    return [Figures(name, [one.get(name, ABSENT) for one in measured]) for name in names]


def _lowest(name: str, values: Sequence[float | None], comparable: bool) -> Figures:
    cells = [ABSENT if value is None else f"{value:.{DIGITS}f}" for value in values]
    known = [value for value in values if value is not None]
    best = values.index(min(known)) if comparable and len(known) > 1 else None
    if best is not None and cells.count(cells[best]) > 1:  # equal as far as is shown
        best = None
    return Figures(name, cells, best)


def _effort(runs: list[Run]) -> list[Figures]:
    """What it took."""
    shown: list[tuple[str, Callable[[list[Row]], float | None], Callable[[float], str]]] = [
        ("steps", lambda rows: largest(rows, "step"), lambda value: f"{value:,.0f}"),
        ("training tokens", lambda rows: largest(rows, "tokens"), quantity),
        ("time in the loop", lambda rows: largest(rows, "seconds"), duration),
        ("tokens/s, median", lambda rows: median(rows, "tokens_per_second"), quantity),
        ("MFU, median", lambda rows: median(rows, "mfu"), lambda value: f"{100 * value:.1f}%"),
        ("peak memory", peak_memory, byte_size),
        ("energy", lambda rows: largest(rows, "energy_joules"), energy_text),
    ]  # fmt: skip
    found = [Figures("parameters", [_parameters(run.folder) for run in runs])]
    for name, measure, show in shown:
        values = [measure(run.folder.metrics) for run in runs]
        found.append(Figures(name, [ABSENT if value is None else show(value) for value in values]))
    return [figures for figures in found if set(figures.cells) != {ABSENT}]


def _parameters(run: RunFolder) -> str:
    """As the plan has it."""
    value = next((row.get("value") for row in run.plan if row.get("key") == "parameters"), None)
    return quantity(value) if is_number(value) else cell(value)


def _identities(runs: list[Run]) -> list[Figures]:
    """Which text and tokenizer; fine-tuning runs have neither of their own to be told by."""
    if not any(run.folder.kind == PRETRAIN for run in runs):
        return []
    return [
        Figures("held-out text", letters([run.text for run in runs])),
        Figures("tokenizer", letters([run.tokenizer for run in runs])),
    ]


def _differences(runs: list[Run]) -> list[Figures]:
    """What the recipes do not agree on, in the order of the keys."""
    keys = dict.fromkeys(key for run in runs for key in run.recipe if key.split(".")[0] not in NOT_COMPARED)
    found = []
    for key in keys:
        values = [run.recipe.get(key) for run in runs]
        cells = [cell(value, key) for value in values]
        if len(set(cells)) == 1 and any(value != values[0] for value in values) and cells[0] != ABSENT:
            cells = [str(value) for value in values]  # the difference is finer than is usually shown
        if len(set(cells)) > 1:
            found.append(Figures(key, cells))
    return found


def _notes(runs: list[Run], same_text: bool, same_tokenizer: bool) -> list[str]:
    told = []
    unknown = [run.name for run in runs if run.text is None and run.folder.kind == PRETRAIN]
    if unknown:
        names = ", ".join(unknown)
        told.append(f"The held-out text of {names} is not to be found: whether bits per byte compare cannot be told.")
    if sum(run.folder.kind != PRETRAIN for run in runs) > 1:
        told.append(
            "Whether runs of fine-tuning were measured on the same examples cannot be told from their folders: compare "
            "the figures of those alone of which you know it."
        )
    if len({run.folder.kind for run in runs}) > 1:
        told.append("The runs are of different kinds: what one of them does not measure is a dash.")
    if len({run.text for run in runs} - {None}) > 1:
        told.append(
            "The runs were measured on different held-out texts: bits per byte compare only between runs of the same "
            "letter."
        )
    if same_text and not same_tokenizer:
        told.append("The tokenizers differ: compare bits per byte, not loss, which counts per token.")
    looked = {(run.recipe.get("eval_tokens"), run.recipe.get("model.context_length")) for run in runs}
    if same_text and len(looked) > 1:
        told.append(
            "On the way the runs looked at different parts of the held-out text (eval_tokens, context_length): "
            "the figure on all of it is the one to compare."
        )
    return told
