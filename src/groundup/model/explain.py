"""What a model costs before it is built: parameters, FLOPs, cache and memory, from its config alone."""

from __future__ import annotations

from dataclasses import dataclass

from groundup.model.config import ModelConfig


@dataclass(frozen=True)
class Explanation:
    """The costs of one model.

    Args:
        parameters: count by part; a tied head counts zero
        matmul_parameters: weights that every token is multiplied with, the head included even when tied
        forward_flops_per_token: multiply-adds counted as two, at full context
        training_flops_per_token: forward and backward: three times the forward pass
        kv_bytes_per_token: cache bytes per token of one sequence, at ``kv_dtype_bytes`` per number
        training_bytes: weights, gradients and two AdamW moments in float32, and the activations of one micro-batch
        activation_bytes: the part of training_bytes that grows with the micro-batch
    """

    parameters: dict[str, int]
    matmul_parameters: int
    forward_flops_per_token: int
    training_flops_per_token: int
    kv_bytes_per_token: int
    training_bytes: int
    activation_bytes: int

    @property
    def total_parameters(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())


def explain(
    config: ModelConfig, micro_batch: int = 1, *, kv_dtype_bytes: int = 2, activation_dtype_bytes: int = 2
) -> Explanation:
    """Count what ``config`` costs.

    FLOPs follow PaLM (Chowdhery et al. 2022, appendix B): 2 per matrix parameter and token forward, plus 4 x n_embd x
    context per layer for attention's two products at full context (no discount for the causal half), three times that
    for training.

    Args:
        micro_batch: sequences of ``context_length`` that pass through at once in training.
        kv_dtype_bytes: bytes per cached number (2 for bf16).
        activation_dtype_bytes: bytes per activation kept for the backward pass (2 for bf16 autocast, 4 for float32).
    """
    E, L, V, T = config.n_embd, config.n_layer, config.vocab_size, config.context_length
    q_width, kv_width, F = config.n_head * config.head_dim, config.kv_heads * config.head_dim, config.ff_dim
    ff_matrices = 3 if config.feed_forward == "swiglu" else 2

    attention = E * q_width + 2 * E * kv_width + q_width * E
    feed_forward = ff_matrices * E * F
    norm_width = 2 if config.norm == "layernorm" and config.bias else 1
    norms = (2 * L + 1) * E * norm_width + (2 * L * config.head_dim if config.qk_norm else 0)
    biases = L * (q_width + 2 * kv_width + E + (ff_matrices - 1) * F + E) if config.bias else 0
    parameters = {
        "token embedding": V * E,
        "position embedding": T * E if config.positions == "learned" else 0,
        "attention": L * attention,
        "feed-forward": L * feed_forward,
        "norms": norms,
        "biases": biases,
        "output head": 0 if config.tie_embeddings else V * E,
    }
    matmul_parameters = L * (attention + feed_forward) + V * E
    forward = 2 * matmul_parameters + 4 * L * q_width * T

    # Kept for the backward pass per token and layer: the inputs of the norms and matrices, q, k, v, the mixed values,
    # and the hidden layer (gate, its silu, up, their product for SwiGLU; before and after the activation otherwise).
    # Attention weights are not kept by the fused backends; the logits are, in float32, twice (log-softmax and its
    # gradient). A formula, held against measured peaks by a test: they are 1.0 to 1.3 times as large, from what is
    # alive for a moment only.
    hidden = 4 if config.feed_forward == "swiglu" else 2
    per_token = L * ((2 * E) * 4 + (3 * E + 2 * q_width + 2 * kv_width + hidden * F) * activation_dtype_bytes)
    activations = micro_batch * T * (per_token + V * (8 + activation_dtype_bytes))
    total = sum(parameters.values())
    return Explanation(
        parameters=parameters,
        matmul_parameters=matmul_parameters,
        forward_flops_per_token=forward,
        training_flops_per_token=3 * forward,
        kv_bytes_per_token=2 * L * kv_width * kv_dtype_bytes,
        training_bytes=16 * total + activations,
        activation_bytes=activations,
    )
