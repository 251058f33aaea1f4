"""Optimizers and schedules.

Read in this order: config.py (the recipe's optim section), groups.py (which parameter gets which treatment, and where
a further optimizer would be added), muon.py (the optimizer PyTorch's users bring themselves), schedule.py (the
learning rate over a run), gradients.py (what happens to gradients before a step), average.py (a moving average of the
weights), sharded.py (parameters that are cut up among ranks).

This room knows parameters and gradients, never models, data or losses.
"""

from typing import TYPE_CHECKING

from groundup.optim.config import OptimConfig
from groundup.optim.schedule import Horizon, learning_rate_factor
from groundup.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from groundup.optim.average import WeightAverage
    from groundup.optim.gradients import LossScale
    from groundup.optim.groups import build_optimizers
    from groundup.optim.muon import Muon

__all__ = [
    "Horizon",
    "LossScale",
    "Muon",
    "OptimConfig",
    "WeightAverage",
    "build_optimizers",
    "learning_rate_factor",
]

_LAZY = {"LossScale": "gradients", "Muon": "muon", "WeightAverage": "average", "build_optimizers": "groups"}

__getattr__ = lazy_names(__name__, _LAZY)
