"""``config.json``: our config as transformers writes the same model's, and back.

A config is saved as the first family that can say all of it: found by translating it there and back. One that none can
say is saved with ``model_type: groundup``. What only training needs, and transformers has no word for, travels in a
section of its own that other tools pass over.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groundup.model.config import ModelConfig
from groundup.model.weights.families import FAMILIES, Family
from groundup.model.weights.families.common import MissingPartError, shortest
from groundup.runtime import GroundupError, UsageError, read_json
from groundup.runtime.errors import nearest

TRAINING_ONLY = ("initialisation", "experts.bias_rate", "experts.z_loss", "experts.balance_loss", "dropout", "init_std")
SECTION = "groundup"
DEQUANTIZED = ("mxfp4", "fp8")  # what stored.py undoes


def family_of(config: ModelConfig) -> Family | None:
    """The first family that this config is of; None when transformers knows no such architecture."""
    return next(families_of(config), None)


def families_of(config: ModelConfig) -> Iterator[Family]:
    """Every family that can say all of this config."""
    wanted = _essence(config)
    for family in FAMILIES.values():
        try:
            if _essence(ModelConfig.from_dict(family.fields(family.values(config)))) == wanted:
                yield family
        except (KeyError, MissingPartError, UsageError, ZeroDivisionError, TypeError):  # it has no word for some field
            continue


def _essence(config: ModelConfig) -> dict[str, Any]:
    """What a model computes, said in one way: equal for two configs exactly when the models are."""
    found = _flat(config.to_dict())
    for name in TRAINING_ONLY:
        del found[name]
    found["layer_pattern"], found["experts.pattern"] = shortest(config.layer_kinds), config.expert_layers
    found["attention_scale"] = config.score_scale
    if all(config.expert_layers):
        del found["n_ff"]
    if not config.experts.count:
        found = {name: value for name, value in found.items() if not name.startswith("experts.")}
    if config.norm != "layernorm":
        del found["bias"]  # the biases of the linear layers have fields of their own
    if config.positions != "rope":
        found = {name: value for name, value in found.items() if not name.startswith("rope_")}
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def config_to_json(
    config: ModelConfig, *, dtype: str = "float32", bos_id: int | None = None, eos_id: int | None = None,
    own: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The content of ``config.json`` for this config.

    Args:
        dtype: of the weights beside it.
        own: say it in our words in any case, for weights that no other tool reads.
    """
    common: dict[str, Any] = {"dtype": dtype, "bos_token_id": bos_id, "eos_token_id": eos_id}
    common["pad_token_id"] = None  # some families' default lies outside of a smaller vocabulary
    family = None if own else family_of(config)
    if family is None:
        return {"model_type": SECTION} | common | {SECTION: config.to_dict()}
    values = {"architectures": [family.architecture], "model_type": family.model_type} | common
    values |= family.values(config)
    said, all_of_it = _flat(ModelConfig.from_dict(family.fields(values)).to_dict()), _flat(config.to_dict())
    more = {name: all_of_it[name] for name in TRAINING_ONLY if said[name] != all_of_it[name]}
    return values | {SECTION: more} if more else values


def config_from_json(values: dict[str, Any], where: Path) -> ModelConfig:
    """The config that a ``config.json`` describes.

    Raises:
        GroundupError: the model type is unknown, a field is missing or makes no sense, or it uses a part we do not
            have.
    """
    kind = values.get("model_type")
    try:
        if kind == SECTION:
            return ModelConfig.from_dict(values[SECTION])
        if kind not in FAMILIES:
            raise GroundupError(_unknown(values, where))
        how = (values.get("quantization_config") or {}).get("quant_method", "a way of its own")
        if values.get("quantization_config") and how not in DEQUANTIZED:
            raise GroundupError(f"{where}: these weights are quantized ({how}). Load the ones they were made from.")
        more = {name: value for name, value in (values.get(SECTION) or {}).items() if name in TRAINING_ONLY}
        return ModelConfig.from_dict(_with(FAMILIES[kind].fields(values), more))
    except KeyError as error:
        raise GroundupError(f"{where}: the field {error} is missing from this model config.") from error
    except MissingPartError as error:
        raise GroundupError(f"{where}: this {kind} model uses {error}, which groundup does not have.") from error
    except UsageError as error:  # nobody typed it: the file is wrong, not the command
        raise GroundupError(f"{where}: {error}") from error
    except (TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise GroundupError(
            f"{where}: this model config is damaged: a field has an impossible value ({error})."
        ) from error


def _with(found: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    for name, value in more.items():
        section, dot, field = name.rpartition(".")
        if dot:
            found[section] = {**found.get(section, {}), field: value}
        else:
            found[name] = value
    return found


def _unknown(values: dict[str, Any], where: Path) -> str:
    kind = str(values.get("model_type"))
    known = ", ".join([*FAMILIES, SECTION])
    if "model_type" not in values:
        return f"{where}: no model_type in this model config. groundup reads {known}."
    code = " Its own code (auto_map) is never run." if values.get("auto_map") else ""
    return f"{where}: model_type {kind!r} is not one groundup reads.{nearest(kind, FAMILIES)}{code} It reads {known}."


def read_config(folder: Path) -> ModelConfig:
    """The model config of a Hugging Face folder (no weights are read).

    Raises:
        GroundupError: it is missing, damaged, or describes a model we do not have.
    """
    values = read_json(folder / "config.json", "model config")
    if not isinstance(values, dict):
        raise GroundupError(f"{folder / 'config.json'}: this model config is damaged: it holds no named fields.")
    return config_from_json(values, folder / "config.json")
