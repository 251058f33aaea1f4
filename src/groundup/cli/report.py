"""``groundup report RUN``: write a run's report again and show its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from groundup.cli.arguments import call
from groundup.runtime import UsageError, say


def report(run: str) -> None:
    """Write RUN/report.html from what the run has recorded so far, and print its table.

    Args:
        run: a run folder
    """
    from groundup.report import console_table, write_report

    folder = Path(run)
    if not folder.is_dir():
        raise UsageError(f"{run}: no such run folder.")
    page = write_report(folder)
    if (folder / "evaluation.json").is_file():
        say(console_table(folder))
    say(f"Report: {page}")


def main(arguments: Sequence[str]) -> None:
    """Parse the flags and write the report."""
    call(report, "report", arguments)
