"""The report of a run: its metrics files, its samples, its plots, and one HTML page that tells what came of it.

Read in this order: jsonl.py (files that grow by one line at a time and survive a crash), metrics.py and
samples.py (the two that a run writes), run_folder.py (everything a report reads, each part optional),
standing.py (the model beside its yardsticks, in words and rows), cost.py (what it cost), figure.py and plots.py (the
curves), facts.py, html.py and templates/run.html.j2 (the page). A run of fine-tuning has instead: examples.py (what it
learnt from), measures.py (measures of several models as text), finetuning.py and templates/sft.html.j2 (answers,
before and after), classes.py, confusion.py, classes_plots.py, classes_page.py and templates/classify.html.j2 (a
classifier beside its baseline). Then compare.py, finetuned.py and compare_page.py (several runs side by side),
terminal.py (the tables in a terminal), inspection.py, inspection_page.py and inspection_plots.py (a look inside a
model). While a run goes on, tracking.py takes what it measures; tensorboard.py and hosted.py pass it on to those who
are asked for.

But for tracking, this room reads what a run left on the disk. It computes no model and no measure of its own, and its
pages need no network and no other file to be read, and no script but for the inspection's, which draws its maps.
"""

from typing import TYPE_CHECKING

from groundup.report.metrics import MetricsWriter, read_metrics, truncate_metrics
from groundup.report.samples import add_samples, truncate_samples
from groundup.report.tracking import TRACKERS, Tracker, check_trackers, open_trackers
from groundup.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from groundup.report.compare import compare_runs
    from groundup.report.compare_page import write_comparison
    from groundup.report.html import write_report
    from groundup.report.terminal import console_table, figures_of_runs

# jinja2, matplotlib and rich are loaded when they are used.
_LAZY = {
    "compare_runs": "compare",
    "console_table": "terminal",
    "figures_of_runs": "terminal",
    "write_comparison": "compare_page",
    "write_report": "html",
}

__all__ = [
    "TRACKERS",
    "MetricsWriter",
    "Tracker",
    "add_samples",
    "check_trackers",
    "compare_runs",
    "console_table",
    "figures_of_runs",
    "open_trackers",
    "read_metrics",
    "truncate_metrics",
    "truncate_samples",
    "write_comparison",
    "write_report",
]

__getattr__ = lazy_names(__name__, _LAZY)
