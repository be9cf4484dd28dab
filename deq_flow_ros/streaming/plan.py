# SPDX-License-Identifier: Apache-2.0
"""Functions without state that plan the work on a frame, from what the stream knows, the costs and the time left.

The processing scale is the largest at which two iterations fit, and is left when not even one fits any more. Later
iterations improve a warm stream less than the next larger scale does. docs/budget.md has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import NamedTuple

from deq_flow_ros.model import FACTOR
from deq_flow_ros.model.deq_flow import MIN_SIDE
from deq_flow_ros.streaming.costs import PREPARE, REENCODE, CostModel

# Processing scales. Each has about 0.7 of the pixels of the previous one.
SCALES = (
    4.0, 3.5, 3.0, 2.5, 2.0, 1.75, 1.5, 1.25, 1.0, 0.875, 0.75, 0.625, 0.5, 0.4375, 0.375, 0.3125, 0.25, 0.21875,
    0.1875, 0.15625, 0.125, 0.109375, 0.09375, 0.078125, 0.0625,
)  # fmt: skip
# Images with a shorter side than this show too little.
MIN_SCALED_SIDE = 96
# Frames with a shorter side than this are enlarged to MIN_SCALED_SIDE, because the network was not trained on images of
# a few cells: a motion of 3.6 px has an error of 3.5 px at 32x32 and of 0.6 px at 48x48.
TINY_SIDE = 48
# Largest processed frame, unless the model allows more. All pairs of its cells, 4 bytes each, take some 1 GB.
MAX_PIXELS = 1 << 20
# The scale goes up if this number of iterations fits in this share of the cases.
ITERATIONS_UP, ROOM = 2, 0.9
# Number of frames at one scale before it goes up, because each change encodes one frame twice.
PATIENCE = 15
# Number of the last frames that may have had too little time for the scale, because they came at a bad moment.
EXCEPTIONS = 2
# Share of the allowed time that is reserved for what no stage measures: other threads, the scheduler.
RESERVE = 0.03


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """The size (H, W) at which a frame is processed, without padding."""
    return max(MIN_SIDE, round(height * scale)), max(MIN_SIDE, round(width * scale))


def padded_size(height: int, width: int) -> tuple[int, int]:
    """The size (H, W) of an encoded image, with padding."""
    return height + -height % FACTOR, width + -width % FACTOR


@lru_cache(typed=True)
def scale_ladder(
    size: tuple[int, int], min_scale: float, max_scale: float = 1.0, max_pixels: int = MAX_PIXELS
) -> tuple[float, ...]:
    """The scales at which frames of a size (H, W) may be processed, largest first; at least one.

    Frames are not made smaller than ``MIN_SCALED_SIDE``, nor processed with more pixels than ``max_pixels``.
    """
    between = [scale for scale in SCALES if min_scale < scale < max_scale]
    scales = [max_scale, *between, min_scale] if min_scale < max_scale else [max_scale]
    allowed = [scale for scale in scales if math.prod(size) * scale**2 <= max_pixels]
    if not allowed:
        return (math.sqrt(max_pixels / math.prod(size)),)
    visible = MIN_SCALED_SIDE / min(size)
    if min(size) >= TINY_SIDE:  # frames that are small already are not made smaller
        visible = min(1.0, visible)
    elif math.prod(size) * visible**2 <= max_pixels and allowed[0] < visible:
        return (visible,)
    return tuple(scale for scale in allowed if scale >= visible) or (allowed[0],)


class Deadline(NamedTuple):
    """When on a stream's clock the result must be ready, and when the work should end, earlier by a reserve."""

    at_ns: int
    work_until_ns: int

    @classmethod
    def soonest(cls, arrival_ns: int, budget_ms: float | None, limit_ms: float | None, now_ns: int) -> Deadline | None:
        """The earlier end of the budget, which counts from the arrival, and of the limit, which counts from now."""
        ends = []
        if budget_ms is not None:
            ends.append((arrival_ns + round(1e6 * budget_ms), budget_ms))
        if limit_ms is not None:
            ends.append((now_ns + round(1e6 * limit_ms), max(limit_ms, 0.0)))
        if not ends:
            return None
        at_ns, allowed_ms = min(ends)
        return cls(at_ns, at_ns - round(1e6 * RESERVE * allowed_ms))


@dataclass(frozen=True)
class Moment:
    """What a stream knows when the turn of a frame comes."""

    size: tuple[int, int]  # (H, W) of the frame
    ladder: Sequence[float]  # the scales at which it may be processed, largest first
    scale: float  # the present scale of the stream
    encoded_scale: float | None = None  # the scale at which the last frame is encoded; None: this frame is the first
    ahead: bool = True  # whether everything that does not depend on this frame is already done, at that scale
    left_ms: float | None = None  # the time left for all of the work; None: no limit
    recent_ms: Sequence[float] = ()  # the time that the last frames at this scale had, with this one; <= ``PATIENCE``


@dataclass(frozen=True)
class Plan:
    """What is done for a frame."""

    scale: float  # the processing scale
    size: tuple[int, int]  # (H, W) of the processed frame
    reencode: bool  # whether to encode the last frame once more, because it was encoded at another scale
    ratio: float  # this scale divided by that one; else 1
    prepare: bool  # whether to move the state and prepare the pair now, because it was not done ahead at this scale
    lowest: bool  # whether there is no smaller scale
    moved: bool = False  # whether the stream has changed its scale


def make_plan(moment: Moment, costs: CostModel) -> Plan:
    """The plan for a frame. With a deadline, it depends on the costs."""
    scales = moment.ladder
    standing = next((place for place, scale in enumerate(scales) if scale <= moment.scale), len(scales) - 1)
    place = 0 if moment.left_ms is None else _choose(moment, standing, moment.left_ms, costs)
    scale = scales[place]
    before = scale if moment.encoded_scale is None else moment.encoded_scale
    return Plan(
        scale, scaled_size(*moment.size, scale), reencode=scale != before, ratio=scale / before,
        prepare=scale != before or not moment.ahead, lowest=place == len(scales) - 1, moved=place != standing,
    )  # fmt: skip


def _choose(moment: Moment, standing: int, left_ms: float, costs: CostModel) -> int:
    """The place on the ladder of the scale for a frame with this much time left.

    It depends on the time that all but ``EXCEPTIONS`` of the last frames had, because a frame that has to wait for the
    one before has less. It goes down because of a single frame only if that frame would be late without any iteration,
    and does not change with a frame that has no time for the change, which encodes two images.
    """
    scales, index, last = moment.ladder, standing, len(moment.ladder) - 1
    usual_ms = sorted(moment.recent_ms)[: EXCEPTIONS + 1][-1] if moment.recent_ms else left_ms
    usually: tuple[str, ...] = () if moment.ahead else (PREPARE,)
    changed = usually if moment.encoded_scale is None else (PREPARE, REENCODE)

    @cache
    def takes(place: int, besides: tuple[str, ...]) -> list[float]:
        return costs.frames(math.prod(scaled_size(*moment.size, scales[place])), ITERATIONS_UP, *besides)

    def now(place: int, iterations: int) -> float:
        return takes(place, usually if scales[place] == moment.encoded_scale else changed)[iterations]

    def every(place: int, iterations: int) -> float:
        return takes(place, usually)[iterations]

    if now(index, 0) > left_ms:
        while index < last and now(index, 1) > left_ms:
            index += 1
    elif every(index, 1) > usual_ms:
        while index < last and (every(index, ITERATIONS_UP) > usual_ms or now(index, 0) > left_ms):
            index += 1
    elif len(moment.recent_ms) == PATIENCE:
        up = ITERATIONS_UP
        while index > 0 and every(index - 1, up) <= ROOM * usual_ms and now(index - 1, up) <= left_ms:
            index -= 1
    return index


@dataclass(frozen=True)
class Limits:
    """When a solve ends."""

    max_iterations: int
    tolerance: float | None  # of the RMS update, px of the processed frame; None: only the other limits end the solve
    deadline_ns: int | None = None  # on the clock; it leaves time for the stages after the solve
    min_iterations: int = 0  # the number of iterations to make whatever the deadline says
    iteration_ms: float = 0.0  # the cost of an iteration, as expected
    coarse_ms: float = 0.0  # the cost of the coarse solves of a cold start, likewise

    @classmethod
    def of(
        cls, plan: Plan, rest_ms: tuple[float, float, float], deadline: Deadline | None, cold: bool,
        max_iterations: int, tolerance_px: float | None,
    ) -> Limits:  # fmt: skip
        """The limits for one frame, of which the rest costs what ``CostModel.rest`` says."""
        after_ms, iteration_ms, coarse_ms = rest_ms
        # A late result is better than none. A cold state has no flow yet, and at the lowest scale nothing else can be
        # reduced, so the flow would never change again.
        least = int(cold or plan.lowest)
        tolerance = None if tolerance_px is None else tolerance_px * plan.scale
        deadline_ns = None if deadline is None else deadline.work_until_ns - round(1e6 * after_ms)
        return cls(max_iterations, tolerance, deadline_ns, least, iteration_ms, coarse_ms)

    @classmethod
    def common(cls, limits: Sequence[Limits]) -> Limits:
        """The limits for a batch of frames: the earliest deadline and the highest expected costs of any of them."""
        ends = [one.deadline_ns for one in limits if one.deadline_ns is not None]
        return replace(
            limits[0],
            deadline_ns=min(ends, default=None),
            min_iterations=max(one.min_iterations for one in limits),
            iteration_ms=max(one.iteration_ms for one in limits),
            coarse_ms=max(one.coarse_ms for one in limits),
        )
