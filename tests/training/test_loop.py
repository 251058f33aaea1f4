"""The loop: accumulation, schedule, horizon, milestones, and what ends it."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import groundup.training.loop as loop_module
from groundup.model import ModelConfig, Transformer
from groundup.optim import Horizon, OptimConfig, build_optimizers
from groundup.runtime import GroundupError
from groundup.runtime.interrupt import StopRequest
from groundup.training.loop import Loop, LoopSettings
from groundup.training.objectives import next_token

Batch = tuple[Tensor, Tensor]


def random_batches(config: ModelConfig, rows: int) -> Callable[[int], Batch]:
    def batch(index: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 + index)
        ids = torch.randint(0, config.vocab_size, (rows, config.context_length + 1), generator=generator)
        return ids[:, :-1], ids[:, 1:]

    return batch


def make_loop(
    model: Transformer, optim: OptimConfig, batches: Callable[[int], Batch], recorded: dict[str, list[Any]], **over: Any
) -> Loop:
    objective = over.pop("objective", next_token)
    decided = over.pop("decided", ())
    settings = {
        "batch_tokens": 52,
        "accumulate": 1,
        "max_steps": 7,
        "seconds": None,
        "log_every": 1,
        "save_every": None,
        "precision": "float32",
    } | over
    return Loop(
        model,
        objective,
        batches,
        build_optimizers(model, optim),
        optim,
        LoopSettings(**settings),
        on_log=recorded.setdefault("rows", []).append,
        on_milestone=lambda kind: recorded.setdefault("milestones", []).append((kind, loop_step())),
        on_horizon=recorded.setdefault("horizons", []).append,
        decided=decided,
    )


def loop_step() -> int:
    return _current[0].position.step


_current: list[Loop] = []


def run(loop: Loop, stop: StopRequest | None = None) -> str:
    _current[:] = [loop]
    return loop.run(StopRequest() if stop is None else stop)


def test_eight_micro_batches_make_the_step_of_one_large_batch(config: ModelConfig, optim_config: OptimConfig) -> None:
    results = []
    for accumulate in (1, 4):
        torch.manual_seed(5)
        model = Transformer(config)
        whole = random_batches(config, 8)

        def micro(index: int, accumulate: int = accumulate, whole: Callable[[int], Batch] = whole) -> Batch:
            inputs, targets = whole(index // accumulate)
            rows = slice(8 // accumulate * (index % accumulate), 8 // accumulate * (index % accumulate + 1))
            return inputs[rows], targets[rows]

        recorded: dict[str, list[Any]] = {}
        run(make_loop(model, optim_config, micro, recorded, accumulate=accumulate))
        results.append([row["loss"] for row in recorded["rows"]])
    assert results[0] == pytest.approx(results[1], abs=2e-6)
    assert results[0][0] != results[0][-1]


def test_the_loss_is_the_mean_negative_log_probability(model: Transformer) -> None:
    inputs, targets = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])
    loss, metrics = next_token(model, (inputs, targets))
    log_p = model(inputs)[0].log_softmax(-1)
    by_hand = -(log_p[0, 2] + log_p[1, 3] + log_p[2, 4]) / 3
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-6)
    assert metrics == {}


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


def taking(clock: Clock, seconds: Callable[[], float]) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """The next-token objective, each micro-batch of which takes so long."""

    def objective(wrapped: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        clock.now += seconds()
        return next_token(wrapped, batch)

    return objective


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

    def stopping(index: int) -> Batch:
        stop.signal = 15 if index == 3 else None
        return batches(index)

    loop = make_loop(model, optim_config, stopping, recorded, max_steps=50, save_every=1000)
    assert run(loop, stop) == "stopped"
    assert recorded["milestones"] == [("stopped", 4)]


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line(
    model: Transformer, config: ModelConfig, optim_config: OptimConfig
) -> None:
    def diverging(wrapped: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = next_token(wrapped, batch)
        return loss * (math.nan if loop.position.step == 3 else 1.0), metrics

    recorded: dict[str, list[Any]] = {}
    loop = make_loop(model, optim_config, random_batches(config, 1), recorded, objective=diverging)
    with pytest.raises(GroundupError, match=r"the loss is nan at step 4: .*learning-rate"):
        run(loop)
    assert [step for _, step in recorded["milestones"]] == [1, 2, 3]  # nothing was saved after it


def test_gradients_are_clipped_to_the_limit(model: Transformer, config: ModelConfig) -> None:
    norms = []

    def spying(wrapped: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = next_token(wrapped, batch)
        return loss * 1000, metrics

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
