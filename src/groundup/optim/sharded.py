"""Tensors that FSDP has cut up among ranks, for optimizers that need a part of them, or the whole."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def local_part(tensor: Any) -> Tensor:
    """What lies on this rank of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(part: Tensor, like: Any) -> Tensor:
    """The full tensor of which each rank holds a part, cut as ``like`` is; every rank must ask."""
    if not hasattr(like, "device_mesh"):
        return part
    from torch.distributed.tensor import DTensor

    sharded = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return sharded.full_tensor()


def cut_like(full: Tensor, like: Any) -> Tensor:
    """This rank's part of a tensor that every rank has in full, cut as ``like`` is. Nothing is sent."""
    if not hasattr(like, "device_mesh"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()
