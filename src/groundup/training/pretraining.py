"""From a plan to a trained model: next tokens, learnt from prepared text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from groundup.data import Loader, Prefetcher, make_loader
from groundup.model import Transformer, explain, load_model
from groundup.runtime import UsageError, say
from groundup.training.job import Job, Measured
from groundup.training.objectives import NextToken
from groundup.training.parallel import equip
from groundup.training.plan import Pretraining, plan_pretraining
from groundup.training.recipe import PretrainRecipe
from groundup.training.sitting import train

__all__ = ["HeldOut", "Hooks", "Pretraining", "objective_of", "plan_pretraining", "pretrain"]


class HeldOut(Protocol):
    """What an evaluation on held-out text tells the run."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        ...

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte."""
        ...


@dataclass(frozen=True)
class Hooks:
    """What is called during a run; handed in from outside, so that training knows neither evaluation nor sampling.

    Args:
        evaluate: model and run to the loss on held-out text.
        sample: model, run and step to rows of :func:`groundup.report.add_samples`.
    """

    evaluate: Callable[[Transformer, Pretraining], HeldOut]
    sample: Callable[[Transformer, Pretraining, int], list[dict[str, Any]]]


def objective_of(recipe: PretrainRecipe) -> NextToken:
    """What a recipe wants learnt."""
    return NextToken(**asdict(recipe.loss))


def pretrain(pretraining: Pretraining, hooks: Hooks) -> tuple[Transformer, Pretraining]:
    """Train, or go on where the run stopped.

    Returns:
        The trained model, and the run, ``finished`` unless somebody stopped it.

    Raises:
        GroundupError: another process trains here, the checkpoints are damaged, the loss is not finite, or the disk is
            full.
    """
    model, ended = train(_PretrainingJob(pretraining, hooks))
    return model, replace(pretraining, finished=ended.finished, trained=ended.trained)


class _PretrainingJob(Job[Transformer]):
    """Next tokens of prepared text."""

    def __init__(self, pretraining: Pretraining, hooks: Hooks) -> None:
        recipe, prepared = pretraining.recipe, pretraining.prepared
        super().__init__(
            recipe=recipe,
            run=pretraining.run,
            values=pretraining.values,
            tokenizer=prepared.tokenizer,
            device=pretraining.device,
            precision=pretraining.precision,
            positions=recipe.model.context_length,
            world=pretraining.world,
            seconds=pretraining.budget.seconds,
            flops_per_token=explain(recipe.model).training_flops_per_token,
            flops_per_second=pretraining.flops_per_second,
        )
        self.it, self.hooks = pretraining, hooks
        self.bits_per_nat_and_byte = prepared.train.n_tokens / prepared.train.n_bytes / math.log(2)

    def build(self, *, fresh: bool) -> Transformer:
        """The model to go on from, or one of the recipe's shape."""
        recipe = self.it.recipe
        if fresh and recipe.init_from is not None:
            from groundup.inference import find_model

            return equip(_with_config(load_model(find_model(recipe.init_from)), recipe), recipe)
        return equip(Transformer(recipe.model), recipe)

    def objective(self) -> NextToken:
        """The next token."""
        return objective_of(self.it.recipe)

    def loader(self, micro_batch: int, samples: int | None) -> Loader | Prefetcher:
        """Deals windows of the text, or whole documents."""
        recipe = self.it.recipe
        loader = make_loader(
            self.it.sets or self.it.prepared.train,
            recipe.loader,
            recipe.model.context_length,
            micro_batch,
            recipe.seed,
            samples,
            tokenizer=self.it.prepared.tokenizer,
            vocab_size=recipe.model.vocab_size,
        )
        if recipe.loader.packing == "best_fit":
            report = loader.report()
            padding, cut = report["padding"], report["documents_cut"]
            say(f"  Packing: {padding:.2%} of positions are padding; {cut:,} documents were cut.")
        return Prefetcher(loader, recipe.loader.prefetch, self.world.size) if recipe.loader.prefetch else loader

    def metrics(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Bits per byte, which can be compared whatever the tokenizer."""
        return {"bits_per_byte": row.get("cross_entropy", row["loss"]) * self.bits_per_nat_and_byte}

    def shown(self, row: Mapping[str, Any]) -> str:
        """The same."""
        return f"{row['bits_per_byte']:.3f} bits/byte"

    def measure(self, model: Transformer) -> Measured:
        """Loss and bits per byte on held-out text."""
        found = self.hooks.evaluate(model, self.it)
        bits = found.bits_per_byte
        return Measured(found.loss, {"bits_per_byte": bits}, f"held-out {bits:.3f}")

    def samples(self, model: Transformer, step: int) -> list[dict[str, Any]]:
        """What the model writes."""
        return self.hooks.sample(model, self.it, step)


def _with_config(model: Transformer, recipe: PretrainRecipe) -> Transformer:
    """The same weights under the recipe's config: a longer context, other frequencies, other dropout."""
    if recipe.model == model.config:
        return model
    fresh = Transformer(recipe.model)
    try:
        fresh.load_state_dict(model.state_dict())
    except RuntimeError as error:
        what = str(error).splitlines()[-1].strip()
        raise UsageError(
            f"init_from = {recipe.init_from}: its weights do not fit the recipe's model: {what}"
        ) from error
    return fresh
