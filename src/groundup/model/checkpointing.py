"""Gradient checkpointing: compute parts of the forward pass again instead of keeping what they left behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Matrix products are most of the work and little of the memory: selective checkpointing keeps their results.
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def checkpointed(
    block: Callable[[Tensor, Any], Tensor], x_BTE: Tensor, step: Any, how: Literal["none", "block", "selective"]
) -> Tensor:
    """``block(x_BTE, step)``, of which the backward pass computes again what was not kept (Chen et al. 2016).

    Args:
        how: ``none`` keeps everything, ``block`` the input alone, ``selective`` the results of matrix products.
    """
    if how == "none":
        return block(x_BTE, step)
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    result: Tensor = checkpoint(block, x_BTE, step, **options)
    return result


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
