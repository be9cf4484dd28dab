# SPDX-License-Identifier: Apache-2.0
"""``solve``: iterate to ``z = f(z)``, to a cap, or to a deadline, and say which it was."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deq_flow_ros.equilibrium.solvers import Solver, make_solver
from deq_flow_ros.equilibrium.state import Function, State, as_state, evaluate, norm, select, subtract

Measure = Callable[[State, State], Tensor]


class StopReason(str, enum.Enum):
    """Why a solve ended, per sample of the batch."""

    CONVERGED = "converged"
    ITERATIONS = "iterations"
    DEADLINE = "deadline"
    DIVERGED = "diverged"


def absolute_residual(z: State, fz: State) -> Tensor:
    """``||f(z) - z||`` per sample, over all tensors of the state, shape (B,)."""
    return norm(subtract(fz, z))


def relative_residual(z: State, fz: State) -> Tensor:
    """``||f(z) - z|| / ||f(z)||`` per sample, over all tensors of the state, shape (B,)."""
    return absolute_residual(z, fz) / norm(fz).clamp_min(1e-12)


@dataclass
class Solution:
    """What a solve found. "Accepted" is a finite iteration of a sample that had not stopped.

    :ivar state: per sample, the value of ``f`` at the chosen iteration: its last accepted one, or its best.
    :ivar previous: per sample, the point at which that value was taken: ``state - previous`` is the update there.
    :ivar residual: (B,) float32, the measure at the chosen iteration; infinite before the first.
    :ivar iterations: (B,) int64, accepted iterations of each sample.
    :ivar chosen: (B,) int64, the iteration (from 1) whose value ``state`` is; 0 where there was none.
    :ivar evaluations: evaluations of ``f`` made in all; with a batch, at least the largest of ``iterations``.
    :ivar trace: (evaluations, B) float32, the measure at each iteration; NaN where a sample had stopped.
    :ivar trajectory: the values of ``f`` at the iterations asked for by ``keep``, as far as the solve got.
    """

    state: State
    previous: State
    residual: Tensor
    iterations: Tensor
    chosen: Tensor
    evaluations: int
    trace: Tensor
    trajectory: dict[int, State] = field(default_factory=dict)
    _converged: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    _diverged: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    _exhausted: StopReason = StopReason.ITERATIONS

    def samples(self) -> list[tuple[int, float, StopReason]]:
        """Iterations, residual and stop reason of each sample: all that a host asks for, in one transfer."""
        figures = (self.iterations, self.residual, self._converged, self._diverged)
        columns = torch.stack([figure.double() for figure in figures]).tolist()
        return [
            (int(made), left, self._reason(bool(converged), bool(diverged)))
            for made, left, converged, diverged in zip(*columns, strict=True)
        ]

    def _reason(self, converged: bool, diverged: bool) -> StopReason:
        if diverged:
            return StopReason.DIVERGED
        return StopReason.CONVERGED if converged else self._exhausted

    @property
    def stop_reasons(self) -> tuple[StopReason, ...]:
        """Why each sample stopped (reading this waits for the device)."""
        flags = zip(self._converged.tolist(), self._diverged.tolist(), strict=True)
        return tuple(self._reason(converged, diverged) for converged, diverged in flags)


class _Lagged:
    """A boolean of the device, known to the host one iteration late.

    Reading it at once would leave the device idle until the host has queued the next iteration. Samples that are done
    are frozen on the device itself, so that an iteration too many changes no result.
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


class _Books:
    """Per sample: is it still iterated, and which state is its answer so far."""

    def __init__(
        self, z0: State, tolerance: float | None, growth_limit: float | None, best: bool, erratic: bool
    ) -> None:
        device, batch = z0[0].device, z0[0].shape[0]
        self._tolerance, self._growth_limit, self._best, self._erratic = tolerance, growth_limit, best, erratic
        self.state, self.previous = z0, z0
        self.point, self.value = z0, z0  # the last accepted evaluation
        self.active = torch.ones(batch, dtype=torch.bool, device=device)
        self.converged, self.diverged = torch.zeros_like(self.active), torch.zeros_like(self.active)
        self.retry = torch.zeros_like(self.active)
        self.iterations = torch.zeros(batch, dtype=torch.int64, device=device)
        self.chosen = torch.zeros_like(self.iterations)
        self.residual = torch.full((batch,), torch.inf, device=device)
        self._bound = torch.full_like(self.residual, torch.inf)

    def account(self, number: int, z: State, fz: State, measured: Tensor) -> Tensor:
        """Take in iteration ``number``; returns its measure (B,), NaN where the sample had stopped before."""
        with torch.no_grad():
            size = norm(fz)
            usable = torch.isfinite(measured) & torch.isfinite(size)
            if self._growth_limit is not None:
                if number == 1:
                    self._bound = self._growth_limit * torch.maximum(norm(z), size)
                usable = usable & (size <= self._bound)
            accepted = self.active & usable
            improved = accepted & (measured < self.residual) if self._best else accepted
            traced = torch.where(self.active, measured, torch.nan)
            # An accelerated step may overshoot to where f is not defined: from the last usable point, Picard's step is
            # tried before the sample is given up.
            again = self.active & ~usable & ~self.retry & (self.iterations > 0) & self._erratic
            self.diverged = self.diverged | (self.active & ~usable & ~again)
            self.retry = again
            self.residual = torch.where(improved, measured, self.residual)
            self.chosen = torch.where(improved, number, self.chosen)
            self.iterations = self.iterations + accepted
            if self._tolerance is not None:
                self.converged = self.converged | (accepted & (measured <= self._tolerance))
            self.active = (accepted & ~self.converged) | again
        self.point, self.value = _take(accepted, z, self.point), _take(accepted, fz, self.value)
        if self._best:
            self.state, self.previous = _take(improved, fz, self.state), _take(improved, z, self.previous)
        else:
            self.state, self.previous = self.value, self.point
        return traced


def _take(mask: Tensor, new: State, old: State) -> State:
    # On the CPU looking costs nothing and mostly saves a copy; on a GPU it would make the host wait.
    if mask.device.type == "cpu" and bool(mask.all()):
        return new
    return select(mask, new, old)


def solve(
    f: Function,
    z0: Sequence[Tensor],
    *,
    solver: str | Solver = "picard",
    max_iterations: int = 12,
    tolerance: float | None = None,
    measure: Measure = relative_residual,
    best: bool | None = None,
    growth_limit: float | None = 1e6,
    deadline_ns: int | None = None,
    now_ns: Callable[[], int] | None = None,
    min_iterations: int = 0,
    iteration_cost_ns: float = 0.0,
    keep: Collection[int] = (),
    check_start: bool = True,
) -> Solution:
    """Find ``z = f(z)`` from ``z0``; each sample of the batch stops for itself.

    Every state is a value of ``f``: a cap of n gives what n evaluations can, for every solver.

    :param f: takes the tensors of a state, returns as many new ones of the same shapes and types. Called under the
        caller's gradient mode.
    :param z0: the start, tensors of shape (B, ...) on one device, of real floating-point types.
    :param solver: "picard", "anderson", "broyden", or a solver with settings of its own.
    :param max_iterations: evaluations of ``f`` at most, >= 1.
    :param tolerance: a sample has converged when ``measure`` is at or below this; None never stops early.
    :param measure: ``(z, f(z)) -> (B,)``, any unit: ``relative_residual``, ``absolute_residual``, or the caller's own
        (the flow model measures in pixels).
    :param best: return each sample's state of smallest measure instead of its last; None: as the solver asks (Picard
        the last, the others, whose residual can rise, the best).
    :param growth_limit: ``f`` is unusable where its value is so many times longer than the start and the first
        iterate, or not finite; None: only where it is not finite. At such a point a sample has diverged (accelerated
        solvers first try Picard's step from the last usable point).
    :param deadline_ns: absolute time on ``now_ns()``. No iteration is begun that would, by the costs seen so far, end
        after it, not even the first: with no time at all the start is returned after 0 iterations.
    :param now_ns: the clock; None is ``time.monotonic_ns``.
    :param min_iterations: evaluations of ``f`` to make whatever the deadline says.
    :param iteration_cost_ns: expected cost of one iteration; from the second on, this solve's own mean counts if it is
        larger. Without an expectation the mean counts from the first on.
    :param keep: iterations (from 1) whose states to return in ``trajectory``.
    :param check_start: raise where ``f(z0)`` is not finite, which on a GPU waits for the device at the end of the
        solve. If False, such samples have diverged after 0 iterations and keep their start.
    :raises ValueError: for a state that is none, a shape or type that ``f`` changes, or impossible settings.
    :raises FloatingPointError: if ``f(z0)`` is not finite, naming the samples.

    A sample that has diverged keeps its last state (or best) from before.
    """
    solver = make_solver(solver)
    z = as_state(z0)
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    if not 0 <= min_iterations <= max_iterations:
        raise ValueError(f"min_iterations must be from 0 to max_iterations, {max_iterations}, got {min_iterations}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be positive or None, got {tolerance}")
    if growth_limit is not None and not growth_limit > 1:
        raise ValueError(f"growth_limit must be above 1 or None, got {growth_limit}")
    if wrong := [n for n in keep if not 1 <= n <= max_iterations]:
        raise ValueError(f"keep must name iterations from 1 to max_iterations, {max_iterations}, got {wrong}")

    device = z[0].device
    now_ns = time.monotonic_ns if now_ns is None else now_ns
    books = _Books(z, tolerance, growth_limit, solver.keeps_best if best is None else best, solver.keeps_best)
    propose = solver.start()
    trace: list[Tensor] = []
    trajectory: dict[int, State] = {}
    all_done = _Lagged(device)
    exhausted = StopReason.ITERATIONS
    if deadline_ns is not None and device.type == "cuda":
        torch.cuda.synchronize(device)  # work of before that is still queued would count as none
    started, cost_ns = now_ns(), iteration_cost_ns
    waits = tolerance is not None or deadline_ns is not None
    # The first iteration often costs more than those after it, and of a GPU's the host has seen the begin, not the end:
    # with an expectation to go by, it is not taken for the rule.
    timed_after = 2 if iteration_cost_ns or device.type == "cuda" else 1
    for n in range(1, max_iterations + 1):
        if all_done.read(wait=waits):
            break
        if deadline_ns is not None:
            now = now_ns()
            if n > timed_after:
                # The mean of this solve tells more than the expectation: the load of the machine is that of now.
                cost_ns = max(cost_ns, (now - started) / max(1, n - 1 - all_done.in_flight))
            if n > min_iterations and now + (1 + all_done.in_flight) * cost_ns > deadline_ns:
                exhausted = StopReason.DEADLINE
                break
        if n > 1:
            # A solver sees usable evaluations only, and what it proposes for samples that are done is not evaluated.
            z = propose(books.point, books.value)
            if z is not books.value:  # as it is for undamped Picard
                z = _take(books.active & ~books.retry, z, books.value)
        fz = evaluate(f, z)
        with torch.no_grad():
            measured = measure(z, fz)
            if measured.shape != books.active.shape:
                raise ValueError(f"measure must return shape {tuple(books.active.shape)}, got {tuple(measured.shape)}")
        trace.append(books.account(n, z, fz, measured.float()))
        all_done.push(~books.active.any())
        if n in keep:
            trajectory[n] = books.value
    if check_start and trace and bool((unusable := books.diverged & (books.iterations == 0)).any()):
        raise FloatingPointError(
            f"expected f(z0) to be finite, got NaN or infinity for sample(s) {unusable.nonzero().flatten().tolist()} "
            f"of {len(unusable)}; are z0 and what f depends on finite?"
        )
    return Solution(
        state=books.state, previous=books.previous, residual=books.residual, iterations=books.iterations,
        chosen=books.chosen, evaluations=len(trace),
        trace=torch.stack(trace) if trace else books.residual.new_empty(0, len(books.residual)),
        trajectory=trajectory, _converged=books.converged, _diverged=books.diverged, _exhausted=exhausted,
    )  # fmt: skip
