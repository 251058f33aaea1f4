"""The report of a run: ``report.html``, one file that needs no network, no script and no other file."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from groundup.report import classes_page, finetuning
from groundup.report.blocks import blocks, cell, duration, label
from groundup.report.cost import costs
from groundup.report.facts import Fact, effort
from groundup.report.figure import Plot
from groundup.report.jsonl import Row
from groundup.report.metrics import is_number, series
from groundup.report.plots import draw_plots
from groundup.report.run_folder import CLASSIFY, PRETRAIN, SFT, RunFolder, read_run
from groundup.report.samples import by_step
from groundup.report.standing import DIGITS, Standing, headline, standings
from groundup.runtime import write_atomic
from groundup.runtime.console import byte_size

# Control characters as their pictures (U+2400 …): a model may write any byte, and a page should show which.
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10, 13)} | {127: 0x2421}


def write_report(run: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a run folder, from whatever of the run is there.

    Returns:
        The path of the page.

    Raises:
        GroundupError: there is no such run, it has nothing to report yet, or the page cannot be written.
    """
    found = read_run(run)
    path = found.path / "report.html"
    # A lone surrogate, half a character, becomes a question mark: UTF-8 has no way to write it.
    write_atomic(path, render(found).encode("utf-8", "replace"))
    return path


def render(run: RunFolder) -> str:
    """The page as text."""
    template, page = PAGES[run.kind]
    return (
        templates()
        .get_template(template)
        .render(
            run=run,
            costs=costs(run.metrics),
            samples=by_step(run.samples),
            plan=plan_sections(run.plan),
            machine=blocks(run.environment),
            notes=notes(run),
            **page(run),
        )
    )


def pretraining_page(run: RunFolder) -> dict[str, Any]:
    """What the page of a pretraining run shows, for ``templates/run.html.j2``."""
    table = standings(run.evaluation_rows)
    val_bytes = run.evaluation.get("val_bytes")
    return {
        "headline": headline(run),
        "warning": False,
        "facts": facts(run, table),
        "table": table,
        "widest": max((row.bits_per_byte or 0.0 for row in table), default=0.0),
        "val_size": byte_size(val_bytes) if is_number(val_bytes) else "",
        "plots": draw_plots(run.metrics, [row for row in table if not row.is_model]),
        "data": blocks(run.data),
    }


# The template of each kind of run, and what gathers what it shows.
PAGES: dict[str, tuple[str, Callable[[RunFolder], dict[str, Any]]]] = {
    PRETRAIN: ("run.html.j2", pretraining_page),
    SFT: ("sft.html.j2", finetuning.page),
    CLASSIFY: ("classify.html.j2", classes_page.page),
}


@cache
def templates() -> Environment:
    """The templates of this room's pages, and what they call."""
    environment = Environment(
        loader=PackageLoader("groundup.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "cell": cell, "label": label, "duration": duration, "size": byte_size}
    environment.filters |= {"drawing": drawing}
    return environment


def visible(text: object) -> str:
    """Text with its control characters shown as pictures; line breaks and tabs stay."""
    return str(text).translate(CONTROL_PICTURES)


def drawing(plot: Plot) -> Markup:
    """A figure as it goes into a page: ours, from numbers and escaped names."""
    return Markup(plot.svg)


def facts(run: RunFolder, table: list[Standing]) -> list[Fact]:
    """The figures at the top: what came out, and what went in."""
    model = next((row for row in table if row.is_model and row.bits_per_byte is not None), None)
    held_out = series(run.metrics, "eval", "step", "bits_per_byte")[1]
    found = []
    if model is not None:
        found.append(Fact(model.bits_text, "bits per byte, held out"))
    elif held_out:
        found.append(Fact(f"{held_out[-1]:.{DIGITS}f}", "bits per byte, held out, so far"))
    return found + effort(run)


def notes(run: RunFolder) -> list[str]:
    """What the page cannot show, and why."""
    told = run.not_shown
    nonfinite = sum(bool(row.get("nonfinite")) for row in run.metrics)
    if nonfinite:
        told.append(f"measurements that were not finite numbers: rows of metrics.jsonl that have some: {nonfinite}")
    return told


def plan_sections(plan: list[Row]) -> dict[str, list[Row]]:
    """The rows of the plan by section, in the order in which they come."""
    sections: dict[str, list[Row]] = {}
    for row in plan:
        sections.setdefault(str(row.get("section", "")), []).append(row)
    return sections
