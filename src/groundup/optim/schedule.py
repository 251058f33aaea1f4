"""The learning rate over a run: warm-up, stable, decay."""

from __future__ import annotations

from dataclasses import dataclass

from groundup.optim.config import OptimConfig


@dataclass(frozen=True)
class Horizon:
    """Where a run ends, and where its learning rate begins to fall.

    Args:
        steps: total number of steps.
        decay_from: first step (0-based) of the decay.
    """

    steps: int
    decay_from: int

    @classmethod
    def of(cls, steps: int, config: OptimConfig) -> Horizon:
        """The horizon of a run whose number of steps is known from the start; the decay leaves the warm-up alone where
        it can.
        """
        return cls(steps, max(min(config.warmup_steps, steps), steps - round(config.decay_fraction * steps)))


def learning_rate_factor(step: int, config: OptimConfig, horizon: Horizon | None) -> float:
    """The fraction of the peak learning rate to use at ``step`` (0-based): WSD (Hu et al. 2024, eq. 1; Hägele et al.
    2024).

    The value before the decay does not depend on the horizon, which is why a run with a budget in minutes can start
    before anybody knows how many steps will fit.

    Args:
        horizon: None while it is not known: then there is no decay yet.
    """
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if horizon is None or step < horizon.decay_from:
        return warmup
    left = max(0.0, (horizon.steps - step) / max(1, horizon.steps - horizon.decay_from))
    return min(warmup, config.final_learning_rate + (1.0 - config.final_learning_rate) * left)
