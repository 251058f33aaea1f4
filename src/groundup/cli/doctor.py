"""``groundup doctor``: does this machine have what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from groundup.cli.arguments import call
from groundup.runtime import GroundupError, say

STYLES = {"ok": "green", "note": "yellow", "fail": "red"}


def doctor(out: str = "runs") -> None:
    """Examine Python, packages, processor, memory, disk, device, precision and compiler by trying them.

    Args:
        out: the folder runs would be written to
    """
    from rich.table import Table
    from rich.text import Text

    from groundup.runtime.doctor import examine

    findings = examine(Path(out))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for finding in findings:
        # Text, not markup: a detail such as pip install 'groundup[data]' is to be shown as it is.
        table.add_row(Text(finding.status, style=STYLES[finding.status]), Text(finding.name), Text(finding.detail))
    say(table)
    failed = [finding.name for finding in findings if finding.status == "fail"]
    if failed:
        raise GroundupError(f"doctor: {', '.join(failed)} would not work here; the lines above say how to mend it.")
    say("Everything the demo needs is here: make demo")


def main(arguments: Sequence[str]) -> None:
    """Parse the flags and examine."""
    call(doctor, "doctor", arguments)
