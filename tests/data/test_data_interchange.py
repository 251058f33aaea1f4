from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from groundup.data import CorpusRecipe, PreparedData, TokenLoader, TokenSet, prepare
from groundup.data import token_files as token_files_module
from groundup.data.interchange import export_tokens, import_tokens
from groundup.data.token_files import TokenFile, id_type, write_megatron_index
from groundup.runtime import GroundupError, UsageError
from groundup.tokenizer import Tokenizer

LINE = "the of and a to in is you that it he was for on are as with his they at be this have from or"


def prose(n_words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(LINE.split(), k=n_words)) + "\n"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """43 documents in several shards."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "texts").mkdir()
    for number in range(43):
        (folder / "texts" / f"{number:02d}.txt").write_text(prose(90 + 7 * number, seed=number))
    return prepare(str(folder / "texts"), folder / "out", vocab_size=283, corpus=CorpusRecipe(shard_tokens=997))


def encoded(made: PreparedData, part: str) -> list[list[int]]:
    return [made.tokenizer.encode(text) for text in made.texts(part)]


def all_ids(tokens: TokenSet) -> list[int]:
    return tokens.read(0, tokens.n_tokens).tolist()


def read_megatron(path: Path) -> list[list[list[int]]]:
    """Documents, sequences, ids: a reader of its own, byte by byte as the format says."""
    raw, data = path.with_suffix(".idx").read_bytes(), path.read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    version, code = struct.unpack("<QB", raw[9:18])
    assert version == 1
    letter, width = {1: ("B", 1), 4: ("i", 4), 8: ("H", 2)}[code]
    n_sequences, n_documents = struct.unpack("<QQ", raw[18:34])
    at = 34
    lengths = struct.unpack_from(f"<{n_sequences}i", raw, at)
    at += 4 * n_sequences
    pointers = struct.unpack_from(f"<{n_sequences}q", raw, at)
    at += 8 * n_sequences
    documents = struct.unpack_from(f"<{n_documents}q", raw, at)
    assert at + 8 * n_documents == len(raw)
    assert documents[-1] == n_sequences
    sequences = [
        list(struct.unpack_from(f"<{length}{letter}", data, pointer))
        for length, pointer in zip(lengths, pointers, strict=True)
    ]
    assert sum(lengths) * width == len(data)
    return [sequences[first:last] for first, last in pairwise(documents)]


def write_megatron(
    path: Path, sequences: list[list[int]], documents: list[int], code: int = 4, letter: str = "i", order: str = ""
) -> None:
    """A writer of its own; ``order="backwards"`` lays the sequences down from the last to the first."""
    width = struct.calcsize(letter)
    places, data = [0] * len(sequences), b""
    numbers = list(range(len(sequences)))
    for number in reversed(numbers) if order == "backwards" else numbers:
        places[number] = len(data)
        data += struct.pack(f"<{len(sequences[number])}{letter}", *sequences[number])
    path.write_bytes(data)
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(documents))
    body = struct.pack(f"<{len(sequences)}i", *map(len, sequences)) + struct.pack(f"<{len(places)}q", *places)
    path.with_suffix(".idx").write_bytes(head + body + struct.pack(f"<{len(documents)}q", *documents))
    assert width * sum(map(len, sequences)) == len(data)


# ---- writing


def test_nanogpt_gets_what_its_own_prepare_would_write(prepared: PreparedData, tmp_path: Path) -> None:
    files = export_tokens(prepared, tmp_path / "out", "nanogpt")
    assert [file.name for file in files] == ["train.bin", "val.bin"]
    end = prepared.tokenizer.end_of_text_id
    for part, file in zip(("train", "val"), files, strict=True):
        expected = [number for ids in encoded(prepared, part) for number in (*ids, end)]
        assert np.fromfile(file, np.uint16).tolist() == expected
    noted = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (noted["vocab_size"], noted["end_of_text_id"]) == (283, end)
    assert noted["tokens"] == {"train": prepared.train.n_tokens, "val": prepared.val.n_tokens}
    assert Tokenizer.load(tmp_path / "out" / "tokenizer").fingerprint == prepared.tokenizer.fingerprint
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {"train.bin", "val.bin", "meta.json", "tokenizer"}


def test_megatron_gets_a_sequence_per_document(prepared: PreparedData, tmp_path: Path) -> None:
    files = export_tokens(prepared, tmp_path / "out", "megatron")
    assert [file.name for file in files] == ["train.bin", "train.idx", "val.bin", "val.idx"]
    end = prepared.tokenizer.end_of_text_id
    for part in ("train", "val"):
        expected = [[[*ids, end]] for ids in encoded(prepared, part)]
        assert read_megatron(tmp_path / "out" / f"{part}.bin") == expected


def test_the_bytes_of_a_megatron_index(make_tokens: Callable[..., TokenSet], tmp_path: Path) -> None:
    tokens = make_tokens([[5, 6, 7], [8]], shard_tokens=3)  # the first document runs over two shards
    write_megatron_index(tmp_path / "a.idx", tokens, np.dtype("<u2"))
    assert (tmp_path / "a.idx").read_bytes().hex(" ", 1) == (
        "4d 4d 49 44 49 44 58 00 00  01 00 00 00 00 00 00 00  08  02 00 00 00 00 00 00 00  03 00 00 00 00 00 00 00  "
        "04 00 00 00  02 00 00 00  00 00 00 00 00 00 00 00  08 00 00 00 00 00 00 00  "
        "00 00 00 00 00 00 00 00  01 00 00 00 00 00 00 00  02 00 00 00 00 00 00 00"
    ).replace("  ", " ")
    write_megatron_index(tmp_path / "a.idx", tokens, np.dtype("<i4"))
    raw = (tmp_path / "a.idx").read_bytes()
    assert raw[17] == 4
    assert struct.unpack_from("<2q", raw, 42) == (0, 16)


def test_the_width_of_ids_is_megatrons() -> None:
    assert [id_type("megatron", size).itemsize for size in (256, 65_499, 65_500, 200_000)] == [2, 2, 4, 4]
    assert id_type("nanogpt", 65_536).itemsize == 2


def test_a_vocabulary_too_large_for_nanogpt(prepared: PreparedData, tmp_path: Path) -> None:
    class Large:
        folder = prepared.folder

        class tokenizer:  # noqa: N801
            vocab_size = 65_537

    with pytest.raises(UsageError, match=r"65,537 tokens do not fit into nanoGPT's 16 bits.*--to megatron"):
        export_tokens(Large, tmp_path / "out", "nanogpt")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_an_export_replaces_an_export_and_nothing_else(prepared: PreparedData, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export_tokens(prepared, out, "megatron")
    export_tokens(prepared, out, "nanogpt")
    assert not (out / "train.idx").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "letters.txt").write_text("mine")
    with pytest.raises(GroundupError, match=r"other: this folder holds other things"):
        export_tokens(prepared, other, "nanogpt")
    assert (other / "letters.txt").read_text() == "mine"
    with pytest.raises(GroundupError, match=r"letters\.txt"):
        export_tokens(prepared, other / "letters.txt", "nanogpt")


# ---- there and back


@pytest.mark.parametrize("layout", ["nanogpt", "megatron"])
@pytest.mark.parametrize("chunk", [1 << 22, 13])
def test_what_was_exported_comes_back(
    prepared: PreparedData, tmp_path: Path, layout: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_tokens(prepared, tmp_path / "there", layout)  # type: ignore[arg-type]
    monkeypatch.setattr(token_files_module, "CHUNK", chunk)
    back = import_tokens(tmp_path / "there", prepared.tokenizer, tmp_path / "back", CorpusRecipe(shard_tokens=997))
    for part in ("train", "val"):
        before, after = getattr(prepared, part), getattr(back, part)
        assert all_ids(after) == all_ids(before)
        assert after.document_starts().tolist() == before.document_starts().tolist()
        assert (after.n_bytes, after.n_documents) == (before.n_bytes, before.n_documents)
        assert list(back.texts(part)) == list(prepared.texts(part))
        assert back.text_bytes(part) == prepared.text_bytes(part)
        for name in ("tokens-00000.bin", "tokens-00000.idx", "manifest.json"):
            assert (back.folder / part / name).read_bytes() == (prepared.folder / part / name).read_bytes()
    assert back.stats["split"] == "as given"
    assert back.stats["bytes_per_token"] == prepared.stats["bytes_per_token"]
    assert back.tokenizer.fingerprint == prepared.tokenizer.fingerprint
    again = PreparedData.open(back.folder, verify=True)
    ours, theirs = TokenLoader(again.train, 17, 3, seed=5).batch(2), TokenLoader(prepared.train, 17, 3, seed=5).batch(2)
    assert ours[0].tolist() == theirs[0].tolist()


def test_an_import_is_opened_as_prepared_data(prepared: PreparedData, tmp_path: Path) -> None:
    export_tokens(prepared, tmp_path / "there", "nanogpt")
    back = import_tokens(tmp_path / "there" / "train.bin", prepared.tokenizer, tmp_path / "back")
    assert prepare(str(back.folder), tmp_path / "never").train.n_tokens == back.train.n_tokens
    assert not (tmp_path / "never").exists()
    replaced = import_tokens(tmp_path / "there", prepared.tokenizer, tmp_path / "back")  # its own kind gives way
    assert replaced.stats["split"] == "as given"


# ---- reading what others wrote


def test_documents_are_held_out_where_no_file_is(prepared: PreparedData, tmp_path: Path) -> None:
    export_tokens(prepared, tmp_path / "there", "megatron")
    texts = list(prepared.texts("train"))
    picked = []
    for split_seed in (1, 1, 2):
        corpus = CorpusRecipe(val_fraction=0.2, split_seed=split_seed)
        back = import_tokens(tmp_path / "there" / "train", prepared.tokenizer, tmp_path / "back", corpus)
        train, val = list(back.texts("train")), list(back.texts("val"))
        assert back.stats["split"] == "by document"
        assert sorted(train + val) == sorted(texts)
        assert train == [text for text in texts if text not in val]  # in the order of the file
        assert 0.1 * prepared.train.n_bytes < back.val.n_bytes <= 0.2 * prepared.train.n_bytes
        picked.append(val)
    assert picked[0] == picked[1] != picked[2]
    few = CorpusRecipe(val_fraction=0.5, max_val_bytes=1500)
    back = import_tokens(tmp_path / "there" / "train.bin", prepared.tokenizer, tmp_path / "back", few)
    assert 750 <= back.val.n_bytes <= 1500


def test_the_end_is_held_out_where_documents_are_few(prepared: PreparedData, tmp_path: Path) -> None:
    ids = [number for text in prepared.texts("train") for number in prepared.tokenizer.encode(text)]
    np.array(ids, "<u2").tofile(tmp_path / "one.bin")  # as nanoGPT's characters of Shakespeare: no end of text
    back = import_tokens(
        tmp_path / "one.bin", prepared.tokenizer, tmp_path / "back", CorpusRecipe(val_fraction=0.1, shard_tokens=311)
    )
    end = prepared.tokenizer.end_of_text_id
    assert back.stats["split"] == "end of the file"
    train, val = all_ids(back.train), all_ids(back.val)
    assert train.pop() == val.pop() == end
    assert train + val == ids
    assert len(val) == round(0.1 * len(ids)) or abs(len(val) / len(ids) - 0.1) < 1e-3
    assert back.train.n_bytes + back.val.n_bytes == prepared.train.n_bytes


def test_llm_c_puts_a_header_first_and_the_end_before(prepared: PreparedData, tmp_path: Path) -> None:
    end = prepared.tokenizer.end_of_text_id
    for part in ("train", "val"):
        ids = [number for document in encoded(prepared, part) for number in (end, *document)]
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, len(ids)
        (tmp_path / f"shakespeare_{part}_000001.bin").write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())
    back = import_tokens(tmp_path, prepared.tokenizer, tmp_path / "back")
    assert all_ids(back.train) == all_ids(prepared.train)
    assert all_ids(back.val) == all_ids(prepared.val)
    path = tmp_path / "shakespeare_val_000001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(GroundupError, match=r"shakespeare_val_000001\.bin: a file of llm\.c, of version 1"):
        import_tokens(tmp_path, prepared.tokenizer, tmp_path / "back")


@pytest.mark.parametrize("order", ["", "backwards"])
def test_sequences_of_a_megatron_document_are_joined(prepared: PreparedData, tmp_path: Path, order: str) -> None:
    end = prepared.tokenizer.end_of_text_id
    assert end is not None
    sequences = [[1, 2, 3], [4], [5, 6, end], [], [end], [7, end, 8, end], [9]]
    write_megatron(tmp_path / "a.bin", sequences, [0, 3, 3, 5, 6, 7], order=order)
    found = [ids.tolist() for ids in TokenFile.open(tmp_path / "a.bin").texts(end)]
    assert found == [[1, 2, 3, 4, 5, 6], [7], [8], [9]]
    back = import_tokens(tmp_path / "a.idx", prepared.tokenizer, tmp_path / "back", CorpusRecipe(val_fraction=0.3))
    assert [one for one in all_ids(back.train) + all_ids(back.val) if one != end] == list(range(1, 10))


@pytest.mark.parametrize(("code", "letter"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
def test_every_integer_type_of_megatron(tmp_path: Path, code: int, letter: str) -> None:
    write_megatron(tmp_path / "a.bin", [[1, 2, 101], [3]], [0, 1, 2], code, letter)
    file = TokenFile.open(tmp_path / "a.bin")
    assert [ids.tolist() for ids in file.texts(101)] == [[1, 2], [3]]


def test_bytes_are_counted_as_text(tmp_path: Path) -> None:
    text = "naïve café — 東京 𝄞\n"
    tokenizer = Tokenizer.train([text * 3], vocab_size=270, show_progress=False)
    ids = tokenizer.encode(text)
    np.array([*ids, tokenizer.end_of_text_id] * 30, "<u2").tofile(tmp_path / "a.bin")
    back = import_tokens(tmp_path / "a.bin", tokenizer, tmp_path / "back")
    assert back.train.n_bytes + back.val.n_bytes == 30 * len(text.encode())
    assert set(back.texts("val")) == {text}


# ---- mistakes


def nothing_left(folder: Path) -> None:
    assert not (folder / "back").exists()
    assert not [entry for entry in folder.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize(("code", "letter", "wrong"), [(8, "H", 283), (4, "i", -1), (4, "i", 2**31 - 1)])
def test_an_id_of_another_vocabulary(
    prepared: PreparedData, tmp_path: Path, code: int, letter: str, wrong: int
) -> None:
    write_megatron(tmp_path / "a.bin", [[5, 6], [7, wrong, 8]], [0, 1, 2], code, letter)
    with pytest.raises(GroundupError, match=rf"a\.bin: token 3 has the id {wrong}, .* none of the given .*'s 283\."):
        import_tokens(tmp_path / "a.bin", prepared.tokenizer, tmp_path / "back")
    nothing_left(tmp_path)


def test_an_export_of_another_tokenizer(prepared: PreparedData, tmp_path: Path) -> None:
    export_tokens(prepared, tmp_path / "there", "nanogpt")
    other = Tokenizer.train([prose(500, seed=99)], vocab_size=299, show_progress=False)
    with pytest.raises(GroundupError, match=r"train\.bin: exported with another tokenizer.*there/tokenizer"):
        import_tokens(tmp_path / "there" / "train.bin", other, tmp_path / "back")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:20], "not an index of Megatron-LM"),
        (lambda raw: b"X" + raw[1:], "not an index of Megatron-LM"),
        (lambda raw: raw[:9] + b"\2" + raw[10:], "version 2, type 4; version 1 and types"),
        (lambda raw: raw[:17] + b"\7" + raw[18:], "version 1, type 7; version 1 and types"),
        (lambda raw: raw[:-1], r"81 bytes, 82 expected: it is cut short"),
        (lambda raw: raw[:18] + b"\xff" * 8 + raw[26:], "it is cut short"),
        (lambda raw: raw[:34] + struct.pack("<i", 9) + raw[38:], "does not fit its index a.idx"),
        (lambda raw: raw[:34] + struct.pack("<i", -1) + raw[38:], "does not fit its index a.idx"),
        (lambda raw: raw[:42] + struct.pack("<q", 2) + raw[50:], "does not fit its index a.idx"),
        (lambda raw: raw[:42] + struct.pack("<q", -4) + raw[50:], "does not fit its index a.idx"),
        (lambda raw: raw[:-8] + struct.pack("<q", 3), "does not fit its index a.idx"),
        (lambda raw: raw[:-16] + struct.pack("<q", 5) + raw[-8:], "does not fit its index a.idx"),
    ],
)
def test_a_damaged_index(
    prepared: PreparedData, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    write_megatron(tmp_path / "a.bin", [[5, 6], [7, 8, 9]], [0, 1, 2])
    index = tmp_path / "a.idx"
    assert len(index.read_bytes()) == 82
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(GroundupError, match=message):
        import_tokens(tmp_path / "a.bin", prepared.tokenizer, tmp_path / "back")
    nothing_left(tmp_path)


def test_files_that_cannot_be_imported(prepared: PreparedData, tmp_path: Path) -> None:
    def fails(file: str, message: str) -> None:
        with pytest.raises(GroundupError, match=message):
            import_tokens(tmp_path / file, prepared.tokenizer, tmp_path / "back")
        nothing_left(tmp_path)

    fails("nowhere.bin", r"nowhere\.bin: no such file or folder")
    (tmp_path / "empty").mkdir()
    fails("empty", r"no token files \(\*\.bin\) in this folder")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    fails("odd.bin", "3 bytes, which are no 16-bit token ids")
    (tmp_path / "none.bin").touch()
    fails("none.bin", "0 bytes, which are no 16-bit token ids")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "val.bin").write_bytes(b"\1\0\2\0")
    fails("alone", r"only val\.bin, nothing to train on")
    np.array([prepared.tokenizer.end_of_text_id] * 5, "<u2").tofile(tmp_path / "ends.bin")
    fails("ends.bin", "too few tokens")
    np.array([5], "<u2").tofile(tmp_path / "single.bin")
    fails("single.bin", "too few tokens")


def test_a_tokenizer_without_an_end_of_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train([prose(50, seed=1)], vocab_size=256, special_tokens=(), show_progress=False)
    np.array([5, 6, 7], "<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(GroundupError, match=r"no <\|endoftext\|> token"):
        import_tokens(tmp_path / "a.bin", tokenizer, tmp_path / "back")


def test_an_import_never_replaces_other_things(prepared: PreparedData, tmp_path: Path) -> None:
    np.array([5, 6, 7], "<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(GroundupError, match="holds other things"):
        import_tokens(tmp_path / "a.bin", prepared.tokenizer, tmp_path)
