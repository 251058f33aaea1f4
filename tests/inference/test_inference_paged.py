"""The paged cache gives the model what a cache in one piece would, and loses no block."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from groundup.inference.paged import Held, PagedCache, Piece
from groundup.model import ModelConfig, Transformer

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "windows": {"layer_pattern": "SSF", "sliding_window": 7},
    "windows alone": {"layer_pattern": "S", "sliding_window": 5},
    "latent": {"latent": {"kv_rank": 7, "rope_dim": 4, "nope_dim": 5, "v_dim": 3}, "qk_norm": False},
    "alibi": {"positions": "alibi"},
    "grouped": {"n_kv_head": 1},
}
SIZE = 4


def make(kind: str) -> Transformer:
    torch.manual_seed(3)
    sizes = dict(vocab_size=61, context_length=67, n_layer=3, n_head=2, n_embd=22, n_ff=29, head_dim=8, init_std=0.3)
    return Transformer(ModelConfig.from_dict(sizes | KINDS[kind])).double().eval()


def compute(model: Transformer, paged: PagedCache, texts: list[list[int]], pieces: list[Piece]) -> list[Tensor]:
    batch, order = paged.ragged(pieces)
    ids = [id_ for i in order for id_ in texts[i][pieces[i].begin : pieces[i].begin + pieces[i].queries]]
    logits = model.logits(model.features(torch.tensor([ids]), batch))[0]
    found: list[Tensor] = [logits] * len(pieces)
    for i, part in zip(order, logits.split([pieces[i].queries for i in order]), strict=True):
        found[i] = part
    return found


def held_blocks(held: Held) -> list[int]:
    return [int((table >= 0).sum()) for table in held.tables]


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_any_cuts_of_any_texts_give_the_same_logits(kind: str) -> None:
    model = make(kind)
    rng = random.Random(1)
    texts = [[rng.randrange(61) for _ in range(rng.randrange(3, 67))] for _ in range(6)]
    expected = [model(torch.tensor([text]))[0] for text in texts]
    paged = PagedCache(model.config, 400, size=SIZE, dtype=torch.float64)
    for pages in paged.pages:  # what is read although it is hidden must not matter, and the rest must not be read
        for page in pages:
            page[SIZE:] = float("nan")
    held, done = [paged.open() for _ in texts], [0] * len(texts)
    while todo := [i for i, text in enumerate(texts) if done[i] < len(text)]:
        todo = [i for i in todo if rng.random() < 0.7] or todo[:1]
        counts = [min(rng.choice([1, 1, 1, 2, 3, 11]), len(texts[i]) - done[i]) for i in todo]
        for i, count in zip(todo, counts, strict=True):
            assert paged.reserve(held[i], done[i], done[i] + count, ahead=rng.choice([0, len(texts[i])]))
        pieces = [Piece(held[i], done[i], n, len(texts[i])) for i, n in zip(todo, counts, strict=True)]
        for i, count, logits in zip(todo, counts, compute(model, paged, [texts[i] for i in todo], pieces), strict=True):
            torch.testing.assert_close(logits, expected[i][done[i] : done[i] + count], rtol=0, atol=1e-9)
            done[i] += count
            paged.computed(held[i], texts[i], done[i], "")
    window = model.config.sliding_window
    for one, text in zip(held, texts, strict=True):
        for group, blocks in zip(paged.groups, held_blocks(one), strict=True):
            most = -(-len(text) // SIZE) if group.window is None else -(-(window or 0) // SIZE) + 1
            assert blocks <= most  # less than a block of each sequence is unused
    for one in held:
        paged.release(one)
    assert [group.pool.held for group in paged.groups] == [0] * len(paged.groups)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_beginning_that_was_computed_before_is_found_and_shared(kind: str) -> None:
    model = make(kind)
    text = [(7 * n) % 61 for n in range(30)]
    paged = PagedCache(model.config, 100, size=SIZE, dtype=torch.float64)
    held = paged.open()
    assert paged.match(text, "")[1] == 0
    paged.reserve(held, 0, 30)
    compute(model, paged, [text], [Piece(held, 0, 30, 30)])
    paged.computed(held, text, 30, "")
    other = text[:23] + [60] * 5
    shared, found = paged.match(other, "")
    assert found == 20
    paged.reserve(shared, found, len(other))
    (logits,) = compute(model, paged, [other], [Piece(shared, found, len(other) - found, len(other))])
    torch.testing.assert_close(logits, model(torch.tensor([other]))[0, found:], rtol=0, atol=1e-9)
    again, found = paged.match(text, "")
    assert found == 28  # whole blocks, and never all: something must be computed
    assert paged.match(text[:28], "")[1] == 24
    assert paged.match(text, "somebody else")[1] == 0
    for one in (held, shared, again):
        paged.release(one)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_forks_write_into_copies(kind: str) -> None:
    model = make(kind)
    text = [(5 * n) % 61 for n in range(18)]
    paged = PagedCache(model.config, 200, size=SIZE, dtype=torch.float64)
    held = paged.open()
    paged.reserve(held, 0, 18)
    compute(model, paged, [text], [Piece(held, 0, 18, 18)])
    paged.computed(held, text, 18, "")
    before = [group.pool.held for group in paged.groups]
    forks = [held, paged.fork(held), paged.fork(held)]
    assert [group.pool.held for group in paged.groups] == before  # nothing was copied yet
    for step in range(3):
        texts = [text + [branch + 11] * (step + 1) for branch in range(3)]
        for one in forks:
            assert paged.reserve(one, 18 + step, 19 + step)
        found = compute(model, paged, texts, [Piece(one, 18 + step, 1, 19 + step) for one in forks])
        for own, logits in zip(texts, found, strict=True):
            torch.testing.assert_close(logits[0], model(torch.tensor([own]))[0, -1], rtol=0, atol=1e-9)
    for one in forks:
        paged.release(one)
    assert [group.pool.held for group in paged.groups] == [0] * len(paged.groups)


def test_room_is_given_whole_or_not_at_all() -> None:
    model = make("windows")
    paged = PagedCache(model.config, 5 * SIZE, size=SIZE)
    first, second = paged.open(), paged.open()
    assert paged.reserve(first, 0, 3 * SIZE)
    assert not paged.reserve(second, 0, 3 * SIZE)
    assert held_blocks(second) == [0, 0]
    assert paged.reserve(second, 0, 2 * SIZE)
    paged.release(first)
    assert paged.reserve(second, 2 * SIZE, 5 * SIZE)


def test_memory_is_taken_when_it_is_written() -> None:
    """A cache of many gigabytes costs nothing until it is used."""
    config = ModelConfig(n_layer=2, n_head=2, n_embd=256, context_length=1 << 20)
    paged = PagedCache(config, 1 << 24, dtype=torch.float32)
    assert sum(page.nbytes for pages in paged.pages for page in pages) > 60e9
    assert float(paged.pages[0][0][-1].sum()) == 0.0
