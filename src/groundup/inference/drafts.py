"""Speculative decoding: guess several tokens, let the model read them in one step, keep those it would have chosen.

Reading five tokens costs a memory-bound machine little more than reading one (Leviathan et al. 2023). The engine lets
the sampler choose at every guessed place as it would without guesses, and stops at the first place where it chooses
something else. So what comes out is what would have come out anyway: the same tokens when greedy or seeded, the same
distribution otherwise, since a guess is taken exactly as often as the sampler draws it.

A draft model would be one more class with a ``propose``. Its guesses are drawn from a distribution q of its own, and
may then be taken more often than this rule does: with probability min(1, p/q), else a token of max(0, p - q) is drawn
(section 2.3 there).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol


class Drafter(Protocol):
    """Who guesses what comes next."""

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most so many tokens that may follow a text; none where there is nothing to go by."""


class PromptLookup:
    """Guesses that the text goes on as it did when its last tokens came before (Saxena 2023, prompt lookup decoding).

    Args:
        longest, shortest: how many of the last tokens are looked for, the most first.
        within: how far back is looked, in tokens.
    """

    def __init__(self, *, longest: int = 4, shortest: int = 2, within: int = 4096) -> None:
        self.longest, self.shortest, self.within = longest, shortest, within

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """What followed the latest earlier place where the last tokens stood."""
        text = array("q", tokens[-self.within :])
        data, size = text.tobytes(), text.itemsize
        for length in range(min(self.longest, len(text) - 1), self.shortest - 1, -1):
            tail, end = data[-length * size :], len(data) - size
            while (found := data.rfind(tail, 0, end)) % size and found > 0:  # in the middle of a number
                end = found + len(tail) - 1
            if found >= 0 and found % size == 0:
                begin = found // size + length
                return list(text[begin : begin + most])
        return []
