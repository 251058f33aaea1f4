"""The learning rate over a run: a warm-up, and then one of five shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from groundup.optim.config import OptimConfig


@dataclass(frozen=True)
class Horizon:
    """Where a run ends, and from where its learning rate falls towards that end.

    Args:
        steps: total number of steps.
        decay_from: first step (0-based) of the decay.
        from_factor: the factor that the decay starts from; below 1 where a run found on the way that its end has moved.
    """

    steps: int
    decay_from: int
    from_factor: float = 1.0

    @classmethod
    def of(cls, steps: int, config: OptimConfig) -> Horizon:
        """The horizon of a run whose length is known from the start; the decay spares the warm-up where it can."""
        return cls(steps, max(min(config.warmup_steps, steps), steps - round(config.falling * steps)))


def learning_rate_factor(step: int, config: OptimConfig, horizon: Horizon | None) -> float:
    """The fraction of the peak learning rate to use at ``step`` (0-based).

    ``wsd`` is warm-up, stable, decay (Hu et al. 2024, eq. 1; Hägele et al. 2024), ``linear`` and ``cosine``
    (Loshchilov & Hutter 2017, eq. 5) fall from the end of the warm-up on, ``inverse_sqrt`` falls with the square root
    of the step (Vaswani et al. 2017, section 5.3), ``constant`` not at all.

    Before the decay the value does not depend on the horizon: that is why a run with a budget in minutes can start
    before anybody knows how many steps will fit.

    Args:
        horizon: None while it is not known: then there is no decay yet.
    """
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    final = config.final_learning_rate
    if config.schedule == "inverse_sqrt":
        return warmup if warmup < 1.0 else max(final, math.sqrt((config.warmup_steps + 1) / (step + 1)))
    if config.schedule == "constant" or horizon is None or step < horizon.decay_from:
        return warmup
    left = max(0.0, (horizon.steps - step) / max(1, horizon.steps - horizon.decay_from))
    if config.schedule == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return min(warmup, final + (horizon.from_factor - final) * left)
