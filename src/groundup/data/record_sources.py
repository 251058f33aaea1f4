"""Records by name: of a file, of all files of a folder, of a data set of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from groundup.data.files import files_below
from groundup.data.hub import hub_files
from groundup.data.records import SUFFIXES, Headed, suffix_of, whole_records
from groundup.runtime import GroundupError, UsageError
from groundup.runtime.errors import nearest
from groundup.runtime.hub import parse_hub_spec

NAMED_RECORDS = {
    "imdb": "hf:stanfordnlp/imdb:plain_text/train-00000-of-00001.parquet",
    "imdb-test": "hf:stanfordnlp/imdb:plain_text/test-00000-of-00001.parquet",
    "sms-spam": "hf:ucirvine/sms_spam",
}
"""Labelled texts of the hub by short names: 25,000 movie reviews to learn from and as many to test on (Maas et al.
2011), and 5,574 text messages (Almeida, Gómez Hidalgo and Yamakami 2011)."""


def open_records(spec: str, limit: int | None = None, headed: Headed | None = None) -> Iterator[tuple[str, Any]]:
    """Yield the records that ``spec`` names, each with the name of its file and its number there: ``train.jsonl#12``.

    Args:
        spec: a file or a folder of .jsonl, .json, .csv, .tsv or .parquet files, compressed or not;
            ``hf:owner/name[:path-inside]``; a name of :data:`NAMED_RECORDS`; or ``stdlib`` for questions on Python's
            library (stdlib_records.py). A file or folder that is there wins over a name.
        limit: at most so many.
        headed: of CSV and TSV, tells by the cells of a first line whether they name the columns; where they do not,
            columns are called ``1``, ``2`` … Without it they always do.

    Raises:
        UsageError: ``spec`` is empty, or names no file.
        GroundupError: a file is damaged, or cannot be read.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: at least one record is needed.")
    if spec == "stdlib" and not Path(spec).exists():
        from groundup.data.stdlib_records import stdlib_records

        yield from islice(stdlib_records(), limit)
        return
    if not Path(spec).exists():
        spec = NAMED_RECORDS.get(spec, spec)
    left = -1 if limit is None else limit
    for name, path in _files(spec):
        for number, record in whole_records(path, headed):
            if left == 0:
                return
            left -= 1
            yield f"{name}#{number}", record


def _files(spec: str) -> Iterator[tuple[str, Path]]:
    if not spec.strip():
        raise UsageError("--data is empty. Give a file, a folder, or hf:owner/name.")
    if spec.startswith("hf:"):
        repo = parse_hub_spec(spec).repo
        yield from ((f"{repo}/{name}", path) for name, path in hub_files(spec))
        return
    path = Path(spec).expanduser()
    if path.is_dir():
        found = [(name, file) for name, file in files_below(path) if suffix_of(file) in SUFFIXES]
        if not found:
            raise GroundupError(f"{spec}: there is no file of records in this folder ({', '.join(SUFFIXES)}).")
        yield from found
    elif path.exists():
        yield path.name, path
    else:
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UsageError(f"{spec}: no such file or folder.{nearest(path.name, [*beside, *NAMED_RECORDS])}")
