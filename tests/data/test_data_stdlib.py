from __future__ import annotations

import importlib
import os
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import pytest

from groundup.data import Document, open_source, stdlib_source
from groundup.data.stdlib_source import TABLE, module_group
from groundup.runtime import GroundupError


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return list(open_source("stdlib"))


def test_three_parts_of_the_expected_size(documents: list[Document]) -> None:
    sizes: Counter[str] = Counter()
    for document in documents:
        sizes[document.name.split("/")[0]] += len(document.text)
    assert sizes["stdlib"] > 8_000_000
    assert sizes["docs"] > 300_000
    assert sizes["pydoc"] > 300_000 or not any(document.name.startswith("pydoc/") for document in documents)
    assert len({document.name for document in documents}) == len(documents)


def test_no_tests_and_nobody_elses_packages(documents: list[Document]) -> None:
    parts = {part for document in documents for part in document.name.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}


def test_docstrings_of_what_has_no_source(documents: list[Document]) -> None:
    by_name = {document.name: document for document in documents}
    builtins = by_name["docs/builtins"].text
    assert "builtins.len(obj, /)\n    Return the number of items in a container." in builtins
    assert "builtins.str.split(sep=None, maxsplit=-1)\n" in builtins
    assert builtins.count("Return the number of items in a container.") == 1
    assert " at 0x" not in "".join(document.text for document in documents if document.name.startswith("docs/"))
    assert (
        by_name["stdlib/json/decoder.py"].text == Path(sysconfig.get_paths()["stdlib"], "json/decoder.py").read_text()
    )


def test_source_and_docs_of_a_module_are_one_group(documents: list[Document]) -> None:
    groups = {document.name: document.group for document in documents}
    assert groups["docs/_io"] == groups["stdlib/io.py"] == groups["stdlib/_pyio.py"] == "stdlib/io"
    assert groups["docs/_json"] == groups["stdlib/json/decoder.py"] == "stdlib/json"
    assert module_group("__future__") == "stdlib/__future__"
    assert module_group("_thread") == "stdlib/thread"


def test_same_documents_in_another_process() -> None:
    script = (
        "import hashlib; from groundup.data import open_source; h = hashlib.sha256();"
        "[h.update(f'{d.name}|{d.group}|{d.text}'.encode()) for d in open_source('stdlib')]; print(h.hexdigest())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
        ).stdout
        for environment in _environments()
    }
    assert len(outputs) == 1
    assert len(outputs.pop()) == 65  # a hash, and nothing that importing a module printed


def _environments() -> list[dict[str, str]]:
    return [{**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)} for seed in ("1", "2")]


def test_takes_less_than_five_seconds() -> None:
    started = time.process_time()  # other tests run beside this one
    list(open_source("stdlib"))
    assert time.process_time() - started < 5


def test_smaller_where_parts_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(stdlib_source.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert {document.name.split("/")[0] for document in open_source("stdlib")} == {"docs"}
    monkeypatch.setattr(stdlib_source.sys, "stdlib_module_names", frozenset())
    with pytest.raises(GroundupError, match="no source or documentation"):
        list(open_source("stdlib"))


def test_a_module_that_cannot_be_imported_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = importlib.import_module

    def without_select(name: str) -> object:
        if name == "select":
            raise ImportError("libselect.so: cannot open shared object file")
        return imported(name)

    monkeypatch.setattr(importlib, "import_module", without_select)
    source = open_source("stdlib")
    names = {document.name for document in source}
    assert "docs/math" in names
    skipped = [(one.name, one.reason) for one in source.skipped if one.reason != TABLE]
    assert skipped == [("docs/select", "cannot be imported")]


def test_tables_are_left_out_and_code_is_not() -> None:
    source = open_source("stdlib")
    names = {document.name for document in source}
    tables = {one.name for one in source.skipped if one.reason == TABLE}
    assert {"stdlib/html/entities.py", "stdlib/encodings/cp1252.py"} <= tables
    assert {"stdlib/argparse.py", "stdlib/encodings/utf_8.py", "stdlib/opcode.py", "stdlib/mimetypes.py"} <= names
