"""What ``demo`` and ``pretrain`` share: from a recipe to a trained, evaluated and reported run."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from groundup.cli.arguments import print_config, recipe_arguments
from groundup.config import Given, build, find_recipe, parse_recipe_flags, read_recipe, recipe_files
from groundup.runtime import UsageError, say, write_json
from groundup.runtime.console import byte_size, clock, quantity
from groundup.training import PretrainRecipe
from groundup.training.run import RunFolder, undecided
from groundup.training.scaling import DERIVED, without_open_shape

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from groundup.data import TokenSet
    from groundup.evaluation import BitsPerByte
    from groundup.model import Transformer
    from groundup.posttraining import Finetuning
    from groundup.runtime.process_group import World
    from groundup.training import Pretraining


def given_by(
    arguments: Sequence[str], command: str, description: str, *, default_recipe: str | None = None,
    cls: type = PretrainRecipe, derived: Collection[str] = DERIVED,
) -> Given | None:  # fmt: skip
    """The recipe's keys under the flags' keys.

    Args:
        cls: the dataclass of the recipe.
        derived: its keys that need not be given.

    Returns:
        None when ``--print-config`` has printed what it came to.

    Raises:
        UsageError: no recipe is named where one is needed, or something in it is wrong.
    """
    wants_config = any(word in ("--print-config", "--print_config") for word in arguments)
    words = [word for word in arguments if word not in ("--print-config", "--print_config")]
    name, flags = recipe_arguments(words)
    takes = "" if default_recipe else "[RECIPE]"
    if not words and default_recipe is None:
        known = ", ".join(recipe_files(cls))
        raise UsageError(f"groundup {command} needs a recipe (a YAML file, or one of {known}) or flags; see --help.")
    from_flags = parse_recipe_flags(flags, cls, command, description, takes=takes)
    if default_recipe is not None and name is not None:
        raise UsageError(
            f"groundup {command} takes no recipe, but got {name}. Use --data {name} for a text, or groundup pretrain."
        )
    name = name or default_recipe
    given = from_flags.over(read_recipe(find_recipe(name, cls), cls)) if name else from_flags
    if wants_config:
        recipe: Any = build(cls, without_open_shape(given.values), given.sources)
        print_config(undecided(recipe, given.values, derived))
        return None
    return given


def run(given: Given) -> RunFolder | None:
    """Prepare, plan, train, evaluate and report.

    Returns:
        The run folder; None when training was stopped before its end.
    """
    from groundup.training import plan_pretraining, pretrain
    from groundup.training.pretraining import Hooks

    started = time.monotonic()
    with processes(given) as world:
        planned = plan_pretraining(given, world)
        _say_text(planned)
        announce(
            planned.plan_rows(),
            "Any of these can be set: --depth, --learning-rate, --batch-tokens …  --print-config shows every key.",
        )
        _, done = pretrain(planned, Hooks(evaluate=held_out_loss, sample=samples))
    if not is_at_its_end(done, world, started):
        return None
    conclude(done)
    return done.run


def processes(given: Given) -> AbstractContextManager[World]:
    """The processes that train together, which have to find each other before anything else."""
    from groundup.runtime.device import choose_device
    from groundup.runtime.process_group import process_group, world_of_environment

    values, device = given.values, None
    if world_of_environment().size > 1:
        device = choose_device(str(values.get("device") or "auto"))
    return process_group(device, float(values.get("rank_timeout") or PretrainRecipe.rank_timeout))


def is_at_its_end(done: Pretraining | Finetuning, world: World, started: float) -> bool:
    """Say how a sitting ended; whether this process is to measure what came of the run.

    Args:
        started: when the sitting began, by the monotonic clock.
    """
    if not world.is_main:
        return False
    if not done.finished:
        say(f"Stopped and saved. The same command goes on from there; the run is in {done.run.path}.")
    elif done.trained:
        say(f"Trained; {clock(time.monotonic() - started)} so far in this sitting.")
    else:
        say(f"{done.run.path} has been trained to its end already. For a new run choose another --out.")
    return done.finished


def held_out_loss(model: Transformer, pretraining: Pretraining, *, whole: bool = False) -> BitsPerByte:
    """Loss and bits per byte on the held-out text.

    Args:
        whole: all of it in windows that overlap by half, for the final figure; otherwise about ``eval_tokens``, in
            windows spread evenly, each read without what stands before it: much cheaper and a little pessimistic.
    """
    from groundup.evaluation import bits_per_byte, bytes_per_token, model_scorer

    recipe, prepared = pretraining.recipe, pretraining.prepared
    context = recipe.model.context_length
    precision = "float32" if recipe.precision == "auto" else recipe.precision
    return bits_per_byte(
        model_scorer(model, pretraining.device, precision),
        prepared.val.read(0, prepared.val.n_tokens) if whole else _spread(prepared.val, recipe.eval_tokens, context),
        bytes_per_token(prepared.tokenizer),
        context,
        start_id=prepared.tokenizer.end_of_text_id or 0,
        stride=None if whole else context,
        show_progress=whole,
    )


def _spread(tokens: TokenSet, most: int, context: int) -> npt.NDArray[np.integer]:
    """About ``most`` tokens in windows spread evenly over the text: documents differ much in difficulty."""
    import numpy as np

    windows, wanted = tokens.n_tokens // context, max(1, most // context)
    if windows <= wanted:
        return tokens.read(0, tokens.n_tokens)
    starts = np.linspace(0, windows - 1, wanted).astype(int) * context
    return np.concatenate([tokens.read(int(start), context) for start in starts])


def samples(model: Transformer, pretraining: Pretraining, step: int) -> list[dict[str, Any]]:
    """What the model writes now: each prompt continued at each temperature, the same seeds every time."""
    from groundup.inference import LanguageModel

    wanted = pretraining.recipe.sample
    lm = LanguageModel(model, pretraining.prepared.tokenizer)
    prompts = wanted.prompts or [_opening(next(pretraining.prepared.texts("val"), ""))]
    return [
        {"step": step, "temperature": temperature, "prompt": prompt, "text": text}
        for temperature in wanted.temperatures
        for prompt, text in zip(
            prompts,
            lm.generate(prompts, max_tokens=wanted.max_tokens, temperature=temperature, seed=pretraining.recipe.seed),
            strict=True,
        )
    ]


def _opening(text: str) -> str:
    """The first lines of a document, cut at a line or word end: something to continue."""
    opening = text.lstrip()[:120]
    for cut in ("\n", " "):
        if cut in opening[20:]:
            return opening[: opening.rindex(cut)]
    return opening


def conclude(done: Pretraining) -> None:
    """Measure the run's best checkpoint on all of the held-out text beside gzip, xz and the 6-gram; write the report.

    The checkpoint is the one that ``generate`` and ``chat`` take: of a run that overfits, not the last.
    """
    from groundup.evaluation import compare
    from groundup.inference import find_model
    from groundup.model import load_model
    from groundup.report import console_table, write_report

    evaluation = done.run.path / "evaluation.json"
    if not evaluation.is_file():
        checkpoint = find_model(done.run.path)
        model = load_model(checkpoint, device=done.device)
        model.backend = done.recipe.attention if done.recipe.attention != "auto" else model.backend
        measured = held_out_loss(model, done, whole=True)
        row = {
            "name": f"this model ({quantity(model.parameter_count())} parameters)",
            "bits_per_byte": measured.bits_per_byte,
            "seconds": measured.seconds,
            "note": f"{checkpoint.name}, best on held-out text; windows of {done.recipe.model.context_length} tokens, "
            "half of each as context",
        }
        prepared = done.prepared
        write_json(evaluation, compare(row, prepared.text_bytes("train"), prepared.text_bytes("val")))
    report = write_report(done.run.path)
    say()
    say(console_table(done.run.path))
    say(f"Report: {report}")


def _say_text(planned: Pretraining) -> None:
    prepared = planned.prepared
    say(
        f"Text: {byte_size(prepared.train.n_bytes)} in {prepared.train.n_documents:,} documents to train on, "
        f"{byte_size(prepared.val.n_bytes)} in {prepared.val.n_documents:,} held out; "
        f"{prepared.tokenizer.vocab_size:,} tokens, {prepared.train.n_bytes / prepared.train.n_tokens:.2f} bytes each."
    )


def announce(rows: Sequence[Mapping[str, Any]], hint: str) -> None:
    """Show what a run will do: rows of section, key, value and why."""
    from rich.table import Table

    table = Table(title="The plan", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    section = ""
    for row in rows:
        shown, section = (row["section"] if row["section"] != section else ""), row["section"]
        table.add_row(shown, row["key"], _show(row["value"]), row["why"])
    say(table)
    say(hint)


def _show(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return quantity(value) if isinstance(value, float) and abs(value) >= 1 else str(value)
