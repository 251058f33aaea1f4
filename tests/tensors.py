"""Comparing tensors by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """The same names, types, shapes and bits."""
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        other = theirs[name]
        assert other.dtype == tensor.dtype, name
        assert other.shape == tensor.shape, name
        assert torch.equal(other, tensor), name
