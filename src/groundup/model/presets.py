"""Models of the field by name: a few fields over the defaults each. What they do hangs on the fields alone.

Shapes are those of the published config.json files, or of the papers where there is none.
"""

from __future__ import annotations

import math
from typing import Any

Fields = dict[str, Any]

# ---- ours: pre-norm, rotary positions, normed queries and keys, SwiGLU, tied embeddings (the defaults of the config)

OWN: dict[str, Fields] = {
    "tiny": dict(n_layer=2, n_head=2, n_embd=128, vocab_size=4096, context_length=256),
    "small": dict(n_layer=6, n_head=6, n_embd=384, vocab_size=8192, context_length=256),
    "base": dict(n_layer=12, n_head=12, n_embd=768),
    "large": dict(n_layer=24, n_head=16, n_embd=1024),
}

# ---- GPT (Radford et al. 2018), GPT-2 (2019) and the small one that nanoGPT trains on Shakespeare

_GPT: Fields = dict(norm="layernorm", norm_eps=1e-5, positions="learned", feed_forward="gelu", qk_norm=False, bias=True)
_GPT2: Fields = _GPT | dict(vocab_size=50_257)
GPT: dict[str, Fields] = {
    "gpt-10m": _GPT | dict(n_layer=6, n_head=6, n_embd=384, vocab_size=65, context_length=256, bias=False, dropout=0.2),
    "gpt-117m": _GPT | dict(vocab_size=40_478, context_length=512, norm_placement="post"),
    "gpt2-124m": _GPT2,
    "gpt2-355m": _GPT2 | dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-774m": _GPT2 | dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-1558m": _GPT2 | dict(n_layer=48, n_head=25, n_embd=1600),
}
GPT |= {"gpt2": GPT["gpt2-124m"], "gpt2-medium": GPT["gpt2-355m"], "gpt2-large": GPT["gpt2-774m"]}
GPT |= {"gpt2-xl": GPT["gpt2-1558m"]}
PYTHIA: dict[str, Fields] = {
    "pythia-160m": _GPT | dict(
        vocab_size=50_304, context_length=2048, positions="rope", rope_fraction=0.25, parallel_blocks=True,
        feed_forward="gelu_exact", tie_embeddings=False,
    ),
}  # fmt: skip

# ---- Llama 2 and 3 (Touvron et al. 2023; Grattafiori et al. 2024), SmolLM (2024), Mistral and Mixtral (2023, 2024)

_LLAMA: Fields = dict(norm_eps=1e-5, qk_norm=False, tie_embeddings=False)
_LLAMA_7B: Fields = _LLAMA | dict(n_layer=32, n_head=32, n_embd=4096)
_LLAMA_3: Fields = _LLAMA | dict(vocab_size=128_256, n_head=32, n_kv_head=8, rope_theta=500_000.0)
_SMOL: Fields = _LLAMA | dict(vocab_size=49_152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_ff=1536)
LLAMA: dict[str, Fields] = {
    "llama2-7b": _LLAMA_7B | dict(vocab_size=32_000, context_length=4096, n_ff=11_008),
    "llama3-8b": _LLAMA_3 | dict(n_layer=32, n_embd=4096, n_ff=14_336, context_length=8192),
    "llama3.1-8b": _LLAMA_3 | dict(
        n_layer=32, n_embd=4096, n_ff=14_336, context_length=131_072,
        rope_scaling=dict(kind="llama3", factor=8.0, original_length=8192),
    ),
    "llama3.2-1b": _LLAMA_3 | dict(
        n_layer=16, n_embd=2048, n_ff=8192, context_length=131_072, tie_embeddings=True,
        rope_scaling=dict(kind="llama3", factor=32.0, original_length=8192),
    ),
    "smollm-135m": _SMOL | dict(context_length=2048, tie_embeddings=True),
    "smollm2-135m": _SMOL | dict(context_length=8192, rope_theta=100_000.0, tie_embeddings=True),
    "mistral-7b": _LLAMA_7B | dict(
        vocab_size=32_000, n_kv_head=8, n_ff=14_336, context_length=32_768, layer_pattern="S", sliding_window=4096
    ),
    "mixtral-8x7b": _LLAMA_7B | dict(
        vocab_size=32_000, n_kv_head=8, n_ff=14_336, context_length=32_768, rope_theta=1_000_000.0,
        experts=dict(count=8, active=2, balance_loss=0.02),
    ),
}  # fmt: skip

# ---- Qwen 2, 2.5 and 3 (Yang et al. 2024, 2025)

_QWEN: Fields = dict(vocab_size=151_936, rope_theta=1_000_000.0, context_length=32_768)
_QWEN2: Fields = _QWEN | dict(qk_norm=False, qkv_bias=True)
_QWEN3: Fields = _QWEN | dict(context_length=40_960, head_dim=128)
QWEN: dict[str, Fields] = {
    "qwen2-0.5b": _QWEN2 | dict(n_layer=24, n_head=14, n_kv_head=2, n_embd=896, n_ff=4864, context_length=131_072),
    "qwen2.5-0.5b": _QWEN2 | dict(n_layer=24, n_head=14, n_kv_head=2, n_embd=896, n_ff=4864),
    "qwen2.5-7b": _QWEN2 | dict(
        n_layer=28, n_head=28, n_kv_head=4, n_embd=3584, n_ff=18_944, vocab_size=152_064, context_length=131_072,
        tie_embeddings=False,
    ),
    "qwen3-0.6b": _QWEN3 | dict(n_layer=28, n_head=16, n_kv_head=8, n_embd=1024, n_ff=3072),
    "qwen3-8b": _QWEN3 | dict(n_layer=36, n_head=32, n_kv_head=8, n_embd=4096, n_ff=12_288, tie_embeddings=False),
    "qwen3-30b-a3b": _QWEN3 | dict(
        n_layer=48, n_head=32, n_kv_head=4, n_embd=2048, n_ff=6144, tie_embeddings=False,
        experts=dict(count=128, active=8, width=768, balance_loss=0.001),
    ),
}  # fmt: skip

# ---- Gemma 2 (2024) and 3 (2025): heads of 256, embeddings scaled by the root of the width

_GEMMA: Fields = dict(
    norm_plus_one=True, norm_placement="sandwich", feed_forward="geglu", head_dim=256, attention_scale=256**-0.5
)
_GEMMA2: Fields = _GEMMA | dict(
    vocab_size=256_000, context_length=8192, qk_norm=False, layer_pattern="SF", sliding_window=4096,
    attention_softcap=50.0, logit_softcap=30.0,
)  # fmt: skip
_GEMMA3: Fields = _GEMMA | dict(layer_pattern="SSSSSF", rope_theta=1_000_000.0, rope_local_theta=10_000.0)
GEMMA: dict[str, Fields] = {
    "gemma2-2b": _GEMMA2 | dict(
        n_layer=26, n_head=8, n_kv_head=4, n_embd=2304, n_ff=9216, embedding_scale=math.sqrt(2304)
    ),
    "gemma2-9b": _GEMMA2 | dict(
        n_layer=42, n_head=16, n_kv_head=8, n_embd=3584, n_ff=14_336, embedding_scale=math.sqrt(3584)
    ),
    "gemma3-1b": _GEMMA3 | dict(
        n_layer=26, n_head=4, n_kv_head=1, n_embd=1152, n_ff=6912, embedding_scale=math.sqrt(1152), vocab_size=262_144,
        context_length=32_768, sliding_window=512,
    ),
    "gemma3-4b": _GEMMA3 | dict(
        n_layer=34, n_head=8, n_kv_head=4, n_embd=2560, n_ff=10_240, embedding_scale=math.sqrt(2560),
        vocab_size=262_208, context_length=131_072, sliding_window=1024, rope_scaling=dict(kind="linear", factor=8.0),
    ),
}  # fmt: skip

# ---- Phi-3 (Abdin et al. 2024) and OLMo 2 (2024)

_OLMO2: Fields = dict(
    vocab_size=100_352, context_length=4096, rope_theta=500_000.0, norm_placement="output", qk_norm_whole=True,
    tie_embeddings=False,
)  # fmt: skip
OTHERS: dict[str, Fields] = {
    "phi3-mini": _LLAMA | dict(
        vocab_size=32_064, context_length=4096, n_layer=32, n_head=32, n_embd=3072, n_ff=8192, layer_pattern="S",
        sliding_window=2047,
    ),
    "olmo2-1b": _OLMO2 | dict(n_layer=16, n_head=16, n_embd=2048, n_ff=8192),
    "olmo2-7b": _OLMO2 | dict(n_layer=32, n_head=32, n_embd=4096, n_ff=11_008),
}  # fmt: skip

# ---- DeepSeek-V2 and V3 (2024), gpt-oss (OpenAI 2025)

_DEEPSEEK: Fields = dict(context_length=163_840, qk_norm=False, tie_embeddings=False)
_LATENT: Fields = dict(kv_rank=512, q_rank=1536, rope_dim=64, nope_dim=128, v_dim=128)
_V2_ROPE: Fields = dict(kind="yarn", factor=40.0, original_length=4096, mscale=0.707, mscale_all_dim=0.707)
_GPT_OSS: Fields = dict(
    vocab_size=201_088, context_length=131_072, n_head=64, n_kv_head=8, n_embd=2880, head_dim=64, n_ff=2880,
    norm_eps=1e-5, qk_norm=False, attention_sinks=True, layer_pattern="SF", sliding_window=128, rope_theta=150_000.0,
    rope_scaling=dict(kind="yarn", factor=32.0, original_length=4096, truncate=False),
    qkv_bias=True, out_bias=True, ff_bias=True, feed_forward="clamped_swiglu", tie_embeddings=False,
)  # fmt: skip
LARGE: dict[str, Fields] = {
    "deepseek-v2-lite": _DEEPSEEK | dict(
        vocab_size=102_400, n_layer=27, n_head=16, n_embd=2048, n_ff=10_944, latent=_LATENT | dict(q_rank=0),
        rope_scaling=_V2_ROPE,
        experts=dict(count=64, active=6, width=1408, shared=2, pattern="D" + 26 * "E", normalise=False),
    ),
    "deepseek-v2": _DEEPSEEK | dict(
        vocab_size=102_400, n_layer=60, n_head=128, n_embd=5120, n_ff=12_288, latent=_LATENT, rope_scaling=_V2_ROPE,
        experts=dict(count=160, active=6, width=1536, shared=2, pattern="D" + 59 * "E", normalise=False, scale=16.0)
        | dict(groups=8, active_groups=3),
    ),
    "deepseek-v3": _DEEPSEEK | dict(
        vocab_size=129_280, n_layer=61, n_head=128, n_embd=7168, n_ff=18_432, latent=_LATENT,
        rope_scaling=dict(kind="yarn", factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0),
        experts=dict(count=256, active=8, width=2048, shared=1, pattern="DDD" + 58 * "E", router="sigmoid", scale=2.5)
        | dict(groups=8, active_groups=4, selection_bias=True),
    ),
    "gpt-oss-20b": _GPT_OSS | dict(n_layer=24, experts=dict(count=32, active=4, router_bias=True)),
    "gpt-oss-120b": _GPT_OSS | dict(n_layer=36, experts=dict(count=128, active=4, router_bias=True)),
}  # fmt: skip

PRESETS: dict[str, Fields] = OWN | GPT | PYTHIA | LLAMA | QWEN | GEMMA | OTHERS | LARGE
