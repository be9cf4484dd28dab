# SPDX-License-Identifier: Apache-2.0
"""The way of frames through their estimators, together where they can share a batch. One frame is a batch of one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from deq_flow_ros.streaming.continuity import Seen
from deq_flow_ros.streaming.costs import StageClock, number_of_pixels, scaled_size
from deq_flow_ros.streaming.deadline import Deadline
from deq_flow_ros.streaming.frames import EncodedImage, check_frame, encode_images, processed_size
from deq_flow_ros.streaming.pairs import Limits, solve_pairs
from deq_flow_ros.streaming.result import FlowResult

if TYPE_CHECKING:
    from deq_flow_ros.streaming.estimator import FlowEstimator


@dataclass(frozen=True, eq=False)
class UpdateRequest:
    """The next frame of one estimator's stream; the values are those of ``FlowEstimator.update``.

    :raises ValueError: if frame or limit are not as described there.
    """

    estimator: FlowEstimator
    frame: np.ndarray
    stamp_ns: int
    arrival_ns: int | None = None
    time_limit_ms: float | None = None

    def __post_init__(self) -> None:
        check_frame(self.frame)
        if self.time_limit_ms is not None and not math.isfinite(self.time_limit_ms):
            raise ValueError(f"time_limit_ms must be a finite number or None, got {self.time_limit_ms!r}")


@dataclass(frozen=True)
class StreamFrame:
    """A frame on its way through an estimator.

    :ivar place: in the list of requests.
    :ivar arrival_ns: the request's, or when it was taken up.
    :ivar deadline: counted from when its turn came.
    """

    request: UpdateRequest
    place: int
    arrival_ns: int
    seen: Seen
    deadline: Deadline | None = None

    @property
    def estimator(self) -> FlowEstimator:
        """Whose stream it belongs to."""
        return self.request.estimator

    @property
    def image(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        return self.request.frame

    def with_deadline(self) -> StreamFrame:
        """This frame, with the deadline that it has if its turn is now."""
        budget_ms = self.estimator.settings.latency_budget_ms
        now_ns = self.estimator.clock.now_ns()
        deadline = Deadline.soonest(self.arrival_ns, budget_ms, self.request.time_limit_ms, now_ns)
        return replace(self, deadline=deadline)


@torch.inference_mode()
def update_together(requests: Sequence[UpdateRequest]) -> list[FlowResult | None]:
    """Take the next frame of several streams; the results are those of each one's ``update``, in the same order.

    Frames of one padded size and processing scale, whose estimators agree on direction, iterations and tolerance, are
    encoded and solved as one batch: for a GPU this is hardly more work than one of them. On a CPU it is as much work as
    one after the other, and all are done at the end of it. The rest is done one by one, as the requests stand.

    A batch ends at the soonest deadline in it, so a frame that has more than twice the time of the most pressed one is
    not put with it, but done afterwards. A ``time_limit_ms`` counts from when the work on the frame begins.

    :raises ValueError: if an estimator occurs twice, or their models or clocks are not the same object; all streams
        stay as they were. After any other error the streams are in an unknown state: ``reset`` them all.
    """
    _check(requests)
    frames = [_enter(request, place) for place, request in enumerate(requests)]
    results: list[FlowResult | None] = [None] * len(frames)
    for group in _groups(frames):
        for scale, batch in _scales(group):
            for frame, result in zip(batch, _process(batch, scale), strict=True):
                results[frame.place] = result
    return results


def _check(requests: Sequence[UpdateRequest]) -> None:
    estimators = [request.estimator for request in requests]
    if len(set(map(id, estimators))) != len(estimators):
        raise ValueError("an estimator takes one frame at a time, got several requests for one estimator")
    if len({id(estimator.model) for estimator in estimators}) > 1:
        raise ValueError("only estimators of one model can be updated together, got several models")
    if len({id(estimator.clock) for estimator in estimators}) > 1:
        raise ValueError("only estimators of one clock can be updated together, got several clocks")


def _enter(request: UpdateRequest, place: int) -> StreamFrame:
    """Look at a frame; where it does not continue its stream, the stream starts anew."""
    arrival_ns = request.estimator.clock.now_ns() if request.arrival_ns is None else request.arrival_ns
    frame = StreamFrame(request, place, arrival_ns, Seen.of(request.frame, request.stamp_ns))
    reason = request.estimator._discontinuity(frame)
    if reason is not None:
        request.estimator.reset(reason)
    return frame


def _groups(frames: Sequence[StreamFrame]) -> Iterator[list[StreamFrame]]:
    """Frames that may share a batch: alike, and with times left that do not differ too much, the shortest first."""
    alike: dict[tuple[object, ...], list[tuple[float, int, StreamFrame]]] = {}
    for frame in frames:
        starts = frame.estimator._previous is None
        key = (starts, processed_size(frame.image, 1.0), *frame.estimator.settings.solver)
        deadline = frame.with_deadline().deadline
        left_ms = math.inf if deadline is None else deadline.left_ms(frame.estimator.clock.now_ns())
        alike.setdefault(key, []).append((left_ms, frame.place, frame))
    for members in alike.values():
        members.sort(key=lambda member: member[:2])
        shortest_ms = members[0][0]
        group: list[StreamFrame] = []
        for left_ms, _, frame in members:
            if left_ms > 2 * max(shortest_ms, 0.0):
                yield group
                shortest_ms, group = left_ms, []
            group.append(frame)
        yield group


def _scales(group: Sequence[StreamFrame]) -> Iterator[tuple[float, list[StreamFrame]]]:
    """The scale of each frame of a group whose turn has come; those of one scale are a batch."""
    batches: dict[tuple[float, tuple[int, int]], list[StreamFrame]] = {}
    for frame in group:
        frame = frame.with_deadline()
        scale = frame.estimator._choose_scale(frame, len(group))
        batches.setdefault((scale, processed_size(frame.image, scale)), []).append(frame)
    for (scale, _), batch in batches.items():
        # Once more: a limit counts from when the work begins, which for this batch is behind the ones before.
        yield scale, [frame.with_deadline() for frame in batch]


def _process(batch: Sequence[StreamFrame], scale: float) -> Sequence[FlowResult | None]:
    """Encode a batch and, unless its frames are the first of their streams, solve it."""
    model = batch[0].estimator.model
    first = batch[0]
    height, width = first.image.shape[:2]
    pixels = number_of_pixels(scaled_size(height, width, scale))
    stages = first.estimator.clock.stages(model.device, pixels)
    encoded = encode_images(model, [frame.image for frame in batch], scale, stages)
    if first.estimator._previous is None:
        for frame, image in zip(batch, encoded, strict=True):
            frame.estimator._remember(frame, image)
        return [None] * len(batch)
    pairs = [frame.estimator._pair(image, len(batch), stages) for frame, image in zip(batch, encoded, strict=True)]
    uncertainty = any(frame.estimator.settings.uncertainty for frame in batch)
    solved = solve_pairs(model, pairs, _limits(batch, encoded, stages), stages, uncertainty)
    stage_ms = stages.read()
    return [
        frame.estimator._conclude(frame, image, solved, i, stage_ms)
        for i, (frame, image) in enumerate(zip(batch, encoded, strict=True))
    ]


def _limits(batch: Sequence[StreamFrame], encoded: Sequence[EncodedImage], stages: StageClock) -> Limits:
    """For the solve of a batch: the soonest deadline, the highest expectation of any of its frames."""
    models = [frame.estimator._costs.of_batch(len(batch)) for frame in batch]
    known = [(costs, image.pixels) for costs, image in zip(models, encoded, strict=True)]
    so_far_ms = stages.read(wait=False)
    slowdown = max(costs.slowdown(pixels, so_far_ms) for costs, pixels in known)

    def expected_ms(*names: str) -> float:
        return slowdown * max(costs.high(pixels, *names) for costs, pixels in known)

    settings = batch[0].estimator.settings
    ends = [frame.deadline.work_until_ns for frame in batch if frame.deadline is not None]
    # A late answer is better than none: a cold state says nothing yet, and at the lowest scale nothing else is left to
    # give way, so the flow would never change again.
    needs_one = any(
        frame.estimator._is_cold() or frame.estimator._is_lowest(image)
        for frame, image in zip(batch, encoded, strict=True)
    )
    return Limits(
        clock=batch[0].estimator.clock,
        max_iterations=settings.max_iterations,
        tolerance=None if settings.tolerance_px is None else settings.tolerance_px * encoded[0].scale,
        deadline_ns=min(ends) - round(1e6 * expected_ms("upsample", "output")) if ends else None,
        min_iterations=int(needs_one),
        iteration_ms=expected_ms("iteration"),
        coarse_ms=expected_ms("coarse"),
    )
