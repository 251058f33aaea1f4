"""Inference: from a checkpoint and a prompt to text.

Read in this order: sampling.py (from logits to a token), engine.py (from prompts to tokens, with a cache),
language_model.py (model, tokenizer and engine behind one name; how a run, a checkpoint or a folder is found).

This room never trains, and knows nothing of HTTP or terminals.
"""

from typing import TYPE_CHECKING

from groundup.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from groundup.inference.engine import Engine
    from groundup.inference.language_model import LanguageModel, find_model, load
    from groundup.inference.sampling import SamplingParams

__all__ = ["Engine", "LanguageModel", "SamplingParams", "find_model", "load"]

_LAZY = {
    "Engine": "engine",
    "LanguageModel": "language_model",
    "SamplingParams": "sampling",
    "find_model": "language_model",
    "load": "language_model",
}

__getattr__ = lazy_names(__name__, _LAZY)
