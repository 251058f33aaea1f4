"""From a plan to a fine-tuned model, measured before and after."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from groundup.inference import load
from groundup.model import Transformer
from groundup.posttraining.classifying import evaluate_classes
from groundup.posttraining.jobs import AnswersJob, ClassesJob, base_model
from groundup.posttraining.measure import State, example_losses, known_text, measure, questions
from groundup.posttraining.plan import Finetuning
from groundup.runtime import UsageError, read_json, say, warn, write_json
from groundup.runtime.process_group import barrier
from groundup.training.sitting import train


def finetune(it: Finetuning) -> Finetuning:
    """Train, or go on where the run stopped; what the model was worth before is measured first.

    Returns:
        The run, ``finished`` unless somebody stopped it.

    Raises:
        GroundupError: another process trains here, the checkpoints are damaged, the loss is not finite, or the disk is
            full.
    """
    if it.recipe.task == "classify":
        _, ended = train(ClassesJob(it))
        return replace(it, finished=ended.finished, trained=ended.trained)
    if it.world.is_main:
        prepare_answers(it)
    barrier(it.world)
    ranks = it.run.path / "curriculum.json"
    job = AnswersJob(it, read_json(ranks)["ranks"] if ranks.is_file() else None)
    _, ended = train(job)
    return replace(it, finished=ended.finished, trained=ended.trained)


def prepare_answers(it: Finetuning) -> None:
    """Measure the model as it comes, and find the order of a curriculum; once in a run's life."""
    before, ranks = it.run.path / "before.json", it.run.path / "curriculum.json"
    curriculum = it.recipe.examples.curriculum
    if before.is_file() and (curriculum == "none" or ranks.is_file()):
        return
    say("Measuring the model as it comes …")
    model = base_model(it).to(it.device)
    if curriculum != "none":
        write_json(ranks, {"by": curriculum, "ranks": curriculum_ranks(it, model)})
    state = measured(it, model)
    if state.answers and state.row["bleu"] is None:
        warn("BLEU is not measured: it needs the package sacrebleu: pip install 'groundup[finetune]'")
    write_json(before, state._asdict())


def measured(it: Finetuning, model: Transformer) -> State:
    """What a model is worth, on what the run holds out."""
    answers, recipe = it.answers, it.recipe
    asked = questions(answers.conversations, it.tokenizer, recipe.measure.answers) if answers.form != "text" else []
    return measure(
        model, it.tokenizer, recipe, answers.val or answers.train[:64], asked, known_text(recipe, it.tokenizer),
        it.device, it.precision,
    )  # fmt: skip


def curriculum_ranks(it: Finetuning, model: Transformer) -> list[float]:
    """A number for each example to learn: those with small ones come first within an epoch.

    Args:
        model: the one that is fine-tuned, whose loss counts where the recipe names no other.

    Raises:
        UsageError: a record has no number in the column, or the other model has another vocabulary.
    """
    wanted, examples = it.recipe.examples, it.answers.train
    if wanted.curriculum == "length":
        return [float(example.positions) for example in examples]
    if wanted.curriculum == "column":
        name = str(wanted.curriculum_column)
        found = []
        for example in examples:
            value = example.record.get(name)
            try:
                found.append(float(value))  # type: ignore[arg-type]
            except (TypeError, ValueError):
                raise UsageError(
                    f"{example.where}: its field {name} is {value!r}, and no number to order a curriculum by."
                ) from None
        return found
    if wanted.curriculum_model is not None:
        other = load(wanted.curriculum_model, device=str(it.device))
        if other.tokenizer.fingerprint != it.tokenizer.fingerprint:
            raise UsageError(
                f"examples.curriculum_model = {wanted.curriculum_model}: it reads text as other tokens than the model "
                "that is fine-tuned. Take one of the same tokenizer, or leave it out."
            )
        model = other.model
    losses = example_losses(model, examples, it.device, it.precision)
    return (losses.nats_N / np.maximum(losses.tokens_N, 1)).tolist()


def conclude(it: Finetuning) -> None:
    """Measure the run's best checkpoint as it lies on the disk beside the model as it was: evaluation.json."""
    evaluation = it.run.path / "evaluation.json"
    if evaluation.is_file():
        return
    say("Measuring what was learnt …")
    if it.recipe.task == "classify":
        write_json(evaluation, evaluate_classes(it))
        return
    lm = load(it.run.path, device=str(it.device))
    if it.recipe.attention != "auto":
        lm.model.backend = it.recipe.attention
    after, before = measured(it, lm.model), State(**read_json(it.run.path / "before.json"))
    write_json(evaluation, evaluation_of(it, before, after))


def evaluation_of(it: Finetuning, before: State, after: State) -> dict[str, Any]:
    """What the report shows of a run that learnt answers."""
    answers, recipe = it.answers, it.recipe
    asked = questions(answers.conversations, it.tokenizer, recipe.measure.answers) if answers.form != "text" else []
    known = known_text(recipe, it.tokenizer)
    forgetting = None
    if known is not None and before.known is not None and after.known is not None:
        forgetting = {"text": known[0], "tokens": len(known[1]), "before": before.known, "after": after.known}
    told = zip(asked, before.answers, after.answers, strict=False)
    return {
        "kind": "sft",
        "held_out": bool(answers.val),
        "rows": [{"name": "before", **before.row}, {"name": "after", **after.row}],
        "forgetting": forgetting,
        "answers": [
            {"where": one.where, "prompt": one.prompt, "reference": one.reference, "before": was, "after": now}
            for one, was, now in told
        ],
        "adapter": _adapter(it),
    }


def _adapter(it: Finetuning) -> dict[str, Any] | None:
    adapter = it.recipe.adapter
    if adapter.method == "full":
        return None
    model = base_model(it)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "method": adapter.method, "base": adapter.base, "rank": adapter.rank, "trained": trained,
        "of": sum(parameter.numel() for parameter in model.parameters()),
    }  # fmt: skip
