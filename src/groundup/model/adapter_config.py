"""``adapter_config.json``: what PEFT writes of adapters, and of the model that they are for."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from groundup.model.adapters import LoraConfig
from groundup.runtime import GroundupError, UsageError, read_json
from groundup.runtime.hub import parse_hub_spec

CONFIG = "adapter_config.json"
BASE, REVISION = "base_model_name_or_path", "revision"

# Fields of PEFT's config that change nothing of what an adapter computes, or that we act upon. Any other one that is
# set means something that we do not have.
_KNOWN = {
    "auto_mapping", BASE, "inference_mode", "init_lora_weights", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", REVISION, "task_type", "exclude_modules", "layers_pattern",
    "layers_to_transform", "target_modules", "fan_in_fan_out", "r", "lora_alpha", "rank_pattern", "alpha_pattern",
    "lora_dropout", "use_rslora", "use_dora", "runtime_config", "eva_config", "trainable_token_indices",
    "modules_to_save", "ensure_weight_tying", "modules_to_tie",
}  # fmt: skip
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that leave other weights below


# ---- out


def config_of(usual: LoraConfig, configs: dict[str, LoraConfig], known: set[str]) -> dict[str, Any]:
    """PEFT's config: of most layers, and of each of theirs that differs, by their names; ``known`` are all names."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": usual.rank,
        "lora_alpha": _plainly(usual.alpha),
        "lora_dropout": usual.dropout,
        "use_rslora": usual.rslora,
        "use_dora": usual.dora,
        "bias": "none",
        "target_modules": _targets(set(configs), known),
        "rank_pattern": {re.escape(key): one.rank for key, one in configs.items() if one.rank != usual.rank},
        "alpha_pattern": {
            re.escape(key): _plainly(one.alpha) for key, one in configs.items() if one.alpha != usual.alpha
        },
    }


def base_fields(base_model: str | None) -> dict[str, Any]:
    """What the config says of the model below: a path as it is, ``hf:owner/name@revision`` in two fields, as PEFT does.

    Raises:
        UsageError: it begins with ``hf:`` and is no name on the hub.
    """
    if base_model is None or not base_model.startswith("hf:"):
        return {BASE: base_model}
    spec = parse_hub_spec(base_model, "a model")
    return {BASE: spec.repo} | ({} if spec.revision is None else {REVISION: spec.revision})


def _targets(used: set[str], known: set[str]) -> list[str]:
    """``target_modules``: last names where they mean exactly these layers, as people write them, else whole names."""
    last = {name.rpartition(".")[2] for name in used}
    exact = {name for name in known if name.rpartition(".")[2] in last} == used
    return sorted(last) if exact else sorted(used)


def _plainly(number: float) -> float | int:
    """Whole numbers without a point, as PEFT writes them."""
    return int(number) if float(number).is_integer() else number


# ---- in


def read_adapter_config(path: Path) -> dict[str, Any]:
    """PEFT's config, with the fields that we need filled in and everything that we lack refused.

    Raises:
        GroundupError: it cannot be read, is damaged, or says what we do not have.
    """
    values = read_json(path, "adapter config")
    if not isinstance(values, dict):
        raise GroundupError(f"{path}: this adapter config is damaged: it holds no named fields.")
    if values.get("peft_type") != "LORA":
        raise GroundupError(f"{path}: peft_type {values.get('peft_type')!r} is not LORA, the one that groundup reads.")
    found = {"r": 8, "lora_alpha": 8, "target_modules": (), "rank_pattern": {}, "alpha_pattern": {}, **values}
    for name in ("rank_pattern", "alpha_pattern", "target_modules"):
        found[name] = found[name] or type(found[name])()
    for name in (BASE, REVISION):
        if not isinstance(found.get(name), (str, type(None))):
            raise GroundupError(f"{path}: this adapter config is damaged: {name} is {found[name]!r}, not a name.")
    partial = any(values.get(name) for name in ("layers_to_transform", "exclude_modules"))
    if partial or not isinstance(found["target_modules"], (list, tuple)):
        found["target_modules"] = ()  # what they narrow down to is not worked out; what the file holds is what counts
    for name, value in values.items():
        if name not in _KNOWN and value and (name, value) != ("bias", "none"):
            raise GroundupError(f"{path}: this adapter uses {name} = {value!r}, which groundup does not have.")
    start = found.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        raise GroundupError(
            f"{path}: init_lora_weights = {start!r} changed the weights below the adapter. "
            "Convert it to plain LoRA with PEFT (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    layer_config(found, "", path)
    return found


def layer_config(values: dict[str, Any], theirs: str, path: Path | None = None) -> LoraConfig:
    """What the config says of one layer: its own rank and alpha, where a pattern has them (PEFT's rule).

    Raises:
        GroundupError: a value makes no sense.
    """

    def of(patterns: dict[str, Any], usual: Any) -> Any:
        fitting = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", theirs))
        return next(fitting, usual)

    try:
        return LoraConfig(
            rank=int(of(values["rank_pattern"], values["r"])),
            alpha=float(of(values["alpha_pattern"], values["lora_alpha"])),
            dropout=float(values.get("lora_dropout") or 0.0),
            rslora=bool(values.get("use_rslora")),
            dora=bool(values.get("use_dora")),
        )
    except (TypeError, ValueError, AttributeError, re.error, UsageError) as error:
        raise GroundupError(f"{path or CONFIG}: this adapter config is damaged: {error}") from error


# ---- which model


def called(name: str) -> str:
    """What a model is called, wherever it lies: the last part of its path or name; of a checkpoint, its run's."""
    if name.startswith("hf:"):
        return name.partition("@")[0].rpartition("/")[2]
    path = Path(os.path.abspath(name))
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.name


def wrong_base(folder: Path, base: str, model: str) -> GroundupError:
    """The error of an adapter that is for a model of another name."""
    return GroundupError(
        f"{folder / CONFIG}: this adapter is for {base}, the model is {model}. "
        f"If that is the same model, write its name there, as {BASE}."
    )
