"""What a model is made of: one frozen dataclass whose fields choose the parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args, get_type_hints

from groundup.runtime import UsageError
from groundup.runtime.errors import nearest

Norm = Literal["rmsnorm", "layernorm"]
NormPlacement = Literal["pre", "post", "output", "sandwich"]
Positions = Literal["rope", "learned", "sinusoidal", "alibi", "none"]
FeedForward = Literal["swiglu", "geglu", "clamped_swiglu", "gelu", "gelu_exact", "relu", "relu2"]
Initialisation = Literal["depth_scaled", "normal", "mup"]
GATED: tuple[FeedForward, ...] = ("swiglu", "geglu", "clamped_swiglu")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed so that a model reads further than it was trained to.

    Args:
        kind: none; linear (Chen et al. 2023: all frequencies divided by factor); dynamic (NTK-aware, growing with the
            text; bloc97 and emozilla 2023); yarn (Peng et al. 2023); llama3 (Grattafiori et al. 2024, as Llama 3.1);
            longrope (Ding et al. 2024, as Phi-3)
        factor: how many times further
        original_length: tokens of the context it was trained on before; default context_length / factor
        low_freq_factor: llama3: wavelengths above original_length / this are divided by factor
        high_freq_factor: llama3: wavelengths below original_length / this are left alone
        beta_fast: yarn: frequencies that turn more often than this within original_length are left alone
        beta_slow: yarn: frequencies that turn less often than this are divided by factor
        truncate: yarn: round the two borders to whole dimensions
        attention_factor: yarn, longrope: multiplies cosines and sines; null derives it from factor
        mscale: yarn: weight of log(factor) in that, as DeepSeek-V2 has it; 0 for the paper's 1
        mscale_all_dim: yarn: the same for the scores of all dimensions (DeepSeek-V2); 0 for none
        short_factor: longrope: a divisor per frequency for texts within original_length
        long_factor: longrope: a divisor per frequency for longer texts
    """

    kind: Literal["none", "linear", "dynamic", "yarn", "llama3", "longrope"] = "none"
    factor: float = 1.0
    original_length: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    short_factor: list[float] = field(default_factory=list)
    long_factor: list[float] = field(default_factory=list)


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """``0.1 weight ln(factor) + 1``: what yarn multiplies the square root of the scores with (Peng et al., eq. 22)."""
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values are kept as one small latent vector.

    Args:
        kv_rank: width of that vector; 0 for ordinary attention
        q_rank: width of the vector that queries come from; 0 computes them directly
        rope_dim: dimensions per head that carry positions; the keys' are shared by all heads
        nope_dim: dimensions per query and key head that carry none
        v_dim: dimensions per value head
    """

    kv_rank: int = 0
    q_rank: int = 0
    rope_dim: int = 0
    nope_dim: int = 0
    v_dim: int = 0


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the feed-forward (Shazeer et al. 2017).

    Args:
        count: routed experts per layer; 0 for the ordinary feed-forward
        active: how many of them each token passes through
        width: hidden width of one expert; default n_ff
        shared: experts that every token passes through besides, as one feed-forward of shared x width (Dai et al. 2024)
        pattern: which layers: E experts, D dense; repeated over the layers
        router: softmax over all experts, or a sigmoid for each (DeepSeek-V3)
        normalise: divide the weights of the chosen experts by their sum
        scale: multiplies the weights of the chosen experts
        groups: experts are chosen from the best of this many groups (DeepSeek-V2, section 2.2.2)
        active_groups: how many groups are chosen from
        router_bias: add a learnt bias to the router's logits (gpt-oss)
        selection_bias: choose by score plus a bias that evens the load, without a loss (Wang et al. 2024; DeepSeek-V3)
        bias_rate: how much that bias moves per training step
        balance_loss: weight of the auxiliary load-balancing loss (Fedus et al. 2021, eq. 4)
        z_loss: weight of the router's z-loss (Zoph et al. 2022, eq. 5)
        capacity: each expert takes at most this many times its even share of tokens, and drops the rest; 0 drops none
    """

    count: int = 0
    active: int = 2
    width: int | None = None
    shared: int = 0
    pattern: str = "E"
    router: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    active_groups: int = 1
    router_bias: bool = False
    selection_bias: bool = False
    bias_rate: float = 0.001
    balance_loss: float = 0.0
    z_loss: float = 0.0
    capacity: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only Transformer and the choice of each of its parts.

    Args:
        vocab_size: number of token ids the model knows
        context_length: longest sequence the model is trained on, in tokens
        n_layer: number of blocks
        n_head: query heads per attention
        n_kv_head: key/value heads; fewer than n_head is grouped-query attention (Ainslie et al. 2023), 1 multi-query
            (Shazeer 2019); default n_head
        n_embd: width of the residual stream
        head_dim: width of one head; default n_embd / n_head
        n_ff: hidden width of the feed-forward; default 4 x n_embd, or 8/3 x n_embd rounded up to 32 for the gated ones
            (Shazeer 2020)
        norm: rmsnorm (Zhang & Sennrich 2019) or layernorm (Ba et al. 2016)
        norm_eps: added to the variance in the norms
        norm_plus_one: norms multiply by 1 + weight (Gemma)
        norm_placement: pre, before each sub-layer (Xiong et al. 2020); post, after its sum with the stream (Vaswani et
            al. 2017); output, on the sub-layer's result (OLMo 2); sandwich, before and on the result (Gemma 2)
        parallel_blocks: attention and feed-forward read the same stream side by side (Wang & Komatsuzaki 2021)
        positions: rope (Su et al. 2021), learned, sinusoidal (Vaswani et al. 2017), alibi (Press et al. 2022) or none
        rope_theta: base of the rotary frequencies
        rope_local_theta: their base in the layers with a sliding window, without scaling (Gemma 3); default rope_theta
        rope_fraction: part of each head's dimensions that is rotated
        rope_scaling: how the rotary frequencies are stretched
        layer_pattern: what each layer's attention sees: F everything before, S a sliding window, N everything but no
            rotary positions (Kazemnejad et al. 2023); repeated over the layers
        sliding_window: positions that a layer with a window sees, its own included (Beltagy et al. 2020)
        latent: multi-head latent attention
        qk_norm: normalise queries and keys per head before the rotation (Henry et al. 2020, as in Qwen3)
        qk_norm_whole: normalise them over all heads at once instead (OLMo 2)
        attention_sinks: a learnt logit per head that takes attention from every position (Xiao et al. 2024; gpt-oss)
        attention_scale: multiplies the scores; default 1 / sqrt(width of a query head)
        attention_softcap: bounds the scores smoothly, to this x tanh(score / this) (Gemma 2)
        logit_softcap: bounds the logits the same way
        feed_forward: swiglu, geglu (Shazeer 2020), clamped_swiglu (OpenAI 2025), gelu (Hendrycks & Gimpel 2016, in
            its tanh form), gelu_exact, relu, or relu2 (So et al. 2021)
        experts: a mixture of experts
        bias: add biases to the linear layers and layer norms, as GPT-2 does
        qkv_bias: the same for queries, keys and values alone (Qwen 2); default bias
        out_bias: the same for the output of attention; default bias
        ff_bias: the same for the feed-forward; default bias
        tie_embeddings: use the token embedding as the output head too (Press & Wolf 2017)
        embedding_scale: multiplies the token embeddings (Gemma: sqrt(n_embd))
        n_predict: further tokens predicted at each position by modules of their own (DeepSeek-V3, section 2.2)
        dropout: probability of dropping attention weights, sub-layer outputs and embeddings in training
        initialisation: depth_scaled (Radford et al. 2019), normal, or mup (Yang et al. 2022)
        init_std: standard deviation of the initial weights
    """

    vocab_size: int = 32_768
    context_length: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None
    n_embd: int = 768
    head_dim: int | None = None
    n_ff: int | None = None
    norm: Norm = "rmsnorm"
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    norm_placement: NormPlacement = "pre"
    parallel_blocks: bool = False
    positions: Positions = "rope"
    rope_theta: float = 10_000.0
    rope_local_theta: float | None = None
    rope_fraction: float = 1.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    layer_pattern: str = "F"
    sliding_window: int | None = None
    latent: LatentAttention = field(default_factory=LatentAttention)
    qk_norm: bool = True
    qk_norm_whole: bool = False
    attention_sinks: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    feed_forward: FeedForward = "swiglu"
    experts: Experts = field(default_factory=Experts)
    bias: bool = False
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    ff_bias: bool | None = None
    tie_embeddings: bool = True
    embedding_scale: float | None = None
    n_predict: int = 0
    dropout: float = 0.0
    initialisation: Initialisation = "depth_scaled"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        from groundup.model.check import check, resolved

        for name, value in resolved(self).items():
            object.__setattr__(self, name, value)
        check(self)

    # ---- what follows from the fields

    @property
    def head_width(self) -> int:
        """Width of one query head: of latent attention, what carries positions and what carries none together."""
        return self.n_embd // self.n_head if self.head_dim is None else self.head_dim

    @property
    def value_width(self) -> int:
        """Width of one value head."""
        return self.latent.v_dim if self.latent.kv_rank else self.head_width

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def ff_dim(self) -> int:
        """Hidden width of the dense feed-forward."""
        return 4 * self.n_embd if self.n_ff is None else self.n_ff

    @property
    def layer_kinds(self) -> str:
        """``layer_pattern`` written out, a letter for each layer."""
        return (self.layer_pattern * self.n_layer)[: self.n_layer]

    @property
    def expert_layers(self) -> list[bool]:
        """For each layer, whether it is a mixture of experts."""
        pattern = (self.experts.pattern * self.n_layer)[: self.n_layer]
        return [self.experts.count > 0 and letter == "E" for letter in pattern]

    @property
    def expert_dim(self) -> int:
        """Hidden width of one expert."""
        return self.ff_dim if self.experts.width is None else self.experts.width

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.latent.rope_dim if self.latent.kv_rank else int(self.head_width * self.rope_fraction)

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied with."""
        scale = self.head_width**-0.5 if self.attention_scale is None else self.attention_scale
        scaling = self.rope_scaling
        if self.latent.kv_rank and scaling.kind == "yarn" and scaling.mscale_all_dim:
            return scale * yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
        return scale

    def window(self, layer: int) -> int | None:
        """How many positions the attention of a layer sees, its own included; None for all before."""
        return self.sliding_window if self.layer_kinds[layer] == "S" else None

    # ---- names and dictionaries

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """A named config with any field overridden, such as ``ModelConfig.preset("gpt2-124m", n_layer=6)``.

        Raises:
            UsageError: no preset has that name, or no field.
        """
        from groundup.model.presets import PRESETS

        if name not in PRESETS:
            raise UsageError(f"no model preset is called {name}.{nearest(name, PRESETS)} Known: {', '.join(PRESETS)}.")
        return cls.from_dict(PRESETS[name] | overrides)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Build a config from its fields by name; those of a section are a mapping, or have dotted names.

        Raises:
            UsageError: a key is no field of the config.
        """
        return _build(cls, values, "model")

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, resolved."""
        return asdict(self)


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    hints, known = get_type_hints(cls), [entry.name for entry in fields(cls)]
    given: dict[str, Any] = {}
    for key, value in values.items():
        name, dot, rest = key.partition(".")
        if name not in known or (dot and not is_dataclass(hints[name])):
            raise UsageError(f"{where}.{key} is not a field of the model config.{nearest(key, known)}")
        given[name] = {**given.get(name, {}), rest: value} if dot else value
    for name, value in given.items():
        if is_dataclass(hints[name]) and isinstance(value, Mapping):
            given[name] = _build(hints[name], value, f"{where}.{name}")
    return cls(**given)


def choices(cls: type) -> dict[str, tuple[str, ...]]:
    """The fields of a config class that take one of a few words, and which."""
    hints = get_type_hints(cls)
    return {name: get_args(hint) for name, hint in hints.items() if getattr(hint, "__origin__", None) is Literal}
