"""What a model config leaves open is filled in here, and what contradicts itself is refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from groundup.model.config import GATED, Experts, LatentAttention, ModelConfig, RopeScaling, choices
from groundup.runtime import UsageError
from groundup.runtime.errors import nearest


def resolved(config: ModelConfig) -> dict[str, Any]:
    """The fields that follow from others where they are null."""
    found: dict[str, Any] = {}
    if config.n_kv_head is None:
        found["n_kv_head"] = config.n_head
    if config.latent.kv_rank:
        found["head_dim"] = config.latent.nope_dim + config.latent.rope_dim
    elif config.head_dim is None and config.n_head > 0:
        found["head_dim"] = config.n_embd // config.n_head
    if config.n_ff is None:
        gated = -(-8 * config.n_embd // (3 * 32)) * 32
        found["n_ff"] = gated if config.feed_forward in GATED else 4 * config.n_embd
    for name in ("qkv_bias", "out_bias", "ff_bias"):
        if getattr(config, name) is None:
            found[name] = config.bias
    if config.experts.count and config.experts.width is None:
        found["experts"] = replace(config.experts, width=found.get("n_ff", config.n_ff))
    scaling = config.rope_scaling
    if scaling.kind != "none" and scaling.original_length is None and scaling.factor > 0:
        found["rope_scaling"] = replace(scaling, original_length=max(1, round(config.context_length / scaling.factor)))
    return found


def check(config: ModelConfig) -> None:
    """See that the parts of a config fit each other.

    Raises:
        UsageError: they do not; it names the field and what would fit.
    """
    for name in ("vocab_size", "context_length", "n_layer", "n_head", "n_embd"):
        _at_least(config, name, 1)
    for section, part in (("", config), ("rope_scaling.", config.rope_scaling), ("experts.", config.experts)):
        _check_words(section, part)
    _check_heads(config)
    _at_least(config, "n_ff", 1)
    _at_least(config, "n_predict", 0)
    if not 0.0 <= config.dropout < 1.0:
        raise UsageError(f"model.dropout = {config.dropout} must be at least 0 and below 1.")
    for name in ("norm_eps", "rope_theta", "rope_local_theta", "attention_softcap", "logit_softcap", "init_std"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UsageError(f"model.{name} = {value} must be above 0.")
    if config.parallel_blocks and config.norm_placement != "pre":
        raise UsageError("model.parallel_blocks needs model.norm_placement = pre.")
    if config.n_predict and config.positions in ("learned", "sinusoidal"):
        raise UsageError(f"model.n_predict = {config.n_predict} needs positions inside attention: rope, alibi or none.")
    _check_pattern(config)
    _check_latent(config)
    _check_rope(config)
    _check_experts(config)


def _at_least(config: Any, name: str, least: int, section: str = "") -> None:
    if getattr(config, name) < least:
        raise UsageError(f"model.{section}{name} = {getattr(config, name)} must be at least {least}.")


def _check_words(section: str, part: ModelConfig | RopeScaling | Experts | LatentAttention) -> None:
    for name, known in choices(type(part)).items():
        value = getattr(part, name)
        if value not in known:
            near = nearest(str(value), known)
            raise UsageError(f"model.{section}{name} = {value} is not one of {', '.join(known)}.{near}")


def _check_heads(config: ModelConfig) -> None:
    if config.n_embd % config.n_head and config.head_dim == config.n_embd // config.n_head:
        widest = max(1, config.n_embd // 8)  # heads narrower than 8 dimensions are not worth naming
        fitting = [n for n in range(1, widest + 1) if config.n_embd % n == 0]
        if config.positions == "rope":  # which needs an even head size besides
            fitting = [n for n in fitting if config.n_embd // n % 2 == 0] or fitting
        raise UsageError(
            f"model.n_head = {config.n_head} does not divide model.n_embd = {config.n_embd}. "
            f"Heads that would: {_listed(fitting)}."
        )
    if config.head_width < 1:
        raise UsageError(f"model.head_dim = {config.head_dim} must be at least 1.")
    if config.kv_heads < 1 or config.n_head % config.kv_heads:
        groups = _listed(n for n in range(1, config.n_head + 1) if config.n_head % n == 0)
        raise UsageError(
            f"model.n_kv_head = {config.n_kv_head} does not divide model.n_head = {config.n_head}. "
            f"Numbers that would: {groups}."
        )


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _check_pattern(config: ModelConfig) -> None:
    if not config.layer_pattern or set(config.layer_pattern) - set("FSN"):
        raise UsageError(
            f"model.layer_pattern = {config.layer_pattern!r} is made of the letters F (full attention), S (a sliding "
            "window) and N (full, no rotary positions), such as SSSF."
        )
    if config.sliding_window is None and "S" in config.layer_kinds:
        raise UsageError(f"model.layer_pattern = {config.layer_pattern} has windows: set model.sliding_window.")
    if config.sliding_window is not None:
        _at_least(config, "sliding_window", 1)
        if "S" not in config.layer_kinds:
            raise UsageError(
                f"model.sliding_window = {config.sliding_window}, but no layer of model.layer_pattern = "
                f"{config.layer_pattern} has a window. Write S for those that do."
            )


def _check_latent(config: ModelConfig) -> None:
    latent = config.latent
    for name in ("kv_rank", "q_rank", "rope_dim", "nope_dim", "v_dim"):
        _at_least(latent, name, 0, "latent.")
    if not latent.kv_rank:
        given = [name for name in ("q_rank", "rope_dim", "nope_dim", "v_dim") if getattr(latent, name)]
        if given:
            raise UsageError(f"model.latent.{given[0]} is set, but model.latent.kv_rank is 0: no latent attention.")
        return
    for name in ("nope_dim", "v_dim"):
        _at_least(latent, name, 1, "latent.")
    if config.positions == "rope" and not latent.rope_dim:
        raise UsageError(
            "model.latent.rope_dim = 0: latent attention carries rotary positions in dimensions of its own."
        )
    if config.positions != "rope" and latent.rope_dim:
        raise UsageError(f"model.latent.rope_dim = {latent.rope_dim} needs model.positions = rope.")
    if config.kv_heads != config.n_head:
        raise UsageError("model.n_kv_head must equal model.n_head: latent attention shares one vector among all heads.")
    for name, on in (("qk_norm", config.qk_norm), ("attention_sinks", config.attention_sinks)):
        if on:
            raise UsageError(f"model.{name} = true is not a part of latent attention (model.latent.kv_rank > 0).")
    if config.rope_fraction != 1.0:
        raise UsageError("model.rope_fraction has no meaning for latent attention: set model.latent.rope_dim.")


def _check_rope(config: ModelConfig) -> None:
    scaling = config.rope_scaling
    if config.positions != "rope":
        if scaling.kind != "none":
            raise UsageError(f"model.rope_scaling.kind = {scaling.kind} needs model.positions = rope.")
        return
    if not 0.0 < config.rope_fraction <= 1.0:
        raise UsageError(f"model.rope_fraction = {config.rope_fraction} must be above 0 and at most 1.")
    if config.rotary_dim % 2 or config.rotary_dim < 2:
        from_what = "model.latent.rope_dim" if config.latent.kv_rank else "model.n_embd / model.n_head"
        if config.rope_fraction != 1.0:
            from_what = "model.head_dim x model.rope_fraction"
        elif not config.latent.kv_rank and config.head_width != config.n_embd // config.n_head:
            from_what = "model.head_dim"
        raise UsageError(
            f"{from_what} = {config.rotary_dim} is odd, and rotary positions turn pairs of dimensions. "
            "Choose an even head size or model.positions = learned."
        )
    if scaling.kind == "none":
        return
    if scaling.factor < 1.0:
        raise UsageError(f"model.rope_scaling.factor = {scaling.factor} must be at least 1.")
    if scaling.original_length is not None:
        _at_least(scaling, "original_length", 1, "rope_scaling.")
    if scaling.kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise UsageError("model.rope_scaling.high_freq_factor must be above low_freq_factor.")
    if scaling.kind == "longrope":
        for name in ("short_factor", "long_factor"):
            found = len(getattr(scaling, name))
            if found != config.rotary_dim // 2:
                raise UsageError(
                    f"model.rope_scaling.{name} has {found} numbers, {config.rotary_dim // 2} pairs are rotated."
                )


def _check_experts(config: ModelConfig) -> None:
    experts = config.experts
    _at_least(experts, "count", 0, "experts.")
    if not experts.count:
        if experts.shared:
            raise UsageError("model.experts.shared is set, but model.experts.count is 0: no experts.")
        return
    if not experts.pattern or set(experts.pattern) - set("ED"):
        raise UsageError(
            f"model.experts.pattern = {experts.pattern!r} is made of the letters E (experts) and D (dense), such as DE."
        )
    if not any(config.expert_layers):
        raise UsageError(
            f"model.experts.pattern = {experts.pattern} gives no layer experts. Write E for those that have."
        )
    for name in ("active", "groups", "active_groups"):
        _at_least(experts, name, 1, "experts.")
    _at_least(experts, "shared", 0, "experts.")
    if experts.width is not None:
        _at_least(experts, "width", 1, "experts.")
    if experts.active > experts.count:
        raise UsageError(f"model.experts.active = {experts.active} is more than model.experts.count = {experts.count}.")
    if experts.count % experts.groups or experts.active_groups > experts.groups:
        raise UsageError(
            f"model.experts.groups = {experts.groups} (of which {experts.active_groups} active) does not fit "
            f"model.experts.count = {experts.count}: it must divide it, and be at least active_groups."
        )
    if experts.active > experts.active_groups * (experts.count // experts.groups):
        raise UsageError(
            f"model.experts.active = {experts.active} is more than the active groups hold "
            f"({experts.active_groups} x {experts.count // experts.groups})."
        )
    for name in ("balance_loss", "z_loss", "capacity", "bias_rate"):
        _at_least(experts, name, 0, "experts.")
