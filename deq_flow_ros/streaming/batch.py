# SPDX-License-Identifier: Apache-2.0
"""The way of frames through their streams and an engine, together where they can share a batch."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from deq_flow_ros.model.deq_flow import MIN_SIDE
from deq_flow_ros.streaming.costs import REFINE
from deq_flow_ros.streaming.eager import EagerEngine, Slot
from deq_flow_ros.streaming.fields import refined
from deq_flow_ros.streaming.interface import FlowResult, Likeness, Solved, Wanted
from deq_flow_ros.streaming.plan import Limits, padded_size
from deq_flow_ros.streaming.stream import Stream, Turn


class Estimator(Protocol):
    """What decides for one camera, what computes, and what is kept there; a ``FlowEstimator``."""

    stream: Stream
    engine: EagerEngine
    slot: Slot


def _whole_ns(value: Any, name: str) -> int:
    """Python's integer, of those and numpy's: a stamp in seconds would be taken for one at the beginning of time."""
    try:
        return operator.index(value)
    except TypeError:
        got = f"{value!r} ({type(value).__name__})"
        raise ValueError(f"{name} must be an integer in nanoseconds, got {got}; of seconds, round(1e9 * s)") from None


@dataclass(frozen=True, eq=False)
class UpdateRequest:
    """The next frame of one estimator's stream; the values are those of ``FlowEstimator.update``.

    The frame is not copied. The stream keeps it for the next pair, so nobody may write to it.

    :raises ValueError: if frame, times or limit are not as described there.
    """

    estimator: Estimator
    frame: np.ndarray
    stamp_ns: int
    arrival_ns: int | None = None
    time_limit_ms: float | None = None

    def __post_init__(self) -> None:
        frame = self.frame
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            got = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
            raise ValueError(f"a frame must be a uint8 array of shape (H, W, 3), got {got}")
        if min(frame.shape[:2]) < MIN_SIDE:
            raise ValueError(
                f"a frame must be at least {MIN_SIDE}x{MIN_SIDE} pixels, got {frame.shape[1]}x{frame.shape[0]}"
            )
        object.__setattr__(self, "stamp_ns", _whole_ns(self.stamp_ns, "stamp_ns"))
        if self.arrival_ns is not None:
            object.__setattr__(self, "arrival_ns", _whole_ns(self.arrival_ns, "arrival_ns"))
        if self.time_limit_ms is not None and not math.isfinite(self.time_limit_ms):
            raise ValueError(f"time_limit_ms must be a finite number or None, got {self.time_limit_ms!r}")


@dataclass(eq=False)
class Member:
    """A frame of a batch: how alike it and the last one are, if that is asked, and at the end its result."""

    stream: Stream
    slot: Slot
    turn: Turn
    alike: Likeness | None = None
    result: FlowResult | None = None


def update_together(requests: Sequence[UpdateRequest]) -> list[FlowResult | None]:
    """Take the next frame of several streams; the results are those of each one's ``update``, in the same order.

    Frames of one padded size and processing scale, whose estimators agree on direction, iterations and tolerance, are
    encoded and solved as one batch: for a GPU this is hardly more work than one of them. On a CPU it is as much work as
    one after the other. The rest is done one by one, as the requests stand.

    A batch ends at the soonest deadline in it, so a frame that has more than twice the time of the most pressed one is
    done afterwards. A ``time_limit_ms`` counts from when the work on the frame begins.

    :raises ValueError: if an estimator occurs twice, or their models or clocks are not the same object; all streams
        stay as they were. After any other error the streams are in an unknown state: ``reset`` them all.
    """
    if not requests:
        return []
    engine = _common_engine(requests)
    taken: list[Member | None] = []
    for request in requests:
        arrival_ns = engine.clock.now_ns() if request.arrival_ns is None else request.arrival_ns
        stream = request.estimator.stream
        turn = stream.take(request.frame, request.stamp_ns, arrival_ns, request.time_limit_ms)
        taken.append(None if turn is None else Member(stream, request.estimator.slot, turn))
    members = [member for member in taken if member is not None]
    if len(members) == 1:
        members[0].stream.plan(members[0].turn, engine.clock.now_ns(), 1)
        process(engine, members)
    else:
        for group in _groups(engine, members):
            for batch in _batches(engine, group):
                process(engine, batch)
    return [None if member is None else member.result for member in taken]


def _common_engine(requests: Sequence[UpdateRequest]) -> EagerEngine:
    estimators = [request.estimator for request in requests]
    engine = estimators[0].engine
    if len(set(map(id, estimators))) != len(estimators):
        raise ValueError("an estimator takes one frame at a time, got several requests for one estimator")
    if any(estimator.engine.clock is not engine.clock for estimator in estimators):
        raise ValueError("only estimators of one clock can be updated together, got several clocks")
    if any(estimator.engine is not engine for estimator in estimators):
        raise ValueError("only estimators of one model can be updated together, got several models")
    return engine


def _groups(engine: EagerEngine, members: Sequence[Member]) -> Iterator[Sequence[Member]]:
    """Frames that may share a batch: alike, and with times left that do not differ too much, the shortest first."""
    alike: dict[tuple[object, ...], list[tuple[float, Member]]] = {}
    for member in members:
        now_ns = engine.clock.now_ns()
        deadline, settings = member.stream.deadline(member.turn, now_ns), member.stream.settings
        left_ms = math.inf if deadline is None else (deadline.at_ns - now_ns) / 1e6
        solver = settings.direction, settings.max_iterations, settings.tolerance_px
        key = (member.turn.starts, padded_size(*member.turn.seen.size), *solver)
        alike.setdefault(key, []).append((left_ms, member))
    for candidates in alike.values():
        candidates.sort(key=operator.itemgetter(0))
        shortest_ms, group = candidates[0][0], list[Member]()
        for left_ms, member in candidates:
            if left_ms > 2 * max(shortest_ms, 0.0):
                yield group
                shortest_ms, group = left_ms, []
            group.append(member)
        yield group


def _batches(engine: EagerEngine, group: Sequence[Member]) -> Iterator[Sequence[Member]]:
    """The frames of a group, whose turn has come; those that are processed at one scale are a batch."""
    batches: dict[tuple[float, tuple[int, int]], list[Member]] = {}
    for member in group:
        plan = member.stream.plan(member.turn, engine.clock.now_ns(), len(group))
        batches.setdefault((plan.scale, padded_size(*plan.size)), []).append(member)
    for batch in batches.values():
        for member in batch:
            # Now: a limit counts from when the work begins, which for this batch is behind the ones before.
            member.turn.deadline = member.stream.deadline(member.turn, engine.clock.now_ns())
        yield batch


def process(engine: EagerEngine, batch: Sequence[Member]) -> None:
    """Encode the frames of a batch and, unless they are the first of their streams, solve their pairs."""
    plans = [member.turn.plan for member in batch if member.turn.plan is not None]
    plan, direction = plans[0], batch[0].stream.settings.direction
    slots, images = [member.slot for member in batch], [member.turn.image for member in batch]
    sizes = [each.size for each in plans]
    engine.stages.begin(math.prod(plan.size))
    if batch[0].turn.starts:
        for slot in slots:
            slot.clear()
        engine.encode(slots, images, sizes)
        for member in batch:
            engine.advance(member.slot, keep_state=False)
            member.stream.begin(member.turn)
        return
    for slot, each in zip(slots, plans, strict=True):
        if each.reencode:
            engine.reencode(slot, each.size, each.ratio)
    engine.encode(slots, images, sizes)
    for slot, each in zip(slots, plans, strict=True):
        if each.prepare:
            engine.prepare(slot, direction, alone=len(batch) == 1)
    compared = [member for member in batch if member.stream.settings.warm]
    found = engine.match([member.slot for member in compared], direction) if compared else []
    for member, likeness in zip(compared, found, strict=True):
        member.alike = likeness
    so_far_ms = engine.stages.read(wait=False)
    limits = [member.stream.limits(member.turn, so_far_ms, len(batch), member.alike) for member in batch]
    for member in compared:
        if not member.stream.warm:
            engine.start_cold(member.slot)
    engine.solve(slots, direction, limits[0] if len(limits) == 1 else Limits.common(limits), plan.scale)
    settings = [member.stream.settings for member in batch]
    asked = [Wanted(each.residual, each.uncertainty) for each in settings]
    palettes = [None if each.refinement else each.palette for each in settings]
    solved = engine.finish(slots, direction, Wanted(*map(any, zip(*asked, strict=True))), palettes)
    if any(each.refinement for each in settings):
        solved = [refine(member, one) for member, one in zip(batch, solved, strict=True)]
        engine.stages.lap(REFINE)
    stage_ms = engine.stages.read()
    for member, one, wanted in zip(batch, solved, asked, strict=True):
        info = member.stream.conclude(member.turn, one, stage_ms, engine.clock.now_ns(), len(batch))
        engine.advance(member.slot, keep_state=member.stream.warm)
        residual = one.residual if wanted.residual else None
        uncertainty = one.uncertainty if wanted.uncertainty else None
        member.result = FlowResult(one.flow, residual, info, uncertainty, one.colors)


def refine(member: Member, solved: Solved) -> Solved:
    """The same with a field that is refined between the frames as they came, if the settings ask for it."""
    settings, last = member.stream.settings, member.stream.last
    if not settings.refinement or last is None:
        return solved
    first, second = last.image, member.turn.image
    if settings.direction == "backward":
        first, second = second, first
    return replace(solved, flow=refined(solved.flow, first, second, settings.refinement))
