"""What a model is made of, counted: the matrices of each block, parameters by part, keys seen and numbers cached.

Everything that explain.py and memory.py say follows from one list, :func:`block_matrices`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from groundup.model.config import GATED, ModelConfig


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a block.

    Args:
        part: what it belongs to: attention, feed-forward, experts, shared experts or router.
        name: what it is called.
        rows: outputs; columns: inputs.
        copies: how many of them there are: the experts.
        active: how many of those a token is multiplied with.
    """

    part: str
    name: str
    rows: int
    columns: int
    copies: int = 1
    active: int = 1

    @property
    def size(self) -> int:
        """Numbers in all copies."""
        return self.copies * self.rows * self.columns


# ---- parameters


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of the whole model by part, in the order in which a token meets them."""
    E, V = config.n_embd, config.vocab_size
    blocks: Counter[str] = Counter()
    for layer in range(config.n_layer):
        blocks.update(block_parameters(config, layer))
    last = sum(block_parameters(config, config.n_layer - 1).values())
    final_norm = 0 if config.norm_placement == "post" else norm_size(config)
    return {
        "token embedding": V * E,
        "position embedding": config.context_length * E if config.positions == "learned" else 0,
        "attention": blocks["attention"],
        "feed-forward": blocks["feed-forward"],
        "experts": blocks["experts"],
        "shared experts": blocks["shared experts"],
        "router": blocks["router"],
        "norms": blocks["norms"] + final_norm,
        "sinks": blocks["sinks"],
        "biases": blocks["biases"],
        "further tokens": config.n_predict * (3 * norm_size(config) + 2 * E * E + last),
        "output head": 0 if config.tie_embeddings else V * E,
    }


def block_parameters(config: ModelConfig, layer: int) -> dict[str, int]:
    """Parameters of one block by part. The bias by which experts are chosen is a buffer, not a parameter."""
    found: Counter[str] = Counter()
    for matrix in block_matrices(config, layer):
        found[matrix.part] += matrix.size
    found["norms"] = block_norms(config) * norm_size(config) + head_norms(config)
    found["sinks"] = config.n_head if config.attention_sinks else 0
    found["biases"] = sum(biases(config, layer).values())
    return dict(found)


def block_matrices(config: ModelConfig, layer: int) -> list[Matrix]:
    """The matrices of a block, in the order in which a token meets them."""
    E, experts = config.n_embd, config.experts
    found = _latent_matrices(config) if config.latent.kv_rank else _attention_matrices(config)
    if not config.expert_layers[layer]:
        return found + _feed_forward_matrices(config, "feed-forward", config.ff_dim)
    found.append(Matrix("router", "router", experts.count, E))
    if experts.shared:
        found += _feed_forward_matrices(config, "shared experts", experts.shared * config.expert_dim)
    return found + _feed_forward_matrices(config, "experts", config.expert_dim, experts.count, experts.active)


def _attention_matrices(config: ModelConfig) -> list[Matrix]:
    E, q_width, kv_width = config.n_embd, config.n_head * config.head_width, config.kv_heads * config.head_width
    shapes = {"q": (q_width, E), "k": (kv_width, E), "v": (kv_width, E), "out": (E, q_width)}
    return [Matrix("attention", name, *shape) for name, shape in shapes.items()]


def _latent_matrices(config: ModelConfig) -> list[Matrix]:
    E, H, latent = config.n_embd, config.n_head, config.latent
    shapes = {"q_down": (latent.q_rank, E)} if latent.q_rank else {}
    shapes["q_up"] = (H * config.head_width, latent.q_rank or E)
    shapes["kv_down"] = (latent.kv_rank + latent.rope_dim, E)
    shapes["kv_up"] = (H * (latent.nope_dim + latent.v_dim), latent.kv_rank)
    shapes["out"] = (E, H * latent.v_dim)
    return [Matrix("attention", name, *shape) for name, shape in shapes.items()]


def _feed_forward_matrices(
    config: ModelConfig, part: str, width: int, copies: int = 1, active: int = 1
) -> list[Matrix]:
    names = ["gate", "up"] if config.feed_forward in GATED else ["up"]
    found = [Matrix(part, name, width, config.n_embd, copies, active) for name in names]
    return [*found, Matrix(part, "down", config.n_embd, width, copies, active)]


def active_weights(matrices: Sequence[Matrix]) -> int:
    """Weights of them that one token is multiplied with."""
    return sum(matrix.active * matrix.rows * matrix.columns for matrix in matrices)


def idle_parameters(config: ModelConfig, layer: int) -> int:
    """Weights and biases of the experts that a token does not pass through."""
    idle = config.experts.count - config.experts.active
    return idle * expert_size(config) if config.expert_layers[layer] else 0


def expert_size(config: ModelConfig) -> int:
    """Parameters of one routed expert."""
    matrices = _feed_forward_matrices(config, "experts", config.expert_dim)
    return sum(m.size + (m.rows if config.ff_bias else 0) for m in matrices)


def norm_size(config: ModelConfig, width: int | None = None) -> int:
    """Parameters of one norm over ``width`` features (default: the residual stream's)."""
    biased = config.norm == "layernorm" and config.bias
    return (config.n_embd if width is None else width) * (2 if biased else 1)


def block_norms(config: ModelConfig) -> int:
    """Norms of the residual stream, or of what is added to it, in one block."""
    return 4 if config.norm_placement == "sandwich" else 2


def head_norms(config: ModelConfig) -> int:
    """Parameters of the norms inside one attention."""
    latent = config.latent
    if latent.kv_rank:
        return norm_size(config, latent.kv_rank) + norm_size(config, latent.q_rank)
    if not config.qk_norm:
        return 0
    heads = config.n_head + config.kv_heads if config.qk_norm_whole else 2
    return norm_size(config, heads * config.head_width)


def biases(config: ModelConfig, layer: int) -> dict[str, int]:
    """Biases of a block's linear layers by part; two of latent attention's have none, whatever the config."""
    found: Counter[str] = Counter()
    for matrix in block_matrices(config, layer):
        if matrix.part == "router":
            biased: bool | None = config.experts.router_bias
        elif matrix.part != "attention":
            biased = config.ff_bias
        elif matrix.name in ("q_up", "kv_up"):
            biased = False
        else:
            biased = config.out_bias if matrix.name == "out" else config.qkv_bias
        found[matrix.part] += matrix.copies * matrix.rows if biased else 0
    return dict(found)


# ---- attention's products, and the cache


def keys_seen(config: ModelConfig, layer: int, context: int) -> int:
    """How many keys a query of a layer is multiplied with."""
    window = config.window(layer)
    return context if window is None else min(window, context)


def attention_flops(config: ModelConfig, layer: int, context: int) -> int:
    """FLOPs per token of a layer's two products, queries with keys and weights with values."""
    widths = config.n_head * (config.head_width + config.value_width)
    return 2 * keys_seen(config, layer, context) * widths


def cache_widths(config: ModelConfig) -> tuple[int, int]:
    """Numbers that a layer keeps per position: keys and values; the latent and the rotary key of latent attention."""
    if config.latent.kv_rank:
        return config.latent.kv_rank, config.latent.rope_dim
    return config.kv_heads * config.head_width, config.kv_heads * config.value_width


def cache_bytes(config: ModelConfig, batch: int, length: int, dtype_bytes: int, *, new: int = 1) -> int:
    """Bytes of a ``KVCache`` with room for ``length`` positions of ``batch`` sequences.

    A layer with a window W has room for W - 1 positions and for those that come next: ``new`` at once, or W / 8 so that
    not every token moves what is kept; and never for more than ``length``.
    """
    positions = 0
    for layer in range(config.n_layer):
        window = config.window(layer)
        positions += length if window is None else min(length, window - 1 + max(new, -(-window // 8)))
    return batch * positions * sum(cache_widths(config)) * dtype_bytes
