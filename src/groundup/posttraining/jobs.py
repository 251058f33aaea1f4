"""What is trained in fine-tuning: a model that answers, or one that sorts texts into classes, whole or by adapters."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from groundup.data import Loader
from groundup.model import Transformer, explain, load_model, quantize_model
from groundup.model.adapter_folder import load_adapter, save_adapter
from groundup.model.adapters import add_adapter
from groundup.posttraining.batches import ExampleLoader
from groundup.posttraining.derive import lora_config
from groundup.posttraining.measure import example_losses
from groundup.posttraining.noise import NoisyEmbeddings
from groundup.posttraining.plan import Finetuning
from groundup.posttraining.vocabulary import resize_embeddings
from groundup.runtime import write_atomic
from groundup.training.job import Job, M, Measured
from groundup.training.objectives import NextToken, Objective
from groundup.training.parallel import equip

FROZEN_SHARE = 2 / 3  # of a training step's operations, where weights get no gradients


def base_model(it: Finetuning, *, weights: bool = True) -> Transformer:
    """The model to go on from, on the CPU: with rows for added tokens, quantized and with adapters as the recipe says.

    Args:
        weights: False for one whose numbers a checkpoint will replace; frozen ones are read all the same.
    """
    recipe, adapter = it.recipe, it.recipe.adapter
    full = adapter.method == "full"
    model = load_model(it.base) if weights or not full else Transformer(it.config)
    if it.added:
        resize_embeddings(model, it.tokenizer.vocab_size, it.tokenizer.vocab_size - len(it.added), seed=recipe.seed)
    if full:
        return equip(model.requires_grad_(True), recipe)
    if adapter.base != "as-is":
        quantize_model(model, adapter.base, double=adapter.double)
    if adapter.resume_from is None:
        add_adapter(model, lora_config(adapter))
    else:
        model.requires_grad_(False)
        load_adapter(model, Path(adapter.resume_from), trainable=True)
    if it.added:  # new tokens mean nothing yet
        model.embedding.weight.requires_grad_(True)
        model.head.weight.requires_grad_(True)
    return equip(model, recipe)


class FinetuningJob(Job[M]):
    """What both tasks have in common."""

    def __init__(self, it: Finetuning) -> None:
        full = it.recipe.adapter.method == "full"
        super().__init__(
            recipe=it.recipe,
            run=it.run,
            values=it.values,
            tokenizer=it.tokenizer,
            device=it.device,
            precision=it.precision,
            positions=it.context_length,
            world=it.world,
            seconds=None if it.recipe.minutes is None else 60.0 * it.recipe.minutes,
            flops_per_token=explain(it.model_config).training_flops_per_token * (1.0 if full else FROZEN_SHARE),
            flops_per_second=it.flops_per_second,
        )
        self.it = it

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained, on a model that stays as it is."""
        return self.it.recipe.adapter.method != "full"


class AnswersJob(FinetuningJob[Transformer]):
    """Learns to answer as the examples do.

    Args:
        it: the run.
        ranks: of a curriculum, a number for each example.
    """

    def __init__(self, it: Finetuning, ranks: Sequence[float] | None = None) -> None:
        super().__init__(it)
        self.ranks = ranks

    def build(self, *, fresh: bool) -> Transformer:
        """The base model, with what is trained."""
        return base_model(self.it, weights=fresh)

    def objective(self) -> Objective:
        """The next token of what the assistant says."""
        wanted = self.it.recipe.loss
        plain = NextToken(label_smoothing=wanted.label_smoothing, z_loss=wanted.z_loss, chunk=wanted.chunk)
        alpha = self.it.recipe.examples.neftune
        return NoisyEmbeddings(plain, alpha) if alpha else plain

    def loader(self, micro_batch: int, samples: int | None) -> Loader:
        """Deals rows of examples."""
        recipe = self.it.recipe
        return ExampleLoader(
            self.it.answers.train, self.it.context_length, micro_batch, recipe.seed, recipe.examples.packing,
            ranks=self.ranks,
        )  # fmt: skip

    def measure(self, model: Transformer) -> Measured:
        """Loss on held-out examples; where there are none, on some that are learnt."""
        answers = self.it.answers
        found = example_losses(model, answers.val or answers.train[:64], self.device, self.precision)
        return Measured(found.loss, {"perplexity": found.perplexity}, f"held-out {found.loss:.3f}")

    def transformer(self, model: Transformer) -> Transformer | None:
        """Adapters are saved alone."""
        return None if self.adapted else model

    def beside(self, model: Transformer, own: Mapping[str, Tensor]) -> Callable[[Path], None] | None:
        """The adapters as PEFT keeps them."""
        if not self.adapted:
            return None
        with _in_place(model, own):
            return written_later(lambda place: save_adapters(self.it, model, place), self.run.path)


def save_adapters(it: Finetuning, model: nn.Module, folder: Path) -> None:
    """Write the adapters of a model that is being trained, and what else was trained, into a folder."""
    name = str(it.recipe.init_from)
    base = name if name.startswith("hf:") else str(it.base.resolve())
    save_adapter(model, folder, base_model=base)


def written_later(write: Callable[[Path], None], near: Path) -> Callable[[Path], None]:
    """What ``write`` puts into a folder now, to be put into another one later."""
    with tempfile.TemporaryDirectory(prefix=".", dir=near) as place:
        write(Path(place))
        files = {path.name: path.read_bytes() for path in sorted(Path(place).iterdir())}

    def put(folder: Path) -> None:
        for name, content in files.items():
            write_atomic(folder / name, content)

    return put


@contextmanager
def _in_place(model: nn.Module, own: Mapping[str, Tensor]) -> Iterator[None]:
    """While the block runs, the model has these values of its parameters: averages, where the run takes some."""
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].data for name, tensor in own.items() if tensor is not parameters[name]}
    for name in before:
        parameters[name].data = own[name].data
    try:
        yield
    finally:
        for name, tensor in before.items():
            parameters[name].data = tensor
