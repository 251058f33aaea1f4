"""``groundup data list|get|prepare|inspect``: text into token shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from groundup.cli.arguments import call_one_of
from groundup.runtime import say
from groundup.runtime.console import quantity


def list_sources() -> None:
    """List the named sources."""
    from rich.table import Table

    from groundup.data import NAMED_SOURCES

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("name", "bytes", "licence", "what it is"):
        table.add_column(column)
    for name, source in NAMED_SOURCES.items():
        table.add_row(name, "" if source.size is None else quantity(source.size), source.licence, source.description)
    say(table)
    say("Also: a file, a folder, or hf:owner/name[:path inside].")


def get(name: str, data_dir: str | None = None) -> None:
    """Download a named source or hf:owner/name, with resume and checksum, and print where it lies.

    Args:
        name: a named source, or hf:owner/name
        data_dir: where downloads are kept
    """
    from groundup.data import get_source

    say(str(get_source(name, Path(data_dir) if data_dir else None)))


def prepare(
    data: str,
    out: str = "data/prepared",
    vocab_size: int | None = None,
    pattern: str = "gpt4",
    tokenizer: str | None = None,
    val_fraction: float = 0.05,
    max_val_bytes: int = 1_000_000,
    min_chars: int = 16,
    dedup: bool = True,
    max_bytes: int | None = None,
    data_dir: str | None = None,
    limit: int | None = None,
    seed: int = 1337,
) -> None:
    """Collect, clean, deduplicate and split a text, train a tokenizer on it and write token shards.

    Args:
        data: a file, a folder, stdlib, a named source, or hf:owner/name
        out: the folder to write
        vocab_size: size of the vocabulary; derived from the size of the text when not given
        pattern: how text is cut before merging: gpt2, gpt4, o200k or a regular expression
        tokenizer: a tokenizer to use instead of training one
        val_fraction: part of the bytes to hold out
        max_val_bytes: hold out at most this many bytes
        min_chars: drop documents shorter than this
        dedup: drop exact duplicates
        max_bytes: read at most this much text
        data_dir: where downloads are kept
        limit: read at most this many documents
        seed: decides which documents are held out
    """
    from groundup.data import CorpusRecipe
    from groundup.data import prepare as prepare_data
    from groundup.tokenizer import Tokenizer

    prepared = prepare_data(
        data,
        Path(out),
        vocab_size=vocab_size,
        pattern=pattern,
        tokenizer=Tokenizer.load(tokenizer) if tokenizer else None,
        corpus=CorpusRecipe(
            val_fraction=val_fraction,
            max_val_bytes=max_val_bytes,
            min_chars=min_chars,
            dedup=dedup,
            max_bytes=max_bytes,
        ),
        data_dir=Path(data_dir) if data_dir else None,
        limit=limit,
        seed=seed,
    )
    inspect(str(prepared.folder))


def inspect(folder: str) -> None:
    """Show what a prepared folder, or a run's, holds.

    Args:
        folder: what ``data prepare`` wrote, or a run folder
    """
    from rich.table import Table

    from groundup.data import PreparedData

    place = Path(folder)
    if not (place / "stats.json").is_file() and (place / "data" / "stats.json").is_file():
        place = place / "data"
    prepared = PreparedData.open(place)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("part", "documents", "bytes", "tokens", "bytes per token"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, part in (("train", prepared.train), ("val", prepared.val)):
        per_token = part.n_bytes / max(1, part.n_tokens)
        table.add_row(name, f"{part.n_documents:,}", f"{part.n_bytes:,}", f"{part.n_tokens:,}", f"{per_token:.2f}")
    say(table)
    say(f"{place}: vocabulary of {prepared.tokenizer.vocab_size:,}")


COMMANDS: dict[str, Callable[..., None]] = {"list": list_sources, "get": get, "prepare": prepare, "inspect": inspect}


def main(arguments: Sequence[str]) -> None:
    """Run the sub-command named first."""
    call_one_of(COMMANDS, "data", arguments)
