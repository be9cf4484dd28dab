# SPDX-License-Identifier: Apache-2.0
"""``solve``: iterate ``z <- f(z)`` to a fixed point, to a cap, or to a deadline, and say which it was."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

State = tuple[Tensor, ...]
Function = Callable[..., Sequence[Tensor]]
Measure = Callable[[State, State], Tensor]


class StopReason(str, enum.Enum):
    """Why a solve ended, per sample of the batch."""

    CONVERGED = "converged"
    ITERATIONS = "iterations"
    DEADLINE = "deadline"
    DIVERGED = "diverged"


class Solver(Protocol):
    """Chooses the next point to evaluate. One object serves one solve; it may keep a history."""

    def next(self, z: State, fz: State) -> State:
        """The next iterate, from the present one and the value of ``f`` there."""


@dataclass
class Picard:
    """Plain fixed-point iteration, ``z <- (1 - damping) z + damping f(z)``.

    The default of the method's second release, and hard to beat for a trained update operator.

    :param damping: in (0, 1]; 1 is the undamped iteration.
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.damping <= 1.0:
            raise ValueError(f"damping must be in (0, 1], got {self.damping}")

    def next(self, z: State, fz: State) -> State:
        if self.damping == 1.0:
            return fz
        return tuple(torch.lerp(a, b, self.damping) for a, b in zip(z, fz, strict=True))


SOLVERS: dict[str, Callable[[], Solver]] = {"picard": Picard}


def make_solver(solver: str | Callable[[], Solver]) -> Solver:
    """A fresh solver, by name or from what makes one (a class, a ``functools.partial``).

    :raises ValueError: for an unknown name.
    """
    if not isinstance(solver, str):
        return solver()
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; expected one of {', '.join(sorted(SOLVERS))}")
    return SOLVERS[solver]()


def relative_residual(z: State, fz: State) -> Tensor:
    """``||f(z) - z|| / ||f(z)||`` per sample, over all tensors of the state, shape (B,)."""
    difference = torch.stack([(b - a).flatten(1).float().square().sum(1) for a, b in zip(z, fz, strict=True)]).sum(0)
    norm = torch.stack([b.flatten(1).float().square().sum(1) for b in fz]).sum(0)
    return (difference / norm.clamp_min(1e-12)).sqrt()


@dataclass
class Solution:
    """What a solve found.

    :ivar state: per sample, the value of ``f`` at its last accepted iteration.
    :ivar previous: per sample, the point at which that value was taken: ``state - previous`` is the last update.
    :ivar iterations: (B,) int64, evaluations of ``f`` that went into each sample's state.
    :ivar residual: (B,) float32, the measure at the last accepted iteration; infinite before the first.
    :ivar trajectory: the states at the iterations asked for by ``keep``.
    :ivar evaluations: evaluations of ``f`` made in all; with a batch, at least the largest of ``iterations``.
    """

    state: State
    previous: State
    iterations: Tensor
    residual: Tensor
    evaluations: int
    trajectory: dict[int, State] = field(default_factory=dict)
    _converged: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    _diverged: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    _exhausted: StopReason = StopReason.ITERATIONS

    @property
    def stop_reasons(self) -> tuple[StopReason, ...]:
        """Why each sample stopped (reading this waits for the device)."""
        reasons = []
        for converged, diverged in zip(self._converged.tolist(), self._diverged.tolist(), strict=True):
            if diverged:
                reasons.append(StopReason.DIVERGED)
            else:
                reasons.append(StopReason.CONVERGED if converged else self._exhausted)
        return tuple(reasons)


class _Lagged:
    """A boolean of the device, known to the host one iteration late.

    Reading it at once would make the host wait for the device in every iteration. Samples that are done are frozen on
    the device itself, so that an iteration too many changes no result.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pending: list[tuple[torch.cuda.Event, Tensor]] = []
        self._value = False

    def push(self, flag: Tensor) -> None:
        if not self._cuda:
            self._value = bool(flag)
            return
        event = torch.cuda.Event()
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(flag, non_blocking=True)
        event.record(torch.cuda.current_stream(flag.device))
        self._pending.append((event, host))

    @property
    def in_flight(self) -> int:
        """Iterations begun whose flag has not arrived."""
        return len(self._pending)

    def read(self, *, wait: bool) -> bool:
        """The last value that has arrived; with ``wait``, at least that of the iteration before the last."""
        while self._pending and ((wait and len(self._pending) > 1) or self._pending[0][0].query()):
            event, host = self._pending.pop(0)
            event.synchronize()
            self._value = bool(host)
        return self._value


def _checked(value: Sequence[Tensor], like: State) -> State:
    state = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(state) != len(like):
        raise ValueError(f"f must return {len(like)} tensors as in the state it was given, got {len(state)}")
    for index, (new, old) in enumerate(zip(state, like, strict=True)):
        if new.shape != old.shape:
            raise ValueError(
                f"f must keep the shape of every tensor of the state: tensor {index} was {tuple(old.shape)}, "
                f"f returned {tuple(new.shape)}"
            )
    return state


def _select(mask: Tensor, yes: State, no: State) -> State:
    return tuple(torch.where(mask.view(-1, *([1] * (a.dim() - 1))), a, b) for a, b in zip(yes, no, strict=True))


def solve(
    f: Function,
    z0: Sequence[Tensor],
    *,
    solver: str | Solver = "picard",
    max_iterations: int = 12,
    tolerance: float | None = None,
    measure: Measure = relative_residual,
    deadline_ns: int | None = None,
    min_iterations: int = 0,
    iteration_cost_ns: float = 0.0,
    keep: Collection[int] = (),
) -> Solution:
    """Find ``z = f(z)`` from ``z0``; each sample of the batch stops for itself.

    :param f: takes the tensors of a state, returns as many of the same shapes. Called under the caller's gradient mode.
    :param z0: the start, tensors of shape (B, ...) on one device.
    :param solver: "picard", or an object with a ``next`` method of its own settings.
    :param max_iterations: evaluations of ``f`` at most, >= 1.
    :param tolerance: a sample has converged when ``measure`` is at or below this; None never stops early.
    :param measure: ``(z, f(z)) -> (B,)``, any unit (the flow model measures in pixels).
    :param deadline_ns: absolute time on ``time.monotonic_ns()``. No iteration is begun that would, by the costs seen so
        far, end after it, not even the first: with no time at all the start is returned after 0 iterations.
    :param min_iterations: evaluations of ``f`` to make whatever the deadline says.
    :param iteration_cost_ns: expected cost of one iteration, used until one has been measured.
    :param keep: iterations (from 1) whose states to return in ``trajectory``.
    :raises ValueError: for an empty state, unequal batch sizes, a shape that ``f`` changes, or impossible settings.

    A sample whose measure is not finite has diverged: it keeps its last finite state.
    """
    if isinstance(solver, str):
        solver = make_solver(solver)
    z = tuple(z0)
    if not z:
        raise ValueError("the state must hold at least one tensor, got an empty tuple")
    if len({tensor.shape[0] for tensor in z}) != 1:
        raise ValueError(f"the tensors of a state must share their batch size, got {[tuple(t.shape) for t in z]}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be positive or None, got {tolerance}")

    device, batch = z[0].device, z[0].shape[0]
    state, previous = z, z
    active = torch.ones(batch, dtype=torch.bool, device=device)
    converged, diverged = torch.zeros_like(active), torch.zeros_like(active)
    iterations = torch.zeros(batch, dtype=torch.int64, device=device)
    residual = torch.full((batch,), torch.inf, device=device)
    trajectory: dict[int, State] = {}
    all_done = _Lagged(device)
    exhausted = StopReason.ITERATIONS
    if deadline_ns is not None and device.type == "cuda":
        torch.cuda.synchronize(device)  # work of before that is still queued would count as none
    started, evaluations, cost_ns = time.monotonic_ns(), 0, iteration_cost_ns
    for n in range(1, max_iterations + 1):
        if all_done.read(wait=deadline_ns is not None):
            break
        if deadline_ns is not None:
            now = time.monotonic_ns()
            if evaluations > 1:
                # The mean of this solve tells more than the expectation: the load of the machine is that of now.
                cost_ns = max(cost_ns, (now - started) / evaluations)
            if n > min_iterations and now + (1 + all_done.in_flight) * cost_ns > deadline_ns:
                exhausted = StopReason.DEADLINE
                break
        fz = _checked(f(*z), z)
        evaluations = n
        with torch.no_grad():
            value = measure(z, fz).float()
            finite = torch.isfinite(value)
            diverged = diverged | (active & ~finite)
            accepted = active & finite
            residual = torch.where(accepted, value, residual)
            iterations = iterations + accepted
        state, previous = _select(accepted, fz, state), _select(accepted, z, previous)
        if n in keep:
            trajectory[n] = state
        with torch.no_grad():
            if tolerance is not None:
                converged = converged | (accepted & (value <= tolerance))
            active = active & finite & ~converged
            all_done.push(~active.any())
        z = solver.next(z, fz)
    return Solution(state, previous, iterations, residual, evaluations, trajectory, converged, diverged, exhausted)
