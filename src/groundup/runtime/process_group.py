"""Several processes that train one model: who they are, how they agree, and what is said when one is lost.

``torchrun`` starts the processes and tells each its rank through the environment; alone, a process is a world of one,
and everything here costs nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from groundup.runtime.errors import GroundupError, UsageError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
RANK_TIMEOUT_SECONDS = 600.0  # how long ranks wait for one another before they give up
_SHOWN = 8  # ranks that a message names


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Args:
        rank: this one's number.
        size: how many there are.
        local_rank: its number on its machine, which is that of its GPU.
        store: where ranks leave notes for one another; None in a world of one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: Any = field(default=None, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0


def world_of_environment() -> World:
    """What ``torchrun`` says in the environment; a world of one where it says nothing.

    Raises:
        UsageError: the variables contradict one another.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    try:
        rank, size, local_rank = (
            int(os.environ.get(name, default)) for name, default in zip(names, "010", strict=True)
        )
    except ValueError as error:
        raise UsageError(f"the environment's {', '.join(names)} must be whole numbers ({error}).") from error
    if not 0 <= rank < size:
        raise UsageError(
            f"the environment says RANK = {rank} of WORLD_SIZE = {size}. Start the processes with torchrun."
        )
    return World(rank, size, local_rank)


@contextmanager
def process_group(device: torch.device | None, timeout: float = RANK_TIMEOUT_SECONDS) -> Iterator[World]:
    """Join the world that the environment describes while the block runs.

    Args:
        device: NCCL connects GPUs, gloo everything else. None where there is nothing to connect.
        timeout: seconds after which a rank that does not answer counts as lost.

    Raises:
        UsageError: the environment contradicts itself.
        GroundupError: a rank was lost; the message names it.
    """
    world = world_of_environment()
    if world.size == 1:
        yield world
        return
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if device is not None and device.type == "cuda" else "gloo"
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        # On one machine torchrun keeps its store over a restart: addresses of processes that are gone stand in it.
        store = PrefixStore(f"groundup/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    world = replace(world, store=store)
    try:
        yield world
    except RuntimeError as error:  # what collectives raise; a GroundupError is none
        if not isinstance(error, dist.DistBackendError | dist.DistStoreError | dist.DistNetworkError) and not _is_lost(
            error
        ):
            raise
        raise GroundupError(
            f"rank {world.rank} of {world.size} lost touch with {_late(world)}: {_reason(error)}. "
            "What was saved stays: the same command goes on from the last checkpoint "
            "(torchrun --max-restarts=3 does so by itself)."
        ) from error
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _reason(error: RuntimeError) -> str:
    """The first sentence of an error, less the place in PyTorch's sources that it comes from."""
    return re.sub(r"^\[\S*\.(cc|h|cpp):\d+\]\s*", "", str(error)).splitlines()[0].split(". ")[0][:200]


def _is_lost(error: RuntimeError) -> bool:
    """Whether gloo, which has no error class of its own, says that the other side is gone or late."""
    text = str(error).lower()
    return any(words in text for words in ("connection closed", "timed out", "connection reset", "gloo", "broken pipe"))


def at_step(world: World, step: int) -> None:
    """Note how far this rank has come, so that the others can name it when it is late."""
    if world.store is not None:
        world.store.set(f"step/{world.rank}", str(step))


def _late(world: World) -> str:
    """The ranks that have come least far, in words."""
    steps: dict[int, int] = {}
    for rank in range(world.size):
        try:
            key = f"step/{rank}"
            steps[rank] = int(world.store.get(key)) if world.store.check([key]) else -1
        except (RuntimeError, ValueError):  # the store went with rank 0
            return "rank 0, which keeps the books" if world.rank else "another rank"
    last = min(steps.values())
    late = [rank for rank, step in steps.items() if step == last and rank != world.rank]
    if not late or (last == steps[world.rank] and len(late) == world.size - 1 and world.size > 2):
        return f"another rank (all stood at step {last})"
    named = ", ".join(map(str, late[:_SHOWN])) + (" …" if len(late) > _SHOWN else "")
    return f"rank {named} (at step {max(last, 0)}; this one at step {max(steps[world.rank], 0)})"


def sum_over_ranks(world: World, value: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's tensor, on every rank; ``value`` itself in a world of one."""
    if world.size == 1:
        return value
    import torch.distributed as dist

    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def from_main(world: World, value: Any) -> Any:
    """What rank 0 gives, on every rank: anything that JSON can say.

    Sent as text: PyTorch's own way to send an object is to pickle it.
    """
    if world.size == 1:
        return value
    return gathered(world, value if world.is_main else None)[0]


def gathered(world: World, value: Any) -> list[Any]:
    """What each rank gives, in their order, on every rank: anything that JSON can say."""
    if world.size == 1:
        return [value]
    import json

    import numpy as np
    import torch
    import torch.distributed as dist

    raw = torch.from_numpy(np.frombuffer(json.dumps(value).encode(), dtype=np.uint8).copy())
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(sizes, torch.tensor([len(raw)]))
    longest = int(max(size.item() for size in sizes))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(raw)] = raw
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world.size)]
    dist.all_gather(texts, padded)
    return [
        json.loads(bytes(text[: int(size.item())].numpy()).decode()) for text, size in zip(texts, sizes, strict=True)
    ]


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    if world.size > 1:
        import torch.distributed as dist

        dist.barrier()


@contextmanager
def main_first(world: World) -> Iterator[None]:
    """Rank 0 runs the block before all others: what it writes, they find. Its error ends all of them.

    Raises:
        GroundupError: on the other ranks, where rank 0 failed.
    """
    if world.size == 1:
        yield
        return
    failure: str | None = None
    if world.is_main:
        try:
            yield
        except BaseException as error:
            failure = str(error) or type(error).__name__
            raise
        finally:
            from_main(world, failure)
        return
    failure = from_main(world, None)
    if failure is not None:
        raise GroundupError(f"rank 0 stopped: {failure}")
    yield


def first_decides(world: World, decide: Callable[[], T], tell: Callable[[T], Any], take: Callable[[Any], T]) -> T:
    """What rank 0 decides before all others do anything, on every rank.

    Args:
        decide: on rank 0.
        tell: what the others are told of it, as plain data.
        take: on the others, what they were told back into what was decided.

    Raises:
        GroundupError: on the other ranks, where rank 0 failed.
    """
    decided: T | None = None
    with main_first(world):
        if world.is_main:
            decided = decide()
    told = from_main(world, None if decided is None else tell(decided))
    return take(told) if decided is None else decided
