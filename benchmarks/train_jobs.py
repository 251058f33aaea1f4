"""What one contender of the training benchmark does in a process of its own: so many optimizer steps, timed.

    python benchmarks/train_jobs.py     jobs as lines of JSON on standard input, for each a line on standard output

All train a model of the same size on the same batches with AdamW (fused, for everybody), gradients clipped at 1: ours
through the loop, objective and optimizers of ``groundup pretrain``, the others through a loop that does nothing else.
``our_training`` is the one place that knows how our loop is driven.
"""

# B batch   T positions   V vocabulary

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from attention_jobs import Job, forget_peak, peak, serve, settle
from peers.gpt import GPT, GPTConfig
from peers.loop import Settings, adamw
from peers.loop import step as plain_step
from torch import Tensor, nn

from groundup.data import TokenBatch
from groundup.model import ModelConfig, Transformer, explain, fastest_backend
from groundup.optim import OptimConfig, build_optimizers
from groundup.optim.config import OptimizerName
from groundup.runtime.device import Precision, autocast, choose_precision, keep_freed_memory, matmul_flops
from groundup.runtime.interrupt import StopRequest
from groundup.training import Loop, LoopHooks, LoopSettings, NextToken
from groundup.training.parallel import compile_blocks
from groundup.training.scaling import optimizer_for

BATCHES = 8  # different ones, in turn: enough that none is learnt by heart within a measurement
WARM = 2  # steps that do not count: the first compiles and makes the optimizer's state, the second touches what is left


@dataclass
class Clock:
    """Notes when each step ended; called after every one.

    Args:
        device: is waited for before the clock is read.
        steps: so many are made in all.
        batch: of ids, by number.
    """

    device: torch.device
    steps: int
    batch: Callable[[int], tuple[Tensor, Tensor]]
    ends: list[float] = field(default_factory=list)
    before: int | None = None
    loss: Tensor | None = None

    def start(self) -> None:
        """Begin to count."""
        settle(self.device)
        self.ends.append(time.perf_counter())

    def __call__(self) -> None:
        """A step has ended."""
        settle(self.device)
        self.ends.append(time.perf_counter())
        if len(self.ends) == WARM + 1:
            forget_peak(self.device)

    @property
    def seconds(self) -> list[float]:
        """Of each step, the first ones included."""
        return [end - begin for begin, end in zip(self.ends, self.ends[1:], strict=False)]


Trainer = Callable[[Job, Precision, bool, Clock], tuple[nn.Module, float]]


def train_job(job: Job) -> Job:
    """Seconds of each step, or the most bytes held at once; the loss before the last step, for comparison."""
    device = torch.device(job["device"])
    package = job["contender"].partition(", ")[0]
    precision, compiled = way_of(job, package, device)
    # Of matrices large enough to be the ceiling, and only where times are measured: it needs memory of its own.
    ceiling = matmul_flops(device, precision) if job["measure"] == "time" else 0.0
    torch.manual_seed(1337)
    clock = Clock(device, WARM + job["steps"], partial(batch_of, job, device))
    before = forget_peak(device)
    model, loss = TRAINERS[package](job, precision, compiled, clock)
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "precision": precision, "compiled": compiled, "loss": loss, "ceiling": ceiling,
    }  # fmt: skip
    if job["measure"] == "memory":
        return result | {"bytes": None if before is None else peak(device) - before}
    return result | {
        "first": clock.seconds[0],
        "seconds": clock.seconds[WARM:],
        "flops_per_token": explain(our_config(job)).training_flops_per_token,
    }


def way_of(job: Job, package: str, device: torch.device) -> tuple[Precision, bool]:
    """Precision and compiling: as asked for, or ``as it comes``: what the package does when it is told nothing."""
    if job["way"] != "as it comes":
        precision, _, compiled = job["way"].partition(", ")
        return ("bfloat16" if precision == "bfloat16" else "float32"), compiled == "compiled"
    gpu = device.type == "cuda"
    narrow = gpu and torch.cuda.is_bf16_supported()
    if package == "by hand":  # nanoGPT compiles and narrows on a GPU; its README turns both off on a CPU
        return ("bfloat16" if narrow else "float32"), gpu
    if package == "litgpt":  # litgpt/pretrain.py: bf16-mixed and torch.compile everywhere
        return "bfloat16", True
    if package == "transformers":  # the Trainer's bf16, fp16 and torch_compile are all off
        return "float32", False
    size = job["size"]
    rows = size["batch"] * size["context"]
    return choose_precision("auto", device, rows=rows, width=size["n_embd"]), False


def batch_of(job: Job, device: torch.device, number: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets B T of a step, the same for all contenders; copied to the device at every step."""
    size = job["size"]
    generator = torch.Generator().manual_seed(100 + number % BATCHES)
    ids_BT = torch.randint(size["vocab_size"], (size["batch"], size["context"] + 1), generator=generator)
    return ids_BT[:, :-1].contiguous().to(device), ids_BT[:, 1:].contiguous().to(device)


# ---- ours


def our_config(job: Job) -> ModelConfig:
    """The model of the job's shape: GPT-2's parts, or Llama's, the head tied in both."""
    size, shape = job["size"], job["contender"].split(", ")[1]
    fields: dict[str, Any] = {
        "vocab_size": size["vocab_size"], "context_length": size["context"],
        "n_layer": size["n_layer"], "n_head": size["n_head"], "n_embd": size["n_embd"],
        "qk_norm": False, "norm_eps": 1e-5,
    }  # fmt: skip
    if shape == "GPT-2":
        fields |= {"norm": "layernorm", "positions": "learned", "feed_forward": "gelu", "bias": True}
    return ModelConfig.from_dict(fields)


class _Hooks(LoopHooks):
    """Tells the clock of steps, keeps the last loss."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.loss = clock, float("nan")

    def after_step(self, step: int) -> None:
        """A step was made."""
        self.clock()

    def on_log(self, row: dict[str, Any]) -> None:
        """A row of metrics."""
        self.loss = row["loss"]


def our_training(job: Job, precision: Precision, compiled: bool, clock: Clock) -> tuple[nn.Module, float]:
    """The loop of ``groundup pretrain``, as it is, without a run folder."""
    keep_freed_memory()  # as that command does; where memory is measured, the allocator's settings are given already
    size, config, device = job["size"], our_config(job), clock.device
    model = Transformer(config).to(device)
    dtype = getattr(torch, precision)
    model.backend = fastest_backend(config, size["batch"], device, dtype)
    if compiled:
        compile_blocks(model)
    name: OptimizerName = "muon" if "Muon" in job["contender"] else "adamw"
    if job["way"] == "as it comes":
        name, _ = optimizer_for(config, size["batch"] * size["context"])
    optim = OptimConfig(optimizer=name, learning_rate=1e-3, warmup_steps=1, schedule="constant")
    hooks = _Hooks(clock)
    settings = LoopSettings(
        batch_tokens=size["batch"] * size["context"], accumulate=1, micro_batch=size["batch"], max_steps=clock.steps,
        seconds=None, log_every=10, save_every=clock.steps, precision=precision,
    )  # fmt: skip
    loop = Loop(
        model, NextToken(), lambda number: TokenBatch(*clock.batch(number)), build_optimizers(model, optim, dtype),
        optim, settings, hooks,
    )  # fmt: skip
    clock.start()
    loop.run(StopRequest())
    return model, hooks.loss


# ---- theirs


def plain_training(
    model: nn.Module, loss_of: Callable[[Any, Tensor, Tensor], Tensor], job: Job, precision: Precision,
    compiled: bool, clock: Clock,
) -> tuple[nn.Module, float]:  # fmt: skip
    """The plain loop around any model that gives a loss."""
    model.to(clock.device).train()
    worker = torch.compile(model) if compiled else model
    optimizer = adamw(model, Settings(), fused=True)
    clock.start()
    for number in range(clock.steps):
        inputs_BT, targets_BT = clock.batch(number)
        loss = plain_step(
            model, optimizer, lambda inputs=inputs_BT, targets=targets_BT: loss_of(worker, inputs, targets),
            autocast(clock.device, precision),
        )  # fmt: skip
        clock()
    return model, loss.item()


def by_hand(job: Job, precision: Precision, compiled: bool, clock: Clock) -> tuple[nn.Module, float]:
    """The plain GPT of peers/gpt.py."""
    size = job["size"]
    model = GPT(GPTConfig(size["vocab_size"], size["context"], size["n_layer"], size["n_head"], size["n_embd"]))
    return plain_training(model, lambda run, ids, targets: run(ids, targets)[1], job, precision, compiled, clock)


def transformers_training(job: Job, precision: Precision, compiled: bool, clock: Clock) -> tuple[nn.Module, float]:
    """GPT-2 or Llama of transformers, with PyTorch's fused attention and no dropout."""
    size, config = job["size"], our_config(job)
    if job["contender"].split(", ")[1] == "GPT-2":
        shape: Any = transformers.GPT2Config(
            vocab_size=size["vocab_size"], n_positions=size["context"], n_embd=size["n_embd"], n_layer=size["n_layer"],
            n_head=size["n_head"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    else:
        shape = transformers.LlamaConfig(
            vocab_size=size["vocab_size"], max_position_embeddings=size["context"], hidden_size=size["n_embd"],
            num_hidden_layers=size["n_layer"], num_attention_heads=size["n_head"], intermediate_size=config.ff_dim,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa")

    def loss_of(run: Any, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = run(ids_BT, use_cache=False).logits
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())

    return plain_training(model, loss_of, job, precision, compiled, clock)


def litgpt_training(job: Job, precision: Precision, compiled: bool, clock: Clock) -> tuple[nn.Module, float]:
    """litgpt's model in the shape of GPT-2 (but for positions: it knows rotary ones alone) or Llama, and its loss."""
    from litgpt import config as their_config
    from litgpt import model as their_model
    from litgpt.utils import chunked_cross_entropy

    size, config = job["size"], our_config(job)
    common = dict(
        block_size=size["context"], n_layer=size["n_layer"], n_head=size["n_head"], n_embd=size["n_embd"],
        vocab_size=size["vocab_size"], padded_vocab_size=size["vocab_size"], parallel_residual=False,
        intermediate_size=config.ff_dim,
    )  # fmt: skip
    llama = dict(rotary_percentage=1.0, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP")
    gpt2 = dict(rotary_percentage=0.25, bias=True, norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP")
    shape = gpt2 if job["contender"].split(", ")[1] == "GPT-2" else llama
    model = their_model.GPT(their_config.Config(**common, **shape))
    model.transformer.wte.weight = model.lm_head.weight
    for parameter in model.parameters():
        if parameter.dim() >= 2:  # its modules begin as PyTorch's do: embeddings, and so a tied head, far too large
            nn.init.normal_(parameter, std=0.02)

    def loss_of(run: Any, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return chunked_cross_entropy(run(ids_BT), targets_BT)

    return plain_training(model, loss_of, job, precision, compiled, clock)


TRAINERS: dict[str, Trainer] = {
    "groundup": our_training,
    "by hand": by_hand,
    "transformers": transformers_training,
    "litgpt": litgpt_training,
}


def main() -> None:
    """Take jobs until there are no more."""
    if importlib.util.find_spec("litgpt") is not None:
        importlib.import_module("litgpt.model")
    for name in ("gpt2", "llama"):
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    gc.collect()
    gc.freeze()  # half a second of collecting what the libraries made would fall on one step or another
    serve({"train": train_job})


if __name__ == "__main__":
    main()
