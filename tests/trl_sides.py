"""One model, tokenizer and set of conversations on two sides: here, and in TRL's SFTTrainer; for parity tests."""

# B batch   T positions

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from groundup.data import IGNORED, TokenBatch, open_records
from groundup.model import ModelConfig, Transformer, load_adapter, load_model, save_model
from groundup.model.adapters import trainable_parameters
from groundup.posttraining import Conversation, Encoding, Example, ExampleLoader, read_conversations
from groundup.tokenizer import CHAT_TEMPLATES, Tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

END = "<|endoftext|>"
SPECIAL = [END, "<|im_start|>", "<|im_end|>", *CHAT_TEMPLATES["llama3"].special_tokens]
CONTEXT = 787
# Sizes are pairwise different, so that swapped axes fail.
LLAMA: dict[str, Any] = dict(n_layer=2, n_head=6, n_kv_head=2, n_embd=84, n_ff=61, tie_embeddings=False, qk_norm=False)
GPT2: dict[str, Any] = dict(
    n_layer=2, n_head=3, n_embd=66, n_ff=91, norm="layernorm", norm_eps=1e-5, positions="learned", feed_forward="gelu",
    bias=True, qk_norm=False,
)  # fmt: skip
FAMILIES = {"llama": LLAMA, "gpt2": GPT2}
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}

# Messages that call tools have fields of any form, which a data set keeps only as JSON.
JSON = {"on_mixed_types": "use_json"}

# ChatML with tools and calls of them, marked as TRL and we want it.
WITH_TOOLS = r"""
{%- if tools %}
    {{- '<|im_start|>system\nTools:\n' }}
    {%- for tool in tools %}{{- (tool | tojson) ~ '\n' }}{%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content }}
            {%- for call in message.tool_calls or [] %}
                {{- 'call ' ~ call.function.name ~ ' ' ~ (call.function.arguments | tojson) }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content ~ '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
# What TRL does with a prompt and a completion that are texts: one after the other, and the end.
PLAIN = r"""
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content ~ eos_token }}{%- endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
{%- endfor %}"""

INLINE: list[list[str]] = [
    ["Name three primary colours.", "Red, yellow and blue."],
    ["Write a haiku about rain.", "Soft on the tin roof,\nthe rain counts what we forget.\nNobody answers."],
    ["Hello! Who was Ada Lovelace?", "A mathematician.", "When did she live?", "From 1815 to 1852.", "Thanks.", "Bye!"],
    ["Is 91 prime?", "No: it is 7 times 13."],
    ["Translate to German: good morning", "Guten Morgen", "And: good night", "Gute Nacht"],
    ["Reverse 'abc' in Python.", "```python\nprint('abc'[::-1])\n```"],
    ["Why is the sky blue?", "Air scatters short waves of light more than long ones, so blue comes from everywhere."],
]


# ---- examples


def real_talks(folder: Path) -> list[Conversation]:
    """Instructions and answers of one turn, and talks of several turns; real ones where there are some."""
    if not folder.is_dir():
        return [
            Conversation(f"inline#{number}", [
                {"role": "user" if place % 2 == 0 else "assistant", "content": text} for place, text in enumerate(texts)
            ])
            for number, texts in enumerate(INLINE)
        ]  # fmt: skip
    found = []
    for name in ("instruction-data.json", "code_alpaca_2k.json"):
        found += list(read_conversations(open_records(str(folder / name), 3)))
    several = [
        talk
        for talk in read_conversations(open_records(str(folder / "toolcall_en_demo.json")))
        if sum(message["role"] == "assistant" for message in talk.messages) > 2
    ]
    plain, calling = ([talk for talk in several if bool(calls(talk) or talk.tools) is tools] for tools in (False, True))
    return found + sorted(plain, key=size)[:4] + sorted(calling, key=size)[:2]


def calls(talk: Conversation) -> bool:
    return any(message.get("tool_calls") for message in talk.messages)


def size(talk: Conversation) -> int:
    return len(json.dumps([talk.messages, talk.tools]))


def said(talks: Sequence[Conversation]) -> list[Conversation]:
    """Those without tools, which the known templates have no place for."""
    return [talk for talk in talks if not talk.tools and not calls(talk)]


def as_rows(talks: Sequence[Conversation]) -> list[dict[str, Any]]:
    """What TRL takes."""
    rows: list[dict[str, Any]] = [{"messages": talk.messages} for talk in talks]
    if any(talk.tools for talk in talks):  # in JSON: Arrow would give every schema the fields of all of them
        for row, talk in zip(rows, talks, strict=True):
            row["tools"] = json.dumps(talk.tools or [])
    return rows


# ---- two sides


@dataclass
class Sides:
    """One model and tokenizer, opened here and by transformers."""

    folder: Path
    tok: Tokenizer
    model: Transformer
    their_tok: Any
    theirs: Any


def sides_of(family: str, tok: Tokenizer, folder: Path) -> Sides:
    torch.manual_seed(41)
    fields = FAMILIES[family] | {"vocab_size": tok.vocab_size, "context_length": CONTEXT}
    model = Transformer(ModelConfig.from_dict(fields))
    with torch.no_grad():  # so far from the start of a training that it matters what is attended to
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter == 1))
    folder.mkdir()
    save_model(model, folder)
    tok.save(folder)
    their_tok = transformers.AutoTokenizer.from_pretrained(folder)
    their_tok.pad_token = their_tok.eos_token = END
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.config.model_type == family
    return Sides(folder, tok, model.train(), their_tok, theirs)


class Recorder(trl.SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, which also notes the losses of its micro-batches, what they had to learn, and gradients."""

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.counts.append(int((inputs["labels"][:, 1:] != IGNORED).sum()))
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss.item())
        return loss


class FirstGradients(transformers.TrainerCallback):  # type: ignore[misc]
    """Keeps the gradients of the first step."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **others: Any) -> None:
        self.found = self.found or gradients(model)


def trainer_of(sides: Sides, rows: list[dict[str, Any]], folder: Path, lora: Any = None, **fields: Any) -> Recorder:
    """TRL as it comes, but in float32, without checkpointing, and saying nothing."""
    usual: dict[str, Any] = dict(
        output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        save_strategy="no", disable_tqdm=True, max_length=CONTEXT, per_device_train_batch_size=len(rows),
        train_sampling_strategy="sequential", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Recorder(
        model=copy.deepcopy(sides.theirs), args=trl.SFTConfig(**usual | fields), processing_class=sides.their_tok,
        train_dataset=datasets.Dataset.from_list(rows, **JSON), peft_config=lora,
    )  # fmt: skip
    trainer.counts, trainer.losses = [], []
    return trainer


def prepared(trainer: Recorder) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each example, as TRL made them."""
    return [(list(row["input_ids"]), list(row["labels"])) for row in trainer.train_dataset]


def ours_prepared(examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
    return [(one.ids.tolist(), np.where(one.learn, one.ids, IGNORED).tolist()) for one in examples]


def encoded(tok: Tokenizer, talks: Sequence[Conversation]) -> list[Example]:
    return list(Encoding(tok, CONTEXT).examples(talks))


def tensors(batch: TokenBatch) -> TokenBatch:
    return TokenBatch(*map(torch.from_numpy, batch))


def rows_of(examples: Sequence[Example], packing: Any = "padded", context: int = CONTEXT) -> TokenBatch:
    """All examples, once."""
    loader = ExampleLoader(examples, context, 1, 5, packing)
    return tensors(loader.samples(0, loader.rows_of_epoch()))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def by_our_names(
    theirs: Any, values: Mapping[str, Tensor], folder: Path, base: Path | None = None
) -> dict[str, Tensor]:
    """Values of their parameters, such as gradients, by our names: saved in the place of weights, and loaded here.

    Args:
        base: the model, where theirs is an adapter on it.
    """
    other = copy.deepcopy(theirs)
    for name, parameter in other.named_parameters():
        if name in values:
            parameter.copy_(values[name])
    other.save_pretrained(folder)
    if base is None:
        return {name: p.detach() for name, p in load_model(folder).named_parameters()}
    model = load_adapter(load_model(base), folder, trainable=True)
    return {name: p.detach() for name, p in trainable_parameters(model).items()}


def assert_alike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Each to 1e-5 of the largest number in it."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        largest = tensor.abs().max()
        if name.endswith("attention.k.bias"):  # the softmax does not see what all scores have in common: rounding alone
            largest = expected[name.replace(".k.", ".q.")].abs().max()
        assert largest > 0, name
        assert (found[name] - tensor).abs().max() <= 1e-5 * largest, name


def lora_of(family: str, kind: Mapping[str, bool]) -> Any:
    transposed = family == "gpt2"
    return peft.LoraConfig(
        r=5, lora_alpha=7, target_modules=TARGETS[family], task_type="CAUSAL_LM", fan_in_fan_out=transposed, **kind
    )


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """An adapter as after training: no B is 0, no magnitude that of its row."""
    torch.manual_seed(19)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.1 * torch.randn_like(parameter))
        elif "magnitude_vector" in name:
            parameter.mul_(0.5 + torch.rand_like(parameter))
