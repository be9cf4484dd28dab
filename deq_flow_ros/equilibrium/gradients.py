# SPDX-License-Identifier: Apache-2.0
"""Gradients through a fixed point without unrolling the solve, and losses along the way to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from deq_flow_ros.equilibrium.solvers import Function, Picard, Solver, State, make_solver, solve

Gradient = Callable[[Function, State], State]


def phantom_gradient(f: Function, state: Sequence[torch.Tensor], steps: int = 1, damping: float = 1.0) -> State:
    """Re-attach a state found without gradient, by ``steps`` damped applications of ``f`` under autograd.

    The gradient is that of the truncated Neumann series of the implicit one (arXiv 2204.08442, section 3.2;
    arXiv 2111.05177): with ``steps=1`` the inexact one-step gradient. Memory is that of ``steps`` applications,
    whatever the number of iterations that led to ``state``.

    :param state: tensors (B, ...); detached here.
    :returns: the state after the steps, attached to the parameters and inputs of ``f``.
    :raises ValueError: for fewer than one step, or a damping outside (0, 1].
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    picard = Picard(damping)
    z: State = tuple(tensor.detach() for tensor in state)
    for _ in range(steps):
        z = picard.next(z, tuple(f(*z)))
    return z


def correction_weights(count: int, gamma: float = 0.8) -> list[float]:
    """``gamma ** (count - i - 1)`` for i = 0 .. count - 1: the last state counts fully, earlier ones less."""
    return [gamma ** (count - i - 1) for i in range(count)]


def sparse_correction(
    f: Function,
    z0: Sequence[torch.Tensor],
    positions: Sequence[int],
    *,
    solver: str | Callable[[], Solver] = "picard",
    gradient: Gradient = phantom_gradient,
    gradient_steps: int = 1,
) -> list[State]:
    """The states of one trajectory at ``positions``, each attached by ``gradient``: sparse fixed-point correction.

    A loss at a few states of the trajectory, instead of its end alone, keeps the iterations on course
    (arXiv 2204.08442, section 3.3). The solve goes on from each corrected state, so the correction costs no
    evaluation of ``f`` beyond those of the trajectory.

    :param z0: start, tensors (B, ...).
    :param positions: increasing iteration numbers, from 1; the last is the length of the trajectory.
    :param solver: a name, or what makes a fresh solver for each stretch.
    :param gradient: attaches a state in ``gradient_steps`` further evaluations of ``f``.
    :returns: one state per position.
    :raises ValueError: if positions are empty, or too close for the steps of the gradient to fit between them.
    """
    if not positions:
        raise ValueError("sparse correction needs at least one position")
    states: list[State] = []
    z: State = tuple(z0)
    done = 0
    for position in positions:
        free = position - done - gradient_steps
        if free < 0:
            raise ValueError(
                f"positions {list(positions)} leave no room for {gradient_steps} gradient step(s) "
                f"between {done} and {position}"
            )
        if free:
            with torch.no_grad():
                z = solve(f, z, solver=make_solver(solver), max_iterations=free).state
        states.append(gradient(f, z))
        z = tuple(tensor.detach() for tensor in states[-1])
        done = position
    return states
