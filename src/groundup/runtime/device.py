"""Which device and which precision: found by running on it, not by reading its name."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

from groundup.runtime.errors import UsageError

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
_WIDTHS = {"float32": "float32", "tf32": "float32", "bfloat16": "bfloat16", "float16": "float16"}


def activation_dtype(precision: Precision) -> torch.dtype:
    """What matrix products of a forward pass in ``precision`` read and give; tf32 only multiplies more coarsely."""
    import torch

    dtype: torch.dtype = getattr(torch, _WIDTHS[precision])
    return dtype


def choose_device(request: str = "auto") -> torch.device:
    """The device to compute on.

    Args:
        request: ``auto`` takes the first of CUDA, Apple's MPS and the CPU that can multiply two matrices; otherwise a
            torch device
            such as ``cpu`` or ``cuda:1``.

    Raises:
        UsageError: the device asked for is not here or does not work.
    """
    import torch

    if request != "auto":
        try:
            device = torch.device(request)
        except RuntimeError as error:
            raise UsageError(f"device = {request} is not a device. Known: auto, cpu, cuda, cuda:0, mps.") from error
        failure = _failure(device)
        if failure:
            raise UsageError(f"device = {request} does not work here ({failure}). Choose another, or leave it at auto.")
        return device
    for name, present in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if present and not _failure(torch.device(name)):
            return torch.device(name)
    return torch.device("cpu")


def _failure(device: torch.device) -> str:
    """Why a small product does not run on ``device``; empty when it does."""
    import torch

    try:
        ones = torch.ones(8, 8, device=device)
        return "" if float((ones @ ones).sum()) == 512.0 else "it computes wrong results"
    except (RuntimeError, AssertionError, ImportError) as error:
        return str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue, so that a clock read afterwards means something."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matmul_flops(
    device: torch.device, precision: Precision, *, rows: int = 2048, width: int = 1024, seconds: float = 0.3
) -> float:
    """Measured floating-point operations per second of a matrix product rows x width x width: the ceiling for a
    training step.

    Returns:
        FLOP/s, the best of several rounds; 0.0 where this precision does not run on the device.
    """
    import torch

    dtype = activation_dtype(precision)
    allow_tf32(precision)
    try:
        a, b = (
            torch.randn(rows, width, device=device, dtype=dtype),
            torch.randn(width, width, device=device, dtype=dtype),
        )
        for _ in range(2):  # the first calls set things up; they do not count against the time
            a @ b
        synchronize(device)
        best, deadline = float("inf"), time.perf_counter() + seconds
        while best == float("inf") or time.perf_counter() < deadline:
            started = time.perf_counter()
            a @ b
            synchronize(device)
            best = min(best, time.perf_counter() - started)
    except RuntimeError:
        return 0.0
    return 2 * rows * width * width / best


def choose_precision(request: str, device: torch.device, *, rows: int = 2048, width: int = 256) -> Precision:
    """The precision to compute in; weights and optimizer state are float32 in every case.

    Args:
        request: ``auto`` takes bfloat16 autocast where products of about the model's size run at least 1.15 times
            faster in it, the
            casts counted in; or one of ``float32``, ``tf32`` (an NVIDIA GPU's coarser products), ``bfloat16`` and
            ``float16`` (with a loss scale).
        rows, width: the typical product of the model: tokens of a micro-batch and n_embd.

    Raises:
        UsageError: the request is unknown, or does not run on this device.
    """
    if request not in ("auto", *_WIDTHS):
        raise UsageError(f"precision = {request} is unknown. Known: auto, {', '.join(_WIDTHS)}.")
    if request == "float32":
        return "float32"
    if request == "tf32":
        if device.type != "cuda":
            raise UsageError(f"precision = tf32 is a way of NVIDIA's GPUs to multiply; {device} is none. Use float32.")
        return "tf32"
    narrow: Precision = "float16" if request == "float16" else "bfloat16"
    seconds = _linear_seconds(device, narrow, rows, width)
    if request != "auto":
        if seconds == float("inf"):
            raise UsageError(f"precision = {narrow} does not run on {device}. Use float32 or auto.")
        return narrow
    return narrow if seconds * 1.15 < _linear_seconds(device, "float32", rows, width) else "float32"


def _linear_seconds(device: torch.device, precision: Precision, rows: int, width: int) -> float:
    """Seconds of a linear layer's forward and backward pass under this precision; infinite where it does not run."""
    import torch

    try:
        layer = torch.nn.Linear(width, 4 * width, bias=False, device=device)
        x = torch.randn(rows, width, device=device, requires_grad=True)
        best = float("inf")
        for attempt in range(6):
            synchronize(device)
            started = time.perf_counter()
            with autocast(device, precision):
                layer(x).square().sum().backward()
            synchronize(device)
            best = min(best, time.perf_counter() - started) if attempt else best
        return best
    except RuntimeError:
        return float("inf")


def autocast(device: torch.device, precision: Precision) -> Any:
    """The context in which a forward pass runs in ``precision``."""
    import torch

    if precision in ("float32", "tf32"):
        return nullcontext()
    return torch.autocast(device.type, dtype=activation_dtype(precision))


def allow_tf32(precision: Precision) -> None:
    """Let an NVIDIA GPU round the factors of float32 products to 10 bits, or forbid it; for the whole process."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def keep_freed_memory() -> bool:
    """Have the C library keep what this process frees, for its next allocation; for the whole process, on Linux.

    A training step asks for the same large blocks each time. By default they go back to the system and come again page
    by page, which can take longer than what is computed in them. Whoever set glibc's own variables is left alone.

    Returns:
        Whether the C library took it; others than glibc do not know it.
    """
    import ctypes
    import os

    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    trim_threshold, mmap_max = -1, -4  # mallopt(3)
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, -1))
    except (OSError, AttributeError):
        return False


def memory_left(device: torch.device) -> int | None:
    """Bytes that can still be had on the device; None where nobody says."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            kilobytes = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    limit = _container_room()
    return min(1024 * kilobytes, limit) if limit is not None else 1024 * kilobytes


def _container_room() -> int | None:
    """What a container's memory limit leaves; None where there is none. Caches of files count as room."""
    try:
        with open("/sys/fs/cgroup/memory.max") as most, open("/sys/fs/cgroup/memory.stat") as stat:
            limit = most.read().strip()
            fields = dict(line.split() for line in stat)
        return None if limit == "max" else int(limit) - int(fields["anon"])
    except (OSError, KeyError, ValueError):
        return None


def memory_peak(device: torch.device) -> int:
    """Most bytes that this process has held so far: of the GPU where it computes on one, else resident. 0: unknown."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError):
        return 0


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that no memory was left."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
