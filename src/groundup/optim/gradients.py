"""What happens to gradients between the backward pass and the optimizer's step: scaled, noised, clipped, watched."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from groundup.optim.sharded import cut_like, local_part

NOISE_DECAY = 0.55  # gamma of Neelakantan et al. 2015, eq. 1
SMALLEST_NORM = 1e-3  # of weights, for adaptive clipping: those that begin at zero must be able to leave it


def total_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients taken together; over all ranks where they are sharded. On their device."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


@torch.no_grad()
def scale_gradients(parameters: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply every gradient by a factor."""
    gradients = [local_part(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


@torch.no_grad()
def clip_gradients(parameters: Sequence[Tensor], norm: Tensor, limit: float) -> None:
    """Scale all gradients down so that their common norm is at most ``limit`` (Pascanu et al. 2013).

    On a CPU, where reading the norm costs nothing, gradients that are short enough are not touched at all.

    Args:
        norm: what :func:`total_norm` gave; not finite, it leaves them as they are.
        limit: 0 for none.
    """
    if not limit or (norm.device.type == "cpu" and not norm.item() > limit):
        return
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    scale_gradients(parameters, torch.where(factor.isfinite(), factor, torch.ones_like(factor)))


@torch.no_grad()
def clip_adaptively(parameters: Sequence[Tensor], limit: float) -> None:
    """Bound each row's gradient by the norm of the row of weights it belongs to (Brock et al. 2021, eq. 3).

    A row is all weights that make one output: of a vector the whole of it. Sharded parameters are cut between rows.

    Args:
        limit: the largest ratio of the two norms.
    """
    for parameter in parameters:
        if parameter.grad is None:
            continue
        weight, gradient = local_part(parameter), local_part(parameter.grad)
        axes = tuple(range(1, weight.ndim)) if weight.ndim > 1 else (0,)
        if weight.ndim == 3:  # a stack of matrices: rows within each
            axes = (2,)
        allowed = limit * _norm(weight, axes).clamp(min=SMALLEST_NORM)
        gradient.mul_((allowed / _norm(gradient, axes).clamp(min=1e-6)).clamp(max=1.0))


def _norm(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(tensor, dim=axes, keepdim=True)


@torch.no_grad()
def add_noise(parameters: Sequence[Tensor], eta: float, step: int, seed: int) -> None:
    """Add Gaussian noise of variance eta / (1 + step)^0.55 to every gradient (Neelakantan et al. 2015, eq. 1).

    A pure function of seed and step, and so the same on every rank and after a resume.
    """
    deviation = math.sqrt(eta / (1 + step) ** NOISE_DECAY)
    device = parameters[0].device
    generator = torch.Generator(device).manual_seed(seed % 2**63)
    for parameter in parameters:
        if parameter.grad is None:
            continue
        noise = torch.randn(parameter.shape, generator=generator, device=device, dtype=parameter.dtype)
        local_part(parameter.grad).add_(cut_like(noise, parameter), alpha=deviation)


class LossScale:
    """The factor that keeps small gradients from vanishing in float16 (Micikevicius et al. 2018, section 3.2).

    Halved when gradients overflow, doubled after ``patience`` steps in which none did. It stays on the device: nobody
    waits for it.

    Args:
        device: where the loss is.
        start: at first.
        patience: steps.
    """

    def __init__(self, device: torch.device, start: float = 2.0**16, patience: int = 2000) -> None:
        self.scale = torch.tensor(start, device=device)
        self._good = torch.zeros((), device=device)
        self.patience = patience

    def update(self, overflowed: Tensor) -> None:
        """Take note of a step; ``overflowed`` is 1 where its gradients were not finite, else 0."""
        self._good = torch.where(overflowed > 0, 0.0, self._good + 1)
        grow = self._good >= self.patience
        self.scale = self.scale * torch.where(overflowed > 0, 0.5, torch.where(grow, 2.0, 1.0))
        self._good = torch.where(grow, 0.0, self._good)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "good": self._good}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        self.scale, self._good = (state[key].to(self.scale.device) for key in ("scale", "good"))
