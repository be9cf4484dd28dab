# SPDX-License-Identifier: Apache-2.0
"""Between two iterations: which samples go on, which state is their answer, and whether there is time for another one.

``Rules`` decide for the samples, on the device and without a word to the host; ``Pace`` decides for the host. Whoever
iterates, operation by operation or by replaying a graph, asks them.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from deq_flow_ros.equilibrium.state import State, norm, select


class StopReason(str, enum.Enum):
    """Why a solve ended, per sample of the batch."""

    CONVERGED = "converged"
    ITERATIONS = "iterations"
    DEADLINE = "deadline"
    DIVERGED = "diverged"


@dataclass(frozen=True)
class Samples:
    """What is known of each sample between two iterations, on the device.

    :ivar state: its answer so far, a value of ``f``; the start before the first.
    :ivar previous: the point at which that value was taken.
    :ivar point: of its last accepted evaluation.
    :ivar value: what ``f`` gave there.
    :ivar active: (B,) bool, it is still iterated.
    :ivar converged: (B,) bool.
    :ivar diverged: (B,) bool.
    :ivar retry: (B,) bool, Picard's step is tried next from ``value``.
    :ivar iterations: (B,) int64, accepted ones.
    :ivar chosen: (B,) int64, the iteration that ``state`` is of; 0 before the first.
    :ivar residual: (B,) float32, the measure there; infinite before the first.
    :ivar bound: (B,) float64, how long a value may be.
    :ivar number: () int64, evaluations so far.
    """

    state: State
    previous: State
    point: State
    value: State
    active: Tensor
    converged: Tensor
    diverged: Tensor
    retry: Tensor
    iterations: Tensor
    chosen: Tensor
    residual: Tensor
    bound: Tensor
    number: Tensor

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        found: list[Tensor] = []
        for field in fields(self):
            value = getattr(self, field.name)
            found += [value] if isinstance(value, Tensor) else value
        return found


@dataclass(frozen=True)
class Rules:
    """What becomes of each sample with an iteration. "Accepted" is a finite one of a sample that had not stopped.

    :param tolerance: a sample has converged when its measure is at or below; a tensor where it is to change between
        replays; None: never.
    :param growth_limit: a value is unusable where it is so many times longer than start and first iterate; None: any
        finite length is usable.
    :param best: the answer is the state of smallest measure, not the last.
    :param erratic: a proposed point may be unusable although the last one was not: Picard's step is tried then.
    :param look: the host may look at values of the device. On a CPU that costs nothing and mostly saves a copy; on a
        GPU it would make the host wait, and what is captured must not do it.
    """

    tolerance: float | Tensor | None
    growth_limit: float | None
    best: bool
    erratic: bool
    look: bool

    def begin(self, z0: State) -> Samples:
        """Before the first iteration."""
        device, batch = z0[0].device, z0[0].shape[0]
        active = torch.ones(batch, dtype=torch.bool, device=device)
        no, none = torch.zeros_like(active), torch.zeros(batch, dtype=torch.int64, device=device)
        residual = torch.full((batch,), torch.inf, device=device)
        with torch.no_grad():
            bound = residual.double() if self.growth_limit is None else self.growth_limit * norm(z0)
        number = torch.zeros((), dtype=torch.int64, device=device)
        return Samples(z0, z0, z0, z0, active, no, no, no, none, none, residual, bound, number)

    def account(self, before: Samples, z: State, fz: State, measured: Tensor) -> tuple[Samples, Tensor]:
        """Take in an iteration; also returns its measure (B,), NaN where the sample had stopped before."""
        with torch.no_grad():
            size, bound, number = norm(fz), before.bound, before.number + 1
            usable = torch.isfinite(measured) & torch.isfinite(size)
            if self.growth_limit is not None:
                bound = torch.where(number == 1, torch.maximum(bound, self.growth_limit * size), bound)
                usable = usable & (size <= bound)
            accepted = before.active & usable
            improved = accepted & (measured < before.residual) if self.best else accepted
            # An accelerated step may overshoot to where f is not defined: from the last usable point, Picard's step is
            # tried before the sample is given up.
            again = before.active & ~usable & ~before.retry & (before.iterations > 0) & self.erratic
            diverged = before.diverged | (before.active & ~usable & ~again)
            converged = before.converged
            if self.tolerance is not None:
                converged = converged | (accepted & (measured <= self.tolerance))
            traced = torch.where(before.active, measured, torch.nan)
        point, value = self.take(accepted, z, before.point), self.take(accepted, fz, before.value)
        state, previous = value, point
        if self.best:
            state, previous = self.take(improved, fz, before.state), self.take(improved, z, before.previous)
        after = Samples(
            state=state, previous=previous, point=point, value=value, active=(accepted & ~converged) | again,
            converged=converged, diverged=diverged, retry=again, iterations=before.iterations + accepted,
            chosen=torch.where(improved, number, before.chosen),
            residual=torch.where(improved, measured, before.residual), bound=bound, number=number,
        )  # fmt: skip
        return after, traced

    def take(self, mask: Tensor, new: State, old: State) -> State:
        """Per sample the new state where the mask (B,) holds."""
        return new if self.look and bool(mask.all()) else select(mask, new, old)


class Progress(Protocol):
    """What the host knows of the iterations that it has queued on a device."""

    @property
    def in_flight(self) -> int:
        """How much has not ended, as far as is known: iterations, and work of before them, which counts as one."""

    @property
    def done(self) -> bool:
        """All samples had stopped by the last iteration that has ended."""

    def push(self, active: Tensor) -> None:
        """An iteration was queued, after which these samples (B,) are still iterated."""

    def look(self, wait: bool) -> None:
        """Take in what has ended; with ``wait``, not before all but the last of what is queued has."""


class Immediate:
    """The progress of a CPU: what is queued is done."""

    in_flight = 0
    done = False

    def push(self, active: Tensor) -> None:
        """See ``Progress``."""
        self.done = not bool(active.any())

    def look(self, wait: bool) -> None:
        """See ``Progress``."""


class Queued:
    """The progress of a GPU, known to the host one iteration late.

    Reading it at once would leave the device idle until the host has queued the next iteration. Samples that are done
    are frozen on the device itself, so that an iteration too many changes no result.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.done = device, False
        self._pending: list[tuple[torch.cuda.Event, Tensor | None]] = []
        self._mark(None)  # until then the device is at work of before

    @property
    def in_flight(self) -> int:
        """See ``Progress``."""
        return len(self._pending)

    def push(self, active: Tensor) -> None:
        """See ``Progress``."""
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(~active.any(), non_blocking=True)
        self._mark(host)

    def look(self, wait: bool) -> None:
        """See ``Progress``."""
        while self._pending and ((wait and len(self._pending) > 1) or self._pending[0][0].query()):
            event, host = self._pending.pop(0)
            event.synchronize()
            self.done = self.done if host is None else bool(host)

    def _mark(self, host: Tensor | None) -> None:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._pending.append((event, host))


class Unseen:
    """No progress is looked at: all iterations are queued. For a solve that is captured."""

    in_flight = 0
    done = False

    def push(self, active: Tensor) -> None:
        """See ``Progress``."""

    def look(self, wait: bool) -> None:
        """See ``Progress``."""


class Pace:
    """Whether the host begins another iteration: not beyond the cap, after all samples, or past the deadline.

    :param progress: of what it has queued.
    :param watched: whether to wait for iterations to end, so that no more than one is queued in vain.
    :param timed_after: from the iteration after this one, the mean of this solve counts if it is more than the
        expectation: the load of the machine is that of now. None: the expectation alone.
    :ivar begun: iterations so far.
    :ivar exhausted: why samples that have neither converged nor diverged are not iterated any more.

    The others are those of ``solve``.
    """

    def __init__(
        self,
        progress: Progress,
        max_iterations: int,
        deadline_ns: int | None = None,
        now_ns: Callable[[], int] | None = None,
        min_iterations: int = 0,
        iteration_cost_ns: float = 0.0,
        watched: bool = True,
        timed_after: int | None = 1,
    ) -> None:
        self.progress = progress
        self._max, self._min, self._watched, self._timed_after = max_iterations, min_iterations, watched, timed_after
        self._now_ns = time.monotonic_ns if now_ns is None else now_ns
        self._deadline_ns, self._cost_ns = deadline_ns, iteration_cost_ns
        self._started_ns = self._now_ns()
        self.begun, self.exhausted = 0, StopReason.ITERATIONS

    def may_begin(self) -> bool:
        """Ask before each iteration; one that may begin counts as begun."""
        if self.begun == self._max:
            return False
        self.progress.look(wait=self._watched)
        if self.progress.done:
            return False
        if self._deadline_ns is not None and not self._in_time(self._deadline_ns):
            self.exhausted = StopReason.DEADLINE
            return False
        self.begun += 1
        return True

    def _in_time(self, deadline_ns: int) -> bool:
        now_ns, in_flight = self._now_ns(), self.progress.in_flight
        if self._timed_after is not None and self.begun >= self._timed_after:
            mean_ns = (now_ns - self._started_ns) / max(1, self.begun - in_flight)
            self._cost_ns = max(self._cost_ns, mean_ns)
        return self.begun < self._min or now_ns + (1 + in_flight) * self._cost_ns <= deadline_ns
