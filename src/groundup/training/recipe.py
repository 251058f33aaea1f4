"""What a run can be told: the keys that all kinds have, and those of pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from groundup.data import CorpusRecipe, LoaderRecipe
from groundup.model import ModelConfig
from groundup.optim import OptimConfig
from groundup.runtime import UsageError
from groundup.runtime.monitor import WORLD_GRAMS_PER_KWH


class RunKeys(Protocol):
    """The keys that runs of every kind have; what each means is said once more in the help of the recipe that has it.

    Recipes have these fields and do not inherit them: a dataclass puts inherited fields first, where help and
    recipe.yaml show keys in an order that suits the kind of run.
    """

    @property
    def seed(self) -> int:
        """Of everything random."""

    @property
    def device(self) -> str:
        """``auto``, or a device's name."""

    @property
    def precision(self) -> Literal["auto", "float32", "tf32", "bfloat16", "float16"]:
        """Of the forward pass."""

    @property
    def attention(self) -> Literal["auto", "explicit", "sdpa", "flex"]:
        """The attention backend."""

    @property
    def compile(self) -> bool | None:
        """Whether blocks are compiled; None where that is still to be tried."""

    @property
    def checkpointing(self) -> Literal["auto", "none", "selective", "block"]:
        """What of the activations is computed again."""

    @property
    def parallel(self) -> Literal["auto", "ddp", "fsdp"]:
        """How several processes share the work."""

    @property
    def rank_timeout(self) -> float:
        """Seconds after which a process counts as lost."""

    @property
    def minutes(self) -> float | None:
        """What the run may take."""

    @property
    def max_steps(self) -> int | None:
        """Optimizer steps of the run."""

    @property
    def batch_tokens(self) -> int | None:
        """Positions of an optimizer step."""

    @property
    def micro_batch(self) -> int | None:
        """Samples that pass through the model at once."""

    @property
    def log_every(self) -> int:
        """Steps between rows of metrics."""

    @property
    def save_every(self) -> int | None:
        """Steps between checkpoints."""

    @property
    def eval_every(self) -> int | None:
        """Steps between evaluations."""

    @property
    def early_stop(self) -> int:
        """Evaluations without a better loss before the run ends; 0 for never."""

    @property
    def patience(self) -> int:
        """Steps in a row without finite gradients before the run goes back."""

    @property
    def keep(self) -> int:
        """Checkpoints kept besides the best."""

    @property
    def keep_every(self) -> int | None:
        """Checkpoints at multiples of so many steps are kept for good."""

    @property
    def track(self) -> Sequence[str]:
        """Where metrics go besides metrics.jsonl."""

    @property
    def profile(self) -> str | None:
        """Steps to trace."""

    @property
    def monitor_every(self) -> float:
        """Seconds between looks at the hardware; 0 for none."""

    @property
    def watts(self) -> float | None:
        """What the machine draws, where a meter says it."""

    @property
    def grams_per_kwh(self) -> float:
        """CO2 of the electricity."""

    @property
    def resume(self) -> bool:
        """Whether a run that is there may be gone on with."""

    @property
    def optim(self) -> OptimConfig:
        """The optimizer and its schedule."""


def check_run_keys(recipe: RunKeys) -> None:
    """Refuse what no kind of run can do.

    Raises:
        UsageError: a number is out of its range.
    """
    for name, least in (("log_every", 1), ("save_every", 1), ("eval_every", 1), ("keep_every", 1), ("patience", 1)):
        value = getattr(recipe, name)
        if value is not None and value < least:
            raise UsageError(f"{name} = {value} must be at least {least}.")
    for name in ("early_stop", "monitor_every"):
        if not getattr(recipe, name) >= 0:
            raise UsageError(f"{name} = {getattr(recipe, name)} must not be negative.")
    if not recipe.rank_timeout > 0:
        raise UsageError(f"rank_timeout = {recipe.rank_timeout} must be above 0 seconds.")


@dataclass(frozen=True)
class TokenizerRecipe:
    """Which tokenizer the run uses.

    Args:
        vocab_size: size of the vocabulary to train; derived from the size of the text when not given
        pattern: how text is cut before merging: gpt2, gpt4, o200k or a regular expression
        path: a tokenizer to use instead of training one: a folder or a tokenizer.json
        algorithm: bpe; or bytes, characters or words, each of which is a token then
    """

    vocab_size: int | None = None
    pattern: str = "gpt4"
    path: str | None = None
    algorithm: Literal["bpe", "bytes", "characters", "words"] = "bpe"


@dataclass(frozen=True)
class LossRecipe:
    """The loss on the next token.

    Args:
        label_smoothing: of the target's probability, how much is spread over all tokens
        z_loss: weight of the squared logarithm of the softmax's denominator, such as 1e-4
        chunk: positions whose logits are held at once; 0 chooses
        further_weight: weight of the loss on further tokens, where model.n_predict asks for some
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk: int = 0
    further_weight: float = 0.3

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UsageError(f"loss.label_smoothing = {self.label_smoothing} must be at least 0 and below 1.")
        for name in ("z_loss", "chunk", "further_weight"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"loss.{name} = {getattr(self, name)} must not be negative.")


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
        data: the text: a file, a folder, stdlib, a named source, or hf:owner/name; or several, each with a name, as in
            "web=hf:owner/name, code=src", whose shares loader.mixture gives
        out: the run folder
        data_dir: where downloads are kept
        limit: read at most this many documents
        seed: seed of everything random
        device: auto, cpu, cuda, cuda:1, mps
        precision: what the forward pass computes in; weights stay float32; auto tries
        attention: the attention backend; auto tries
        compile: compile the model's blocks with torch.compile; null tries it in runs long enough for it to pay
        checkpointing: what of the activations is computed again instead of kept; auto keeps all while memory lasts
        parallel: how several processes (torchrun) share the work: each with the whole model, or a part; auto is ddp
        rank_timeout: seconds after which a process that does not answer counts as lost
        init_from: the model to go on from: a run, a checkpoint, a Hugging Face folder; its tokenizer is taken too
        depth: the one dial: number of layers, from which width, heads, batch and learning rate follow
        budget: what to spend: time (90s, 5m, 2h) or compute (2e15flops)
        minutes: the same as a budget of time
        max_steps: number of optimizer steps; decides over minutes and budget (a flag decides over a file)
        batch_tokens: tokens per optimizer step
        micro_batch: sequences that pass through the model at once
        log_every: steps between rows of metrics
        save_every: steps between checkpoints; null for ten times over the run
        eval_every: steps between evaluations that save only what is the best so far; null for at checkpoints alone
        early_stop: evaluations without a better held-out loss before the run ends; 0 for never
        patience: steps in a row with gradients that are not finite before the run goes back to its last checkpoint
        eval_tokens: held-out tokens looked at on the way (the final evaluation takes all)
        keep: checkpoints kept besides the best
        keep_every: checkpoints at multiples of so many steps are kept for good
        track: where metrics go besides metrics.jsonl: tensorboard, wandb, mlflow
        profile: steps to trace with PyTorch's profiler, such as 10:15
        monitor_every: seconds between looks at processor, memory and power; 0 for none
        watts: what the machine draws, where a meter says it; else what processor and GPU report
        grams_per_kwh: CO2 of the electricity; by default the world's mean (IEA 2025)
        resume: go on where the run folder stopped; false refuses a folder that holds a run
        tokenizer: the tokenizer
        corpus: how the text is cleaned and split
        loader: how it is dealt out
        loss: what is learnt
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
    precision: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "explicit", "sdpa", "flex"] = "auto"
    compile: bool | None = None
    checkpointing: Literal["auto", "none", "selective", "block"] = "auto"
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    rank_timeout: float = 600.0
    init_from: str | None = None
    depth: int | None = None
    budget: str | None = None
    minutes: float | None = None
    max_steps: int | None = None
    batch_tokens: int | None = None
    micro_batch: int | None = None
    log_every: int = 10
    save_every: int | None = None
    eval_every: int | None = None
    early_stop: int = 0
    patience: int = 5
    eval_tokens: int = 65_536
    keep: int = 2
    keep_every: int | None = None
    track: list[Literal["tensorboard", "wandb", "mlflow"]] = field(default_factory=lambda: ["tensorboard"])
    profile: str | None = None
    monitor_every: float = 10.0
    watts: float | None = None
    grams_per_kwh: float = WORLD_GRAMS_PER_KWH
    resume: bool = True
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    corpus: CorpusRecipe = field(default_factory=CorpusRecipe)
    loader: LoaderRecipe = field(default_factory=LoaderRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    sample: SampleRecipe = field(default_factory=SampleRecipe)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        check_run_keys(self)


# Changing one of these makes another run: its weights, its text or its order would not be those of the checkpoint.
FIXED: tuple[str, ...] = ("model.", "tokenizer.", "corpus.", "data", "limit", "seed", "batch_tokens")
FIXED += ("optim.optimizer", "optim.rules")
FIXED += ("loader.packing", "loader.fim_rate", "loader.fim_spm_rate", "loader.mixture", "loader.schedule")
