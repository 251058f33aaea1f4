"""How much memory a training step and a served batch need, from the config alone.

A formula per part, held against PyTorch's own account of what it keeps and against measured peaks by tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from groundup.model.config import GATED, ModelConfig
from groundup.model.parts import Matrix, block_matrices, cache_bytes, count_parameters, keys_seen

Checkpointing = Literal["none", "selective", "block"]
Optimizer = Literal["adamw", "muon"]
WeightType = Literal["float32", "bfloat16", "int8", "int4"]
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "block")
OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "muon")
WEIGHT_TYPES: tuple[WeightType, ...] = ("float32", "bfloat16", "int8", "int4")
INT4_GROUP = 64  # weights of a row that share a scale
SCALE_BYTES = 4  # kept in float32
STREAM = 4  # bytes per number of the residual stream, which stays float32 under autocast
WIDE_TOGETHER = 2**20  # logits in float32 at once on a CPU, when the loss is computed: they stay in its caches


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training step at its peak, with float32 weights.

    Args:
        weights: the parameters; gradients: as many again.
        moments: what the optimizer remembers: two numbers per parameter of AdamW, one of Muon.
        casts: the matrices in the dtype of the activations, where that is narrower.
        activations: what the blocks keep for the backward pass.
        recomputed: what one block computes again for it.
        loss: logits and their gradients; of a loss in chunks, those of a chunk and the head's gradient.
        update: what is held for a moment when the activations are gone: Muon's, and the second gradient of a table that
            is embedding and head.
    """

    weights: int
    gradients: int
    moments: int
    casts: int
    activations: int
    recomputed: int
    loss: int
    update: int

    @property
    def total(self) -> int:
        """The peak: the loss, a block's backward pass, or the optimizer's update, whichever takes most."""
        passing = self.casts + self.activations + max(self.loss, self.recomputed)
        return self.weights + self.gradients + self.moments + max(passing, self.update)


@dataclass(frozen=True)
class ServingMemory:
    """Bytes of serving a batch.

    Args:
        weights: the parameters, quantized where asked for, with their scales.
        cache: keys and values of all sequences at their full context.
        working: what one block holds for a moment while a prompt is read, and the logits.
    """

    weights: int
    cache: int
    working: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.cache + self.working


# ---- training


def training_memory(
    config: ModelConfig, micro_batch: int, context: int, dtype_bytes: int, *, optimizer: Optimizer = "adamw",
    checkpointing: Checkpointing = "none", loss_chunk: int = 0, cpu: bool = False,
) -> TrainingMemory:  # fmt: skip
    """Memory of a training step over ``micro_batch`` sequences of ``context`` tokens.

    Args:
        dtype_bytes: bytes per activation: 2 for bf16 autocast, 4 for float32.
        loss_chunk: positions whose logits are held at once; 0 holds all.
        cpu: count what PyTorch keeps on a CPU, where its RMS norm is not fused, its fused attention takes no dropout
            (which writes the scores out), and values narrower than keys are widened for it.
    """
    total = sum(count_parameters(config).values())
    tokens = micro_batch * context
    layers = range(config.n_layer)
    kept = {
        "none": sum(kept_by_block(config, layer, context, dtype_bytes, cpu=cpu) for layer in layers),
        "selective": sum(
            STREAM * config.n_embd + kept_products(config, layer, context, dtype_bytes, cpu=cpu) for layer in layers
        ),
        "block": STREAM * config.n_embd * config.n_layer,
    }[checkpointing]
    widest = max(kept_by_block(config, layer, context, dtype_bytes, cpu=cpu) for layer in layers)
    if config.n_predict:
        last = kept_by_block(config, config.n_layer - 1, context, dtype_bytes, cpu=cpu)
        kept += config.n_predict * (last + 8 * STREAM * config.n_embd)
    kept += _kept_by_norm(config, config.n_embd, STREAM, cpu=cpu) + dtype_bytes * config.n_embd  # what the head reads
    bias = config.n_head * context**2 * dtype_bytes if config.positions == "alibi" else 0
    matrices = sum(matrix.size for layer in layers for matrix in block_matrices(config, layer))
    casts = dtype_bytes * (matrices + config.vocab_size * config.n_embd) if dtype_bytes < STREAM else 0
    moments, update = (8 * total, 0) if optimizer == "adamw" else (8 * total - 4 * matrices, _muon_update(config))
    update = max(update, 4 * config.vocab_size * config.n_embd if config.tie_embeddings else 0)
    again = checkpointing != "none"
    activations = tokens * kept + (0 if again else config.n_layer * bias)
    recomputed = tokens * widest + bias if again else 0
    loss = _loss_bytes(config, tokens, dtype_bytes, loss_chunk, cpu=cpu)
    return TrainingMemory(4 * total, 4 * total, moments, casts, activations, recomputed, loss, update)


def kept_by_block(config: ModelConfig, layer: int, context: int, dtype_bytes: int, *, cpu: bool = False) -> int:
    """Bytes that a block keeps per token for its backward pass, attention's fused kernels at work."""
    E, placement = config.n_embd, config.norm_placement
    of_stream = _kept_by_norm(config, E, STREAM, cpu=cpu) if placement != "output" else 0
    of_result = _kept_by_norm(config, E, dtype_bytes, cpu=cpu) if placement in ("output", "sandwich") else 0
    kept = 2 * (of_stream + of_result) - (STREAM * E if config.parallel_blocks else 0)  # where one input serves both
    kept += 2 * E * dtype_bytes if config.dropout else 0
    kept += _kept_by_attention(config, layer, context, dtype_bytes, cpu=cpu)
    if not config.expert_layers[layer]:
        return kept + _kept_by_feed_forward(config, config.ff_dim, dtype_bytes)
    return kept + _kept_by_experts(config, dtype_bytes)


def _kept_by_norm(config: ModelConfig, width: int, dtype_bytes: int, *, cpu: bool) -> int:
    """A norm keeps what it read; written out, RMS norm keeps it in float32, and divided by its root mean square."""
    return width * (2 * STREAM if cpu and config.norm == "rmsnorm" else dtype_bytes)


def _read(width: int, readers: int, dtype_bytes: int) -> int:
    """What matrices keep of their common input: in float32 it is one tensor, under autocast each casts its own."""
    return width * dtype_bytes * (readers if dtype_bytes < STREAM else 1)


def _kept_by_attention(config: ModelConfig, layer: int, context: int, a: int, *, cpu: bool) -> int:
    """The input, what norms inside read, queries, keys and values as the kernel reads them, its result, and scores."""
    E, H, latent = config.n_embd, config.n_head, config.latent
    q_width, v_width, kv_width = H * config.head_width, H * config.value_width, config.kv_heads * config.head_width
    written_out = _written_out(config, cpu=cpu)
    # What the fused kernel for CPUs reads and makes has one width, and one dimension more for sinks (backends.py).
    padded = cpu and not written_out and (config.value_width != config.head_width or config.attention_sinks)
    if latent.kv_rank:
        kept = _read(E, 2, a) + a * (latent.q_rank + latent.kv_rank + latent.rope_dim)
        kept += _kept_by_norm(config, latent.q_rank + latent.kv_rank, a, cpu=cpu)
        made = v_width if written_out else H * (latent.nope_dim + latent.v_dim)
    else:
        kept = _read(E, 3, a)
        kept += _kept_by_norm(config, q_width + kv_width, a, cpu=cpu) if config.qk_norm else 0
        made = v_width
    if padded:
        q_width = made = max(q_width, v_width) + (H if config.attention_sinks else 0)
        kept += a * q_width  # the result before it is cut
    window = config.window(layer)
    # A window is computed in blocks that read two windows of keys each (backends.py).
    twice = 2 if window is not None and context > window and config.positions != "alibi" else 1
    wide = STREAM if written_out == "sdpa" else a
    kept += wide * (q_width + twice * (q_width + made)) + a * v_width
    if not written_out:
        return kept + 4 * H
    per_key = 2 * a if written_out == "explicit" else STREAM
    per_key += 2 * wide if config.dropout else 0
    return kept + H * per_key * keys_seen(config, layer, context) * twice


def _written_out(config: ModelConfig, *, cpu: bool) -> str:
    """Who writes out the scores of queries and keys: this package, PyTorch for want of a fused kernel, or nobody."""
    if config.attention_softcap is not None:
        return "explicit"
    return "sdpa" if cpu and config.dropout else ""


def _kept_by_feed_forward(config: ModelConfig, width: int, a: int) -> int:
    """The input, what the activation read and made, and for a gate both halves and their product."""
    kept = {"swiglu": 4, "geglu": 4, "clamped_swiglu": 7, "gelu": 2, "gelu_exact": 2, "relu": 1, "relu2": 2}
    readers = 2 if config.feed_forward in GATED else 1
    return _read(config.n_embd, readers, a) + kept[config.feed_forward] * width * a


def _kept_by_experts(config: ModelConfig, a: int) -> int:
    """Each routed row as an ordinary feed-forward's, its result before and after it is weighted, and the routing."""
    E, experts = config.n_embd, config.experts
    kept = experts.active * (_kept_by_feed_forward(config, config.expert_dim, a) + 2 * E * a + 36)
    kept += STREAM * (experts.count + E)
    return kept + (_kept_by_feed_forward(config, experts.shared * config.expert_dim, a) if experts.shared else 0)


def kept_products(config: ModelConfig, layer: int, context: int, a: int, *, cpu: bool = False) -> int:
    """Bytes per token of the results of a block's matrix products, which selective checkpointing keeps."""
    rows = sum(m.rows * m.active for m in block_matrices(config, layer))
    scores = STREAM * config.n_head * keys_seen(config, layer, context) if _written_out(config, cpu=cpu) else 0
    return a * (rows + config.n_head * config.value_width) + 4 * config.n_head + scores


def loss_chunk(vocab_size: int) -> int:
    """Positions whose logits the loss holds at once, where nobody says otherwise; not so few that products are slow."""
    return max(128, 2**24 // vocab_size)


def _loss_bytes(config: ModelConfig, tokens: int, a: int, chunk: int, *, cpu: bool) -> int:
    """Logits as log-probabilities, their gradient and the loss's, in float32; or those of a chunk, of which a CPU
    widens a few rows at a time.
    """
    E, V = config.n_embd, config.vocab_size
    capped = a if config.logit_softcap is not None else 0
    heads = 1 + config.n_predict
    if not chunk:
        return heads * tokens * V * (12 + capped)
    held = min(tokens, chunk)
    wide = min(held, max(1, WIDE_TOGETHER // V)) if cpu else held
    return V * (held * a + wide * (12 + capped)) + heads * (4 * V * E + 2 * tokens * E * a)


def _muon_update(config: ModelConfig) -> int:
    """Matrices of equal shape are updated as one: gradients, their stack, four steps of the iteration, one product."""
    groups: dict[tuple[int, int], int] = {}
    for layer in range(config.n_layer):
        for matrix in block_matrices(config, layer):
            shape = (matrix.rows, matrix.columns)
            groups[shape] = groups.get(shape, 0) + matrix.copies
    return max(4 * count * (6 * max(shape) + min(shape)) * min(shape) for shape, count in groups.items())


# ---- serving


def serving_memory(
    config: ModelConfig, batch: int, context: int, weight_type: WeightType = "bfloat16", *, cache_dtype_bytes: int = 2,
    prompt: int = 2048, together: int = 1, cpu: bool = False,
) -> ServingMemory:  # fmt: skip
    """Memory of serving ``batch`` sequences of ``context`` tokens.

    Args:
        weight_type: of the blocks' matrices; what is quantized leaves embedding, head, router and norms in bfloat16.
        prompt: tokens of a prompt that are read at once.
        together: how many prompts are.
        cpu: as for :func:`training_memory`.
    """
    a = 4 if weight_type == "float32" else 2
    reading = together * _reading(config, min(prompt, context), context, a, cpu=cpu)
    working = max(reading, batch * _decoding(config, context, a)) + batch * (a + 4) * config.vocab_size
    cache = cache_bytes(config, batch, context, cache_dtype_bytes)
    return ServingMemory(weight_bytes(config, weight_type), cache, working)


def weight_bytes(config: ModelConfig, weight_type: WeightType) -> int:
    """Bytes of all weights: int8 with a scale per row, int4 with one per group of 64 weights of a row (quantized.py).

    The modules for further tokens are counted: they are loaded with the rest.
    """
    plain = 4 if weight_type == "float32" else 2
    found = plain * sum(count_parameters(config).values())
    blocks = [*range(config.n_layer), *[config.n_layer - 1] * config.n_predict]
    for matrix in [matrix for layer in blocks for matrix in block_matrices(config, layer)]:
        found += matrix.copies * matrix_bytes(matrix, weight_type) - plain * matrix.size
    join = Matrix("further tokens", "join", config.n_embd, 2 * config.n_embd)
    return found + config.n_predict * (matrix_bytes(join, weight_type) - plain * join.size)


def matrix_bytes(matrix: Matrix, weight_type: WeightType) -> int:
    """Bytes of one copy of a matrix, with its scales where it is quantized. A router never is."""
    rows, columns = matrix.rows, matrix.columns
    if weight_type in ("float32", "bfloat16") or matrix.part == "router":
        return rows * columns * (4 if weight_type == "float32" else 2)
    if weight_type == "int8":
        return rows * (columns + SCALE_BYTES)
    groups = -(-columns // INT4_GROUP)
    return rows * groups * (INT4_GROUP // 2 + SCALE_BYTES)


def _reading(config: ModelConfig, new: int, context: int, a: int, *, cpu: bool) -> int:
    """Bytes that one block holds for a moment while ``new`` tokens are read, the last of ``context``."""
    E, H, latent, experts = config.n_embd, config.n_head, config.latent, config.experts
    q_width, v_width, kv_width = H * config.head_width, H * config.value_width, config.kv_heads * config.head_width
    per_token = 3 * E + 2 * q_width + v_width
    if latent.kv_rank:  # keys and values are made of all latents so far
        per_key = H * (latent.nope_dim + latent.v_dim) + q_width
    else:
        per_token += 2 * kv_width
        per_key = q_width + v_width if config.kv_heads < H else 0
    attention = a * (new * per_token + context * per_key)
    attention += 2 * STREAM * H * new * context if _written_out(config, cpu=cpu) else 0
    inner = 4 if config.feed_forward in GATED else 2
    widest = max(
        experts.active * (2 * E + inner * config.expert_dim) if mixture else inner * config.ff_dim
        for mixture in config.expert_layers
    )
    return max(attention, a * new * (3 * E + widest))


def _decoding(config: ModelConfig, context: int, a: int) -> int:
    """Bytes that one block holds for a moment while a sequence's next token is computed."""
    if config.latent.kv_rank:  # latents and rotary keys side by side
        return a * context * (config.latent.kv_rank + config.latent.rope_dim) + STREAM * config.n_head * context
    copied = config.positions == "alibi"  # a key and value for each query head
    return a * context * config.n_head * (config.head_width + config.value_width) if copied else 0
