"""However text is encoded, the ids are the same: compiled or plain, in pieces, by threads, in tables that fill up."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.runtime.errors import GroundupError
from groundup.tokenizer import Tokenizer, bpe, bpe_reference, encoder
from groundup.tokenizer.encoder import BytePairEncoder, PlainEncoder, recover_merges
from groundup.tokenizer.pretokenize import PATTERNS, Splitter
from groundup.tokenizer.rules import Rules

pytest.importorskip("numba", reason="the compiled encoder needs Numba")

from groundup.tokenizer import compiled
from groundup.tokenizer.kernels import state, words

GPT2 = PATTERNS["gpt2"]
ANYTHING = r"(?s:.+)"
MIXED = "Aa ab'll\n\n  123, é\u0301字字😀ſ "
texts_of_all_kinds = st.one_of(st.text(max_size=60), st.text(MIXED, max_size=120))

Pairs = list[tuple[int, int]]


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GROUNDUP_NO_NUMBA", "1")
    encoder.compiled.cache_clear()
    yield
    encoder.compiled.cache_clear()


@pytest.fixture
def cramped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and pieces are as small as can be, and every few bytes are worth a thread."""
    monkeypatch.setattr(compiled, "PIECE", 64)
    monkeypatch.setattr(compiled, "FIRST_SLOTS", 16)
    monkeypatch.setattr(compiled, "MOST_SLOTS", 64)
    monkeypatch.setattr(compiled, "PER_THREAD", 100)
    monkeypatch.setattr(compiled, "LISTED_AT_ONCE", 300)


def learned(texts: list[str], size: int, pattern: str = GPT2) -> tuple[list[bytes], Pairs]:
    counts: dict[bytes, int] = {}
    for text in texts:
        for chunk in Splitter(pattern).split(text):
            counts[chunk.encode()] = counts.get(chunk.encode(), 0) + 1
    return bpe.learn(counts, 256 + size, 1)


def make(tokens: list[bytes], merges: Pairs | None, pattern: str = GPT2, whole_words: bool = False) -> BytePairEncoder:
    return BytePairEncoder(tokens, merges, pattern, range(len(tokens)), whole_words)


def plain(tokens: list[bytes], merges: Pairs | None, pattern: str = GPT2, whole_words: bool = False) -> PlainEncoder:
    return PlainEncoder(Rules(tokens, merges, range(len(tokens)), whole_words), Splitter(pattern))


def by_reference(tokens: list[bytes], merges: Pairs, text: str, pattern: str = GPT2) -> list[int]:
    pairs = [(tokens[left], tokens[right]) for left, right in merges]
    ids = {token: number for number, token in enumerate(tokens)}
    chunks = [chunk.encode() for chunk in Splitter(pattern).split(text)]
    return [ids[token] for chunk in chunks for token in bpe_reference.encode(chunk, pairs)]


def slices(arrays: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    ids, starts = arrays
    assert starts[0] == 0
    assert starts[-1] == len(ids)
    return [ids[start:end].tolist() for start, end in pairwise(starts.tolist())]


@pytest.fixture(scope="module")
def tokens_and_merges() -> tuple[list[bytes], Pairs]:
    random = Random(1)
    texts = ["".join(random.choices(MIXED, k=200)) for _ in range(50)]
    return learned(texts, 500)


@pytest.fixture(scope="module")
def prose() -> list[str]:
    """Texts of all sizes, some of them empty, with words that come again and words that do not."""
    random = Random(2)
    vocabulary = ["".join(random.choices(MIXED + "etaoins", k=random.randint(1, 20))) for _ in range(3_000)]
    return [" ".join(random.choices(vocabulary, k=random.choice([0, 1, 5, 300]))) for _ in range(120)]


# ---- compiled equals plain equals the reference


def test_numba_is_what_is_tested_here() -> None:
    assert encoder.compiled() is compiled


@settings(max_examples=200, deadline=None)
@given(text=texts_of_all_kinds)
def test_listed_merges(tokens_and_merges: tuple[list[bytes], Pairs], text: str) -> None:
    tokens, merges = tokens_and_merges
    expected = by_reference(tokens, merges, text)
    assert made(make, tokens, merges).encode(text) == expected
    assert made(plain, tokens, merges).encode(text) == expected


@settings(max_examples=200, deadline=None)
@given(text=texts_of_all_kinds)
def test_ids_that_are_ranks(tokens_and_merges: tuple[list[bytes], Pairs], text: str) -> None:
    tokens, merges = tokens_and_merges
    expected = by_reference(tokens, merges, text)
    assert made(make, tokens, None).encode(text) == expected
    assert made(plain, tokens, None).encode(text) == expected


_made: dict[tuple[object, int, int], object] = {}


def made(maker: Callable, tokens: list[bytes], merges: Pairs | None) -> BytePairEncoder:
    """One encoder for all examples: a new one for each would never meet a word again."""
    key = (maker, id(tokens), id(merges))
    if key not in _made:
        _made[key] = maker(tokens, merges)
    return _made[key]  # type: ignore[return-value]


def test_products_that_are_not_in_the_order_of_ranks(tokens_and_merges: tuple[list[bytes], Pairs]) -> None:
    tokens, merges = tokens_and_merges
    order = [*range(len(tokens))]
    Random(3).shuffle(order)  # the new id of each token
    moved = [b""] * len(tokens)
    for number, token in zip(order, tokens, strict=True):
        moved[number] = token
    moved_merges = [(order[left], order[right]) for left, right in merges]
    random = Random(4)
    ours, plainly = make(moved, moved_merges), plain(moved, moved_merges)
    for _ in range(200):
        text = "".join(random.choices(MIXED, k=random.randint(1, 90)))
        expected = [order[number] for number in by_reference(tokens, merges, text)]
        assert ours.encode(text) == plainly.encode(text) == expected


def test_merges_listed_twice_count_where_they_are_first() -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"bc", b"abc"]
    merges = [(97, 98), (98, 99), (256, 99), (98, 99), (97, 98)]
    for text, expected in [("abc", [258]), ("bca", [257, 97]), ("abbc", [256, 257])]:
        assert make(tokens, merges).encode(text) == plain(tokens, merges).encode(text) == expected


def test_two_merges_may_make_one_token() -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"bc", b"abc"]
    merges = [(97, 98), (98, 99), (97, 257), (256, 99)]
    for text in ("abc", "abcabc", "bcabc", "aabcc"):
        ids = make(tokens, merges).encode(text)
        assert ids == plain(tokens, merges).encode(text) == by_reference(tokens, merges, text)
    assert make(tokens, merges).encode("abc") == [258]


@pytest.mark.parametrize("pattern", [r"\w+|\s+", r"[a-z]{1,4}", r"x*", r"(?=a)|(b)", ANYTHING, r"\p{Han}|\P{Han}+"])
def test_patterns_of_ones_own(prose: list[str], pattern: str) -> None:
    # What the expression does not match are chunks, too.
    tokens, merges = learned(prose[:20], 300, pattern)
    ours, plainly = make(tokens, merges, pattern), plain(tokens, merges, pattern)
    short = [text[:300] for text in prose[:40]]
    expected = [by_reference(tokens, merges, text, pattern) for text in short]
    assert [ours.encode(text) for text in short] == expected
    assert ours.encode_batch(short) == expected
    assert slices(plainly.encode_array(short)) == expected
    assert slices(ours.encode_array(prose)) == slices(plainly.encode_array(prose))


# ---- ids that are ranks, of tokens that nobody learned


def improper(random: Random, letters: bytes) -> list[bytes]:
    """A vocabulary of random strings: most of them cannot be made of two others."""
    strings = {bytes(random.choices(letters, k=random.randint(2, 6))) for _ in range(random.randint(1, 60))}
    longer = sorted(strings)
    random.shuffle(longer)
    return [bytes([byte]) for byte in range(256)] + longer


@pytest.mark.parametrize("letters", [b"ab", b"abc", b"aab ", b"abcdef"])
def test_tokens_that_nobody_learned(letters: bytes) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    random = Random(len(letters))
    proper = 0
    for _ in range(60):
        tokens = improper(random, letters)
        rules = Rules(tokens, None, range(len(tokens)), whole_words=True)
        proper += compiled.recover_merges(rules) is not None
        ranks = {token: number for number, token in enumerate(tokens)}
        peer = tiktoken.Encoding("test", pat_str=GPT2, mergeable_ranks=ranks, special_tokens={})
        ours, plainly = make(tokens, None), plain(tokens, None)
        for length in [*range(1, 40), 60, 200, 700]:
            text = bytes(random.choices(letters, k=length)).decode()
            expected = peer.encode_ordinary(text)
            assert ours.encode(text) == plainly.encode(text) == expected, (tokens[256:], text)
    assert proper < 30  # most of them need every way to cut every token


def test_recovered_merges_are_those_that_were_learned(
    tokens_and_merges: tuple[list[bytes], Pairs], without_numba: None
) -> None:
    tokens, merges = tokens_and_merges
    assert encoder.compiled() is None
    assert recover_merges(tokens, range(len(tokens))) == merges
    encoder.compiled.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GROUNDUP_NO_NUMBA")
        assert encoder.compiled() is compiled
        assert recover_merges(tokens, range(len(tokens))) == merges


# ---- whole words


def test_whole_words_go_before_merges(cramped: None) -> None:
    # Llama 3 has such tokens: what merging would make of these words is something else, or no merge makes them.
    longest = b"z" * 300
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"bc", b"abc", b"never", longest, b"ab" * 20]
    merges = [(98, 99), (97, 98), (256, 99)]
    for whole_words, expected in [(True, [258, 259, 260, 261]), (False, None)]:
        ours = make(tokens, merges, whole_words=whole_words)
        plainly = plain(tokens, merges, whole_words=whole_words)
        texts = ["abc", "never", longest.decode(), "ab" * 20]
        assert ours.encode_batch(texts) == slices(plainly.encode_array(texts))
        if expected:
            assert ours.encode_batch(texts) == [[number] for number in expected]
        else:
            assert ours.encode("abc") == [97, 257]
            assert ours.encode("never") == [*b"never"]
        assert ours.encode("abcabc") == plainly.encode("abcabc") == [97, 257, 97, 257]
        # The word table is emptied many times meanwhile; the exceptions stay.
        for number in range(300):
            text = f"w{number} abc\nnever x{number * 7919} abc"
            assert ours.encode(text) == plainly.encode(text)
        assert ours.encode("abc") == ([258] if whole_words else [97, 257])


# ---- pieces of a text


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "o200k"])
@pytest.mark.parametrize("piece", [64, 100, 256])
def test_seams_make_no_difference(monkeypatch: pytest.MonkeyPatch, prose: list[str], pattern: str, piece: int) -> None:
    expression = PATTERNS[pattern]
    texts = [*prose, "ab'llé\u0301 " * 300, "a/\n//\n" * 200, "x \n \n  y" * 200, "\u3000字 字\u0301'S" * 100]
    tokens, merges = learned(texts, 800, expression)
    expected = slices(make(tokens, merges, expression).encode_array(texts))
    monkeypatch.setattr(compiled, "PIECE", piece)
    assert slices(make(tokens, merges, expression).encode_array(texts)) == expected
    assert expected[:20] == slices(plain(tokens, merges, expression).encode_array(texts[:20]))


CUT_SHORT = ["क", "ª", "é", "ℂ", "𝒜", "字", "ก", "İ", "\u0301", "'", "😀", "‘", "\u3000", "\u00a0", "½", "٣", "ß"]


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "o200k"])
@pytest.mark.parametrize("character", CUT_SHORT, ids=lambda character: f"U+{ord(character):04X}")
def test_a_piece_that_ends_inside_a_character(monkeypatch: pytest.MonkeyPatch, pattern: str, character: str) -> None:
    # Its first bytes alone would be some other character, of another class.
    expression = PATTERNS[pattern]
    units = [character, "ab" + character, "\n" + character, character + "a" + character, " " + character]
    texts = ["x" * before + unit * 60 for unit in units for before in range(len(unit.encode()))]
    tokens, merges = learned([unit * 60 for unit in units], 150, expression)
    expected = [by_reference(tokens, merges, text, expression) for text in texts]
    monkeypatch.setattr(compiled, "PIECE", 64)
    assert make(tokens, merges, expression).encode_batch(texts) == expected


def test_a_piece_that_ends_inside_a_character_is_counted_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "PIECE", 64)
    texts = ["x" * before + unit * 60 for unit in ("abª", "क", "𝒜", "a é") for before in range(4)]
    expected = Counter(chunk for text in texts for chunk in Splitter(GPT2).split(text))
    counter = compiled.ChunkCounter(Splitter(GPT2), 1)
    counter.add(texts)
    chunks, ends, counts = counter.result()
    data = [chunks[start:end].tobytes().decode() for start, end in pairwise([0, *ends.tolist()])]
    assert dict(zip(data, counts.tolist(), strict=True)) == expected


@pytest.mark.parametrize("unit", ["a", "字", "क", "Éa", "1", " ", ".", "\n", "\u0301", "'s", "ab/"])
@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "o200k"])
def test_texts_without_a_seam(unit: str, pattern: str) -> None:
    tokens, merges = learned([unit * 64], 30, PATTERNS[pattern])
    ours, plainly = make(tokens, merges, PATTERNS[pattern]), plain(tokens, merges, PATTERNS[pattern])
    text = unit * (40_000 // len(unit))
    for changed in (text, text + " b", "b " + text):
        assert ours.encode(changed) == plainly.encode(changed)
    # What was enlarged for them is given back, or kept, but works on.
    assert ours.encode("ab 字 ") == plainly.encode("ab 字 ")


@pytest.mark.parametrize("unit", ["a", " ", "ab", "\n", "字"])
def test_a_megabyte_without_a_seam_takes_less_than_a_second(unit: str) -> None:
    tokens, merges = learned([unit * 4096], 60)
    ours = make(tokens, merges)
    ours.encode("to compile")
    text = unit * (1_000_000 // len(unit.encode()))
    started = time.perf_counter()
    ids = ours.encode(text)
    assert time.perf_counter() - started < 1  # about 0.1 s; a quadratic loop takes hours
    assert b"".join(tokens[number] for number in ids) == text.encode()
    assert len(ids) < 3_000


# ---- threads, and tables that fill up


@pytest.mark.parametrize("threads", [2, 3, 8, 500])
def test_threads_make_no_difference(monkeypatch: pytest.MonkeyPatch, prose: list[str], threads: int) -> None:
    tokens, merges = learned(prose, 500)
    ours = make(tokens, merges)
    texts = prose * 20
    assert sum(len(text.encode()) for text in texts) > 1_000_000
    ids, starts = ours.encode_array(texts, 1)
    monkeypatch.setattr(compiled, "PER_THREAD", 100)
    begun: list[int] = []
    work = compiled.CompiledEncoder._encode_part
    monkeypatch.setattr(
        compiled.CompiledEncoder, "_encode_part", lambda *args: begun.append(len(args[2])) or work(*args)
    )
    for collection in (texts, tuple(texts), iter(texts)):
        found, found_starts = ours.encode_array(collection, threads)
        assert np.array_equal(found, ids)
        assert np.array_equal(found_starts, starts)
    assert len(begun) >= 3 * threads
    assert sum(begun) == 3 * len(texts)
    assert ours.encode_batch(texts, threads) == slices((ids, starts))


def test_one_text_much_longer_than_the_others(monkeypatch: pytest.MonkeyPatch, prose: list[str]) -> None:
    tokens, merges = learned(prose, 500)
    ours = make(tokens, merges)
    texts = ["", "a b", " ".join(prose), "", "c", ""]
    expected = slices(ours.encode_array(texts, 1))
    monkeypatch.setattr(compiled, "PER_THREAD", 1)
    for threads in (2, 4, 7):
        assert slices(ours.encode_array(texts, threads)) == expected


@pytest.mark.parametrize("at_once", [1, 1_000, 100_000])
def test_more_text_than_one_buffer_holds(monkeypatch: pytest.MonkeyPatch, prose: list[str], at_once: int) -> None:
    tokens, merges = learned(prose, 500)
    ours = make(tokens, merges)
    expected = slices(ours.encode_array(prose))
    monkeypatch.setattr(compiled, "AT_ONCE", at_once)
    assert slices(ours.encode_array(prose)) == expected
    monkeypatch.setattr(compiled, "PER_THREAD", 100)
    assert slices(ours.encode_array(prose, 3)) == expected


def test_a_word_table_that_grows_and_forgets(cramped: None, monkeypatch: pytest.MonkeyPatch, prose: list[str]) -> None:
    done = {"grow": 0, "forget": 0}
    for name in done:
        function = getattr(compiled.Memory, name)

        def watched(memory: object, *given: int, name: str = name, function: Callable = function) -> None:
            done[name] += 1
            function(memory, *given)

        monkeypatch.setattr(compiled.Memory, name, watched)
    tokens, merges = learned(prose[:30], 300)
    ours, plainly = make(tokens, merges), plain(tokens, merges)
    expected = slices(plainly.encode_array(prose))
    assert slices(ours.encode_array(prose, 1)) == expected
    assert [ours.encode(text) for text in prose] == expected
    assert done["grow"] == 1
    assert done["forget"] > 100
    # With another pattern it is Python that cuts.
    before = dict(done)
    ours, plainly = make(tokens, merges, r"\S+|\s+"), plain(tokens, merges, r"\S+|\s+")
    assert slices(ours.encode_array(prose, 1)) == slices(plainly.encode_array(prose))
    assert done["forget"] > before["forget"]


def test_an_arena_that_is_full(monkeypatch: pytest.MonkeyPatch, prose: list[str]) -> None:
    # Nothing that needs the arena, long words and words of more than three tokens, can be kept then.
    tokens, merges = learned(prose[:5], 20)
    ours, plainly = make(tokens, merges), plain(tokens, merges)
    expected = slices(plainly.encode_array(prose))
    for memory in ours._encoder._idle:
        memory.fields[state.ARENA_SIZE] = 100
        memory.fields[state.ARENA_USED] = 50  # not so full that it would grow before the first piece
    assert slices(ours.encode_array(prose, 1)) == expected
    assert slices(ours.encode_array(prose, 1)) == expected


def test_words_longer_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LONGEST_KEPT", 20)
    tokens, merges = learned(["abcab" * 30], 40)
    ours, plainly = make(tokens, merges), plain(tokens, merges)
    text = " ".join("abcab"[: size % 5] * (size // 3) for size in range(200))
    for _ in range(2):
        assert ours.encode(text) == plainly.encode(text)


def test_calls_from_several_python_threads(prose: list[str]) -> None:
    tokens, merges = learned(prose, 500)
    ours = make(tokens, merges)
    expected = slices(plain(tokens, merges).encode_array(prose))

    def work(number: int) -> bool:
        order = [*range(len(prose))]
        Random(number).shuffle(order)
        one_by_one = all(ours.encode(prose[place]) == expected[place] for place in order)
        return one_by_one and ours.encode_batch([prose[place] for place in order]) == [expected[i] for i in order]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(40)))


# ---- what is given, and what comes back


@pytest.fixture(params=["compiled", "plain", "own pattern"])
def either(request: pytest.FixtureRequest, tokens_and_merges: tuple[list[bytes], Pairs]) -> BytePairEncoder:
    """An encoder of each kind."""
    if request.param == "plain":
        request.getfixturevalue("without_numba")
    ours = make(*tokens_and_merges, ANYTHING if request.param == "own pattern" else GPT2)
    assert isinstance(ours._encoder, PlainEncoder) == (request.param == "plain")
    return ours


def test_nothing_is_encoded_to_nothing(either: BytePairEncoder) -> None:
    assert either.encode("") == []
    assert either.encode_batch([]) == []
    assert either.encode_batch(["", "", "a", ""]) == [[], [], [97], []]
    ids, starts = either.encode_array([])
    assert (ids.tolist(), starts.tolist()) == ([], [0])
    ids, starts = either.encode_array(["", ""])
    assert (ids.tolist(), starts.tolist()) == ([], [0, 0, 0])
    assert (ids.dtype, starts.dtype) == (np.uint16, np.int64)
    assert either.spans("") == ([], [])


@pytest.mark.parametrize("text", ["\ud800", "ab \udfff", "x" * 40_000 + "\udc80", "\ud83d \ude00"])
def test_a_lone_surrogate_is_refused(either: BytePairEncoder, text: str) -> None:
    for call in (
        lambda: either.encode(text),
        lambda: either.encode_batch(["a", text, "b"]),
        lambda: either.encode_array([text]),
        lambda: either.spans(text),
    ):
        with pytest.raises(UnicodeEncodeError):
            call()
    assert either.encode_batch(["a", "b"]) == [[97], [98]]


@pytest.mark.parametrize("wrong", [b"bytes", None, 7, ["a"]])
def test_only_strings_are_text(either: BytePairEncoder, wrong: object) -> None:
    with pytest.raises(TypeError):
        either.encode(wrong)
    with pytest.raises(TypeError):
        either.encode_batch(["a", wrong])  # type: ignore[list-item]
    assert either.encode("a") == [97]


def test_kinds_of_strings(either: BytePairEncoder) -> None:
    class Named(str):
        pass

    for text in ("ab'll ", "é", "字字", "😀 😀", "a\x00b"):
        expected = either.encode(text)
        assert either.encode(Named(text)) == expected
        assert either.encode_batch([Named(text), text]) == [expected, expected]
        assert either.encode("".join(list(text))) == expected


def test_spans_end_where_tokens_end(either: BytePairEncoder, tokens_and_merges: tuple[list[bytes], Pairs]) -> None:
    tokens, _ = tokens_and_merges
    text = "ab'll  é字😀, ab"
    ids, ends = either.spans(text)
    assert ids == either.encode(text)
    assert [text.encode()[start:end] for start, end in pairwise([0, *ends])] == [tokens[number] for number in ids]


def test_ids_of_a_small_vocabulary_take_two_bytes() -> None:
    bytes_ = [bytes([byte]) for byte in range(256)]
    more = [first.to_bytes(2, "big") for first in range(1 << 16)]
    for size, dtype in [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)]:
        tokens = (bytes_ + more)[:size]
        ids, _ = make(tokens, None).encode_array(["ab"])
        assert ids.dtype == dtype
        assert ids.tolist() == [256 + (97 << 8 | 98)]


def test_every_byte_needs_a_token() -> None:
    tokens = [bytes([byte]) for byte in range(256) if byte != 200] + [b"ab"]
    with pytest.raises(GroundupError, match="byte 200 has no token"):
        make(tokens, [])


def test_ids_that_no_text_becomes() -> None:
    # A special token among the ids, and an id without a token: neither is an ordinary one.
    tokens = [bytes([byte]) for byte in range(256)] + [b"<s>", b"", b"ab"]
    ordinary = [*range(256), 258]
    assert BytePairEncoder(tokens, None, ANYTHING, ordinary).encode("<s>ab") == [*b"<s>", 258]


def test_nothing_that_was_encoded_is_held_on_to(small: Tokenizer) -> None:
    text = "".join(["a fresh string ", "é", str(time.time())])
    before = sys.getrefcount(text)
    for _ in range(50):
        small.encode(text)
        small.encode_batch([text, text])
    assert sys.getrefcount(text) == before


# ---- without Numba


def test_what_cannot_be_compiled_is_said_once_and_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], prose: list[str]
) -> None:
    usual = Tokenizer.train(prose, 400, show_progress=False)
    expected = usual.encode_batch(prose)
    encoder.compiled.cache_clear()
    for name in [name for name in sys.modules if name.startswith("groundup.tokenizer.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "groundup.tokenizer.compiled")
    monkeypatch.delattr("groundup.tokenizer.compiled")
    monkeypatch.setitem(sys.modules, "numba", None)  # importing it fails
    try:
        trained = Tokenizer.train(prose, 400, show_progress=False)
        assert encoder.compiled() is None
        assert trained.merges == usual.merges
        assert trained.encode_batch(prose) == expected
        assert [trained.encode(text) for text in prose[:20]] == expected[:20]
        Tokenizer(trained.vocabulary)
        captured = capsys.readouterr()
        notice = " ".join((captured.out + captured.err).split())
        assert notice.count("plain Python") == 1
        assert "Numba cannot be used" in notice
        assert "Traceback" not in notice
        assert captured.out == ""
    finally:
        encoder.compiled.cache_clear()


def test_a_compiler_that_fails_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("cannot cache: no locator available\nand much more\nthat nobody reads")

    monkeypatch.setattr(compiled, "check", fail)
    monkeypatch.setenv("COLUMNS", "500")
    encoder.compiled.cache_clear()
    try:
        assert encoder.compiled() is encoder.compiled() is None
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].endswith("Numba cannot be used: cannot cache: no locator available")
    finally:
        encoder.compiled.cache_clear()


def test_the_plain_way_can_be_asked_for(
    without_numba: None, capsys: pytest.CaptureFixture[str], small: Tokenizer
) -> None:
    text = "the cat sat on the mat, naïve 中文 👋🏽"
    again = Tokenizer(small.vocabulary)
    assert encoder.compiled() is None
    assert again.encode(text) == small.encode(text)
    assert capsys.readouterr().err == ""


def test_one_lookup_more_than_the_word_table_was_made_for() -> None:
    # Moving to a larger table finds every word again.
    memory = compiled.Memory(Splitter(GPT2), 16, 256)
    chunks = [b"w%d" % number for number in range(10)] + [b"a long word of more than fifteen bytes"]
    for number, chunk in enumerate(chunks):
        padded = np.frombuffer(chunk + bytes(16), np.uint8)
        assert words.remember(memory.address, padded.ctypes.data, len(chunk), number)
    memory.grow(4)
    assert memory.fields[state.USED] == len(chunks)
    memory.hold(state.ENDS, np.array([0, *np.cumsum([len(chunk) for chunk in chunks])], np.uint32))
    memory.fields[state.ENDS] += 4
    data = np.frombuffer(b"".join(chunks) + bytes(16), np.uint8)
    out = memory.array(state.IDS)
    end = words.encode_chunks(memory.address, data.ctypes.data, len(chunks), out.ctypes.data)
    assert out[: (end - out.ctypes.data) // 4].tolist() == list(range(len(chunks)))
