"""The tables of a report and of a comparison for a terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from groundup.report.compare import Figures, Run
from groundup.report.metrics import is_number
from groundup.report.run_folder import read_run
from groundup.report.standing import standings
from groundup.runtime.console import byte_size

if TYPE_CHECKING:
    from rich.table import Table


def console_table(run: str | os.PathLike[str]) -> Table:
    """Bits per byte of the model and its yardsticks, best first, the model's own row marked.

    The table has no rows where the run has not been evaluated.

    Raises:
        GroundupError: there is no such run.
    """
    from rich.table import Table
    from rich.text import Text

    found = read_run(run)
    val_bytes = found.evaluation.get("val_bytes")
    of = f" of held-out text ({byte_size(val_bytes)})" if is_number(val_bytes) else ""
    table = Table(title=f"Bits per byte{of}: fewer is better", title_justify="left")
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    table.add_column("beside it, the model needs")
    for row in standings(found.evaluation_rows):
        # Text, not markup: a model's name may hold brackets.
        cells = (row.name, row.bits_text, row.model_needs)
        table.add_row(*(Text(cell) for cell in cells), style="bold" if row.is_model else None)
    return table


def figures_of_runs(title: str, runs: Sequence[Run], figures: Sequence[Figures]) -> Table:
    """Measures as rows and runs as columns; the lowest of those that may be compared stands out.

    Args:
        title: above the table.
        runs: whose columns they are.
        figures: one row for each.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for run in runs:
        table.add_column(Text(run.name), justify="right", overflow="fold")
    for row in figures:
        cells = [Text(f"{cell} *" if place == row.best else cell) for place, cell in enumerate(row.cells)]
        if row.best is not None:
            cells[row.best].stylize("bold")
        table.add_row(Text(row.name), *cells)
    return table
