"""The report of a run: its metrics files, its samples, its plots, and one HTML page that tells what came of it.

Read in this order: jsonl.py (files that grow by one line at a time and survive a crash), metrics.py and
samples.py (the two that a run writes), run_folder.py (everything a report reads, each part optional),
standing.py (the model beside its yardsticks, in words and rows), plots.py (the curves), html.py and
templates/run.html.j2 (the page), terminal.py (the same table in a terminal).

This room reads what a run left on the disk. It computes no model and no measure of its own, and what it
writes needs no network, no script and no other file to be read.
"""

from typing import TYPE_CHECKING

from groundup.report.metrics import MetricsWriter, read_metrics, truncate_metrics
from groundup.report.samples import add_samples, truncate_samples
from groundup.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from groundup.report.html import write_report
    from groundup.report.terminal import console_table

_LAZY = {"write_report": "html", "console_table": "terminal"}  # jinja2 and rich are loaded when they are used

__all__ = [
    "MetricsWriter",
    "add_samples",
    "console_table",
    "read_metrics",
    "truncate_metrics",
    "truncate_samples",
    "write_report",
]

__getattr__ = lazy_names(__name__, _LAZY)
