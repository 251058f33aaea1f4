"""What a model is made of: one frozen dataclass whose fields choose the parts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from groundup.runtime import UsageError
from groundup.runtime.errors import nearest

Norm = Literal["rmsnorm", "layernorm"]
Positions = Literal["rope", "learned", "none"]
FeedForward = Literal["swiglu", "gelu", "relu2"]
_CHOICES = {"norm": Norm, "positions": Positions, "feed_forward": FeedForward}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only Transformer and the choice of each of its parts.

    Args:
        vocab_size: number of token ids the model knows
        context_length: longest sequence the model is trained on, in tokens
        n_layer: number of blocks
        n_head: query heads per attention
        n_kv_head: key/value heads; fewer than n_head is grouped-query attention (Ainslie et al. 2023), 1 multi-query;
            default n_head
        n_embd: width of the residual stream; must be a multiple of n_head
        n_ff: hidden width of the feed-forward; default 4 x n_embd, or 8/3 x n_embd rounded up to 32 for swiglu (Shazeer
            2020)
        norm: rmsnorm (Zhang & Sennrich 2019) or layernorm (Ba et al. 2016), always before each sub-layer
        norm_eps: added to the variance in the norms
        positions: rope (Su et al. 2021), learned, or none
        rope_theta: base of the rotary frequencies
        feed_forward: swiglu (Shazeer 2020), gelu (Hendrycks & Gimpel 2016) or relu2 (So et al. 2021)
        qk_norm: normalise queries and keys per head before the rotation (Henry et al. 2020, as in Qwen3)
        bias: add biases to the linear layers, as GPT-2 does
        tie_embeddings: use the token embedding as the output head too (Press & Wolf 2017)
        dropout: probability of dropping attention weights, sub-layer outputs and embeddings in training
        init_std: standard deviation of the initial weights
    """

    vocab_size: int = 32_768
    context_length: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None
    n_embd: int = 768
    n_ff: int | None = None
    norm: Norm = "rmsnorm"
    norm_eps: float = 1e-6
    positions: Positions = "rope"
    rope_theta: float = 10_000.0
    feed_forward: FeedForward = "swiglu"
    qk_norm: bool = True
    bias: bool = False
    tie_embeddings: bool = True
    dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UsageError(f"model.{name} = {getattr(self, name)} must be at least 1.")
        for name, choices in _CHOICES.items():
            value, known = getattr(self, name), get_args(choices)
            if value not in known:
                near = nearest(str(value), known)
                raise UsageError(f"model.{name} = {value} is not one of {', '.join(known)}.{near}")
        if self.n_embd % self.n_head:
            widest = max(1, self.n_embd // 8)  # heads narrower than 8 dimensions are not worth naming
            fitting = [n for n in range(1, widest + 1) if self.n_embd % n == 0]
            if self.positions == "rope":  # which needs an even head size besides
                fitting = [n for n in fitting if self.n_embd // n % 2 == 0] or fitting
            raise UsageError(
                f"model.n_head = {self.n_head} does not divide model.n_embd = {self.n_embd}. "
                f"Heads that would: {', '.join(map(str, fitting))}."
            )
        if self.n_kv_head is None:
            object.__setattr__(self, "n_kv_head", self.n_head)
        if self.n_ff is None:
            swiglu_width = -(-8 * self.n_embd // (3 * 32)) * 32
            object.__setattr__(self, "n_ff", swiglu_width if self.feed_forward == "swiglu" else 4 * self.n_embd)
        if self.ff_dim < 1:
            raise UsageError(f"model.n_ff = {self.n_ff} must be at least 1.")
        if self.kv_heads < 1 or self.n_head % self.kv_heads:
            groups = ", ".join(str(n) for n in range(1, self.n_head + 1) if self.n_head % n == 0)
            raise UsageError(
                f"model.n_kv_head = {self.n_kv_head} does not divide model.n_head = {self.n_head}. "
                f"Numbers that would: {groups}."
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise UsageError(
                f"model.n_embd / model.n_head = {self.head_dim} is odd, and rotary positions turn pairs of dimensions. "
                "Choose an even head size or model.positions = learned."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"model.dropout = {self.dropout} must be at least 0 and below 1.")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads, resolved."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def ff_dim(self) -> int:
        """Hidden width of the feed-forward, resolved."""
        return 4 * self.n_embd if self.n_ff is None else self.n_ff

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """A named config with any field overridden, such as ``ModelConfig.preset("gpt2-124m", n_layer=6)``.

        Raises:
            UsageError: no preset has that name, or no field.
        """
        if name not in PRESETS:
            raise UsageError(f"no model preset is called {name}.{nearest(name, PRESETS)} Known: {', '.join(PRESETS)}.")
        return cls.from_dict(PRESETS[name] | overrides)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build a config from its fields by name.

        Raises:
            UsageError: a key is no field of the config.
        """
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise UsageError(f"model.{key} is not a field of the model config.{nearest(key, known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, resolved."""
        return asdict(self)


_GPT2: dict[str, Any] = dict(
    vocab_size=50_257,
    norm="layernorm",
    norm_eps=1e-5,
    positions="learned",
    feed_forward="gelu",
    qk_norm=False,
    bias=True,
)
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2-124m": _GPT2 | dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-355m": _GPT2 | dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-774m": _GPT2 | dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-1558m": _GPT2 | dict(n_layer=48, n_head=25, n_embd=1600),
    "tiny": dict(n_layer=2, n_head=2, n_embd=128, vocab_size=4096, context_length=256),
    "small": dict(n_layer=6, n_head=6, n_embd=384, vocab_size=8192, context_length=256),
    "base": dict(n_layer=12, n_head=12, n_embd=768),
    "large": dict(n_layer=24, n_head=16, n_embd=1024),
}
