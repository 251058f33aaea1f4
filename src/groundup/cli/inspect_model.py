"""``groundup inspect MODEL "text"``: what a model expects at each place of a text, where it looks, layer by layer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from groundup.cli.arguments import call, read_stdin, second_as_flag
from groundup.cli.tables import add_row, figures_table
from groundup.runtime import UsageError, say

if TYPE_CHECKING:
    from rich.table import Table

    from groundup.report.inspection import Inspection

LISTED = 12  # tokens that the terminal lists


def inspect(
    model: str, text: str | None = None, out: str | None = None, png: str | None = None, json: str | None = None,
    top: int = 5, layers: str = "", positions: int = 128, adapter: tuple[str, ...] = (),
    device: str = "auto",
) -> None:  # fmt: skip
    """Show how surprised a model is by each token of a text, its attention, and what each layer would have said.

    Args:
        model: a run, a checkpoint, a Hugging Face folder, or hf:owner/name
        text: the text; read from standard input when it is - or left out and something is piped in
        out: write one HTML page with all of it to this file
        png: write pictures into this folder
        json: write all numbers to this file
        top: how many of the likeliest tokens are kept at each place
        layers: which layers are looked into, such as 0,5,11; all when not given
        positions: attention and the layers' predictions are kept for so many of the first tokens
        adapter: an adapter to put on it: a folder, a run or hf:owner/name; may be given several times, for their sum
        device: auto, cpu, cuda, cuda:1, mps
    """
    chosen = _numbers(layers)
    if text is None and sys.stdin.isatty():
        raise UsageError('groundup inspect needs a text: groundup inspect MODEL "Once upon a time"')
    content = read_stdin() if text in (None, "-") else str(text)
    from groundup.inference import load
    from groundup.inference.inspection import inspect_text

    name = model.rstrip("/").rpartition("/")[2] or model
    lm = load(model, adapters=adapter, device=device)
    found = inspect_text(lm, content, top, chosen, positions=positions, name=name)
    _write(found, out, png, json)
    say(f"{found.scored:,} tokens, {found.total_bits:,.1f} bits: {found.bits_per_byte:.3f} per byte")
    say(_surprises(found))
    for line in found.left_out:
        say(f"{line}; --positions N for more")
    if not (out or png or json):
        say("Attention and the layers' predictions: --out page.html, --png FOLDER or --json FILE")


def _numbers(layers: str) -> list[int] | None:
    try:
        return [int(number) for number in layers.split(",")] if layers else None
    except ValueError as error:
        raise UsageError(f"--layers {layers} should be numbers with commas between them, such as 0,5,11.") from error


def _write(found: Inspection, out: str | None, png: str | None, json: str | None) -> None:
    if out is not None:
        from groundup.report.inspection_page import write_inspection

        say(f"page: {write_inspection(found, out)}")
    if png is not None:
        from groundup.report.inspection_plots import write_inspection_plots

        say(f"pictures: {len(write_inspection_plots(found, png))} in {Path(png)}")
    if json is not None:
        from groundup.report.inspection_page import write_inspection_json

        say(f"numbers: {write_inspection_json(found, json)}")


def _surprises(found: Inspection) -> Table:
    """The tokens that the model expected least, in the order of the text."""
    known = [position for position in range(len(found.tokens)) if found.rank_T[position]]
    least = sorted(sorted(known, key=lambda position: -found.bits[position])[:LISTED])
    all_of_them = len(least) == len(known)
    table = figures_table("token" if all_of_them else "least expected", "bits", "rank", left=("expected instead",))
    for position in least:
        others = [pair for pair in found.expected(position) if pair[0] != found.tokens[position]][:3]
        instead = ", ".join(f"{token} {probability:.0%}" for token, probability in others)
        add_row(table, found.tokens[position], instead, f"{found.bits[position]:.1f}", f"{found.rank_T[position]:,}")
    return table


def main(arguments: Sequence[str]) -> None:
    """Parse the flags and inspect."""
    call(inspect, "inspect", second_as_flag(arguments, "--text"))
