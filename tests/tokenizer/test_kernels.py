"""The compiled functions by themselves: classes of characters, cutting, merging."""

from __future__ import annotations

import unicodedata
from collections import Counter
from itertools import pairwise, product
from random import Random

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.tokenizer import bpe, bpe_reference, pretokenize
from groundup.tokenizer.pretokenize import CL100K_TIKTOKEN, PATTERNS, Splitter
from groundup.tokenizer.rules import Rules
from groundup.tokenizer.unicode_classes import CODE_POINTS, LETTER, LOWER, NUMBER, SPACE, UPPER, class_bits

pytest.importorskip("numba", reason="the kernels need Numba")

from groundup.tokenizer import compiled
from groundup.tokenizer.kernels import cut as cutting
from groundup.tokenizer.kernels import merge as merging
from groundup.tokenizer.kernels import state
from groundup.tokenizer.kernels.machine import field, kernel

EXPRESSIONS = {
    "gpt2": PATTERNS["gpt2"],
    "cl100k": PATTERNS["cl100k"],
    "cl100k, all at end": CL100K_TIKTOKEN,
    "qwen2": PATTERNS["cl100k"].replace(r"\p{N}{1,3}", r"\p{N}"),
    "o200k": PATTERNS["o200k"],
}

# Every kind of character that a pattern tells apart, some of one byte and some of more, and what stands beside them
# in Unicode: the long s (an s where case is ignored), title case, letters and numbers that are symbols or have no case,
# white space that is no blank, signs that join, marks.
ASCII = "   \n\n\t\r\x0b'''sStTrReEvVlLdDmMaAbZ0123.!?/-\"\x00\x1c\x7f"
WIDE = "\u00a0\u2003\u2029\u3000\u0085ſéÉßªʰǅΣςдД中文あ한ก\u0301\u20dd\u0903١²Ⅷ½𝟘𝒜𐐀😀\u200d“”،€"
characters = st.sampled_from(ASCII + WIDE)
nasty_texts = st.one_of(
    st.text(characters, max_size=12),
    st.text(characters, max_size=200),
    st.lists(st.sampled_from(["'s", "'LL", "'ſ", " '", "\r\n", "  ", "\n/", "//", "aB", "Ab", "é\u0301", "123"])).map(
        "".join
    ),
)


@kernel
def cut(memory, size):
    """Cut what is in the scratch buffer, as :func:`words.next_piece` does."""
    return cutting.cut(
        field(memory, state.SCRATCH),
        size,
        field(memory, state.MAPS),
        field(memory, state.STRIDE),
        field(memory, state.CLASSES),
        field(memory, state.PATTERN),
        field(memory, state.DIGITS),
        field(memory, state.ALL_AT_END),
        field(memory, state.ENDS),
    )


class Cutter:
    """Cuts text by one of the patterns that are written out."""

    def __init__(self, expression: str) -> None:
        splitter = Splitter(expression)
        assert splitter.shape is not None
        self._memory = compiled.Memory(splitter, 1, 0)

    def __call__(self, text: str) -> list[bytes]:
        data = text.encode()
        if not data:
            return []
        if len(data) > self._memory.fields[state.CAPACITY]:
            self._memory.set_capacity(len(data))
        # What a text before left in the buffers must make no difference, but for the 64 zeros.
        scratch = self._memory.array(state.SCRATCH)
        scratch[: len(data) + 64] = np.frombuffer(data + bytes(64), np.uint8)
        self._memory.array(state.MAPS)[:] = 0xA5
        count = cut(self._memory.address, len(data))
        ends = self._memory.array(state.ENDS)[1 : 1 + count].tolist()
        return [data[start:end] for start, end in pairwise([0, *ends])]


@pytest.fixture(scope="module")
def cutters() -> dict[str, Cutter]:
    return {name: Cutter(expression) for name, expression in EXPRESSIONS.items()}


def assert_cut_like_regex(cutters: dict[str, Cutter], text: str) -> None:
    for name, cutter in cutters.items():
        expected = [chunk.encode() for chunk in regex.findall(EXPRESSIONS[name], text)]
        assert cutter(text) == expected, (name, text)


# ---- classes of characters

CLASS_OF_CATEGORY = {
    "Lu": LETTER | UPPER,
    "Lt": LETTER | UPPER,
    "Ll": LETTER | LOWER,
    **dict.fromkeys(("Lm", "Lo"), LETTER | UPPER | LOWER),
    **dict.fromkeys(("Mn", "Mc", "Me"), UPPER | LOWER),
    **dict.fromkeys(("Nd", "Nl", "No"), NUMBER),
}


def test_classes_are_those_of_pythons_own_tables() -> None:
    # Unicode hardly ever gives a character another category: none of these versions, 14 to 16, did.
    if tuple(map(int, unicodedata.unidata_version.split("."))) > (16, 0, 0):
        pytest.skip(f"this Python knows Unicode {unicodedata.unidata_version}, newer than our table")
    bits = class_bits()
    for point in range(CODE_POINTS):
        category = unicodedata.category(chr(point))
        if category != "Cn":
            assert bits[point] & (0xFF - SPACE) == CLASS_OF_CATEGORY.get(category, 0), hex(point)


def test_white_space_is_pythons_but_for_four_separators() -> None:
    # str.isspace counts U+001C to U+001F, which regular expressions over Unicode's White_Space do not.
    white = [point for point in range(CODE_POINTS) if chr(point).isspace() and not 0x1C <= point <= 0x1F]
    assert np.flatnonzero(class_bits() & SPACE).tolist() == white
    assert len(white) == 25


def test_classes_are_the_regex_librarys_for_what_is_assigned() -> None:
    text = "".join(chr(point) for point in range(CODE_POINTS) if not 0xD800 <= point < 0xE000)
    points = np.array([ord(character) for character in text])
    found = np.zeros(CODE_POINTS, np.uint8)
    for expression, bit in {
        r"\p{L}+": LETTER,
        r"\p{N}+": NUMBER,
        r"\s+": SPACE,
        r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+": UPPER,
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]+": LOWER,
    }.items():
        for match in regex.finditer(expression, text):
            found[points[match.start() : match.end()]] |= bit
    different = np.flatnonzero(found != class_bits()).tolist()
    # The library may know a newer Unicode, which assigns more; of what there was, only U+0295 changed, from Ll to Lo.
    assert {point for point in different if unicodedata.category(chr(point)) != "Cn"} <= {0x295}
    assert all(class_bits()[point] == 0 for point in different if point != 0x295)


# ---- cutting


def test_every_pattern_that_is_written_out_is_cut_here() -> None:
    shapes = {Splitter(expression).shape for expression in EXPRESSIONS.values()}
    assert shapes == set(pretokenize._SHAPES.values())
    assert None not in shapes


@settings(max_examples=200, deadline=None)
@given(text=nasty_texts)
def test_cutting_equals_regex(cutters: dict[str, Cutter], text: str) -> None:
    assert_cut_like_regex(cutters, text)


def test_cutting_random_texts_equals_regex(cutters: dict[str, Cutter]) -> None:
    random = Random(1)
    for _ in range(4_000):
        size = random.randint(1, random.choice((5, 30, 200)))
        assert_cut_like_regex(cutters, "".join(random.choices(ASCII + WIDE, k=size)))


@pytest.mark.parametrize("name", EXPRESSIONS)
@pytest.mark.parametrize("piece", [64, 100])
def test_counting_in_pieces_equals_regex(monkeypatch: pytest.MonkeyPatch, name: str, piece: int) -> None:
    # A piece ends where every pattern cuts, whatever follows; a seam too many would show here.
    monkeypatch.setattr(compiled, "PIECE", piece)
    random = Random(piece)
    texts = ["".join(random.choices(ASCII + WIDE, k=random.randint(50, 600))) for _ in range(300)]
    texts += ["".join(random.choices("aAé字ªक.' \n\u0301", k=400)) for _ in range(300)]
    counter = compiled.ChunkCounter(Splitter(EXPRESSIONS[name]), 1)
    counter.add(texts)
    chunks, ends, counts = counter.result()
    found = [chunks[start:end].tobytes().decode() for start, end in pairwise([0, *ends.tolist()])]
    expected = Counter(chunk for text in texts for chunk in regex.findall(EXPRESSIONS[name], text))
    assert dict(zip(found, counts.tolist(), strict=True)) == expected


@pytest.mark.parametrize("expression", [e for e in pretokenize._SHAPES if e not in EXPRESSIONS.values()])
def test_other_spellings_of_a_pattern_cut_in_the_same_places(expression: str) -> None:
    cutter, random = Cutter(expression), Random(1)
    for _ in range(3_000):
        text = "".join(random.choices(ASCII + WIDE, k=random.randint(1, 30)))
        assert cutter(text) == [chunk.encode() for chunk in regex.findall(expression, text)], text


def test_all_short_texts_of_what_patterns_tell_apart(cutters: dict[str, Cutter]) -> None:
    for letters in product("aA1 \n'/é\u0301\u3000.", repeat=4):
        assert_cut_like_regex(cutters, "".join(letters))


CROSSING = [
    "don't",
    "DON'T'ſ",
    "'ll",
    " word",
    "  \n\n  word",
    "\r\n \r\n",
    "12345678",
    " 12",
    "...\n\n/x",
    " !?//\r/a",
    "camelCaseÉtéABCd",
    "é\u0301\u0301x",
    "\u0301\u0301",
    "中文\u3000\u3000字",
    "\u2003\u2003",
    "👋🏽\u200d👋",
    "a\u00a0b",
    "  ",
    "\n",
]


@pytest.mark.parametrize("filler", ["a", "A", " ", "\n", ".", "1", "é", "字", "\u3000", "\u0301", "😀", "'", "/"])
def test_text_at_every_place_of_a_block(cutters: dict[str, Cutter], filler: str) -> None:
    # Blocks are of 64 bytes: whatever reaches over an edge is carried on.
    joined = "a".join(CROSSING)
    for offset in range(0, 131, len(filler.encode())):
        assert_cut_like_regex(cutters, filler * (offset // len(filler.encode())) + joined)


@pytest.mark.parametrize("text", CROSSING)
def test_the_end_of_the_text_at_every_place_of_a_block(cutters: dict[str, Cutter], text: str) -> None:
    for offset in range(131):
        assert_cut_like_regex(cutters, "x" * (offset // 2) + "." * (offset - offset // 2) + text)


@pytest.mark.parametrize(
    "unit", [*"aA1 \n.'/é字\u3000\u0301😀ǅ", "a'", "/\n", " \n", "\n ", "'s", "aA", "1a", "\u0301."]
)
def test_runs_over_many_blocks(cutters: dict[str, Cutter], unit: str) -> None:
    for size in (63, 64, 65, 127, 128, 129, 500):
        for before, behind in [("", ""), ("x", "y"), (" ", " "), (".", "\n"), ("\n", "\n x")]:
            assert_cut_like_regex(cutters, before + unit * size + behind)


def test_cutting_real_text_equals_regex(
    cutters: dict[str, Cutter], shakespeare: str, code: list[str], multilingual: list[str]
) -> None:
    same = set(np.flatnonzero(class_bits()).tolist())
    for text in (shakespeare[:300_000], "".join(code)[:300_000], "\n".join(multilingual)[:600_000]):
        # Unassigned in Unicode 16, or newly classified: the library may know better, see above.
        clean = "".join(c for c in text if ord(c) in same or (unicodedata.category(c) != "Cn" and c != "ʕ"))
        assert len(clean) > 0.99 * len(text)
        assert_cut_like_regex(cutters, clean)


# ---- merging


def random_words(random: Random, letters: bytes, count: int, longest: int) -> list[bytes]:
    return [bytes(random.choices(letters, k=random.randint(1, longest))) for _ in range(count)]


def vocabulary(random: Random, letters: bytes, size: int) -> tuple[list[bytes], list[tuple[int, int]]]:
    """What is learned from random text: of few letters, so that tokens overlap themselves and each other."""
    chunks = [*random_words(random, letters, 60, 30), letters[:1] * 40]
    return bpe.learn({chunk: random.randint(1, 9) for chunk in chunks}, 256 + size, 1)


VOCABULARIES = [(b"a", 6), (b"ab", 40), (b"aab", 120), (b"abc", 200), (b"abcdefgh", 400), (bytes(range(256)), 300)]


@pytest.mark.parametrize(("letters", "size"), VOCABULARIES)
@pytest.mark.parametrize("renumbered", [False, True])
def test_merging_one_chunk_equals_the_reference(letters: bytes, size: int, renumbered: bool) -> None:
    random = Random(size)
    tokens, merges = vocabulary(random, letters, size)
    by_bytes = [(tokens[left], tokens[right]) for left, right in merges]
    if renumbered:  # a product is not its rank any more: it is looked up
        random.shuffle(tokens)
        ids = {token: number for number, token in enumerate(tokens)}
        merges = [(ids[left], ids[right]) for left, right in by_bytes]
    memory, exceptions = compiled._tables(Rules(tokens, merges, range(len(tokens)), whole_words=False))
    assert exceptions == []
    assert bool(memory.fields[state.PRODUCTS]) == renumbered
    merged = memory.array(state.MERGED)
    for length in range(1, 201):
        chunk = bytes(random.choices(letters, k=length))
        padded = np.frombuffer(chunk + bytes(16), np.uint8)
        expected = bpe_reference.encode(chunk, by_bytes)
        count = merging.merge(memory.address, padded.ctypes.data, length)
        assert [tokens[number] for number in merged[1 : 1 + count].tolist()] == expected, chunk


@pytest.mark.parametrize(("letters", "size"), VOCABULARIES)
@pytest.mark.parametrize("slots", [16, 1 << 14])
def test_merging_many_chunks_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, letters: bytes, size: int, slots: int
) -> None:
    # New chunks of up to 63 bytes are merged side by side. Among 16 slots most find no room, and are merged alone.
    monkeypatch.setattr(compiled, "FIRST_SLOTS", slots)
    monkeypatch.setattr(compiled, "MOST_SLOTS", slots)
    random = Random(size)
    tokens, merges = vocabulary(random, letters, size)
    by_bytes = [(tokens[left], tokens[right]) for left, right in merges]
    rules = Rules(tokens, merges, range(len(tokens)), whole_words=False)
    encoder = compiled.CompiledEncoder(rules, Splitter(r"[^\n]+|\n"))
    for longest in (1, 3, 15, 16, 17, 31, 32, 33, 48, 49, 62, 63, 64, 100):
        lines = [word.decode("latin-1").replace("\n", "") for word in random_words(random, letters, 300, longest)]
        text = "\n".join(lines)
        chunks = [chunk.encode() for chunk in regex.findall(r"[^\n]+|\n", text)]
        expected = [token for chunk in chunks for token in bpe_reference.encode(chunk, by_bytes)]
        for _ in range(2):  # new, then known
            assert [tokens[number] for number in encoder.encode(text)] == expected
