"""How text is cut into chunks before any byte is merged.

Chunks are words with their leading space, runs of digits, of punctuation, of white space. A pattern is a
regular expression; each of its matches is a chunk, and so is each stretch between two matches, so that chunks
joined always give the text back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import regex

from groundup.runtime.errors import GroundupError, UsageError, nearest

# The strings are those that published tokenizer.json files hold, so that other tools recognise them.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"gpt2": _GPT2, "gpt4": _CL100K, "cl100k": _CL100K, "o200k": _O200K}
"""The patterns that have a name."""


class Shape(NamedTuple):
    """One of the patterns that kernels/cut.py has written out, and its variant."""

    kind: int
    """0 is GPT-2's, 1 GPT-4's, 2 GPT-4o's: the numbers that kernels/cut.py uses."""
    digits: int = 3
    """How many digits are a chunk; GPT-4's pattern only."""
    all_at_end: bool = False
    """White space at the end of the text is one chunk, newlines or not; GPT-4's pattern only."""


CL100K_TIKTOKEN = _CL100K.replace(r"|\s*[\r\n]+", r"|\s+(?![\s\S])|\s*[\r\n]+")
"""GPT-4's pattern as tiktoken has it since 0.6: it differs in white space at the end of the text."""
TIKTOKEN_SPELLINGS = {
    _GPT2: r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    CL100K_TIKTOKEN: (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
}
"""The same as tiktoken writes them, with possessive quantifiers, which are faster there."""
_QWEN2 = _CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
_SHAPES = {
    _GPT2: Shape(0),
    TIKTOKEN_SPELLINGS[_GPT2]: Shape(0),
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": Shape(0),
    _CL100K: Shape(1),
    CL100K_TIKTOKEN: Shape(1, all_at_end=True),
    TIKTOKEN_SPELLINGS[CL100K_TIKTOKEN]: Shape(1, all_at_end=True),
    _QWEN2: Shape(1, digits=1),
    _O200K: Shape(2),
}

PATIENCE = 10.0  # seconds, and one more for every so many characters; sensible patterns take a fiftieth of that
CHARACTERS_PER_SECOND = 50_000
LONG_TEXT = 4_000_000  # characters; longer texts are cut lazily: a list of chunks weighs 20 times the text


def pattern_regex(pattern: str) -> str:
    """The regular expression behind a pattern's name; what is not a bare word is taken as one itself.

    Raises:
        UsageError: a bare word that names no pattern.
    """
    if pattern in PATTERNS:
        return PATTERNS[pattern]
    if regex.fullmatch(r"[\w-]*", pattern):
        raise UsageError(
            f"unknown pattern '{pattern}'. Known: {', '.join(PATTERNS)}, or a regular expression."
            f"{nearest(pattern, PATTERNS)}"
        )
    return pattern


def _patience(text: str) -> float:
    """Seconds after which cutting a text is given up."""
    return PATIENCE + len(text) / CHARACTERS_PER_SECOND


class Splitter:
    """Cuts text into chunks by one regular expression (the ``regex`` library's dialect).

    Raises:
        UsageError: the expression does not compile.
    """

    def __init__(self, expression: str) -> None:
        try:
            self._compiled = regex.compile(expression)
        except regex.error as error:
            raise UsageError(
                f"the pattern '{expression}' does not compile: {error}. Known by name: {', '.join(PATTERNS)}."
            ) from error
        self.shape = _SHAPES.get(expression)
        """Which of the patterns that are written out it is; None for any other."""

    def split(self, text: str) -> Iterable[str]:
        """The chunks of ``text``, in order; joined they are ``text``.

        An expression that can match nothing may add empty chunks.

        Raises:
            GroundupError: it takes far longer than any sensible expression.
        """
        if self._compiled.groups == 0 and len(text) <= LONG_TEXT:
            try:
                chunks: list[str] = self._compiled.findall(text, timeout=_patience(text))
            except TimeoutError:
                raise self._too_slow(text) from None
            # findall is three times as fast as matching one by one, but leaves out what lies between matches.
            if sum(map(len, chunks)) == len(text):
                return chunks
        return self._matches_and_gaps(text)

    def _too_slow(self, text: str) -> GroundupError:
        return GroundupError(
            f"the pattern '{self._compiled.pattern}' cannot cut a text of {len(text):,} characters within "
            f"{_patience(text):.0f} seconds: it probably backtracks without end. Give it possessive quantifiers, "
            "such as a++, or a simpler form."
        )

    def _matches_and_gaps(self, text: str) -> Iterator[str]:
        matches = self._compiled.finditer(text, timeout=_patience(text))
        done = 0
        while True:
            try:
                match = next(matches, None)
            except TimeoutError:
                raise self._too_slow(text) from None
            if match is None:
                break
            start, end = match.span()
            if start > done:
                yield text[done:start]
            if end > start:
                yield text[start:end]
            done = end
        if done < len(text):
            yield text[done:]
