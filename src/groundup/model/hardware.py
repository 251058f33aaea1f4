"""What a model takes on a machine you can name: time, energy and money, by arithmetic whose every input is shown.

Compute, memory bandwidth, memory and power are the vendors' figures (the data sheet is named beside each). Prices are
typical rents per hour on demand, in USD, rounded, as listed by several providers in 2025 and early 2026; they differ by
a factor of two between providers and fall with time. A machine that is bought and not rented costs its price spread
over three years. How much of its peak a machine reaches is an assumption: 40 % is what published training runs of dense
models report (Chowdhery et al. 2022: 46 %; Grattafiori et al. 2024: 38 to 43 %).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from groundup.model.config import ModelConfig
from groundup.model.explain import Explanation
from groundup.model.memory import Checkpointing, WeightType, matrix_bytes, serving_memory, weight_bytes
from groundup.model.parts import Matrix, block_matrices, cache_widths, count_parameters, expert_size, keys_seen
from groundup.runtime import UsageError
from groundup.runtime.errors import nearest

TOKENS_PER_PARAMETER = 20  # compute-optimal training (Hoffmann et al. 2022, table 3, approach 1)


@dataclass(frozen=True)
class Hardware:
    """A machine, or one accelerator of it.

    Args:
        described: what it is called in full.
        flops: peak per second of dense matrix products in bf16, or in float32 where bf16 is no faster.
        bandwidth: bytes per second between memory and compute.
        memory: bytes.
        watts: at full load.
        price: USD per hour.
        utilisation: the share of ``flops`` that training is assumed to reach.
    """

    described: str
    flops: float
    bandwidth: float
    memory: float
    watts: float
    price: float
    utilisation: float = 0.4


HARDWARE = {
    # Intel Core Ultra 7 155H data sheet: 6 performance cores with AVX2, 32 float32 FLOPs per cycle each, at about 3.8
    # GHz when all are busy; two channels of DDR5-5600; 28 W base power. A laptop of 1,000 USD.
    "laptop": Hardware("laptop CPU, 6 cores with AVX2", 0.73e12, 89.6e9, 16e9, 28, 0.04, 0.5),
    # AMD EPYC 7763 data sheet (Zen 3): AVX2, 32 float32 FLOPs per cycle, 2.45 GHz base clock; what one core complex
    # can read at most (32 bytes per cycle of 1.6 GHz); 280 W shared by 64 cores. A rented virtual machine of 2 cores.
    "server-cpu": Hardware("2 cores of a server CPU (EPYC 7763)", 0.157e12, 51.2e9, 16e9, 9, 0.17, 0.5),
    # NVIDIA Ada GPU architecture white paper, appendix A: 165.2 TFLOP/s with float32 accumulation.
    "rtx-4090": Hardware("NVIDIA GeForce RTX 4090", 165.2e12, 1.008e12, 24e9, 450, 0.40),
    # NVIDIA A100 data sheet, SXM 80 GB.
    "a100": Hardware("NVIDIA A100 SXM 80 GB", 312e12, 2.039e12, 80e9, 400, 1.80),
    # NVIDIA H100 data sheet, SXM: 1,979 TFLOP/s with sparsity, half of it without.
    "h100": Hardware("NVIDIA H100 SXM", 989.5e12, 3.35e12, 80e9, 700, 3.00),
    # NVIDIA H200 data sheet, SXM.
    "h200": Hardware("NVIDIA H200 SXM", 989.5e12, 4.8e12, 141e9, 700, 3.70),
    # Apple's technical specifications: 40 GPU cores, 400 GB/s, 64 GB. Compute follows from 128 lanes per core and a
    # clock of 1.4 GHz, power from reviews under load: Apple publishes neither. A laptop of 4,000 USD.
    "m3-max": Hardware("Apple M3 Max, 40 GPU cores", 14.3e12, 0.4e12, 64e9, 75, 0.15),
}


def hardware(name: str) -> Hardware:
    """A machine of the table by name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in HARDWARE:
        known = ", ".join(HARDWARE)
        raise UsageError(
            f"hardware = {name}: no machine of that name is known.{nearest(name, HARDWARE)} Known: {known}."
        )
    return HARDWARE[name]


@dataclass(frozen=True)
class TrainingEstimate:
    """What a training run takes.

    Args:
        machines: how many it needs for its memory alone, shared out evenly.
        seconds: of one machine; of n machines together it is as much, in 1/n of the time.
        joules: energy at full power.
        price: USD.
    """

    machines: int
    seconds: float
    joules: float
    price: float


def training_estimate(
    costs: Explanation, machine: Hardware, tokens: float, *, checkpointing: Checkpointing = "none"
) -> TrainingEstimate:
    """Training over ``tokens`` tokens: FLOPs over the part of the peak that is reached, power and rent for so long.

    With ``block`` checkpointing the forward pass is computed twice: four thirds of the work.
    """
    work = costs.training_flops_per_token * (4 / 3 if checkpointing == "block" else 1)
    seconds = tokens * work / (machine.flops * machine.utilisation)
    machines = math.ceil(costs.training_bytes / machine.memory)
    return TrainingEstimate(machines, seconds, seconds * machine.watts, seconds / 3600 * machine.price)


@dataclass(frozen=True)
class DecodeEstimate:
    """What decoding reaches at most.

    Args:
        machines: how many it needs for its memory alone, shared out evenly.
        step_bytes: read from memory for one token of every sequence.
        bound: what the limit is: memory or compute.
        tokens_per_second: of all sequences together, on that many machines.
        price: USD per million tokens.
    """

    machines: int
    step_bytes: int
    bound: str
    tokens_per_second: float
    price: float


def decode_estimate(
    config: ModelConfig, costs: Explanation, machine: Hardware, batch: int, context: int,
    weight_type: WeightType = "bfloat16", *, cache_dtype_bytes: int = 2,
) -> DecodeEstimate:  # fmt: skip
    """The roofline of decoding (Williams et al. 2009): bytes at full bandwidth, or FLOPs at peak, what takes longer."""
    memory = serving_memory(config, batch, context, weight_type, cache_dtype_bytes=cache_dtype_bytes)
    machines = math.ceil(memory.total / machine.memory)
    read = step_bytes(config, batch, context, weight_type, cache_dtype_bytes=cache_dtype_bytes)
    flops = batch * decode_flops(config, costs.matmul_parameters, context)
    reading, computing = read / machine.bandwidth, flops / machine.flops
    speed = machines * batch / max(reading, computing)
    bound = "memory" if reading >= computing else "compute"
    return DecodeEstimate(machines, read, bound, speed, 1e6 / speed / 3600 * machines * machine.price)


def decode_flops(config: ModelConfig, matmul_parameters: int, context: int) -> int:
    """FLOPs of one decoded token; latent attention then multiplies with the latents themselves (absorbed)."""
    latent, widths = config.latent, config.head_width + config.value_width
    if latent.kv_rank:
        widths = 2 * latent.kv_rank + latent.rope_dim
    seen = sum(keys_seen(config, layer, context) for layer in range(config.n_layer))
    return 2 * matmul_parameters + 2 * seen * config.n_head * widths


def experts_met(config: ModelConfig, batch: int) -> float:
    """Of one layer's experts, how many ``batch`` tokens reach on average when all are chosen alike."""
    count, active = config.experts.count, config.experts.active
    return count * (1 - (1 - active / count) ** batch)


def step_bytes(
    config: ModelConfig, batch: int, context: int, weight_type: WeightType = "bfloat16", *, cache_dtype_bytes: int = 2
) -> int:
    """Bytes that decoding one token of each sequence reads: weights, and the keys and values that are seen.

    Not read are tables that are looked up (a token embedding that is not the head, too), experts that no token reaches,
    and modules for further tokens.
    """
    plain = 4 if weight_type == "float32" else 2
    E, last = config.n_embd, config.n_layer - 1
    unread = 0 if config.tie_embeddings else plain * config.vocab_size * E
    unread += plain * config.context_length * E if config.positions == "learned" else 0
    further = [Matrix("further tokens", "join", E, 2 * E), *block_matrices(config, last)]
    vectors = count_parameters(config)["further tokens"] - config.n_predict * sum(matrix.size for matrix in further)
    unread += config.n_predict * sum(matrix.copies * matrix_bytes(matrix, weight_type) for matrix in further)
    unread += plain * vectors
    if config.experts.count:
        layer = config.expert_layers.index(True)
        experts = [matrix for matrix in block_matrices(config, layer) if matrix.part == "experts"]
        vectors = expert_size(config) - sum(matrix.rows * matrix.columns for matrix in experts)
        expert = sum(matrix_bytes(matrix, weight_type) for matrix in experts) + plain * vectors
        idle = config.experts.count - experts_met(config, batch)
        unread += round(sum(config.expert_layers) * idle * expert)
    kept = sum(keys_seen(config, layer, context) for layer in range(config.n_layer))
    cache = batch * kept * sum(cache_widths(config)) * cache_dtype_bytes
    return weight_bytes(config, weight_type) - unread + cache
