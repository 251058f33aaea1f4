"""Training: the one loop, and what surrounds it.

Read in this order: recipe.py (what a run can be told), scaling.py (what it derives when it is not told),
objectives.py (model and batch in, loss out), loop.py (the loop) and loop_parts.py (what it is told and whom it calls),
parallel.py (how a model is spread over processes), checkpoint.py (what is saved, and how it comes back exactly; with
checkpoint_state.py, which tensors by which names, and checkpoint_writer.py, how they are written while training goes
on), run.py (the run folder), profile.py (what takes how long in some steps), job.py (what differs between kinds of
runs) and sitting.py (what does not: a job from start or checkpoint to the end or a stop). Then pretraining, the first
kind: plan.py (what a run will do, settled before it starts) with trials.py (what a step takes here), and
pretraining.py (from a plan to a trained model).

This room does not know evaluation: what is to happen during a run is handed to it as hooks.
"""

from typing import TYPE_CHECKING

from groundup.runtime.lazy import lazy_names
from groundup.training.recipe import PretrainRecipe, RunKeys
from groundup.training.scaling import Derived, parse_budget

if TYPE_CHECKING:
    from groundup.training.checkpoint import Checkpoints
    from groundup.training.job import Job, Measured
    from groundup.training.loop import Loop
    from groundup.training.loop_parts import LoopHooks, LoopSettings, Milestone, Position
    from groundup.training.objectives import Classification, LabelledTexts, NextToken
    from groundup.training.plan import Pretraining, plan_pretraining
    from groundup.training.pretraining import pretrain
    from groundup.training.sitting import Outcome, Sitting, train

_LAZY = {
    "Checkpoints": "checkpoint",
    "Classification": "objectives",
    "Job": "job",
    "LabelledTexts": "objectives",
    "Loop": "loop",
    "LoopHooks": "loop_parts",
    "LoopSettings": "loop_parts",
    "Measured": "job",
    "Milestone": "loop_parts",
    "NextToken": "objectives",
    "Outcome": "sitting",
    "Position": "loop_parts",
    "Pretraining": "plan",
    "Sitting": "sitting",
    "plan_pretraining": "plan",
    "pretrain": "pretraining",
    "train": "sitting",
}

__all__ = [
    "Checkpoints",
    "Classification",
    "Derived",
    "Job",
    "LabelledTexts",
    "Loop",
    "LoopHooks",
    "LoopSettings",
    "Measured",
    "Milestone",
    "NextToken",
    "Outcome",
    "Position",
    "PretrainRecipe",
    "Pretraining",
    "RunKeys",
    "Sitting",
    "parse_budget",
]
__all__ += ["plan_pretraining", "pretrain", "train"]

__getattr__ = lazy_names(__name__, _LAZY)
