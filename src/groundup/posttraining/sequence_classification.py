"""Classifiers in the form that transformers has for them: a folder of ``…ForSequenceClassification``.

It has the weights of the family's model without the language model's head, ``score.weight`` among them, and the names
of the classes in config.json (``id2label``). What is looked at is the last token that is not padding.
"""

# C classes   E embedding

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from groundup.model import Classifier, Transformer, read_config, save_model
from groundup.model.weights import family_of
from groundup.model.weights.families import FAMILIES, Family
from groundup.model.weights.folder import empty_model, fill_tensor
from groundup.model.weights.quantized_folder import Quantization
from groundup.model.weights.stored import stored_tensors
from groundup.model.weights.tensor_file import TensorFile
from groundup.posttraining.text_batches import Around
from groundup.runtime import GroundupError, UsageError, os_errors, read_json, write_atomic, write_json
from groundup.tokenizer import Tokenizer

SCORE = "score.weight"
KIND = "ForSequenceClassification"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ARCHITECTURES = {"gemma3_text": "Gemma3TextForSequenceClassification"}  # those not called after the language model's


# ---- writing


def write_sequence_classifier(
    model: Classifier, tokenizer: Tokenizer, classes: Sequence[str], ring: Around, folder: Path
) -> None:
    """Write such a folder.

    Args:
        model: without adapters.
        tokenizer: is written so that it puts around a text what ``ring`` says.
        classes: their C names, by id.
        folder: one that is there, and empty.

    Raises:
        UsageError: transformers has no class for it.
        GroundupError: the folder cannot be written.
    """
    config = model.model.config
    if model.pooling != "last":
        raise UsageError(
            "this classifier looks at the mean of a text, for which transformers has no class. Train one with "
            "--classes.pooling last, or use this one with groundup classify."
        )
    headless = copy.copy(model.model)
    headless.config = replace(config, tie_embeddings=True)  # a head that is tied is not saved
    family = family_of(headless.config)
    if family is None or Quantization.of(model.model) is not None:
        what = "a model of this kind" if family is None else "quantized weights"
        raise UsageError(f"transformers has no class for {what}. Use this classifier with groundup classify.")
    save_model(headless, folder, **special_ids(tokenizer))
    _add_scores(folder, model.score.weight)
    pad = _pad_id(tokenizer, ring, config.vocab_size)
    values = read_json(folder / "config.json") | {
        "architectures": [class_for(family)],
        "num_labels": len(classes),
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
        "pad_token_id": pad,
        "tie_word_embeddings": config.tie_embeddings,
    }
    write_json(folder / "config.json", values)
    Tokenizer(replace(tokenizer.vocabulary, prefix=ring.before, suffix=ring.after)).save(folder)
    name = next((name for name, number in tokenizer.special_tokens.items() if number == pad), None)
    if name is not None:
        path = folder / "tokenizer_config.json"
        write_json(path, read_json(path) | {"pad_token": name})


def class_for(family: Family) -> str:
    """The class of transformers that classifies with models of a family."""
    alike = family.architecture.replace("LMHeadModel", "ForCausalLM").replace("ForCausalLM", KIND)
    return _ARCHITECTURES.get(family.model_type, alike)


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokens that begin and end a text, as :func:`groundup.model.save_model` is told them."""
    end = tokenizer.end_of_text_id
    return {"bos_id": tokenizer.special_tokens.get(tokenizer.vocabulary.bos_token or "", end), "eos_id": end}


def _add_scores(folder: Path, score_CE: Tensor) -> None:
    """Put the scores into a file of their own, and all files into an index."""
    with os_errors(folder, "cannot write"):
        if (folder / _INDEX).is_file():
            index = read_json(folder / _INDEX, "weight index")
            where, total = index["weight_map"], index["metadata"]["total_size"]
        else:
            first = "model-00001-of-00002.safetensors"
            (folder / _SINGLE).rename(folder / first)
            file = TensorFile(folder / first)
            where = dict.fromkeys(file.shapes, first)
            total = sum(torch.Size(shape).numel() * file.dtypes[key].itemsize for key, shape in file.shapes.items())
        last = "model-00002-of-00002.safetensors" if len(set(where.values())) == 1 else "model-score.safetensors"
        weight = score_CE.detach().cpu().contiguous()
        write_atomic(folder / last, safetensors.torch.save({SCORE: weight}, {"format": "pt"}))
        content = {"metadata": {"total_size": total + weight.nbytes}, "weight_map": where | {SCORE: last}}
        write_json(folder / _INDEX, content)


def _pad_id(tokenizer: Tokenizer, ring: Around, vocab_size: int) -> int | None:
    """An id that no text ends with, by which transformers tells where a text ends; None where there is none to be had.

    Without one, transformers takes texts one by one only, and says so.

    Args:
        vocab_size: the model's, which may be larger than the tokenizer's.
    """
    specials = sorted(tokenizer.special_tokens.items(), key=lambda token: "pad" not in token[0].casefold())
    free = [number for _, number in specials if number not in ring.after]
    if free:
        return free[0]
    if vocab_size > tokenizer.vocab_size:
        return tokenizer.vocab_size
    return None if not ring.after else int(ring.after[-1] == 0)


# ---- reading


def read_sequence_classifier(folder: Path, device: torch.device) -> tuple[Transformer, Tensor]:
    """The Transformer of such a folder, in float32, and the scores' weight C E.

    Raises:
        GroundupError: the config is unknown, or a file is damaged, or a tensor is missing or of another shape.
    """
    values = read_json(folder / "config.json", "model config")
    config = replace(read_config(folder), tie_embeddings=True)  # there is no head
    family = FAMILIES.get(values["model_type"])
    if family is None:
        raise GroundupError(f"{folder / 'config.json'}: a sequence classification of this model_type is not known.")
    files = map(TensorFile, sorted(folder.glob("model*.safetensors")))
    stored = stored_tensors(files, values.get("quantization_config"))
    if SCORE not in stored:
        raise GroundupError(f"{folder}: the tensor {SCORE} is missing from the weights.")
    if more := next((name for name in stored if name.startswith("score.") and name != SCORE), None):
        raise GroundupError(f"{folder}: its scores have a part {more}, which groundup does not have.")
    model = empty_model(config, device, torch.float32)
    tensors = dict(model.state_dict())
    for link in family.links(config):
        short = link.theirs.removeprefix(family.prefix)  # saved as the model alone, without what stands on it
        found = stored.get(link.theirs) or stored.get(short)
        if found is None:
            raise GroundupError(f"{folder}: the tensor {link.theirs} is missing from the weights.")
        fill_tensor(link, found, tensors)
    score_CE = torch.empty(stored[SCORE].shape)
    stored[SCORE].read_into(score_CE)
    return model, score_CE


def read_about_theirs(folder: Path, tokenizer: Tokenizer, n_classes: int) -> dict[str, Any]:
    """What classifier.json would say of a folder that only transformers has written.

    Raises:
        GroundupError: its scores are no classes of which a text has one.
    """
    path = folder / "config.json"
    values = read_json(path, "model config")
    if n_classes < 2:
        raise GroundupError(f"{path}: this model gives a text one number, such as a reward, and no class.")
    if values.get("problem_type") == "multi_label_classification":
        raise GroundupError(f"{path}: this model gives a text several labels (problem_type); groundup gives one class.")
    names = values.get("id2label") or {}
    return {
        "classes": [str(names.get(str(number), f"LABEL_{number}")) for number in range(n_classes)],
        "pooling": "last",
        "temperature": 1.0,
        "context_length": read_config(folder).context_length,
        "before": list(tokenizer.vocabulary.prefix),
        "after": list(tokenizer.vocabulary.suffix),
    }
