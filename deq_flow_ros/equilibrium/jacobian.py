# SPDX-License-Identifier: Apache-2.0
"""How contractive ``f`` is at a state: tools on its Jacobian, which is never formed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deq_flow_ros.equilibrium.gradients import differentiable, vector_jacobian
from deq_flow_ros.equilibrium.state import Function, State, evaluate, inner, norm, per_sample


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
    trains = torch.is_grad_enabled()
    z, fz = _evaluate(f, state)
    total = torch.zeros_like(inner(z, z).detach())
    for _ in range(samples):
        product = vector_jacobian(fz, z, _random_like(fz, generator), create_graph=trains)
        total = total + inner(product, product)
    elements = sum(math.prod(tensor.shape[1:]) for tensor in z)
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
        length = norm(v).clamp_min(1e-30)  # a power of the Jacobian may vanish
        v = vector_jacobian(fz, z, tuple(t / per_sample(length.to(t.dtype), t) for t in v))
        logarithms.append(norm(v).log())
    return torch.stack(logarithms[iterations // 2 :]).mean(0).exp().to(z[0].dtype)


def _evaluate(f: Function, state: Sequence[Tensor]) -> tuple[State, State]:
    with torch.enable_grad():
        z = differentiable(state)
        return z, evaluate(f, z)


def _random_like(state: State, generator: torch.Generator | None) -> State:
    return tuple(torch.randn(t.shape, dtype=t.dtype, device=t.device, generator=generator) for t in state)
