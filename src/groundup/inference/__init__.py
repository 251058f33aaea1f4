"""Inference: from a checkpoint and a prompt to text.

Read in this order: truncation.py, checks.py (what a value must be), sampling.py, penalties.py and sampler.py (from
logits to a token), constraints.py over constraint_trial.py (answers that follow a schema, an expression or a grammar),
blocks.py and paged.py (where keys and values lie), requests.py (what is asked, and what comes of it), scheduler.py
(who is computed next), runner.py (the model's forward pass over many texts), small_batch.py over small_program.py,
kernels.py, lanes.py and attention_lanes.py (the same on a CPU, compiled), graphs.py (the same on a GPU, recorded),
drafts.py (guessing several tokens), search.py (beam, diverse and contrastive search), decoder.py (what is done with
logits), engine.py (all of them together), speed.py (how fast they are), text.py (tokens become text),
language_model.py (model, tokenizer and engine behind one name), batch.py (a file of prompts), inspection.py (looking
inside), models.py (how a run, a checkpoint, a folder or a model of the hub is found, and what is kept of the hub),
adapters.py (models that are adapters on others).

This room never trains, and knows nothing of HTTP or terminals.
"""

from typing import TYPE_CHECKING

from groundup.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from groundup.inference.drafts import Drafter, PromptLookup
    from groundup.inference.engine import Engine, EngineSettings
    from groundup.inference.inspection import inspect_text
    from groundup.inference.language_model import LanguageModel, load
    from groundup.inference.models import fetch_model, find_model, read_model_config
    from groundup.inference.requests import Request
    from groundup.inference.sampling import SamplingParams

__all__ = [
    "Drafter",
    "Engine",
    "EngineSettings",
    "LanguageModel",
    "PromptLookup",
    "Request",
    "SamplingParams",
    "fetch_model",
    "find_model",
    "inspect_text",
    "load",
    "read_model_config",
]

_LAZY = {
    "Drafter": "drafts",
    "Engine": "engine",
    "EngineSettings": "engine",
    "LanguageModel": "language_model",
    "PromptLookup": "drafts",
    "Request": "requests",
    "SamplingParams": "sampling",
    "fetch_model": "models",
    "find_model": "models",
    "inspect_text": "inspection",
    "load": "language_model",
    "read_model_config": "models",
}

__getattr__ = lazy_names(__name__, _LAZY)
