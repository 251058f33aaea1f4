"""What byte-pair encoding goes by: tokens, and the merges that make them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

from groundup.runtime.errors import GroundupError

Pair = tuple[int, int]


class Rules:
    """Tokens and merges, as the encoders want them.

    Args:
        tokens: the bytes of each token by id.
        merges: pairs of ids, the first one merged first; None when a token's id is its rank.
        ordinary: the ids that text may become, ascending.
        whole_words: a chunk that is itself a token becomes it without merging.

    Raises:
        GroundupError: a byte has no token.
    """

    def __init__(
        self, tokens: Sequence[bytes], merges: Sequence[Pair] | None, ordinary: Sequence[int], whole_words: bool
    ) -> None:
        self.tokens, self.ordinary = tokens, ordinary
        self.whole_words = whole_words or merges is None
        self._merges = merges
        byte_ids = {tokens[number]: number for number in ordinary if len(tokens[number]) == 1}
        missing = next((byte for byte in range(256) if bytes([byte]) not in byte_ids), None)
        if missing is not None:
            raise GroundupError(f"byte {missing} has no token: byte-pair encoding needs all 256 single bytes.")
        self.byte_ids = [byte_ids[bytes([byte])] for byte in range(256)]

    @property
    def by_rank(self) -> bool:
        """Whether merges are not listed: a token's id is its rank."""
        return self._merges is None

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The id of each ordinary token."""
        return {self.tokens[number]: number for number in self.ordinary}

    @property
    def listed(self) -> list[tuple[int, int, int]]:
        """The merges that are listed: left, right, and the token they make; the first one is merged first."""
        tokens, ids = self.tokens, self.ids
        return [(left, right, ids[tokens[left] + tokens[right]]) for left, right in self._merges or ()]

    def recovered(self) -> list[tuple[int, int, int]]:
        """The merges behind ids that are ranks: left, right, and the token they make, in rank order.

        In a vocabulary that was learned, each token was made of two: those that are left of its bytes when only
        the merges before it are applied. Then these pairs are all that can ever meet. Where a token was not (added by
        hand, say), every way to cut any token in two counts.

        Slow, in plain Python; kernels/merge.py has it fast.
        """
        ranks: dict[Pair, tuple[int, int]] = {}
        found = []
        for number in self.ordinary:
            parts = [self.byte_ids[byte] for byte in self.tokens[number]]
            if len(parts) == 1:
                continue
            while True:
                known = [(ranks[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in ranks]
                if not known:
                    break
                (_, product), place = min(known)
                parts[place : place + 2] = [product]
            if len(parts) != 2:
                return self.all_cuts()
            left, right = parts
            ranks[left, right] = (number, number)
            found.append((left, right, number))
        return found

    def all_cuts(self) -> list[tuple[int, int, int]]:
        """Every way to cut any token into two tokens: left, right and the token, in rank order."""
        found = []
        for number in self.ordinary:
            token = self.tokens[number]
            for cut in range(1, len(token)):
                left, right = self.ids.get(token[:cut]), self.ids.get(token[cut:])
                if left is not None and right is not None:
                    found.append((left, right, number))
        return found
