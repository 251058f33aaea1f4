"""What a pretraining run can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from groundup.data import CorpusRecipe
from groundup.model import ModelConfig
from groundup.optim import OptimConfig


@dataclass(frozen=True)
class TokenizerRecipe:
    """Which tokenizer the run uses.

    Args:
        vocab_size: size of the vocabulary to train; derived from the size of the text when not given
        pattern: how text is cut before merging: gpt2, gpt4, o200k or a regular expression
        path: a tokenizer to use instead of training one: a folder or a tokenizer.json
    """

    vocab_size: int | None = None
    pattern: str = "gpt4"
    path: str | None = None


@dataclass(frozen=True)
class SampleRecipe:
    """What the model is asked to write at each checkpoint.

    Args:
        prompts: texts to continue; when there are none, the model continues the start of a held-out document
        temperatures: each prompt is continued once at each of these
        max_tokens: length of a sample
    """

    prompts: list[str] = field(default_factory=list)
    temperatures: list[float] = field(default_factory=lambda: [0.0, 0.7, 1.0])
    max_tokens: int = 120


@dataclass(frozen=True)
class PretrainRecipe:
    """A pretraining run; what is null is derived from the text, the machine and the budget, and printed.

    Args:
        data: the text: a file, a folder, stdlib, a named source, or hf:owner/name
        out: the run folder
        data_dir: where downloads are kept
        limit: read at most this many documents
        seed: seed of everything random
        device: auto, cpu, cuda, cuda:1, mps
        precision: what the forward pass computes in; weights stay float32; auto tries
        attention: the attention backend; auto tries
        compile: compile the model with torch.compile
        depth: the one dial: number of layers, from which width, heads, batch and learning rate follow
        budget: what to spend: time (90s, 5m, 2h) or compute (2e15flops)
        minutes: the same as a budget of time
        max_steps: number of optimizer steps; decides over minutes and budget (a flag decides over a file)
        batch_tokens: tokens per optimizer step
        micro_batch: sequences that pass through the model at once
        log_every: steps between rows of metrics
        save_every: steps between checkpoints; null for ten times over the run
        eval_tokens: held-out tokens looked at on the way (the final evaluation takes all)
        keep: checkpoints kept besides the best
        resume: go on where the run folder stopped; false refuses a folder that holds a run
        tokenizer: the tokenizer
        corpus: how the text is cleaned and split
        sample: what the model writes on the way
        model: the model's shape and parts
        optim: the optimizer and its schedule
    """

    data: str = "stdlib"
    out: str = "runs/pretrain"
    data_dir: str | None = None
    limit: int | None = None
    seed: int = 1337
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Literal["auto", "explicit", "sdpa", "flex"] = "auto"
    compile: bool = False
    depth: int | None = None
    budget: str | None = None
    minutes: float | None = None
    max_steps: int | None = None
    batch_tokens: int | None = None
    micro_batch: int | None = None
    log_every: int = 10
    save_every: int | None = None
    eval_tokens: int = 65_536
    keep: int = 2
    resume: bool = True
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    corpus: CorpusRecipe = field(default_factory=CorpusRecipe)
    sample: SampleRecipe = field(default_factory=SampleRecipe)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
