"""The program of a model's forward pass over few tokens: what kernels.py does, region by region.

A region is a row of numbers, most of them addresses: of weights where they lie in the model, of pages of the cache, of
buffers that are made here. kernels.py says what each number is.
"""

# N tokens   E embedding   V vocabulary   H query heads   G key/value heads   D head dimension

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from groundup.inference import kernels as k
from groundup.inference.lanes import (
    BFLOAT16,
    FLOAT32,
    HEADER,
    INT4,
    INT8,
    LAST,
    ROW,
    SCALE,
    SCALE_ROW,
    TAIL,
    UNIT,
    UNITS,
    WEIGHT,
    ZERO,
    ZERO_ROW,
)  # fmt: skip
from groundup.model import Transformer
from groundup.model.feed_forward import GatedMLP
from groundup.model.positions import sinusoidal
from groundup.model.quantized import QuantizedLinear

MOST = k.MOST
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
_ACTIVATIONS = {
    "swiglu": k.SWIGLU, "geglu": k.GEGLU, "clamped_swiglu": k.CLAMPED_SWIGLU, "gelu": k.GELU,
    "gelu_exact": k.GELU_EXACT, "relu": k.RELU, "relu2": k.RELU2,
}  # fmt: skip
CHUNK_BYTES, CHUNK_ROWS = 3 << 16, 256  # of weights, that a thread takes at once: the fewer of both


def aligned(size: int) -> np.ndarray:
    """Zeros, bytes, at a whole line of the cache."""
    memory = np.zeros(size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + size]


def _bits(value: float) -> int:
    """A float32 as an integer."""
    return int(np.float32(value).view(np.uint32))


class Inputs:
    """What a product reads: a row for each token in float32, and packed for each kind of weights that it meets."""

    def __init__(self, width: int, kinds: set[int]) -> None:
        length = -(-width // 128) * 128
        strides = [HEADER + length // 128 * size for size in (512, 256, 256, UNIT[INT4])]
        self._rows = [
            aligned(MOST * stride) if kind == FLOAT32 or kind in kinds else None for kind, stride in enumerate(strides)
        ]
        addresses = [0 if rows is None else rows.ctypes.data for rows in self._rows]
        self.numbers = np.array([*addresses, *strides, length], np.int64)
        self.address: int = self.numbers.ctypes.data
        first = self._rows[FLOAT32]
        assert first is not None
        self.packed = bool(kinds - {FLOAT32})
        begin, end = HEADER // 4, HEADER // 4 + width
        self.rows_NE: np.ndarray = first.view(np.float32).reshape(MOST, strides[0] // 4)[:, begin:end]
        self.begin, self.stride = first.ctypes.data + HEADER, strides[0]


def kind_of(linear: Any) -> int:
    """The kind of a layer's weights."""
    if isinstance(linear, QuantizedLinear):
        return INT8 if linear.scheme.kind == "int8" else INT4
    return KINDS[linear.weight.dtype]


class Program:
    """The regions of a model, and the memory that they use.

    Args:
        model, pages, block_size: as for a SmallBatch.
        groups: for each layer, the number of the group whose blocks it uses.

    Attributes:
        of_features, of_logits: numbers of all regions, one after the other; ``of_all``: of both.
        to_head: the features, N E, among what the head reads.
        logits_NV: what it makes of them.
        head_row: bytes of a query head, padding included.
    """

    def __init__(
        self, model: Transformer, pages: Sequence[tuple[Tensor, Tensor]], block_size: int, groups: Sequence[int]
    ) -> None:
        config = model.config
        self._model, self._config, self._pages, self._block, self._groups = model, config, pages, block_size, groups
        self._rotary = model.rotary is not None
        self._kept: list[Any] = []  # what the numbers are addresses of
        self.head_row = 4 * (-(-config.head_width // 32) * 32)
        E, self._size = config.n_embd, 4 * (-(-config.n_embd // 128) * 128)
        stream, added = self._floats(MOST * self._size), self._floats(MOST * self._size)
        self._stream, self._added = stream, added
        blocks = [model.blocks[layer] for layer in range(config.n_layer)]

        def inputs(width: int, *names: str) -> Inputs:
            linears = [m for block in blocks for n in names if (m := _named(block, n)) is not None]
            return Inputs(width, {kind_of(linear) for linear in linears})

        heads = (config.n_head, config.kv_heads, config.kv_heads)
        self._qkv = [self._floats(MOST * 4 * config.head_width * count) for count in heads]
        self._packed = self._floats(MOST * config.n_head * self.head_row)
        self._to_attention = inputs(E, "attention.q", "attention.k", "attention.v")
        self._to_out = inputs(config.n_head * config.head_width, "attention.out")
        self._to_feed_forward = inputs(E, "feed_forward.gate", "feed_forward.up")
        self._to_down = inputs(config.ff_dim, "feed_forward.down")
        self.to_head = Inputs(E, {kind_of(model.head)})
        self._kept += [self._to_attention, self._to_out, self._to_feed_forward, self._to_down, self.to_head]
        self._program: list[np.ndarray] = [self._embedding()]
        last: tuple[int, nn.Module | None] = (k.PLAIN, None)
        for layer, block in enumerate(blocks):
            last = self._layer(layer, block, last)
        norm = None if isinstance(model.norm, nn.Identity) else model.norm
        self._program.append(self._prepare(last, (norm, self.to_head)))
        self.logits_NV = np.zeros((MOST, config.vocab_size), np.float32)
        target = (self.logits_NV.ctypes.data, 4 * config.vocab_size)
        head = self._matrix(model.head, target, k.STORE, config.logit_softcap or 0.0)
        to_logits = [self._region(k.repack, 0, 1, {k.INPUTS: self.to_head.address})] if self.to_head.packed else []
        to_logits.append(self._rows([head], self.to_head))
        self.of_features, self.of_logits = np.concatenate(self._program), np.concatenate(to_logits)
        self.of_all = np.concatenate([*self._program, to_logits[-1]])

    def _layer(self, layer: int, block: Any, last: tuple[int, nn.Module | None]) -> tuple[int, nn.Module | None]:
        """The regions of a block; how what its last product made comes into the stream."""
        parallel, post = block.parallel, block.post
        before = [None if post else block.attention_norm, None if post else block.feed_forward_norm]
        second = (before[1], self._to_feed_forward) if parallel else None
        self._program.append(self._prepare(last, (before[0], self._to_attention), second))
        self._attention(layer, block.attention)
        how = self._how(block.attention_norm if post else block.attention_out_norm, post)
        self._program.append(self._rows([self._matrix(block.attention.out, *self._stored(how))], self._to_out))
        if not parallel:
            self._program.append(self._prepare(how, (before[1], self._to_feed_forward)))
        how = self._how(block.feed_forward_norm if post else block.feed_forward_out_norm, post)
        self._feed_forward(block.feed_forward, how)
        return how

    @staticmethod
    def _how(norm: nn.Module | None, post: bool) -> tuple[int, nn.Module | None]:
        """How what a sub-layer makes is added to the stream: at once, or normalised, or with the sum normalised."""
        if norm is None:
            return k.PLAIN, None
        return (k.POST if post else k.NORMED), norm

    def _stored(self, how: tuple[int, nn.Module | None]) -> tuple[tuple[int, int], int]:
        """Where the last product of a sub-layer goes, and whether it is added there."""
        return ((self._stream, self._size), k.ADD) if how[0] == k.PLAIN else ((self._added, self._size), k.STORE)

    def _attention(self, layer: int, attention: Any) -> None:
        config, D, G = self._config, self._config.head_width, self._config.kv_heads
        H, keys, values = config.n_head, *self._pages[layer]
        q, k_, v = self._qkv
        matrices = [
            self._matrix(linear, (target, 4 * D * heads), k.STORE)
            for linear, target, heads in ((attention.q, q, H), (attention.k, k_, G), (attention.v, v, G))
        ]
        self._program.append(self._rows(matrices, self._to_attention))
        turn = -1 if not self._rotary or attention.kind == "N" else 0
        if turn == 0 and attention.kind == "S" and config.rope_local_theta is not None:
            turn = 1
        fields = self._normed() | {
            k.QUERIES: q, k.NEW_KEYS: k_, k.NEW_VALUES: v, k.QUERY_ROW: 4 * D * H, k.KEY_ROW: 4 * D * G,
            k.GROUPS: G, k.SHARED: H // G, k.HEAD: D, k.GROUP: self._groups[layer], k.WINDOW: attention.window or 0,
            k.BLOCK: self._block, k.PAGE_KEYS: self._keep(keys), k.PAGE_VALUES: self._keep(values),
            k.PAGE_KIND: KINDS[keys.dtype], k.WHOLE: int(attention.norm_whole), k.TURN: turn,
            k.TURNED: config.rotary_dim if turn >= 0 else 0, k.PACKED: self._packed, k.PACKED_HEAD: self.head_row,
            k.SCORE_SCALE: _bits(attention.scale), k.CAP: _bits(attention.softcap or 0.0),
            k.MIXED: self._to_out.address,
        }  # fmt: skip
        fields |= self._norm(k.QUERY_NORM, attention.q_norm) | self._norm(k.KEY_NORM, attention.k_norm)
        self._program.append(self._region(k.heads_of_group, 0, G, fields))
        self._program.append(self._region(k.attend[KINDS[keys.dtype]], -1, 0, fields))
        self._program.append(self._region(k.merge, 0, 1, fields))

    def _feed_forward(self, feed_forward: Any, how: tuple[int, nn.Module | None]) -> None:
        kind, to_down = _ACTIVATIONS[self._config.feed_forward], self._to_down
        target = (to_down.begin, to_down.stride)
        gated = isinstance(feed_forward, GatedMLP)
        matrices = [self._matrix(feed_forward.gate, target, k.ACTIVATE)] if gated else []
        matrices.append(self._matrix(feed_forward.up, target, k.ACTIVATE))
        self._program.append(self._rows(matrices, self._to_feed_forward, gated=gated, activation=kind))
        if to_down.packed:
            self._program.append(self._region(k.repack, 0, 1, {k.INPUTS: to_down.address}))
        self._program.append(self._rows([self._matrix(feed_forward.down, *self._stored(how))], to_down))

    # ---- regions

    @staticmethod
    def _region(function: Any, items: int, per_token: int, fields: dict[int, int]) -> np.ndarray:
        row = np.zeros(k.FIELDS, np.int64)
        row[[k.FUNCTION, k.ITEMS, k.PER_TOKEN]] = function.address, items, per_token
        row[list(fields)] = list(fields.values())
        return row

    def _embedding(self) -> np.ndarray:
        config, model = self._config, self._model
        table, places = model.embedding.weight, None
        scale = 1.0
        if config.embedding_scale is not None:
            scale = float(torch.tensor(config.embedding_scale, dtype=table.dtype))
        if model.positions is not None:
            places = model.positions.weight
        elif config.positions == "sinusoidal":
            places = sinusoidal(torch.arange(config.context_length)[None], config.n_embd)[0].contiguous()
        return self._region(k.embed, 0, 1, {
            k.TABLE: self._keep(table), k.TABLE_KIND: KINDS[table.dtype], k.SCALE: _bits(scale),
            k.PLACES: 0 if places is None else self._keep(places),
            k.PLACES_KIND: 0 if places is None else KINDS[places.dtype],
            k.STREAM: self._stream, k.STREAM_ROW: self._size, k.WIDTH: config.n_embd,
        })  # fmt: skip

    def _prepare(
        self, last: tuple[int, nn.Module | None], first: tuple[nn.Module | None, Inputs],
        second: tuple[nn.Module | None, Inputs] | None = None,
    ) -> np.ndarray:  # fmt: skip
        how, norm = last
        fields = self._normed() | {
            k.STREAM: self._stream, k.STREAM_ROW: self._size, k.WIDTH: self._config.n_embd, k.ADDED: self._added,
            k.HOW: how, k.FIRST: first[1].address,
        }  # fmt: skip
        fields |= self._norm(k.ADDED_NORM, norm) | self._norm(k.FIRST_NORM, first[0])
        if second is not None:
            fields |= {k.SECOND: second[1].address} | self._norm(k.SECOND_NORM, second[0])
        return self._region(k.prepare, 0, 1, fields)

    def _normed(self) -> dict[int, int]:
        """What all norms of a model have in common."""
        config = self._config
        kind = k.LAYERNORM if config.norm == "layernorm" else k.RMSNORM
        plus_one = int(config.norm_plus_one and config.norm == "rmsnorm")
        return {k.NORM: kind, k.PLUS_ONE: plus_one, k.EPSILON: _bits(config.norm_eps)}

    def _norm(self, field: int, norm: Any) -> dict[int, int]:
        if norm is None:
            return {}
        bias = getattr(norm, "bias", None)
        values = (self._keep(norm.weight), 0 if bias is None else self._keep(bias), KINDS[norm.weight.dtype])
        return {field + i: value for i, value in enumerate(values)}

    def _rows(
        self, matrices: Sequence[np.ndarray], inputs: Inputs, *, gated: bool = False, activation: int = 0
    ) -> np.ndarray:
        items = sum(-(-int(m[k.OUTPUTS]) // int(m[k.CHUNK])) for m in matrices[: 1 if gated else None])
        fields = {k.COUNT: -1 if gated else len(matrices), k.INPUTS: inputs.address, k.ACTIVATION: activation}
        fields |= {k.MATRICES + i: matrix.ctypes.data for i, matrix in enumerate(matrices)}
        return self._region(k.part_of_rows, items, 0, fields)

    def _matrix(self, linear: Any, target: tuple[int, int], mode: int, cap: float = 0.0) -> np.ndarray:
        """The numbers that tell of a linear layer, and where its products go."""
        numbers, kind = np.zeros(k.MATRIX, np.int64), kind_of(linear)
        outputs, group, zero = linear.out_features, 0, False
        if isinstance(linear, QuantizedLinear):
            codes, scale = linear.get_buffer("codes"), linear.get_buffer("scale")
            numbers[[SCALE, SCALE_ROW]] = self._keep(scale), 4 * scale.shape[-1]
            if kind == INT4:
                group, zero = linear.scheme.group, linear.scheme.zero_point
            if zero:
                zeros = linear.get_buffer("zero")
                numbers[[ZERO, ZERO_ROW]] = self._keep(zeros), zeros.shape[-1]
        else:
            codes = linear.weight
        row = codes.shape[-1] * codes.element_size()
        numbers[[WEIGHT, ROW, LAST, UNITS, TAIL]] = self._keep(codes), row, outputs - 1, row // 64, row % 64
        if linear.bias is not None:
            numbers[[k.BIAS, k.BIAS_KIND]] = self._keep(linear.bias), KINDS[linear.bias.dtype]
        chunk = max(1, min(CHUNK_ROWS, CHUNK_BYTES // row))
        numbers[[k.PRODUCT, k.PACKING, k.OUTPUTS, k.CHUNK]] = (
            k.rows_of(kind, group, zero).address, kind, outputs, chunk
        )  # fmt: skip
        numbers[[k.TARGET, k.TARGET_ROW, k.MODE, k.LOGIT_CAP]] = *target, mode, _bits(cap)
        self._kept.append(numbers)
        return numbers

    def _keep(self, tensor: Tensor) -> int:
        """The address of a tensor, which is held from now on."""
        assert tensor.is_contiguous()
        self._kept.append(tensor.detach())
        return tensor.data_ptr()

    def _floats(self, size: int) -> int:
        """The address of so many bytes."""
        self._kept.append(aligned(size))
        return int(self._kept[-1].ctypes.data)


def _named(block: nn.Module, name: str) -> nn.Module | None:
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None
