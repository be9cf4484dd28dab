# SPDX-License-Identifier: Apache-2.0
"""How contractive ``f`` is at a state: tools on its Jacobian, which is never formed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deq_flow_ros.equilibrium.state import Function, State, checked, inner, norm, per_sample


def jacobian_penalty(
    f: Function, state: Sequence[Tensor], samples: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Hutchinson's estimate of the squared Frobenius norm of the Jacobian, per element of the state, (B,).

    As a term of the loss it makes ``f`` more contractive, so that solves take fewer iterations (arXiv 2106.14342,
    section 4). Differentiable with respect to the parameters of ``f`` where gradients are enabled.

    :param state: tensors (B, ...), where to take the Jacobian; detached here.
    :param samples: random directions; one product with the Jacobian each.
    :param generator: of the state's device, for repeatable directions.
    :raises ValueError: for fewer than one sample.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    differentiable = torch.is_grad_enabled()
    z, fz = _evaluate(f, state)
    total = torch.zeros_like(inner(z, z).detach())
    for _ in range(samples):
        v = _random_like(fz, generator)
        product = torch.autograd.grad(fz, z, v, create_graph=differentiable, retain_graph=True, allow_unused=True)
        total = total + sum(inner((p,), (p,)) for p in product if p is not None)
    elements = sum(tensor[0].numel() for tensor in z)
    return (total / samples / elements).to(z[0].dtype)


def spectral_radius(
    f: Function, state: Sequence[Tensor], iterations: int = 50, generator: torch.Generator | None = None
) -> Tensor:
    """Largest absolute eigenvalue of the Jacobian, (B,), by power iteration: below 1 Picard iteration converges.

    The estimate is the mean growth (geometric) over the second half of the iterations, which also holds for a
    complex pair of eigenvalues, where the growth of single steps has no limit.

    :param state: tensors (B, ...), where to take the Jacobian.
    :param iterations: products with the Jacobian, >= 2.
    :param generator: of the state's device, for a repeatable start.
    :raises ValueError: for fewer than two iterations.
    """
    if iterations < 2:
        raise ValueError(f"iterations must be at least 2, got {iterations}")
    z, fz = _evaluate(f, state)
    v = _random_like(fz, generator)
    logarithms = []
    for _ in range(iterations):
        length = norm(v).clamp_min(torch.finfo(torch.float64).tiny)
        v = tuple(t / per_sample(length.to(t.dtype), t) for t in v)
        product = torch.autograd.grad(fz, z, v, retain_graph=True, allow_unused=True)
        v = tuple(torch.zeros_like(t) if p is None else p for p, t in zip(product, z, strict=True))
        logarithms.append(norm(v).log())
    return torch.stack(logarithms[iterations // 2 :]).mean(0).exp().to(z[0].dtype)


def _evaluate(f: Function, state: Sequence[Tensor]) -> tuple[State, State]:
    with torch.enable_grad():
        z: State = tuple(tensor.detach().requires_grad_() for tensor in state)
        return z, checked(f(*z), z)


def _random_like(state: State, generator: torch.Generator | None) -> State:
    return tuple(torch.randn(t.shape, dtype=t.dtype, device=t.device, generator=generator) for t in state)
