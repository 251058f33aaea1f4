"""Where the model stands: its bits per byte beside the yardsticks, in rows for a table and in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from groundup.report.jsonl import Row
from groundup.report.metrics import is_number
from groundup.report.run_folder import RunFolder

DIGITS = 3  # bits per byte are shown, and therefore compared, to a thousandth


@dataclass(frozen=True)
class Standing:
    """One row of the table of bits per byte.

    Args:
        name: who.
        kind: model, compressor, ngram, …
        bits_per_byte: the measure; None where it was not finite.
        is_model: whether this is the run's own model.
        model_needs: what the model needs beside this row, in words ("12% fewer bits"); empty where that says
            nothing.
        seconds: wall clock of the measurement, or None.
        note: what was trained or compressed on what.
    """

    name: str
    kind: str
    bits_per_byte: float | None
    is_model: bool
    model_needs: str
    seconds: float | None
    note: str

    @property
    def short_name(self) -> str:
        """The name up to its first comma, for a sentence or a plot."""
        return self.name.split(",")[0]

    @property
    def bits_text(self) -> str:
        """The measure as it is shown."""
        return "not finite" if self.bits_per_byte is None else f"{self.bits_per_byte:.{DIGITS}f}"


def standings(rows: Sequence[Row]) -> list[Standing]:
    """The rows of ``evaluation.json``, best first; what has no finite measure stands last."""
    model = next((row for row in rows if row.get("kind") == "model"), None)
    model_bits = _bits(model) if model else None
    table = [
        Standing(
            name=str(row.get("name", "?")),
            kind=str(row.get("kind", "")),
            bits_per_byte=_bits(row),
            is_model=row is model,
            model_needs="" if row is model else _model_needs(model_bits, _bits(row)),
            seconds=float(row["seconds"]) if is_number(row.get("seconds")) else None,
            note=str(row.get("note") or ""),
        )
        for row in rows
    ]
    return sorted(table, key=lambda one: float("inf") if one.bits_per_byte is None else one.bits_per_byte)


def _bits(row: Row) -> float | None:
    bits = row.get("bits_per_byte")
    return float(bits) if is_number(bits) else None


def _model_needs(model: float | None, other: float | None) -> str:
    """How the model's bits relate to another's, true at the precision shown."""
    if model is None or other is None or round(other, DIGITS) <= 0:
        return ""
    if round(model, DIGITS) == round(other, DIGITS):
        return "as many bits"
    percent = abs(100 * (model / other - 1))
    amount = "under 1%" if percent < 1 else f"{percent:.0f}%"
    return f"{amount} {'fewer' if model < other else 'more'} bits"


def headline(run: RunFolder) -> str:
    """The one sentence that matters about a run, in words that hold whatever came of it."""
    table = standings(run.evaluation_rows)
    model = next((row for row in table if row.is_model), None)
    if model is None:
        return _unfinished(run)
    if model.bits_per_byte is None:
        return "The model's bits per byte on held-out text is not a finite number, so it stands nowhere."
    return f"On held-out text the model needs {model.bits_text} bits per byte{_beside(model.bits_per_byte, table)}."


def _beside(model: float, table: list[Standing]) -> str:
    """``: better than gzip -9 (2.450) and …, worse than …``; empty where there is nobody to stand beside."""
    groups: dict[str, list[str]] = {"better than": [], "equal to": [], "worse than": []}
    for row in table:
        if row.is_model or row.bits_per_byte is None:
            continue
        ours, theirs = round(model, DIGITS), round(row.bits_per_byte, DIGITS)
        relation = "better than" if ours < theirs else "worse than" if ours > theirs else "equal to"
        article = "the " if row.kind == "ngram" else ""
        groups[relation].append(f"{article}{row.short_name} ({row.bits_text})")
    told = [f"{relation} {listing(names)}" for relation, names in groups.items() if names]
    return f": {'; '.join(told)}" if told else ""


def _unfinished(run: RunFolder) -> str:
    """The sentence for a run whose model has not been compared with anything."""
    evals = [row for row in run.metrics if row.get("kind") == "eval" and is_number(row.get("bits_per_byte"))]
    if evals:
        bits, step = evals[-1]["bits_per_byte"], evals[-1].get("step", "?")
        return (
            f"At step {step} the model needed {bits:.{DIGITS}f} bits per byte on held-out text. "
            "It has not been compared with anything yet."
        )
    trains = [row for row in run.metrics if row.get("kind") == "train" and is_number(row.get("loss"))]
    if trains:
        loss, step = trains[-1]["loss"], trains[-1].get("step", "?")
        return (
            f"At step {step} the training loss was {loss:.{DIGITS}f} nats per token. "
            "Nothing has been measured on held-out text yet."
        )
    return "Nothing has been measured on held-out text yet."


def listing(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""
