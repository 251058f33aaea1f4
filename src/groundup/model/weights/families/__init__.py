"""What other people's checkpoints look like: for each family, its ``config.json`` and the names of its tensors.

A family translates; what a model does hangs on the fields of its config alone. Whether a config belongs to a family is
found out by translating it there and back (:func:`groundup.model.weights.family_of`).

common.py is what they share; then gpt2.py (GPT-2, GPT-NeoX), llama.py (Llama, Mistral, Mixtral, Qwen, OLMo 2, Phi-3),
gemma.py, deepseek.py, gpt_oss.py.
"""

from groundup.model.weights.families.common import Family
from groundup.model.weights.families.deepseek import DeepSeekV2, DeepSeekV3
from groundup.model.weights.families.gemma import Gemma2, Gemma3
from groundup.model.weights.families.gpt2 import GPT2, GPTNeoX
from groundup.model.weights.families.gpt_oss import GptOss
from groundup.model.weights.families.llama import Llama, Mistral, Mixtral, Olmo2, Phi3, Qwen2, Qwen3, Qwen3Moe

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Llama(), Mistral(), Qwen2(), Qwen3(), GPT2(), GPTNeoX(), Olmo2(), Phi3(), Gemma2(), Gemma3(),
        Mixtral(), Qwen3Moe(), DeepSeekV2(), DeepSeekV3(), GptOss(),
    )
}  # fmt: skip
"""By ``model_type``; a config that several could hold is saved as the first."""

__all__ = ["FAMILIES", "Family"]
