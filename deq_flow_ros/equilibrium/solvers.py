# SPDX-License-Identifier: Apache-2.0
"""Solvers propose the point at which to evaluate ``f`` next. ``solve`` does everything else: it stops and keeps time.

A solver is a set of settings, so one object can serve any number of solves, even at the same time. All arithmetic is
per sample of the batch and differentiable, and makes no transfer between host and device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from deq_flow_ros.equilibrium.stopping import State, inner, norm, per_sample, subtract

Propose = Callable[[State, State], State]
PATIENCE = 2.0


class Solver(Protocol):
    """How to get from a point and the value of ``f`` there to the next point."""

    @property
    def keeps_best(self) -> bool:
        """Whether the residual may rise. If so, a solve returns its best state, and steps back from unusable points."""

    def start(self) -> Propose:
        """Begin a solve: return a function ``(z, f(z)) -> next z``, to be called after every evaluation."""


@dataclass(frozen=True)
class Picard:
    """Plain fixed-point iteration, ``z <- (1 - damping) z + damping f(z)``.

    :param damping: in (0, 1]; 1 is the undamped iteration.
    """

    damping: float = 1.0
    keeps_best: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0.0 < self.damping <= 1.0:
            raise ValueError(f"damping must be in (0, 1], got {self.damping}")

    def start(self) -> Propose:
        return self.next

    def next(self, z: State, fz: State) -> State:
        """The next iterate; no history is needed."""
        if self.damping == 1.0:
            return fz
        return tuple(torch.lerp(a, b, self.damping) for a, b in zip(z, fz, strict=True))


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration (type II; Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011).

    The next point is the mixture of the last values of ``f`` whose mixed residual is smallest. If the least squares
    problem of the mixture is singular, the solver makes Picard's step. If the last mixture increased the residual to
    more than ``PATIENCE`` times the smallest one in the window, the solver makes Picard's step from the point of that
    smallest residual, and starts a new history.

    :param window: the number of evaluations that are mixed, >= 2.
    :param regularization: of the least squares problem, relative to the mean of the Gram matrix's diagonal.
    """

    window: int = 5
    regularization: float = 1e-8
    keeps_best: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.window < 2 or not self.regularization >= 0.0:
            raise ValueError(f"window must be at least 2 and regularization at least 0, got {self}")

    def start(self) -> Propose:
        return _AndersonRun(self).next


class _AndersonRun:
    """The history of a solve: values, residuals, and of each sample which of them are usable, (B, n) bool."""

    _gram: Tensor
    _usable: Tensor
    _mixed: Tensor

    def __init__(self, settings: Anderson) -> None:
        self._settings = settings
        self._values: list[State] = []
        self._residuals: list[State] = []

    def next(self, z: State, fz: State) -> State:
        self._remember(fz, subtract(fz, z))
        places = torch.arange(len(self._values), device=fz[0].device)
        sizes = self._gram.detach().diagonal(dim1=1, dim2=2)
        best = sizes.masked_fill(~self._usable, torch.inf).argmin(1)
        failed = self._mixed & (sizes[:, -1] > PATIENCE**2 * sizes.gather(1, best[:, None])[:, 0])
        only_best = places == best[:, None]
        self._usable = torch.where(failed[:, None], only_best, self._usable)
        weights, solved = self._mixture()
        latest = (places == len(places) - 1).to(weights.dtype)
        weights = torch.where(solved[:, None], weights, latest)
        weights = torch.where(failed[:, None], only_best.to(weights.dtype), weights)
        self._mixed = solved & ~failed & (self._usable.sum(1) > 1)  # whether this proposal is a mixture
        return _combine(weights, self._values)

    def _remember(self, fz: State, residual: State) -> None:
        """Add an evaluation to the history, and its inner products with the others to the Gram matrix (B, n, n)."""
        if not self._values:
            batch, device = len(fz[0]), fz[0].device
            self._gram = torch.zeros(batch, 0, 0, dtype=torch.float64, device=device)
            self._usable = torch.zeros(batch, 0, dtype=torch.bool, device=device)
            self._mixed = torch.zeros(batch, dtype=torch.bool, device=device)
        elif len(self._values) == self._settings.window:
            self._values.pop(0)
            self._residuals.pop(0)
            self._gram, self._usable = self._gram[:, 1:, 1:], self._usable[:, 1:]
        self._values.append(fz)
        self._residuals.append(residual)
        row = torch.stack([inner(residual, other) for other in self._residuals], 1)  # (B, n)
        above = torch.cat((self._gram, row[:, :-1, None]), 2)
        self._gram = torch.cat((above, row[:, None, :]), 1)
        self._usable = torch.cat((self._usable, torch.ones_like(row[:, :1], dtype=torch.bool)), 1)

    def _mixture(self) -> tuple[Tensor, Tensor]:
        """Weights (B, n) that sum to 1 and give the smallest mixed residual, and whether they could be found (B,)."""
        used = self._usable.to(self._gram.dtype)
        gram = self._gram * used[:, :, None] * used[:, None, :]
        scale = (gram.diagonal(dim1=1, dim2=2).sum(1) / used.sum(1)).clamp_min(torch.finfo(gram.dtype).tiny)
        # An evaluation that is not used becomes an equation of its own, with the solution 0.
        gram = gram / scale[:, None, None] + torch.diag_embed(1 - used + self._settings.regularization * used)
        with torch.no_grad():
            solution, info = torch.linalg.solve_ex(gram, used)
            total = solution.sum(1)
            solved = (info == 0) & torch.isfinite(solution).all(1) & torch.isfinite(total) & (total > 0)
        # A singular system is replaced before the solve that gradients pass through, because it would make them NaN.
        identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        solution, _ = torch.linalg.solve_ex(torch.where(solved[:, None, None], gram, identity), used)
        return solution / solution.sum(1, keepdim=True), solved


@dataclass(frozen=True)
class Broyden:
    """Broyden's good method on ``f(z) - z = 0`` with limited memory (Broyden, Math. Comp. 19, 1965).

    The inverse Jacobian starts as minus the identity, so that the first step is Picard's, and every evaluation corrects
    it by one rank-one term. When there are ``memory`` terms, all are discarded, because each builds on those before it.

    :param memory: the number of rank-one terms kept, >= 1. Each of them holds two states.
    """

    memory: int = 10
    keeps_best: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise ValueError(f"memory must be at least 1, got {self.memory}")

    def start(self) -> Propose:
        return _BroydenRun(self.memory).next


class _BroydenRun:
    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._terms: list[tuple[State, State]] = []  # u, v: the inverse is -I + sum of u v^T
        self._last: tuple[State, State] | None = None  # point and residual

    def next(self, z: State, fz: State) -> State:
        residual = subtract(fz, z)
        if self._last is not None:
            self._learn(subtract(z, self._last[0]), subtract(residual, self._last[1]))
        self._last = z, residual
        direction = residual
        for u, v in self._terms:
            direction = _add_scaled(direction, -inner(v, residual), u)
        return tuple(a + b for a, b in zip(z, direction, strict=True))

    def _learn(self, dz: State, dg: State) -> None:
        """Correct the inverse so that it maps the change of the residual to the change of the point."""
        if len(self._terms) == self._memory:
            self._terms.clear()
        inverse_dg = tuple(-x for x in dg)
        v = tuple(-x for x in dz)
        for u_i, v_i in self._terms:
            inverse_dg = _add_scaled(inverse_dg, inner(v_i, dg), u_i)
            v = _add_scaled(v, inner(u_i, dz), v_i)
        slope = inner(v, dg)
        # A change orthogonal to the step says nothing about the step, and the division below would blow it up.
        usable = (slope.abs() > 1e-8 * norm(v) * norm(dg)) & (slope != 0)
        factor = torch.where(usable, 1 / torch.where(usable, slope, torch.ones_like(slope)), torch.zeros_like(slope))
        self._terms.append((_combine(factor[:, None], [subtract(dz, inverse_dg)]), v))


def _add_scaled(a: State, factors: Tensor, b: State) -> State:
    """``a + factors * b`` with a factor (B,) per sample."""
    return tuple(x + per_sample(factors.to(x.dtype), x) * y for x, y in zip(a, b, strict=True))


def _combine(weights: Tensor, states: Sequence[State]) -> State:
    """``sum_i weights[:, i] * states[i]``, weights (B, n)."""
    result = tuple(per_sample(weights[:, 0].to(x.dtype), x) * x for x in states[0])
    for index, state in enumerate(states[1:], 1):
        result = _add_scaled(result, weights[:, index], state)
    return result


SOLVERS: dict[str, Callable[[], Solver]] = {"picard": Picard, "anderson": Anderson, "broyden": Broyden}


def make_solver(solver: str | Solver) -> Solver:
    """The solver of this name with its default settings, or the solver itself if one is given.

    :raises ValueError: for an unknown name.
    :raises TypeError: for something that is not a solver.
    """
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}; expected one of {', '.join(sorted(SOLVERS))}")
        return SOLVERS[solver]()
    if isinstance(solver, type) or not hasattr(solver, "start"):
        raise TypeError(f"expected the name of a solver or an object such as Anderson(window=3), got {solver!r}")
    return solver
