"""The knobs of the loader: the ``loader.*`` keys of a recipe, and the loader they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from typing import TYPE_CHECKING, Literal

from groundup.data.batch import Loader
from groundup.data.fim import FillInTheMiddle
from groundup.data.loader import TokenLoader
from groundup.data.mixture import MixedLoader, Mixture, Weights
from groundup.data.packing import PackedLoader
from groundup.data.permutation import derive_key
from groundup.data.shards import TokenSet
from groundup.runtime import GroundupError, UsageError
from groundup.runtime.errors import nearest

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer

AT = "at"  # the key of a schedule's point that is no text's name


@dataclass(frozen=True)
class LoaderRecipe:
    """How the text is dealt out in training.

    Args:
        packing: none cuts the running text into windows; documents does so too, and attention stays inside each
            document; best_fit packs whole documents into windows, cutting only those that are longer
        fim_rate: part of the documents that become fill-in-the-middle examples
        fim_spm_rate: part of those that put the suffix first
        prefetch: micro-batches read ahead in a thread; 0 for none
        mixture: weights of several texts by name, such as {web: 0.7, code: 0.3}; without it each weighs by its size
        schedule: weights later on, each with its place, at, as a fraction of the run or (above 1) a number of windows,
            such as [{at: 0.8, web: 0.2, code: 0.8}]
        schedule_shape: linear changes weights evenly between places, steps changes them at each place
    """

    packing: Literal["none", "documents", "best_fit"] = "none"
    fim_rate: float = 0.0
    fim_spm_rate: float = 0.5
    prefetch: int = 2
    mixture: dict[str, float] = field(default_factory=dict)
    schedule: list[dict[str, float]] = field(default_factory=list)
    schedule_shape: Literal["linear", "steps"] = "linear"

    def __post_init__(self) -> None:
        for name in ("fim_rate", "fim_spm_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UsageError(f"loader.{name} = {getattr(self, name)} must be from 0 to 1.")
        if self.prefetch < 0:
            raise UsageError(f"loader.prefetch = {self.prefetch} must not be negative.")
        if self.mixture:
            _check_weights("loader.mixture", self.mixture)
        if self.schedule and not self.mixture:
            raise UsageError("loader.schedule says how weights change: loader.mixture must say how they begin.")
        for number, point in enumerate(self.schedule, start=1):
            where = f"loader.schedule, entry {number}"
            if not point.get(AT, 0.0) > 0 or not isfinite(point[AT]):
                raise UsageError(f"{where}: it needs {AT}, above 0: a fraction of the run, or a number of windows.")
            _check_weights(where, {name: weight for name, weight in point.items() if name != AT})


def make_loader(
    sets: TokenSet | Mapping[str, TokenSet],
    recipe: LoaderRecipe,
    context_length: int,
    batch_size: int,
    seed: int,
    horizon_samples: int | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
) -> Loader:
    """The loader that a recipe describes, without prefetching (see :class:`groundup.data.Prefetcher`).

    Args:
        sets: the tokens to deal, or several by name.
        recipe: how.
        context_length: T, positions of a window.
        batch_size: B, windows per micro-batch.
        seed: of everything random.
        horizon_samples: windows of the whole run, where they are known: fractions in a schedule are of them.
        tokenizer: the one the tokens were made with; its sentinels are needed for fill-in-the-middle.
        vocab_size: of the model, where tokens must be held against it.

    Raises:
        UsageError: the recipe's names are not those of the sets, or it asks for what cannot be.
        GroundupError: the sets do not belong together or to the model, or hold too little.
    """
    named = {"": sets} if isinstance(sets, TokenSet) else dict(sets)
    if not named:
        raise ValueError("no token sets")
    _check_sets(named, tokenizer, vocab_size)
    loaders: dict[str, Loader] = {}
    for number, (name, tokens) in enumerate(named.items()):
        own = seed if len(named) == 1 else derive_key(seed, number, 9)  # texts of equal length, not in equal order
        fill = None
        if recipe.fim_rate:
            if tokenizer is None:
                raise ValueError("fill-in-the-middle needs the tokenizer")
            fill = FillInTheMiddle.with_tokens_of(tokenizer, recipe.fim_rate, recipe.fim_spm_rate, own)
        if recipe.packing == "best_fit":
            loaders[name] = PackedLoader(tokens, context_length, batch_size, own, fill)
        else:
            loaders[name] = TokenLoader(tokens, context_length, batch_size, own, recipe.packing == "documents", fill)
    if isinstance(sets, TokenSet):
        if recipe.mixture:
            raise UsageError(
                f"loader.mixture names {', '.join(recipe.mixture)}, but the run has one text. Leave it out."
            )
        return loaders[""]
    weights = recipe.mixture or {name: float(tokens.n_tokens) for name, tokens in named.items()}
    schedule = [Weights(0, _in_order(weights, named, "loader.mixture"))]
    for point in recipe.schedule:
        shares = _in_order({name: weight for name, weight in point.items() if name != AT}, named, "loader.schedule")
        schedule.append(Weights(_sample_at(point[AT], horizon_samples), shares))
    if any(one.sample >= two.sample for one, two in pairwise(schedule)):
        places = ", ".join(f"{point[AT]:g}" for point in recipe.schedule)
        raise UsageError(f"loader.schedule: the places ({AT}) {places} must stand in order, each once.")
    if len(named) == 1:
        return next(iter(loaders.values()))
    return MixedLoader(loaders, Mixture(schedule, recipe.schedule_shape), batch_size, seed)


def _check_weights(where: str, weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if not (weight >= 0 and isfinite(weight)):
            raise UsageError(f"{where}: the weight of {name} is {weight}; it must not be negative.")
    if not sum(weights.values()) > 0:
        raise UsageError(f"{where}: no text has a weight above 0.")


def _check_sets(named: Mapping[str, TokenSet], tokenizer: Tokenizer | None, vocab_size: int | None) -> None:
    first_name, first = next(iter(named.items()))
    for name, tokens in named.items():
        if tokens.fingerprint != first.fingerprint:
            raise GroundupError(
                f"{name} ({tokens.folder}) and {first_name} ({first.folder}) were made by different tokenizers. "
                "Prepare one of them again with the tokenizer of the other (tokenizer.path)."
            )
        if tokenizer is not None and tokens.fingerprint != tokenizer.fingerprint:
            raise GroundupError(
                f"{tokens.folder}: these token ids were made by another tokenizer than the run's. Prepare the data "
                "again with it, or use the one that lies beside the data."
            )
        if vocab_size is not None and tokens.vocab_size > vocab_size:
            raise GroundupError(
                f"{tokens.folder}: its vocabulary has {tokens.vocab_size:,} tokens, the model's {vocab_size:,}. "
                f"Use a model with vocab_size = {tokens.vocab_size} or more, or prepare the data with its tokenizer."
            )


def _in_order(weights: Mapping[str, float], named: Mapping[str, TokenSet], where: str) -> list[float]:
    """Weights in the order of the sets; each must have one, be it 0."""
    for name in weights:
        if name not in named:
            raise UsageError(f"{where}: there is no text {name}.{nearest(name, named)} There are: {', '.join(named)}.")
    if missing := [name for name in named if name not in weights]:
        raise UsageError(f"{where}: {', '.join(missing)} has no weight. Give it one; 0 leaves it out.")
    return [weights[name] for name in named]


def _sample_at(place: float, horizon_samples: int | None) -> int:
    if place > 1:
        return round(place)
    if horizon_samples is None:
        raise UsageError(
            f"loader.schedule: {AT} = {place:g} is a fraction of a run whose length is not known. Give max_steps, or "
            "numbers of windows."
        )
    return round(place * horizon_samples)
