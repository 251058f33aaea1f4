"""What the tests of a corpus that lies elsewhere share."""

from __future__ import annotations

import threading

from groundup.data import TokenSet

LINE = "the of and a to in is you that it he was for on are as with his they at be this have from or"


def settle() -> None:
    """Wait for the fetching that goes on in the background."""
    for thread in threading.enumerate():
        if thread.name == "groundup-shards":
            thread.join(10)
            assert not thread.is_alive()


def middle(tokens: TokenSet, number: int) -> int:
    """A place inside a shard."""
    return int(tokens._starts[number]) + 5
