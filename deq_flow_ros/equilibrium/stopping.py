# SPDX-License-Identifier: Apache-2.0
"""States, and what is decided between two iterations: which samples continue, what their result is, if there is time.

``Rules`` decides for the samples, on the device, without a transfer to the host. ``Pace`` decides whether the host
begins another iteration. Every loop uses both, whether it runs operations one by one or replays a CUDA graph.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Tensors whose first dimension is the batch. They are never joined, so that each keeps its shape, type and layout.
State = tuple[Tensor, ...]
Function = Callable[..., Sequence[Tensor]]
GROWTH_LIMIT = 1e6


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) viewed so that it broadcasts over ``like``, (B, ...)."""
    return values.view(-1, *([1] * (like.dim() - 1)))


def subtract(a: State, b: State) -> State:
    """``a - b``."""
    return tuple(x - y for x, y in zip(a, b, strict=True))


def inner(a: State, b: State) -> Tensor:
    """Inner product per sample over all tensors of two states, (B,) float64."""
    products = []
    for x, y in zip(a, b, strict=True):
        wide = torch.promote_types(x.dtype, torch.float32)  # squares in half precision overflow and underflow
        product = x.to(wide) * y.to(wide)
        products.append((product.sum(tuple(range(1, x.dim()))) if x.dim() > 1 else product).double())
    return torch.stack(products).sum(0)


def norm(a: State) -> Tensor:
    """Euclidean length per sample over all tensors, (B,) float64."""
    return inner(a, a).sqrt()


class StopReason(str, enum.Enum):
    """Why a solve ended, per sample of the batch."""

    CONVERGED = "converged"
    ITERATIONS = "iterations"
    DEADLINE = "deadline"
    DIVERGED = "diverged"


class Samples(NamedTuple):
    """What is known of each sample between two iterations, on the device.

    :ivar state: its result so far, a value of ``f``; the start of the solve before the first iteration.
    :ivar previous: the point at which that value was taken.
    :ivar point: the point of its last accepted evaluation, and ``value``, the value of ``f`` there.
    :ivar active: (B,) bool, whether it is still iterated; ``converged`` and ``diverged`` say why it is not.
    :ivar retry: (B,) bool, whether the next point is that of Picard's step, which is ``value``.
    :ivar iterations: (B,) int64, the number of accepted iterations.
    :ivar residual: (B,) float32, the measure of the iteration that gave ``state``; infinite before the first.
    :ivar bound: (B,) float64, the largest norm of a usable value.
    :ivar number: () int64, the number of evaluations so far.
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
    residual: Tensor
    bound: Tensor
    number: Tensor


@dataclass(frozen=True)
class Rules:
    """How an iteration changes what is known of each sample.

    :param tolerance: a sample has converged when its measure is at or below this; None: never. A tensor allows it to
        change between replays of a CUDA graph.
    :param keeps_best: see ``Solver``.
    :param look: whether the host may read values from the device, which usually saves a copy. On a GPU it would make
        the host wait, and it is not possible while a CUDA graph is captured.
    """

    tolerance: float | Tensor | None
    keeps_best: bool
    look: bool

    def begin(self, z0: State) -> Samples:
        """What is known before the first iteration."""
        device, batch = z0[0].device, z0[0].shape[0]
        active = torch.ones(batch, dtype=torch.bool, device=device)
        no, iterations = torch.zeros_like(active), torch.zeros(batch, dtype=torch.int64, device=device)
        residual = torch.full((batch,), torch.inf, device=device)
        with torch.no_grad():
            bound = GROWTH_LIMIT * norm(z0)
        number = torch.zeros((), dtype=torch.int64, device=device)
        return Samples(z0, z0, z0, z0, active, no, no, no, iterations, residual, bound, number)

    def account(self, before: Samples, z: State, fz: State, measured: Tensor) -> Samples:
        """Account for an iteration, whose measure is (B,) float32."""
        with torch.no_grad():
            size, number = norm(fz), before.number + 1
            bound = torch.where(number == 1, torch.maximum(before.bound, GROWTH_LIMIT * size), before.bound)
            usable = torch.isfinite(measured) & torch.isfinite(size) & (size <= bound)
            accepted = before.active & usable
            improved = accepted & (measured < before.residual) if self.keeps_best else accepted
            # An accelerated step may overshoot to a point where f is not defined. Before the sample is given up,
            # Picard's step from the last usable point is tried.
            again = before.active & ~usable & ~before.retry & (before.iterations > 0) & self.keeps_best
            diverged = before.diverged | (before.active & ~usable & ~again)
            converged = before.converged
            if self.tolerance is not None:
                converged = converged | (accepted & (measured <= self.tolerance))
        point, value = self.take(accepted, z, before.point), self.take(accepted, fz, before.value)
        state, previous = value, point
        if self.keeps_best:
            state, previous = self.take(improved, fz, before.state), self.take(improved, z, before.previous)
        return Samples(
            state=state, previous=previous, point=point, value=value, active=(accepted & ~converged) | again,
            converged=converged, diverged=diverged, retry=again, iterations=before.iterations + accepted,
            residual=torch.where(improved, measured, before.residual), bound=bound, number=number,
        )  # fmt: skip

    def take(self, mask: Tensor, new: State, old: State) -> State:
        """For each sample the new state where the mask (B,) is true, else the old one."""
        if self.look and bool(mask.all()):
            return new
        return tuple(torch.where(per_sample(mask, a), a, b) for a, b in zip(new, old, strict=True))


class Progress(Protocol):
    """What the host knows of the iterations that it has queued on a device, which may be behind it.

    ``push`` says that an iteration was queued, after which the samples of the mask (B,) are still active. ``look``
    updates what is known; with ``wait``, it first waits until at most one queued iteration has not ended.

    :ivar in_flight: the number of iterations that have not ended, as far as is known; earlier work counts as one.
    :ivar done: whether all samples had stopped by the last iteration that has ended.
    """

    @property
    def in_flight(self) -> int: ...
    @property
    def done(self) -> bool: ...
    def push(self, active: Tensor) -> None: ...
    def look(self, wait: bool) -> None: ...


class Queued:
    """The ``Progress`` on a GPU, which the host learns one iteration late.

    Reading it at once would leave the device idle until the host has queued the next iteration. An iteration too many
    does not change the result, because samples that have stopped are frozen on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.done = device, False
        self._pending: list[tuple[torch.cuda.Event, Tensor]] = []
        self._mark(torch.zeros((), dtype=torch.bool))  # the end of the work that was queued before

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    def push(self, active: Tensor) -> None:
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(~active.any(), non_blocking=True)
        self._mark(host)

    def look(self, wait: bool) -> None:
        while self._pending and ((wait and len(self._pending) > 1) or self._pending[0][0].query()):
            event, host = self._pending.pop(0)
            event.synchronize()
            self.done = bool(host)

    def _mark(self, host: Tensor) -> None:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._pending.append((event, host))


@dataclass
class Pace:
    """Decides whether the host begins another iteration: not after the largest number of iterations, nor if all samples
    have stopped, nor if it would end after the deadline. Parameters that are not explained here are those of ``solve``.

    :param progress: of the iterations that the host has queued; None: each has ended as soon as it is queued.
    :param watched: whether to wait for iterations to end, so that at most one is queued in vain.
    :param timed_after: after this many iterations, their mean cost is used if it is larger than the expected cost,
        because it shows the present load of the machine. None: only the expected cost is used.
    :ivar begun: the number of iterations so far.
    :ivar exhausted: why samples that have neither converged nor diverged are not iterated any more.
    """

    progress: Progress | None
    max_iterations: int
    deadline_ns: int | None = None
    now_ns: Callable[[], int] | None = None
    min_iterations: int = 0
    iteration_cost_ns: float = 0.0
    watched: bool = True
    timed_after: int | None = 1
    begun: int = 0
    exhausted: StopReason = StopReason.ITERATIONS
    _started_ns: int = 0

    def may_begin(self, active: Tensor | None = None) -> bool:
        """Whether the next iteration may begin. If so, it counts as begun.

        :param active: (B,) bool, the samples that the last one left active; None: the progress knows them, or nobody is
            to look at them.
        """
        if self.begun == self.max_iterations:
            return False
        seen, left = self.progress, active if self.begun else None
        if seen is not None:
            if left is not None:
                seen.push(left)
            seen.look(wait=self.watched)
        done = seen.done if seen is not None else left is not None and not bool(left.any())
        if done:
            return False
        if self.deadline_ns is not None and not self._in_time(self.deadline_ns):
            self.exhausted = StopReason.DEADLINE
            return False
        self.begun += 1
        return True

    def _in_time(self, deadline_ns: int) -> bool:
        now_ns = (self.now_ns or time.monotonic_ns)()
        in_flight = 0 if self.progress is None else self.progress.in_flight
        if not self.begun:
            self._started_ns = now_ns
        if self.timed_after is not None and self.begun >= self.timed_after:
            mean_ns = (now_ns - self._started_ns) / max(1, self.begun - in_flight)
            self.iteration_cost_ns = max(self.iteration_cost_ns, mean_ns)
        return self.begun < self.min_iterations or now_ns + (1 + in_flight) * self.iteration_cost_ns <= deadline_ns
