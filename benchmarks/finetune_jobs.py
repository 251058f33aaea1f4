"""What one contender of the fine-tuning benchmark does in a process of its own; see finetune.py.

    python benchmarks/finetune_jobs.py    jobs as lines of JSON on standard input, for each a line on standard output

All learn the same answers of the same conversations, from the same weights, with fused AdamW and gradients clipped at
1. ``ours`` is the one place that knows how fine-tuning here is driven.
"""

# B batch   T positions

from __future__ import annotations

import gc
import importlib.util
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from attention_jobs import Job, forget_peak, peak, serve
from datasets import Dataset, disable_progress_bars
from trl import SFTConfig, SFTTrainer, pack_dataset

from groundup.data import IGNORED, TokenBatch, open_records
from groundup.model import LoraConfig, add_adapter, load_model, quantize_model
from groundup.optim import OptimConfig, build_optimizers
from groundup.posttraining import Conversation, Encoding, Example, ExampleLoader, read_conversations
from groundup.runtime.device import Precision, choose_precision, keep_freed_memory
from groundup.runtime.interrupt import StopRequest
from groundup.tokenizer import Tokenizer
from groundup.training import Loop, LoopHooks, LoopSettings, NextToken

WARM = 2  # steps that do not count: the first makes the optimizer's state, the second touches what is left
RANK, ALPHA, RATE = 16, 32, 1e-4
THEIR_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CPU = torch.device("cpu")


@dataclass
class Clock:
    """When each step ended, and of how many tokens it was.

    Args:
        tokens: of each step: learnt ones, and all that are no padding.
    """

    ends: list[float] = field(default_factory=list)
    tokens: list[tuple[int, int]] = field(default_factory=list)

    def tick(self) -> None:
        """The training begins, or a step has ended."""
        self.ends.append(time.perf_counter())
        if len(self.ends) == WARM + 1:
            forget_peak(CPU)


# ---- conversations


def talks_of(job: Job) -> list[Conversation]:
    """The conversations of the job's files."""
    found: list[Conversation] = []
    for file in job["files"]:
        records = ((where, plain_record(record)) for where, record in open_records(file, job.get("limit")))
        found += read_conversations(records, skip=lambda dropped: None)
    return found


def plain_record(record: Any) -> Any:
    """Records of Self-Instruct keep input and output in a list of instances, of which the first is taken."""
    return record | record["instances"][0] if isinstance(record, dict) and record.get("instances") else record


def examples_of(job: Job, tokenizer: Tokenizer) -> tuple[list[Example], list[Conversation]]:
    """Those that fit into the context, and the conversations that they are of."""
    encoding, talks = Encoding(tokenizer, job["context"], too_long="drop"), talks_of(job)
    found = [(list(encoding.examples([talk], skip=lambda dropped: None)), talk) for talk in talks]
    return [one[0] for one, _ in found if one], [talk for one, talk in found if one]


def counted(batch: TokenBatch) -> tuple[int, int]:
    """How many tokens of a micro-batch of ours are learnt, and how many there are."""
    learnt, last = batch.targets != IGNORED, batch.documents == batch.documents[:, -1:]
    empty = last & ~(learnt & last).any(axis=1, keepdims=True)  # an example has something to learn
    examples = (batch.documents.max(axis=1) + 1 - empty.any(axis=1)).sum()
    return int(learnt.sum()), int((~empty).sum() + examples)


# ---- ours


class _Hooks(LoopHooks):
    """Tells the clock of steps."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def after_step(self, step: int) -> None:
        """A step was made."""
        self.clock.tick()


def ours(job: Job, clock: Clock) -> None:
    """Fine-tune with what this package has: read, encode, pack, train."""
    keep_freed_memory()  # where memory is measured, the allocator's settings are given already
    tokenizer = Tokenizer.load(job["folder"])
    examples, _ = examples_of(job, tokenizer)
    padded = "padded" in job["contender"]
    rows = job["batch"] if padded else job["rows"]
    loader = ExampleLoader(examples, job["context"], rows, 1337, "padded" if padded else "best_fit")
    model = load_model(Path(job["folder"])).train()
    if "checkpointing" in job["contender"]:
        model.checkpointing = "block"
    if job["method"] == "qlora":
        quantize_model(model, "nf4", double=True)
    if job["method"] != "full":
        add_adapter(model, LoraConfig(RANK, ALPHA, targets=("blocks.*",)))
    wanted = "auto" if job["way"] == "as it comes" else job["way"]
    precision: Precision = choose_precision(wanted, CPU, rows=rows * job["context"], width=model.config.n_embd)
    steps = job["steps"] or -(-loader.rows_of_epoch() // rows)
    optim = OptimConfig(optimizer="adamw", learning_rate=RATE, warmup_steps=0, schedule="linear", grad_clip=1.0)
    settings = LoopSettings(
        batch_tokens=rows * job["context"], accumulate=1, micro_batch=rows, max_steps=steps, seconds=None,
        log_every=10, save_every=steps, precision=precision,
    )  # fmt: skip

    def batch(number: int) -> TokenBatch:
        arrays = loader.batch(number)
        clock.tokens.append(counted(arrays))
        return TokenBatch(*map(torch.from_numpy, arrays))

    optimizers = build_optimizers(model, optim, getattr(torch, precision))
    clock.tick()
    Loop(model, NextToken(), batch, optimizers, optim, settings, _Hooks(clock)).run(StopRequest())


# ---- TRL's


class _Trainer(SFTTrainer):
    """TRL's trainer, whose steps are counted."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """A micro-batch of theirs, after a look at what is in it."""
        there = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        self.seen += np.array([int((inputs["labels"][:, 1:] != IGNORED).sum()), int(there)])
        return super().training_step(model, inputs, num_items_in_batch)


class _Steps(transformers.TrainerCallback):
    """Tells the clock of their steps."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.trainer: Any = None

    def on_train_begin(self, *given: Any, **named: Any) -> None:
        """Everything is made."""
        self.clock.tick()

    def on_step_end(self, *given: Any, **named: Any) -> None:
        """A step was made."""
        self.clock.tokens.append(tuple(self.trainer.seen.tolist()))
        self.trainer.seen[:] = 0
        self.clock.tick()


def theirs(job: Job, clock: Clock) -> None:
    """SFTTrainer, with PEFT's adapters: as it comes, or with what is fastest on a CPU.

    Fastest means: nothing computed twice, a precision that is asked for, and of packed rows one at a time (it makes one
    row of all, whose attention would grow with its square).
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["folder"])
    tokenizer.pad_token = tokenizer.eos_token = "<|endoftext|>"
    _, talks = examples_of(job, Tokenizer.load(job["folder"])) if job["fitting"] else ([], talks_of(job))
    quantized = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if job["way"] == "float32" else torch.bfloat16,
    ) if job["method"] == "qlora" else None  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], quantization_config=quantized)
    packed = "packed" in job["contender"]
    fields: dict[str, Any] = {"per_device_train_batch_size": job["batch"]}
    if job["way"] != "as it comes":
        fields |= {"bf16": job["way"] == "bfloat16", "gradient_checkpointing": "checkpointing" in job["contender"]}
    if packed:
        fields |= {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": job["rows"]}
    if "by length" in job["contender"]:
        fields |= {"train_sampling_strategy": "group_by_length"}
    config = SFTConfig(
        output_dir=job["folder"] + "/their-run", use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        max_steps=job["steps"] or -1, num_train_epochs=1, learning_rate=RATE, max_length=job["context"] + 1,
        assistant_only_loss=True, dataloader_pin_memory=False, **fields,
    )  # fmt: skip
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=THEIR_TARGETS, task_type="CAUSAL_LM")
    steps = _Steps(clock)
    trainer = _Trainer(
        model=model, args=config, processing_class=tokenizer, callbacks=[steps],
        train_dataset=Dataset.from_list([{"messages": talk.messages} for talk in talks]),
        peft_config=None if job["method"] == "full" else lora,
    )  # fmt: skip
    trainer.seen, steps.trainer = np.zeros(2, np.int64), trainer
    trainer.train()


# ---- jobs


def run(job: Job) -> Job:
    """Train, and say how fast, how long in all, and how much was held at most."""
    torch.manual_seed(1337)
    clock, began, before = Clock(), time.perf_counter(), forget_peak(CPU)
    (ours if job["contender"].startswith("groundup") else theirs)(job, clock)
    whole = time.perf_counter() - began
    if job["measure"] == "memory":
        return {"bytes": None if before is None else peak(CPU) - before}
    seconds = clock.ends[-1] - clock.ends[WARM]
    learnt, there = (sum(column) / seconds for column in zip(*clock.tokens[WARM:], strict=True))
    return {
        "learnt": learnt, "tokens": there, "steps": len(clock.tokens), "whole": whole,
        "training": clock.ends[-1] - clock.ends[0],
    }  # fmt: skip


def fill(job: Job) -> Job:
    """How full rows are, here and as TRL packs the same examples."""
    examples, _ = examples_of(job, Tokenizer.load(job["folder"]))
    report = ExampleLoader(examples, job["context"], 1, 1337).report()
    tokens = sum(len(one.ids) for one in examples)
    packed = pack_dataset(Dataset.from_dict({"input_ids": [one.ids for one in examples]}), job["context"] + 1, "bfd")
    return {
        "examples": len(examples), "tokens": tokens, "rows": report["rows"], "filled": 1 - report["padding"],
        "their_rows": len(packed), "their_filled": tokens / (len(packed) * (job["context"] + 1)),
    }  # fmt: skip


def main() -> None:
    """Take jobs until there are no more."""
    disable_progress_bars()
    for name in ("transformers.models.llama.modeling_llama", "trl.trainer.sft_trainer", "bitsandbytes"):
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    serve({"run": run, "fill": fill})


if __name__ == "__main__":
    main()
