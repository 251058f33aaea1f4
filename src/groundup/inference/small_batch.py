"""Decoding few tokens on a CPU: the forward pass of a model as one compiled program over its own weights.

PyTorch starts a product for each matrix, which for a single token takes longer than reading the matrix. Here one call
does all of a step, with weights where they lie in the model (nothing is copied) and keys and values where they lie in
the pages of the cache. small_program.py writes the program, once; kernels.py does what it says.

What is quantized is multiplied as integers: inputs are rounded to 16 bits, by the largest of each token, and the
products of codes are summed exactly. bf16 weights meet inputs that are rounded to bf16, as in PyTorch.
"""

# N tokens   R rows   E embedding   V vocabulary   H query heads   G key/value heads   D head dimension

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from groundup.inference import kernels as k
from groundup.inference.attention_lanes import PIECE
from groundup.inference.lanes import AMX
from groundup.inference.small_program import CHUNK_ROWS, KINDS, Program, aligned
from groundup.model import Transformer
from groundup.model.attention import Attention
from groundup.model.feed_forward import MLP, GatedMLP
from groundup.model.positions import Rotary
from groundup.model.quantized import QuantizedLinear

MOST = k.MOST
_TURNED_AT_ONCE = 256  # positions whose cosines are computed together


class _Team:
    """Threads that help with a step. One that comes late finds less to do, or nothing."""

    def __init__(self, count: int) -> None:
        self._job: Any = None
        self._goes = [threading.Lock() for _ in range(count)]
        for number, go in enumerate(self._goes):
            go.acquire()
            threading.Thread(target=self._help, args=(number, go), name="groundup-decode", daemon=True).start()

    def _help(self, number: int, go: threading.Lock) -> None:
        while True:
            go.acquire()
            run, state, opened, scratches = self._job
            run(state.ctypes.data, opened, scratches[number + 1].ctypes.data)
            del run, state, scratches

    def begin(self, job: Any) -> None:
        """Let all threads run the job."""
        self._job = job
        for go in self._goes:
            if go.locked():
                go.release()


_teams: dict[int, _Team] = {}
_teams_lock = threading.Lock()


def _team(count: int) -> _Team:
    """The process's threads; so many of them besides the caller's."""
    with _teams_lock:
        if count not in _teams:
            _teams[count] = _Team(count)
        return _teams[count]


class SmallBatch:
    """The forward pass of steps of few tokens.

    Args:
        model: on a CPU, and none that :meth:`refusal` speaks of. Its weights may change in place (training, loading); a
            new place for them (another dtype) needs a new SmallBatch.
        pages: for each layer its keys and values, slots G D, float32 or bf16. Shared with whoever reads prompts.
        block_size: slots of a block.
        groups: for each layer the number of the group whose blocks it uses; default: layers without a window, then
            those with one.

    Attributes:
        most: tokens of a step.
        fast: whether steps of as many tokens are faster than PyTorch's products of hundreds. They are not where the
            processor multiplies bf16 by tiles (AMX), which PyTorch knows how to use.
    """

    most = MOST

    def __init__(
        self, model: Transformer, pages: Sequence[tuple[Tensor, Tensor]], block_size: int,
        groups: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        if (why := self.refusal(model)) is not None:
            raise ValueError(f"this model cannot be run by compiled kernels: {why}")
        self._config = model.config
        quantized = any(isinstance(module, QuantizedLinear) for module in model.modules())
        self.fast = quantized or not (AMX and model.dtype == torch.bfloat16)
        windows = [model.config.window(layer) for layer in range(model.config.n_layer)]
        kinds = sorted(set(windows), key=lambda window: (window is not None, window or 0))
        groups = [kinds.index(window) for window in windows] if groups is None else groups
        self._program = Program(model, pages, block_size, groups)
        regions = len(self._program.of_all) // k.FIELDS
        self._counters = aligned(128 * regions)
        self._lock = threading.Lock()
        self._state_memory = aligned(8 * k.STATE)
        self._state = self._state_memory.view(np.int64)
        self._step = 0
        self._scratches: list[np.ndarray] = []
        self._turns = [_Turns(rotary) for rotary in (model.rotary, model.local_rotary) if rotary is not None]
        self._grows = any(turns.rotary.grows for turns in self._turns)
        self._parts = aligned(0)

    @staticmethod
    def refusal(model: Transformer) -> str | None:
        """Why a model cannot go this way; None if it can."""
        config = model.config
        for name, found in (
            ("latent attention", bool(config.latent.kv_rank)), ("a mixture of experts", any(config.expert_layers)),
            ("ALiBi", config.positions == "alibi"), ("attention sinks", config.attention_sinks),
        ):  # fmt: skip
            if found:
                return name
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.device.type != "cpu":
                return f"{name} is on {tensor.device}"
            if type(tensor.data) is not Tensor:  # shared out among processes: what it holds here is a part
                return f"{name} is a {type(tensor.data).__name__}"
        for block in model.blocks:
            attention, feed_forward = block.attention, block.feed_forward
            if type(attention) is not Attention or type(feed_forward) not in (MLP, GatedMLP):
                return f"{type(attention).__name__} or {type(feed_forward).__name__}"
        if type(model.embedding) is not nn.Embedding:
            return f"embedding is {type(model.embedding).__name__}"
        return next((why for name, module in model.named_modules() if (why := _refused(name, module))), None)

    # ---- a step

    def features(
        self, ids_N: np.ndarray, positions_N: np.ndarray, rows_N: np.ndarray, tables: Sequence[np.ndarray],
        lengths_N: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """What ``Transformer.features`` gives for some tokens, whose keys and values go to the pages.

        Args:
            ids_N: token ids; at most ``most``, of any sequences. All int64.
            positions_N: the place of each in its own text. It sees that place and those before.
            rows_N: which row of the tables is its sequence's.
            tables: for each group of layers, int32, sequences by blocks: where the blocks of a text lie.
            lengths_N: positions that each text has, or will have when its prompt is read; only rotary positions that
                hang on the length of the text ask for it.

        Returns:
            N E, float32.
        """
        with self._lock:
            self._begin(ids_N, positions_N, rows_N, tables, lengths_N)
            self._run(self._program.of_features, len(ids_N))
            return self._program.to_head.rows_NE[: len(ids_N)].copy()

    def features_and_logits(
        self, ids_N: np.ndarray, positions_N: np.ndarray, rows_N: np.ndarray, tables: Sequence[np.ndarray],
        lengths_N: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """:meth:`features`, and :meth:`logits` of all of them: in one go, which threads need not be called to twice."""
        N = len(ids_N)
        with self._lock:
            self._begin(ids_N, positions_N, rows_N, tables, lengths_N)
            self._run(self._program.of_all, N)
            return self._program.to_head.rows_NE[:N].copy(), self._program.logits_NV[:N].copy()

    def _begin(
        self, ids_N: np.ndarray, positions_N: np.ndarray, rows_N: np.ndarray, tables: Sequence[np.ndarray],
        lengths_N: np.ndarray | None,
    ) -> None:  # fmt: skip
        """Tell the kernels what to work on."""
        N = len(ids_N)
        if not 0 < N <= MOST:
            raise ValueError(f"a step has 1 to {MOST} tokens, not {N}")
        state = self._state
        self._held = held = [np.ascontiguousarray(values, np.int64) for values in (ids_N, positions_N, rows_N)]
        state[[k.IDS, k.POSITIONS, k.ROWS_OF]] = [values.ctypes.data for values in held]
        for number, table in enumerate(tables):
            assert table.dtype == np.int32
            assert table.flags.c_contiguous
            state[[k.TABLES + 2 * number, k.TABLES + 2 * number + 1]] = table.ctypes.data, 4 * table.shape[-1]
        self._rotate(held[1], lengths_N)
        self._make_room(held[1])

    def logits(self, features_RE: np.ndarray) -> np.ndarray:
        """What ``Transformer.logits`` makes of features: R V, float32."""
        R = len(features_RE)
        with self._lock:
            self._program.to_head.rows_NE[:R] = features_RE
            self._run(self._program.of_logits, R)
            return self._program.logits_NV[:R].copy()

    def _rotate(self, positions_N: np.ndarray, lengths_N: np.ndarray | None) -> None:
        """Tell where the cosines and sines of each token lie."""
        state = self._state
        if self._grows:
            lengths_N = np.full(len(positions_N), self._config.context_length) if lengths_N is None else lengths_N
            self._at = np.arange(len(positions_N))
        else:
            lengths_N, self._at = None, positions_N
        state[k.ROPE_AT] = self._at.ctypes.data
        for number, turns in enumerate(self._turns):
            longest = int(positions_N.max()) + 1
            found = turns.table(longest) if lengths_N is None else turns.of(positions_N, lengths_N)
            for i, values in enumerate(found):
                state[k.TURNS + 2 * number + i] = values.ctypes.data

    def _make_room(self, positions_N: np.ndarray) -> None:
        """Have memory for the parts of each token's attention."""
        size = int((positions_N // PIECE + 2).sum()) * self._config.n_head * (64 + self._program.head_row)
        if len(self._parts) < size:
            self._parts = aligned(2 * size)
            self._state[k.PARTS] = self._parts.ctypes.data

    def _run(self, rows: np.ndarray, tokens: int) -> None:
        state = self._state
        k.close(state.ctypes.data)
        self._counters[:] = 0
        state[[k.COUNTERS, k.PROGRAM, k.REGIONS, k.TOKENS]] = (
            self._counters.ctypes.data, rows.ctypes.data, len(rows) // k.FIELDS, tokens
        )  # fmt: skip
        self._step += 1
        threads = torch.get_num_threads()
        state[k.THREADS] = threads
        while len(self._scratches) < threads:
            self._scratches.append(aligned(self._scratch_size()))
        run: Callable[..., int] = k.run.ctypes
        state[k.OPEN] = self._step
        if threads > 1:
            _team(threads - 1).begin((run, state, self._step, self._scratches))
        run(state.ctypes.data, 0, self._scratches[0].ctypes.data)

    def _scratch_size(self) -> int:
        shared, head_row = self._config.n_head // self._config.kv_heads, self._program.head_row
        products = 2 * MOST * 4 * (CHUNK_ROWS + 2 * k.SPARE)
        attention = PIECE * (24 + 16 + 2 * head_row) + 32 * k.TOGETHER * shared
        return max(products, attention) + 2 * head_row + 4096


class _Turns:
    """Cosines and sines of rotary positions, kept."""

    def __init__(self, rotary: Rotary) -> None:
        self.rotary = rotary
        self._kept = [np.zeros((0, rotary.dim), np.float32)] * 2
        self._made: list[Any] = []

    def table(self, count: int) -> list[np.ndarray]:
        """Those of the first ``count`` positions and of some more."""
        if len(self._kept[0]) < count:
            # A block at a time: the last bit of a cosine may hang on how many are computed together.
            begins = range(0, -(-count // _TURNED_AT_ONCE) * _TURNED_AT_ONCE, _TURNED_AT_ONCE)
            found = [self._of(np.arange(begin, begin + _TURNED_AT_ONCE), 1) for begin in begins[len(self._made) :]]
            self._made += found
            self._kept = [np.concatenate([pair[i] for pair in self._made]) for i in range(2)]
        return self._kept

    def of(self, positions_N: np.ndarray, lengths_N: np.ndarray) -> list[np.ndarray]:
        """Those of some positions in texts of some lengths."""
        pairs = [self._of(positions_N[i : i + 1], int(lengths_N[i])) for i in range(len(positions_N))]
        self._kept = [np.concatenate([pair[i] for pair in pairs]) for i in range(2)]
        return self._kept

    def _of(self, positions: np.ndarray, length: int) -> tuple[np.ndarray, ...]:
        found = self.rotary(torch.from_numpy(positions)[None], length)
        return tuple(values[0, :, 0].numpy() for values in found)


def _refused(name: str, module: nn.Module) -> str | None:
    """Why a module cannot be computed here."""
    if isinstance(module, QuantizedLinear):
        return f"{name} is {module.scheme.kind}" if module.scheme.kind == "nf4" else None
    if hasattr(module, "adapters"):
        return f"{name} has adapters"
    for key, tensor in module.named_parameters(recurse=False):
        if tensor.dtype not in KINDS:
            return f"{name}.{key} is {tensor.dtype}"
    return None
