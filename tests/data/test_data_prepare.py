from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from groundup.data import CorpusRecipe, PreparedData, TokenLoader, TokenSet, prepare, suggest_vocab_size
from groundup.data.pipeline import _sample
from groundup.runtime import GroundupError, UsageError
from groundup.tokenizer import Tokenizer

LINE = "the of and a to in is you that it he was for on are as with his they at be this have from or"
WORDS = LINE.split()


def prose(n_bytes: int, seed: int = 0) -> str:
    chosen = random.Random(seed)
    lines = []
    size = 0
    while size < n_bytes:
        lines.append(" ".join(chosen.choices(WORDS, k=8)))
        size += len(lines[-1]) + 1
    return ("\n".join(lines) + "\n")[:n_bytes]


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    """60 documents of 1,000 bytes, a duplicate, one that is too short, a binary one."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02d}.txt").write_text(prose(1000, seed=number))
    (folder / "again.txt").write_text("\n" + prose(1000, seed=7).replace("\n", "\n\n"))
    (folder / "short.txt").write_text("no\n")
    (folder / "image.txt").write_bytes(b"\0\1\2")
    return folder


def test_everything_a_run_needs_is_there(corpus_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out" / "data"
    made = prepare(str(corpus_folder), out)
    assert sorted(entry.name for entry in out.iterdir()) == ["dropped.jsonl", "stats.json", "tokenizer", "train", "val"]
    assert made.stats["documents"] == {"collected": 62, "cleaned": 60, "train": 57, "val": 3}
    assert made.stats["bytes"]["train"] + made.stats["bytes"]["val"] == made.stats["bytes"]["cleaned"] == 60_000
    assert made.stats["dropped"] == {"duplicate": 1, "too short": 1}
    assert made.stats["skipped"] == {"binary": 1}
    assert made.stats["split"] == "by document"
    assert set(made.stats["seconds"]) == {"collect", "split", "tokenizer", "shards"}
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert {(one["name"], one["reason"]) for one in dropped} == {
        ("image.txt", "binary"),
        ("again.txt", "duplicate"),
        ("short.txt", "too short"),
    }
    assert "text" not in dropped[0]
    warnings = " ".join(capsys.readouterr().err.split())
    assert "left out 1 files or records: 1 binary (first: image.txt)" in warnings
    assert "a very small corpus (60,000 bytes)" in warnings


def test_the_tokens_are_the_texts(corpus_folder: Path, tmp_path: Path) -> None:
    made = prepare(str(corpus_folder), tmp_path / "out", corpus=CorpusRecipe(shard_tokens=777))
    assert len(list((tmp_path / "out" / "train").glob("*.bin"))) > 1
    for part, tokens in (("train", made.train), ("val", made.val)):
        texts = list(made.texts(part))
        ids = tokens.read(0, tokens.n_tokens)
        ends = np.flatnonzero(ids == made.tokenizer.end_of_text_id)
        assert len(ends) == tokens.n_documents == len(texts) == made.stats["documents"][part]
        documents = np.split(ids, ends + 1)[:-1]
        assert [made.tokenizer.decode(one[:-1].tolist()) for one in documents] == texts
        assert len(made.text_bytes(part)) == tokens.n_bytes == made.stats["bytes"][part]
        assert made.stats["tokens"][part] == tokens.n_tokens
        assert made.stats["bytes_per_token"][part] == pytest.approx(tokens.n_bytes / tokens.n_tokens, abs=1e-4)
        assert tokens.document_starts().tolist() == [0, *(ends[:-1] + 1).tolist()]
        assert tokens.fingerprint == made.tokenizer.fingerprint
    assert not set(made.texts("train")) & set(made.texts("val"))
    inputs, targets, _ = TokenLoader(made.train, 31, 5, seed=0).batch(3)
    assert int(max(inputs.max(), targets.max())) < made.tokenizer.vocab_size
    with pytest.raises(ValueError, match="part 'test'"):
        made.texts("test")


def test_the_tokenizer_never_sees_what_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(prose(20_000) + "\n" + "qqqqzzzz " * 400)
    made = prepare(str(path), tmp_path / "out")
    assert b"qqqqzzzz" in made.text_bytes("val")
    size = suggest_vocab_size(made.stats["bytes"]["train"])
    trained_alone = Tokenizer.train(made.texts("train"), vocab_size=size, show_progress=False)
    trained_on_all = Tokenizer.train([path.read_text()], vocab_size=size, show_progress=False)
    assert made.tokenizer.fingerprint == trained_alone.fingerprint != trained_on_all.fingerprint


def test_equal_runs_write_equal_bytes(corpus_folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        prepare(str(corpus_folder), tmp_path / name)
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file() and path.name != "stats.json":  # which holds the seconds
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path


def test_the_same_again_is_used_as_it_is(
    corpus_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stamp = prepare(str(corpus_folder), out).folder.stat().st_ino
    capsys.readouterr()
    monkeypatch.setattr(Tokenizer, "train", None)  # would be called
    assert prepare(str(corpus_folder), out).folder.stat().st_ino == stamp
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"corpus": CorpusRecipe(split_seed=1)},
        {"vocab_size": 300},
        {"pattern": "gpt2"},
        {"limit": 50},
        {"corpus": CorpusRecipe(val_fraction=0.1)},
    ],
)
def test_other_settings_make_it_anew(corpus_folder: Path, tmp_path: Path, change: dict) -> None:
    out = tmp_path / "out"
    before = prepare(str(corpus_folder), out).stats["inputs"]
    after = prepare(str(corpus_folder), out, **change).stats["inputs"]
    assert {key for key in before if before[key] != after[key]} == set(change)


def test_other_text_makes_it_anew(corpus_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(str(corpus_folder), out)
    (corpus_folder / "00.txt").write_text(prose(1500, seed=100))
    assert prepare(str(corpus_folder), out).stats["bytes"]["cleaned"] == 60_500
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_a_damaged_corpus_is_made_anew(corpus_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    prepare(str(corpus_folder), out)
    (out / "train" / "tokens-00000.bin").write_bytes(b"cut")
    with pytest.raises(GroundupError, match=r"tokens-00000\.bin"):
        PreparedData.open(out)
    prepare(str(corpus_folder), out)
    assert "is made again" in " ".join(capsys.readouterr().err.split())
    PreparedData.open(out, verify=True)


def test_a_given_tokenizer_is_used(corpus_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train([prose(5000)], vocab_size=280, show_progress=False)
    made = prepare(str(corpus_folder), tmp_path / "out", tokenizer=tokenizer)
    assert made.tokenizer.fingerprint == made.train.fingerprint == tokenizer.fingerprint
    assert "tokenizer" not in made.stats["seconds"]
    with pytest.raises(UsageError, match="vocab_size = 999"):
        prepare(str(corpus_folder), tmp_path / "out", tokenizer=tokenizer, vocab_size=999)
    other = Tokenizer.train([prose(5000)], vocab_size=270, show_progress=False)
    with pytest.raises(GroundupError, match="another tokenizer"):
        TokenSet.open(tmp_path / "out" / "train", tokenizer=other)


def test_max_bytes_reads_no_more(corpus_folder: Path, tmp_path: Path) -> None:
    made = prepare(str(corpus_folder), tmp_path / "out", corpus=CorpusRecipe(max_bytes=10_500))
    assert made.stats["bytes"]["collected"] == 10_500
    assert made.stats["documents"]["collected"] == 11
    (tmp_path / "wide.txt").write_text("é" * 5000)
    made = prepare(str(tmp_path / "wide.txt"), tmp_path / "wide", corpus=CorpusRecipe(max_bytes=3001))
    assert made.stats["bytes"]["collected"] == 3000


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / os.fsdecode(b"th\xe9.txt")).write_text(prose(3000))
    (folder / os.fsdecode(b"n\xe9ant.txt")).touch()
    made = prepare(str(folder), tmp_path / "out")
    assert [document.name for document in made.documents("train")] == ["th\ufffd.txt"]
    assert made.stats["skipped"] == {"empty": 1}
    prepare(str(folder / os.fsdecode(b"th\xe9.txt")), tmp_path / "single")


def test_without_dedup(corpus_folder: Path, tmp_path: Path) -> None:
    made = prepare(str(corpus_folder), tmp_path / "out", corpus=CorpusRecipe(dedup=False))
    assert made.stats["documents"]["cleaned"] == 61


# ---- sizes


@pytest.mark.parametrize("size", [2000, 2048, 3000])
def test_two_kilobytes_are_enough(tmp_path: Path, size: int, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.txt").write_text(prose(size))
    made = prepare(str(tmp_path / "a.txt"), tmp_path / "out")
    assert f"very small corpus ({size:,} bytes)" in " ".join(capsys.readouterr().err.split())
    assert made.val.n_bytes > 200
    TokenLoader(made.train, 16, 4, seed=0).batch(0)
    TokenLoader(made.val, 16, 4, seed=0).batch(0)


@pytest.mark.parametrize(("text", "size"), [(prose(1999), "1,999"), ("x", "0")])
def test_less_is_too_small(tmp_path: Path, text: str, size: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(
        GroundupError, match=rf"a\.txt: {size} bytes of text after cleaning.* at least 2,000 are needed"
    ):
        prepare(str(tmp_path / "a.txt"), tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_suggested_vocabularies() -> None:
    sizes = [suggest_vocab_size(n) for n in (0, 2000, 1_115_394, 12_000_000, 14_000_000, 10**9, 10**12)]
    assert sizes == [288, 288, 1024, 4096, 4096, 32_768, 32_768]


def test_recipe_values_that_make_no_sense() -> None:
    for key, value in (
        ("val_fraction", 0),
        ("val_fraction", 0.6),
        ("max_bytes", 0),
        ("shard_tokens", 0),
        ("min_chars", 0),
    ):
        with pytest.raises(UsageError, match=rf"corpus\.{key} = {value}"):
            CorpusRecipe(**{key: value})


def test_every_recipe_key_is_described() -> None:
    described = CorpusRecipe.__doc__ or ""
    assert all(f"\n        {name}: " in described for name in CorpusRecipe.__dataclass_fields__)


# ---- real text


def test_tinyshakespeare(shared_data: Path, tmp_path: Path) -> None:
    made = prepare(str(shared_data / "pretrain" / "tinyshakespeare.txt"), tmp_path / "out")
    assert made.stats["split"] == "end of the longest document"
    assert 40_000 < made.val.n_bytes < 80_000
    raw = (shared_data / "pretrain" / "tinyshakespeare.txt").read_bytes()
    assert made.text_bytes("train") + made.text_bytes("val") == raw
    assert made.text_bytes("train").endswith(b"\n\n")  # cut between two speeches
    assert made.stats["bytes_per_token"]["val"] > 2


@pytest.mark.parametrize("name", ["c4_en_demo.jsonl", "wikipedia_en_demo.txt"])
def test_real_corpora(shared_data: Path, tmp_path: Path, name: str) -> None:
    made = prepare(str(shared_data / "pretrain" / name), tmp_path / "out")
    made.train.verify()
    assert 0.025 < made.val.n_bytes / made.stats["bytes"]["cleaned"] < 0.075
    ids = made.val.read(0, made.val.n_tokens)
    texts = list(made.texts("val"))
    assert made.tokenizer.decode([i for i in ids.tolist() if i != made.tokenizer.end_of_text_id]) == "".join(texts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["books_en.jsonl.gz", "code.jsonl.gz"])
def test_large_real_corpora(shared_data: Path, tmp_path: Path, name: str) -> None:
    made = prepare(str(shared_data / "pretrain" / name), tmp_path / "out", vocab_size=1024)
    PreparedData.open(tmp_path / "out", verify=True)
    wanted = min(0.05 * made.stats["bytes"]["cleaned"], 1_000_000)
    assert 0.5 * wanted < made.val.n_bytes < 1.5 * wanted
    assert b"\r" not in made.text_bytes("train")


@pytest.mark.slow
def test_the_default_corpus_in_time(tmp_path: Path) -> None:
    started = time.perf_counter()
    made = prepare("stdlib", tmp_path / "out")
    assert time.perf_counter() - started < 45
    seconds = made.stats["seconds"]
    assert seconds["collect"] + seconds["split"] + seconds["shards"] < 15
    groups = {part: {one.group for one in made.documents(part)} - {None} for part in ("train", "val")}
    assert groups["val"]
    assert not groups["train"] & groups["val"]


# ---- what is there already, and what was damaged


def test_a_folder_of_other_things_is_never_replaced(corpus_folder: Path, tmp_path: Path) -> None:
    before = sorted(corpus_folder.iterdir())
    for out in (corpus_folder, tmp_path):
        with pytest.raises(GroundupError, match="holds other things"):
            prepare(str(corpus_folder), out)
    assert sorted(corpus_folder.iterdir()) == before
    prepare(str(corpus_folder), tmp_path / "out")
    (tmp_path / "out" / "my-notes.txt").write_text("precious")
    with pytest.raises(GroundupError, match=r"holds other things \(my-notes.txt\)"):
        prepare(str(corpus_folder), tmp_path / "out", vocab_size=300)
    (tmp_path / "file").write_text("x")
    with pytest.raises(GroundupError, match="cannot be used as a folder"):
        prepare(str(corpus_folder), tmp_path / "file")


def test_an_empty_folder_is_fine(corpus_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert prepare(str(corpus_folder), tmp_path / "out").train.n_tokens > 0


def test_the_corpus_may_lie_inside_the_text(corpus_folder: Path) -> None:
    first = prepare(str(corpus_folder), corpus_folder / "data").stats
    assert prepare(str(corpus_folder), corpus_folder / "data").stats == first
    again = prepare(str(corpus_folder), corpus_folder / "data", vocab_size=300).stats
    assert again["documents"]["collected"] == first["documents"]["collected"]


@pytest.mark.parametrize(
    "name", ["stats.json", "val/documents.jsonl.gz", "tokenizer/tokenizer.json", "val/manifest.json"]
)
def test_a_missing_or_cut_file_is_named(corpus_folder: Path, tmp_path: Path, name: str) -> None:
    made = prepare(str(corpus_folder), tmp_path / "out")
    path = tmp_path / "out" / name
    raw = path.read_bytes()
    for damaged in (raw[: len(raw) // 2], None):
        path.write_bytes(damaged) if damaged is not None else path.unlink()
        with pytest.raises(GroundupError, match=Path(name).stem.split(".")[0]):
            list(PreparedData.open(made.folder).texts("val"))


def test_a_folder_that_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(GroundupError, match="no prepared corpus"):
        PreparedData.open(tmp_path)
    (tmp_path / "stats.json").write_text('{"format": "something else"}')
    with pytest.raises(GroundupError, match="not a prepared corpus"):
        PreparedData.open(tmp_path)


def test_documents_are_plain_json_lines(corpus_folder: Path, tmp_path: Path) -> None:
    prepare(str(corpus_folder), tmp_path / "out")
    with gzip.open(tmp_path / "out" / "val" / "documents.jsonl.gz", "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    assert all(set(record) == {"name", "text"} for record in records)
    assert os.path.getsize(tmp_path / "out" / "val" / "documents.jsonl.gz") < sum(len(one["text"]) for one in records)


def test_a_corpus_that_waits_on_the_disk_is_the_same(
    corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spooled, encoded and written in small pieces, or all at once."""
    first = prepare(str(corpus_folder), tmp_path / "one", vocab_size=300)
    monkeypatch.setattr("groundup.data.spool.IN_MEMORY", 5_000)
    monkeypatch.setattr("groundup.data.prepared._BATCH_CHARS", 2_500)
    monkeypatch.setattr("groundup.data.shards._HELD_TOKENS", 1_000)
    second = prepare(str(corpus_folder), tmp_path / "two", vocab_size=300)
    names = sorted(str(path.relative_to(first.folder)) for path in first.folder.rglob("*") if path.is_file())
    for name in names:
        if name != "stats.json":  # which holds the seconds
            assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes(), name
    assert first.stats | {"seconds": None} == second.stats | {"seconds": None}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    script = """
import sys
from pathlib import Path
from groundup.data import CorpusRecipe, prepare
prepare(sys.argv[1], Path(sys.argv[2]), vocab_size=400, corpus=CorpusRecipe(tokenizer_bytes=1_000_000))
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(int(line.split()[1]) * 1024)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    chosen = random.Random(5)
    paragraphs = [prose(4_000, seed=number) for number in range(50)]
    peaks = []
    for megabytes in (80, 320):
        path = tmp_path / f"{megabytes}.jsonl"
        with open(path, "w") as file:
            for number in range(megabytes * 10**6 // 16_000):
                text = f"{number} " + " ".join(chosen.choices(paragraphs, k=4))
                file.write(json.dumps({"text": text}) + "\n")
        command = [sys.executable, "-c", script, str(path), str(tmp_path / f"out-{megabytes}")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 60e6


def test_the_vocabulary_is_learnt_from_a_part_taken_evenly(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(100):
        (folder / f"{number:02d}.txt").write_text(f"word{chr(97 + number // 10) * 5} " * 40)
    corpus = CorpusRecipe(dedup=False, tokenizer_bytes=10_000)
    tokenizer = prepare(str(folder), tmp_path / "out", vocab_size=400, corpus=corpus).tokenizer
    assert all(len(tokenizer.encode(f" word{letter * 5}")) == 1 for letter in "abcdefghij")
    texts = ["x" * size for size in (700, 100, 900, 300, 100, 400, 500)]
    for most in (1, 800, 1_500, 2_999, 3_000, 10**9):
        taken = list(_sample(iter(texts), 3_000, most))
        assert sum(map(len, taken)) <= max(most, 700)
        assert taken == texts or most < 3_000
    assert list(_sample(iter(texts), 3_000, 1)) == texts[:1]


def test_a_corpus_from_before_that_limit_is_used_as_it_is(corpus_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(str(corpus_folder), out)
    stats = json.loads((out / "stats.json").read_text())
    del stats["inputs"]["corpus"]["tokenizer_bytes"]
    (out / "stats.json").write_text(json.dumps(stats))
    before = (out / "stats.json").stat().st_mtime_ns
    prepare(str(corpus_folder), out)
    assert (out / "stats.json").stat().st_mtime_ns == before
