"""The compiled learner learns what the reference learns, on everything, and never for long."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groundup.tokenizer import bpe, bpe_reference
from groundup.tokenizer.alphabet import from_characters
from groundup.tokenizer.pretokenize import PATTERNS, Splitter

pytest.importorskip("numba", reason="the compiled learner needs Numba")

from groundup.tokenizer.kernels import learn as learning

BytesPair = tuple[bytes, bytes]

# Few different bytes make many ties, overlaps ("aaa") and merges of merges.
chunk_counts = st.dictionaries(
    st.text("aab \x00é", min_size=1, max_size=40).map(str.encode), st.integers(1, 5), min_size=1, max_size=8
)


def arrays(counts: Mapping[bytes, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chunk counts as :func:`learning.learn` takes them."""
    return (
        np.frombuffer(b"".join(counts), dtype=np.uint8),
        np.cumsum([len(chunk) for chunk in counts], dtype=np.int64),
        np.array(list(counts.values()), dtype=np.int64),
    )


def as_bytes(tokens: list[bytes], merges: Iterable[Iterable[int]]) -> list[BytesPair]:
    return [(tokens[left], tokens[right]) for left, right in merges]


def count_chunks(texts: Iterable[str], pattern: str) -> Counter[bytes]:
    splitter = Splitter(PATTERNS[pattern])
    return Counter(chunk.encode() for text in texts for chunk in splitter.split(text))


@pytest.fixture
def cramped(monkeypatch: pytest.MonkeyPatch) -> None:
    """No table has room to spare, and every merge is a slice of its own."""
    monkeypatch.setattr(learning, "LEAST_PAIRS", 1)
    monkeypatch.setattr(learning, "SLICE", 0)


# ---- parity


@settings(max_examples=200, deadline=None)
@given(chunk_counts, st.integers(0, 40), st.integers(1, 4))
def test_learning_equals_reference(counts: dict[bytes, int], more: int, min_frequency: int) -> None:
    expected_tokens, expected_merges = bpe_reference.train(counts, 256 + more, min_frequency)
    merges, tokens = learning.learn(*arrays(counts), 256 + more, min_frequency)
    assert as_bytes(tokens, merges) == expected_merges
    assert tokens == [bytes([byte]) for byte in range(256)] + expected_tokens[256:]
    assert merges.dtype == np.int32
    assert merges.shape == (len(expected_merges), 2)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=chunk_counts, reserved=st.sets(st.text("ab ", min_size=2, max_size=4).map(str.encode), max_size=3))
def test_without_room_to_spare_it_learns_the_same(
    cramped: None, counts: dict[bytes, int], reserved: set[bytes]
) -> None:
    expected_tokens, expected_merges = bpe.learn(counts, 300, 1, reserved)
    merges, tokens = learning.learn(*arrays(counts), 300, 1, reserved)
    assert tokens == expected_tokens
    assert list(map(tuple, merges.tolist())) == expected_merges


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=20, unique=True), st.randoms())
def test_any_bytes_in_any_order(chunks: list[bytes], random: object) -> None:
    counts = {chunk: 1 + number % 3 for number, chunk in enumerate(chunks)}
    _, expected = bpe_reference.train(counts, 270, 1)
    random.shuffle(chunks)  # type: ignore[attr-defined]
    merges, tokens = learning.learn(*arrays({chunk: counts[chunk] for chunk in chunks}), 270, 1)
    assert as_bytes(tokens, merges) == expected


@pytest.mark.parametrize("vocab_size", [4_000, 100_000])
def test_equals_plain_python_on_real_text(
    shakespeare: str, code: list[str], multilingual: list[str], vocab_size: int
) -> None:
    # Above 65,535 tokens an id takes four bytes: other machine code.
    counts = count_chunks([shakespeare, *code, *multilingual[:40]], "gpt4")
    expected_tokens, expected_merges = bpe.learn(counts, vocab_size)
    merges, tokens = learning.learn(*arrays(counts), vocab_size)
    assert len(merges) >= min(vocab_size - 256, 30_000)
    assert tokens == expected_tokens
    assert list(map(tuple, merges.tolist())) == expected_merges


def test_equals_plain_python_when_tables_fill_up(monkeypatch: pytest.MonkeyPatch) -> None:
    grown: list[tuple[bool, bool]] = []
    make_room = learning._make_room

    def watched(corpus: learning.Corpus, min_frequency: int) -> learning.Corpus:
        larger = make_room(corpus, min_frequency)
        grown.append((len(larger.pairs) > len(corpus.pairs), len(larger.places) > len(corpus.places)))
        return larger

    monkeypatch.setattr(learning, "LEAST_PAIRS", 1)
    monkeypatch.setattr(learning, "_make_room", watched)
    # Random letters make far more pairs than text does, and a run of one pair far longer lists.
    letters = np.random.default_rng(1).choice(list(b"abcdefghijklmnop"), (2_000, 12)).astype(np.uint8)
    for counts in ({word.tobytes(): 1 + number % 5 for number, word in enumerate(letters)}, {b"ab" * 20_000: 1}):
        expected_tokens, _ = bpe.learn(counts, 4_000, 1)
        assert learning.learn(*arrays(counts), 4_000, 1)[1] == expected_tokens
    assert any(pairs for pairs, _ in grown)
    assert any(places for _, places in grown)
    assert (False, False) in grown


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "o200k"])
def test_equals_hugging_face(shakespeare: str, multilingual: list[str], pattern: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    texts = [shakespeare[:300_000], *multilingual[:30]]
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERNS[pattern]), "isolated")
    to_letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    peer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, to_letters])
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=6_000, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    peer.train_from_iterator(texts, trainer)
    theirs = [tuple(map(from_characters, merge)) for merge in json.loads(peer.to_str())["model"]["merges"]]
    merges, tokens = learning.learn(*arrays(count_chunks(texts, pattern)), 6_000)
    assert len(theirs) == 6_000 - 256
    assert as_bytes(tokens, merges) == theirs


def replay(counts: Mapping[bytes, int], merges: Iterable[BytesPair]) -> Iterator[Counter[BytesPair]]:
    """How often every pair occurs before each of the merges."""
    words = {chunk: bpe_reference.split_bytes(chunk) for chunk in counts}
    for merge in merges:
        pairs: Counter[BytesPair] = Counter()
        for chunk, word in words.items():
            for pair in pairwise(word):
                pairs[pair] += counts[chunk]
        yield pairs
        for chunk, word in words.items():
            if merge[0] + merge[1] in chunk:
                words[chunk] = bpe_reference.merge_everywhere(word, merge)


def test_reproduces_the_reference_of_cs336_but_for_its_tie_rule(shared_data: Path) -> None:
    # Of pairs that occur equally often Stanford's CS336 merges the greatest, compared as bytes; we merge the oldest,
    # like Hugging Face. That explains every line of their file, and only ties change places in ours.
    folder = shared_data / "tokenizers" / "bpe_train_reference"
    lines = (folder / "train-bpe-reference-merges.txt").read_text(encoding="utf-8").splitlines()
    theirs = [(from_characters(left), from_characters(right)) for left, right in (line.split(" ") for line in lines)]
    counts = count_chunks([(folder / "corpus.en").read_text(encoding="utf-8")], "gpt2")
    merges, tokens = learning.learn(*arrays(counts), 256 + len(theirs))
    ours = as_bytes(tokens, merges)
    assert len(ours) == len(theirs) == 243

    for merge, pairs in zip(theirs, replay(counts, theirs), strict=True):
        assert merge == max(pairs, key=lambda pair: (pairs[pair], pair))
    for merge, pairs in zip(ours, replay(counts, ours), strict=True):
        assert pairs[merge] == max(pairs.values())
    assert ours != theirs
    assert len(set(ours) & set(theirs)) == 239  # the others are pairs that occur 69 or 70 times, the last ones


# ---- reserved tokens, progress, stopping


def test_reserved_bytes_never_become_a_token() -> None:
    counts = {b"user": 10, b"us": 5, b"ruse": 9}
    assert {b"user", b"ruse"} <= set(learning.learn(*arrays(counts), 300)[1])
    merges, tokens = learning.learn(*arrays(counts), 300, reserved={b"user"})
    assert b"user" not in tokens
    assert b"ruse" in tokens  # the same letters, which the first, quick test takes for the reserved ones
    assert (tokens, list(map(tuple, merges.tolist()))) == bpe.learn(counts, 300, reserved={b"user"})


def test_progress_is_told_and_an_interrupt_stops(cramped: None, shakespeare: str) -> None:
    counts = arrays(count_chunks([shakespeare[:50_000]], "gpt4"))
    told: list[int] = []
    merges, _ = learning.learn(*counts, 400, on_merge=told.append)
    assert len(merges) == 400 - 256
    assert sorted(set(told)) == list(range(min(told), 401))
    assert told == sorted(told)

    def interrupt(size: int) -> None:
        if size > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learning.learn(*counts, 400, on_merge=interrupt)


# ---- the edges


@pytest.mark.parametrize("counts", [{}, {b"a": 5, b"b": 7}, {b"ab": 1, b"bc": 1}, {b"": 3}])
def test_nothing_to_learn(counts: dict[bytes, int]) -> None:
    merges, tokens = learning.learn(*arrays(counts), 1_000_000)
    assert merges.shape == (0, 2)
    assert tokens == [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize("vocab_size", [256, 257, 258])
def test_smallest_vocabularies(vocab_size: int) -> None:
    merges, tokens = learning.learn(*arrays({b"hello": 2}), vocab_size)
    assert len(tokens) == vocab_size
    assert len(merges) == vocab_size - 256


def test_counts_beyond_32_bits() -> None:
    # Modulo 2 ** 32 the first two would count next to nothing.
    counts = {b"low": 2**33 + 1, b"lower": 2**40 + 2, b"newest": 6, b"widest": 2**31}
    merges, tokens = learning.learn(*arrays(counts), 270)
    assert as_bytes(tokens, merges) == bpe_reference.train(counts, 270)[1]
    assert tokens[256:258] == [b"lo", b"low"]


@pytest.mark.parametrize("text", [b"a" * 100_001, b"ab" * 50_000, b"aab" * 33_333, b"abcdefghij" * 10_000])
def test_one_long_chunk_equals_plain_python(text: bytes) -> None:
    expected_tokens, _ = bpe.learn({text: 1, b"aab": 2}, 300)
    assert learning.learn(*arrays({text: 1, b"aab": 2}), 300)[1] == expected_tokens


def test_a_long_chunk_is_not_quadratic() -> None:
    random = np.random.default_rng(1)
    hostile = {
        "one letter": b"a" * (1 << 20),
        "random letters": random.integers(97, 101, 1 << 20, dtype=np.uint8).tobytes(),
    }
    learning.learn(*arrays({b"compile": 2}), 300)
    for name, text in hostile.items():
        started = time.perf_counter()
        merges, tokens = learning.learn(*arrays({text: 1}), 20_000)
        assert time.perf_counter() - started < 20, name  # about 1 s; a quadratic loop takes hours
        if name == "one letter":
            assert tokens[256:] == [b"a" * (2 << power) for power in range(19)]
        else:
            assert len(merges) > 15_000
