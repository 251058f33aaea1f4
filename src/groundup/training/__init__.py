"""Training: the one loop, and what surrounds it.

Read in this order: recipe.py (what a run can be told), scaling.py (what it derives when it is not told),
objectives.py (model and batch in, loss out), loop.py (the loop), checkpoint.py (what is saved, and how it comes back
exactly), run.py (the run folder), pretraining.py (from a recipe to a trained model).

This room does not know evaluation: what is to happen during a run is handed to it as hooks.
"""

from typing import TYPE_CHECKING

from groundup.runtime.lazy import lazy_names
from groundup.training.recipe import PretrainRecipe
from groundup.training.scaling import Derived, parse_budget

if TYPE_CHECKING:
    from groundup.training.checkpoint import Checkpoints
    from groundup.training.loop import Loop, Milestone
    from groundup.training.objectives import next_token
    from groundup.training.pretraining import Pretraining, plan_pretraining, pretrain

_LAZY = {
    "Checkpoints": "checkpoint",
    "Loop": "loop",
    "Milestone": "loop",
    "next_token": "objectives",
    "Pretraining": "pretraining",
    "plan_pretraining": "pretraining",
    "pretrain": "pretraining",
}

__all__ = [
    "Checkpoints",
    "Derived",
    "Loop",
    "Milestone",
    "PretrainRecipe",
    "Pretraining",
    "next_token",
    "parse_budget",
]
__all__ += ["plan_pretraining", "pretrain"]

__getattr__ = lazy_names(__name__, _LAZY)
