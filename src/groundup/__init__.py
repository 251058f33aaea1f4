"""groundup: a language model from the ground up, and everything it lives with.

>>> import groundup
>>> lm = groundup.load("runs/demo")  # doctest: +SKIP
>>> lm.generate("Once", max_tokens=50, temperature=0.8, seed=1)  # doctest: +SKIP
"""

from typing import TYPE_CHECKING

from groundup.runtime.lazy import lazy_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from groundup.inference import LanguageModel, load
    from groundup.model import ModelConfig, Transformer
    from groundup.runtime import GroundupError
    from groundup.tokenizer import Tokenizer

_PUBLIC = {
    "Tokenizer": "groundup.tokenizer",
    "ModelConfig": "groundup.model",
    "Transformer": "groundup.model",
    "LanguageModel": "groundup.inference",
    "load": "groundup.inference",
    "GroundupError": "groundup.runtime",
}

__all__ = ["GroundupError", "LanguageModel", "ModelConfig", "Tokenizer", "Transformer", "__version__", "load"]

# Loaded on first use, so that `groundup --help` does not wait for torch.
__getattr__ = lazy_names(__name__, _PUBLIC)
