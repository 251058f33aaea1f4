"""llama2.c's tokenizer files: the same ids as its own program, and what a damaged file ends in."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.runtime import GroundupError
from groundup.tokenizer import Tokenizer
from groundup.tokenizer.formats import llama2c

BYTES = [f"<0x{byte:02X}>".encode() for byte in range(256)]
Pieces = list[tuple[float, bytes]]


def written(pieces: Pieces, longest: int | None = None) -> bytes:
    start = struct.pack("<i", max(len(token) for _, token in pieces) if longest is None else longest)
    return start + b"".join(struct.pack("<fi", score, len(token)) + token for score, token in pieces)


def with_special(ordinary: Pieces) -> Pieces:
    return [(0.0, token) for token in (b"<unk>", b"\n<s>\n", b"\n</s>\n", *BYTES)] + ordinary


def pieces_of(data: bytes) -> Pieces:
    pieces, at = [], 4
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append((score, data[at + 8 : at + 8 + length]))
        at += 8 + length
    return pieces


def encoded(pieces: Pieces, text: str) -> list[int]:
    """What ``encode`` of run.c does, without the tokens at either end."""
    ids = {token: number for number, (_, token) in enumerate(pieces)}
    tokens = [ids[b" "]] if text else []
    for character in text:
        raw = character.encode()
        tokens += [ids[raw]] if raw in ids else [byte + 3 for byte in raw]
    while True:
        best_score, best_place = -1e10, -1
        for place in range(len(tokens) - 1):
            joined = ids.get(pieces[tokens[place]][1] + pieces[tokens[place + 1]][1])
            if joined is not None and pieces[joined][0] > best_score:
                best_score, best_place = pieces[joined][0], place
        if best_place < 0:
            return tokens
        joined = ids[pieces[tokens[best_place]][1] + pieces[tokens[best_place + 1]][1]]
        tokens[best_place : best_place + 2] = [joined]


# ---- the file of the 260K model


@pytest.fixture(scope="module")
def file(shared_data: Path) -> Path:
    return shared_data / "weights" / "stories260K" / "tok512.bin"


@pytest.fixture(scope="module")
def tok512(file: Path) -> Tokenizer:
    return Tokenizer.load(file)


def test_what_it_consists_of(tok512: Tokenizer, file: Path) -> None:
    assert tok512.vocab_size == 512
    assert tok512.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert tok512.end_of_text_id == 1  # run.c ends a story there
    assert [tok512.token_bytes(3 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    for number, (_, token) in enumerate(pieces_of(file.read_bytes())[259:], start=259):
        assert tok512.token_bytes(number) == token
    assert tok512.encode("Once", add_special=True)[0] == 1
    assert Tokenizer.load(file.parent).fingerprint == tok512.fingerprint


HARD = [
    "", " ", "  ", "a", "Once upon a time", " Once", "Once ", "a  b   c", "\n", "\n\nOnce\n", "\t", "<s>", "</s>",
    "<unk>", "<0x41>", "naïve café", "中文 很好", "👋🏽 👩‍👩‍👧", "é", "ñ ñ", "€5", "\u00a0", "\u200a",
    "\x01\x7f\x80", "٣", "𝒳", "hhhhhhe hehehe", "ttthhheee   the the", "A" * 300,
]  # fmt: skip


def test_ids_are_those_of_run_c(tok512: Tokenizer, file: Path, shakespeare: str, multilingual: list[str]) -> None:
    pieces = pieces_of(file.read_bytes())
    chooser = random.Random(7)
    starts = [chooser.randrange(len(shakespeare) - 200) for _ in range(150)]
    texts = [*HARD, *(shakespeare[start : start + chooser.randrange(1, 200)] for start in starts)]
    texts += [text[:150] for text in multilingual]
    for text in texts:
        assert tok512.encode(text) == encoded(pieces, text), text
        assert tok512.decode(tok512.encode(text)) == text


def test_saved_it_encodes_the_same_here_and_in_hugging_face(tok512: Tokenizer, tmp_path: Path) -> None:
    import tokenizers

    tok512.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tok512.fingerprint
    assert again.end_of_text_id == 1
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in HARD:
        if text in tok512.special_tokens:  # which that library finds in any text
            continue
        assert other.encode(text).ids == tok512.encode(text, add_special=True), text


# ---- any vocabulary


@st.composite
def vocabularies(draw: st.DrawFn) -> Pieces:
    """Characters and longer tokens over a small alphabet with any scores; some tokens cannot be made."""
    alphabet = " abñ中"
    characters = draw(st.sets(st.sampled_from(alphabet[1:]), min_size=1))
    longer = draw(st.sets(st.text(alphabet, min_size=2, max_size=4), max_size=25))
    texts = draw(st.permutations([" ", *sorted(characters), *sorted(longer)]))
    scores = [draw(st.integers(-9, 3)) for _ in texts]
    return with_special([(float(score), text.encode()) for score, text in zip(scores, texts, strict=True)])


@settings(max_examples=150, deadline=None)
@given(vocabularies(), st.lists(st.text(" abñ中x", max_size=12), min_size=1, max_size=5))
def test_ids_are_those_of_run_c_for_any_vocabulary(pieces: Pieces, texts: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.bin"
        path.write_bytes(written(pieces))
        tok = Tokenizer.load(path)
    for text in texts:
        assert tok.encode(text) == encoded(pieces, text), text


def test_without_byte_tokens_what_is_not_there_is_unknown(tmp_path: Path) -> None:
    names = [(0.0, token) for token in (b"<unk>", b"\n<s>\n", b"\n</s>\n")]
    (tmp_path / "tok.bin").write_bytes(written([*names, (-1.0, b" "), (-2.0, b"a"), (-3.0, b" a")]))
    tok = Tokenizer.load(tmp_path / "tok.bin")
    assert tok.encode("a ax") == [5, 5, 0]
    assert tok.vocabulary.unknown == 0


# ---- damage


def fails(path: Path) -> str:
    with pytest.raises(GroundupError) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


SMALL = with_special([(-1.0, b" "), (-2.0, b"a"), (-3.0, b"b"), (-4.0, b" ab")])


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "tok.bin", written(SMALL)
    path.write_bytes(whole)
    assert Tokenizer.load(path).vocab_size == 263
    for length in (0, 1, 3, 5, 11, 12, 16, 18, len(whole) - 12, len(whole) - 4, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "cut short" in fails(path)
    for tokens in (0, 1, 3):  # between two tokens only their number tells
        path.write_bytes(written(SMALL)[:4] + written(SMALL[: max(tokens, 1)])[4:] * bool(tokens))
        assert f"more than {tokens} tokens" in fails(path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (struct.pack("<i", 0) + bytes(40), "its longest token would have 0 bytes"),
        (b"PK\x03\x04" + bytes(90), "its longest token would have 67324752 bytes"),
        (struct.pack("<ifi", 7, 0.0, -1) + bytes(9), "token 0 has -1 bytes"),
        (struct.pack("<ifi", 7, 0.0, 2**31 - 1) + bytes(9), "token 0 has 2147483647 bytes"),
        (struct.pack("<ifi", 7, float("nan"), 1) + b"a", "token 0 has 1 bytes and score nan"),
        (written(SMALL, longest=3), "token 0 has 5 bytes"),
        (written([*SMALL, (-5.0, b"\xff\xfe")]), "token 263 of this tokenizer of llama2.c is not UTF-8 text"),
        (written([*SMALL, (-5.0, b" ab")]), "has the token '▁ab' twice"),
        (written(SMALL[:3]), "has more than 3 tokens"),
    ],
)
def test_damage(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "tok.bin").write_bytes(data)
    assert words in fails(tmp_path / "tok.bin")


def test_several_in_a_folder_are_not_guessed_between(tmp_path: Path) -> None:
    for name in ("tok1.bin", "tok2.bin"):
        (tmp_path / name).write_bytes(written(SMALL))
    assert "there are 2 vocabularies (tok*.bin). Name the file" in fails(tmp_path)
    assert llama2c.PATTERN == "tok*.bin"
