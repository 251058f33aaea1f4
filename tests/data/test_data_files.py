from __future__ import annotations

import builtins
import bz2
import codecs
import gzip
import json
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from groundup.data import Document, open_source
from groundup.data import decode as decode_module
from groundup.data.decode import split_stream
from groundup.data.document import count_reasons
from groundup.runtime import GroundupError, UsageError

PANGRAM = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 十二人のボクサー 🥊\n"


def texts_of(path: Path | str, **options: int) -> list[str]:
    return [document.text for document in open_source(str(path), **options)]


def fails(path: Path | str) -> str:
    with pytest.raises(GroundupError) as caught:
        list(open_source(str(path)))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# ---- what can be read


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.rst", "README", "a.TXT"])
def test_any_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(PANGRAM)
    assert list(open_source(str(path))) == [Document(PANGRAM, name)]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(PANGRAM.encode()))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(pack(json.dumps({"text": PANGRAM}).encode()))
    assert texts_of(tmp_path / f"a.txt{suffix}") == [PANGRAM]
    assert texts_of(tmp_path / f"b.jsonl{suffix}") == [PANGRAM]


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python 3.14 reads zstd")
def test_zstd_names_the_mend(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd")
    assert "zstd -d" in fails(path)


def test_text_is_cut_at_separators(tmp_path: Path) -> None:
    path = tmp_path / "stories.txt"
    path.write_text("one\n<|endoftext|>\n<|endoftext|>two<|endoftext|>\n")
    assert list(open_source(str(path))) == [Document("one\n", "stories.txt"), Document("two", "stories.txt#2")]


@given(st.lists(st.text("ab<|x", max_size=12), max_size=8), st.sampled_from(["\n", "<|x", "ab"]))
def test_split_stream_is_split(chunks: list[str], separator: str) -> None:
    assert list(split_stream(iter(chunks), separator)) == "".join(chunks).split(separator)


@given(st.lists(st.text("ab\n", max_size=8)), st.sampled_from(["a\n", "ab", None]), st.integers(1, 20))
@example(["\na", "aa"], None, 1)
def test_split_stream_ends_a_part_that_grows_too_long(chunks: list[str], separator: str | None, longest: int) -> None:
    text = "".join(chunks)
    parts = list(split_stream(iter(chunks), separator, longest))
    if separator is None:
        assert "".join(parts) == text
    else:  # cut in more places, but nothing is lost, and no separator overlooked
        assert "".join(parts) == text.replace(separator, "")
        assert len(parts) >= len(text.split(separator))
    largest = max(map(len, chunks), default=0)
    # What is left of a chunk behind its last line waits, however long it is, and the next chunk may be added to it.
    longest_part = max(longest, largest) + largest + 2 * len(separator or "")
    assert all(len(part) <= longest_part for part in parts)


@pytest.mark.parametrize("name", ["large.txt", "large.log"])
def test_a_text_of_any_size_is_read_as_documents_that_fit_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("groundup.data.files.LONGEST_DOCUMENT", 1_000)
    monkeypatch.setattr(decode_module, "CHUNK", 100)
    path = tmp_path / name
    text = "".join(f"line {number}\n" for number in range(1_000))
    path.write_text(text)
    documents = list(open_source(str(path)))
    assert "".join(document.text for document in documents) == text
    assert len(documents) == pytest.approx(len(text) / 1_000, abs=2)
    assert all(document.text.endswith("\n") and len(document.text) <= 1_100 for document in documents)
    assert [document.name for document in documents[:2]] == [name, f"{name}#2"]


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
    ],
)
def test_byte_order_marks(tmp_path: Path, mark: bytes, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(mark + PANGRAM.encode(encoding))
    assert texts_of(path) == [PANGRAM]


@given(piece=st.integers(1, 9))
def test_characters_across_pieces_of_the_file(tmp_path_factory: pytest.TempPathFactory, piece: int) -> None:
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_text(PANGRAM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_module, "CHUNK", piece)
        assert texts_of(path) == [PANGRAM]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    separator = "\u2028"  # a line end to Python, not to JSON lines
    lines = [{"text": f"a{separator}b"}, {"content": "c", "id": 4}, {"text": None}, {"title": "no text"}]
    raw = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(raw + '\n\n"plain"\r\n{"text": "\\ud83e\\udd4a"}')
    source = open_source(str(path))
    assert [(one.name, one.text) for one in source] == [
        ("a.jsonl#1", f"a{separator}b"),
        ("a.jsonl#2", "c"),
        ("a.jsonl#6", "plain"),
        ("a.jsonl#7", "🥊"),
    ]
    assert count_reasons(source.skipped) == {"no text field": 2}


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}, "c"]))
    assert texts_of(path) == ["a", "b", "c"]
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert texts_of(path) == ["a", "b"]
    path.write_text('{"name": "package", "version": 1}')
    assert texts_of(path) == ['{"name": "package", "version": 1}']


def test_csv_and_tsv(tmp_path: Path) -> None:
    long = "word " * 50_000  # longer than csv's own limit for a field
    (tmp_path / "a.csv").write_text(f'id,text\r\n1,"a, ""b""\n\nc"\r\n2,{long}\r\n')
    assert texts_of(tmp_path / "a.csv") == ['a, "b"\n\nc', long]
    (tmp_path / "b.tsv").write_text("content\tid\nx, y\t1\n")
    assert texts_of(tmp_path / "b.tsv") == ["x, y"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["a", None, PANGRAM]}), path)
    assert list(open_source(str(path))) == [Document("a", "a.parquet#1"), Document(PANGRAM, "a.parquet#3")]
    parquet.write_table(pyarrow.table({"id": [1], "body": ["a"]}), path)
    assert "found: id, body" in fails(path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "not a whole parquet file" in fails(path)


def test_records_say_their_language(tmp_path: Path) -> None:
    lines = [{"text": "a", "language": "de"}, {"text": "b", "lang": "zh"}, {"text": "c", "language": 7}, {"text": "d"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "b.csv").write_text("lang,text\nfi,e\n")
    (tmp_path / "c.txt").write_text("f")
    languages = {document.text: document.language for document in open_source(str(tmp_path))}
    assert languages == {"a": "de", "b": "zh", "c": None, "d": None, "e": "fi", "f": None}


def test_parquet_says_its_language(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"language": ["de", None], "id": [1, 2], "text": ["a", "b"]}), path)
    assert [(one.text, one.language) for one in open_source(str(path))] == [("a", "de"), ("b", None)]


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without_pyarrow(name: str, *rest: object) -> object:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert "groundup[data]" in fails(tmp_path / "a.parquet")


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\nbroken')
    assert texts_of(path, limit=2) == ["a", "b"]
    with pytest.raises(UsageError, match="--limit 0"):
        open_source(str(path), limit=0)


def test_a_folder_in_order_without_what_tools_made(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.txt", "a.txt", "c/d/e.md", ".git/x.txt", "node_modules/x.txt", "c/.hidden/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in ("venv/pyvenv.cfg", "venv/x.txt", "run/recipe.yaml", "run/environment.json", "run/samples.md", ".x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in ("corpus/stats.json", "corpus/dropped.jsonl", "corpus/train/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    (tmp_path / "latin1.txt").write_bytes("Königsberg".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.jsonl").write_text('{"text": "kept"}\nbroken\n')
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    source = open_source(str(tmp_path))
    names = [document.name for document in source]
    assert names == ["a.txt", "bad.jsonl#1", "b/10.txt", "b/2.txt", "c/d/e.md"]
    assert count_reasons(source.skipped) == {
        "hidden or tool folder": 6,
        "not a regular file": 2,
        "hidden file": 1,
        "damaged": 1,
        "empty": 1,
        "binary": 1,
        "not UTF-8": 1,
    }
    assert list(source) == list(source)  # read anew each time, and counted anew
    assert len(source.skipped) == 13


# ---- what cannot


def test_missing_path_names_the_nearest_and_the_named_sources(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text("x")
    message = fails(tmp_path / "shakespear.txt")
    assert "no such file or folder" in message
    assert "Did you mean shakespeare.txt?" in message
    assert "tinystories" in message
    assert "Did you mean stdlib?" in fails("stdlb")
    assert "no such file" in fails(tmp_path / "no" / "folder" / "here.txt")


def test_a_name_that_is_no_path() -> None:
    with pytest.raises(UsageError, match="--data is empty"):
        open_source(" ")
    assert "cannot read" in fails("x" * 5000)


@pytest.mark.parametrize("raw", [b"", b" \n\n", codecs.BOM_UTF8])
def test_empty_file(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    assert "no text in this file" in fails(path)


def test_binary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\0def")
    assert "binary, not text (NUL at byte 3)" in fails(path)
    path.write_bytes(b"%PDF-1.7\n%\xe2\xe3")
    assert "pdftotext" in fails(path)


@pytest.mark.parametrize("before", [0, 1, 1_048_575, 1_048_576, 3_000_000])
def test_misencoded_file_names_the_byte_and_the_mend(tmp_path: Path, before: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * before + "é".encode("latin-1") + b" tail")
    message = fails(path)
    assert f"not UTF-8 at byte {before:,} (0xE9)" in message
    assert "iconv -f WINDOWS-1252 -t UTF-8 a.txt > a.utf8.txt" in message


def test_cut_short_in_the_middle_of_a_character(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Deich 🥊".encode()[:-1])
    assert "not UTF-8 at byte 6 (0xF0)" in fails(path)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: raw[:30] + b"XXXX" + raw[34:], lambda raw: b"no"])
def test_damaged_compression(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes], damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(damage(pack(os.urandom(300).hex().encode())))
    assert "damaged or cut short" in fails(path)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", '{"body": "a", "id": 1}\n', "no record has a text in a field text or content (found: body, id)"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("a.json", "{oops", "not JSON"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", '[{"body": "a"}]', "found: body"),
        ("a.json", "[]", "no text in this file"),
        ("a.csv", "id,body\n1,a\n", "found: id, body"),
        ("a.csv", "id,text\n", "no text in this file"),
    ],
)
def test_records_that_are_none(tmp_path: Path, name: str, text: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert words in fails(path)


def test_a_folder_without_text(tmp_path: Path) -> None:
    assert "no text in this folder (it is empty)" in fails(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"\0")
    (tmp_path / "b.txt").touch()
    assert "no text in this folder (1 binary, 1 empty)" in fails(tmp_path)


def test_neither_file_nor_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in fails(tmp_path / "pipe")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text(PANGRAM)
    opened = builtins.open

    def refuse(file: object, *rest: object, **options: object) -> object:
        if file == path:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(file, *rest, **options)

    monkeypatch.setattr(builtins, "open", refuse)
    assert "no permission" in fails(path)
    (tmp_path / "b.txt").write_text("readable")
    source = open_source(str(tmp_path))
    assert [document.name for document in source] == ["b.txt"]
    assert count_reasons(source.skipped) == {"cannot be read": 1}


# ---- identity


def test_identity_changes_with_names_sizes_and_times(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    os.utime(path, ns=(1, 1))
    seen = [open_source(str(tmp_path)).identity()]
    assert open_source(str(tmp_path)).identity() == seen[0]
    for change in (
        lambda: os.utime(path, ns=(1, 2)),
        lambda: (path.write_text("ab"), os.utime(path, ns=(1, 2))),
        lambda: path.rename(tmp_path / "b.txt"),
        lambda: (tmp_path / "c.txt").touch(),
    ):
        change()
        seen.append(open_source(str(tmp_path)).identity())
    assert len({json.dumps(one) for one in seen}) == len(seen)


# ---- real text


@pytest.mark.parametrize(
    ("name", "documents", "least_bytes"),
    [
        ("tinyshakespeare.txt", 1, 1_115_394),
        ("botchan_en.txt", 1, 278_000),
        ("c4_en_demo.jsonl", 200, 500_000),
        ("wikipedia_en_demo.txt", 1, 1_000_000),
        ("code.jsonl.gz", 100, 5_000_000),
        ("multilingual/udhr_all_languages.jsonl.gz", 100, 1_000_000),
    ],
)
def test_real_files(shared_data: Path, name: str, documents: int, least_bytes: int) -> None:
    texts = texts_of(shared_data / "pretrain" / name)
    assert len(texts) >= documents
    assert sum(len(text.encode()) for text in texts) >= least_bytes
    assert not texts[0].startswith("\ufeff")
