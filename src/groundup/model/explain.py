"""What a model costs before it is built: parameters, FLOPs and cache, from its config alone.

Parameters are counted in parts.py, memory in memory.py; what that means on a machine is in hardware.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from groundup.model.config import ModelConfig
from groundup.model.memory import Checkpointing, Optimizer, TrainingMemory, training_memory
from groundup.model.parts import (
    active_weights,
    attention_flops,
    block_matrices,
    cache_bytes,
    cache_widths,
    count_parameters,
    idle_parameters,
)


@dataclass(frozen=True)
class Explanation:
    """The costs of one model.

    Args:
        parameters: count by part; a tied head counts zero, further tokens are a part of their own
        active_parameters: those that a token meets when the next one is computed: all but the experts it does not pass
            through and the modules for further tokens
        matmul_parameters: weights that every token is multiplied with, the head included even when tied
        forward_flops_per_token: multiply-adds counted as two, at the context; without further tokens
        training_flops_per_token: forward and backward: three times the forward pass, further tokens included
        kv_bytes_per_token: cache bytes that a token of one sequence adds while no window is full
        kv_bytes_per_token_past_windows: those that it adds once every window is full
        kv_bytes: bytes of the cache of a batch of sequences as long as the context; see :func:`cache_bytes`
        training: memory of a training step, by what it is for
    """

    parameters: dict[str, int]
    active_parameters: int
    matmul_parameters: int
    forward_flops_per_token: int
    training_flops_per_token: int
    kv_bytes_per_token: int
    kv_bytes_per_token_past_windows: int
    kv_bytes: int
    training: TrainingMemory

    @property
    def total_parameters(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    @property
    def training_bytes(self) -> int:
        """Memory of a training step."""
        return self.training.total

    @property
    def activation_bytes(self) -> int:
        """The part of it that grows with the micro-batch."""
        return self.training.activations + max(self.training.loss, self.training.recomputed)


def explain(
    config: ModelConfig,
    micro_batch: int = 1,
    *,
    context: int | None = None,
    batch: int = 1,
    kv_dtype_bytes: int = 2,
    activation_dtype_bytes: int = 2,
    optimizer: Optimizer = "adamw",
    checkpointing: Checkpointing = "none",
    loss_chunk: int = 0,
) -> Explanation:
    """Count what ``config`` costs.

    FLOPs follow PaLM (Chowdhery et al. 2022, appendix B): 2 per matrix parameter and token forward, plus attention's
    two products with every key that a query sees: the context, or the window where that is less; no discount for the
    causal half. Latent attention is counted as training computes it, with keys and values made of the latents. Norms,
    activations, softmax and rotations are not counted.

    Args:
        micro_batch: sequences of ``context`` tokens that pass through at once in training.
        context: tokens of a sequence; default ``context_length``.
        batch: sequences that are served at once, for the cache.
        kv_dtype_bytes: bytes per cached number (2 for bf16).
        activation_dtype_bytes: bytes per activation kept for the backward pass (2 for bf16 autocast, 4 for float32).
        optimizer: adamw, or muon for the matrices of the blocks.
        checkpointing: what the backward pass computes again; see checkpointing.py.
        loss_chunk: positions whose logits are held at once (``language_model_loss``); 0 holds all.
    """
    T = config.context_length if context is None else context
    E, V, layers = config.n_embd, config.vocab_size, range(config.n_layer)
    parameters = count_parameters(config)
    blocks = sum(active_weights(block_matrices(config, layer)) for layer in layers)
    forward = 2 * (blocks + V * E) + sum(attention_flops(config, layer, T) for layer in layers)
    last = config.n_layer - 1
    further = 2 * (active_weights(block_matrices(config, last)) + 2 * E * E + V * E) + attention_flops(config, last, T)
    idle = sum(idle_parameters(config, layer) for layer in layers)
    full_layers = sum(config.window(layer) is None for layer in layers)
    per_layer = sum(cache_widths(config)) * kv_dtype_bytes
    return Explanation(
        parameters=parameters,
        active_parameters=sum(parameters.values()) - idle - parameters["further tokens"],
        matmul_parameters=blocks + V * E,
        forward_flops_per_token=forward,
        training_flops_per_token=3 * (forward + config.n_predict * further),
        kv_bytes_per_token=config.n_layer * per_layer,
        kv_bytes_per_token_past_windows=full_layers * per_layer,
        kv_bytes=cache_bytes(config, batch, T, kv_dtype_bytes),
        training=training_memory(
            config, micro_batch, T, activation_dtype_bytes, optimizer=optimizer, checkpointing=checkpointing,
            loss_chunk=loss_chunk,
        ),
    )  # fmt: skip
