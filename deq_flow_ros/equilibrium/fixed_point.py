# SPDX-License-Identifier: Apache-2.0
"""``solve``: iterate to ``z = f(z)``, to a cap, or to a deadline, and say which it was."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deq_flow_ros.equilibrium.solvers import Solver, make_solver
from deq_flow_ros.equilibrium.state import Function, State, as_state, evaluate, norm, subtract
from deq_flow_ros.equilibrium.stopping import Immediate, Pace, Progress, Queued, Rules, Samples, StopReason, Unseen

Measure = Callable[[State, State], Tensor]


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
    _check_start: bool = False

    @classmethod
    def of(
        cls, samples: Samples, evaluations: int, exhausted: StopReason, trace: Sequence[Tensor] = (), **more: Any
    ) -> Solution:
        """What is known of the samples when the last iteration is made."""
        residual = samples.residual
        return cls(
            state=samples.state, previous=samples.previous, residual=residual, iterations=samples.iterations,
            chosen=samples.chosen, evaluations=evaluations,
            trace=torch.stack(list(trace)) if trace else residual.new_empty(0, len(residual)),
            _converged=samples.converged, _diverged=samples.diverged, _exhausted=exhausted, **more,
        )  # fmt: skip

    def figures(self) -> Tensor:
        """(B, 4) float64, on the device: iterations, residual, converged, diverged; ``samples`` reads them."""
        columns = (self.iterations, self.residual, self._converged, self._diverged)
        return torch.stack([column.double() for column in columns], 1)

    def samples(self, figures: Sequence[Sequence[float]] | None = None) -> list[tuple[int, float, StopReason]]:
        """Iterations, residual and stop reason of each sample: all that a host asks for, in one transfer.

        :param figures: ``figures()``, if the host has them already.
        :raises FloatingPointError: as ``solve``, where it has not said so.
        """
        rows = self.figures().tolist() if figures is None else figures
        self._checked([made == 0 and bool(diverged) for made, _, _, diverged in rows])
        return [
            (int(made), left, self._reason(bool(converged), bool(diverged))) for made, left, converged, diverged in rows
        ]

    def _reason(self, converged: bool, diverged: bool) -> StopReason:
        if diverged:
            return StopReason.DIVERGED
        return StopReason.CONVERGED if converged else self._exhausted

    def _checked(self, unusable: Sequence[bool]) -> None:
        if self._check_start and any(unusable):
            raise FloatingPointError(
                f"expected f(z0) to be finite, got NaN or infinity for sample(s) "
                f"{[place for place, bad in enumerate(unusable) if bad]} of {len(unusable)}; are z0 and what f depends "
                "on finite?"
            )

    @property
    def stop_reasons(self) -> tuple[StopReason, ...]:
        """Why each sample stopped (reading this waits for the device).

        :raises FloatingPointError: as ``solve``, where it has not said so.
        """
        return tuple(reason for _, _, reason in self.samples())


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
    watch: bool = True,
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
    :param check_start: raise where ``f(z0)`` is not finite; on a GPU, whose values the host does not wait for, when
        ``samples`` or ``stop_reasons`` of the solution are read. If False, such samples have diverged after 0
        iterations and keep their start.
    :param watch: False makes all of ``max_iterations`` without a look at how the samples do, as code must that is
        captured in a graph; they stop as ever.
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
    on_host = device.type == "cpu"
    best = solver.keeps_best if best is None else best
    rules = Rules(tolerance, growth_limit, best, solver.keeps_best, look=watch and on_host)
    samples, propose = rules.begin(z), solver.start()
    trace: list[Tensor] = []
    trajectory: dict[int, State] = {}
    progress: Progress = Unseen() if not watch else Immediate() if on_host else Queued(device)
    # The first iteration often costs more than those after it, and of a GPU's the host has seen the begin, not the end:
    # with an expectation to go by, it is not taken for the rule.
    timed_after = 2 if iteration_cost_ns or not on_host else 1
    watched = tolerance is not None or deadline_ns is not None
    pace = Pace(progress, max_iterations, deadline_ns, now_ns, min_iterations, iteration_cost_ns, watched, timed_after)
    while pace.may_begin():
        if pace.begun > 1:
            # A solver sees usable evaluations only, and what it proposes for samples that are done is not evaluated.
            z = propose(samples.point, samples.value)
            if z is not samples.value:  # as it is for undamped Picard
                z = rules.take(samples.active & ~samples.retry, z, samples.value)
        fz = evaluate(f, z)
        with torch.no_grad():
            measured = measure(z, fz)
            if measured.shape != samples.active.shape:
                raise ValueError(
                    f"measure must return shape {tuple(samples.active.shape)}, got {tuple(measured.shape)}"
                )
        samples, traced = rules.account(samples, z, fz, measured.float())
        trace.append(traced)
        progress.push(samples.active)
        if pace.begun in keep:
            trajectory[pace.begun] = samples.value
    solution = Solution.of(
        samples, pace.begun, pace.exhausted, trace, trajectory=trajectory, _check_start=check_start and bool(trace)
    )
    if check_start and on_host:
        solution.samples()
    return solution
