"""The tables of a report and of a comparison for a terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from groundup.report.classes import contest, contestants, verdict
from groundup.report.finetuning import KNEW, MEASURES, before_and_after
from groundup.report.measures import lines, percent, shown
from groundup.report.metrics import is_number
from groundup.report.run_folder import CLASSIFY, SFT, RunFolder, number_of, part_of, read_run
from groundup.report.standing import standings
from groundup.runtime.console import byte_size

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from groundup.report.compare import Figures, Run


def console_table(run: str | os.PathLike[str]) -> Table:
    """What came of a run: bits per byte beside yardsticks, figures before and after, or accuracy beside a baseline.

    The table has no rows where the run has not been evaluated.

    Raises:
        GroundupError: there is no such run.
    """
    found = read_run(run)
    tables = {SFT: _before_and_after, CLASSIFY: _beside_baseline}
    return tables.get(found.kind, _bits_per_byte)(found)


def _before_and_after(found: RunFolder) -> Table:
    """Figures of fine-tuning as rows, the better one marked."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="On held-out examples, before and after fine-tuning (* the better)", title_justify="left")
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    forgetting = part_of(found.evaluation, "forgetting")
    knew = lines([part_of(forgetting, name) for name in ("before", "after")], KNEW[:1])
    measured = lines(before_and_after(found), MEASURES)
    for line in measured:
        table.add_row(Text(line.name), *_marked(line.cells, line.best))
    for line in knew:
        table.add_row(Text(f"{line.name} of what it knew"), *_marked(line.cells, line.best))
    return table


def _beside_baseline(found: RunFolder) -> Table:
    """A classifier and what it is compared with as rows, the model's own marked."""
    from rich.table import Table
    from rich.text import Text

    rows = contestants(found.evaluation_rows)
    texts = number_of(found.evaluation, "test_texts")
    of = "test texts" if texts is None else f"{texts:,.0f} test texts"
    model = contest(rows).model
    said = f": this model {verdict(found).said}" if model is not None else ""
    table = Table(title=Text(f"Right of {of}{said}"), title_justify="left")
    table.add_column("")
    for name in ("right", "95% interval", "macro F1", "log loss"):
        table.add_column(name, justify="right")
    for row in rows:
        others = [shown(row.row.get("macro_f1"), percent), shown(row.row.get("log_loss"))]
        cells = (row.name, row.accuracy_text, row.interval, *others)
        table.add_row(*(Text(cell) for cell in cells), style="bold" if row is model else None)
    return table


def _marked(cells: Sequence[str], best: int | None) -> list[Text]:
    """Cells of which the best stands out."""
    from rich.text import Text

    marked = [Text(f"{cell} *" if place == best else cell) for place, cell in enumerate(cells)]
    if best is not None:
        marked[best].stylize("bold")
    return marked


def _bits_per_byte(found: RunFolder) -> Table:
    """Bits per byte of the model and its yardsticks, best first, the model's own row marked."""
    from rich.table import Table
    from rich.text import Text

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
        table.add_row(Text(row.name), *_marked(row.cells, row.best))
    return table
