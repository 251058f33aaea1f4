"""``groundup data list|get|prepare|inspect|export|import``: text into token shards, and other projects' files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from groundup.cli.arguments import call_one_of
from groundup.runtime import UsageError, say
from groundup.runtime.console import quantity

if TYPE_CHECKING:
    from groundup.data import PreparedData


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
    say("Also: a file, a folder, hf:owner/name[:path inside]; or what is prepared already, by its folder or address.")


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
    split_seed: int = 1337,
) -> None:
    """Collect, clean, deduplicate and split a text, train a tokenizer on it and write token shards.

    Args:
        data: a file, a folder, stdlib, a named source, or hf:owner/name; a corpus that is prepared already is shown
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
        split_seed: decides which documents are held out
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
            split_seed=split_seed,
        ),
        data_dir=Path(data_dir) if data_dir else None,
        limit=limit,
    )
    _show(prepared)


def inspect(folder: str) -> None:
    """Show what a prepared folder, or a run's, holds.

    Args:
        folder: what ``data prepare`` wrote, or a run folder; or such a corpus elsewhere: hf:owner/name, s3://bucket/folder
    """
    _show(_open(folder))


def export(prepared: str, out: str, to: Literal["nanogpt", "megatron"] = "nanogpt") -> None:
    """Write a prepared corpus as the token files of another project, its tokenizer beside them.

    Args:
        prepared: what ``data prepare`` wrote, or a run folder; or such a corpus elsewhere: hf:owner/name, s3://bucket/folder
        out: the folder to write
        to: nanogpt (train.bin, val.bin) or megatron (each with its .idx)
    """
    from groundup.data.interchange import NANOGPT_VOCABULARY, export_tokens

    corpus = _open(prepared)
    for file in export_tokens(corpus, Path(out), to):
        say(f"{file}: {quantity(file.stat().st_size)} bytes")
    size = corpus.tokenizer.vocab_size
    if to == "nanogpt" and size != NANOGPT_VOCABULARY:
        say(
            f"The vocabulary has {size:,} tokens. nanoGPT takes {NANOGPT_VOCABULARY:,} unless a meta.pkl beside the "
            f"files says otherwise: pickle.dump({{'vocab_size': {size}}}, open('meta.pkl', 'wb'))"
        )


def import_(
    file: str,
    out: str,
    tokenizer: str | None = None,
    val_fraction: float = 0.05,
    max_val_bytes: int = 1_000_000,
    split_seed: int = 1337,
) -> None:
    """Make a prepared corpus of token files that nanoGPT, llm.c or Megatron-LM read.

    Args:
        file: a .bin file (Megatron's has its .idx beside it), or a folder of them, where names with val are held out
        out: the folder to write
        tokenizer: what made the ids: a file, a folder, hf:owner/name, or a name such as r50k; default: the one beside
            the files, where data export wrote them
        val_fraction: part of the bytes to hold out where no file is
        max_val_bytes: hold out at most this many bytes
        split_seed: decides which documents are held out
    """
    from groundup.data import CorpusRecipe
    from groundup.data.interchange import import_tokens
    from groundup.tokenizer import Tokenizer

    beside = (Path(file) if Path(file).is_dir() else Path(file).parent) / "tokenizer"
    if tokenizer is None and not beside.is_dir():
        raise UsageError("data import: token files do not say which tokenizer made them. Name it with --tokenizer.")
    corpus = CorpusRecipe(val_fraction=val_fraction, max_val_bytes=max_val_bytes, split_seed=split_seed)
    _show(import_tokens(Path(file), Tokenizer.load(tokenizer or beside), Path(out), corpus))


def _open(place: str) -> PreparedData:
    """A prepared corpus: its folder, that of the run it was made for, or an address."""
    from groundup.data import PreparedData
    from groundup.data.places import is_remote
    from groundup.data.remote import open_remote

    if is_remote(place):
        return open_remote(place)
    folder = Path(place)
    if not (folder / "stats.json").is_file() and (folder / "data" / "stats.json").is_file():
        folder = folder / "data"
    return PreparedData.open(folder)


def _show(prepared: PreparedData) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("part", "documents", "bytes", "tokens", "bytes per token"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, part in (("train", prepared.train), ("val", prepared.val)):
        per_token = part.n_bytes / max(1, part.n_tokens)
        table.add_row(name, f"{part.n_documents:,}", f"{part.n_bytes:,}", f"{part.n_tokens:,}", f"{per_token:.2f}")
    say(table)
    say(f"{prepared.folder}: vocabulary of {prepared.tokenizer.vocab_size:,}")


COMMANDS: dict[str, Callable[..., None]] = {
    "list": list_sources,
    "get": get,
    "prepare": prepare,
    "inspect": inspect,
    "export": export,
    "import": import_,
}


def main(arguments: Sequence[str]) -> None:
    """Run the sub-command named first."""
    call_one_of(COMMANDS, "data", arguments)
