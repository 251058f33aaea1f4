"""Blocks of the cache: never handed out twice, never lost, given up in the right order."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.inference.blocks import BlockPool, content_keys


def test_blocks_are_taken_in_order_and_the_first_is_nobodys() -> None:
    pool = BlockPool(3)
    assert [pool.take() for _ in range(4)] == [1, 2, 3, None]
    pool.release(3)
    pool.release(1)
    assert [pool.take(), pool.take()] == [1, 3]


def test_what_nobody_holds_is_found_until_its_room_is_needed_the_longest_unused_first() -> None:
    pool = BlockPool(3)
    blocks = [pool.take() for _ in range(3)]
    for block, key in zip(blocks, (b"a", b"b", b"c"), strict=True):
        assert block is not None
        pool.remember(block, key)
    for block in (2, 1, 3):
        pool.release(block)
    assert [pool.find(key) for key in (b"a", b"b", b"c")] == [1, 2, 3]
    assert pool.available == 3
    pool.share(2)  # found: it is held again, and so the last to go
    assert pool.available == 2
    pool.release(2)
    assert [pool.take(), pool.take(), pool.take()] == [1, 3, 2]
    assert [pool.find(key) for key in (b"a", b"b", b"c")] == [None, None, None]


def test_the_same_content_is_known_once() -> None:
    pool = BlockPool(2)
    one, other = pool.take(), pool.take()
    assert one is not None
    assert other is not None
    pool.remember(one, b"a")
    pool.remember(other, b"a")
    pool.release(other)
    assert pool.find(b"a") == one
    assert pool.take() == other  # it had nothing to be kept for
    pool.release(one)
    pool.forget_all()
    assert pool.find(b"a") is None
    assert pool.available == 1


@given(st.integers(1, 9), st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_any_history_keeps_the_books(count: int, seed: int) -> None:
    """Against a plain account of who holds what."""
    rng, pool = random.Random(seed), BlockPool(count)
    holders: dict[int, int] = {}
    content: dict[int, bytes] = {}
    for _ in range(120):
        action = rng.choice(["take", "share", "release", "remember", "find"])
        held = [block for block, number in holders.items() if number]
        if action == "take":
            block = pool.take()
            assert (block is None) == (len(held) == count)
            if block is not None:
                assert holders.get(block, 0) == 0
                holders[block] = 1
                content.pop(block, None)
        elif action == "find":
            key = bytes([rng.randrange(4)])
            block = pool.find(key)
            if block is not None:
                assert content[block] == key
                pool.share(block)
                holders[block] = holders.get(block, 0) + 1
        elif held:
            block = rng.choice(held)
            if action == "share":
                pool.share(block)
                holders[block] += 1
            elif action == "release":
                pool.release(block)
                holders[block] -= 1
            else:
                key = bytes([rng.randrange(4)])
                pool.remember(block, key)
                if pool.find(key) == block:
                    content[block] = key
        assert pool.held == sum(1 for number in holders.values() if number)
        assert [pool.shared(block) for block in holders] == [number > 1 for number in holders.values()]


def test_keys_stand_for_everything_up_to_the_blocks_end() -> None:
    tokens = list(range(11))
    keys = content_keys(tokens, 3, "")
    assert len(keys) == 3
    assert len(set(keys)) == 3
    assert content_keys(tokens[:9], 3, "") == keys
    assert content_keys(tokens[:8], 3, "") == keys[:2]
    assert content_keys(tokens, 3, "", keys[:2]) == keys
    other = content_keys([99, *tokens[1:]], 3, "")
    assert not set(other) & set(keys)  # also of the later blocks, whose own tokens are the same
    assert not set(content_keys(tokens, 3, "somebody")) & set(keys)
    assert content_keys([1, 256], 1, "") != content_keys([257, 0], 1, "")
