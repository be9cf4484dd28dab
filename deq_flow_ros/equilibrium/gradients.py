# SPDX-License-Identifier: Apache-2.0
"""Gradients of a fixed point without backpropagation through the solve, and how contractive ``f`` is there."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from deq_flow_ros.equilibrium.fixed_point import Measure, Solution, as_state, evaluate, relative_residual, solve
from deq_flow_ros.equilibrium.solvers import Picard, Solver, make_solver
from deq_flow_ros.equilibrium.stopping import Function, State, StopReason, inner, norm, per_sample

Gradient = Callable[[Function, State], State]


def phantom_gradient(f: Function, state: Sequence[Tensor], steps: int = 1, damping: float = 1.0) -> State:
    """Apply ``f`` with damping ``steps`` times under autograd, to a state that was found without gradients.

    The resulting gradient is the implicit gradient with its Neumann series truncated (arXiv 2204.08442, section 3.2;
    arXiv 2111.05177); ``steps=1`` is the inexact one-step gradient. The memory is that of ``steps`` applications.

    :param state: tensors (B, ...). A tensor that is part of an autograd graph stays so, and passes the gradient on.
    :returns: the state after the steps, attached to the parameters and inputs of ``f``.
    :raises ValueError: for fewer than one step, or a damping outside (0, 1].
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    picard = Picard(damping)
    z = as_state(state)
    for _ in range(steps):
        z = picard.next(z, evaluate(f, z))
    return z


def implicit_gradient(
    f: Function, state: Sequence[Tensor], *, solver: str | Solver = "anderson", max_iterations: int = 30,
    tolerance: float = 1e-6, measure: Measure = relative_residual, report: Callable[[Solution], None] | None = None,
) -> State:  # fmt: skip
    """Give a fixed point the gradient of the implicit function theorem.

    The backward pass solves the adjoint equation ``v = v J + gradient``, with the Jacobian J of ``f`` at the state
    (arXiv 1909.01377, theorem 1; arXiv 2204.08442, section 3.1). The memory is that of one application of ``f``. The
    gradient is exact if ``state`` is a fixed point and the adjoint solve converges. There are no second derivatives.

    :param state: tensors (B, ...). They are detached, because the gradient does not depend on how they were found.
    :param solver: of the adjoint equation; the next three parameters are those of this solve as well.
    :param report: called with the adjoint solution in every backward pass. Without it, a warning says when the
        tolerance is not reached; the gradient is then the best one found.
    :returns: ``f(state)``, attached to the parameters and inputs of ``f``.
    """
    solver = make_solver(solver)
    z, fz = _differentiable(f, state)

    def adjoint(gradients: State) -> State:
        def step(*v: Tensor) -> State:
            return tuple(g + p for g, p in zip(gradients, _vector_jacobian(fz, z, v), strict=True))

        solution = solve(
            step, tuple(g.contiguous() for g in gradients), solver=solver, max_iterations=max_iterations,
            tolerance=tolerance, measure=measure, check_start=False,
        )  # fmt: skip
        if report is not None:
            report(solution)
        elif set(reasons := solution.stop_reasons) != {StopReason.CONVERGED}:
            short, diverged = len(reasons) - reasons.count(StopReason.CONVERGED), reasons.count(StopReason.DIVERGED)
            message = (
                f"the adjoint equation is not solved for {short} of {len(reasons)} samples ({diverged} diverged): "
                f"measure up to {float(solution.residual.max()):.2g}, tolerance {tolerance:g}. Solve for the state "
                "further, allow more iterations, regularize the Jacobian, or use phantom_gradient"
            )
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return solution.state

    return tuple(_Adjoint.apply(adjoint, *fz))  # type: ignore[no-untyped-call]


class _Adjoint(torch.autograd.Function):
    """The identity, whose backward pass replaces the gradients by the solution of the adjoint equation."""

    @staticmethod
    def forward(ctx: Any, adjoint: Callable[[State], State], *state: Tensor) -> State:
        ctx.adjoint = adjoint
        return tuple(tensor.view_as(tensor) for tensor in state)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return (None, *ctx.adjoint(gradients))


def _differentiable(f: Function, state: Sequence[Tensor]) -> tuple[State, State]:
    """A copy of the state, even of one found in inference mode, and ``f`` of it, differentiable with respect to it."""
    tensors = (tensor.clone() if tensor.is_inference() else tensor.detach() for tensor in as_state(state))
    z = tuple(tensor.requires_grad_() for tensor in tensors)
    with torch.enable_grad():
        return z, evaluate(f, z)


def _vector_jacobian(fz: State, z: State, v: State, create_graph: bool = False) -> State:
    """The product ``v J`` with the Jacobian J of ``fz`` with respect to ``z``; zero where ``fz`` ignores ``z``."""
    attached = [(value, vector) for value, vector in zip(fz, v, strict=True) if value.requires_grad]
    if not attached:
        return tuple(torch.zeros_like(tensor) for tensor in z)
    values, vectors = zip(*attached, strict=True)
    return torch.autograd.grad(
        values, z, vectors, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def unroll(f: Function, z0: Sequence[Tensor], iterations: int, detached: Collection[int] = ()) -> list[State]:
    """Apply ``f`` a given number of times under autograd, as a recurrent network does, and return every state.

    :param detached: indices of the tensors of the state that pass no gradient from one iteration to the next (RAFT,
        arXiv 2003.12039, does so with the flow).
    :raises ValueError: for fewer than one iteration, or an index that the state does not have.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    states, z = list[State](), as_state(z0)
    if wrong := [index for index in detached if not 0 <= index < len(z)]:
        raise ValueError(f"detached must name tensors of the state, 0 to {len(z) - 1}, got {wrong}")
    for _ in range(iterations):
        z = evaluate(f, z)
        states.append(z)
        z = tuple(tensor.detach() if index in detached else tensor for index, tensor in enumerate(z))
    return states


def correction_weights(count: int, gamma: float = 0.8) -> list[float]:
    """Weights ``gamma ** (count - i - 1)`` for i = 0 .. count - 1: the last state has weight 1, earlier ones less."""
    return [gamma ** (count - i - 1) for i in range(count)]


def uniform_positions(iterations: int, count: int, gap: int = 1) -> list[int]:
    """At most ``count`` iteration numbers up to ``iterations``, evenly spaced and at least ``gap`` apart.

    :raises ValueError: for numbers below 1, or if there are fewer iterations than the gap.
    """
    if count < 1 or not 1 <= gap <= iterations:
        got = f"count {count}, gap {gap}, iterations {iterations}"
        raise ValueError(f"expected count >= 1 and 1 <= gap <= iterations, got {got}")
    count = min(count, iterations // gap)
    return [iterations * (i + 1) // count for i in range(count)]


def sparse_correction(
    f: Function, z0: Sequence[Tensor], positions: Sequence[int], *, solver: str | Solver = "picard",
    gradient: Gradient | Sequence[Gradient] = phantom_gradient, gradient_steps: int | Sequence[int] = 1,
    tolerance: float | None = None, measure: Measure = relative_residual,
) -> list[State]:  # fmt: skip
    """Sparse fixed-point correction: some states on the way to the fixed point, each with a gradient.

    A loss at them trains the way to the fixed point as well (arXiv 2204.08442, section 3.3). They come from a chain of
    solves: each starts from the previous correction, without the history of the solve before. The steps of the
    gradients count as iterations, so the corrections cost no extra evaluations.

    :param z0: start, tensors (B, ...).
    :param positions: increasing iteration numbers, from 1; the last is the number of all iterations.
    :param gradient: one for all positions, or one per position.
    :param gradient_steps: the evaluations of ``f`` that a gradient makes (1 for ``implicit_gradient``), likewise.
    :param tolerance: of ``measure``; it ends a solve early. Every position still gets its state and gradient.
    :returns: one state per position. Samples that diverge cause no error.
    :raises ValueError: if positions, gradients and steps do not go together.
    """
    count = len(positions)
    gradients = [gradient] * count if callable(gradient) else list(gradient)
    steps = [gradient_steps] * count if isinstance(gradient_steps, int) else list(gradient_steps)
    if not count or any(b <= a for a, b in zip((0, *positions), positions, strict=False)):
        raise ValueError(f"positions must be iteration numbers that increase from 1 on, got {list(positions)}")
    if len(gradients) != count or len(steps) != count:
        got = f"{len(gradients)} and {len(steps)}"
        raise ValueError(f"expected {count} gradients and steps, one per position, got {got}")
    solver = make_solver(solver)
    states: list[State] = []
    z, done = as_state(z0), 0
    for position, attach, needed in zip(positions, gradients, steps, strict=True):
        free = position - done - needed
        if free < 0:
            raise ValueError(
                f"positions {list(positions)} leave no room for {needed} gradient step(s) between {done} and {position}"
            )
        z = tuple(tensor.detach() for tensor in z)
        if free:
            with torch.no_grad():
                z = solve(
                    f, z, solver=solver, max_iterations=free, tolerance=tolerance, measure=measure, check_start=False
                ).state
        z = attach(f, z)
        states.append(z)
        done = position
    return states


def jacobian_penalty(
    f: Function, state: Sequence[Tensor], samples: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Hutchinson's estimate of the squared Frobenius norm of the Jacobian, per element of the state, (B,).

    As a term of the loss it makes ``f`` more contractive, so that solves take fewer iterations (arXiv 2106.14342,
    section 4). It is differentiable with respect to the parameters of ``f`` if gradients are enabled.

    :param state: tensors (B, ...), at which the Jacobian is taken. They are detached.
    :param samples: the number of random directions, >= 1; each costs one product with the Jacobian.
    :param generator: on the state's device, for repeatable directions.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    trains = torch.is_grad_enabled()
    z, fz = _differentiable(f, state)
    total = torch.zeros_like(inner(z, z).detach())
    for _ in range(samples):
        product = _vector_jacobian(fz, z, _random_like(fz, generator), create_graph=trains)
        total = total + inner(product, product)
    elements = sum(math.prod(tensor.shape[1:]) for tensor in z)
    return (total / samples / elements).to(z[0].dtype)


def spectral_radius(
    f: Function, state: Sequence[Tensor], iterations: int = 50, generator: torch.Generator | None = None
) -> Tensor:
    """The largest absolute eigenvalue of the Jacobian, (B,), by power iteration. Below 1, Picard iteration converges.

    It is the geometric mean of the growth over the second half of the iterations, because for a complex pair of
    eigenvalues the growth of single steps has no limit. Parameters are those of ``jacobian_penalty``.

    :param iterations: the number of products with the Jacobian, >= 2.
    """
    if iterations < 2:
        raise ValueError(f"iterations must be at least 2, got {iterations}")
    z, fz = _differentiable(f, state)
    v, logarithms = _random_like(fz, generator), []
    for _ in range(iterations):
        length = norm(v).clamp_min(1e-30)  # a power of the Jacobian may vanish
        v = _vector_jacobian(fz, z, tuple(t / per_sample(length.to(t.dtype), t) for t in v))
        logarithms.append(norm(v).log())
    return torch.stack(logarithms[iterations // 2 :]).mean(0).exp().to(z[0].dtype)


def _random_like(state: State, generator: torch.Generator | None) -> State:
    return tuple(torch.randn(t.shape, dtype=t.dtype, device=t.device, generator=generator) for t in state)
