"""Blocks of the cache: who holds which, what is in them, and which is given up first.

The memory of a cache is cut into blocks of some positions each (Kwon et al. 2023, PagedAttention). A sequence holds a
table of blocks; sequences that begin alike share theirs, and a block that nobody holds any more is kept as long as its
memory is not needed, because the same text may come again.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class BlockPool:
    """Blocks by number, from 1 on. Those nobody holds are free, or kept for what is in them: the longest unused goes
    first. Block 0 is nobody's: it stands where there is nothing to read.

    Args:
        count: how many blocks there are.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(
            range(1, count + 1)
        )  # a heap: neighbours are handed out together, which makes reading them cheap
        self._holders = [0] * (count + 1)
        self._key: dict[int, bytes] = {}
        self._block: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that can be taken."""
        return len(self._free) + len(self._unused)

    @property
    def held(self) -> int:
        """Blocks that someone holds."""
        return self.count - self.available

    def take(self) -> int | None:
        """A block for one holder; None when all are held."""
        if self._free:
            block = heapq.heappop(self._free)
        elif self._unused:
            block, _ = self._unused.popitem(last=False)
            del self._block[self._key.pop(block)]
        else:
            return None
        self._holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """One holder more."""
        if self._holders[block] == 0:
            del self._unused[block]
        self._holders[block] += 1

    def shared(self, block: int) -> bool:
        """Whether more than one holds it: whoever wants to write must copy it first."""
        return self._holders[block] > 1

    def release(self, block: int) -> None:
        """One holder less; what nobody holds can be taken by others, and until then be found again."""
        self._holders[block] -= 1
        if self._holders[block] == 0:
            if block in self._key:
                self._unused[block] = None
            else:
                heapq.heappush(self._free, block)

    def remember(self, block: int, key: bytes) -> None:
        """Say what is in a block that will not be written again. Of two blocks with the same content one is known."""
        if key not in self._block and block not in self._key:
            self._key[block], self._block[key] = key, block

    def find(self, key: bytes) -> int | None:
        """The block with that content."""
        return self._block.get(key)

    def forget_all(self) -> None:
        """Free what is only kept for its content."""
        for block in self._unused:
            del self._block[self._key.pop(block)]
            heapq.heappush(self._free, block)
        self._unused.clear()


def content_keys(tokens: Sequence[int], size: int, salt: str, known: Sequence[bytes] = ()) -> list[bytes]:
    """A key for each whole block of a text: it stands for all tokens up to the block's end.

    Args:
        tokens: the text from its beginning.
        size: tokens of a block.
        salt: texts of different salts have nothing in common, so that nobody can find out what others have asked by
            how fast the answer comes.
        known: keys of the first blocks, when they have been made before.
    """
    keys = list(known)
    before = keys[-1] if keys else hashlib.blake2b(salt.encode(), digest_size=16).digest()
    for begin in range(len(keys) * size, len(tokens) - size + 1, size):
        content = np.asarray(tokens[begin : begin + size], dtype=np.int64).tobytes()
        before = hashlib.blake2b(before + content, digest_size=16).digest()
        keys.append(before)
    return keys
