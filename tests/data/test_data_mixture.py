from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groundup.config import build, dump_recipe, read_recipe
from groundup.data import LoaderRecipe, MixedLoader, Mixture, PackedLoader, TokenLoader, TokenSet, Weights, make_loader
from groundup.runtime import GroundupError, UsageError

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def deviations(mixture: Mixture, wanted: np.ndarray) -> np.ndarray:
    """Realised minus wanted samples of each source, after each sample."""
    sources, _ = mixture.locate(0, len(wanted))
    return np.cumsum(np.eye(mixture.n_sources)[sources], axis=0) - np.cumsum(wanted, axis=0)


@given(shares=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=3))
@few
def test_up_to_three_sources_are_never_a_sample_off(shares: list[float]) -> None:
    wanted = np.array([shares] * 3000) / sum(shares)
    assert np.abs(deviations(Mixture([Weights(0, shares)]), wanted)).max() <= 1 + 1e-6


@given(shares=st.lists(st.floats(0.001, 1.0), min_size=4, max_size=13))
@few
def test_many_sources_are_never_two_samples_off(shares: list[float]) -> None:
    wanted = np.array([shares] * 3000) / sum(shares)
    assert np.abs(deviations(Mixture([Weights(0, shares)]), wanted)).max() < 2


@pytest.mark.parametrize("shape", ["linear", "steps"])
def test_a_schedule_is_followed(shape: str) -> None:
    points = [Weights(0, [9, 1, 0]), Weights(701, [1, 1, 2]), Weights(1999, [1, 0, 3])]
    places, shares = [point.sample for point in points], np.array([point.shares for point in points]).T
    shares = shares / shares.sum(axis=0)
    n = np.arange(4001)
    if shape == "linear":
        wanted = np.stack([np.interp(n + 0.5, places, share) for share in shares], axis=1)
    else:
        wanted = shares[:, np.searchsorted(places, n, side="right") - 1].T
    mixture = Mixture(points, shape)  # type: ignore[arg-type]
    assert np.abs(deviations(mixture, wanted)).max() < 2
    sources, _ = mixture.locate(0, 4001)
    assert 1 not in sources[2000:]  # what weighs nothing gives nothing
    if shape == "steps":
        assert 2 not in sources[:701]


@given(shares=st.lists(st.integers(0, 9), min_size=1, max_size=7), first=st.integers(0, 10**13), data=st.data())
@few
def test_each_source_counts_its_own_samples(shares: list[int], first: int, data: st.DataObject) -> None:
    if not any(shares):
        shares[-1] = 1
    later = data.draw(st.lists(st.integers(1, 9), min_size=len(shares), max_size=len(shares)))
    mixture = Mixture([Weights(0, shares), Weights(83, later), Weights(331, shares)])
    for start in (0, 61, 300, first):
        sources, own = mixture.locate(start, 97)
        counts = mixture.given(start)
        assert sum(counts) == start
        for source, number in zip(sources.tolist(), own.tolist(), strict=True):
            assert number == counts[source]  # the next of its own, none left out, none twice
            counts[source] += 1
        assert counts == mixture.given(start + 97)


def test_weights_that_add_up_are_exact() -> None:
    mixture = Mixture([Weights(0, [0.7, 0.2, 0.1])])
    assert [mixture.given(10 * n) for n in (1, 7, 10**11)] == [[7 * n, 2 * n, n] for n in (1, 7, 10**11)]
    sources, _ = mixture.locate(0, 10)
    assert Counter(sources.tolist()) == {0: 7, 1: 2, 2: 1}
    assert 1 not in np.diff(np.flatnonzero(sources == 2))  # spread, not in a heap
    assert Mixture([Weights(0, [1, 1])]).locate(0, 6)[0].tolist() in ([0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0])


@pytest.mark.parametrize(
    "points",
    [
        [],
        [Weights(3, [1, 1])],
        [Weights(0, [1, 1]), Weights(0, [1, 2])],
        [Weights(0, [1, 1]), Weights(5, [1])],
        [Weights(0, [1, -1])],
        [Weights(0, [0, 0])],
    ],
)
def test_schedules_that_mean_nothing(points: list[Weights]) -> None:
    with pytest.raises(ValueError, match=r"schedule|weights"):
        Mixture(points)


@pytest.fixture
def two_texts(make_tokens: Callable[..., TokenSet]) -> dict[str, TokenSet]:
    return {"web": make_tokens([list(range(1, 501))]), "code": make_tokens([list(range(501, 702))])}


def test_a_mixed_loader_deals_each_texts_own_samples(two_texts: dict[str, TokenSet]) -> None:
    loaders = {name: TokenLoader(tokens, 7, 5, seed=number) for number, (name, tokens) in enumerate(two_texts.items())}
    mixture = Mixture([Weights(0, [1, 2]), Weights(30, [2, 1])])
    mixed = MixedLoader(loaders, mixture, 5, seed=0)
    sources, own = mixture.locate(0, 100)
    for index in (0, 19, 3, 4):
        inputs, targets, documents = mixed.batch(index)
        assert documents is None
        for row, sample in enumerate(range(5 * index, 5 * index + 5)):
            expected = list(loaders.values())[sources[sample]].samples(int(own[sample]), 1)
            assert np.array_equal(inputs[row], expected.inputs[0])
            assert np.array_equal(targets[row], expected.targets[0])
    assert mixed.resized(3).batch(2).inputs[0].tolist() == mixed.batch(1).inputs[1].tolist()
    shares = mixed.shares(100)
    assert {name: one["samples"] for name, one in shares.items()} == dict(
        zip(two_texts, mixture.given(100), strict=True)
    )
    assert mixed.epoch(0) == 0
    assert mixed.epoch(19) == min(one["epoch"] for one in mixed.shares(96).values())
    assert set(mixed.report()["sources"]) == {"web", "code"}


def test_packed_texts_are_mixed_too(two_texts: dict[str, TokenSet]) -> None:
    recipe = LoaderRecipe(packing="best_fit", mixture={"code": 3, "web": 1})
    loader = make_loader(two_texts, recipe, 11, 8, seed=0)
    inputs, targets, documents = loader.batch(0)
    assert documents.shape == inputs.shape == (8, 11)
    of_code = (np.where(inputs == 1008, 0, inputs).max(axis=1) > 500).sum()
    assert of_code == 6  # of 8
    assert (targets != -100).any(axis=1).all()
    assert 0 < loader.report()["padding"] < 0.1


def test_a_recipe_is_checked() -> None:
    for wrong, words in (
        (dict(fim_rate=1.5), "loader.fim_rate = 1.5 must be from 0 to 1"),
        (dict(prefetch=-1), "loader.prefetch"),
        (dict(mixture={"a": -1.0}), "the weight of a is -1.0"),
        (dict(mixture={"a": 0.0}), "no text has a weight above 0"),
        (dict(schedule=[{"at": 0.5, "a": 1.0}]), "loader.mixture must say how they begin"),
        (dict(mixture={"a": 1.0}, schedule=[{"a": 1.0}]), "entry 1: it needs at"),
        (dict(mixture={"a": 1.0}, schedule=[{"at": 0.5, "a": 0.0}]), "entry 1: no text"),
    ):
        with pytest.raises(UsageError, match=words):
            LoaderRecipe(**wrong)  # type: ignore[arg-type]


def test_the_recipes_names_are_the_texts(two_texts: dict[str, TokenSet]) -> None:
    for mixture, words in (
        ({"web": 1.0}, "loader.mixture: code has no weight"),
        ({"web": 1.0, "coed": 1.0}, "no text coed. Did you mean code"),
    ):
        with pytest.raises(UsageError, match=words):
            make_loader(two_texts, LoaderRecipe(mixture=mixture), 7, 5, seed=0)
    with pytest.raises(UsageError, match="one text"):
        make_loader(two_texts["web"], LoaderRecipe(mixture={"web": 1.0}), 7, 5, seed=0)


def test_places_of_a_schedule(two_texts: dict[str, TokenSet]) -> None:
    early, late = {"web": 1.0, "code": 0.0}, {"web": 0.0, "code": 1.0}
    recipe = LoaderRecipe(mixture=early, schedule=[{"at": 0.25, **late}], schedule_shape="steps")
    loader = make_loader(two_texts, recipe, 7, 5, seed=0, horizon_samples=40)
    assert isinstance(loader, MixedLoader)
    assert loader.mixture.locate(0, 40)[0].tolist() == [0] * 10 + [1] * 30
    with pytest.raises(UsageError, match=r"at = 0\.25 is a fraction .* Give max_steps"):
        make_loader(two_texts, recipe, 7, 5, seed=0)
    by_number = LoaderRecipe(mixture=early, schedule=[{"at": 10, **late}], schedule_shape="steps")
    loader = make_loader(two_texts, by_number, 7, 5, seed=0)
    assert isinstance(loader, MixedLoader)
    assert loader.mixture.given(1000) == [10, 990]
    backwards = LoaderRecipe(mixture=early, schedule=[{"at": 9, **late}, {"at": 4, **early}])
    with pytest.raises(UsageError, match=r"places .* 9, 4 must stand in order"):
        make_loader(two_texts, backwards, 7, 5, seed=0)


def test_without_weights_texts_weigh_by_their_size(two_texts: dict[str, TokenSet]) -> None:
    loader = make_loader(two_texts, LoaderRecipe(), 7, 5, seed=0)
    assert isinstance(loader, MixedLoader)
    assert loader.mixture.given(703) == [501, 202]


def test_sets_that_do_not_belong_together(two_texts: dict[str, TokenSet], make_tokens: Callable[..., TokenSet]) -> None:
    other = SimpleNamespace(vocab_size=1009, end_of_text_id=1008, fingerprint="e" * 64)
    with pytest.raises(GroundupError, match=r"more .* and web .* were made by different tokenizers"):
        make_loader(two_texts | {"more": make_tokens([[1] * 50], tokenizer=other)}, LoaderRecipe(), 7, 5, seed=0)
    with pytest.raises(GroundupError, match="made by another tokenizer than the run's"):
        make_loader(two_texts["web"], LoaderRecipe(), 7, 5, seed=0, tokenizer=other)  # type: ignore[arg-type]
    with pytest.raises(GroundupError, match=r"its vocabulary has 1,009 tokens, the model's 1,000"):
        make_loader(two_texts["web"], LoaderRecipe(), 7, 5, seed=0, vocab_size=1000)
    make_loader(two_texts["web"], LoaderRecipe(), 7, 5, seed=0, vocab_size=1009)


def test_one_set_needs_no_mixture(two_texts: dict[str, TokenSet]) -> None:
    alone = make_loader(two_texts["web"], LoaderRecipe(packing="none"), 7, 5, seed=3)
    assert isinstance(alone, TokenLoader)
    assert np.array_equal(alone.batch(2)[0], TokenLoader(two_texts["web"], 7, 5, seed=3).batch(2)[0])
    assert isinstance(make_loader(two_texts["web"], LoaderRecipe(packing="best_fit"), 7, 5, seed=3), PackedLoader)
    named = make_loader({"web": two_texts["web"]}, LoaderRecipe(mixture={"web": 2}), 7, 5, seed=3)
    assert np.array_equal(named.batch(2)[0], alone.batch(2)[0])


def test_a_mixture_stands_in_a_recipe_file(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "mixed.yaml"
    path.write_text(
        "packing: documents\nmixture: {hf:a/b.c: 0.7, ./code: 2}\nschedule:\n- {at: 0.5, hf:a/b.c: 1, ./code: 0}\n"
    )
    values = read_recipe(path, LoaderRecipe).values
    recipe = build(LoaderRecipe, values)
    assert recipe.mixture == {"hf:a/b.c": 0.7, "./code": 2}
    assert recipe.schedule == [{"at": 0.5, "hf:a/b.c": 1, "./code": 0}]
    path.write_text(dump_recipe(values))
    assert build(LoaderRecipe, read_recipe(path, LoaderRecipe).values) == recipe
