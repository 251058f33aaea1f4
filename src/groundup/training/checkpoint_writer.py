"""Tensors on their way into safetensors files, written from where they lie while training goes on.

Weights and optimizer state do not change during the forward and backward pass that follow a save, so that the writer's
thread can read them where they are. :meth:`LiveWriter.settle`, called before the optimizer steps, sees to what is not
written by then: it copies from the end of the queue while the writer goes on at its beginning, within a bound on the
memory for copies, until they meet. As a rule a step takes longer than the writing, and nothing is copied at all.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from groundup.model.weights.tensor_file import DTYPES
from groundup.runtime import os_errors, warn

AT_ONCE = 1 << 23  # bytes hashed and written in one go: they are still in the processor's cache when they are written
SMALL = 1 << 16  # bytes up to which a tensor is copied at once: it costs less than keeping count of it
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Moment:
    """The moment of a save on one GPU: what is read waits for the work queued before it, and for none queued after."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._event = torch.cuda.current_stream(device).record_event()

    def fetch(self, tensor: Tensor) -> Tensor:
        """A copy on the CPU."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._event)
            return tensor.to("cpu")


def _only(parts: Sequence[Tensor]) -> Tensor:
    return parts[0]


class Entry:
    """One tensor of a file.

    Args:
        name: its name there.
        parts: what it is made of: tensors that lie on one device and stay as they are until the writer is settled.
        join: how it is made of them.
        owned: nobody else changes the parts, so that they need no copy.
        moment: when to read them, on a GPU.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[Tensor],
        join: Callable[[Sequence[Tensor]], Tensor] = _only,
        *,
        owned: bool = False,
        moment: Moment | None = None,
    ) -> None:
        like = join([torch.empty_like(part, device="meta") for part in parts])
        self.name, self.shape, self.dtype = name, tuple(like.shape), like.dtype
        self.nbytes = math.prod(self.shape) * like.dtype.itemsize
        self.owned = owned
        self._parts, self._join, self._moment = [part.detach() for part in parts], join, moment
        if self.dtype not in _NAMES:
            raise TypeError(f"{name}: safetensors files have no name for {self.dtype}")

    def read(self) -> Tensor:
        """The tensor on the CPU, contiguous; it may share the memory of the parts."""
        parts = self._parts
        if self._moment is not None:
            parts = [self._moment.fetch(part) for part in parts]
        return self._join(parts).contiguous()

    def copy(self) -> None:
        """Take a copy and let go of the parts."""
        if self.owned:
            return
        found = self.read()
        shared = {part.untyped_storage().data_ptr() for part in self._parts}
        if found.untyped_storage().data_ptr() in shared:
            found = found.clone()
        self._parts, self._join, self._moment, self.owned = [found], _only, None, True

    def release(self) -> None:
        """Let go of the parts: the tensor is written."""
        self._parts = []


@dataclass
class LiveFile:
    """A safetensors file that is to be written.

    Args:
        name: its path below the folder of the checkpoint.
        entries: what it holds.
        metadata: texts for its header.
    """

    name: str
    entries: list[Entry]
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Large numbers first, so that every tensor begins where its numbers may begin.
        self.entries.sort(key=lambda entry: -entry.dtype.itemsize)

    def header(self) -> bytes:
        """Length and table of contents, as the format has them: the table is padded to a multiple of eight bytes."""
        table: dict[str, object] = {"__metadata__": {"format": "pt"} | self.metadata}
        begin = 0
        for entry in self.entries:
            end = begin + entry.nbytes
            table[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


class LiveWriter:
    """Writes files from tensors that change once it is settled.

    One thread calls :meth:`write`, the one that trains calls :meth:`settle`.

    Args:
        files: what to write, in this order.
        spare_bytes: memory that copies may take at any time, those included that are owned already.
    """

    def __init__(self, files: Sequence[LiveFile], spare_bytes: int) -> None:
        self.files, self.spare_bytes = files, spare_bytes
        self._changed = threading.Condition()
        everything = [entry for file in files for entry in file.entries]
        for entry in everything:
            if entry.nbytes <= SMALL:
                entry.copy()
        self._held = sum(entry.nbytes for entry in everything if entry.owned)
        self._live = deque(entry for entry in everything if not entry.owned)  # neither copied nor begun
        self._busy: set[int] = set()  # entries that a thread is reading
        self._over = False

    # ---- the writer's thread

    def write(self, folder: Path) -> dict[str, str]:
        """Write all files, and only then flush them to the disk.

        Returns:
            The SHA-256 of each, by name.

        Raises:
            GroundupError: the folder cannot be written.
        """
        try:
            found = {file.name: self._write_file(folder / file.name, file) for file in self.files}
        finally:
            self.end()
        for file in self.files:
            with os_errors(folder / file.name, "cannot write"), open(folder / file.name, "rb") as handle:
                os.fsync(handle.fileno())
        return found

    def end(self) -> None:
        """Nothing more is read: whoever waits in :meth:`settle` may go on."""
        with self._changed:
            self._over = True
            self._live.clear()
            self._changed.notify_all()

    def _write_file(self, path: Path, file: LiveFile) -> str:
        digest = hashlib.sha256()

        def add(data: bytes | memoryview) -> None:  # neither call holds Python's lock over much data
            digest.update(data)
            handle.write(data)

        with os_errors(path, "cannot write"):
            path.parent.mkdir(exist_ok=True)
            with open(path, "xb") as handle:
                add(file.header())
                for entry in file.entries:
                    self._write_entry(entry, add)
        return digest.hexdigest()

    def _write_entry(self, entry: Entry, add: Callable[[memoryview], None]) -> None:
        self._begin(entry)
        try:
            content = _bytes_of(entry.read())
            for start in range(0, len(content), AT_ONCE):
                add(content[start : start + AT_ONCE])
        finally:
            self._finish(entry)

    def _begin(self, entry: Entry) -> None:
        with self._changed:
            self._changed.wait_for(lambda: id(entry) not in self._busy)  # it is being copied just now
            if not entry.owned:
                self._live.remove(entry)
                self._busy.add(id(entry))

    def _finish(self, entry: Entry) -> None:
        with self._changed:
            entry.release()
            if entry.owned:
                self._held -= entry.nbytes
            self._busy.discard(id(entry))
            self._changed.notify_all()

    # ---- the thread that trains

    def settle(self) -> None:
        """Return once nothing is read from live tensors any more; they may change then."""
        while (entry := self._next_to_copy()) is not None:
            copied = False
            try:
                entry.copy()
                copied = True
            except (MemoryError, RuntimeError) as error:  # what torch raises where there is no memory
                warn(f"no memory to copy what is being saved ({error}): training waits until it is written.")
                self.spare_bytes = 0
            finally:
                with self._changed:
                    self._busy.discard(id(entry))
                    if not copied:
                        self._held -= entry.nbytes
                        if not self._over:
                            self._live.append(entry)
                    self._changed.notify_all()
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)

    def _next_to_copy(self) -> Entry | None:
        """The last of the queue, claimed, as soon as there is room for a copy; None when the queue is empty."""
        with self._changed:
            self._changed.wait_for(lambda: not self._live or self._held + self._live[-1].nbytes <= self.spare_bytes)
            if not self._live:
                return None
            entry = self._live.pop()
            self._held += entry.nbytes
            self._busy.add(id(entry))
            return entry


class Background:
    """A save on its way: what it reads from, and a thread that does the work and keeps how it ended.

    The thread is no daemon: a process that ends waits for it.

    Args:
        live: settled whatever happens to the work.
        work: what to do.

    Attributes:
        error: what the work raised.
    """

    def __init__(self, live: LiveWriter, work: Callable[[], None]) -> None:
        self.live = live
        self.error: BaseException | None = None
        self._work = work
        atexit.register(self._last_word)  # called after all threads have ended
        self._thread = threading.Thread(target=self._run, name="checkpoint")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error
        finally:
            self.live.end()

    @property
    def ended(self) -> bool:
        """Whether the work is over."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Return when the work is over. Whoever waits also looks at :attr:`error`."""
        self._thread.join()
        atexit.unregister(self._last_word)

    def _last_word(self) -> None:
        if self.error is not None:
            warn(f"{self.error} The last checkpoint was not saved.")


def _bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a contiguous tensor, little end first as the format has them."""
    if not tensor.numel():
        return memoryview(b"")
    flat = tensor.reshape(-1).view(torch.uint8)
    if sys.byteorder == "big" and tensor.element_size() > 1:
        flat = flat.view(-1, tensor.element_size()).flip(1).reshape(-1)
    return flat.numpy().data
