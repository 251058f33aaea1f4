"""Special and added tokens are found in text, and text is normalized, before any algorithm sees it.

The order is that of Hugging Face ``tokenizers``: first the tokens that are looked for in the text as it is, then what
lies between them is brought to its Unicode normal form, then the tokens that are looked for in normalized text.
Of tokens that begin at the same place the longest is found.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import regex

from groundup.tokenizer.vocabulary import Normalization, Vocabulary

_SPACE = regex.compile(r"\s")
_WORD = regex.compile(r"\w")


class Piece(NamedTuple):
    """A part of a text: a token that was found there, or text for the algorithm."""

    content: int | str
    """The token's id, or the (normalized) text."""
    spans: list[tuple[int, int]] | None
    """For each character of a text, or for the token: where it lies in the text as given; None when not asked for."""


class AddedTokens:
    """Cuts text at its special and added tokens, and normalizes what lies between."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ids = {**vocabulary.added_tokens, **vocabulary.special_tokens}
        self._always = frozenset(vocabulary.added_tokens)
        self._rules = vocabulary.token_rules
        self._form = vocabulary.normalization
        self._prefix_space = vocabulary.prefix_space
        self._finders: dict[frozenset[str], tuple[_Finder, _Finder]] = {}
        self.idle = not (self._always or self._form or self._prefix_space)
        """Nothing is to be done unless special tokens are asked for."""

    def cut(self, text: str, allowed: Collection[str], locate: bool = False, continued: bool = False) -> list[Piece]:
        """The pieces of a text, in order; none of them is empty text.

        Args:
            text: any text.
            allowed: the names of the special tokens to be found.
            locate: whether to say where each piece lies.
            continued: whether the text goes on from another, so that no space is put before it.
        """
        raw, normalized = self._finders_for(frozenset(allowed))
        pieces: list[Piece] = []
        for start, end, token in raw.find(text):
            if token is not None:
                pieces.append(Piece(token, [(start, end)] if locate else None))
                continue
            stretch, spans = self._normalize(text[start:end], start, locate)
            for begin, stop, inner in normalized.find(stretch):
                if inner is not None:
                    pieces.append(Piece(inner, [_joined(spans[begin:stop])] if spans else None))
                    continue
                part, where = stretch[begin:stop], spans[begin:stop] if spans else None
                if self._prefix_space and part[0] != " " and not (continued and not pieces):
                    part, where = " " + part, [where[0], *where] if where else None
                pieces.append(Piece(part, where))
        return pieces

    def _finders_for(self, allowed: frozenset[str]) -> tuple[_Finder, _Finder]:
        if allowed not in self._finders:
            names = self._always | allowed
            late = {name for name in names if "normalized" in self._rules.get(name, ())}
            written = {unicodedata.normalize(self._form, name) if self._form else name: name for name in late}
            self._finders[allowed] = (
                _Finder({name: name for name in names - late}, self._ids, self._rules),
                _Finder(written, self._ids, self._rules),
            )
        return self._finders[allowed]

    def _normalize(self, text: str, start: int, locate: bool) -> tuple[str, list[tuple[int, int]] | None]:
        if self._form is None or unicodedata.is_normalized(self._form, text):
            return text, [(place, place + 1) for place in range(start, start + len(text))] if locate else None
        if not locate:
            return unicodedata.normalize(self._form, text), None
        normalized, sources = normalize_with_sources(text, self._form)
        return normalized, [(start + source, start + source + 1) for source in sources]


def _joined(spans: list[tuple[int, int]]) -> tuple[int, int]:
    return min(span[0] for span in spans), max(span[1] for span in spans)


class _Finder:
    """Finds tokens by name.

    Args:
        names: what to look for, and the name of the token that it stands for.
        ids: the token ids by name.
        rules: see :attr:`Vocabulary.token_rules`.
    """

    def __init__(self, names: Mapping[str, str], ids: Mapping[str, int], rules: Mapping[str, Collection[str]]) -> None:
        self._ids = {written: ids[name] for written, name in names.items()}
        self._rules = {written: rules[name] for written, name in names.items() if rules.get(name)}
        # The longest name first, so that <|end|> cannot hide <|end|>x.
        longest_first = sorted(filter(None, names), key=len, reverse=True)
        self._expression = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def find(self, text: str) -> Iterable[tuple[int, int, int | None]]:
        """Start, end and token id of each part; None for the text between tokens."""
        if self._expression is None:
            return [(0, len(text), None)] if text else []
        return self._find(text, self._expression)

    def _find(self, text: str, expression: re.Pattern[str]) -> Iterator[tuple[int, int, int | None]]:
        done = 0
        for match in expression.finditer(text):
            start, end = match.span()
            if rules := self._rules.get(match[0]):
                if "single_word" in rules and _beside_a_word(text, start, end):
                    continue
                if "lstrip" in rules:
                    while start > done and _SPACE.match(text, start - 1):
                        start -= 1
                if "rstrip" in rules:
                    while end < len(text) and _SPACE.match(text, end):
                        end += 1
            if done < start:
                yield done, start, None
            yield start, end, self._ids[match[0]]
            done = end
        if done < len(text):
            yield done, len(text), None


def _beside_a_word(text: str, start: int, end: int) -> bool:
    return bool((start > 0 and _WORD.match(text, start - 1)) or (end < len(text) and _WORD.match(text, end)))


def normalize_with_sources(text: str, form: Normalization) -> tuple[str, list[int]]:
    """A text in a Unicode normal form, and for each of its characters the place of the one that it came from.

    A character that was composed of several comes from the first of them.

    Source: Unicode Standard Annex 15.
    """
    apart: Normalization = "NFD" if form in ("NFC", "NFD") else "NFKD"
    ordered: deque[tuple[str, int]] = deque()
    marks: list[tuple[str, int]] = []  # that follow one another: sorted by class, those of one class stay in order
    for place, character in enumerate(text):
        for part in unicodedata.normalize(apart, character):
            if unicodedata.combining(part):
                marks.append((part, place))
                continue
            ordered.extend(sorted(marks, key=_mark_class))
            marks.clear()
            ordered.append((part, place))
    ordered.extend(sorted(marks, key=_mark_class))
    normalized = unicodedata.normalize(form, text)
    if form == apart:
        return normalized, [place for _, place in ordered]
    sources = []
    for character in normalized:
        sources.append(ordered.popleft()[1])
        for other in unicodedata.normalize("NFD", character)[1:]:
            # The next such mark was composed; one that could not be stays before it.
            del ordered[next(number for number, (part, _) in enumerate(ordered) if part == other)]
    return normalized, sources


def _mark_class(part: tuple[str, int]) -> int:
    return unicodedata.combining(part[0])
