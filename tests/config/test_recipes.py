"""Every recipe that comes with groundup says what it means: known keys, a model of the size its head names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from groundup.config import build, find_recipe, read_recipe, recipe_files
from groundup.model import Transformer, explain
from groundup.optim import build_optimizers
from groundup.training import PretrainRecipe, parse_budget
from groundup.training.run import settle_length
from groundup.training.scaling import without_open_shape

V, E = 32_000, 768  # of the smallest Llama


def llama(layers: int, width: int, hidden: int) -> int:
    """Attention and a gated feed-forward, two norms each; a norm at the end, and two tables."""
    block = 4 * width * width + 3 * width * hidden + 2 * width
    return layers * block + width + 2 * V * width


def gpt2() -> int:
    """As the published weights have it: everything has a bias, one table serves both ends."""
    width = 768
    block = (width * 3 * width + 3 * width) + (width * width + width) + (8 * width * width + 5 * width) + 4 * width
    return 12 * block + 2 * width + (50_257 + 1024) * width


def moe() -> int:
    """Seven more feed-forwards in each layer, and a router."""
    return llama(12, E, 2048) + 12 * (7 * 3 * E * 2048 + 8 * E)


def latent() -> int:
    """In place of queries, keys, values and output: queries of 96 a head, a latent and its norm, what comes from it."""
    width, heads, rank, rope, nope, v = 1024, 16, 256, 32, 64, 64
    queries = width * heads * (rope + nope)
    attention = queries + width * (rank + rope) + rank + rank * heads * (nope + v) + heads * v * width
    return llama(24, width, 2736) - 24 * 4 * width * width + 24 * attention


SIZES = {
    "gpt2-124m": (gpt2(), 124_439_808),
    "llama-130m": (llama(12, 768, 2048), 134_105_856),
    "llama-350m": (llama(24, 1024, 2736), 367_969_280),
    "llama-1b": (llama(24, 2048, 5461), 1_339_082_752),
    "moe-8x130m": (moe(), 530_541_312),
    "mla-350m": (latent(), 349_887_488),
}
TOKENS = {  # that the whole run reads, in billions, as the heads say
    "gpt2-124m": 10.0, "llama-130m": 2.6, "llama-350m": 7.9, "llama-1b": 13.1, "moe-8x130m": 2.6, "mla-350m": 7.9,
    "long-context": 0.131,
}  # fmt: skip


def recipe_of(name: str, **over: Any) -> PretrainRecipe:
    given = read_recipe(find_recipe(name), PretrainRecipe)
    return build(PretrainRecipe, without_open_shape({**given.values, **over}), given.sources)


@pytest.mark.parametrize("name", sorted(recipe_files(PretrainRecipe)))
def test_a_recipe_is_built_and_can_be_run(name: str) -> None:
    path = recipe_files(PretrainRecipe)[name]
    recipe = recipe_of(name)
    assert recipe.out == f"runs/{name}"  # two recipes never write into one run
    given = settle_length(read_recipe(path, PretrainRecipe))
    assert sum(given.values.get(key) is not None for key in ("max_steps", "minutes", "budget")) == 1
    if recipe.budget is not None:
        parse_budget(recipe.budget)
    if recipe.batch_tokens is not None:
        assert recipe.batch_tokens % (recipe.model.context_length * (recipe.micro_batch or 1)) == 0
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# "), "a recipe says first what it is for"
    assert max(map(len, text.splitlines())) <= 120
    if recipe.max_steps is not None:
        assert recipe.optim.warmup_steps < recipe.max_steps


def test_the_recipes_that_the_documentation_names_are_there() -> None:
    wanted = {"demo", "shakespeare", "shakespeare-bpe", "shakespeare-cpu", "long-context", *SIZES}
    assert wanted <= set(recipe_files(PretrainRecipe))


@pytest.mark.parametrize("name", SIZES)
def test_a_model_has_the_parameters_that_its_recipe_names(name: str) -> None:
    by_parts, expected = SIZES[name]
    config = recipe_of(name).model
    assert explain(config).total_parameters == by_parts == expected
    with torch.device("meta"):
        assert Transformer(config).parameter_count() == expected


def test_a_token_meets_two_experts_of_eight() -> None:
    active = explain(recipe_of("moe-8x130m").model).active_parameters
    assert active == moe() - 12 * 6 * 3 * E * 2048
    assert active / 1e6 == pytest.approx(191, abs=0.5)


@pytest.mark.parametrize("name", TOKENS)
def test_a_run_reads_the_tokens_that_its_recipe_names(name: str) -> None:
    recipe = recipe_of(name)
    assert recipe.max_steps is not None
    assert recipe.batch_tokens is not None
    assert recipe.max_steps * recipe.batch_tokens / 1e9 == pytest.approx(TOKENS[name], rel=0.02)
    if name != "gpt2-124m":  # whose sample has just as many tokens
        assert recipe.corpus.max_bytes is None or recipe.corpus.max_bytes > 4 * recipe.max_steps * recipe.batch_tokens


def test_gpt2_decays_all_that_has_two_dimensions_and_nothing_else() -> None:
    recipe = recipe_of("gpt2-124m", **{"model.n_layer": 1})
    with torch.device("meta"):
        model = Transformer(recipe.model)
    groups = [group for one in build_optimizers(model, recipe.optim).values() for group in one.param_groups]
    decays = {p.dim() >= 2: group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {True: 0.1, False: 0.0}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["moe-8x130m", "mla-350m"])
def test_what_is_compared_differs_in_one_thing(name: str) -> None:
    base = {"moe-8x130m": "llama-130m", "mla-350m": "llama-350m"}[name]
    mine, theirs = (dict(read_recipe(find_recipe(one), PretrainRecipe).values) for one in (name, base))
    differing = {
        key.split(".")[1] if "." in key else key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key)
    }
    assert differing == {"moe-8x130m": {"out", "experts", "learning_rate"}, "mla-350m": {"out", "latent"}}[name]


def test_a_longer_context_asks_only_for_what_a_model_may_change() -> None:
    given = read_recipe(find_recipe("long-context"), PretrainRecipe)
    of_model = {key for key in given.values if key.startswith("model.")}
    assert of_model == {"model.context_length", "model.rope_theta", "model.dropout"}
    assert given.values["model.context_length"] == 8 * recipe_of("llama-130m").model.context_length
    assert given.values["init_from"] == recipe_of("llama-130m").out


@pytest.mark.parametrize("name", ["shakespeare", "shakespeare-bpe", "shakespeare-cpu"])
def test_shakespeare_is_held_out_as_nanogpt_does(name: str) -> None:
    recipe = recipe_of(name)
    assert recipe.data == "shakespeare"
    assert recipe.corpus.val_fraction == 0.1
    assert recipe.tokenizer.algorithm == ("bpe" if name == "shakespeare-bpe" else "characters")


def test_recipes_are_packaged_where_they_are_found() -> None:
    assert {path.parent.name for path in recipe_files(PretrainRecipe).values()} == {"recipes"}
    assert all(isinstance(path, Path) for path in recipe_files(PretrainRecipe).values())
