"""A trained classifier: what it says of texts, how it is saved, and how it comes back.

A checkpoint holds the Transformer as any other does, with its head, and two small files beside it: classifier.json (the
names of the classes, the pooling, the temperature, what stands around a text) and classifier.safetensors (the scores).
So its weights are written once, it resumes like every checkpoint, and it also holds a classifier that transformers has
no class for: one that looks at the mean of a text, or a model of our own kind.

transformers wants the scores among the model's weights, and takes a folder without them for one whose scores are yet to
be learnt: it would draw them at random. What it opens is therefore a folder of its own: :func:`export_classifier`.
"""

# N texts   B batch   L positions of a batch   C classes   E embedding

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor

from groundup.data import open_records
from groundup.inference import find_model
from groundup.model import Classifier, load_model, save_model
from groundup.model.adapters import adapter_names, merge, remove
from groundup.model.weights.tensor_file import TensorFile
from groundup.posttraining.conversations import Skip
from groundup.posttraining.labelled import LOOKED_AT, _headed, find_columns, read_labelled
from groundup.posttraining.sequence_classification import (
    KIND,
    SCORE,
    read_about_theirs,
    read_sequence_classifier,
    special_ids,
    write_sequence_classifier,
)
from groundup.posttraining.text_batches import Around, EncodedTexts, around, encode_plain, pad_texts, width
from groundup.runtime import GroundupError, UsageError, atomic_folder, read_json, warn, write_atomic, write_json
from groundup.runtime.device import Precision, autocast, choose_device
from groundup.runtime.files import verify_folder
from groundup.tokenizer import Tokenizer

ABOUT, SCORES = "classifier.json", "classifier.safetensors"
_MARK = "0"  # a column that stands for labels where there are none; those without a name are counted from 1
POSITIONS_TOGETHER = 1 << 14  # of a batch, padding included

Float64Array = npt.NDArray[np.float64]


@dataclass
class TextClassifier:
    """A classifier that takes texts.

    Args:
        model: the scores, on their Transformer.
        tokenizer: that of the Transformer.
        classes: the C names, by id.
        temperature: scores are divided by it (Guo et al. 2017, section 4.2); 1 leaves them as they come.
        context_length: positions that it sees at once; None for the Transformer's own.
        split: whether a longer text is seen in pieces, whose scores are averaged; else its head alone is.
        device: where the model is.
        precision: what the forward pass computes in.
        around: what stands around a text; None for what :func:`groundup.posttraining.text_batches.around` says.
    """

    model: Classifier
    tokenizer: Tokenizer
    classes: list[str]
    temperature: float = 1.0
    context_length: int | None = None
    split: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = "float32"
    around: Around | None = None

    @property
    def context(self) -> int:
        """The positions that it sees at once."""
        return self.context_length or self.model.model.config.context_length

    @property
    def ring(self) -> Around:
        """The tokens around a text."""
        return around(self.tokenizer, self.model.pooling) if self.around is None else self.around

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Token ids of texts, without labels.

        Raises:
            GroundupError: a text has no token.
        """
        found = encode_plain(self.tokenizer, texts, self.ring, self.context, split=self.split)
        if not found.tokens.all():
            number = int(found.tokens.argmin()) + 1
            raise GroundupError(f"text {number} of {len(texts)} comes to no token of this tokenizer. Leave it out.")
        count = len(found.ends)
        cut = 0 if self.split else int((found.tokens > self.context).sum())
        return EncodedTexts(found.ids, found.ends, np.full(count, -1, np.int64), [""] * count, cut, found.owners)

    def probabilities(self, texts: Sequence[str] | EncodedTexts) -> Float64Array:
        """How probable each class is: softmax of scores / temperature, float64 N C.

        The scores of a text in pieces are the mean of theirs. Texts of like length are computed together, without
        gradients and in evaluation mode, which is undone after.

        Raises:
            GroundupError: a text has no token.
        """
        encoded = texts if isinstance(texts, EncodedTexts) else self.encode(texts)
        scores_NC = np.empty((len(encoded), len(self.classes)))
        training = self.model.training
        self.model.eval()
        try:
            for numbers in self._alike(encoded):
                scores_NC[numbers] = self._scores(*pad_texts(encoded, numbers, self.context))
        finally:
            self.model.train(training)
        if encoded.owners is not None and len(encoded):
            pieces_N = np.bincount(encoded.owners)
            total_NC = np.zeros((len(pieces_N), scores_NC.shape[1]))
            np.add.at(total_NC, encoded.owners, scores_NC)
            scores_NC = total_NC / pieces_N[:, None]
        found: Float64Array = (torch.from_numpy(scores_NC) / self.temperature).softmax(dim=-1).numpy()
        return found

    def classify(self, texts: Sequence[str]) -> list[str]:
        """The name of each text's most probable class."""
        return [self.classes[number] for number in self.probabilities(texts).argmax(axis=1)]

    @torch.no_grad()  # not inference_mode: a table that the model keeps from here must serve a training step, too
    def _scores(self, ids_BL: npt.NDArray[np.int64], lengths_B: npt.NDArray[np.int64]) -> Float64Array:
        ids, lengths = (torch.from_numpy(array).to(self.device) for array in (ids_BL, lengths_B))
        with autocast(self.device, self.precision):
            scores_BC = self.model(ids, lengths)
        found: Float64Array = scores_BC.float().cpu().double().numpy()
        return found

    def _alike(self, encoded: EncodedTexts) -> Iterator[npt.NDArray[np.int64]]:
        """The texts' numbers in batches, long ones first, so that memory runs out at once or not at all."""
        lengths, begin = encoded.lengths, 0
        order = np.argsort(-lengths, kind="stable")
        while begin < len(order):
            count = max(1, POSITIONS_TOGETHER // int(width(lengths[order[begin]], self.context)))
            yield order[begin : begin + count]
            begin += count


# ---- saving


def plain_copy(model: Classifier, own: Mapping[str, Tensor] | None = None) -> Classifier:
    """A copy of a classifier whose adapters, where it has some, are merged into its weights and gone.

    Args:
        own: parameters, by their names in ``model``, that take the place of its own, such as averaged ones.
    """
    found = copy.deepcopy(model)
    parameters = dict(found.named_parameters())
    with torch.no_grad():
        for name, tensor in (own or {}).items():
            parameters[name].copy_(tensor)
    if adapter_names(found):
        merge(found)
        remove(found)
    return found


def save_classifier_files(folder: Path, classifier: TextClassifier, score_CE: Tensor | None = None) -> None:
    """Write what a folder needs beside its Transformer for :func:`load_classifier` to open it.

    Args:
        folder: one that is there, such as that of a checkpoint; the caller makes it whole or not at all.
        classifier: whose classes, pooling and so on are written. Its weights are read only without ``score_CE``.
        score_CE: the scores' weight, where it is to be another than the classifier's own.

    Raises:
        GroundupError: the folder cannot be written.
    """
    weight = classifier.model.score.weight if score_CE is None else score_CE
    content = safetensors.torch.save({SCORE: weight.detach().cpu().contiguous()}, {"format": "pt"})
    write_atomic(folder / SCORES, content)
    _write_about(folder, classifier)


def _write_about(folder: Path, classifier: TextClassifier) -> None:
    """Write classifier.json alone."""
    before, after = classifier.ring
    about = {
        "classes": list(classifier.classes), "pooling": classifier.model.pooling,
        "temperature": classifier.temperature, "context_length": classifier.context, "split": classifier.split,
        "before": list(before), "after": list(after),
    }  # fmt: skip
    write_json(folder / ABOUT, about)


def write_classifier(classifier: TextClassifier, folder: Path) -> None:
    """Write all of a classifier into a folder that is there: Transformer, tokenizer, scores; adapters are merged.

    Raises:
        GroundupError: the folder cannot be written.
    """
    model = plain_copy(classifier.model) if adapter_names(classifier.model) else classifier.model
    save_model(model.model, folder, **special_ids(classifier.tokenizer))
    classifier.tokenizer.save(folder)
    save_classifier_files(folder, classifier, model.score.weight)


def save_classifier(classifier: TextClassifier, folder: str | os.PathLike[str]) -> None:
    """Write a classifier to a new folder, whole or not at all; adapters are merged, in a copy.

    Raises:
        UsageError: something is there already.
        GroundupError: it cannot be written.
    """
    path = _new_folder(folder)
    with atomic_folder(path) as place:
        write_classifier(classifier, place)


def export_classifier(classifier: TextClassifier, folder: str | os.PathLike[str]) -> None:
    """Write a classifier to a new folder that transformers' ``AutoModelForSequenceClassification`` opens.

    It gives the same scores there, for the same token ids: what stands around a text is put there by the folder's own
    tokenizer. The temperature is no part of the scores; it stays in classifier.json, and :func:`load_classifier` opens
    this folder too.

    Raises:
        UsageError: transformers has no class for it, or something is there already.
        GroundupError: it cannot be written.
    """
    path = _new_folder(folder)
    if classifier.split:
        warn("transformers sees the head of a long text alone; groundup classify goes on to see all of it, in pieces.")
    plain = plain_copy(classifier.model) if adapter_names(classifier.model) else classifier.model
    with atomic_folder(path) as place:
        write_sequence_classifier(plain, classifier.tokenizer, classifier.classes, classifier.ring, place)
        _write_about(place, classifier)


def _new_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder's path.

    Raises:
        UsageError: something is there, which would be lost.
    """
    path = Path(folder)
    if path.is_dir() and any(path.iterdir()):
        raise UsageError(f"{path}: something is in this folder already and would be lost. Save to a new folder.")
    return path


# ---- loading


def load_classifier(
    name: str | os.PathLike[str], *, device: str = "auto", precision: Precision = "float32"
) -> TextClassifier:
    """Load a classifier: ``load_classifier("runs/spam").classify(["Win a prize!"])``.

    Args:
        name: a run that has trained one, a checkpoint or folder of it, or a folder of transformers' sequence
            classification (``hf:owner/name``, too), which looks at a text's last token.
        device: ``auto``, ``cpu``, ``cuda``, …
        precision: what the forward pass computes in.

    Raises:
        UsageError: there is nothing by that name, or it has no class scores.
        GroundupError: a file is damaged.
    """
    path = find_model(name)
    is_folder = path.is_dir()
    if is_folder:
        verify_folder(path)
    architectures = read_json(path / "config.json", "model config").get("architectures") if is_folder else None
    theirs = any(str(one).endswith(KIND) for one in architectures or ())
    if not theirs and not (path / SCORES).is_file():
        raise UsageError(
            f"{name}: this model has no class scores: it continues texts, and does not sort them. "
            "Train one with groundup finetune --task classify."
        )
    chosen, tokenizer = choose_device(device), Tokenizer.load(path)
    if theirs:
        model, score_CE = read_sequence_classifier(path, chosen)
        about = _read_about(path) if (path / ABOUT).is_file() else read_about_theirs(path, tokenizer, len(score_CE))
    else:
        model, score_CE, about = load_model(path, device=chosen), _read_scores(path), _read_about(path)
    classes, n_embd = about["classes"], model.config.n_embd
    if tuple(score_CE.shape) != (len(classes), n_embd):
        raise GroundupError(
            f"{path}: {SCORE} has shape {list(score_CE.shape)}, {len(classes)} classes on a model of width {n_embd} "
            f"ask for {[len(classes), n_embd]}."
        )
    found = Classifier(model, len(classes), pooling=about["pooling"])
    found.score.weight = torch.nn.Parameter(score_CE.float())
    ring = Around(tuple(about["before"]), tuple(about["after"]))
    sizes = tokenizer.vocab_size, model.config.vocab_size
    if sizes[0] > sizes[1] or any(token >= sizes[0] for token in (*ring.before, *ring.after)):
        raise GroundupError(f"{path}: tokenizer and model ({sizes[0]} and {sizes[1]} tokens) do not belong together.")
    return TextClassifier(
        found.to(chosen).eval(), tokenizer, classes, temperature=float(about["temperature"]),
        context_length=about["context_length"], split=bool(about.get("split")), device=chosen, precision=precision,
        around=ring,
    )  # fmt: skip


def _read_scores(folder: Path) -> Tensor:
    file = TensorFile(folder / SCORES)
    if SCORE not in file.shapes:
        raise GroundupError(f"{folder / SCORES}: damaged: the tensor {SCORE} is missing.")
    return file.read(SCORE)


def _read_about(folder: Path) -> dict[str, Any]:
    """The content of classifier.json.

    Raises:
        GroundupError: it is missing or damaged.
    """
    path = folder / ABOUT
    values: Any = read_json(path, "description of a classifier")
    tests: dict[str, Callable[[Any], bool]] = {
        "classes": lambda it: isinstance(it, list) and len(it) > 1 and all(isinstance(one, str) for one in it),
        "pooling": lambda it: it in ("last", "mean"),
        "temperature": lambda it: isinstance(it, (int, float)) and 0 < it < float("inf"),
        "context_length": lambda it: isinstance(it, int) and it > 0,
        "split": lambda it: it in (None, True, False),  # what older versions wrote does not say
        "before": _are_ids,
        "after": _are_ids,
    }
    for name, test in tests.items():
        if not isinstance(values, dict) or not test(values.get(name)):
            raise GroundupError(f"{path}: this description of a classifier is damaged ({name}). Train it again.")
    return dict(values)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, int) and one >= 0 for one in value)


# ---- what is to be classified


class Unsorted(NamedTuple):
    """A text to classify: file and number of its record, and its label, where it has one."""

    where: str
    text: str
    label: str | None


def open_unsorted(
    spec: str, columns: Mapping[str, str] | None = None, limit: int | None = None, skip: Skip | None = None
) -> Iterator[Unsorted]:
    """Yield the texts of a file, a folder or a data set of the hub, one at a time.

    Args:
        spec, columns, limit, skip: as for :func:`groundup.posttraining.labelled.load_labelled`; but there may be no
            column of labels.

    Raises:
        BadRecord: a record is bad; the line names it.
        UsageError: the column of the text is not found.
        GroundupError: a file cannot be read.
    """
    records = open_records(spec, limit, headed=_headed(columns or {}))
    first = list(islice(records, LOOKED_AT))
    if not first:
        return
    label = _label_column(first, columns or {})
    every: Iterable[tuple[str, Any]] = chain(first, records)
    if label == _MARK:
        every = ((where, _marked(record)) for where, record in every)
    for text in read_labelled(every, {**(columns or {}), "label": label}, skip):
        yield Unsorted(text.where, text.text, None if label == _MARK else text.label)


def _label_column(records: Sequence[tuple[str, Any]], columns: Mapping[str, str]) -> str:
    """The column of the labels; the mark where there is none.

    Raises:
        UsageError: the column of the text cannot be told either, or ``columns`` names one that is not there.
    """
    try:
        return find_columns(records, columns).label
    except UsageError:
        if "label" not in columns:
            marked = [(where, _marked(record)) for where, record in records]
            with suppress(UsageError):
                return find_columns(marked, {**columns, "label": _MARK}).label
        raise


def _marked(record: Any) -> Any:
    return {**record, _MARK: _MARK} if isinstance(record, Mapping) else record
