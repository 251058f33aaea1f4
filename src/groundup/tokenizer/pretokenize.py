"""How text is cut into chunks before any byte is merged.

Chunks are words with their leading space, runs of digits, of punctuation, of white space. A pattern is a
regular expression; each of its matches is a chunk, and so is each stretch between two matches, so that chunks
joined always give the text back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import regex

from groundup.runtime.errors import UsageError, nearest

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

    def split(self, text: str) -> Iterable[str]:
        """The chunks of ``text``, in order; joined they are ``text``.

        An expression that can match nothing may add empty chunks.
        """
        if self._compiled.groups == 0 and len(text) <= LONG_TEXT:
            chunks: list[str] = self._compiled.findall(text)
            # findall is three times as fast as matching one by one, but leaves out what lies between matches.
            if sum(map(len, chunks)) == len(text):
                return chunks
        return self._matches_and_gaps(text)

    def _matches_and_gaps(self, text: str) -> Iterator[str]:
        done = 0
        for match in self._compiled.finditer(text):
            start, end = match.span()
            if start > done:
                yield text[done:start]
            if end > start:
                yield text[start:end]
            done = end
        if done < len(text):
            yield text[done:]
