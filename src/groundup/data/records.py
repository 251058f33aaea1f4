"""Files of records (JSON lines, JSON, CSV, Parquet): as they are, or each that holds a text as a document."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from groundup.data.decode import COMPRESSIONS, UnreadableFile, decoded, split_stream
from groundup.data.document import Document, Dropped
from groundup.runtime import os_errors

TEXT_FIELDS = ("text", "content")
LANGUAGE_FIELDS = ("language", "lang")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")

Skip = Callable[[Dropped], None]
Record = tuple[int, Any]  # its number in the file, from 1, and what stands there
Headed = Callable[[Sequence[str]], bool]  # whether the cells of a first line name the columns


def read_records(path: Path, suffix: str, name: str, skip: Skip) -> Iterator[Document]:
    """Yield a document per record that holds a text in a field named ``text`` or ``content``.

    Args:
        path: the file, compressed or not.
        suffix: its suffix without the compression's, one of ``SUFFIXES``.
        name: what the documents are called; ``#`` and the record's number are appended.
        skip: is told of records without a text.

    Raises:
        UnreadableFile: it is damaged, or no record in it holds a text.
    """
    if suffix == ".json":
        yield from _json_documents(path, name, skip)
        return
    fields = (*TEXT_FIELDS, *LANGUAGE_FIELDS) if suffix == ".parquet" else None
    yield from _documents(_READERS.get(suffix, _json_lines)(path, fields), path, name, skip)


def whole_records(path: Path, headed: Headed | None = None) -> Iterator[Record]:
    """Yield the records of a file as they are, with their numbers: what JSON holds, or a dictionary of columns.

    Args:
        path: a file of one of ``SUFFIXES``, compressed or not.
        headed: of CSV and TSV; where the first line names no columns, they are called ``1``, ``2`` … Without it, it
            always does.

    Raises:
        UnreadableFile: it is damaged, or of no such kind.
        GroundupError: it cannot be opened.
    """
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        detail = f"records are read from {', '.join(SUFFIXES)}, also .gz, .bz2 and .xz. Convert this file."
        raise UnreadableFile(path, "no file of records", detail)
    with os_errors(path, "cannot read"):
        if suffix == ".json":
            value = _json_value(path)
            yield from (
                _json_lines(path) if value is None else enumerate(value if isinstance(value, list) else [value], 1)
            )
        elif suffix in (".csv", ".tsv"):
            yield from _csv_records(path, headed=headed)
        else:
            yield from _READERS.get(suffix, _json_lines)(path, None)


def suffix_of(path: Path) -> str:
    """A file's suffix, without its compression's."""
    return Path(path.stem if path.suffix.lower() in COMPRESSIONS else path.name).suffix.lower()


def _documents(records: Iterator[Record], path: Path, name: str, skip: Skip) -> Iterator[Document]:
    found, fields = 0, None
    for number, record in records:
        text = record if isinstance(record, str) else _field(record, TEXT_FIELDS)
        if isinstance(text, str):
            found += 1
            yield Document(text, f"{name}#{number}", language=_field(record, LANGUAGE_FIELDS))
            continue
        fields = fields or (", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__)
        skip(Dropped(f"{name}#{number}", "no text field"))
    if not found and fields is not None:
        wanted = " or ".join(TEXT_FIELDS)
        detail = (
            f"no record has a text in a field {wanted} (found: {fields[:120]}). Rename the field that holds the text."
        )
        raise UnreadableFile(path, "no text field", detail)


def _field(record: Any, names: Sequence[str]) -> str | None:
    if not isinstance(record, dict):
        return None
    return next((record[name] for name in names if isinstance(record.get(name), str)), None)


def _json_lines(path: Path, fields: Sequence[str] | None = None) -> Iterator[Record]:
    for number, line in enumerate(split_stream(decoded(path), "\n"), 1):
        if not line or line.isspace():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            detail = f"line {number} is not JSON ({error}). Mend or remove that line."
            raise UnreadableFile(path, "damaged", detail) from error


def _json_documents(path: Path, name: str, skip: Skip) -> Iterator[Document]:
    """A list of records; JSON lines under the wrong suffix; any other JSON is itself the text."""
    value = _json_value(path)
    if value is None:
        yield from _documents(_json_lines(path), path, name, skip)
    elif isinstance(value, list) and value and all(isinstance(one, (dict, str)) for one in value):
        yield from _documents(enumerate(value, 1), path, name, skip)
    elif value:
        yield Document("".join(decoded(path)), name)


def _json_value(path: Path) -> Any:
    """What a JSON file holds, "" for null; None where it is JSON lines under the wrong suffix."""
    text = "".join(decoded(path))
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise UnreadableFile(path, "damaged", "this JSON is nested too deeply.") from error
    except ValueError as error:
        if text.lstrip().startswith("{") and str(error).startswith("Extra data"):
            return None
        raise UnreadableFile(path, "damaged", f"not JSON ({error}). Mend it, or rename it to .txt.") from error
    return "" if value is None else value


def _csv_records(path: Path, fields: Sequence[str] | None = None, headed: Headed | None = None) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # a document is longer than the 128 KB that csv takes for a sane field
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    quoted = delimiter == "," or _quotes_enclose(path, delimiter)
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    lines = _csv_lines(path)
    try:
        names = next((row for row in csv.reader(lines, delimiter=delimiter, quoting=quoting) if row), [])
        read = 0
        if headed is not None and names and not headed(names):
            first, names = names, [str(column) for column in range(1, len(names) + 1)]
            read = 1
            yield read, dict(zip(names, first, strict=True))
        yield from enumerate(csv.DictReader(lines, names, delimiter=delimiter, quoting=quoting), read + 1)
    except csv.Error as error:
        raise UnreadableFile(path, "damaged", f"not {delimiter!r}-separated values ({error}).") from error


def _csv_lines(path: Path) -> Iterator[str]:
    return (line + "\n" for line in split_stream(decoded(path), "\n"))  # a quoted field keeps its blank lines


def _quotes_enclose(path: Path, delimiter: str) -> bool:
    """Whether quotes stand around cells, as spreadsheets write them, and are no characters of the texts.

    TSV has no quoting of its own (IANA, text/tab-separated-values), so in many files a text begins with a quote and
    goes on behind the next one. Read as quoted, such a file would lose the lines between the two.
    """
    try:
        for _ in csv.reader(_csv_lines(path), delimiter=delimiter, strict=True):
            pass
    except csv.Error:
        return False
    return True


def _parquet_records(path: Path, fields: Sequence[str] | None = None) -> Iterator[Record]:
    """Rows: all columns, or those among ``fields``; where no text is among them, one row of names."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        detail = "reading parquet needs pyarrow. Install it with: pip install 'groundup[data]'"
        raise UnreadableFile(path, "parquet needs groundup[data]", detail) from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = names if fields is None else [field for field in fields if field in names]
            if fields is not None and not set(TEXT_FIELDS) & set(columns):
                yield 1, dict.fromkeys(names)
                return
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UnreadableFile(path, "damaged", f"not a whole parquet file ({error}). Download it again.") from error


_READERS: dict[str, Callable[[Path, Sequence[str] | None], Iterator[Record]]] = {
    ".csv": _csv_records, ".tsv": _csv_records, ".parquet": _parquet_records,
}  # fmt: skip
