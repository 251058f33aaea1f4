"""Fine-tuning here and by TRL's SFTTrainer: the same ids, the same to be learnt, the same losses, gradients, weights.

TRL gets the folder that we save and the same conversations, and makes its batches itself. What is compared are whole
steps as it makes them: rows that are padded, examples that are packed, several micro-batches, PEFT's adapters.

TRL says of packing that it is safe with Flash Attention only. With transformers 5 it also is on a CPU: where there is
no attention mask, attention keeps to what the positions say belongs together, which
``test_packed_examples_do_not_see_each_other`` sees to on their side.
"""

# B batch   T positions

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groundup.data import IGNORED, TokenBatch
from groundup.model import LoraConfig, load_adapter, load_model
from groundup.model.adapters import add_adapter, trainable_parameters
from groundup.optim import OptimConfig, build_optimizers
from groundup.posttraining import Conversation, Encoding, Example
from groundup.runtime.interrupt import StopRequest
from groundup.tokenizer import Tokenizer
from groundup.training import Loop, LoopHooks, LoopSettings, NextToken
from trl_sides import (
    CONTEXT,
    END,
    FAMILIES,
    PLAIN,
    SPECIAL,
    WITH_TOOLS,
    FirstGradients,
    as_rows,
    assert_alike,
    by_our_names,
    encoded,
    gradients,
    lora_of,
    ours_prepared,
    peft,
    prepared,
    real_talks,
    rows_of,
    said,
    sides_of,
    stir,
    trainer_of,
    transformers,
)

pytestmark = pytest.mark.slow
KINDS: dict[str, dict[str, bool]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
all_families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def talks(root: Path) -> list[Conversation]:
    return real_talks(root.parent / "shared" / "data" / "sft")


@pytest.fixture(scope="module")
def tok(talks: list[Conversation]) -> Tokenizer:
    texts = [json.dumps([talk.messages, talk.tools], ensure_ascii=False) for talk in talks]
    return Tokenizer.train(texts, 647, special_tokens=SPECIAL, show_progress=False)


# ---- what is learnt


@pytest.mark.parametrize("template", ["llama3", "chatml", WITH_TOOLS], ids=["llama3", "chatml", "tools"])
def test_ids_and_what_the_assistant_says(
    template: str, tok: Tokenizer, talks: list[Conversation], tmp_path: Path
) -> None:
    some = talks if template == WITH_TOOLS else said(talks)
    tok = tok.with_chat_template(template)
    sides = sides_of("llama", tok, tmp_path / "model")
    trainer = trainer_of(sides, as_rows(some), tmp_path / "run", assistant_only_loss=True)
    assert max(sum(message["role"] == "assistant" for message in talk.messages) for talk in some) > 1
    assert ours_prepared(encoded(tok, some)) == prepared(trainer)


@pytest.mark.parametrize("template", ["llama3", "chatml"])
def test_prompts_and_completions_of_messages(
    template: str, tok: Tokenizer, talks: list[Conversation], tmp_path: Path
) -> None:
    some = said(talks)
    tok = tok.with_chat_template(template)
    rows = [{"prompt": talk.messages[:-1], "completion": talk.messages[-1:]} for talk in some]
    trainer = trainer_of(sides_of("llama", tok, tmp_path / "model"), rows, tmp_path / "run")
    examples = list(Encoding(tok, CONTEXT, turns="last").examples(some))
    expected = prepared(trainer)
    if template == "chatml":
        # TRL learns the line break behind the end of the message too, which nobody ever reads: generation has ended.
        assert all(labels[-1] == ids[-1] == tok.encode("\n")[0] for ids, labels in expected)
        expected = [(ids, [*labels[:-1], IGNORED]) for ids, labels in expected]
    assert ours_prepared(examples) == expected


def test_prompts_and_completions_of_text(tok: Tokenizer, talks: list[Conversation], tmp_path: Path) -> None:
    tok = tok.with_chat_template(PLAIN, eos_token=END)
    some = [
        Conversation(talk.where, [
            {"role": "user", "content": talk.messages[0]["content"] + "\n"},
            {"role": "assistant", "content": talk.messages[1]["content"]},
        ])
        for talk in said(talks) if talk.messages[1]["role"] == "assistant"
    ]  # fmt: skip
    rows = [{"prompt": talk.messages[0]["content"], "completion": talk.messages[1]["content"]} for talk in some]
    trainer = trainer_of(sides_of("llama", tok, tmp_path / "model"), rows, tmp_path / "run")
    assert ours_prepared(encoded(tok, some)) == prepared(trainer)


def test_plain_texts(tok: Tokenizer, talks: list[Conversation], tmp_path: Path) -> None:
    """TRL puts no token before a text, whose first one then is not learnt: here it follows the end of another text."""
    texts = [talk.messages[-1]["content"] for talk in talks]
    trainer = trainer_of(
        sides_of("gpt2", tok, tmp_path / "model"), [{"text": END + text} for text in texts], tmp_path / "run"
    )
    ours = encoded(tok, [Conversation("x", [{"role": "text", "content": text}]) for text in texts])
    assert ours_prepared(ours) == [(ids, [IGNORED, *labels[1:]]) for ids, labels in prepared(trainer)]


# ---- one step


@pytest.mark.parametrize(("packed", "loss_type"), [(False, "nll"), (False, "chunked_nll"), (True, "chunked_nll")])
@all_families
def test_loss_and_gradients(
    family: str, packed: bool, loss_type: str, tok: Tokenizer, talks: list[Conversation], tmp_path: Path
) -> None:
    tok = tok.with_chat_template(WITH_TOOLS)
    sides = sides_of(family, tok, tmp_path / "model")
    examples = encoded(tok, talks)
    longest = max(len(one.ids) for one in examples)
    fields = {"packing": packed, "max_length": longest, "loss_type": loss_type, "assistant_only_loss": True}
    trainer = trainer_of(sides, as_rows(talks), tmp_path / "run", **fields)
    (batch,) = trainer.get_train_dataloader()
    if packed:
        assert "attention_mask" not in batch
        assert (batch["position_ids"] == 0).sum() == len(talks) > len(trainer.train_dataset) > 1
    else:
        assert not batch["attention_mask"].all()
    trainer.model.train()
    their_loss = trainer.compute_loss(trainer.model, batch)
    their_loss.backward()
    loss, _ = NextToken()(sides.model, rows_of(examples, "best_fit" if packed else "padded", longest))
    loss.backward()
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    theirs = by_our_names(trainer.model, gradients(trainer.model), tmp_path / "gradients")
    assert_alike(gradients(sides.model), theirs)


@all_families
@torch.no_grad()
def test_packed_examples_do_not_see_each_other(
    family: str, tok: Tokenizer, talks: list[Conversation], tmp_path: Path
) -> None:
    tok = tok.with_chat_template(WITH_TOOLS)
    sides = sides_of(family, tok, tmp_path / "model")
    trainer = trainer_of(sides, as_rows(talks), tmp_path / "run", packing=True, assistant_only_loss=True)
    (batch,) = trainer.get_train_dataloader()
    ids, labels, own = (batch[name][:, :CONTEXT] for name in ("input_ids", "labels", "position_ids"))
    apart, together = (
        sides.theirs(ids, labels=labels, position_ids=positions, use_cache=False).loss
        for positions in (own, torch.arange(ids.shape[1])[None])
    )
    assert (apart - together).abs() > 1e-3  # so that the tests above would see it
    targets = torch.cat([labels[:, 1:], torch.full((1, 1), IGNORED)], dim=1)
    ours, _ = NextToken()(sides.model, TokenBatch(ids, targets, (own == 0).cumsum(dim=1)))
    assert ours.item() == pytest.approx(apart.item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@all_families
def test_adapters(
    family: str, kind: dict[str, bool], tok: Tokenizer, talks: list[Conversation], tmp_path: Path
) -> None:
    tok = tok.with_chat_template(WITH_TOOLS)
    sides = sides_of(family, tok, tmp_path / "model")
    trainer = trainer_of(sides, as_rows(talks), tmp_path / "run", lora_of(family, kind), assistant_only_loss=True)
    stir(trainer.model)
    trainer.model.save_pretrained(tmp_path / "adapter")
    model = load_adapter(load_model(sides.folder), tmp_path / "adapter", trainable=True).train()
    (batch,) = trainer.get_train_dataloader()
    trainer.model.train()
    their_loss = trainer.compute_loss(trainer.model, batch)
    their_loss.backward()
    batch = rows_of(encoded(tok, talks), "best_fit")
    bare, _ = NextToken()(sides.model, batch)
    loss, _ = NextToken()(model, batch)
    loss.backward()
    assert abs(loss.item() - bare.item()) > 1e-3  # the adapter matters
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-5)
    found = gradients(model)
    if (
        family == "gpt2"
    ):  # one A of theirs for queries, keys and values is three of ours, whose shares make its gradient
        for block in range(FAMILIES[family]["n_layer"]):
            names = [f"blocks.{block}.attention.{part}.adapters.default.A" for part in "qkv"]
            found |= dict.fromkeys(names, sum(found[name] for name in names))
    theirs = by_our_names(trainer.model, gradients(trainer.model), tmp_path / "gradients", sides.folder)
    assert len(theirs) == (3 if "use_dora" in kind else 2) * {"llama": 14, "gpt2": 12}[family]
    assert_alike(found, theirs)


# ---- several steps


class Noted(LoopHooks):
    """Keeps the gradients of the first step, and the loss of every one."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.losses = model, []
        self.first: dict[str, Tensor] = {}

    def before_update(self) -> None:
        self.first = self.first or gradients(self.model)

    def on_log(self, row: dict[str, Any]) -> None:
        self.losses.append(row["loss"])


STEPS, ACCUMULATE, MICRO, RATE, EPSILON = 3, 2, 2, 1e-3, 1e-5  # a smaller epsilon: AdamW makes whole steps of rounding


def our_training(model: nn.Module, examples: Sequence[Example]) -> Noted:
    """The loop, on the same micro-batches in the same order."""
    optim = OptimConfig(
        optimizer="adamw", learning_rate=RATE, beta2=0.999, eps=EPSILON, weight_decay=0.0, grad_clip=0.0,
        schedule="constant", warmup_steps=0,
    )  # fmt: skip
    settings = LoopSettings(
        batch_tokens=ACCUMULATE * MICRO * CONTEXT, accumulate=ACCUMULATE, micro_batch=MICRO, max_steps=STEPS,
        seconds=None, log_every=1, save_every=None, precision="float32",
    )  # fmt: skip
    noted = Noted(model)
    optimizers = build_optimizers(model, optim)

    def batch(number: int) -> TokenBatch:
        return rows_of(examples[number * MICRO : (number + 1) * MICRO])

    Loop(model, NextToken(), batch, optimizers, optim, settings, noted).run(StopRequest())
    return noted


# GPT-2's queries, keys and values have one A there, which goes another way than three do: its adapters are left out.
@pytest.mark.parametrize(("family", "adapter"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_steps_of_unequal_micro_batches(
    family: str, adapter: bool, tok: Tokenizer, talks: list[Conversation], tmp_path: Path
) -> None:
    tok = tok.with_chat_template(WITH_TOOLS)
    some = (talks * 2)[: STEPS * ACCUMULATE * MICRO]
    sides = sides_of(family, tok, tmp_path / "model")
    trainer = trainer_of(
        sides, as_rows(some), tmp_path / "run", lora_of(family, {}) if adapter else None, assistant_only_loss=True,
        per_device_train_batch_size=MICRO, gradient_accumulation_steps=ACCUMULATE, max_steps=STEPS, max_grad_norm=0.0,
        learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, adam_epsilon=EPSILON,
    )  # fmt: skip
    model: nn.Module = sides.model
    if adapter:
        stir(trainer.model)
        trainer.model.save_pretrained(tmp_path / "adapter")
        model = load_adapter(load_model(sides.folder), tmp_path / "adapter", trainable=True)
    before = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    first = FirstGradients()
    trainer.add_callback(first)
    trainer.train()
    noted = our_training(model, encoded(tok, some))

    counts = torch.tensor(trainer.counts).view(STEPS, ACCUMULATE)
    assert (counts[:, 0] != counts[:, 1]).all()
    losses = torch.tensor(trainer.losses).view(STEPS, ACCUMULATE).sum(dim=1)  # each is a part of the step's mean
    torch.testing.assert_close(torch.tensor(noted.losses), losses, rtol=1e-5, atol=0)
    base = sides.folder if adapter else None
    assert_alike(noted.first, by_our_names(trainer.model, first.found, tmp_path / "gradients", base))
    after = by_our_names(trainer.model, {}, tmp_path / "after", base)
    for name, parameter in trainable_parameters(model).items():
        if not name.endswith("attention.k.bias"):
            assert (parameter - before[name]).abs().max() > 1e-3, name
        torch.testing.assert_close(parameter.detach(), after[name], rtol=0, atol=1e-5, msg=name)


def test_an_adapter_begins_as_theirs() -> None:
    """PEFT's own start: A uniform within 1 / sqrt(inputs), B zero, so that the first step is the same in kind."""
    linear = nn.Sequential(nn.Linear(97, 31, bias=False))
    other = peft.get_peft_model(copy.deepcopy(linear), peft.LoraConfig(r=13, target_modules=["0"]))
    ours = trainable_parameters(add_adapter(linear, LoraConfig(rank=13, targets=("0",))))
    theirs = {name.split(".")[-3]: p for name, p in other.named_parameters() if p.requires_grad}
    for mine, its in (
        (ours["0.adapters.default.A"], theirs["lora_A"]),
        (ours["0.adapters.default.B"], theirs["lora_B"]),
    ):
        assert mine.shape == its.shape
        assert mine.abs().max().item() == pytest.approx(its.abs().max().item(), rel=0.02)
        assert mine.std().item() == pytest.approx(its.std().item(), rel=0.1)
