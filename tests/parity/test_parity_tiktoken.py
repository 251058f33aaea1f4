"""Ids are tiktoken's, for OpenAI's vocabularies, on everything; merges are rustbpe's, but for one rule about ties."""

from __future__ import annotations

import gzip
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.runtime.errors import GroundupError
from groundup.tokenizer import Tokenizer
from groundup.tokenizer.alphabet import ALPHABET_ORDER
from groundup.tokenizer.pretokenize import PATTERNS, Splitter
from groundup.tokenizer.unicode_classes import class_bits

pytest.importorskip("tiktoken", reason="the peer is tiktoken")

import tiktoken
from tiktoken_ext import openai_public

NAMES = ["r50k_base", "p50k_base", "cl100k_base", "o200k_base"]
AT_ONCE = 4_000_000  # characters of text whose ids are compared at once: tiktoken's are lists of objects


@dataclass
class Both:
    """The same vocabulary in both libraries."""

    ours: Tokenizer
    theirs: Any

    def same(self, texts: list[str]) -> None:
        """See that all texts get the same ids."""
        ids, starts = self.ours.encode_array(texts)
        expected = self.theirs.encode_ordinary_batch(texts, num_threads=2)
        flat = np.fromiter((number for numbers in expected for number in numbers), np.int64)
        if np.array_equal(ids, flat) and np.array_equal(np.diff(starts), [*map(len, expected)]):
            return
        for text, start, end, numbers in zip(texts, starts, starts[1:], expected, strict=False):
            assert ids[start:end].tolist() == numbers, text[:1000]
        raise AssertionError("texts are the same one by one, but not where they begin")


@pytest.fixture(scope="module", params=NAMES)
def both(request: pytest.FixtureRequest, shared_data: Path) -> Both:
    """Each vocabulary once: ours from the file, tiktoken's from the same one, so that it fetches none."""
    file = shared_data / "tokenizers" / f"{request.param}.tiktoken"
    ours = Tokenizer.load(file)
    ranks = tiktoken.load.load_tiktoken_bpe(str(file))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks)
        theirs = tiktoken.Encoding(**getattr(openai_public, request.param)())
    assert ours.special_tokens == theirs._special_tokens
    assert ours.vocab_size == theirs.n_vocab
    return Both(ours, theirs)


def strings_of(value: Any) -> Iterator[str]:
    """All strings of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from strings_of(part)
    elif isinstance(value, list):
        for part in value:
            yield from strings_of(part)


def texts_of(file: Path) -> Iterator[str]:
    """Every text of a file, whatever else it holds included."""
    if file.name.endswith((".jsonl", ".jsonl.gz")):
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")
        for line in filter(None, text.split("\n")):
            yield from strings_of(json.loads(line))
    else:
        text = file.read_text(encoding="utf-8")
        yield text
        if file.suffix == ".json":
            yield from strings_of(json.loads(text))


def batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size > AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---- ids


@pytest.mark.slow
def test_all_texts_for_pretraining(both: Both, shared_data: Path) -> None:
    files = [file for file in sorted((shared_data / "pretrain").rglob("*")) if file.is_file()]
    assert len(files) > 10
    seen = 0
    for file in files:
        for batch in batches(texts_of(file)):
            both.same(batch)
            seen += sum(map(len, batch))
    assert seen > 40_000_000


def test_some_of_every_language_and_as_one_text(both: Both, shared_data: Path) -> None:
    texts = list(texts_of(shared_data / "pretrain" / "multilingual" / "udhr_all_languages.jsonl.gz"))
    both.same([text[:800] for text in texts])
    # Texts of many pieces, without a space: pieces end inside words and characters.
    scripts = ["".join(text.split()) for text in texts if len(text.encode()) > 2 * len(text)]
    assert len(scripts) > 50
    longer = ["".join(scripts[first : first + 4]) for first in range(0, len(scripts), 4)]
    both.same(["x" * before + text for text in longer for before in range(3)])
    for text in texts[::40]:
        assert both.ours.encode(text[:2_000]) == both.theirs.encode_ordinary(text[:2_000])


def code_points(step: int) -> Iterator[str]:
    return (chr(point) for point in range(0, 0x110000, step) if not 0xD800 <= point < 0xE000)


def beside_others(character: str) -> str:
    """A character after and before each kind of neighbour."""
    neighbours = ("a", "A", "1", " ", "\n", "'", ".", "é", "字", "\u0301", "'s", "\r\n", "/")
    return "".join(f"{neighbour}{character}" for neighbour in neighbours) + "'" + character


def test_code_points_of_each_block(both: Both) -> None:
    both.same(list(code_points(37)))
    both.same([beside_others(character) for character in code_points(211)])


@pytest.mark.slow
def test_every_code_point(both: Both) -> None:
    everything = list(code_points(1))
    assert len(everything) == 0x110000 - 0x800
    for first in range(0, len(everything), 1 << 18):
        both.same(everything[first : first + (1 << 18)])
    # Beside others: all that have a class, and some of the many that have none.
    classes = class_bits()
    some = [
        character
        for place, character in enumerate(everything)
        if classes[ord(character)] or place % 50 == 0 or unicodedata.category(character) not in ("Cn", "Co")
    ]
    assert len(some) > 140_000
    both.same(["x".join(map(beside_others, some[start : start + 16])) for start in range(0, len(some), 16)])


def representatives() -> list[str]:
    """The first and a middle character of every general category, and those that have a rule of their own."""
    members: dict[str, list[str]] = defaultdict(list)
    for character in code_points(1):
        members[unicodedata.category(character)].append(character)
    del members["Co"][1:], members["Cn"][1:]
    found = {group[place] for group in members.values() for place in (0, len(group) // 2)}
    return sorted(found | set("'sStTrReElLvVmMdD \t\n\r/\u00a0\u0085\u2028\u3000ſKİıßǅªʰ\x1c.1Ⅷ字\u200d"))


def test_pairs_and_triples_across_categories(both: Both) -> None:
    characters = representatives()
    assert {unicodedata.category(character) for character in characters} >= {"Lt", "Lm", "Mc", "Nl", "Zl", "Cf", "Sk"}
    both.same(["".join(pair) for pair in product(characters, repeat=2)])
    both.same([f"{one}{middle}{other}" for one, middle, other in product(characters, "'\n ", characters)])
    ends = [("'", "\n"), ("\n", " "), (" ", "'")]
    both.same([f"{first}{one}{other}{last}" for one, other, (first, last) in product(characters, characters, ends)])


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.one_of(st.text(), st.text("aAé\u0301字 \n\r\t'sSlL1/.\u3000😀", max_size=80)), max_size=30))
def test_made_up_texts(both: Both, texts: list[str]) -> None:
    both.same(texts)
    for text in texts[:3]:
        assert both.ours.encode(text) == both.theirs.encode_ordinary(text)


def test_white_space_everywhere(both: Both) -> None:
    # The patterns differ most in white space, and in white space at the end of the text most of all.
    spaces = ["".join(letters) for size in range(6) for letters in product(" \n\r\u3000", repeat=size)]
    both.same([f"{before}{space}{after}" for space in spaces for before, after in product(("", "a", "."), ("", "b"))])


def test_long_runs(both: Both) -> None:
    units = ["a", " ", "\n", "字", "क", "1", ".", "'", "ab", "\u0301", "'s", "😀", "A", "aB"]
    both.same([unit * size for unit in units for size in (15, 16, 17, 48, 49, 63, 64, 65, 300, 499, 501, 9_000)])


# ---- bytes back


def test_decoding_any_ids(both: Both) -> None:
    # Most of these are no UTF-8: tiktoken writes U+FFFD for what cannot be read.
    random = Random(1)
    known = [number for number, token in enumerate(both.ours.vocabulary.tokens) if token]
    pieces = [number for number in known if len(both.ours.token_bytes(number)) == 1]
    assert len(pieces) == 256
    for _ in range(3_000):
        ids = random.choices(random.choice((known, pieces)), k=random.randint(0, 12))
        assert both.ours.decode_bytes(ids) == both.theirs.decode_bytes(ids)
        assert both.ours.decode(ids) == both.theirs.decode(ids)
    everything = known[:: max(1, len(known) // 20_000)]
    assert both.ours.decode(everything) == both.theirs.decode(everything)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=200))
def test_text_comes_back(both: Both, text: str) -> None:
    assert both.ours.decode(both.ours.encode(text)) == text


# ---- special tokens


def test_special_tokens(both: Both) -> None:
    names = sorted(both.ours.special_tokens)
    random = Random(2)
    assert both.ours.encode("<|endoftext|>") == both.theirs.encode("<|endoftext|>", disallowed_special=())
    for _ in range(500):
        parts = random.choices(
            [*names, "some text", " ", "\n", "<|", "|>", "'s", "<|endof", "é"], k=random.randint(1, 9)
        )
        text = "".join(parts)
        allowed = set(random.sample(names, random.randint(0, len(names))))
        ours = both.ours.encode(text, allow_special=allowed)
        assert ours == both.theirs.encode(text, allowed_special=allowed, disallowed_special=())
        assert both.ours.encode(text, allow_special="all") == both.theirs.encode(text, allowed_special="all")
        assert both.ours.encode_batch([text], allow_special=allowed) == [ours]
    with pytest.raises(GroundupError):
        both.ours.decode([both.ours.vocab_size])


# ---- training


def replay(counts: Counter[bytes], merges: list[tuple[int, int]]) -> Iterator[Counter[tuple[int, int]]]:
    """How often each pair of ids occurs before each merge; merge number k makes the id 256 + k."""
    words = {chunk: list(chunk) for chunk in counts}
    for number, merge in enumerate(merges, start=256):
        pairs: Counter[tuple[int, int]] = Counter()
        for chunk, word in words.items():
            for pair in pairwise(word):
                pairs[pair] += counts[chunk]
        yield pairs
        for word in words.values():
            place = 0
            while place < len(word) - 1:
                if (word[place], word[place + 1]) == merge:
                    word[place : place + 2] = [number]
                place += 1


def as_merges(tokens: list[bytes]) -> list[tuple[int, int]]:
    """The merges behind tokens whose ids are ranks."""
    from groundup.tokenizer.encoder import recover_merges

    return recover_merges(tokens, range(len(tokens)))


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_merges_are_rustbpes_but_for_its_tie_rule(shared_data: Path, pattern: str) -> None:
    # Both merge the pair that occurs most often and, of several, the one whose tokens are the oldest. Only what age
    # single bytes have is not the same: rustbpe orders them by their value, we, like Hugging Face, by the letters that
    # stand for them in tokenizer.json.
    rustbpe = pytest.importorskip("rustbpe", reason="the peer is rustbpe")
    texts = list(texts_of(shared_data / "pretrain" / "multilingual" / "udhr_all_languages.jsonl.gz"))[:20]
    texts.append((shared_data / "pretrain" / "the-verdict.txt").read_text(encoding="utf-8"))
    peer = rustbpe.Tokenizer()
    peer.train_from_iterator(iter(texts), 256 + 200, pattern=PATTERNS[pattern])
    theirs = as_merges([token for token, _ in sorted(peer.get_mergeable_ranks(), key=lambda item: item[1])])
    tokenizer = Tokenizer.train(
        texts, 256 + 200, pattern=PATTERNS[pattern], special_tokens=(), show_progress=False, min_frequency=1
    )
    ours = list(tokenizer.merges)
    assert len(ours) == len(theirs) == 200
    counts = Counter(chunk.encode() for text in texts for chunk in Splitter(PATTERNS[pattern]).split(text))
    age_of_byte = {byte: age for age, byte in enumerate(ALPHABET_ORDER)}
    ties = 0
    for merge, pairs in zip(theirs, replay(counts, theirs), strict=True):
        assert merge == min(pairs, key=lambda pair: (-pairs[pair], pair))
        ties += [*pairs.values()].count(pairs[merge]) > 1
    for merge, pairs in zip(ours, replay(counts, ours), strict=True):
        ages = {pair: tuple(age_of_byte.get(number, number) for number in pair) for pair in pairs}
        assert merge == min(pairs, key=lambda pair: (-pairs[pair], ages[pair]))
    assert ties > 20
