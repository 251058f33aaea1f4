"""A model as a folder: load it tensor by tensor, save it in shards. Peak memory is the model's and one tensor's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer
from groundup.model.weights.config_json import config_to_json, family_of, read_config
from groundup.model.weights.families import FAMILIES, Family
from groundup.model.weights.links import Link, same
from groundup.model.weights.quantized_folder import Quantization
from groundup.model.weights.stored import Stored, stored_tensors
from groundup.model.weights.tensor_file import TensorFile
from groundup.runtime import GroundupError, UsageError, os_errors, read_json, write_json

SHARD_BYTES = 5 * 10**9  # what the hub recommends for one file


def links_of(model: Transformer) -> list[Link]:
    """Every tensor of the folder that this model is saved as, and what it is of the model's."""
    family = family_of(model.config)
    return _own_links(model.config) if family is None else family.links(model.config)


def _own_links(config: ModelConfig, quantization: Quantization | None = None) -> list[Link]:
    with torch.device("meta"):  # the names that such a model should have, whatever one has become
        model = Transformer(config)
    if quantization is not None:
        quantization.apply(model)
    names = model.state_dict()
    return [same(name, name) for name in names if not (config.tie_embeddings and name == "head.weight")]


# ---- saving


def save_model(
    model: Transformer, folder: Path, *, bos_id: int | None = None, eos_id: int | None = None,
    end_ids: Sequence[int] = (), shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Write ``config.json``, ``generation_config.json`` and the weights into an existing folder.

    The caller makes the folder whole or not at all (:func:`groundup.runtime.atomic_folder`). Quantized layers are
    saved as they are, in a folder that only we read (quantized_folder.py).

    Args:
        end_ids: every token that ends a text, where there are several.
        shard_bytes: weights beyond this go to several files, with an index.

    Raises:
        UsageError: the model has adapters, or layers that are quantized in different ways.
        GroundupError: it cannot be written.
    """
    tensors, quantization = dict(model.state_dict()), Quantization.of(model)
    links = links_of(model) if quantization is None else _own_links(model.config, quantization)
    if missing := next((place.name for link in links for place in link.ours if place.name not in tensors), None):
        raise UsageError(
            f"{missing} is behind an adapter or quantized: only plain weights are saved as a model. Merge and remove "
            "adapters, or save them by themselves (groundup.model.save_adapter)."
        )
    shards = list(_shards(links, tensors, shard_bytes))
    where: dict[str, str] = {}
    with os_errors(folder, "cannot write"):
        for number, links in enumerate(shards, start=1):
            one = len(shards) == 1
            name = "model.safetensors" if one else f"model-{number:05}-of-{len(shards):05}.safetensors"
            content = {link.theirs: _outgoing(link, tensors) for link in links}
            try:
                save_file(content, folder / name, metadata={"format": "pt"})
            except SafetensorError as error:  # safetensors wraps the operating system's error in its own
                raise _as_os_error(error, folder / name) from error
            where |= dict.fromkeys(content, name)
        if len(shards) > 1:
            total = sum(_nbytes(link, tensors) for links in shards for link in links)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            write_json(folder / "model.safetensors.index.json", index)
        dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
        config = config_to_json(model.config, dtype=dtype, bos_id=bos_id, eos_id=eos_id, own=quantization is not None)
        if quantization is not None:
            config["quantization_config"] = quantization.to_json()
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", generation_config(bos_id, eos_id, end_ids))


def generation_config(bos_id: int | None, eos_id: int | None, end_ids: Sequence[int] = ()) -> dict[str, Any]:
    """The content of ``generation_config.json``: where texts begin, and after which tokens they end."""
    several = list(dict.fromkeys([*([] if eos_id is None else [eos_id]), *end_ids]))
    return {"bos_token_id": bos_id, "eos_token_id": several if len(several) > 1 else next(iter(several), None)}


def _outgoing(link: Link, tensors: dict[str, Tensor]) -> Tensor:
    parts = [place.of(tensors).detach().to("cpu") for place in link.ours]
    return link.join(parts).contiguous()


def _nbytes(link: Link, tensors: dict[str, Tensor]) -> int:
    return sum(place.of(tensors).nbytes for place in link.ours)


def _shards(links: list[Link], tensors: dict[str, Tensor], most: int) -> Iterator[list[Link]]:
    """Links in groups of at most ``most`` bytes, in order; a larger tensor has a group to itself."""
    group: list[Link] = []
    size = 0
    for link in links:
        nbytes = _nbytes(link, tensors)
        if group and size + nbytes > most:
            yield group
            group, size = [], 0
        group.append(link)
        size += nbytes
    yield group


def _as_os_error(error: SafetensorError, path: Path) -> Exception:
    code = re.search(r"os error (\d+)", str(error))
    if code is None:
        return GroundupError(f"cannot write {path}: {error}")
    return OSError(int(code.group(1)), str(error), str(path))


# ---- loading


def load_model(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> Transformer:
    """Build the model of a Hugging Face folder and fill in its weights, one tensor after the other.

    Args:
        dtype: what the weights become; None for what they are in the files.

    Raises:
        GroundupError: the config is unknown, a weight file is damaged, or a tensor is missing, unexpected or of another
            shape.
    """
    config = read_config(folder)
    values = read_json(folder / "config.json", "model config")
    quantization = Quantization.from_json(values.get("quantization_config"), folder / "config.json")
    stored = stored_tensors(map(TensorFile, _weight_files(folder)), values.get("quantization_config"))
    family = FAMILIES.get(values.get("model_type"))
    try:
        model = empty_model(config, device, dtype or _stored_dtype(stored), quantization)
        found = _own_links(config, quantization) if family is None else family.links(config)
    except UsageError as error:  # nobody asked for these layers: the file is wrong, not the command
        raise GroundupError(f"{folder / 'config.json'}: {error}") from error
    links = {link.theirs: link for link in found}
    tensors = dict(model.state_dict())
    waiting = dict.fromkeys(links)
    for name, tensor in stored.items():
        linked = _link_name(name, links, family, config, tensor.path)
        if linked is not None:
            waiting.pop(linked, None)
            fill_tensor(links[linked], tensor, tensors)
    if waiting:
        raise GroundupError(f"{folder}: the tensor {next(iter(waiting))} is missing from the weights.")
    return model


def empty_model(
    config: ModelConfig, device: torch.device | str, dtype: torch.dtype, quantization: Quantization | None = None
) -> Transformer:
    """A model whose memory is there and whose weights are not: nothing is computed that would be overwritten.

    Quantized layers have no other memory than that of their codes and scales, at no time.
    """
    with torch.device("meta"):
        model = Transformer(config)
    if quantization is not None:
        quantization.apply(model, dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name == "slopes_H":  # a constant; what checkpoints hold is filled in later
                from groundup.model.positions import alibi_slopes

                module.register_buffer(name, alibi_slopes(config.n_head).to(device), persistent=False)
            else:
                kept = module._non_persistent_buffers_set
                zeros = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
                module.register_buffer(name, zeros, persistent=name not in kept)
        for name, parameter in module.named_parameters(recurse=False):
            memory = torch.empty(parameter.shape, dtype=dtype, device=device)
            module.register_parameter(name, torch.nn.Parameter(memory))
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model


def fill_tensor(link: Link, stored: Stored, tensors: dict[str, Tensor]) -> None:
    """Put one tensor of a file where it belongs.

    Args:
        tensors: the model's state, by name.

    Raises:
        GroundupError: it has another shape than the config asks for, or codes are of another type.
    """
    places = [place.of(tensors) for place in link.ours]
    asked = tuple(link.join([torch.empty(place.shape, device="meta") for place in places]).shape)
    if stored.shape != asked:
        raise GroundupError(
            f"{stored.path}: {link.theirs} has shape {list(stored.shape)}, the config asks for {list(asked)}."
        )
    if not places[0].is_floating_point() and stored.dtype != places[0].dtype:
        raise GroundupError(f"{stored.path}: {link.theirs} is {stored.dtype}, should be {places[0].dtype}.")
    with torch.no_grad():
        if link.plain:
            stored.read_into(places[0])
            return
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        stored.read_into(whole)
        for part, place in zip(link.split(whole, places), places, strict=True):
            place.copy_(part)


def _link_name(name: str, links: dict[str, Link], family: Family | None, config: ModelConfig, path: Path) -> str | None:
    """The name by which a tensor is linked; None for one that may be passed over.

    Raises:
        GroundupError: it has no place in this model.
    """
    if name in links:
        return name
    if family is not None:
        if family.prefix + name in links:  # saved without its head
            return family.prefix + name
        if any(re.fullmatch(pattern, name) for pattern in family.ignored):
            return None
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if family.further_layers and layer and int(layer.group(1)) >= config.n_layer:
            return None
    if name in ("lm_head.weight", "head.weight") and config.tie_embeddings:
        return None  # a tied head that was saved all the same
    raise GroundupError(f"{path}: the tensor {name} has no place in this model.")


def _stored_dtype(stored: dict[str, Stored]) -> torch.dtype:
    """The floating-point type of the first matrix that is not of scales."""
    kinds = (t.dtype for name, t in stored.items() if len(t.shape) > 1 and not name.endswith(".scale"))
    return next((kind for kind in kinds if kind.is_floating_point), torch.float32)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = {str(name) for name in read_json(index, "weight index")["weight_map"].values()}
        except (KeyError, TypeError, AttributeError) as error:
            raise GroundupError(f"{index}: this weight index is damaged: it has no weight_map.") from error
        outside = sorted(name for name in names if Path(name).name != name)
        if outside:
            raise GroundupError(f"{index}: this weight index points outside of its folder ({outside[0]}).")
        return [folder / name for name in sorted(names)]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    pickles = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(kind))
    if pickles:
        raise GroundupError(
            f"{folder}: only pickled weights are here ({pickles[0]}), which can run code when opened: never read. "
            "Convert them to model.safetensors with the tool that wrote them."
        )
    raise GroundupError(f"{folder}: no model.safetensors here. Is this a checkpoint, a run or a Hugging Face folder?")
