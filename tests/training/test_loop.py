"""The loop: accumulation, schedule, horizon, milestones, and what ends it."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import groundup.training.loop as loop_module
from groundup.data import TokenBatch
from groundup.model import Classifier, ModelConfig, Transformer
from groundup.optim import Horizon, LossScale, OptimConfig, WeightAverage, build_optimizers
from groundup.runtime import GroundupError
from groundup.runtime.interrupt import StopRequest
from groundup.training.loop import MOST_ROLLBACKS, Loop
from groundup.training.loop_parts import Extras, LoopHooks, LoopSettings, Milestone
from groundup.training.objectives import Classification, LabelledTexts, NextToken


def random_batches(config: ModelConfig, rows: int) -> Callable[[int], TokenBatch]:
    def batch(index: int) -> TokenBatch:
        generator = torch.Generator().manual_seed(1000 + index)
        ids = torch.randint(0, config.vocab_size, (rows, config.context_length + 1), generator=generator)
        return TokenBatch(ids[:, :-1], ids[:, 1:])

    return batch


class Recorder(LoopHooks):
    """Notes what the loop calls."""

    def __init__(self, recorded: dict[str, list[Any]]) -> None:
        self.rows: list[Any] = recorded.setdefault("rows", [])
        self.milestones: list[Any] = recorded.setdefault("milestones", [])
        self.horizons: list[Any] = recorded.setdefault("horizons", [])
        self.loop: Loop | None = None

    def on_log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def on_milestone(self, kind: Milestone) -> None:
        assert self.loop is not None
        self.milestones.append((kind, self.loop.position.step))

    def on_horizon(self, horizon: Horizon) -> None:
        self.horizons.append(horizon)


def make_loop(
    model: nn.Module, optim: OptimConfig, batches: Callable[[int], Any], recorded: dict[str, list[Any]], **over: Any
) -> Loop:
    objective = over.pop("objective", NextToken())
    decided = over.pop("decided", ())
    hooks = over.pop("hooks", None) or Recorder(recorded)
    extras = over.pop("extras", None)
    settings = {
        "batch_tokens": 52,
        "accumulate": 1,
        "max_steps": 7,
        "seconds": None,
        "log_every": 1,
        "save_every": None,
        "precision": "float32",
    } | over
    hooks.loop = Loop(
        model,
        objective,
        batches,
        build_optimizers(model, optim),
        optim,
        LoopSettings(**settings),
        hooks,
        decided=decided,
        extras=extras,
    )
    return hooks.loop


def run(loop: Loop, stop: StopRequest | None = None) -> str:
    return loop.run(StopRequest() if stop is None else stop)


def test_eight_micro_batches_make_the_step_of_one_large_batch(config: ModelConfig, optim_config: OptimConfig) -> None:
    results = []
    for accumulate in (1, 4):
        torch.manual_seed(5)
        model = Transformer(config)
        whole = random_batches(config, 8)

        def micro(index: int, accumulate: int = accumulate, whole: Callable[[int], TokenBatch] = whole) -> TokenBatch:
            inputs, targets, _ = whole(index // accumulate)
            rows = slice(8 // accumulate * (index % accumulate), 8 // accumulate * (index % accumulate + 1))
            return TokenBatch(inputs[rows], targets[rows])

        recorded: dict[str, list[Any]] = {}
        run(make_loop(model, optim_config, micro, recorded, accumulate=accumulate))
        results.append([row["loss"] for row in recorded["rows"]])
    assert results[0] == pytest.approx(results[1], abs=2e-6)
    assert results[0][0] != results[0][-1]


def test_it_learns(model: Transformer, config: ModelConfig, optim_config: OptimConfig) -> None:
    same = random_batches(config, 3)(0)
    recorded: dict[str, list[Any]] = {}
    run(make_loop(model, optim_config, lambda index: same, recorded, max_steps=120))
    losses = [row["loss"] for row in recorded["rows"]]
    assert losses[0] == pytest.approx(math.log(config.vocab_size), abs=0.3)
    assert losses[-1] < 0.3


def test_the_learning_rate_follows_the_schedule(
    model: Transformer, config: ModelConfig, optim_config: OptimConfig
) -> None:
    recorded: dict[str, list[Any]] = {}
    run(make_loop(model, optim_config, random_batches(config, 2), recorded, max_steps=10))
    rates = [row["learning_rate"] / optim_config.learning_rate for row in recorded["rows"]]
    # Two steps of warm-up of three; four at the peak; then six to zero, the last step at 1/6 of the peak.
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_milestones_are_spread_over_the_run_and_end_it(
    model: Transformer, config: ModelConfig, optim_config: OptimConfig
) -> None:
    recorded: dict[str, list[Any]] = {}
    assert run(make_loop(model, optim_config, random_batches(config, 1), recorded, max_steps=20)) == "final"
    assert recorded["milestones"] == [("regular", step) for step in range(2, 20, 2)] + [("final", 20)]


def test_save_every_decides_over_the_spread(model: Transformer, config: ModelConfig, optim_config: OptimConfig) -> None:
    recorded: dict[str, list[Any]] = {}
    run(make_loop(model, optim_config, random_batches(config, 1), recorded, max_steps=8, save_every=3))
    assert recorded["milestones"] == [("regular", 3), ("regular", 6), ("final", 8)]


class Clock:
    """A clock that only moves when a step is made."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Changed(NextToken):
    """The next-token objective, whose loss is changed by a function."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "change", change)

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().__call__(model, batch)
        return self.change(loss), metrics  # type: ignore[attr-defined]


def taking(clock: Clock, seconds: Callable[[], float]) -> Changed:
    """The next-token objective, each micro-batch of which takes so long."""

    def later(loss: Tensor) -> Tensor:
        clock.now += seconds()
        return loss

    return Changed(later)


def test_a_budget_of_time_becomes_a_number_of_steps_when_the_decay_must_begin(
    model: Transformer, config: ModelConfig, optim_config: OptimConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(loop_module, "time", clock)
    recorded: dict[str, list[Any]] = {}
    objective = taking(clock, lambda: 0.5)
    loop = make_loop(
        model, optim_config, random_batches(config, 1), recorded, max_steps=None, seconds=50.0, objective=objective
    )
    assert run(loop) == "final"
    assert recorded["horizons"] == [Horizon(100, 40)]  # decay_fraction is 0.6
    assert loop.position.step == 100
    assert loop.position.seconds == pytest.approx(50.0)
    rates = [row["learning_rate"] / optim_config.learning_rate for row in recorded["rows"]]
    assert rates[39:42] == pytest.approx([1.0, 1.0, 59 / 60])
    assert rates[-1] == pytest.approx(1 / 60)


def test_decisions_made_before_a_crash_are_taken_at_the_same_steps(
    model: Transformer, config: ModelConfig, optim_config: OptimConfig
) -> None:
    recorded: dict[str, list[Any]] = {}
    decided = [Horizon(12, 2), Horizon(8, 5, from_factor=0.7)]
    loop = make_loop(
        model, optim_config, random_batches(config, 1), recorded, max_steps=None, seconds=60.0, decided=decided
    )
    run(loop)
    assert loop.position.step == 8
    assert recorded["horizons"] == []
    rates = [row["learning_rate"] / optim_config.learning_rate for row in recorded["rows"]]
    # Warm-up to 1; a fall over ten steps from step 2; from step 5, from 0.7 to zero over three steps.
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.9, 0.8, 0.7, 0.7 * 2 / 3, 0.7 / 3])


@pytest.mark.parametrize("change", [5.0, 0.2], ids=["slower", "faster"])
def test_a_machine_that_changes_its_pace_does_not_change_the_time(
    model: Transformer,
    config: ModelConfig,
    optim_config: OptimConfig,
    monkeypatch: pytest.MonkeyPatch,
    change: float,
) -> None:
    clock = Clock()
    monkeypatch.setattr(loop_module, "time", clock)
    recorded: dict[str, list[Any]] = {}
    objective = taking(clock, lambda: 0.5 * (change if clock.now > 1055.0 else 1.0))
    loop = make_loop(
        model, optim_config, random_batches(config, 1), recorded, max_steps=None, seconds=100.0, objective=objective
    )
    assert run(loop) == "final"
    assert loop.position.seconds == pytest.approx(100.0, abs=10.0)
    first, *moved = recorded["horizons"]
    assert first == Horizon(200, 80)
    assert moved
    rates = [row["learning_rate"] for row in recorded["rows"]][80:]
    assert all(later <= earlier for earlier, later in pairwise(rates))  # it only ever falls
    assert rates[-1] < 0.1 * optim_config.learning_rate


def test_a_stop_request_saves_and_stops(model: Transformer, config: ModelConfig, optim_config: OptimConfig) -> None:
    recorded: dict[str, list[Any]] = {}
    stop = StopRequest()
    batches = random_batches(config, 1)

    def stopping(index: int) -> TokenBatch:
        stop.signal = 15 if index == 3 else None
        return batches(index)

    loop = make_loop(model, optim_config, stopping, recorded, max_steps=50, save_every=1000)
    assert run(loop, stop) == "stopped"
    assert recorded["milestones"] == [("stopped", 4)]


class GoingBack(Recorder):
    """Keeps weights at each milestone, and goes back to the last when asked."""

    def on_milestone(self, kind: Milestone) -> None:
        super().on_milestone(kind)
        assert self.loop is not None
        self.kept = copy.deepcopy((self.loop.model.state_dict(), vars(self.loop.position)))

    def on_rollback(self) -> bool:
        assert self.loop is not None
        self.loop.model.load_state_dict(self.kept[0])
        for key, value in self.kept[1].items():
            setattr(self.loop.position, key, value)
        return True


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_without_finite_gradients_changes_nothing_and_is_counted(
    config: ModelConfig, optim_config: OptimConfig, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded: dict[str, list[Any]] = {}
    weights: list[Tensor] = []
    torch.manual_seed(5)
    model = Transformer(config)

    def spoilt(loss: Tensor) -> Tensor:
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return loss * (value if loop.position.step == 3 else 1.0)

    loop = make_loop(model, optim_config, random_batches(config, 2), recorded, objective=Changed(spoilt))
    run(loop)
    assert torch.equal(weights[3], weights[4])
    assert not torch.equal(weights[4], weights[5])
    assert [row.get("skipped_steps", 0) for row in recorded["rows"]] == [0, 0, 0, 1, 1, 1, 1]
    assert "step 4: gradients are not finite, the step changed nothing" in capsys.readouterr().err


def test_many_such_steps_in_a_row_lead_back_to_the_checkpoint_and_past_the_data(
    config: ModelConfig, optim_config: OptimConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded: dict[str, list[Any]] = {}
    seen: list[int] = []
    batches = random_batches(config, 2)

    def noted(index: int) -> TokenBatch:
        seen.append(index)
        found = batches(index)
        return found._replace(targets=found.targets.new_full(found.targets.shape, 0)) if index in (5, 6) else found

    torch.manual_seed(5)
    model = Transformer(config)
    bad = Changed(lambda loss: loss * (math.nan if seen[-1] in (5, 6) else 1.0))
    loop = make_loop(
        model, optim_config, noted, recorded, objective=bad, patience=2, save_every=4, hooks=GoingBack(recorded)
    )
    assert run(loop) == "final"
    assert seen == list(range(10))  # steps 5 to 7 were made of batches 7 to 9
    assert loop.position.step == 7
    assert recorded["rows"][-1]["skipped_steps"] == 2
    assert "Back to step 4" in capsys.readouterr().err


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_loss_that_stays_undefined_ends_the_run_in_one_line(
    model: Transformer, config: ModelConfig, optim_config: OptimConfig, checkpoint: bool
) -> None:
    recorded: dict[str, list[Any]] = {}
    objective = Changed(lambda loss: loss * (math.nan if loop.position.step >= 3 else 1.0))
    hooks = GoingBack(recorded) if checkpoint else Recorder(recorded)
    loop = make_loop(
        model, optim_config, random_batches(config, 1), recorded, objective=objective, patience=2, hooks=hooks,
        save_every=1,
    )  # fmt: skip
    with pytest.raises(GroundupError, match=r"the loss is nan at step \d+: .*learning-rate"):
        run(loop)
    good = [step for _, step in recorded["milestones"] if step <= 3]
    assert good == [1, 2, 3]
    assert loop._guard.rollbacks == (MOST_ROLLBACKS + 1 if checkpoint else 0)


def test_memory_that_runs_out_halves_the_micro_batch_and_not_the_step(
    config: ModelConfig, optim_config: OptimConfig
) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, config.vocab_size, (64, config.context_length + 1), generator=generator)

    def dealt(size: int) -> Callable[[int], TokenBatch]:
        def batch(index: int) -> TokenBatch:
            mine = ids[index * size : (index + 1) * size]
            return TokenBatch(mine[:, :-1], mine[:, 1:])

        return batch

    class Halving(Recorder):
        def on_out_of_memory(self) -> bool:
            assert self.loop is not None
            self.loop.batches = dealt(self.loop.settings.micro_batch // 2)
            return True

    def small(loss: Tensor) -> Tensor:
        if loop.settings.micro_batch > 2 and loop.position.step == 1:
            raise torch.OutOfMemoryError("no more")
        return loss

    results = []
    for objective in (Changed(small), NextToken()):
        torch.manual_seed(5)
        model = Transformer(config)
        recorded: dict[str, list[Any]] = {}
        loop = make_loop(
            model, optim_config, dealt(8), recorded, objective=objective, micro_batch=8, hooks=Halving(recorded)
        )
        run(loop)
        results.append([row["loss"] for row in recorded["rows"]])
    assert results[0] == pytest.approx(results[1], abs=2e-6)
    assert loop.settings.micro_batch == 8
    assert len(results[0]) == 7


def test_no_memory_for_one_sequence_is_said_in_one_line(model: Transformer, config: ModelConfig) -> None:
    def never(loss: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no more")

    recorded: dict[str, list[Any]] = {}
    loop = make_loop(model, OptimConfig(), random_batches(config, 1), recorded, objective=Changed(never))
    with pytest.raises(GroundupError, match=r"out of memory on cpu with 1 sequences at once.*--micro-batch"):
        run(loop)


def test_micro_batches_weigh_by_what_they_count(config: ModelConfig, optim_config: OptimConfig) -> None:
    """Two micro-batches of 3 and 20 targets are one step over 23 targets."""
    whole = random_batches(config, 2)(0)
    targets = whole.targets.clone()
    targets[0, 3:] = -100

    def together(index: int) -> TokenBatch:
        return TokenBatch(whole.inputs, targets)

    def apart(index: int) -> TokenBatch:
        row = slice(index % 2, index % 2 + 1)
        return TokenBatch(whole.inputs[row], targets[row])

    results = []
    for batches, accumulate in ((together, 1), (apart, 2)):
        torch.manual_seed(5)
        recorded: dict[str, list[Any]] = {}
        run(make_loop(Transformer(config), optim_config, batches, recorded, accumulate=accumulate))
        results.append([(row["loss"], row["grad_norm"]) for row in recorded["rows"]])
    for one, other in zip(*results, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_dropout_is_a_function_of_the_seed_and_the_place_in_the_data(
    config: ModelConfig, optim_config: OptimConfig
) -> None:
    """So a step gives the same result whatever was drawn before it."""
    results = []
    for spent in (0, 100):
        torch.manual_seed(5)
        model = Transformer(dataclasses.replace(config, dropout=0.3))
        torch.rand(spent)
        recorded: dict[str, list[Any]] = {}
        run(make_loop(model, optim_config, random_batches(config, 2), recorded, seed=9))
        results.append([row["loss"] for row in recorded["rows"]])
    assert results[0] == results[1]
    recorded = {}
    torch.manual_seed(5)
    model = Transformer(dataclasses.replace(config, dropout=0.3))
    run(make_loop(model, optim_config, random_batches(config, 2), recorded, seed=10))
    assert [row["loss"] for row in recorded["rows"]] != results[0]


def test_a_run_that_no_longer_improves_ends_early(
    model: Transformer, config: ModelConfig, optim_config: OptimConfig
) -> None:
    recorded: dict[str, list[Any]] = {}

    class Stale(Recorder):
        def on_milestone(self, kind: Milestone) -> None:
            super().on_milestone(kind)
            assert self.loop is not None
            self.loop.position.stale += 1

    hooks = Stale(recorded)
    loop = make_loop(
        model, optim_config, random_batches(config, 1), recorded, max_steps=20, save_every=3, early_stop=2, hooks=hooks
    )
    assert run(loop) == "early"
    assert recorded["milestones"] == [("regular", 3), ("regular", 6)]  # saved already


def test_evaluations_in_between_save_nothing(
    model: Transformer, config: ModelConfig, optim_config: OptimConfig
) -> None:
    recorded: dict[str, list[Any]] = {}
    run(make_loop(model, optim_config, random_batches(config, 1), recorded, max_steps=7, save_every=4, eval_every=2))
    assert recorded["milestones"] == [("evaluation", 2), ("regular", 4), ("evaluation", 6), ("final", 7)]


def test_the_averaged_weights_follow_by_the_formula(config: ModelConfig, optim_config: OptimConfig) -> None:
    torch.manual_seed(5)
    model = Transformer(config)
    average = WeightAverage(model, 0.5)
    by_hand = model.embedding.weight.detach().clone()

    class Following(Recorder):
        def after_step(self, step: int) -> None:
            nonlocal by_hand
            decay = min(0.5, step / (9 + step))
            by_hand = decay * by_hand + (1 - decay) * model.embedding.weight.detach()

    recorded: dict[str, list[Any]] = {}
    hooks = Following(recorded)
    run(make_loop(model, optim_config, random_batches(config, 1), recorded, hooks=hooks, extras=Extras(average)))
    assert torch.allclose(average.tensors["embedding.weight"], by_hand, atol=1e-6)
    now = model.embedding.weight.detach().clone()
    with average.in_place():
        assert torch.allclose(model.embedding.weight, by_hand, atol=1e-6)
    assert torch.equal(model.embedding.weight, now)


def test_an_objective_of_another_shape_runs_on_the_same_loop(config: ModelConfig, optim_config: OptimConfig) -> None:
    """Texts whose label is whether they hold token 7: learnt from nothing but the objective."""
    torch.manual_seed(5)
    model = Classifier(Transformer(config), 2, pooling="mean")

    def texts(index: int) -> LabelledTexts:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(8, config.vocab_size, (16, config.context_length), generator=generator)
        labels = torch.arange(16) % 2
        ids[labels == 1, 2] = 7
        lengths = torch.randint(4, config.context_length + 1, (16,), generator=generator)
        return LabelledTexts(ids, lengths, labels)

    recorded: dict[str, list[Any]] = {}
    run(make_loop(model, optim_config, texts, recorded, objective=Classification(), max_steps=60, accumulate=2))
    assert recorded["rows"][0]["accuracy"] < 0.8
    assert recorded["rows"][-1]["accuracy"] == 1.0
    assert recorded["rows"][-1]["loss"] < 0.2


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_narrow_precisions_learn_too(config: ModelConfig, optim_config: OptimConfig, precision: str) -> None:
    torch.manual_seed(5)
    model = Transformer(config)
    same = random_batches(config, 3)(0)
    recorded: dict[str, list[Any]] = {}
    scale = LossScale(torch.device("cpu")) if precision == "float16" else None
    loop = make_loop(
        model, optim_config, lambda index: same, recorded, max_steps=80, precision=precision,
        extras=Extras(loss_scale=scale),
    )  # fmt: skip
    run(loop)
    assert recorded["rows"][-1]["loss"] < 0.6


def test_gradients_are_clipped_to_the_limit(model: Transformer, config: ModelConfig) -> None:
    norms = []
    spying = Changed(lambda loss: loss * 1000)
    optim = OptimConfig(grad_clip=0.25, warmup_steps=0)
    recorded: dict[str, list[Any]] = {}
    loop = make_loop(model, optim, random_batches(config, 2), recorded, max_steps=1, objective=spying)
    original = loop.optimizers["muon"].step

    def note_norm(*args: Any, **kwargs: Any) -> Any:
        norms.append(torch.cat([p.grad.flatten() for p in loop._parameters if p.grad is not None]).norm().item())
        return original(*args, **kwargs)

    loop.optimizers["muon"].step = note_norm  # type: ignore[method-assign]
    run(loop)
    assert norms == [pytest.approx(0.25, rel=1e-3)]
    assert recorded["rows"][0]["grad_norm"] > 100


def test_a_long_time_without_a_save_brings_one_forward(
    model: Transformer, config: ModelConfig, optim_config: OptimConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: dict[str, list[Any]] = {}
    monkeypatch.setattr("groundup.training.loop.SAVE_AT_LEAST_EVERY_SECONDS", 0.0)
    run(make_loop(model, optim_config, random_batches(config, 1), recorded, max_steps=4))
    assert recorded["milestones"] == [("regular", 1), ("regular", 2), ("regular", 3), ("final", 4)]
