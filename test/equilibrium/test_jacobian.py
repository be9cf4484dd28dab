# SPDX-License-Identifier: Apache-2.0
"""Jacobian tools against matrices whose norms and eigenvalues are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deq_flow_ros.equilibrium import jacobian_penalty, spectral_radius


def linear(matrices: Tensor):
    """f on a state of two tensors, one matrix (B, 6, 6) per sample."""

    def f(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.einsum("bij,bj->bi", matrices, torch.cat((u.flatten(1), v), 1))
        return z[:, :4].reshape(-1, 2, 2), z[:, 4:]

    return f


STATE = (torch.zeros(2, 2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64))


def matrices() -> Tensor:
    return torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_penalty_estimates_the_frobenius_norm_and_has_its_gradient() -> None:
    """Why: a regularizer must measure what it claims, per sample, and pull the parameters the right way."""
    a = matrices().requires_grad_()
    penalty = jacobian_penalty(linear(a), STATE, samples=3000, generator=torch.Generator().manual_seed(0))
    true = a.square().sum((1, 2)) / 6
    torch.testing.assert_close(penalty, true, rtol=0.05, atol=0)
    (got,), (expected,) = torch.autograd.grad(penalty.sum(), a), torch.autograd.grad(true.sum(), a)
    assert float((got - expected).norm() / expected.norm()) < 0.1
    with torch.no_grad():
        assert not jacobian_penalty(linear(a), STATE).requires_grad
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        jacobian_penalty(linear(a), STATE, samples=0)


def test_spectral_radius_of_real_and_complex_eigenvalues() -> None:
    """Why: it says whether Picard converges; a complex pair of eigenvalues defeats naive power iteration."""
    basis = matrices()
    real = torch.diag(torch.tensor([0.9, -0.5, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64))
    spiral = real.clone()
    spiral[:2, :2] = 0.8 * torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    spiral[2, 2] = 0.1
    a = basis @ torch.stack((real, spiral)) @ torch.linalg.inv(basis)
    radius = spectral_radius(linear(a), STATE, iterations=400, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(radius, torch.tensor([0.9, 0.8], dtype=torch.float64), rtol=0.01, atol=0)
    with pytest.raises(ValueError, match="iterations must be at least 2, got 1"):
        spectral_radius(linear(a), STATE, iterations=1)


def test_a_jacobian_that_vanishes_has_radius_zero() -> None:
    """Why: the best f there is must not come out as NaN; in float32 the smallest numbers are soon 0."""
    nilpotent = torch.zeros(1, 6, 6)
    nilpotent[0, 0, 1] = 1.0
    state = (torch.zeros(1, 2, 2), torch.zeros(1, 2))
    assert spectral_radius(linear(nilpotent), state).item() == pytest.approx(0.0, abs=1e-6)
    assert spectral_radius(lambda u, v: (torch.ones_like(u), 0.5 * v), state).item() == pytest.approx(0.5)
