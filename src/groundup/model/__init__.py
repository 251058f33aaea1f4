"""The Transformer and its parts.

Read in this order: config.py (the fields that choose the parts), transformer.py (the whole model, on one screen),
attention.py, positions.py, feed_forward.py, norms.py (its parts), cache.py (what decoding remembers),
initialisation.py, explain.py (what a model costs before you build it), huggingface.py (the folder other tools open).

Code here is single-device and knows nothing of optimizers, data or processes: parallelism is applied from outside. No
behaviour hangs on a model's name, only on the fields of its config.
"""

from typing import TYPE_CHECKING

from groundup.model.config import PRESETS, ModelConfig
from groundup.model.explain import Explanation, explain
from groundup.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from groundup.model.attention import BACKENDS, fastest_backend
    from groundup.model.cache import KVCache
    from groundup.model.huggingface import load_model, read_config, save_model
    from groundup.model.transformer import Transformer

_LAZY = {  # these import torch, which `groundup --help` and `groundup explain` do without
    "BACKENDS": "attention",
    "fastest_backend": "attention",
    "KVCache": "cache",
    "load_model": "huggingface",
    "read_config": "huggingface",
    "save_model": "huggingface",
    "Transformer": "transformer",
}

__all__ = ["BACKENDS", "PRESETS", "Explanation", "KVCache", "ModelConfig", "Transformer", "explain"]
__all__ += ["fastest_backend", "load_model", "read_config", "save_model"]

__getattr__ = lazy_names(__name__, _LAZY)
