"""What commands print alike: tables of figures, and what of a source was left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from groundup.data import Source


def figures_table(first: str, *figures: str, left: Sequence[str] = ()) -> Table:
    """A table whose figures stand to the right, after the columns ``first`` and ``left`` of text."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in (first, *left):
        table.add_column(name)
    for name in figures:
        table.add_column(name, justify="right")
    return table


def add_row(table: Table, *cells: object) -> None:
    """Add a row of text: what stands in brackets is no markup."""
    from rich.text import Text

    table.add_row(*(Text(str(cell)) for cell in cells))


def left_out(source: Source) -> str:
    """What of the source could not be read, to be put behind the count of what was."""
    from groundup.data.document import count_reasons

    reasons = ", ".join(f"{count:,} {reason}" for reason, count in count_reasons(source.skipped).items())
    return f" (left out: {reasons})" if reasons else ""
