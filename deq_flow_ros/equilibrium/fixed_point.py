# SPDX-License-Identifier: Apache-2.0
"""``solve`` iterates until ``z = f(z)``, a number of iterations or a deadline is reached, and says which it was."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from deq_flow_ros.equilibrium.solvers import Solver, make_solver
from deq_flow_ros.equilibrium.stopping import Function, Pace, Queued, Rules, Samples, State, StopReason, norm, subtract

Measure = Callable[[State, State], Tensor]


def absolute_residual(z: State, fz: State) -> Tensor:
    """``||f(z) - z||`` per sample, over all tensors of the state, shape (B,)."""
    return norm(subtract(fz, z))


def relative_residual(z: State, fz: State) -> Tensor:
    """``||f(z) - z|| / ||f(z)||`` per sample, over all tensors of the state, shape (B,)."""
    return absolute_residual(z, fz) / norm(fz).clamp_min(1e-12)


class Solution:
    """The result of a solve: what is known of the samples after the last iteration.

    An iteration is accepted for a sample if the sample had not stopped before and the value of ``f`` is usable.

    :ivar state: for each sample, the value of ``f`` at the chosen iteration: its last accepted one, or its best.
    :ivar previous: the point at which that value was taken, so that ``state - previous`` is the update there.
    :ivar residual: (B,) float32, the measure at the chosen iteration; infinite if there is none.
    :ivar iterations: (B,) int64, the number of accepted iterations of each sample.
    :ivar evaluations: the number of evaluations of ``f``, at least the largest of ``iterations``.
    :ivar trace: (evaluations, B) float32, the measure at each iteration; NaN where a sample had stopped.
    :ivar trajectory: the values of ``f`` at the iterations that ``keep`` asked for, as far as the solve got.
    """

    def __init__(
        self, samples: Samples, evaluations: int, exhausted: StopReason = StopReason.ITERATIONS,
        trace: Sequence[Tensor] = (), trajectory: dict[int, State] | None = None, check_start: bool = False,
    ) -> None:  # fmt: skip
        self.state, self.previous, self.residual = samples.state, samples.previous, samples.residual
        self.iterations, self.evaluations = samples.iterations, evaluations
        self.trace = torch.stack(list(trace)) if trace else self.residual.new_empty(0, len(self.residual))
        self.trajectory = trajectory or {}
        self._converged, self._diverged = samples.converged, samples.diverged
        self._exhausted, self._check_start = exhausted, check_start

    def figures(self) -> Tensor:
        """(B, 4) float64, on the device: iterations, residual, converged, diverged; ``samples`` reads them."""
        columns = (self.iterations, self.residual, self._converged, self._diverged)
        return torch.stack([column.double() for column in columns], 1)

    def samples(self, figures: Sequence[Sequence[float]] | None = None) -> list[tuple[int, float, StopReason]]:
        """Iterations, residual and stop reason of each sample, read from the device in one transfer.

        :param figures: ``figures()``, if the host has them already.
        :raises FloatingPointError: for the start of a solve on a GPU, see ``check_start`` of ``solve``.
        """
        rows = self.figures().tolist() if figures is None else figures
        unusable = [place for place, (made, _, _, diverged) in enumerate(rows) if diverged and not made]
        if self._check_start and unusable:
            raise FloatingPointError(
                f"expected f(z0) to be finite, got NaN or infinity for sample(s) {unusable} of {len(rows)}; are z0 and "
                "what f depends on finite?"
            )
        answers = []
        for made, left, converged, diverged in rows:
            reason = StopReason.DIVERGED if diverged else StopReason.CONVERGED if converged else self._exhausted
            answers.append((int(made), left, reason))
        return answers

    @property
    def stop_reasons(self) -> tuple[StopReason, ...]:
        """Why each sample stopped. Reading this waits for the device, and may raise an error as ``samples`` does."""
        return tuple(reason for _, _, reason in self.samples())


def as_state(value: Sequence[Tensor]) -> State:
    """The caller's value as a state; ``TypeError`` if it is no tuple of tensors, ``ValueError`` if they do not fit."""
    if isinstance(value, Tensor) or not isinstance(value, (tuple, list)):
        raise TypeError(f"a state is a tuple of tensors, (z,) for a single one; got {type(value).__name__}")
    state = tuple(value)
    for index, tensor in enumerate(state):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"a state is a tuple of tensors; entry {index} is {type(tensor).__name__}")
        if tensor.dim() == 0 or not tensor.is_floating_point():
            wanted = "the tensors of a state are (B, ...) and of a real floating-point type"
            raise ValueError(f"{wanted}; tensor {index} is {_describe(tensor)}")
    if len({(tensor.shape[0], tensor.device) for tensor in state}) != 1:
        got = "; ".join(map(_describe, state)) or "an empty tuple"
        raise ValueError(f"a state has one or more tensors, which share their batch size and device; got {got}")
    return state


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"


def evaluate(f: Function, z: State) -> State:
    """``f(*z)``; ``ValueError`` if it is no new state with tensors of the same number, shapes, types and device."""
    versions = [None if tensor.is_inference() else tensor._version for tensor in z]
    value = f(*z)
    state = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(state) != len(z):
        raise ValueError(f"f must return {len(z)} tensors as in the state it was given, got {len(state)}")
    for index, (new, old, version) in enumerate(zip(state, z, versions, strict=True)):
        if not isinstance(new, Tensor) or (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
            returned = _describe(new) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(
                "f must keep shape, type and device of every tensor of the state: "
                f"tensor {index} was {_describe(old)}, f returned {returned}"
            )
        if version is not None and old._version != version:
            raise ValueError(f"f must return new tensors: it changed tensor {index} of its input in place")
    return state


def solve(
    f: Function, z0: Sequence[Tensor], *, solver: str | Solver = "picard", max_iterations: int = 12,
    tolerance: float | None = None, measure: Measure = relative_residual,
    deadline_ns: int | None = None, now_ns: Callable[[], int] | None = None, min_iterations: int = 0,
    iteration_cost_ns: float = 0.0, keep: Collection[int] = (), check_start: bool = True, watch: bool = True,
) -> Solution:  # fmt: skip
    """Find a fixed point ``z = f(z)``, starting from ``z0``. Each sample of the batch stops on its own.

    Every state that is returned is a value of ``f``: the last one of each sample for Picard's method, and the one of
    smallest measure for the other solvers, whose residual can rise. A value is unusable if it is not finite, or if its
    norm exceeds those of the start and of the first iterate ``GROWTH_LIMIT`` times. A sample that gets one diverges
    (accelerated solvers first try Picard's step from the last usable point), and keeps a state from before.

    :param f: takes the tensors of a state and returns as many new ones of the same shapes and types. It is called
        under the caller's gradient mode.
    :param z0: the start, tensors of shape (B, ...) on one device, of real floating-point types.
    :param solver: "picard", "anderson", "broyden", or a solver with settings of its own.
    :param max_iterations: the largest number of evaluations of ``f``, >= 1.
    :param tolerance: a sample has converged when ``measure`` is at or below this; with None, no sample stops early.
    :param measure: ``(z, f(z)) -> (B,)``, in any unit: ``relative_residual``, ``absolute_residual``, or another.
    :param deadline_ns: absolute time on the clock ``now_ns`` (None: ``time.monotonic_ns``). The solve does not begin an
        iteration, not even the first, that would end after the deadline, judged by the costs so far.
    :param min_iterations: the number of evaluations of ``f`` to make whatever the deadline says.
    :param iteration_cost_ns: the expected cost of one iteration. From the second iteration on, the mean cost in this
        solve is used if it is larger. If 0, that mean is used from the first iteration on.
    :param keep: the numbers (from 1) of iterations whose states to return in ``trajectory``.
    :param check_start: whether to raise an error if ``f(z0)`` is not finite (on a GPU, reading ``samples`` or
        ``stop_reasons`` of the solution raises it). If False, such samples diverge at once and keep their start.
    :param watch: False makes all ``max_iterations`` without asking whether the samples have stopped, as code that is
        captured in a CUDA graph must do. The samples themselves still stop.
    :raises ValueError: for a malformed state, an ``f`` that changes shapes or types, or impossible settings.
    :raises FloatingPointError: if ``f(z0)`` is not finite; the message names the samples.
    """
    z = as_state(z0)
    accelerated = None if solver == "picard" else make_solver(solver)  # Picard's next point is the value
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    if not 0 <= min_iterations <= max_iterations:
        raise ValueError(f"min_iterations must be from 0 to max_iterations, {max_iterations}, got {min_iterations}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be positive or None, got {tolerance}")
    if wrong := [n for n in keep if not 1 <= n <= max_iterations]:
        raise ValueError(f"keep must name iterations from 1 to max_iterations, {max_iterations}, got {wrong}")

    device = z[0].device
    on_host = device.type == "cpu"
    rules = Rules(tolerance, accelerated is not None and accelerated.keeps_best, look=watch and on_host)
    samples, propose = rules.begin(z), None if accelerated is None else accelerated.start()
    trace: list[Tensor] = []
    trajectory: dict[int, State] = {}
    progress = Queued(device) if watch and not on_host else None
    # The first iteration often costs more than the others, and on a GPU the host has seen only its start. The cost is
    # therefore not estimated by it alone, unless nothing else is known.
    timed_after = 2 if iteration_cost_ns or not on_host else 1
    watched = tolerance is not None or deadline_ns is not None
    pace = Pace(progress, max_iterations, deadline_ns, now_ns, min_iterations, iteration_cost_ns, watched, timed_after)
    while pace.may_begin(samples.active if watch else None):
        if pace.begun > 1:
            # A solver only sees usable evaluations. What it proposes for samples that have stopped is ignored.
            z = samples.value if propose is None else propose(samples.point, samples.value)
            if z is not samples.value:
                z = rules.take(samples.active & ~samples.retry, z, samples.value)
        fz = evaluate(f, z)
        with torch.no_grad():
            measured = measure(z, fz).float()
            if measured.shape != samples.active.shape:
                raise ValueError(f"measure must return shape {(len(samples.active),)}, got {tuple(measured.shape)}")
            trace.append(torch.where(samples.active, measured, torch.nan))
        samples = rules.account(samples, z, fz, measured)
        if pace.begun in keep:
            trajectory[pace.begun] = samples.value
    solution = Solution(samples, pace.begun, pace.exhausted, trace, trajectory, check_start and bool(trace))
    if check_start and on_host:
        solution.samples()
    return solution
