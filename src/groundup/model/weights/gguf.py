"""GGUF files, llama.cpp's format: a model and its tokenizer in one file, written and read tensor by tensor.

Written: Llama and Mistral (both as ``llama``), Qwen 2, Qwen 3 and GPT-2. Read: the same, with weights in any of the
formats that the library ``gguf`` can turn back into numbers. Sources: ggml's specification of the format, and the names
that llama.cpp gives values and tensors (gguf_config.py).

A matrix is written as blocks of 32 weights along its inputs: Q8_0 is 32 int8 and a float16 scale, Q4_0 is 32 codes of 4
bits and a float16 scale. Norms, biases and position embeddings stay in float32.

The architecture ``llama`` rotates neighbouring pairs of dimensions, where we (and the others) rotate halves of a head:
the rows of its queries and keys are in another order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer
from groundup.model.weights.folder import empty_model, fill_tensor
from groundup.model.weights.gguf_config import (
    FREQUENCIES,
    architecture_of,
    config_of,
    frequency_divisors,
    links_of,
    model_fields,
    told,
)
from groundup.model.weights.gguf_tensors import KINDS, Kind, StoredGguf, encoded, format_of, gguf_library
from groundup.model.weights.links import Link
from groundup.runtime import GroundupError, UsageError
from groundup.runtime.errors import nearest
from groundup.runtime.files import atomic_file
from groundup.runtime.gguf_file import GgufFile, read_gguf

FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7}


class SaysGguf(Protocol):
    """A tokenizer, as far as a file needs it."""

    def gguf_fields(self, vocab_size: int | None = None) -> dict[str, Any]:
        """Its values by name."""


def save_gguf(model: Transformer, tokenizer: SaysGguf, path: Path, kind: Kind = "f32") -> None:
    """Write a model and its tokenizer as one file, whole or not at all. Memory is the model's and one tensor's.

    Args:
        kind: how matrices are written: f32; f16; q8_0 (8.5 bits per weight); q4_0 (4.5, the embedding and the head in
            q8_0). A matrix whose rows are no whole blocks of 32 is written as f16 instead of the last two.

    Raises:
        UsageError: llama.cpp has no such architecture, or no such tokenizer; the model has adapters or quantized
            layers; or a weight is not finite.
        GroundupError: the file cannot be written, or the library gguf is not installed.
    """
    if kind not in KINDS:
        raise UsageError(f"GGUF files of kind {kind!r} are not written: {', '.join(KINDS)} are.{nearest(kind, KINDS)}")
    library = gguf_library()
    architecture, values = architecture_of(model.config)
    fields = model_fields(architecture, values, model.config) | tokenizer.gguf_fields(model.config.vocab_size)
    tensors = dict(model.state_dict())
    links = links_of(architecture, model.config)
    if missing := next((place.name for link in links for place in link.ours if place.name not in tensors), None):
        raise UsageError(f"{missing} is behind an adapter or quantized: only plain weights are written to GGUF files.")
    with atomic_file(path) as temporary:
        writer = library.GGUFWriter(temporary, architecture)
        try:
            _add_fields(writer, fields | {"general.file_type": FILE_TYPES[kind]})
            writer.add_quantization_version(library.GGML_QUANT_VERSION)
            _write(writer, links, tensors, kind, frequency_divisors(architecture, model.config))
        finally:
            writer.close()


def _write(writer: Any, links: list[Link], tensors: dict[str, Tensor], kind: Kind, divisors: np.ndarray | None) -> None:
    """Write the head of a file, which says of all tensors where they lie, then one tensor after the other."""
    library = gguf_library()
    shapes = {link.theirs: tuple(_join(link, tensors, "meta").shape) for link in links}
    formats = {name: format_of(library, name, shape, kind) for name, shape in shapes.items()}
    if divisors is not None:
        writer.add_tensor_info(FREQUENCIES, divisors.shape, divisors.dtype, divisors.nbytes)
    for name, shape in shapes.items():
        block, nbytes = library.GGML_QUANT_SIZES[formats[name]]
        count = math.prod(shape) // block * nbytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), count, formats[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if divisors is not None:
        writer.write_tensor_data(divisors)
    for link in links:
        writer.write_tensor_data(encoded(library, link.theirs, _join(link, tensors, "cpu"), formats[link.theirs]))


def _add_fields(writer: Any, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_string(name, value)


def _join(link: Link, tensors: dict[str, Tensor], device: str) -> Tensor:
    return link.join([place.of(tensors).detach().to(device) for place in link.ours])


def read_gguf_config(path: Path) -> ModelConfig:
    """The model config of a file (no weights are read).

    Raises:
        GroundupError: it cannot be read, is damaged, or describes a model that we do not have.
    """
    return config_of(read_gguf(path))


def load_gguf(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> Transformer:  # fmt: skip
    """Build the model of a file and fill in its weights. Peak memory is the model's and one tensor's.

    Args:
        dtype: what the weights become, whatever they are in the file; None for float32.

    Raises:
        GroundupError: it cannot be read, is damaged, describes a model that we do not have, or a tensor is missing,
            unexpected or of another shape.
    """
    file = read_gguf(path)
    config = config_of(file)
    links = {link.theirs: link for link in links_of(told(file, "general.architecture", str), config)}
    stored = {name: StoredGguf(file.path, name, tensor) for name, tensor in file.tensors.items() if name != FREQUENCIES}
    _check_tensors(file, links, stored, config)
    model = empty_model(config, device, dtype or torch.float32)
    tensors = dict(model.state_dict())
    for name, link in links.items():
        fill_tensor(link, stored[name], tensors)
    return model


def _check_tensors(
    file: GgufFile, links: Mapping[str, Link], stored: Mapping[str, StoredGguf], config: ModelConfig
) -> None:
    """See that all tensors are there, and of the right shapes, before memory is asked for."""
    with torch.device("meta"):
        places = dict(Transformer(config).state_dict())
    for name, link in links.items():
        if name not in stored:
            raise GroundupError(f"{file.path}: the tensor {name} is missing.")
        tensor, asked = stored[name], tuple(_join(link, places, "meta").shape)
        if tensor.shape != asked:
            raise GroundupError(f"{file.path}: {name} has shape {list(tensor.shape)}, its head asks for {list(asked)}.")
        _, block, nbytes = tensor.sizes()
        if tensor.found.offset + tensor.found.size // block * nbytes > file.size:
            raise GroundupError(f"{file.path}: cut short: {name} ends past its {file.size:,} bytes. Copy it again.")
    if unknown := next((name for name in stored if name not in links), None):
        raise GroundupError(f"{file.path}: the tensor {unknown} has no place in this model.")
