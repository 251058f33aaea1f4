"""What is trained in fine-tuning: a model that answers, or one that sorts texts into classes, whole or by adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from groundup.data import Loader
from groundup.evaluation.classification import accuracy, log_loss
from groundup.inference import find_model
from groundup.model import Classifier, Transformer, explain, load_model, quantize_model, resize_embeddings
from groundup.model.adapter_model import AdapterFiles, adapter_files, stack_adapters
from groundup.model.adapters import add_adapter
from groundup.model.quantized import Scheme
from groundup.model.token_rows import add_token_rows
from groundup.posttraining.augmentation import Augmentation, read_thesaurus
from groundup.posttraining.batches import ExampleLoader
from groundup.posttraining.class_evaluation import held_out_temperature
from groundup.posttraining.classifier import TextClassifier, plain_copy, save_classifier_files, write_classifier
from groundup.posttraining.derive import lora_config
from groundup.posttraining.encoding import Example
from groundup.posttraining.labelled import LabelledText
from groundup.posttraining.measure import example_losses
from groundup.posttraining.noise import NoisyEmbeddings
from groundup.posttraining.plan import Finetuning
from groundup.posttraining.recipe import FinetuneRecipe
from groundup.posttraining.text_batches import EncodedTexts, TextLoader, encode_texts
from groundup.training.job import Job, M, Measured
from groundup.training.objectives import Classification, NextToken, Objective
from groundup.training.parallel import equip

LOOKED_AT = 131_072  # held-out tokens at a milestone; the final measure takes all
FROZEN_SHARE = 2 / 3  # of a training step's operations, where weights get no gradients


def base_model(it: Finetuning, *, weights: bool = True) -> Transformer:
    """The model to go on from, on the CPU: with rows for added tokens, quantized and with adapters as the recipe says.

    Args:
        weights: False for one whose numbers a checkpoint will replace; frozen ones are read all the same.
    """
    recipe, adapter = it.recipe, it.recipe.adapter
    full = adapter.method == "full"
    read = (weights or not full) and not it.untrained
    model = load_model(it.base) if read else Transformer(it.config)
    came_with, tokens = model.config.vocab_size, it.tokenizer.vocab_size
    first = min(tokens - len(it.added), came_with)
    if it.added:
        resize_embeddings(model, tokens, first, seed=recipe.seed)
    if full:
        return equip(model.requires_grad_(True), recipe)
    if adapter.base != "as-is":
        quantize_model(model, adapter.base, double=adapter.double)
    if adapter.resume_from is None:
        add_adapter(model, lora_config(adapter))
    else:
        begun = {"default": find_model(adapter.resume_from)}
        stack_adapters(model.requires_grad_(False), begun, trainable=True, base_size=came_with)
    if it.added:  # which mean nothing yet
        add_token_rows(model, "default", range(first, model.config.vocab_size))
    return equip(model, recipe)


class FinetuningJob(Job[M]):
    """What both tasks have in common."""

    def __init__(self, it: Finetuning) -> None:
        full = it.recipe.adapter.method == "full"
        super().__init__(
            recipe=replace(it.recipe, context_length=it.positions),  # a step's tokens are counted by it
            run=it.run,
            values=it.values,
            tokenizer=it.tokenizer,
            device=it.device,
            precision=it.precision,
            positions=it.positions,
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
        """Loss on held-out examples, of many on some; where there are none, on some that are learnt."""
        answers = self.it.answers
        examples = spread_evenly(answers.val or answers.train[:64], LOOKED_AT)
        found = example_losses(model, examples, self.device, self.precision)
        return Measured(found.loss, {"perplexity": found.perplexity}, f"held-out {found.loss:.3f}")

    def transformer(self, model: Transformer) -> Transformer | None:
        """Adapters are saved alone."""
        return None if self.adapted else model

    def beside(self, model: Transformer, own: Mapping[str, Tensor]) -> Callable[[Path], None] | None:
        """The adapters as PEFT keeps them."""
        if not self.adapted:
            return None
        with _in_place(model, own):
            return adapters_of(self.it, model).write


def spread_evenly(examples: Sequence[Example], tokens: int) -> Sequence[Example]:
    """Examples of about so many tokens together, spread over all of them; all where they have no more."""
    step = -(-sum(example.positions for example in examples) // tokens)
    return examples[::step] if step > 1 else examples


class ClassesJob(FinetuningJob[Classifier]):
    """Learns to sort texts into classes.

    Args:
        it: the run.
    """

    def __init__(self, it: Finetuning) -> None:
        super().__init__(it)
        material, recipe = it.labelled, it.recipe
        copies = copies_of(recipe)
        train = material.train if copies is None else list(copies(material.train))
        self.train = self._encoded(train)
        self.val = self._encoded(material.val)
        self.temperature = 1.0

    def _encoded(self, texts: Sequence[LabelledText]) -> EncodedTexts:
        return encode_texts(
            self.it.tokenizer, texts, self.it.labelled.classes, self.it.context_length,
            self.it.recipe.long_texts, pooling=self.it.recipe.classes.pooling,
        )  # fmt: skip

    def build(self, *, fresh: bool) -> Classifier:
        """The base model below scores of the classes. Its own head is not used, and stays as it was."""
        model = base_model(self.it, weights=fresh)
        if not model.config.tie_embeddings:
            model.head.requires_grad_(False)
        model.further.requires_grad_(False)
        return Classifier(model, len(self.it.labelled.classes), pooling=self.it.recipe.classes.pooling)

    def objective(self) -> Objective:
        """The class of a text."""
        return Classification(self.it.recipe.loss.label_smoothing)

    def loader(self, micro_batch: int, samples: int | None) -> Loader:
        """Deals texts of like length together."""
        return TextLoader(self.train, self.it.context_length, micro_batch, self.it.recipe.seed)

    def shown(self, row: Mapping[str, Any]) -> str:
        """How many it gets right."""
        return f"{row['accuracy']:.0%} right"

    def classifier(self, model: Classifier, temperature: float = 1.0) -> TextClassifier:
        """The model as one that takes texts."""
        return TextClassifier(
            model, self.it.tokenizer, self.it.labelled.classes, temperature=temperature,
            context_length=self.it.context_length, split=self.it.recipe.long_texts == "split", device=self.device,
            precision=self.precision,
        )  # fmt: skip

    def measure(self, model: Classifier) -> Measured:
        """Loss and accuracy on held-out texts; and a temperature that makes its probabilities honest."""
        found, labels = self.classifier(model).probabilities(self.val), self.val.labels_of_texts
        if self.it.recipe.classes.calibrate:
            self.temperature = held_out_temperature(labels, found)
        right = accuracy(labels, found.argmax(axis=1))
        return Measured(log_loss(labels, found), {"accuracy": right}, f"held-out {right:.1%}")

    def transformer(self, model: Classifier) -> Transformer | None:
        """With adapters, what is saved is the whole model with them merged."""
        return None if self.adapted else model.model

    def beside(self, model: Classifier, own: Mapping[str, Tensor]) -> Callable[[Path], None] | None:
        """What makes a classifier of a checkpoint."""
        if self.adapted:
            merged = self.classifier(plain_copy(model, own), self.temperature)
            return lambda folder: write_classifier(merged, folder)
        score = next(tensor for name, tensor in own.items() if name.startswith("score.")).detach().cpu().clone()
        told = self.classifier(model, self.temperature)
        return lambda folder: save_classifier_files(folder, told, score)


def copies_of(recipe: FinetuneRecipe) -> Augmentation | None:
    """What makes augmented copies of texts to learn from; None where none are wanted.

    Raises:
        UsageError: the thesaurus is not there, or no change is chosen.
    """
    wanted = recipe.classes
    if not wanted.copies:
        return None
    return Augmentation(
        None if wanted.thesaurus is None else read_thesaurus(wanted.thesaurus), replace=wanted.replace,
        delete=wanted.delete, swap=wanted.swap, shuffle=wanted.shuffle_sentences, copies=wanted.copies,
        seed=recipe.seed,
    )  # fmt: skip


def adapters_of(it: Finetuning, model: nn.Module) -> AdapterFiles:
    """A copy of the adapters of a model that is being trained, and of what else was trained."""
    adapter, name = it.recipe.adapter, str(it.recipe.init_from)
    base = name if name.startswith("hf:") else str(it.base.resolve())
    scheme = None if adapter.base == "as-is" else Scheme(adapter.base, double=adapter.double)
    learnt = dict(model.named_parameters())
    whole = [key for key, one in learnt.items() if one.requires_grad and ".adapters." not in key]
    extra = [key.replace(".base.", ".") for key in whole]
    return adapter_files(model, base, scheme, extra)


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
