"""llama2.c's model files (``.bin``): versions 0 and 1 (float32) and 2 (int8 in groups), read tensor by tensor.

Source: ``export.py``, ``run.c`` and ``runq.c`` of karpathy/llama2.c. All numbers are little-endian.

- Version 0: seven int32 (``dim hidden_dim n_layers n_heads n_kv_heads vocab_size seq_len``), then float32 tensors. A
  negative ``vocab_size`` says that the output head is a tensor of its own.
- Versions 1 and 2: the magic number, the version, the same seven, a byte that says whether the head is the embedding,
  in version 2 the group size, and zeros up to byte 256. Version 2 keeps the norms in float32; each matrix is its int8
  numbers, row by row, then a float32 scale for every group of them.

The rows of queries and keys come in neighbouring rotary pairs. The norms' epsilon and the rotary base are not in the
file: they are constants of the program.
"""

# E embedding   F hidden width of the feed-forward   K width of all keys of a position   V vocabulary   D head

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer
from groundup.model.weights.folder import empty_model
from groundup.model.weights.links import Link, in_pairs, same
from groundup.runtime import GroundupError, os_errors

MAGIC = 0x616B3432  # "ak42"
NORM_EPS, ROPE_THETA = 1e-5, 10_000.0
LONGEST_CONTEXT = 1 << 24  # tokens; it takes no room in the file, so that the file's size does not bound it
_SIZES = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")


@dataclass(frozen=True)
class _Header:
    """What a file says before its tensors."""

    version: int
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    seq_len: int
    tied: bool
    group: int
    """Numbers that share a scale; 0 in the versions that have none."""

    @property
    def start(self) -> int:
        """Where the tensors begin."""
        return 256 if self.version else 28

    @property
    def kv_dim(self) -> int:
        """Width of all keys of a position."""
        return self.dim // self.n_heads * self.n_kv_heads


@dataclass(frozen=True)
class _Entry:
    """Tensors of one kind, one for each of ``count`` layers, as they follow each other in the file."""

    kind: str
    shape: tuple[int, ...]
    count: int = 1
    quantized: bool = False

    def nbytes(self, group: int) -> int:
        """Bytes of one of the tensors."""
        size = prod(self.shape)
        return size + 4 * (size // group) if self.quantized else 4 * size


def _entries(header: _Header) -> list[_Entry]:
    """Everything after the header, in the order of the file."""
    E, F, K, V, layers = header.dim, header.hidden_dim, header.kv_dim, header.vocab_size, header.n_layers
    packed = header.version == 2
    embedding = _Entry("embedding", (V, E), 1, packed)
    attention_norm, ff_norm = _Entry("attention_norm", (E,), layers), _Entry("feed_forward_norm", (E,), layers)
    norm, head = _Entry("norm", (E,)), [] if header.tied else [_Entry("head", (V, E), 1, packed)]
    attention = [
        _Entry(f"attention.{name}", (width, E), layers, packed)
        for name, width in (("q", E), ("k", K), ("v", K), ("out", E))
    ]
    feed_forward = [
        _Entry(f"feed_forward.{name}", shape, layers, packed)
        for name, shape in (("gate", (F, E)), ("down", (E, F)), ("up", (F, E)))
    ]
    if header.version:
        return [attention_norm, ff_norm, norm, embedding, *attention, *feed_forward, *head]
    waves = _Entry("waves", (header.seq_len, E // header.n_heads // 2), 2)  # cosines and sines, which we compute
    return [embedding, attention_norm, *attention, ff_norm, *feed_forward, norm, waves, *head]


def read_llama2c_config(file: Path) -> ModelConfig:
    """The model config of a file (no weights are read).

    Raises:
        GroundupError: it cannot be read, is of another kind, or is cut short.
    """
    return _config(_read_header(file))


def load_llama2c(
    file: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:  # fmt: skip
    """Build the model of a file and fill in its weights. Peak memory is the model's and one tensor's.

    Args:
        dtype: what the weights become; None for float32, which the file's own numbers (int8 times their scales) are.

    Raises:
        GroundupError: it cannot be read, is of another kind, or is damaged.
    """
    header = _read_header(file)
    config = _config(header)
    model = empty_model(config, device, dtype or torch.float32)
    places = dict(model.state_dict())
    with os_errors(file, "cannot read"), torch.no_grad():
        for name, tensor in _tensors(file, header):
            link = _link(name, config)
            targets = [place.of(places) for place in link.ours]
            for target, part in zip(targets, link.split(tensor, targets), strict=True):
                target.copy_(part)
    return model


def _config(header: _Header) -> ModelConfig:
    return ModelConfig(
        vocab_size=header.vocab_size,
        context_length=header.seq_len,
        n_layer=header.n_layers,
        n_head=header.n_heads,
        n_kv_head=header.n_kv_heads,
        n_embd=header.dim,
        n_ff=header.hidden_dim,
        norm_eps=NORM_EPS,
        rope_theta=ROPE_THETA,
        qk_norm=False,
        tie_embeddings=header.tied,
    )


def _link(name: str, config: ModelConfig) -> Link:
    ours = f"{name}.weight"
    heads = {"attention.q": config.n_head, "attention.k": config.kv_heads}.get(name.split(".", 2)[-1])
    return same(name, ours) if heads is None else in_pairs(name, ours, heads, config.head_width)


def _read_header(file: Path) -> _Header:
    """The header, once all it says is possible and the file is exactly as long as it asks for."""
    with os_errors(file, "cannot read"), open(file, "rb") as opened:
        raw = opened.read(256)
        size = opened.seek(0, 2)
    if raw[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise GroundupError(
            f"{file}: these are pickled weights, which can run code when opened: never read. "
            "Convert them to model.safetensors with the tool that wrote them."
        )
    if len(raw) < 28:
        raise GroundupError(f"{file}: {size} bytes are too few for a model of llama2.c. Copy or download it again.")
    header = _parse(file, raw)
    _check_sizes(file, header)
    expected = header.start + sum(entry.count * entry.nbytes(header.group) for entry in _entries(header))
    if size != expected:
        how = "cut short" if size < expected else "not a model of llama2.c, or has something behind its end"
        raise GroundupError(
            f"{file}: this file is {how}: its header (version {header.version}) asks for {expected:,} bytes, "
            f"it has {size:,}. Copy or download it again."
        )
    return header


def _parse(file: Path, raw: bytes) -> _Header:
    (first,) = struct.unpack_from("<I", raw)
    if first != MAGIC:
        sizes = dict(zip(_SIZES, struct.unpack_from("<7i", raw), strict=True))
        tied = sizes["vocab_size"] > 0
        return _Header(version=0, **sizes | {"vocab_size": abs(sizes["vocab_size"])}, tied=tied, group=0)
    if len(raw) < 256:
        raise GroundupError(f"{file}: this model of llama2.c is cut short: its header is not whole. Copy it again.")
    version, *numbers, head_is_embedding, group = struct.unpack_from("<i7iBi", raw, 4)
    if version not in (1, 2):
        raise GroundupError(f"{file}: version {version} of llama2.c's format is not known; 0, 1 and 2 are.")
    sizes = dict(zip(_SIZES, numbers, strict=True))
    return _Header(version=version, **sizes, tied=bool(head_is_embedding), group=group if version == 2 else 0)


def _check_sizes(file: Path, header: _Header) -> None:
    wrong = next((name for name in _SIZES if getattr(header, name) < 1), None)
    problem = ""
    if wrong is not None:
        problem = f"{wrong} = {getattr(header, wrong)}"
    elif header.dim % header.n_heads or header.dim // header.n_heads % 2:
        problem = f"dim = {header.dim} is not an even width for each of n_heads = {header.n_heads}"
    elif header.n_heads % header.n_kv_heads:
        problem = f"n_kv_heads = {header.n_kv_heads} does not divide n_heads = {header.n_heads}"
    elif header.seq_len > LONGEST_CONTEXT:
        problem = f"seq_len = {header.seq_len}"
    elif header.version == 2 and header.group < 1:
        problem = f"group size = {header.group}"
    elif header.version == 2 and any(e.quantized and prod(e.shape) % header.group for e in _entries(header)):
        problem = f"its groups of {header.group} do not fill every matrix"
    if problem:
        raise GroundupError(f"{file}: not a model of llama2.c, or its header is damaged ({problem}).")


def _tensors(file: Path, header: _Header) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the model has, by its name there without ``.weight``."""
    raw = np.memmap(file, dtype=np.uint8, mode="r")
    at = header.start
    for entry in _entries(header):
        for layer in range(entry.count):
            nbytes = entry.nbytes(header.group)
            part = raw[at : at + nbytes]
            at += nbytes
            if entry.kind == "waves":
                continue
            name = f"blocks.{layer}.{entry.kind}" if "_norm" in entry.kind or "." in entry.kind else entry.kind
            values = _unpacked(file, name, part, header.group) if entry.quantized else _floats(part)
            yield name, torch.from_numpy(values.reshape(entry.shape))


def _floats(part: np.ndarray) -> np.ndarray:
    return np.array(part.view("<f4"), dtype=np.float32)  # a copy: the file may be mapped where no float may stand


def _unpacked(file: Path, name: str, part: np.ndarray, group: int) -> np.ndarray:
    """Numbers from their int8 and the scale of each group (Q8_0)."""
    groups = len(part) // (group + 4)
    scales = _floats(part[groups * group :])
    if not (np.isfinite(scales) & (scales >= 0)).all():  # early writers put all scales behind all matrices
        raise GroundupError(
            f"{file}: the scales of {name} are no numbers: damaged, or of an early form of version 2 that runq.c "
            "does not read either. Write it again with llama2.c's export.py --version 2."
        )
    return part[: groups * group].view(np.int8).reshape(groups, group) * scales[:, None]
