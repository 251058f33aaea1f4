"""The Transformer and its parts.

Read in this order: config.py (the fields that choose the parts), transformer.py (the whole model, on one screen),
attention.py, latent_attention.py, masks.py and backends.py (who sees whom, and how it is computed), positions.py,
feed_forward.py, experts.py, norms.py, cache.py (what decoding remembers), heads.py (losses, labels, values),
checkpointing.py, initialisation.py, presets.py, weights/ (other people's checkpoints, and ours as other tools open
them), resizing.py, adapters.py and quantized.py (what is done to a model from outside). What a model costs before you
build it: explain.py, over parts.py (parameters and FLOPs), memory.py and hardware.py, drawn by drawing.py.

To change the attention: attention.py makes queries, keys and values; ``attend`` in backends.py computes with them.

Code here is single-device and knows nothing of optimizers, data or processes: parallelism is applied from outside. No
behaviour hangs on a model's name, only on the fields of its config.
"""

from typing import TYPE_CHECKING

from groundup.model.config import Experts, LatentAttention, ModelConfig, RopeScaling
from groundup.model.explain import Explanation, explain
from groundup.model.presets import PRESETS
from groundup.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from groundup.model.adapter_folder import load_adapter, save_adapter
    from groundup.model.adapters import LoraConfig, add_adapter
    from groundup.model.backends import BACKENDS, fastest_backend
    from groundup.model.cache import Cache, KVCache
    from groundup.model.heads import Classifier, ValueHead, language_model_loss
    from groundup.model.quantized import quantize_model
    from groundup.model.resizing import resize_embeddings
    from groundup.model.transformer import Transformer
    from groundup.model.weights import load_model, read_config, save_model

_LAZY = {  # these import torch, which `groundup --help` and `groundup explain` do without
    "LoraConfig": "adapters",
    "add_adapter": "adapters",
    "load_adapter": "adapter_folder",
    "save_adapter": "adapter_folder",
    "quantize_model": "quantized",
    "resize_embeddings": "resizing",
    "BACKENDS": "backends",
    "fastest_backend": "backends",
    "Cache": "cache",
    "KVCache": "cache",
    "Classifier": "heads",
    "ValueHead": "heads",
    "language_model_loss": "heads",
    "load_model": "weights",
    "read_config": "weights",
    "save_model": "weights",
    "Transformer": "transformer",
}

__all__ = ["BACKENDS", "PRESETS", "Cache", "Classifier", "Experts", "Explanation", "KVCache", "LatentAttention"]
__all__ += ["LoraConfig", "ModelConfig", "RopeScaling", "Transformer", "ValueHead", "add_adapter", "explain"]
__all__ += ["fastest_backend", "language_model_loss", "load_adapter", "load_model", "quantize_model", "read_config"]
__all__ += ["resize_embeddings", "save_adapter", "save_model"]

__getattr__ = lazy_names(__name__, _LAZY)
