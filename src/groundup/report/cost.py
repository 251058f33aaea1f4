"""What a run cost: time, tokens, energy and CO2, from the rows it left."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from groundup.report.blocks import duration
from groundup.report.jsonl import Row
from groundup.report.metrics import is_number, series
from groundup.runtime.console import byte_size, quantity
from groundup.runtime.monitor import JOULES_PER_KWH, WORLD_GRAMS_PER_KWH

SOURCES = {
    "cpu": "the processor's packages and memory by its own counters, the GPU not",
    "gpu": "the GPUs by their own counters, the processor not",
    "cpu+gpu": "processor and GPUs by their own counters, the rest of the machine not",
    "given": "from the watts that were given",
}


@dataclass(frozen=True)
class Cost:
    """One figure of what a run cost, and what it means."""

    name: str
    value: str
    note: str = ""


def costs(metrics: Sequence[Row]) -> list[Cost]:
    """What can be said of a run's cost; nothing where it has no row of training.

    Args:
        metrics: the rows of ``metrics.jsonl``, of any version.
    """
    rows = list(metrics)
    train = [row for row in rows if row.get("kind") == "train"]
    if not train:
        return []
    found = []
    if (seconds := largest(rows, "seconds")) is not None:
        note = "in the loop, with the evaluations on the way; not preparation and the last evaluation"
        found.append(Cost("time", duration(seconds), note))
    if (tokens := largest(train, "tokens")) is not None:
        steps = largest(train, "step")
        found.append(Cost("tokens", quantity(tokens), f"in {steps:,.0f} steps" if steps is not None else ""))
    if (rate := median(rows, "tokens_per_second")) is not None:
        found.append(Cost("speed", f"{quantity(rate)} tokens/s", "median"))
    if (mfu := median(rows, "mfu")) is not None:
        found.append(Cost("MFU", f"{100 * mfu:.1f}%", "median; share of the machine's measured matrix speed"))
    if memory := peak_memory(rows):
        found.append(Cost("peak memory", byte_size(memory), "of the process, or of the GPU it computed on"))
    if skipped := largest(train, "skipped_steps"):
        found.append(Cost("skipped steps", f"{skipped:,.0f}", "their gradients were not finite; they changed nothing"))
    return found + _energy([row for row in rows if row.get("kind") == "hardware"])


def _energy(hardware: list[Row]) -> list[Cost]:
    """Energy and CO2; that nobody measured it where nobody did; nothing where nobody watched."""
    if not hardware:
        return []
    known = [row for row in hardware if is_number(row.get("energy_joules"))]
    if not known:
        return [Cost("energy", "not measured", "this machine shows no counters of energy that the run may read")]
    last = max(known, key=lambda row: row["energy_joules"])
    joules, grams = last["energy_joules"], last.get("co2_grams")
    found = [Cost("energy", energy_text(joules), SOURCES.get(str(last.get("watts_from")), ""))]
    if is_number(grams) and joules > 0:
        intensity = grams / joules * JOULES_PER_KWH
        grid = f"on a grid of {intensity:.0f} g/kWh; the world's mean was {WORLD_GRAMS_PER_KWH:.0f} in 2024 (IEA)"
        found.append(Cost("CO2", f"{quantity(grams / 1000)} kg" if grams >= 1000 else f"{grams:.3g} g", grid))
    return found


def energy_text(joules: float) -> str:
    """An amount of energy for people: 950 J, 12.3 Wh, 4.56 kWh."""
    if joules < 3600:
        return f"{joules:.4g} J"
    amount = joules / 3600
    for unit in ("Wh", "kWh", "MWh"):
        if amount < 999.5:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:,.3g} GWh"


def largest(rows: Sequence[Row], key: str) -> float | None:
    """The greatest value under a key; None where no row has one."""
    return max((float(row[key]) for row in rows if is_number(row.get(key))), default=None)


def peak_memory(rows: Sequence[Row]) -> float | None:
    """The most bytes that training held at once, as its own rows have it; None where they do not."""
    return largest([row for row in rows if row.get("kind") == "train"], "memory_bytes")


def median(rows: list[Row], key: str) -> float | None:
    """The median over the rows of training; None where no row has one."""
    values = series(rows, "train", key, key)[0]
    return statistics.median(values) if values else None
