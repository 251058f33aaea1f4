"""What a fine-tuning run can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from groundup.optim import OptimConfig
from groundup.runtime import UsageError
from groundup.runtime.monitor import WORLD_GRAMS_PER_KWH
from groundup.training.recipe import check_run_keys


@dataclass(frozen=True)
class ExamplesRecipe:
    """Examples to learn answers from, for the task sft.

    Args:
        form: alpaca, sharegpt, messages, prompt-completion or text; auto looks at the first record
        template: the chat template: chatml, hermes, llama2, llama3, alpaca, vicuna or Jinja source; null takes the
            model's own, and where it has none chatml, or hermes for examples that call tools
        turns: learn every answer of the assistant, or the last one
        packing: best_fit puts several examples into a row, padded one; the loss is the same
        least_tokens: leave out examples of which fewer tokens are learnt
        most_tokens: leave out examples of which more tokens are learnt
        duplicates: leave out repeated examples
        near_duplicates: share of runs of five words from which on two examples count as the same, such as 0.8; null for
            exact repeats alone
        check_template: refuse examples of which the template would leave something out
        curriculum: what is learnt first within an epoch: short examples (length), those that the model finds easy
            (loss), or those with a small number in a column
        curriculum_column: that column
        curriculum_model: the model whose loss says what is easy; null for the one that is fine-tuned
        neftune: alpha of the noise on embeddings, such as 5 (Jain et al. 2023); 0 for none
    """

    form: Literal["auto", "alpaca", "sharegpt", "messages", "prompt-completion", "text"] = "auto"
    template: str | None = None
    turns: Literal["all", "last"] = "all"
    packing: Literal["best_fit", "padded"] = "best_fit"
    least_tokens: int = 1
    most_tokens: int | None = None
    duplicates: bool = True
    near_duplicates: float | None = None
    check_template: bool = True
    curriculum: Literal["none", "length", "loss", "column"] = "none"
    curriculum_column: str | None = None
    curriculum_model: str | None = None
    neftune: float = 0.0

    def __post_init__(self) -> None:
        if self.near_duplicates is not None and not 0.0 < self.near_duplicates <= 1.0:
            raise UsageError(f"examples.near_duplicates = {self.near_duplicates} must be above 0 and at most 1.")
        if (self.curriculum == "column") != (self.curriculum_column is not None):
            raise UsageError("examples.curriculum = column needs examples.curriculum_column, and the other way round.")
        if self.curriculum_model is not None and self.curriculum != "loss":
            raise UsageError("examples.curriculum_model is for examples.curriculum = loss.")
        for name in ("least_tokens", "neftune"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"examples.{name} = {getattr(self, name)} must not be negative.")


@dataclass(frozen=True)
class ClassesRecipe:
    """Texts to sort into classes, for the task classify.

    Args:
        test: labelled texts to measure on at the end; null holds out test_fraction
        test_fraction: of the texts of each class, held out where there is no test
        pooling: what of a text is looked at: its last token, or the mean of all
        replace: part of the words that are replaced by synonyms in an augmented copy
        swap: swaps of two words in it, as a part of its words
        delete: part of its words that are left out
        shuffle_sentences: whether its sentences come in another order
        copies: augmented copies of each text to learn from; 0 for none
        thesaurus: a WordNet on this machine (its folder dict, or a file of synsets), for replace
        calibrate: whether a temperature is found, on what is held out for choosing, that makes probabilities honest
        learning_curve: parts of the texts on which further models are trained, to see what more texts would bring
        pretraining_curve: also train from this many earlier checkpoints of the run that init_from names, to see what
            more pretraining would bring; 0 for none
    """

    test: str | None = None
    test_fraction: float = 0.2
    pooling: Literal["last", "mean"] = "mean"
    replace: float = 0.1
    swap: float = 0.1
    delete: float = 0.1
    shuffle_sentences: bool = False
    copies: int = 0
    thesaurus: str | None = None
    calibrate: bool = True
    learning_curve: list[float] = field(default_factory=lambda: [0.1, 0.3])
    pretraining_curve: int = 0

    def __post_init__(self) -> None:
        for part in self.learning_curve:
            if not 0.0 < part < 1.0:
                raise UsageError(f"classes.learning_curve: {part} must be above 0 and below 1.")
        for name in ("copies", "pretraining_curve"):
            if getattr(self, name) < 0:
                raise UsageError(f"classes.{name} = {getattr(self, name)} must not be negative.")


@dataclass(frozen=True)
class AdapterRecipe:
    """Adapters on a model that stays as it is.

    Args:
        method: full trains the model itself; lora and dora train small matrices beside its layers
        rank: width of those matrices
        alpha: they are scaled by alpha / rank
        dropout: of their input
        targets: patterns of the layers that get some, such as q or blocks.*
        rslora: scale by alpha / sqrt(rank)
        base: the frozen weights as they are, or in int8, int4 or nf4 (lora over nf4 is QLoRA)
        double: nf4: the scales in eight bits too
        resume_from: an adapter to go on from: a folder of PEFT's format
    """

    method: Literal["full", "lora", "dora"] = "full"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["blocks.*"])
    rslora: bool = False
    base: Literal["as-is", "int8", "int4", "nf4"] = "as-is"
    double: bool = False
    resume_from: str | None = None

    def __post_init__(self) -> None:
        if self.method == "full" and self.base != "as-is":
            raise UsageError(f"adapter.base = {self.base} needs adapters: quantized weights cannot be trained. "
                             "Give --adapter.method lora.")  # fmt: skip
        if self.method == "full" and self.resume_from is not None:
            raise UsageError("adapter.resume_from needs adapter.method = lora or dora.")
        if self.double and self.base != "nf4":
            raise UsageError(f"adapter.double is for adapter.base = nf4, not {self.base}.")


@dataclass(frozen=True)
class LayersRecipe:
    """Which layers learn, and how fast.

    Args:
        frozen: blocks, from the first, that are not trained
        frozen_embeddings: whether the embeddings are not trained
        decay: the learning rate of each block is this times that of the one above it; 1 for the same everywhere
    """

    frozen: int = 0
    frozen_embeddings: bool = False
    decay: float = 1.0


@dataclass(frozen=True)
class ObjectiveRecipe:
    """The loss.

    Args:
        label_smoothing: of the target's probability, how much is spread over all tokens or classes
        z_loss: sft: weight of the squared logarithm of the softmax's denominator
        chunk: sft: positions whose logits are held at once; 0 chooses
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk: int = 0


@dataclass(frozen=True)
class MeasureRecipe:
    """What is measured before and after.

    Args:
        answers: held-out examples that the model answers before and after, to be compared with the given answers; 0 for
            none
        max_tokens: length of such an answer
        pattern: a regular expression that answers should fit as a whole
        json: whether answers should be JSON
        text: text that the model knew before, to see what it forgets: a file, a folder, a named source; null takes what
            the run that init_from names held out
        text_tokens: at most so many of its tokens
    """

    answers: int = 16
    max_tokens: int = 128
    pattern: str | None = None
    json: bool = False
    text: str | None = None
    text_tokens: int = 16_384


@dataclass(frozen=True)
class FinetuneRecipe:
    """A fine-tuning run; what is null is derived from the model, the data and the machine, and printed.

    Args:
        task: sft learns to answer as the examples do, classify to sort texts into classes
        init_from: the model to go on from: a run, a checkpoint, a Hugging Face folder, hf:owner/name
        data: the examples or labelled texts: a file (JSON, JSONL, CSV, TSV, Parquet), a folder,
            hf:owner/name, or a name (stdlib; for classify also imdb, imdb-test, sms-spam)
        val: examples to measure on during training; null holds out val_fraction
        val_fraction: part of the data that is held out where there is no val
        out: the run folder
        columns: what a field is called in the file, such as {prompt: question, completion: answer} (sft) or {text:
            review, label: stars} (classify); found out by looking where it can be
        too_long: what becomes of an example longer than the context: refuse ends with a line that names it, cut keeps
            its beginning, drop leaves it out, split (classify) makes pieces whose scores are averaged; auto is refuse
            for sft, for classify split, or cut where classes.pooling = last
        limit: read at most this many records
        skip_bad: leave out records that cannot be used, and count them; otherwise the first one ends the run
        seed: seed of everything random
        device: auto, cpu, cuda, cuda:1, mps
        precision: what the forward pass computes in; auto tries
        attention: the attention backend; auto tries
        compile: compile the model's blocks with torch.compile
        checkpointing: what of the activations is computed again instead of kept
        parallel: how several processes (torchrun) share the work: each with the whole model, or a part; auto is ddp
        rank_timeout: seconds after which a process that does not answer counts as lost
        epochs: passes over the data
        minutes: train for so long instead
        max_steps: number of optimizer steps; decides over epochs and minutes
        context_length: positions of a row; null for what the data needs and the model has
        batch_size: rows (sft) or texts (classify) per optimizer step
        micro_batch: of these, how many pass through the model at once
        log_every: steps between rows of metrics
        save_every: steps between checkpoints; null for at the end of each epoch
        eval_every: steps between evaluations that save only what is the best so far; null for at checkpoints alone
        early_stop: evaluations without a better held-out loss before the run ends; 0 for never
        patience: steps in a row with gradients that are not finite before the run goes back to its last checkpoint
        keep: checkpoints kept besides the best
        keep_every: checkpoints at multiples of so many steps are kept for good
        track: where metrics go besides metrics.jsonl: tensorboard, wandb, mlflow
        profile: steps to trace with PyTorch's profiler, such as 10:15
        monitor_every: seconds between looks at processor, memory and power; 0 for none
        watts: what the machine draws, where a meter says it; else what processor and GPU report
        grams_per_kwh: CO2 of the electricity; by default the world's mean (IEA 2025)
        resume: go on where the run folder stopped; false refuses a folder that holds a run
        examples: sft: the examples
        classes: classify: the labelled texts
        adapter: what is trained: the model itself, or adapters on it
        layers: which layers learn, and how fast
        loss: the loss
        measure: what is measured before and after
        optim: the optimizer and its schedule
    """

    task: Literal["sft", "classify"] = "sft"
    init_from: str | None = None
    data: str | None = None
    val: str | None = None
    val_fraction: float = 0.1
    out: str = "runs/finetune"
    columns: dict[str, str] = field(default_factory=dict)
    too_long: Literal["auto", "refuse", "cut", "drop", "split"] = "auto"
    limit: int | None = None
    skip_bad: bool = False
    seed: int = 1337
    device: str = "auto"
    precision: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "explicit", "sdpa", "flex"] = "auto"
    compile: bool | None = False
    checkpointing: Literal["auto", "none", "selective", "block"] = "auto"
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    rank_timeout: float = 600.0
    epochs: float = 3.0
    minutes: float | None = None
    max_steps: int | None = None
    context_length: int | None = None
    batch_size: int | None = None
    micro_batch: int | None = None
    log_every: int = 10
    save_every: int | None = None
    eval_every: int | None = None
    early_stop: int = 0
    patience: int = 5
    keep: int = 2
    keep_every: int | None = None
    track: list[Literal["tensorboard", "wandb", "mlflow"]] = field(default_factory=lambda: ["tensorboard"])
    profile: str | None = None
    monitor_every: float = 10.0
    watts: float | None = None
    grams_per_kwh: float = WORLD_GRAMS_PER_KWH
    resume: bool = True
    examples: ExamplesRecipe = field(default_factory=ExamplesRecipe)
    classes: ClassesRecipe = field(default_factory=ClassesRecipe)
    adapter: AdapterRecipe = field(default_factory=AdapterRecipe)
    layers: LayersRecipe = field(default_factory=LayersRecipe)
    loss: ObjectiveRecipe = field(default_factory=ObjectiveRecipe)
    measure: MeasureRecipe = field(default_factory=MeasureRecipe)
    optim: OptimConfig = field(default_factory=OptimConfig)

    @property
    def batch_tokens(self) -> int | None:
        """Positions of an optimizer step."""
        if self.batch_size is None or self.context_length is None:
            return None
        return self.batch_size * self.context_length

    @property
    def long_examples(self) -> Literal["refuse", "cut", "drop"]:
        """What becomes of an example longer than the context, for the task sft."""
        wanted = self.too_long
        return "refuse" if wanted == "auto" or wanted == "split" else wanted

    @property
    def long_texts(self) -> Literal["refuse", "cut", "split"]:
        """What becomes of a text longer than the context that was not dropped, for the task classify."""
        wanted = self.too_long
        if wanted != "auto" and wanted != "drop":
            return wanted
        return "split" if self.classes.pooling == "mean" else "cut"

    def __post_init__(self) -> None:
        check_run_keys(self)
        if self.task == "sft" and self.too_long == "split":
            raise UsageError("too_long = split is for task = classify: an answer in pieces would teach to break off.")
        if self.val is None and not 0.0 <= self.val_fraction < 1.0:
            raise UsageError(f"val_fraction = {self.val_fraction} must be at least 0 and below 1.")
        if not self.epochs > 0:
            raise UsageError(f"epochs = {self.epochs} must be above 0.")
        for name in ("batch_size", "micro_batch", "context_length", "max_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} = {value} must be at least 1.")
