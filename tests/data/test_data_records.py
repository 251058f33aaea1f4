"""Files of rows: with names of the columns or without; quotes around a cell, and quotes that are part of a text."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from groundup.data import open_records
from groundup.data.records import whole_records
from groundup.runtime import UsageError


def rows(path: Path, headed: bool | None = None) -> list:
    return list(whole_records(path, None if headed is None else lambda cells: headed))


def test_a_first_line_that_names_no_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('\nham,"Ok, lar"\nspam,Win\n')
    assert rows(path) == [(1, {"ham": "spam", "Ok, lar": "Win"})]
    assert rows(path, headed=True) == rows(path)
    assert rows(path, headed=False) == [(1, {"1": "ham", "2": "Ok, lar"}), (2, {"1": "spam", "2": "Win"})]
    assert list(open_records(str(path), 1, lambda cells: cells[0] != "ham")) == [
        ("a.csv#1", {"1": "ham", "2": "Ok, lar"})
    ]
    path.write_text("")
    assert rows(path, headed=False) == []


def test_quotes_of_a_tsv_that_are_part_of_the_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(gzip.compress(b'label\ttext\nham\t"Hi" she said\nspam\t"no end\nham\ta "b" c\n'))
    assert [record["text"] for _, record in rows(path)] == ['"Hi" she said', '"no end', 'a "b" c']


def test_quotes_of_a_tsv_that_enclose(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('label\ttext\nham\t"two\nlines, ""so"""\nspam\tb\n')
    assert [record["text"] for _, record in rows(path)] == ['two\nlines, "so"', "b"]


def test_real_messages_without_a_header_line(shared_data: Path) -> None:
    path = shared_data / "classification" / "SMSSpamCollection.tsv"
    lines = path.read_text().splitlines()
    found = rows(path, headed=False)
    assert [f"{record['1']}\t{record['2']}" for _, record in found] == lines
    assert [number for number, _ in found] == list(range(1, 5575))


def test_labelled_texts_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names stand for data sets of the hub; what lies here by that name wins."""
    from groundup.data import record_sources

    (tmp_path / "part.jsonl").write_text('{"text": "far"}\n')
    asked: list[str] = []

    def hub_files(spec: str) -> list[tuple[str, Path]]:
        asked.append(spec)
        return [("part.jsonl", tmp_path / "part.jsonl")]

    monkeypatch.setattr(record_sources, "hub_files", hub_files)
    monkeypatch.chdir(tmp_path)
    for name, spec in record_sources.NAMED_RECORDS.items():
        assert [record for _, record in open_records(name)] == [{"text": "far"}]
        assert asked.pop() == spec
    (tmp_path / "imdb").mkdir()
    (tmp_path / "imdb" / "own.jsonl").write_text('{"text": "near"}\n')
    assert [record for _, record in open_records("imdb")] == [{"text": "near"}]
    assert not asked
    with pytest.raises(UsageError, match=r"no such file or folder.*imdb-test"):
        list(open_records("imdb-tset"))
