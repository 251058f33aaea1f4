"""What a run that learnt classes came to: measured on test texts beside a baseline, and the curves around it."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from groundup.evaluation.classification import accuracy
from groundup.inference import find_model
from groundup.model import read_config
from groundup.optim import OptimConfig
from groundup.posttraining.baseline import BaselineResult, tfidf_baseline
from groundup.posttraining.class_evaluation import evaluate_classifier, learning_curve_rows
from groundup.posttraining.classifier import load_classifier
from groundup.posttraining.derive import rows_of_texts
from groundup.posttraining.jobs import ClassesJob
from groundup.posttraining.labelled import LabelledText, label_ids
from groundup.posttraining.plan import Finetuning
from groundup.runtime import GroundupError, read_json, say, warn, write_json
from groundup.runtime.console import quantity
from groundup.runtime.process_group import World
from groundup.training.run import RunFolder
from groundup.training.sitting import train

LEAST_STEPS = 60  # of a model on a part of the texts


def evaluate_classes(it: Finetuning) -> dict[str, Any]:
    """The content of evaluation.json: the best checkpoint as it lies on the disk, the baseline, and the curves."""
    found, material = load_classifier(it.run.path, device=str(it.device), precision=it.precision), it.labelled
    found.temperature = 1.0  # the saved one is found again below, and shown beside it
    labels = label_ids(material.test, material.classes)
    started = time.perf_counter()
    probabilities = found.probabilities([text.text for text in material.test])
    seconds = time.perf_counter() - started
    val = None
    if it.recipe.classes.calibrate:
        val = label_ids(material.val, material.classes), found.probabilities([text.text for text in material.val])
    baseline = _baseline(it)
    result = evaluate_classifier(
        material.classes, labels, probabilities, material.test, baseline, val=val,
        train_labels=label_ids(material.train, material.classes),
        name=f"this model ({quantity(found.model.model.parameter_count())} parameters)", seconds=seconds,
        note=f"{find_model(it.run.path).name}, best on held-out texts", seed=it.recipe.seed,
    )  # fmt: skip
    right = accuracy(labels, probabilities.argmax(axis=1))
    theirs = None if baseline is None else accuracy(labels, baseline.predicted)
    result["baseline_accuracy"] = theirs
    result["learning_curve"] = _learning_curve(it, (right, theirs))
    if it.recipe.classes.pretraining_curve:
        result["pretraining_curve"] = _pretraining_curve(it, right)
    return result


def _baseline(it: Finetuning) -> BaselineResult | None:
    try:
        return tfidf_baseline(it.labelled.train, it.labelled.test)
    except GroundupError as error:  # scikit-learn is missing, or the texts have no words
        warn(f"no baseline: {error}")
        return None


def _learning_curve(it: Finetuning, whole: tuple[float, float | None]) -> list[dict[str, Any]]:
    shares = it.recipe.classes.learning_curve
    if not shares:
        return []

    def accuracy_of(part: list[LabelledText]) -> float:
        say(f"Learning curve: {len(part):,} texts …")
        return _trained_on(replace(it, material=replace(it.labelled, train=part)), f"{len(part)}-texts")

    return learning_curve_rows(
        it.labelled.train, it.labelled.test, shares, accuracy_of, whole=whole, with_baseline=whole[1] is not None,
        seed=it.recipe.seed,
    )  # fmt: skip


def _trained_on(it: Finetuning, name: str) -> float:
    """The accuracy on the test texts of a further model, trained like the run's own in a folder below it."""
    folder, noted = it.run.path / "curves" / name, it.run.path / "curves" / f"{name}.json"
    if noted.is_file():
        return float(read_json(noted)["accuracy"])
    recipe, batch = it.recipe, it.recipe.batch_size or 1
    rows = rows_of_texts(recipe, it.tokenizer, it.labelled.train, it.context_length)
    steps = max(LEAST_STEPS, round(recipe.epochs * rows / batch))
    steps = min(steps, recipe.max_steps or steps)
    optim: OptimConfig = replace(recipe.optim, warmup_steps=max(1, min(recipe.optim.warmup_steps, steps // 10)))
    recipe = replace(
        recipe, max_steps=steps, minutes=None, save_every=max(1, steps // 2), eval_every=None, early_stop=0, track=[],
        profile=None, monitor_every=0.0, keep=1, optim=optim,
    )  # fmt: skip
    job = ClassesJob(replace(it, recipe=recipe, run=RunFolder(folder), world=World()))
    model, ended = train(job)
    if not ended.finished:
        raise KeyboardInterrupt  # what is trained so far is saved, and the same command goes on
    test = it.labelled.test
    found = job.classifier(model).probabilities([text.text for text in test])
    right = accuracy(label_ids(test, it.labelled.classes), found.argmax(axis=1))
    write_json(noted, {"accuracy": right, "steps": steps})
    shutil.rmtree(folder, ignore_errors=True)
    return right


def _pretraining_curve(it: Finetuning, whole: float) -> list[dict[str, Any]]:
    """Accuracy by how many tokens the base model had seen: none, and those of checkpoints of its run."""
    places = _checkpoints_of(Path(str(it.recipe.init_from)), it)
    if len(places) < 2:
        say("No pretraining curve: init_from is no run with several checkpoints (--keep-every keeps some).")
        return []
    last, places = places[-1], places[:-1]
    points = min(it.recipe.classes.pretraining_curve, len(places))
    wanted = np.unique(np.linspace(0, len(places), points + 1)[:-1].astype(int))  # the last point is the run's own
    rows = []
    for tokens, folder in [(0, None), *(places[number] for number in wanted)]:
        say(f"Pretraining curve: {quantity(float(tokens))} tokens …" if tokens else "Pretraining curve: none at all …")
        of = replace(it, untrained=True) if folder is None else replace(it, base=folder)
        rows.append({"tokens": tokens, "accuracy": _trained_on(of, f"{tokens}-tokens")})
    return [*rows, {"tokens": last[0], "accuracy": whole}]


def _checkpoints_of(run: Path, it: Finetuning) -> list[tuple[int, Path]]:
    """The checkpoints of the base model's run up to the one that is fine-tuned, each with the tokens it had seen."""
    found = []
    for state in sorted((run / "checkpoints").glob("step-*/training_state/state.json")):
        folder = state.parent.parent
        if read_config(folder) != it.config:
            continue
        found.append((int(read_json(state)["position"]["tokens"]), folder.resolve()))
    found.sort()
    own = next((number for number, (_, folder) in enumerate(found) if folder == it.base.resolve()), None)
    return [] if own is None else found[: own + 1]
