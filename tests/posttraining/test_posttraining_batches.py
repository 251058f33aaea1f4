"""From conversations to rows: what is learnt, what fits, packed or padded, in which order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from groundup.data import IGNORED, Dropped, open_records
from groundup.model import ModelConfig, Transformer
from groundup.posttraining import BadRecord, Conversation, Encoding, Example, ExampleLoader, read_conversations
from groundup.runtime import GroundupError
from groundup.tokenizer import Tokenizer
from groundup.training.objectives import NextToken

NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    made = Tokenizer.train(["The quick brown fox asks what two and two are. "] * 9, 300, special_tokens=NAMES)
    return made.with_chat_template("chatml")


def talk(*texts: str, where: str = "x#1") -> Conversation:
    roles = ("user", "assistant")
    return Conversation(where, [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)])


def test_what_the_assistant_says_is_learnt(tok: Tokenizer) -> None:
    example = Encoding(tok, 100).encode(talk("two and two", "are four", "and", "the end"))
    learnt = [int(token) for token, learn in zip(example.ids, example.learn, strict=True) if learn]
    assert tok.decode(learnt) == "are four<|im_end|>the end<|im_end|>"
    last = Encoding(tok, 100, turns="last").encode(talk("two and two", "are four", "and", "the end"))
    assert tok.decode(last.ids[last.learn]) == "the end<|im_end|>"
    assert last.ids.tolist() == example.ids.tolist()


def test_of_a_plain_text_all_is_learnt(tok: Tokenizer) -> None:
    example = Encoding(tok, 100).encode(Conversation("x", [{"role": "text", "content": "the fox"}]))
    end = tok.end_of_text_id
    assert example.ids.tolist() == [end, *tok.encode("the fox"), end]
    assert example.learn.tolist() == [False] + [True] * (len(example.ids) - 1)


def test_what_does_not_fit(tok: Tokenizer) -> None:
    short, long = talk("a", "b"), talk("a", "the quick brown fox " * 9, where="x#2")
    size = Encoding(tok, 100).encode(short).positions
    with pytest.raises(BadRecord, match=rf"x#2: it has \d+ tokens, the context holds {size}"):
        list(Encoding(tok, size).examples([short, long]))
    skipped: list[Dropped] = []
    assert len(list(Encoding(tok, size).examples([short, long], skipped.append))) == 1
    assert len(list(Encoding(tok, size, too_long="drop").examples([short, long], skipped.append))) == 1
    assert [(one.name, one.reason) for one in skipped] == [("x#2", "bad record"), ("x#2", "longer than the context")]
    assert len(list(Encoding(tok, size, too_long="drop").examples([short, long]))) == 1
    one, other = Encoding(tok, size + 1, too_long="cut").examples([short, long])
    assert (one.positions, other.positions) == (size, size + 1)
    assert other.learn.any()
    behind = talk("the quick brown fox " * 9, "b", where="x#3")
    with pytest.raises(BadRecord, match="x#3: what is to be learnt from it lies behind"):
        list(Encoding(tok, size, too_long="cut").examples([behind]))


def test_what_the_template_refuses_is_named(tok: Tokenizer) -> None:
    bad = Conversation("x#9", [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}])
    with pytest.raises(BadRecord, match=r"x#9: messages\[1\]: unknown role 'robot'"):
        list(Encoding(tok, 50).examples([bad]))


# ---- rows


def some(count: int, longest: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        length = int(rng.integers(2, longest + 2))
        learn = rng.random(length) < 0.5
        learn[0], learn[-1] = False, True
        found.append(Example(f"x#{number}", rng.integers(1, 97, length), learn, {}))
    return found


def unpacked(loader: ExampleLoader, rows: int, first: int = 0) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The examples of some rows: their inputs and their targets."""
    batch, found = loader.samples(first, rows), []
    for inputs, targets, documents in zip(*batch, strict=True):
        for number in range(documents[-1] + 1):
            here = documents == number
            if (targets[here] != IGNORED).any():
                found.append((tuple(inputs[here].tolist()), tuple(targets[here].tolist())))
    return found


def expected(examples: list[Example]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(tuple(e.ids[:-1].tolist()), tuple(np.where(e.learn[1:], e.ids[1:], IGNORED).tolist())) for e in examples]


@pytest.mark.parametrize("block", [7, 16_384])
def test_an_epoch_has_every_example_once(block: int) -> None:
    examples = some(50, 23)
    loader = ExampleLoader(examples, 23, 4, seed=5, block=block)
    rows = loader.rows_of_epoch()
    first = unpacked(loader, rows)
    assert Counter(first) == Counter(expected(examples))
    second = unpacked(loader, loader.rows_of_epoch(1), rows)
    assert Counter(second) == Counter(first)
    assert second != first
    assert [loader.epoch_of(row) for row in (0, rows - 1, rows)] == [0, 0, 1]
    again = ExampleLoader(examples, 23, 1, seed=5, block=block)
    assert np.array_equal(again.samples(rows - 1, 3).inputs, loader.samples(rows - 1, 3).inputs)
    report = loader.report()
    assert report["padding"] == pytest.approx(1 - sum(e.positions for e in examples) / (rows * 23))
    assert report["learnt"] == sum(int(e.learn.sum()) for e in examples)


def test_padded_an_example_has_a_row_of_its_own() -> None:
    examples = some(20, 11)
    loader = ExampleLoader(examples, 17, 4, seed=5, packing="padded", pad=3)
    assert loader.rows_of_epoch() == 20
    batch = loader.samples(0, 20)
    assert Counter(unpacked(loader, 20)) == Counter(expected(examples))
    assert (batch.inputs[batch.documents == 1] == 3).all()
    assert (batch.targets[batch.documents == 1] == IGNORED).all()


@pytest.mark.parametrize("packing", ["best_fit", "padded"])
def test_a_curriculum_goes_from_low_to_high(packing: Any) -> None:
    examples = some(60, 9)
    ranks = [float(e.positions) for e in examples]
    loader = ExampleLoader(examples, 9, 4, seed=5, packing=packing, ranks=ranks, block=10)
    rows = loader.rows_of_epoch()
    sizes = [len(inputs) for inputs, _ in unpacked(loader, rows)]
    assert sorted(sizes) == sorted(int(rank) for rank in ranks)
    means = [np.mean(part) for part in np.array_split(sizes, 5)]
    assert means == sorted(means)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_packed_and_padded_give_the_same_loss(positions: Any) -> None:
    torch.manual_seed(3)
    sizes = dict(vocab_size=97, context_length=31, n_layer=2, n_head=3, n_embd=24, n_ff=40, positions=positions)
    model = Transformer(ModelConfig.from_dict(sizes | {"init_std": 0.3})).double()
    examples = some(40, 31)
    losses, gradients = [], []
    for packing in ("best_fit", "padded"):
        loader = ExampleLoader(examples, 31, 1, seed=2, packing=packing)  # type: ignore[arg-type]
        batch = loader.samples(0, loader.rows_of_epoch())
        model.zero_grad()
        loss, _ = NextToken()(model, type(batch)(*map(torch.from_numpy, batch)))
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


def test_nothing_to_learn_from() -> None:
    with pytest.raises(GroundupError, match="there is no example to learn from"):
        ExampleLoader([], 8, 1, seed=0)


@pytest.mark.parametrize("name", ["code_alpaca_2k.json", "dolly_hhrlhf_1k.jsonl", "instruction-data.json"])
def test_real_files_are_packed_full(shared_data: Path, name: str) -> None:
    texts = [str(record) for _, record in open_records(str(shared_data / "sft" / name), limit=300)]
    tok = Tokenizer.train(texts, 1024, special_tokens=NAMES, show_progress=False).with_chat_template("chatml")
    records = open_records(str(shared_data / "sft" / name))
    skipped: list[Dropped] = []
    conversations = read_conversations(records, skip=skipped.append)
    examples = list(Encoding(tok, 1024, too_long="drop").examples(conversations, skipped.append))
    assert len(examples) > 900
    assert ExampleLoader(examples, 1024, 4, seed=1).report()["padding"] < 0.05


def test_padded_rows_end_where_the_longest_of_them_does(tok: Tokenizer) -> None:
    examples = [Encoding(tok, 100).encode(talk("a" * count, "b")) for count in (1, 9, 30)]
    loader = ExampleLoader(examples, 100, 3, 7, "padded")
    batch, longest = loader.batch(0), max(example.positions for example in examples)
    assert batch.inputs.shape == batch.targets.shape == batch.documents.shape == (3, -(-longest // 8) * 8)
    assert (batch.targets != IGNORED).sum() == sum(int(example.learn.sum()) for example in examples)
