"""What a run derives when it is not told: each value with the formula it comes from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from groundup.model import ModelConfig, explain
from groundup.optim.config import OptimizerName
from groundup.runtime import UsageError
from groundup.runtime.console import quantity

TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022, table 3: compute-optimal tokens per parameter
MAX_EPOCHS = 16.0  # Muennighoff et al. 2023, figure 3: repeats stop paying at about this many passes over the same text
EFFICIENCY = 0.2  # of the measured matrix-product speed, in a training step of a small model; only sizes the plan
HEAD_DIM = 64  # as in Llama and GPT-2
MAX_DEPTH = 48
LARGEST_VOCABULARY = 32_768
DERIVED = frozenset(  # keys that nobody need give: derive() fills them, the last two the model config itself
    ["tokenizer.vocab_size", "batch_tokens", "micro_batch", "max_steps"]
    + [f"model.{name}" for name in ("vocab_size", "context_length", "n_layer", "n_embd", "n_head", "dropout")]
    + ["optim.optimizer", "optim.learning_rate", "optim.warmup_steps"]
    + ["model.n_kv_head", "model.n_ff"]
)


@dataclass(frozen=True)
class Budget:
    """What a run may spend: seconds, or floating-point operations, or neither."""

    seconds: float | None = None
    flops: float | None = None


@dataclass(frozen=True)
class Derived:
    """A value that nobody gave.

    Args:
        key: its recipe key.
        value: what it came to.
        why: the formula and its source, in a few words.
    """

    key: str
    value: Any
    why: str


def parse_budget(text: str) -> Budget:
    """Read ``90s``, ``5m``, ``2h`` or ``2e15flops``.

    Raises:
        UsageError: it is none of these, or not above zero.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][-+]?\d+)?)\s*(s|m|min|h|flops?)\s*", text)
    try:
        amount = float(match.group(1)) if match else 0.0
    except ValueError:
        amount = 0.0
    if match is None or not amount > 0.0 or math.isinf(amount):
        raise UsageError(f"budget = {text} is not a budget. Give time (90s, 5m, 2h) or compute (2e15flops).")
    unit = match.group(2)
    if unit.startswith("flop"):
        return Budget(flops=amount)
    return Budget(seconds=amount * {"s": 1, "m": 60, "min": 60, "h": 3600}[unit])


def run_budget(values: Mapping[str, Any]) -> Budget:
    """The budget of a recipe: ``minutes`` or ``budget``.

    Raises:
        UsageError: it is not above zero, or cannot be read.
    """
    if values.get("minutes") is not None:
        minutes = float(values["minutes"])
        if not minutes > 0 or math.isinf(minutes):
            raise UsageError(f"minutes = {values['minutes']} must be above 0.")
        return Budget(seconds=60.0 * minutes)
    return Budget() if values.get("budget") is None else parse_budget(str(values["budget"]))


@dataclass(frozen=True)
class Facts:
    """What derivation starts from besides the recipe.

    Args:
        train_tokens: tokens in the training part.
        vocab_size: of the tokenizer.
        flops_per_second: measured speed of matrix products on the device, in the run's precision.
    """

    train_tokens: int
    vocab_size: int
    flops_per_second: float


class Plan:
    """Values given and derived, collected one after the other."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.values: dict[str, Any] = dict(given)
        self.derived: list[Derived] = []

    def fill(self, key: str, value: Any, why: str) -> Any:
        """The given value of ``key``; or ``value``, noted as derived."""
        if self.values.get(key) is None:
            self.values[key] = value
            self.derived.append(Derived(key, value, why))
        return self.values[key]


def derive(given: Mapping[str, Any], facts: Facts, budget: Budget) -> Plan:
    """Fill in the model's shape, the batch, the learning rate and, where it can be known, the number of steps.

    Args:
        given: dotted recipe keys that a person set.
        facts: text, vocabulary and machine.
        budget: time or compute; with neither and no ``max_steps``, the horizon is 20 tokens per parameter.

    Raises:
        UsageError: a given depth is out of range, or the text is shorter than a sequence.
    """
    plan = Plan(given)
    plan.fill("model.vocab_size", facts.vocab_size, "the tokenizer's")
    if plan.values["model.vocab_size"] < facts.vocab_size:
        raise UsageError(
            f"model.vocab_size = {plan.values['model.vocab_size']} is smaller than the tokenizer's {facts.vocab_size}. "
            "Leave it out, or give a larger one."
        )
    context = plan.fill("model.context_length", *_context_length(facts))
    if facts.train_tokens <= context:
        raise UsageError(
            f"model.context_length = {context}, but the training text has only {facts.train_tokens} tokens. "
            f"Give more text or a context_length of at most {max(1, facts.train_tokens // 2)}."
        )
    _shape(plan, facts, budget)
    config = ModelConfig.from_dict(
        {k.removeprefix("model."): v for k, v in plan.values.items() if k.startswith("model.")}
    )
    _horizon_and_batch(plan, facts, budget, config)
    return plan


def without_open_shape(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` for a first check, less a width or heads whose counterpart is still to be derived.

    Held against the counterpart's default, they would be a contradiction that nobody made.
    """
    pair = ("model.n_embd", "model.n_head")
    is_open = any(values.get(key) is None for key in pair)
    return {key: value for key, value in values.items() if not (is_open and key in (*pair, "model.n_kv_head"))}


def vocabulary_limit(given: Mapping[str, Any], flops_per_second: float, budget: Budget) -> int:
    """Most tokens a vocabulary should have for the model the budget allows: V = 3.8 N^0.83 / n_embd, a power of two.

    The exponent is that of Tao et al. 2024 ("Scaling Laws with Vocabulary"): a vocabulary should grow more slowly than
    the rest of the model. The constant is ours and not fitted: it puts 2,048 tokens at 0.7M parameters, where
    short runs did about as well with half and twice as many (docs/LOG.md).

    Args:
        given: dotted recipe keys; a given depth or width decides over the budget.
        flops_per_second: measured speed of matrix products.
        budget: of the run.
    """
    compute = _compute(flops_per_second, budget)
    depth = given.get("model.n_layer") or given.get("depth")
    if depth is None and compute is None:
        return LARGEST_VOCABULARY
    target = _block_parameters(int(depth)) if depth else math.sqrt((compute or 0.0) / (6 * TOKENS_PER_PARAMETER))
    width = int(given.get("model.n_embd") or 64 * (depth or _nearest_depth(target)))
    size = 3.8 * max(target, 1.0) ** 0.83 / width
    return int(min(LARGEST_VOCABULARY, max(512, 2 ** round(math.log2(size)))))


def _block_parameters(depth: int) -> float:
    """Parameters of the blocks of a model of this depth at a width of 64 x depth."""
    return 12.0 * depth * (64 * depth) ** 2


def _nearest_depth(parameters: float) -> int:
    """The depth whose blocks come nearest to so many parameters."""
    return min(range(1, MAX_DEPTH + 1), key=lambda d: abs(math.log(_block_parameters(d) / max(parameters, 1.0))))


def _context_length(facts: Facts) -> tuple[int, str]:
    for length in (256, 128, 64, 32, 16, 8):
        if facts.train_tokens >= 64 * length:
            return length, "256, or the power of two that 64 sequences of the text can fill"
    return 8, "the text is tiny"


def _compute(flops_per_second: float, budget: Budget) -> float | None:
    """The FLOPs of the budget; time is turned into FLOPs by the measured speed."""
    if budget.flops is not None:
        return budget.flops
    return None if budget.seconds is None else budget.seconds * flops_per_second * EFFICIENCY


def _shape(plan: Plan, facts: Facts, budget: Budget) -> None:
    """Depth by the compute-optimal size, width and heads by depth."""
    given = plan.values
    if given.get("model.n_layer") is not None:
        depth, why = int(given["model.n_layer"]), ""
    elif given.get("depth") is not None:
        depth, why = int(given["depth"]), "depth"
    else:
        depth, why = _depth(facts, budget)
    if not 1 <= depth <= MAX_DEPTH:
        raise UsageError(f"depth = {depth} must lie between 1 and {MAX_DEPTH}.")
    plan.fill("model.n_layer", depth, why)
    heads_given = given.get("model.n_head")
    width = plan.fill("model.n_embd", _width(depth, heads_given), "64 x depth (nanochat's aspect ratio)")
    if heads_given is None:
        heads = _heads(width, given.get("model.n_kv_head"))
        plan.fill("model.n_head", heads, f"heads of about {HEAD_DIM} dimensions, as in Llama and GPT-2")


def _heads(width: int, kv_heads: int | None) -> int:
    """The number of heads whose size is even (rotary positions turn pairs) and nearest to 64."""
    fitting = [h for h in range(1, width + 1) if width % h == 0 and h % (kv_heads or 1) == 0]
    even = [h for h in fitting if width // h % 2 == 0]
    return min(even or fitting or [1], key=lambda h: abs(math.log(width / h / HEAD_DIM)))


def _width(depth: int, heads: int | None) -> int:
    width = 64 * depth
    return width if not heads else -(-width // (2 * heads)) * 2 * heads


def _depth(facts: Facts, budget: Budget) -> tuple[int, str]:
    compute = _compute(facts.flops_per_second, budget)
    if compute is None:
        return 4, "no budget was given"
    by_compute = math.sqrt(compute / (6 * TOKENS_PER_PARAMETER))
    by_text = facts.train_tokens * MAX_EPOCHS / TOKENS_PER_PARAMETER
    target = min(by_compute, by_text)
    reason = "N = sqrt(C/120), compute-optimal (Hoffmann et al. 2022)"
    if by_text < by_compute:
        reason = f"N = D/20 at {MAX_EPOCHS:.0f} passes over the text (Hoffmann et al. 2022, Muennighoff et al. 2023)"
    return _nearest_depth(target), f"{reason}: N = {quantity(target)}"


def _horizon_and_batch(plan: Plan, facts: Facts, budget: Budget, config: ModelConfig) -> None:
    costs = explain(config)
    parameters = max(1, costs.total_parameters - costs.parameters["token embedding"] - costs.parameters["output head"])
    given = plan.values
    steps, given_batch = given.get("max_steps"), given.get("batch_tokens")
    compute = _compute(facts.flops_per_second, budget)
    if compute is not None:
        tokens, source = compute / costs.training_flops_per_token, "the budget"
    elif steps is not None:
        tokens, source = float(steps * (given_batch or 4096)), "max_steps"
    else:
        tokens, source = (
            float(TOKENS_PER_PARAMETER * costs.total_parameters),
            "20 tokens per parameter (Hoffmann et al. 2022)",
        )
    batch = plan.fill(
        "batch_tokens",
        _batch(tokens, config.context_length, given.get("micro_batch")),
        "0.58 D^0.571 (Li et al. 2025, Step Law), a power of two",
    )
    plan.fill("optim.optimizer", *optimizer_for(config, batch))
    rate = 1.79 * parameters**-0.713 * tokens**0.307
    plan.fill(
        "optim.learning_rate",
        float(f"{min(rate, 0.02):.3g}"),
        "1.79 N^-0.713 D^0.307 (Li et al. 2025, Step Law), at most 0.02",
    )
    if budget.seconds is None:
        plan.fill("max_steps", max(1, round(tokens / batch)), f"{source} / batch_tokens")
    expected = plan.values.get("max_steps") or max(1, round(tokens / batch))
    plan.fill("optim.warmup_steps", max(1, min(100, expected // 20)), "5% of the expected steps, at most 100")
    epochs = tokens / facts.train_tokens
    dropout = 0.0 if epochs <= 4 else 0.1
    plan.fill(
        "model.dropout",
        dropout,
        f"0.1 past 4 passes over the text (ours, after Muennighoff et al. 2023); about {epochs:.1f} are expected",
    )
    plan.fill("micro_batch", _micro_batch(batch, config), "what divides the batch, up to 16,384 tokens at once")


def optimizer_for(config: ModelConfig, batch_tokens: int) -> tuple[OptimizerName, str]:
    """Muon, unless its own matrix products take longer than all others of a step; and why.

    Five steps of Newton and Schulz take about 30 E^3 operations for a matrix of width E, training takes 6 E^2 for each
    token that meets it (of experts, only some do). At the batches that are derived here it is a few percent.
    """
    costs = explain(config)
    share = 5 * config.n_embd / batch_tokens * costs.total_parameters / costs.active_parameters
    beside = f"Muon's own products take some {share:.0%} of the others' time"
    if share > 1:
        return "adamw", f"{beside} at so few tokens a step"
    return "muon", f"fewer steps than AdamW (Liu et al. 2025); {beside}"


def _batch(tokens: float, context: int, micro_batch: int | None) -> int:
    """Tokens per step: a power of two of sequences, or the nearest multiple of a given micro-batch."""
    wanted = 0.58 * max(tokens, 1.0) ** 0.571 / context
    if micro_batch:
        return max(1, round(wanted / micro_batch)) * micro_batch * context
    return max(1, 2 ** round(math.log2(max(1.0, wanted)))) * context


def _micro_batch(batch_tokens: int, config: ModelConfig) -> int:
    sequences = max(1, batch_tokens // config.context_length)
    most = max(1, 16_384 // config.context_length)
    return next(n for n in range(min(sequences, most), 0, -1) if sequences % n == 0)
