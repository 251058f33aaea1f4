"""Quantized weights to numbers on a CPU, in one pass over the codes: quantized.py's ``dequantize``, compiled.

PyTorch would take half a dozen passes, each over four bytes a weight: for a hundred tokens that is longer than their
products take. The numbers are the same, to the last bit.
"""

# O outputs   I inputs   C inputs in whole groups   G groups of a row

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from groundup.runtime.compiled_functions import digest_of, keep_on_disk

SOURCES = digest_of([Path(__file__)])
ROWS_ALONE = 1 << 17  # weights that one thread makes before a second one is worth waking


def _kernel(function: Callable) -> Any:
    compiled = njit(nogil=True, error_model="numpy")(function)
    keep_on_disk(compiled, function, SOURCES)
    return compiled


@_kernel
def _int8(codes_OI, scale_O1, target_OI, begin, end):
    """``scale * code``."""
    for row in range(begin, end):
        scale, codes_I, target_I = scale_O1[row, 0], codes_OI[row], target_OI[row]
        for i in range(target_I.size):
            target_I[i] = np.float32(codes_I[i]) * scale


@_kernel
def _int4(codes_OC, scale_OG, zero_OG, values, group, target_OI, begin, end):
    """``scale * (code - zero)``, or ``scale * values[code]`` where there are values."""
    inputs = target_OI.shape[1]
    for row in range(begin, end):
        for number in range(scale_OG.shape[1]):
            scale, first = scale_OG[row, number], number * group
            zero = np.float32(zero_OG[row, number]) if zero_OG.size else np.float32(8)
            count = min(group, inputs - first)
            codes_I, target_I = codes_OC[row, first // 2 :], target_OI[row, first:]
            if values.size:
                for j in range(count):
                    target_I[j] = values[(codes_I[j // 2] >> (4 * (j & 1))) & 15] * scale
                continue
            for j in range(count // 2):
                code = codes_I[j]
                target_I[2 * j] = (np.float32(code & 15) - zero) * scale
                target_I[2 * j + 1] = (np.float32(code >> 4) - zero) * scale
            if count % 2:
                target_I[count - 1] = (np.float32(codes_I[count // 2] & 15) - zero) * scale


@cache
def _helpers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="groundup-unpack")


def unpack(codes: Tensor, scale: Tensor, zero: Tensor | None, values: Tensor | None, group: int, inputs: int) -> Tensor:
    """The weights of a matrix.

    Args:
        codes: ``int8 O I``, or ``uint8 O (C/2)``.
        scale: ``float32 O 1``, or ``float32 O G``.
        zero: ``uint8 O G``; None stands for 8.
        values: float32, what each of 16 codes stands for before it is scaled; None for itself less the zero.
        group: inputs that share a scale; 0 for int8.
        inputs: I.

    Returns:
        O I, float32.
    """
    outputs = len(codes)
    made = torch.empty(outputs, inputs)
    target = made.numpy()
    if group:
        nothing, no_values = np.zeros((0, 0), np.uint8), np.zeros(0, np.float32)
        zeros, numbers = nothing if zero is None else zero.numpy(), no_values if values is None else values.numpy()
        work = partial(_int4, codes.numpy(), scale.numpy(), zeros, numbers, group, target)
    else:
        work = partial(_int8, codes.numpy(), scale.numpy(), target)
    threads = min(torch.get_num_threads(), max(1, made.numel() // ROWS_ALONE))
    ends = [outputs * number // threads for number in range(threads + 1)]
    others = [_helpers(torch.get_num_threads()).submit(work, begin, end) for begin, end in pairwise(ends[1:])]
    work(0, ends[1])
    for other in others:
        other.result()
    return made
