from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from remote_corpus import LINE, middle, settle

from groundup.data import CorpusRecipe, Prefetcher, PreparedData, TokenLoader, TokenSet, open_source, prepare
from groundup.data.places import open_place
from groundup.data.remote import NotPreparedError, open_remote, open_remote_tokens
from groundup.runtime import GroundupError, UsageError
from groundup.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("own_places")

URL = "memory://bucket/corpus"


@pytest.fixture
def stored(local: PreparedData) -> Iterator[MemoryFileSystem]:
    """The corpus in object storage that lives in memory."""
    storage = fsspec.filesystem("memory")
    storage.store.clear()
    storage.put(f"{local.folder}/", "/bucket/corpus/", recursive=True)
    yield storage
    storage.store.clear()


class Watch:
    """What is asked of the storage; and what goes wrong there, to order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.broken: dict[str, list[Exception | str]] = {}
        self.unreachable = False
        real = MemoryFileSystem.get_file

        def get_file(storage: MemoryFileSystem, rpath: str, lpath: str, **options: object) -> None:
            name = rpath.removeprefix("/bucket/corpus/")
            self.asked.append(name)
            if self.unreachable:
                raise OSError("Name or service not known")
            fault = self.broken[name].pop(0) if self.broken.get(name) else None
            if isinstance(fault, Exception):
                raise fault
            real(storage, rpath, lpath, **options)
            raw = Path(lpath).read_bytes()
            if fault == "flip":
                Path(lpath).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
            if fault == "cut":
                Path(lpath).write_bytes(raw[:-3])

        monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)

    def shards(self) -> list[int]:
        """The shards that were asked for, in order."""
        return [int(name[-9:-4]) for name in self.asked if name.startswith("train/") and name.endswith(".bin")]


@pytest.fixture
def watch(stored: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def shard_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "data").rglob("train/tokens-*.bin"))


# ---- object storage


def test_it_is_read_as_if_it_were_here(local: PreparedData, watch: Watch, tmp_path: Path) -> None:
    there = open_remote(URL)
    assert there.tokenizer.fingerprint == local.tokenizer.fingerprint
    assert there.stats == local.stats
    assert there.digest() == local.digest()
    for ours, theirs in ((there.train, local.train), (there.val, local.val)):
        assert (ours.n_tokens, ours.n_bytes, ours.n_documents) == (theirs.n_tokens, theirs.n_bytes, theirs.n_documents)
        assert ours.read(0, ours.n_tokens).tolist() == theirs.read(0, theirs.n_tokens).tolist()
        starts = np.array([0, 488, ours.n_tokens - 3, 17])
        assert ours.windows(starts, 37).tolist() == theirs.windows(starts, 37).tolist()
        assert ours.document_starts().tolist() == theirs.document_starts().tolist()
        ours.verify()
    assert list(there.texts("val")) == list(local.texts("val"))
    batch, expected = (TokenLoader(one.train, 23, 7, seed=3).batch(4) for one in (there, local))
    assert batch[0].tolist() == expected[0].tolist()
    assert batch[1].tolist() == expected[1].tolist()
    settle()
    assert len(watch.asked) == len(set(watch.asked))  # nothing came twice
    again = open_remote(URL)
    again.train.read(0, again.train.n_tokens)
    assert set(watch.asked[-6:]) <= {
        "stats.json",
        "train/manifest.json",
        "val/manifest.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer.model",
        "tokenizer/tokenizer_config.json",
        "tokenizer/chat_template.jinja",
    }


def test_shards_come_when_they_are_wanted_and_the_next_meanwhile(watch: Watch, tmp_path: Path) -> None:
    there = open_remote(URL)
    assert watch.shards() == []
    assert not any("documents" in name for name in watch.asked)
    there.train.read(middle(there.train, 3), 7)
    settle()
    assert watch.shards() == [3, 4]
    there.train.read(middle(there.train, 4), 7)
    settle()
    assert watch.shards() == [3, 4, 5]
    last = len(there.train._entries) - 1
    there.train.read(middle(there.train, last), 7)
    settle()
    assert watch.shards() == [3, 4, 5, last, 0]


def test_the_cache_keeps_to_its_size(local: PreparedData, watch: Watch, tmp_path: Path) -> None:
    sizes = [2 * entry["tokens"] for entry in local.train._entries]
    bound = 3 * max(sizes)
    there = open_remote(URL, cache_bytes=bound)
    for start in range(0, local.train.n_tokens - 101, 101):
        assert there.train.read(start, 101).tolist() == local.train.read(start, 101).tolist()
        settle()
        assert sum(file.stat().st_size for file in shard_files(tmp_path)) <= bound
    assert len(shard_files(tmp_path)) < len(sizes)
    assert watch.shards()[: len(sizes)] == list(range(len(sizes)))  # one pass fetches each of them once


def test_the_shard_unused_for_the_longest_time_gives_way(local: PreparedData, watch: Watch, tmp_path: Path) -> None:
    sizes = sorted(2 * entry["tokens"] for entry in local.train._entries[:6])
    assert sum(sizes[:4]) > sum(sizes[-3:])
    there = open_remote(URL, cache_bytes=sum(sizes[-3:]))

    def use(number: int) -> list[int]:
        there.train.read(middle(there.train, number), 3)
        settle()
        return [int(file.stem[-5:]) for file in shard_files(tmp_path)]

    assert use(0) == [0, 1]
    assert use(1) == [0, 1, 2]
    use(0)
    assert use(4) == [0, 4, 5]  # 1 and 2 were fetched, and 0 was used after 1
    held = there.train._shards[4][:7]
    assert use(2) == [2, 3, 4]
    assert 4 not in use(6)
    start = int(local.train._starts[4])
    assert held.tolist() == local.train.read(start, 7).tolist()  # what was read stays good


def test_a_cache_of_one_shard_fetches_nothing_ahead(local: PreparedData, watch: Watch, tmp_path: Path) -> None:
    largest = max(2 * entry["tokens"] for entry in local.train._entries)
    there = open_remote(URL, cache_bytes=largest)
    for number in (0, 1, 0):
        there.train.read(middle(there.train, number), 3)
        settle()
        assert [int(file.stem[-5:]) for file in shard_files(tmp_path)] == [number]
    assert watch.shards() == [0, 1, 0]


def test_too_small_a_cache(
    local: PreparedData, stored: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(UsageError, match=r"train: a shard has \d+ bytes, the cache 97\. Set GROUNDUP_CACHE_BYTES"):
        open_remote(URL, cache_bytes=97)
    monkeypatch.setenv("GROUNDUP_CACHE_BYTES", "2000")
    open_remote(URL)
    said = " ".join(capsys.readouterr().err.split())
    assert f"GROUNDUP_CACHE_BYTES={2 * local.train.n_tokens} keeps all of them" in said
    monkeypatch.setenv("GROUNDUP_CACHE_BYTES", "2 GB")
    with pytest.raises(UsageError, match="GROUNDUP_CACHE_BYTES = '2 GB': a whole number of bytes"):
        open_remote(URL)


def test_memory_is_handed_back(local: PreparedData, watch: Watch) -> None:
    there = open_remote(URL)
    before = there.train.read(0, there.train.n_tokens).tolist()
    settle()
    there.train.release()
    assert there.train.read(0, there.train.n_tokens).tolist() == before
    settle()


def test_batches_made_ahead_in_a_thread(local: PreparedData, watch: Watch) -> None:
    there, here = (TokenLoader(one, 29, 3, seed=11) for one in (open_remote(URL, cache_bytes=4000).train, local.train))
    with Prefetcher(there, depth=2) as ahead:
        for index in range(9):
            assert ahead.batch(index).inputs.tolist() == here.batch(index).inputs.tolist()
        watch.broken = {f"train/tokens-{number:05d}.bin": [OSError("gone")] * 99 for number in range(99)}
        with pytest.raises(GroundupError, match=r"tokens-\d+\.bin: cannot be read \(gone\)"):
            list(map(ahead.batch, range(9, 99)))
    settle()


@pytest.mark.parametrize("fault", ["flip", "cut", OSError("reset by peer"), RuntimeError("slow down")])
def test_what_arrives_damaged_is_fetched_anew(local: PreparedData, watch: Watch, fault: Exception | str) -> None:
    watch.broken["train/tokens-00002.bin"] = [fault, fault]
    there = open_remote(URL)
    start = middle(local.train, 2)
    assert there.train.read(start, 11).tolist() == local.train.read(start, 11).tolist()
    assert watch.shards()[:3] == [2, 2, 2]
    settle()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("flip", r"arrives damaged, not with the manifest's size and SHA-256, after 3 tries"),
        ("cut", r"broke off after \d+ of \d+ bytes, after 3 tries"),
        (OSError("reset by peer"), r"cannot be read \(reset by peer\), after 3 tries\. Check the network"),
        (PermissionError("Forbidden"), r"it may not be read \(Forbidden\)\. Check your credentials"),
        (FileNotFoundError("no key"), r"there is no such file"),
        (OSError(28, "No space left on device"), r"cannot write .*no space left"),
    ],
)
def test_what_stays_damaged_is_named(watch: Watch, tmp_path: Path, fault: Exception | str, message: str) -> None:
    there = open_remote(URL)
    watch.broken["train/tokens-00002.bin"] = [fault] * 3
    with pytest.raises(GroundupError, match=message) as caught:
        there.train.read(middle(there.train, 2), 11)
    assert "tokens-00002.bin" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert shard_files(tmp_path) == []
    watch.broken.clear()
    there.train.read(middle(there.train, 2), 11)  # and the next try may succeed
    settle()


def test_a_fault_of_the_next_shard_waits_until_it_is_wanted(watch: Watch) -> None:
    there = open_remote(URL)
    watch.broken["train/tokens-00001.bin"] = [OSError("reset by peer")] * 6
    there.train.read(middle(there.train, 0), 3)
    settle()
    there.train.read(middle(there.train, 0), 3)
    with pytest.raises(GroundupError, match=r"tokens-00001\.bin: cannot be read"):
        there.train.read(middle(there.train, 1), 3)


def test_a_shard_flipped_in_the_cache_is_fetched_anew(local: PreparedData, watch: Watch, tmp_path: Path) -> None:
    open_remote(URL).train.read(0, 5)
    settle()
    for file in shard_files(tmp_path):
        raw = bytearray(file.read_bytes())
        raw[4] ^= 1
        file.write_bytes(raw)
    there = open_remote(URL)
    assert there.train.read(0, 5).tolist() == local.train.read(0, 5).tolist()
    start = middle(local.train, 1)
    assert there.train.read(start, 5).tolist() == local.train.read(start, 5).tolist()
    settle()
    assert watch.shards() == [0, 1, 0, 1, 2]
    indices = sorted((tmp_path / "data").rglob("train/*.idx"))
    assert indices == []
    there.train.document_starts()
    for index in (tmp_path / "data").rglob("train/*.idx"):
        index.write_bytes(b"12345678" * (index.stat().st_size // 8))
    assert open_remote(URL).train.document_starts().tolist() == local.train.document_starts().tolist()
    shard_files(tmp_path)[0].write_bytes(b"cut")
    there.train.verify()
    assert shard_files(tmp_path)[0].stat().st_size > 3


def test_a_shard_that_vanishes_stays_readable(local: PreparedData, watch: Watch, tmp_path: Path) -> None:
    there = open_remote(URL)
    there.train.read(0, 5)
    settle()
    for file in shard_files(tmp_path):
        file.unlink()
    watch.unreachable = True
    assert there.train.read(2, 9).tolist() == local.train.read(2, 9).tolist()  # it is mapped
    watch.unreachable = False
    start = middle(there.train, 1)
    assert there.train.read(start, 9).tolist() == local.train.read(start, 9).tolist()  # it is fetched again
    settle()


def test_several_readers_share_what_is_fetched(local: PreparedData, watch: Watch) -> None:
    readers = [open_remote(URL).train for _ in range(4)]
    watch.asked.clear()
    expected = local.train.read(0, local.train.n_tokens).tolist()
    found: list[bool] = []

    def read(tokens: TokenSet) -> None:
        found.append(tokens.read(0, tokens.n_tokens).tolist() == expected)

    threads = [threading.Thread(target=read, args=(tokens,)) for tokens in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    settle()
    assert found == [True] * 4
    assert sorted(watch.shards()) == list(range(len(local.train._entries)))


def test_another_corpus_at_the_same_address(local: PreparedData, stored: MemoryFileSystem, tmp_path: Path) -> None:
    before = open_remote(URL)
    before.train.verify()
    assert list(before.texts("val")) == list(local.texts("val"))
    settle()
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text(" ".join(random.Random(number).choices(LINE.split(), k=61)))
    other = prepare(str(texts), tmp_path / "other", vocab_size=269, corpus=CorpusRecipe(shard_tokens=499))
    stored.store.clear()
    stored.put(f"{other.folder}/", "/bucket/corpus/", recursive=True)
    there = open_remote(URL)
    assert there.train.read(0, other.train.n_tokens).tolist() == other.train.read(0, other.train.n_tokens).tolist()
    assert list(there.texts("val")) == list(other.texts("val"))
    settle()
    assert len(shard_files(tmp_path)) == len(other.train._entries) < len(local.train._entries)


def test_without_a_network_what_was_fetched_is_used(
    local: PreparedData, watch: Watch, capsys: pytest.CaptureFixture
) -> None:
    watch.unreachable = True
    with pytest.raises(GroundupError, match=r"stats\.json: cannot be read \(Name or service not known\)"):
        open_remote(URL)
    watch.unreachable = False
    open_remote(URL).train.read(middle(local.train, 0), 3)
    settle()
    watch.unreachable = True
    capsys.readouterr()
    there = open_remote(URL)
    assert " ".join(capsys.readouterr().err.split()).count("Using what was fetched before.") == 1
    assert there.train.read(3, 9).tolist() == local.train.read(3, 9).tolist()
    with pytest.raises(GroundupError, match="cannot be read"):
        there.train.read(middle(local.train, 3), 3)


def test_what_is_no_corpus(stored: MemoryFileSystem, local: PreparedData) -> None:
    with pytest.raises(NotPreparedError, match=r"memory://bucket/nothing: no prepared corpus"):
        open_remote("memory://bucket/nothing")
    with pytest.raises(NotPreparedError, match=r"no token shards"):
        open_remote_tokens("memory://bucket/nothing")
    stored.rm("/bucket/corpus/tokenizer", recursive=True)
    with pytest.raises(GroundupError, match=r"corpus/tokenizer: no tokenizer"):
        open_remote(URL)
    other = Tokenizer.train([LINE * 9], vocab_size=265, show_progress=False)
    with pytest.raises(GroundupError, match=r"corpus/train: these token ids were made by another tokenizer"):
        open_remote_tokens(f"{URL}/train", tokenizer=other)
    alone = open_remote_tokens(f"{URL}/train/", tokenizer=local.tokenizer)
    assert alone.read(0, 9).tolist() == local.train.read(0, 9).tolist()
    settle()


@pytest.mark.parametrize("name", ["../../../etc/passwd", "..", "/etc/passwd", "a/b.bin", ".hidden", ""])
def test_a_manifest_from_a_stranger_names_no_other_folder(stored: MemoryFileSystem, name: str) -> None:
    manifest = json.loads(stored.cat("/bucket/corpus/train/manifest.json"))
    manifest["shards"][0]["file"] = name
    stored.pipe("/bucket/corpus/train/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(GroundupError, match=rf"'{re.escape(name)}' is not the name of a file"):
        open_remote(URL)


def test_addresses_that_nothing_reads() -> None:
    with pytest.raises(UsageError, match=r"nothing here reads abacus://\. There are hf:owner/name"):
        open_remote("abacus://bucket/corpus")
    with pytest.raises(UsageError, match="is written hf:owner/name"):
        open_remote("hf:alone")
    for protocol, package in (("s3", "s3fs"), ("gs", "gcsfs"), ("az", "adlfs")):
        if find_spec(package) is None:
            with pytest.raises(UsageError, match=rf"reading {protocol}:// needs {package}: pip install {package}"):
                open_place(f"{protocol}://bucket/corpus")


def test_text_is_not_read_from_there() -> None:
    with pytest.raises(UsageError, match=r"s3://bucket/text\.txt: text is read from this disk or from hf:owner/name"):
        open_source("s3://bucket/text.txt")


# ---- preparing what is prepared


def test_prepare_opens_it_where_it_lies(local: PreparedData, watch: Watch, tmp_path: Path) -> None:
    there = prepare(URL, tmp_path / "run" / "data", vocab_size=local.tokenizer.vocab_size, tokenizer=local.tokenizer)
    assert there.train.read(0, 9).tolist() == local.train.read(0, 9).tolist()
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match=r"prepared with 277 tokens, not with vocab_size = 512"):
        prepare(URL, tmp_path / "out", vocab_size=512)
    with pytest.raises(NotPreparedError):
        prepare("memory://bucket/nothing", tmp_path / "out")
    settle()
