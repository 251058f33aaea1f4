from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groundup.data import ShardWriter, TokenSet
from groundup.runtime import GroundupError

END = 1008
few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
documents_of_ids = st.lists(st.lists(st.integers(0, 1000), max_size=23), min_size=1, max_size=11)


def whole(documents: list[list[int]]) -> list[int]:
    return [token for ids in documents for token in (*ids, END)]


@given(documents=documents_of_ids, shard_tokens=st.integers(1, 40), data=st.data())
@few
def test_what_is_written_is_read_across_shards(
    make_tokens: Callable[..., TokenSet], documents: list[list[int]], shard_tokens: int, data: st.DataObject
) -> None:
    tokens = make_tokens(documents, shard_tokens)
    expected = whole(documents)
    assert tokens.n_tokens == len(expected)
    assert tokens.n_documents == len(documents)
    assert tokens.n_bytes == 3 * sum(map(len, documents))
    assert tokens.read(0, tokens.n_tokens).tolist() == expected
    start = data.draw(st.integers(0, len(expected)))
    length = data.draw(st.integers(0, len(expected) - start))
    assert tokens.read(start, length).tolist() == expected[start : start + length]
    starts = np.cumsum([0] + [len(ids) + 1 for ids in documents])[:-1]
    assert tokens.document_starts().tolist() == starts.tolist()
    tokens.verify()


@given(documents=documents_of_ids, shard_tokens=st.integers(1, 40), data=st.data())
@few
def test_windows_wrap_around(
    make_tokens: Callable[..., TokenSet], documents: list[list[int]], shard_tokens: int, data: st.DataObject
) -> None:
    tokens = make_tokens(documents, shard_tokens)
    ring = np.array(whole(documents))
    length = data.draw(st.integers(1, len(ring)))
    starts = np.array(data.draw(st.lists(st.integers(0, len(ring) - 1), min_size=1, max_size=5)))
    expected = ring[(starts[:, None] + np.arange(length)) % len(ring)]
    assert np.array_equal(tokens.windows(starts, length), expected)


def test_shards_hold_whole_documents_where_they_fit(make_tokens: Callable[..., TokenSet]) -> None:
    tokens = make_tokens([[1] * 6, [2] * 6, [3] * 25, [4] * 2], shard_tokens=10)
    manifest = json.loads((tokens.folder / "manifest.json").read_text())
    assert [shard["tokens"] for shard in manifest["shards"]] == [7, 7, 10, 10, 9]
    assert [shard["documents"] for shard in manifest["shards"]] == [1, 1, 1, 0, 1]
    assert [shard["text_bytes"] for shard in manifest["shards"]] == [18, 18, 75, 0, 6]


def test_ids_beyond_sixteen_bits_take_four_bytes(tmp_path: Path) -> None:
    tokenizer = SimpleNamespace(vocab_size=65_537, end_of_text_id=65_536, fingerprint="a")
    writer = ShardWriter(tmp_path, tokenizer, 100)
    writer.add(np.array([1, 65_535], np.uint32), 5)
    writer.close()
    tokens = TokenSet.open(tmp_path)
    assert tokens.dtype == np.uint32
    assert tokens.read(0, 3).tolist() == [1, 65_535, 65_536]
    assert (tmp_path / "tokens-00000.bin").read_bytes() == b"\1\0\0\0\xff\xff\0\0\0\0\1\0"  # little-endian


def test_two_bytes_suffice_for_65536_ids(make_tokens: Callable[..., TokenSet]) -> None:
    tokenizer = SimpleNamespace(vocab_size=65_536, end_of_text_id=65_535, fingerprint="a")
    tokens = make_tokens([[7]], tokenizer=tokenizer)
    assert tokens.dtype == np.uint16
    assert tokens.read(0, 2).tolist() == [7, 65_535]


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GroundupError, match="endoftext"):
        ShardWriter(tmp_path, SimpleNamespace(vocab_size=300, end_of_text_id=None, fingerprint="a"), 10)


def test_reading_past_the_end(make_tokens: Callable[..., TokenSet]) -> None:
    tokens = make_tokens([[1, 2, 3]])
    for start, length in ((0, 5), (4, 1), (-1, 2), (0, -1)):
        with pytest.raises(IndexError):
            tokens.read(start, length)


def test_another_tokenizer_is_told_apart(make_tokens: Callable[..., TokenSet]) -> None:
    tokens = make_tokens([[1, 2, 3]])
    TokenSet.open(tokens.folder, tokenizer=SimpleNamespace(fingerprint="f" * 64))
    with pytest.raises(GroundupError, match=r"made by another tokenizer .*Prepare the data again"):
        TokenSet.open(tokens.folder, tokenizer=SimpleNamespace(fingerprint="e" * 64))


@pytest.mark.parametrize("file", ["tokens-00001.bin", "tokens-00001.idx"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer"])
def test_a_damaged_shard_is_named(make_tokens: Callable[..., TokenSet], file: str, damage: str) -> None:
    tokens = make_tokens([[1] * 9, [2] * 9, [3] * 9], shard_tokens=10)
    path = tokens.folder / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == "truncated" else path.read_bytes() + b"\0")
    with pytest.raises(GroundupError, match=file):
        TokenSet.open(tokens.folder)


@pytest.mark.parametrize("file", ["tokens-00001.bin", "tokens-00001.idx"])
def test_a_flipped_bit_is_found_when_verifying(make_tokens: Callable[..., TokenSet], file: str) -> None:
    tokens = make_tokens([[1] * 9, [2] * 9, [3] * 9], shard_tokens=10)
    path = tokens.folder / file
    raw = bytearray(path.read_bytes())
    raw[3] ^= 16
    path.write_bytes(raw)
    TokenSet.open(tokens.folder)
    with pytest.raises(GroundupError, match=f"{file}: damaged"):
        TokenSet.open(tokens.folder, verify=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[: len(text) // 2], "damaged or is not JSON"),
        (lambda text: "{}", "not a manifest of token shards"),
        (lambda text: "[1]", "not a manifest of token shards"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "version 2"),
        (lambda text: text.replace('"n_bytes"', '"bytes"'), "lacks n_bytes"),
    ],
)
def test_a_damaged_manifest(make_tokens: Callable[..., TokenSet], change: Callable[[str], str], words: str) -> None:
    tokens = make_tokens([[1, 2, 3]])
    path = tokens.folder / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(GroundupError, match=rf"manifest\.json: .*{words}"):
        TokenSet.open(tokens.folder)


def test_no_shards_at_all(tmp_path: Path) -> None:
    with pytest.raises(GroundupError, match=r"manifest\.json: no such file"):
        TokenSet.open(tmp_path)


@pytest.mark.parametrize("starts", [[0, 10], [5, 3], [-1, 4], [0, 0]])
def test_an_index_out_of_order_is_named(make_tokens: Callable[..., TokenSet], starts: list[int]) -> None:
    tokens = make_tokens([[1] * 9, [2] * 4, [3] * 4], shard_tokens=10)
    np.array(starts, "<i8").tofile(tokens.folder / "tokens-00001.idx")
    with pytest.raises(GroundupError, match=r"tokens-00001\.idx: damaged, documents do not start in order"):
        tokens.document_starts()


def test_rows_of_several_lengths_are_filled_at_once(make_tokens: Callable[..., TokenSet]) -> None:
    tokens = make_tokens([list(range(100, 150)), [2] * 4], shard_tokens=23)
    whole = np.zeros((2, 40), np.int64)
    views = [whole[0, :7], whole[0, 7:30], whole[1, :0], whole[1, 3:9]]
    tokens.fill(views, np.array([11, 20, 5, 53]), within=whole)
    ring = np.array([*range(100, 150), END, 2, 2, 2, 2, END])
    for view, start in zip(views, (11, 20, 5, 53), strict=True):
        assert np.array_equal(view, ring[(start + np.arange(len(view))) % len(ring)])
    assert not whole[1, 9:].any()
