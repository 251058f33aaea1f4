"""Which device and which precision: found by running on it, not by reading its name."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

from groundup.runtime.errors import UsageError

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "bfloat16"]


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

    dtype = getattr(torch, precision)
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
    """The precision to compute in; weights and optimizer state are float32 in either case.

    Args:
        request: ``auto`` takes bfloat16 autocast where products of about the model's size run at least 1.15 times
            faster in it, the
            casts counted in; or ``float32`` or ``bfloat16``.
        rows, width: the typical product of the model: tokens of a micro-batch and n_embd.

    Raises:
        UsageError: the request is unknown, or bfloat16 does not run on this device.
    """
    if request not in ("auto", "float32", "bfloat16"):
        raise UsageError(f"precision = {request} is unknown. Known: auto, float32, bfloat16.")
    if request == "float32":
        return "float32"
    times = {precision: _linear_seconds(device, precision, rows, width) for precision in ("float32", "bfloat16")}
    if request == "bfloat16":
        if times["bfloat16"] == float("inf"):
            raise UsageError(f"precision = bfloat16 does not run on {device}. Use float32 or auto.")
        return "bfloat16"
    return "bfloat16" if times["bfloat16"] * 1.15 < times["float32"] else "float32"


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

    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
