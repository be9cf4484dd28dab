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
from deq_flow_ros.streaming.eager import EagerEngine
from deq_flow_ros.streaming.fields import refined
from deq_flow_ros.streaming.interface import FlowResult, Solved, Wanted
from deq_flow_ros.streaming.plan import Limits, padded_size
from deq_flow_ros.streaming.stream import Stream, Turn


class Estimator(Protocol):
    """What decides for one camera, and what computes; a ``FlowEstimator``."""

    stream: Stream
    engine: EagerEngine


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
        height, width = frame.shape[:2]
        if min(height, width) < MIN_SIDE:
            raise ValueError(f"a frame must be at least {MIN_SIDE}x{MIN_SIDE} pixels, got {width}x{height}")
        object.__setattr__(self, "stamp_ns", _whole_ns(self.stamp_ns, "stamp_ns"))
        if self.arrival_ns is not None:
            object.__setattr__(self, "arrival_ns", _whole_ns(self.arrival_ns, "arrival_ns"))
        if self.time_limit_ms is not None and not math.isfinite(self.time_limit_ms):
            raise ValueError(f"time_limit_ms must be a finite number or None, got {self.time_limit_ms!r}")


def update_together(requests: Sequence[UpdateRequest]) -> list[FlowResult | None]:
    """Take the next frame of several streams; the results are those of each one's ``update``, in the same order.

    Frames of one padded size and processing scale, whose estimators agree on direction, iterations and tolerance, are
    encoded and solved as one batch: for a GPU this is hardly more work than one of them. On a CPU it is as much work as
    one after the other. The rest is done one by one, as the requests stand.

    A batch ends at the soonest deadline in it, so a frame that has more than twice the time of the most pressed one is
    done afterwards. A ``time_limit_ms`` counts from when the work on the frame begins.

    :raises ValueError: if an estimator occurs twice, or they have not the same model, clock and runtime; all streams
        stay as they were. After any other error the streams are in an unknown state: ``reset`` them all.
    """
    if not requests:
        return []
    engine = _common_engine(requests)
    taken = []
    for request in requests:
        arrival_ns = engine.clock.now_ns() if request.arrival_ns is None else request.arrival_ns
        stream = request.estimator.stream
        taken.append(stream.take(request.frame, request.stamp_ns, arrival_ns, request.time_limit_ms))
    turns = [turn for turn in taken if turn is not None]
    if len(turns) == 1:
        turns[0].stream.plan(turns[0], engine.clock.now_ns(), 1)
        process(engine, turns)
    else:
        for group in _groups(engine, turns):
            for batch in _batches(engine, group):
                process(engine, batch)
    return [None if turn is None else turn.result for turn in taken]


def _common_engine(requests: Sequence[UpdateRequest]) -> EagerEngine:
    estimators = [request.estimator for request in requests]
    engine = estimators[0].engine
    if len(set(map(id, estimators))) != len(estimators):
        raise ValueError("an estimator takes one frame at a time, got several requests for one estimator")
    if any(estimator.engine is not engine for estimator in estimators):
        raise ValueError("only estimators of one model, clock and runtime can be updated together, got several")
    return engine


def _groups(engine: EagerEngine, turns: Sequence[Turn]) -> Iterator[Sequence[Turn]]:
    """Frames that may share a batch: alike, and with times left that do not differ too much, the shortest first."""
    alike: dict[tuple[object, ...], list[tuple[float, Turn]]] = {}
    for turn in turns:
        now_ns = engine.clock.now_ns()
        deadline, settings = turn.stream.deadline(turn, now_ns), turn.stream.settings
        left_ms = math.inf if deadline is None else (deadline.at_ns - now_ns) / 1e6
        solver = settings.direction, settings.max_iterations, settings.tolerance_px
        key = (turn.starts, padded_size(*turn.seen.size), *solver)
        alike.setdefault(key, []).append((left_ms, turn))
    for candidates in alike.values():
        candidates.sort(key=operator.itemgetter(0))
        shortest_ms, group = candidates[0][0], list[Turn]()
        for left_ms, turn in candidates:
            if left_ms > 2 * max(shortest_ms, 0.0):
                yield group
                shortest_ms, group = left_ms, []
            group.append(turn)
        yield group


def _batches(engine: EagerEngine, group: Sequence[Turn]) -> Iterator[Sequence[Turn]]:
    """The frames of a group, whose turn has come; those that are processed at one scale are a batch."""
    batches: dict[tuple[float, tuple[int, int]], list[Turn]] = {}
    for turn in group:
        plan = turn.stream.plan(turn, engine.clock.now_ns(), len(group))
        batches.setdefault((plan.scale, padded_size(*plan.size)), []).append(turn)
    for batch in batches.values():
        for turn in batch:
            # Now: a limit counts from when the work begins, which for this batch is behind the ones before.
            turn.deadline = turn.stream.deadline(turn, engine.clock.now_ns())
        yield batch


def process(engine: EagerEngine, batch: Sequence[Turn]) -> None:
    """Encode the frames of a batch and, unless they are the first of their streams, solve their pairs."""
    plans = [turn.plan for turn in batch if turn.plan is not None]
    plan, direction = plans[0], batch[0].stream.settings.direction
    slots, images = [turn.stream.slot for turn in batch], [turn.image for turn in batch]
    sizes = [each.size for each in plans]
    engine.stages.begin(math.prod(plan.size))
    if batch[0].starts:
        engine.encode(slots, images, sizes)
        for turn in batch:
            engine.advance(turn.stream.slot, keep_state=False)
            turn.stream.begin(turn)
        return
    for slot, each in zip(slots, plans, strict=True):
        if each.reencode:
            engine.reencode(slot, each.size, each.ratio)
    engine.encode(slots, images, sizes)
    for slot, each in zip(slots, plans, strict=True):
        if each.prepare:
            engine.prepare(slot, direction, alone=len(batch) == 1)
    compared = [turn for turn in batch if turn.stream.settings.warm]
    found = engine.match([turn.stream.slot for turn in compared], direction) if compared else []
    for turn, likeness in zip(compared, found, strict=True):
        turn.alike = likeness
    so_far_ms = engine.stages.read(wait=False)
    limits = [turn.stream.limits(turn, so_far_ms, len(batch)) for turn in batch]
    for turn in compared:
        if not turn.stream.warm:
            engine.start_cold(turn.stream.slot)
    engine.solve(slots, direction, limits[0] if len(limits) == 1 else Limits.common(limits), plan.scale)
    settings = [turn.stream.settings for turn in batch]
    asked = [Wanted(each.residual, each.uncertainty) for each in settings]
    palettes = [None if each.refinement else each.palette for each in settings]
    solved = engine.finish(slots, direction, Wanted(*map(any, zip(*asked, strict=True))), palettes)
    if any(each.refinement for each in settings):
        solved = [refine(turn, one) for turn, one in zip(batch, solved, strict=True)]
        engine.stages.lap(REFINE)
    stage_ms = engine.stages.read()
    for turn, one, wanted in zip(batch, solved, asked, strict=True):
        info = turn.stream.conclude(turn, one, stage_ms, engine.clock.now_ns(), len(batch))
        engine.advance(turn.stream.slot, keep_state=turn.stream.warm)
        residual = one.residual if wanted.residual else None
        uncertainty = one.uncertainty if wanted.uncertainty else None
        turn.result = FlowResult(one.flow, residual, info, uncertainty, one.colors)


def refine(turn: Turn, solved: Solved) -> Solved:
    """The same with a field that is refined between the frames as they came, if the settings ask for it."""
    settings, last = turn.stream.settings, turn.stream.last
    if not settings.refinement or last is None:
        return solved
    first, second = last.image, turn.image
    if settings.direction == "backward":
        first, second = second, first
    return replace(solved, flow=refined(solved.flow, first, second, settings.refinement))
