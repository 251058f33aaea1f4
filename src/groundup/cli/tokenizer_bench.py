"""``groundup tokenizer bench``: how fast a tokenizer is on a text, beside the libraries one would use instead."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from groundup.cli.tables import add_row, figures_table
from groundup.runtime import GroundupError, UsageError, progress, say

if TYPE_CHECKING:
    from groundup.data import Source
    from groundup.tokenizer import Tokenizer
    from groundup.tokenizer.measure import Encoder, Ids


def bench(
    tokenizer: str,
    data: str = "stdlib",
    megabytes: float = 10.0,
    threads: int | None = None,
    pattern: str | None = None,
) -> None:
    """Measure how fast a tokenizer is, beside tiktoken, Hugging Face tokenizers and gigatoken where they are installed.

    Args:
        tokenizer: a folder, a tokenizer.json, a .tiktoken file, or any other vocabulary that import reads
        data: the text: a file, a folder, stdlib, a named source, or hf:owner/name
        megabytes: encode at most so much of it
        threads: beside one thread, measure with so many; all cores when not given
        pattern: how text is cut, where the file does not say
    """
    from groundup.data import open_source
    from groundup.runtime.environment import usable_cores
    from groundup.tokenizer import Tokenizer
    from groundup.tokenizer.measure import own_encoder

    if megabytes <= 0:
        raise UsageError(f"--megabytes {megabytes:g} must be more than 0.")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads} must be at least 1.")
    counts = sorted({1, threads or usable_cores()})
    # gigatoken's pool of threads is made when it is first used, with as many as this says.
    os.environ.setdefault("RAYON_NUM_THREADS", str(counts[-1]))
    tok = Tokenizer.load(tokenizer, pattern=pattern)
    texts, size = _texts_up_to(open_source(data), int(megabytes * 1e6))
    say(f"{size / 1e6:.1f} MB of {data}, {len(texts):,} documents, {counts[-1]} threads at most")

    columns = (f"{state}, {count} thread{'s' if count > 1 else ''}" for count in counts for state in ("cold", "warm"))
    table = figures_table("MB/s", *columns, "ids")
    with tempfile.TemporaryDirectory() as folder:
        peers = _peers(tok, Path(folder))
        with progress("measuring", 1 + len(peers), "libraries") as bar:
            speeds, reference = _measured(lambda: own_encoder(Tokenizer.load(tokenizer, pattern)), texts, size, counts)
            add_row(table, "groundup", *speeds, f"{len(reference[0]):,}")
            for name, make in peers.items():
                bar.advance(note=name)
                add_row(table, name, *_beside(make, texts, size, counts, reference))
    say(table)
    say(f"{size / max(1, len(reference[0])):.2f} bytes per token")
    say("cold: the first pass of a new tokenizer; warm: a later pass over the same text")


def _texts_up_to(source: Source, most: int) -> tuple[list[str], int]:
    """The first documents of a source, together about ``most`` bytes, and how many bytes they are."""
    texts: list[str] = []
    size = 0
    for document in source:
        data = document.text.encode("utf-8", "replace")[: most - size]
        texts.append(data.decode("utf-8", "ignore"))
        size += len(texts[-1].encode())
        if size >= most - 4:  # a character has at most four bytes
            break
    if not size:
        raise GroundupError(f"{source.name}: there is no text in it.")
    return texts, size


def _peers(tok: Tokenizer, folder: Path) -> dict[str, Callable[[], Encoder]]:
    """What makes the encoder of each installed library, from this tokenizer written to ``folder``."""
    from groundup.tokenizer.measure import VocabularyFiles, installed_peers

    files = VocabularyFiles(tok.pattern, ranks=folder / "vocabulary.tiktoken", json=folder / "tokenizer.json")
    with suppress(GroundupError):  # a vocabulary that has no such form: the libraries that read it say so themselves
        tok.save(folder)
        tok.save_tiktoken(folder / "vocabulary.tiktoken")
    return {name: partial(make, files) for name, make in installed_peers().items()}


def _measured(make: Callable[[], Encoder], texts: list[str], size: int, counts: Sequence[int]) -> tuple[list[str], Ids]:
    """MB/s, cold and warm for each number of threads, and the ids."""
    from groundup.tokenizer.measure import measure

    cells: list[str] = []
    ids: Ids | None = None
    for threads in counts:
        speed, result, encoder = measure(make, texts, threads, patience=5.0)
        ids = encoder.collect(result) if ids is None else ids
        cells += [
            f"{size / 1e6 / speed.typical_cold:.1f}",
            f"{size / 1e6 / speed.typical_warm:.1f}" if speed.warm else "–",
        ]
    assert ids is not None
    return cells, ids


def _beside(
    make: Callable[[], Encoder], texts: list[str], size: int, counts: Sequence[int], reference: Ids
) -> list[str]:
    """The cells of another library's row, with whether its ids are ours."""
    from groundup.tokenizer.measure import different_texts

    try:
        cells, ids = _measured(make, texts, size, counts)
    except BaseException as error:
        # A library in Rust may panic, which is no Exception; what stops this program is not for us to catch.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        return [*["–"] * (2 * len(counts)), "cannot load or encode this"]
    different = different_texts(reference, ids)
    return [*cells, "equal" if different == 0 else f"differ in {different:,} documents"]
