"""What a run derives: never over what was given, always with a reason, and always something that can be trained."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from groundup.config import build, keys_of
from groundup.model import ModelConfig
from groundup.runtime import UsageError
from groundup.training import PretrainRecipe, parse_budget
from groundup.training.scaling import Budget, Facts, Plan, derive, optimizer_for, run_budget, vocabulary_limit

FACTS = Facts(train_tokens=4_000_000, vocab_size=2048, flops_per_second=1e11)


def shape(plan: Plan) -> ModelConfig:
    """The model that was planned; raises where it is none."""
    return ModelConfig(**{key.removeprefix("model."): v for key, v in plan.values.items() if key.startswith("model.")})


# ---- budgets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", Budget(seconds=90.0)), ("5m", Budget(seconds=300.0)), ("5min", Budget(seconds=300.0)),
        ("2h", Budget(seconds=7200.0)), ("0.5h", Budget(seconds=1800.0)), (" 1.5 m ", Budget(seconds=90.0)),
        ("2e15flops", Budget(flops=2e15)), ("1flop", Budget(flops=1.0)), ("3.5E+2 flops", Budget(flops=350.0)),
    ],
)  # fmt: skip
def test_budgets_that_can_be_read(text: str, expected: Budget) -> None:
    assert parse_budget(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "5", "m", "5 apples", "-5m", "0s", "0.0flops", "1.2.3h", ".", "e5s", "1e999s", "5m5m", "nans", "infflops"],
)
def test_budgets_that_cannot(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a budget. Give time \(90s, 5m, 2h\) or compute \(2e15flops\)"):
        parse_budget(text)


def test_the_budget_of_a_recipe() -> None:
    assert run_budget({}) == Budget()
    assert run_budget({"minutes": None, "budget": None}) == Budget()
    assert run_budget({"minutes": 2}) == Budget(seconds=120.0)
    assert run_budget({"budget": "1e12flops"}) == Budget(flops=1e12)
    for minutes in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UsageError, match=f"minutes = {minutes} must be above 0"):
            run_budget({"minutes": minutes})


# ---- examples


def test_a_budget_of_time_is_what_the_machine_can_compute_in_it() -> None:
    """5 minutes at 0.2 x 1e11 FLOP/s are 6e12 FLOP, and sqrt(6e12 / 120) = 224k parameters: a depth of 1 or 2."""
    in_time = derive({}, FACTS, Budget(seconds=300.0))
    in_flops = derive({}, FACTS, Budget(flops=0.2 * 1e11 * 300.0))
    assert shape(in_time) == shape(in_flops)
    assert in_time.values["model.n_layer"] == 2  # 12 x 2 x 128^2 = 393k is nearer to 224k (in ratio) than 49k
    assert "max_steps" not in in_time.values, "how many steps fit into the time is seen on the way"
    assert in_flops.values["max_steps"] > 0


def test_one_dial() -> None:
    plan = derive({"depth": 6}, FACTS, Budget(seconds=300.0))
    config = shape(plan)
    assert (config.n_layer, config.n_embd, config.n_head, config.head_dim) == (6, 384, 6, 64)
    assert config.vocab_size == 2048
    assert config.context_length == 256


def test_without_a_budget_the_run_is_compute_optimal() -> None:
    plan = derive({"depth": 2}, FACTS, Budget())
    tokens = plan.values["max_steps"] * plan.values["batch_tokens"]
    from groundup.model import explain

    assert tokens == pytest.approx(20 * explain(shape(plan)).total_parameters, rel=0.05)


def test_muon_unless_it_would_double_the_time_of_a_step() -> None:
    wide = ModelConfig(vocab_size=1000, context_length=512, n_layer=2, n_head=12, n_embd=768)
    assert optimizer_for(wide, 2 * 512)[0] == "adamw"
    name, why = optimizer_for(wide, 16 * 512)
    assert name == "muon"
    assert "some 47% of the others' time" in why
    sparse = replace(wide, experts=replace(wide.experts, count=32, active=2))
    assert optimizer_for(sparse, 16 * 512)[0] == "adamw"  # a token meets few of the matrices that Muon works on


def test_the_given_number_of_steps_stays() -> None:
    assert derive({"max_steps": 7}, FACTS, Budget()).values["max_steps"] == 7


def test_dropout_comes_with_many_passes_over_the_text() -> None:
    long = {"model.n_layer": 2, "max_steps": 1000, "batch_tokens": 65_536}
    assert derive(long, FACTS, Budget()).values["model.dropout"] == 0.1
    assert derive(long | {"max_steps": 10}, FACTS, Budget()).values["model.dropout"] == 0.0


# ---- properties

GIVEN: dict[str, st.SearchStrategy[Any]] = {
    "depth": st.integers(1, 12),
    "model.n_layer": st.integers(1, 12),
    "model.n_embd": st.integers(1, 300).map(lambda half: 2 * half),
    "model.context_length": st.sampled_from([8, 13, 64, 100, 256]),
    "model.vocab_size": st.integers(257, 50_000),
    "model.dropout": st.floats(0, 0.5),
    "model.n_head": st.integers(1, 20),
    "max_steps": st.integers(1, 10**6),
    "optim.learning_rate": st.floats(1e-5, 0.1),
    "optim.warmup_steps": st.integers(0, 500),
    "micro_batch": st.integers(1, 40),
    "seed": st.integers(),
}  # fmt: skip
BUDGETS = st.one_of(
    st.just(Budget()),
    st.floats(1e-3, 1e7).map(lambda seconds: Budget(seconds=seconds)),
    st.floats(1.0, 1e24).map(lambda flops: Budget(flops=flops)),
)
FACTS_ = st.builds(
    Facts,
    train_tokens=st.integers(500, 10**11),
    vocab_size=st.integers(257, 50_000),
    flops_per_second=st.floats(1e8, 1e15),
)


@given(st.fixed_dictionaries({}, optional=GIVEN), st.integers(0, 5), FACTS_, BUDGETS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@example({"model.n_embd": 146}, 0, FACTS, Budget())
@example({"micro_batch": 3}, 0, FACTS, Budget(seconds=60.0))
@example({"depth": 4, "model.n_head": 7}, 0, FACTS, Budget(flops=1e15))
def test_whatever_is_given_the_rest_fits(given_: dict[str, Any], batches: int, facts: Facts, budget: Budget) -> None:
    """``batches`` stands for a given batch of so many micro-batches (0: not given)."""
    if "model.n_embd" in given_ and "model.n_head" in given_:
        assume(given_["model.n_embd"] % (2 * given_["model.n_head"]) == 0)
    assume(given_.get("model.vocab_size", facts.vocab_size) >= facts.vocab_size)  # less is refused
    if batches:
        given_ = given_ | {
            "batch_tokens": batches * given_.get("micro_batch", 1) * given_.get("model.context_length", 256)
        }
    before = dict(given_)
    plan = derive(given_, facts, budget)

    assert given_ == before
    assert {key: plan.values[key] for key in given_} == given_, "what was given is never overwritten"
    derived = {entry.key: entry for entry in plan.derived}
    assert len(derived) == len(plan.derived), "nothing is derived twice"
    assert plan.values == given_ | {key: entry.value for key, entry in derived.items()}
    assert not derived.keys() & given_.keys()
    assert all(entry.why for entry in plan.derived if entry.key != "model.n_layer" or "model.n_layer" not in given_)
    assert derived.keys() <= keys_of(PretrainRecipe).keys()

    config = shape(plan)
    assert facts.train_tokens > config.context_length
    assert plan.values["batch_tokens"] % (plan.values["micro_batch"] * config.context_length) == 0
    assert plan.values["batch_tokens"] > 0
    recipe = build(PretrainRecipe, plan.values)
    assert recipe.optim.learning_rate > 0
    assert recipe.max_steps is None or recipe.max_steps >= 1
    assert (recipe.max_steps is None) == (budget.seconds is not None and "max_steps" not in given_)


@given(FACTS_, st.lists(st.floats(1e6, 1e24), min_size=2, max_size=5).map(sorted))
@settings(max_examples=25, deadline=None)
def test_more_compute_never_makes_a_smaller_model(facts: Facts, budgets: list[float]) -> None:
    shapes = [shape(derive({}, facts, Budget(flops=flops))) for flops in budgets]
    assert [config.n_layer for config in shapes] == sorted(config.n_layer for config in shapes)
    assert [config.n_embd for config in shapes] == sorted(config.n_embd for config in shapes)


@given(FACTS_, st.integers(1, 12), st.lists(st.floats(1e10, 1e22), min_size=2, max_size=5).map(sorted))
@settings(max_examples=25, deadline=None)
def test_at_one_depth_more_compute_never_means_a_smaller_batch_or_rate(
    facts: Facts, depth: int, budgets: list[float]
) -> None:
    plans = [derive({"depth": depth}, facts, Budget(flops=flops)).values for flops in budgets]
    for key in ("batch_tokens", "optim.learning_rate"):
        assert [plan[key] for plan in plans] == sorted(plan[key] for plan in plans), key
    tokens = [plan["batch_tokens"] * plan["max_steps"] for plan in plans]
    assert all(later > 0.5 * earlier for earlier, later in pairwise(tokens))


@given(st.floats(1e-2, 1e9).map(lambda seconds: Budget(seconds=seconds)), st.floats(1e6, 1e15))
@settings(max_examples=25, deadline=None)
def test_a_vocabulary_is_a_power_of_two_and_grows_with_the_budget(budget: Budget, speed: float) -> None:
    size = vocabulary_limit({}, speed, budget)
    assert 512 <= size <= 32_768
    assert size & (size - 1) == 0
    assert vocabulary_limit({}, speed, Budget(seconds=1000 * (budget.seconds or 0.0))) >= size
    assert vocabulary_limit({}, speed, Budget()) == 32_768
    assert 512 <= vocabulary_limit({"depth": 3}, speed, budget) == vocabulary_limit({"depth": 3}, 1.0, Budget())


# ---- what cannot be derived


@pytest.mark.parametrize("tokens", [0, 1, 8])
def test_a_text_shorter_than_a_sequence_is_one_line(tokens: int) -> None:
    with pytest.raises(UsageError, match=f"context_length = 8, but the training text has only {tokens} tokens"):
        derive({}, Facts(tokens, 300, 1e9), Budget(seconds=60.0))


def test_a_given_context_longer_than_the_text_says_what_would_do() -> None:
    with pytest.raises(UsageError, match=r"context_length = 1024, but .* only 600 tokens.* at most 300\."):
        derive({"model.context_length": 1024}, Facts(600, 300, 1e9), Budget())
    assert shape(derive({"model.context_length": 300}, Facts(600, 300, 1e9), Budget())).context_length == 300


@pytest.mark.parametrize("given_", [{"depth": 0}, {"depth": 49}, {"model.n_layer": -1}])
def test_a_depth_out_of_range_is_one_line(given_: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="must lie between 1 and 48"):
        derive(given_, FACTS, Budget())


@pytest.mark.parametrize("wrong", [{"model.n_head": 7, "model.n_embd": 64}, {"model.n_embd": 63}, {"model.n_head": 0}])
def test_a_shape_that_contradicts_itself_is_one_line(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"^model\.n_"):
        derive(wrong, FACTS, Budget())


def test_a_model_that_knows_fewer_tokens_than_the_tokenizer_is_refused() -> None:
    with pytest.raises(UsageError, match=r"model.vocab_size = 300 is smaller than the tokenizer's"):
        derive({"model.vocab_size": 300}, FACTS, Budget())
