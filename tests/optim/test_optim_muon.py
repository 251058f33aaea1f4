"""Muon: what its orthogonalisation does to a matrix, and its update, against plain loops."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from groundup.optim import Muon
from groundup.optim.muon import orthogonalize


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(3)


def plain_newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Jordan et al. 2024, one matrix, entry by entry as the formula reads."""
    x = g / g.square().sum().sqrt()
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


@pytest.mark.parametrize("shape", [(31, 67), (67, 31), (41, 41), (1, 29), (29, 1)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    rows, columns = shape
    rank = min(shape)
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -1.2, rank, dtype=torch.float64)  # condition 16
    result = orthogonalize((u @ torch.diag(values) @ vh * 1e3)[None])[0].double()
    assert result.shape == (rows, columns)
    after = u.T @ result @ vh.T  # diagonal exactly when the singular vectors are the same
    assert (after - torch.diag(after.diagonal())).abs().max() < 1e-4
    assert after.diagonal().min() > 0.65
    assert after.diagonal().max() < 1.25


@pytest.mark.parametrize("shape", [(31, 67), (67, 31), (41, 41)])
def test_it_equals_the_plain_loop_and_a_batch_equals_one_by_one(shape: tuple[int, int]) -> None:
    g = torch.randn(5, *shape)
    together = orthogonalize(g)
    for matrix, result in zip(g, together, strict=True):
        torch.testing.assert_close(orthogonalize(matrix[None])[0], result, rtol=0, atol=1e-5)
        expected = plain_newton_schulz(matrix.double())
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)


def test_scale_does_not_matter_and_zero_stays_zero() -> None:
    g = torch.randn(1, 7, 11)
    torch.testing.assert_close(orthogonalize(g * 1e4), orthogonalize(g), rtol=0, atol=1e-5)
    assert torch.equal(orthogonalize(torch.zeros(1, 7, 11)), torch.zeros(1, 7, 11))


def test_bfloat16_is_near_float32() -> None:
    g = torch.randn(3, 31, 67)
    result = orthogonalize(g, dtype=torch.bfloat16)
    assert result.dtype == torch.bfloat16
    singular = torch.linalg.svdvals(result.float())
    assert singular.min() > 0.6
    assert singular.max() < 1.3


def test_its_steps_are_those_of_a_plain_loop() -> None:
    shapes = [(5, 7), (7, 5), (5, 7), (3, 3)]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    expected = [p.detach().double().clone() for p in parameters]
    momenta = [torch.zeros_like(p) for p in expected]
    lr, momentum, decay = 0.03, 0.9, 0.2
    optimizer = Muon(parameters, lr=lr, momentum=momentum, weight_decay=decay)
    for _ in range(4):
        for index, parameter in enumerate(parameters):
            gradient = torch.randn_like(parameter)
            parameter.grad = gradient.clone()
            g = gradient.double()
            momenta[index] = momentum * momenta[index] + (1 - momentum) * g
            nesterov = momentum * momenta[index] + (1 - momentum) * g
            update = (
                plain_newton_schulz(nesterov.T).T
                if shapes[index][0] > shapes[index][1]
                else plain_newton_schulz(nesterov)
            )
            scale = 0.2 * math.sqrt(max(shapes[index]))
            expected[index] = (1 - lr * decay) * expected[index] - lr * scale * update
        optimizer.step()
    for parameter, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), wanted, rtol=0, atol=1e-5)


def test_an_update_is_about_as_large_as_adamws() -> None:
    """Root mean square 0.2, whatever the shape (Liu et al. 2025, section 2.2)."""
    for shape in [(64, 64), (64, 256), (256, 64)]:
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape)
        Muon([parameter], lr=1.0).step()
        assert 0.15 < parameter.detach().square().mean().sqrt().item() < 0.24


def test_a_parameter_without_gradient_is_left_alone() -> None:
    used, unused = nn.Parameter(torch.ones(3, 5)), nn.Parameter(torch.ones(3, 5))
    used.grad = torch.randn(3, 5)
    optimizer = Muon([used, unused], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(unused.detach(), torch.ones(3, 5))
    assert unused not in optimizer.state
    assert not torch.equal(used.detach(), torch.ones(3, 5))


def test_a_closure_is_called_with_gradients_on() -> None:
    parameter = nn.Parameter(torch.randn(3, 5))
    optimizer = Muon([parameter], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    first = optimizer.step(closure)
    assert first is not None
    assert parameter.detach().square().sum().item() < first


@pytest.mark.parametrize("shape", [(3,), (2, 3, 5, 7)])
def test_only_matrices_are_taken(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Muon updates matrices; got a parameter of shape"):
        Muon([nn.Parameter(torch.zeros(shape))], lr=0.1)


def test_its_state_dict_carries_the_momentum() -> None:
    a = nn.Parameter(torch.randn(3, 5))
    b = nn.Parameter(a.detach().clone())
    first, second = Muon([a], lr=0.1), Muon([b], lr=0.1)
    gradients = torch.randn(3, 3, 5)
    for step, gradient in enumerate(gradients):
        a.grad, b.grad = gradient.clone(), gradient.clone()
        first.step()
        if step == 0:
            b.data.copy_(a.data)
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        else:
            second.step()
    assert torch.equal(a, b)


def test_a_stack_of_matrices_is_updated_as_its_matrices() -> None:
    torch.manual_seed(3)
    start, gradients = torch.randn(4, 7, 5), torch.randn(3, 4, 7, 5)
    stack = nn.Parameter(start.clone())
    matrices = [nn.Parameter(matrix.clone()) for matrix in start]
    both = Muon([stack], lr=0.1, weight_decay=0.2), Muon(matrices, lr=0.1, weight_decay=0.2)
    for gradient in gradients:
        stack.grad = gradient.clone()
        for matrix, part in zip(matrices, gradient, strict=True):
            matrix.grad = part.clone()
        for optimizer in both:
            optimizer.step()
    torch.testing.assert_close(stack.detach(), torch.stack([matrix.detach() for matrix in matrices]))
