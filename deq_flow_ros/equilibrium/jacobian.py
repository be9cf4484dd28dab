# SPDX-License-Identifier: Apache-2.0
"""Tools that measure how contractive ``f`` is at a state. They never form the Jacobian matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deq_flow_ros.equilibrium.fixed_point import evaluate
from deq_flow_ros.equilibrium.gradients import differentiable, vector_jacobian
from deq_flow_ros.equilibrium.state import Function, State, per_sample
from deq_flow_ros.equilibrium.stopping import inner, norm


def jacobian_penalty(
    f: Function, state: Sequence[Tensor], samples: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Hutchinson's estimate of the squared Frobenius norm of the Jacobian, per element of the state, (B,).

    As a term of the loss it makes ``f`` more contractive, so that solves take fewer iterations (arXiv 2106.14342,
    section 4). It is differentiable with respect to the parameters of ``f`` if gradients are enabled.

    :param state: tensors (B, ...), the point at which the Jacobian is taken. They are detached.
    :param samples: the number of random directions; each costs one product with the Jacobian.
    :param generator: a generator on the state's device, for repeatable directions.
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
    """The largest absolute eigenvalue of the Jacobian, (B,), by power iteration. Below 1, Picard iteration converges.

    The estimate is the geometric mean of the growth over the second half of the iterations. It also works for a
    complex pair of eigenvalues, for which the growth of single steps has no limit.

    :param state: tensors (B, ...), the point at which the Jacobian is taken.
    :param iterations: the number of products with the Jacobian, >= 2.
    :param generator: a generator on the state's device, for a repeatable start.
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
