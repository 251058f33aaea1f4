"""Inference: from a checkpoint and a prompt to text.

Read in this order: sampling.py (from logits to a token), engine.py (from prompts to tokens, with a cache),
language_model.py (model, tokenizer and engine behind one name), models.py (how a run, a checkpoint, a folder or a model
of the hub is found, and what is kept of the hub).

This room never trains, and knows nothing of HTTP or terminals.
"""

from typing import TYPE_CHECKING

from groundup.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from groundup.inference.engine import Engine
    from groundup.inference.language_model import LanguageModel, load
    from groundup.inference.models import fetch_model, find_model, read_model_config
    from groundup.inference.sampling import SamplingParams

__all__ = [
    "Engine",
    "LanguageModel",
    "SamplingParams",
    "fetch_model",
    "find_model",
    "load",
    "read_model_config",
]

_LAZY = {
    "Engine": "engine",
    "LanguageModel": "language_model",
    "SamplingParams": "sampling",
    "fetch_model": "models",
    "find_model": "models",
    "load": "language_model",
    "read_model_config": "models",
}

__getattr__ = lazy_names(__name__, _LAZY)
