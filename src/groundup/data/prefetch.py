"""Micro-batches made ahead of their use, in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from groundup.data.batch import Loader


class Prefetcher:
    """Gives what a loader gives, and reads on in the meantime.

    The thread pays where reading is slow (a network disk, shards fetched from elsewhere) and costs little otherwise:
    NumPy copies while the caller computes. What is asked for comes out the same with and without it. Whoever asks for
    another index than the next one, as after a rollback, gets that one; what was read ahead is dropped.

    Args:
        loader: where batches come from; only the thread calls its ``batch``.
        depth: most batches ready or in the making.
        stride: from one index to the next: the number of processes that share the work.
        convert: what is done to a batch in the thread, such as moving it to pinned memory.
    """

    def __init__(
        self, loader: Loader, depth: int, stride: int = 1, convert: Callable[[Any], Any] | None = None
    ) -> None:
        if depth < 1 or stride < 1:
            raise ValueError(f"depth {depth} and stride {stride}: at least 1 each")
        self.loader, self.depth, self.stride, self._convert = loader, depth, stride, convert
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, thread_name_prefix="groundup-prefetch")
        self._ahead: deque[tuple[int, Future[Any]]] = deque()

    def batch(self, index: int) -> Any:
        """Micro-batch ``index``, as the loader gives it (and ``convert`` turns it).

        Raises:
            Exception: whatever the loader raised for this very index; the next call tries again.
            RuntimeError: it was closed.
        """
        if self._thread is None:
            raise RuntimeError("the prefetcher was closed")
        if not self._ahead or self._ahead[0][0] != index:
            self._drop()
            self._ahead.append((index, self._thread.submit(self._make, index)))
        _, wanted = self._ahead.popleft()
        following = self._ahead[-1][0] + self.stride if self._ahead else index + self.stride
        while len(self._ahead) < self.depth:
            self._ahead.append((following, self._thread.submit(self._make, following)))
            following += self.stride
        try:
            return wanted.result()
        except BaseException:
            self._drop()
            raise

    def epoch(self, index: int) -> int:
        """The epoch that micro-batch ``index`` begins in, from 0."""
        return self.loader.epoch(index)

    def state(self, index: int) -> dict[str, int]:
        """All that resuming at micro-batch ``index`` needs; how far was read ahead is no part of it."""
        return self.loader.state(index)

    def report(self) -> dict[str, Any]:
        """The loader's report."""
        return self.loader.report()

    def resized(self, batch_size: int) -> Prefetcher:
        """The same in batches of another size; this one is closed."""
        self.close()
        return Prefetcher(self.loader.resized(batch_size), self.depth, self.stride, self._convert)

    def close(self) -> None:
        """Drop what was read ahead and end the thread, once the batch it is at is done. May be called twice."""
        self._drop()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _drop(self) -> None:
        for _, batch in self._ahead:
            batch.cancel()
        self._ahead.clear()

    def _make(self, index: int) -> Any:
        batch = self.loader.batch(index)
        return batch if self._convert is None else self._convert(batch)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
