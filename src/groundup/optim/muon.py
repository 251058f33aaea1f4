"""Muon: momentum whose update is made orthogonal (Jordan et al. 2024)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from groundup.optim.sharded import cut_like, local_part, whole

# Quintic coefficients of Jordan et al. 2024: slope at zero as steep as it can be while the iteration stays within
# about [0.7, 1.2].
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(g_NRC: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Push the singular values of each matrix towards 1 by a Newton-Schulz iteration.

    Args:
        g_NRC: a stack of N matrices of equal shape.
        steps: iterations; five bring the singular values to about 0.7 … 1.2, which is all that training needs.
        dtype: what to compute in. bfloat16 is as good for training (Jordan et al. 2024) and faster where it is native.

    Returns:
        In ``dtype``, same shape: approximately U V^T of each matrix's singular value decomposition.
    """
    x = g_NRC.to(dtype)
    wide = x.shape[-2] <= x.shape[-1]
    if not wide:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon for matrices, with decoupled weight decay and updates scaled to AdamW's typical size.

    The scale 0.2 sqrt(max(rows, columns)) is that of Liu et al. 2025 ("Muon is Scalable for LLM Training", section
    2.2): it makes the root mean square of an update that of AdamW, so learning rate and weight decay carry over.
    Matrices of equal shape are updated together, as one batched product. Of matrices that FSDP has sharded every rank
    gathers the whole update and keeps its part: the orthogonalisation is done by all.

    Args:
        params: matrices (two dimensions), or stacks of them such as those of experts (three).
        lr: learning rate, as for AdamW.
        momentum: decay of the mean gradient (Nesterov form).
        weight_decay: decoupled decay.
        dtype: what the orthogonalisation computes in.

    Raises:
        ValueError: a parameter is neither.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim not in (2, 3):
                    raise ValueError(f"Muon updates matrices; got a parameter of shape {list(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every matrix that has a gradient.

        An attribute ``found_inf``, where somebody has set it, says as PyTorch's fused optimizers have it that the
        gradients are not finite (1) or are (0): then nothing changes. On a GPU nobody waits to read it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu":
            if found_inf.item():
                return loss
            found_inf = None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                self._update(parameters, shape, group, found_inf)
        return loss

    def _update(
        self, parameters: list[Tensor], shape: torch.Size, group: dict[str, Any], found_inf: Tensor | None
    ) -> None:
        momentum, allowed = group["momentum"], None if found_inf is None else 1.0 - found_inf
        gradients = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer, gradient = local_part(state["momentum_buffer"]), local_part(parameter.grad)
            if allowed is None:
                buffer.lerp_(gradient, 1 - momentum)
            else:
                gradient = torch.where(allowed > 0, gradient, 0.0)
                buffer.lerp_(gradient, ((1 - momentum) * allowed).expand_as(buffer))
            # Momentum is a matter of each number; what follows is one of the whole matrix.
            gradients.append(whole(gradient.lerp(buffer, momentum), parameter))
        stacked = torch.stack(gradients)
        updates = orthogonalize(stacked.flatten(0, -3), dtype=self.dtype).view_as(stacked)
        rate = group["lr"] if allowed is None else group["lr"] * allowed
        scale = 0.2 * math.sqrt(max(shape[-2:]))
        for parameter, update in zip(parameters, updates, strict=True):
            here = local_part(parameter)
            here.mul_(1 - rate * group["weight_decay"])
            step = cut_like(update, parameter).to(here.dtype)
            if allowed is None:
                here.add_(step, alpha=-rate * scale)
            else:
                here.sub_(step * (rate * scale))
