"""``groundup tokenizer inspect``: how a tokenizer cuts a text, and how far it compresses it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from groundup.cli.arguments import read_stdin
from groundup.cli.tables import add_row, figures_table, left_out
from groundup.runtime import UsageError, say

if TYPE_CHECKING:
    from rich.table import Table

    from groundup.data import Source
    from groundup.tokenizer import Tokenizer
    from groundup.tokenizer.describe import Survey

VIEW_TOKENS = 5000  # tokens of a text that the terminal shows
EXCERPT_TOKENS = 200  # the same for --data, where the figures come first
LISTED = 10  # longest and rarest tokens that the terminal lists
GROUPS = 40  # languages that the terminal lists


def inspect(
    tokenizer: str,
    text: str | None = None,
    data: str | None = None,
    html: str | None = None,
    allow_special: bool = False,
    limit: int | None = None,
) -> None:
    """Show how a tokenizer cuts a text and how far it compresses it, by language too; its longest and rarest tokens.

    Args:
        tokenizer: a folder, a tokenizer.json, a .tiktoken file, or any other vocabulary that import reads
        text: the text; - or nothing reads standard input
        data: instead of a text, a file, a folder, stdlib, a named source, or hf:owner/name
        html: write one HTML page with all of it to this file
        allow_special: let special tokens in the text stand for themselves
        limit: read at most this many documents of --data
    """
    from groundup.tokenizer import Tokenizer

    if data is not None and text is not None:
        raise UsageError("tokenizer inspect: give a text or --data, not both.")
    tok = Tokenizer.load(tokenizer)
    if data is not None:
        _inspect_data(tok, tokenizer, data, limit, html)
        return
    content = read_stdin() if text in (None, "-") else str(text)
    if not content:
        raise UsageError("groundup tokenizer inspect needs a text.")
    _inspect_text(tok, tokenizer, content, allow_special, html)


def _inspect_text(tok: Tokenizer, name: str, content: str, allow_special: bool, html: str | None) -> None:
    import numpy as np

    from groundup.tokenizer.describe import Compression, Survey

    ids = tok.encode(content, allow_special="all" if allow_special else ())
    _show_tokens(tok, ids, VIEW_TOKENS)
    found = Survey(np.bincount(ids, minlength=tok.vocab_size), Compression())
    found.total.add(content, len(ids))
    total = found.total
    if html is not None:
        _write_page(html, tok, name, "a text given on the command line", found, ids)
    say(f"{total.tokens:,} tokens, {total.bytes:,} bytes, {total.bytes_per_token:.2f} bytes per token")


def _inspect_data(tok: Tokenizer, name: str, data: str, limit: int | None, html: str | None) -> None:
    from groundup.data import open_source
    from groundup.tokenizer.describe import survey, unused_tokens
    from groundup.tokenizer.view import PAGE_TOKENS, listed_longest, listed_rarest

    source = open_source(data, limit=limit)
    grouped = _Grouped(source)
    found = survey(tok, grouped)
    total = found.total
    ids = [token for text in grouped.first for token in tok.encode(text)][:PAGE_TOKENS]
    if html is not None:
        _write_page(html, tok, name, source.description, found, ids, grouped.kind if len(found.groups) > 1 else "")
    say(f"{total.documents:,} documents, {total.words:,} words{left_out(source)}")
    say(f"{total.tokens:,} tokens, {total.bytes:,} bytes, {total.bytes_per_token:.2f} bytes per token")
    say(f"{total.tokens_per_word:.2f} tokens per word, {total.tokens_per_character:.2f} per character")
    if len(found.groups) > 1:
        say()
        say(_group_table(found, grouped.kind))
        if len(found.groups) > GROUPS:
            say(f"… and {len(found.groups) - GROUPS} more" + ("" if html else "; --html FILE lists them all"))
    for title, rows in (
        ("longest tokens", listed_longest(tok, LISTED)),
        ("rarest tokens that occur", listed_rarest(tok, found, LISTED)),
    ):
        say()
        table = figures_table("id", "", left=(title,))
        for row in rows:
            add_row(table, row.id, row.text, row.figure)
        say(table)
    say(f"{unused_tokens(tok, found.occurrences):,} tokens of the vocabulary never occur")
    say()
    _show_tokens(tok, ids, EXCERPT_TOKENS, total.tokens)


class _Grouped:
    """The documents of a source with their language, where their records name one, else with their script."""

    kept = 100_000  # characters of the beginning that are kept, to be shown

    def __init__(self, source: Source) -> None:
        self._source = source
        self.first: list[str] = []
        self.kind = "script"

    def __iter__(self) -> Iterator[tuple[str, str]]:
        from groundup.tokenizer.describe import main_script

        room = self.kept
        for document in self._source:
            if room > 0:
                self.first.append(document.text[:room])
                room -= len(document.text)
            if document.language:
                self.kind = "language"
            yield document.language or main_script(document.text) or "no letters", document.text


def _show_tokens(tok: Tokenizer, ids: Sequence[int], most: int, of: int | None = None) -> None:
    """The tokens of a text: coloured where there are colours, else with a bar after each."""
    from groundup.tokenizer.view import pieces, plain_view, terminal_view

    shown = pieces(tok, ids[:most])
    say(terminal_view(shown) if sys.stdout.isatty() else plain_view(shown))
    more = (len(ids) if of is None else of) - len(shown)
    if more > 0:
        say(f"… and {more:,} more tokens")


def _write_page(
    path: str, tok: Tokenizer, name: str, source: str, found: Survey, ids: Sequence[int], grouping: str = ""
) -> None:
    from groundup.runtime import write_atomic
    from groundup.tokenizer.view import PAGE_TOKENS, html_page, pieces

    shown = pieces(tok, ids[:PAGE_TOKENS])
    write_atomic(path, html_page(tok, name, source, found, shown, grouping))
    say(f"page: {path}")


def _group_table(found: Survey, kind: str) -> Table:
    columns = ("documents", "bytes", "tokens", "tokens per word", "per character", "bytes per token")
    table = figures_table(kind, *columns)
    for group, figures in islice(found.groups.items(), GROUPS):
        add_row(
            table,
            group,
            f"{figures.documents:,}",
            f"{figures.bytes:,}",
            f"{figures.tokens:,}",
            f"{figures.tokens_per_word:.2f}",
            f"{figures.tokens_per_character:.2f}",
            f"{figures.bytes_per_token:.2f}",
        )
    return table
