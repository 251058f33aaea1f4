"""A tokenizer shown to a person: its vocabulary as text, and how far it compresses a text."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from groundup.tokenizer.tokenizer import Tokenizer

BATCH = 2_000_000  # characters that are encoded at a time
LOOKED_AT = 4000  # characters of a document that tell its script


def escaped(token: bytes) -> str:
    r"""Bytes as one line of text from which they can be told: ``\n`` or ``\u200b`` where not printable.

    ``\x80`` to ``\xff`` are bytes that are not UTF-8; the characters of these numbers are ``\u0080`` to
    ``\u00ff``.
    """
    text = token.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else _escaped_character(c) for c in text)


def _escaped_character(character: str) -> str:
    if 0x80 <= ord(character) <= 0xFF:
        return f"\\u{ord(character):04x}"
    return character.encode("unicode_escape").decode()


def vocabulary_dump(tok: Tokenizer) -> str:
    """The vocabulary, one token per line: id, bytes in quotes, the two tokens it was first merged from."""
    parents: dict[bytes, tuple[int, int]] = {}
    for left, right in tok.merges:
        parents.setdefault(tok.token_bytes(left) + tok.token_bytes(right), (left, right))
    special_ids = set(tok.special_tokens.values())
    lines = []
    for number, token in enumerate(tok.vocabulary.tokens):
        line = f'{number:>6}  "{escaped(token)}"'
        if not token:
            line = f"{number:>6}  out of use"
        elif number in special_ids:
            line += "  special"
        elif token in parents:
            left, right = parents[token]
            line += f'  = {left} "{escaped(tok.token_bytes(left))}" + {right} "{escaped(tok.token_bytes(right))}"'
        lines.append(line + "\n")
    return "".join(lines)


# ---- how far it compresses


@dataclass
class Compression:
    """What texts come to as tokens.

    Args:
        documents: how many texts.
        bytes: in UTF-8.
        characters: Unicode code points.
        words: between white space.
        tokens: how many the tokenizer makes of them.
    """

    documents: int = 0
    bytes: int = 0
    characters: int = 0
    words: int = 0
    tokens: int = 0

    def add(self, text: str, tokens: int) -> None:
        """Count one more text, which became so many tokens."""
        self.documents += 1
        self.bytes += len(text) if text.isascii() else len(text.encode())
        self.characters += len(text)
        self.words += len(text.split())
        self.tokens += tokens

    @property
    def bytes_per_token(self) -> float:
        """Higher is tighter; 0 where there is no token."""
        return self.bytes / self.tokens if self.tokens else 0.0

    @property
    def tokens_per_word(self) -> float:
        """Fertility; 0 where there is no word."""
        return self.tokens / self.words if self.words else 0.0

    @property
    def tokens_per_character(self) -> float:
        """What is left of fertility in scripts that put no space between words; 0 where there is no character."""
        return self.tokens / self.characters if self.characters else 0.0


def compression(tok: Tokenizer, text: str) -> dict[str, float]:
    """How far the tokenizer compresses a text.

    Returns:
        The counts ``bytes`` (UTF-8), ``words`` (between white space), ``characters`` and ``tokens``;
        ``bytes_per_token``, higher is tighter; ``tokens_per_word``, also called fertility. A ratio over
        nothing is 0.

    Raises:
        GroundupError: the text holds a lone surrogate.
    """
    found = Compression()
    found.add(text, len(tok.encode(text)))
    figures = asdict(found) | {"bytes_per_token": found.bytes_per_token, "tokens_per_word": found.tokens_per_word}
    del figures["documents"]
    return figures


@dataclass
class Survey:
    """What a tokenizer makes of a body of text.

    Args:
        occurrences: for each token id, how often it occurs.
        total: all texts together.
        groups: the same by language, script, or whatever else the texts were grouped by; the largest first.
    """

    occurrences: np.ndarray
    total: Compression = field(default_factory=Compression)
    groups: dict[str, Compression] = field(default_factory=dict)


def survey(tok: Tokenizer, documents: Iterable[tuple[str, str]]) -> Survey:
    """Encode texts and count what they become. They are read once and not kept, however many there are.

    Args:
        tok: any tokenizer.
        documents: pairs of a group (such as a language) and a text.

    Raises:
        GroundupError: a text holds a lone surrogate.
    """
    found = Survey(np.zeros(tok.vocab_size, dtype=np.int64))
    for batch in _batches(documents):
        ids, offsets = tok.encode_array([text for _, text in batch])
        found.occurrences += np.bincount(ids, minlength=tok.vocab_size)
        for (group, text), tokens in zip(batch, np.diff(offsets).tolist(), strict=True):
            found.total.add(text, tokens)
            found.groups.setdefault(group, Compression()).add(text, tokens)
    found.groups = dict(sorted(found.groups.items(), key=lambda item: -item[1].bytes))
    return found


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def longest_tokens(tok: Tokenizer, count: int) -> list[int]:
    """The ids of the tokens with the most bytes, special ones left out; the longest first."""
    tokens = tok.vocabulary.tokens
    return sorted(_ordinary_ids(tok), key=lambda number: (-len(tokens[number]), number))[:count]


def rarest_tokens(tok: Tokenizer, occurrences: np.ndarray, count: int) -> list[int]:
    """The ids of the tokens that occur least often but do occur; of equally rare ones the longest first."""
    seen = np.flatnonzero(occurrences)
    few = np.sort(occurrences[seen])[min(count, len(seen)) - 1] if len(seen) else 0
    rare = seen[occurrences[seen] <= few].tolist()
    return sorted(rare, key=lambda number: (occurrences[number], -len(tok.vocabulary.tokens[number]), number))[:count]


def unused_tokens(tok: Tokenizer, occurrences: np.ndarray) -> int:
    """How many tokens of the vocabulary never occur, special ones left out."""
    return int((occurrences[_ordinary_ids(tok)] == 0).sum())


def _ordinary_ids(tok: Tokenizer) -> list[int]:
    special_ids = set(tok.special_tokens.values())
    return [number for number, token in enumerate(tok.vocabulary.tokens) if token and number not in special_ids]


# ---- which script a text is in


def main_script(text: str) -> str:
    """The script of most letters at the beginning of a text: "Latin", "Cyrillic", "Han", "Japanese", …; "" without one.

    Python's Unicode tables do not hold scripts; the names of letters begin with them.
    """
    letters = Counter(filter(None, map(_script_of, text[:LOOKED_AT])))
    if not letters:
        return ""
    script = letters.most_common(1)[0][0]
    kana = letters["Hiragana"] + letters["Katakana"]
    if script in ("Han", "Hiragana", "Katakana") and 10 * kana > letters["Han"]:
        return "Japanese"
    return script


_KIND_OF_LETTER = re.compile(" (SMALL|CAPITAL|LETTER|SYLLABLE|SYLLABICS|CHARACTER|VOWEL|IDEOGRAPH)\\b")


@lru_cache(maxsize=1 << 16)
def _script_of(character: str) -> str:
    if not character.isalpha():
        return ""
    name = unicodedata.name(character, "")
    if name.startswith("CJK"):
        return "Han"
    script, kind, *_ = (*_KIND_OF_LETTER.split(name, maxsplit=1), "")
    # "MATHEMATICAL BOLD", "MODIFIER" and the like are letters of no script of their own.
    return script.title() if kind and not re.match("MATHEMATICAL|MODIFIER|DOUBLE-STRUCK", script) else ""
