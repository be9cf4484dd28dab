# SPDX-License-Identifier: Apache-2.0
"""What is to be done for a frame, given what was seen, what things cost and the time left: functions without a state.

The processing scale is the largest at which two iterations fit; it is left when not even one fits any more. In a stream
that starts warm the second iteration still improves the flow, those after it hardly, and less than the next larger
scale does: docs/budget.md has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from deq_flow_ros.model import FACTOR
from deq_flow_ros.model.deq_flow import MIN_SIDE
from deq_flow_ros.streaming.costs import PREPARE, REENCODE, CostModel, Rest

# Processing scales, each with about 0.7 of the pixels of the one before.
SCALES = (
    4.0, 3.5, 3.0, 2.5, 2.0, 1.75, 1.5, 1.25, 1.0, 0.875, 0.75, 0.625, 0.5, 0.4375, 0.375, 0.3125, 0.25, 0.21875,
    0.1875, 0.15625, 0.125, 0.109375, 0.09375, 0.078125, 0.0625,
)  # fmt: skip
# Below this short side there is little left to see.
MIN_SCALED_SIDE = 96
# Frames with a shorter side than this are enlarged to MIN_SCALED_SIDE: the network computes on cells of 8x8 px, and
# never saw images of a few cells. At their own size a motion of 3.6 px is missed by 3.5 px at 32x32, by 0.6 at 48x48.
TINY_SIDE = 48
# Of a processed frame, unless the model allows more: all pairs of their cells, 4 bytes each, take some 1 GB.
MAX_PIXELS = 1 << 20
# The scale goes down when one iteration does not fit any more, and up when so many do, in this share of the time.
ITERATIONS_UP, ROOM = 2, 0.9
# Frames at one scale before it goes up, against flapping: a change encodes one frame twice.
PATIENCE = 15
# So many of the last frames may have had less time than the scale needs: a frame that came at a bad moment.
EXCEPTIONS = 2
# Share of the time allowed that is left for what no stage measures: other threads, the scheduler.
RESERVE = 0.03


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """(H, W) at which a frame is processed, without padding."""
    return max(MIN_SIDE, round(height * scale)), max(MIN_SIDE, round(width * scale))


def padded_size(height: int, width: int) -> tuple[int, int]:
    """(H, W) of what is encoded of an image of this size, padding included."""
    return height + -height % FACTOR, width + -width % FACTOR


def number_of_pixels(size: tuple[int, int]) -> int:
    """Of a frame of this (H, W)."""
    return size[0] * size[1]


def scale_ladder(
    size: tuple[int, int], min_scale: float, max_scale: float = 1.0, max_pixels: int = MAX_PIXELS
) -> list[float]:
    """The scales that frames may be processed at, largest first; at least one.

    :param size: (H, W) of the frames.
    :param min_scale: the lowest, above 0; frames are not made smaller than ``MIN_SCALED_SIDE``.
    :param max_scale: the highest, at least ``min_scale``.
    :param max_pixels: of a processed frame, ``DEQFlow.max_pixels``.
    """
    between = [scale for scale in SCALES if min_scale < scale < max_scale]
    scales = [max_scale, *between, min_scale] if min_scale < max_scale else [max_scale]
    allowed = [scale for scale in scales if number_of_pixels(size) * scale**2 <= max_pixels]
    if not allowed:
        return [math.sqrt(max_pixels / number_of_pixels(size))]
    visible = MIN_SCALED_SIDE / min(size)
    if min(size) >= TINY_SIDE:  # frames that are small already are not made smaller
        visible = min(1.0, visible)
    elif number_of_pixels(size) * visible**2 <= max_pixels and allowed[0] < visible:
        return [visible]
    return [scale for scale in allowed if scale >= visible] or allowed[:1]


@dataclass(frozen=True)
class Deadline:
    """A time on a stream's clock.

    :ivar at_ns: when the result has to be there.
    :ivar work_until_ns: when the work should end: a reserve before.
    """

    at_ns: int
    work_until_ns: int

    @classmethod
    def soonest(cls, arrival_ns: int, budget_ms: float | None, limit_ms: float | None, now_ns: int) -> Deadline | None:
        """Whichever comes first: the budget, which counts from the arrival, or the limit, which counts from now.

        :returns: None without either.
        """
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
    """What a stream knows when a frame's turn comes.

    :ivar size: (H, W) of the frame.
    :ivar ladder: the scales it may be processed at, largest first.
    :ivar scale: where the stream stands.
    :ivar encoded_scale: at which its last frame is encoded; None: this frame is the first.
    :ivar ahead: whether what a pair needs besides its second frame is done already, at that scale.
    :ivar left_ms: the time left for all of the work; None: any.
    :ivar recent_ms: the time that the last frames at this scale had, this one the last of them; ``PATIENCE`` at most.
    """

    size: tuple[int, int]
    ladder: Sequence[float]
    scale: float
    encoded_scale: float | None = None
    ahead: bool = True
    left_ms: float | None = None
    recent_ms: Sequence[float] = ()

    @property
    def standing(self) -> float:
        """The scale of the ladder where the stream stands."""
        return next((scale for scale in self.ladder if scale <= self.scale), self.ladder[-1])


@dataclass(frozen=True)
class Plan:
    """What is to be done for a frame.

    :ivar scale: to process it at.
    :ivar size: (H, W) that this makes.
    :ivar reencode: encode the last frame once more, as it was encoded at another scale.
    :ivar ratio: then, this scale by that one; else 1.
    :ivar prepare: carry the state along and prepare the pair, as that was not done ahead, or for another scale.
    :ivar lowest: whether the scale could not be smaller.
    :ivar moved: whether the scale is another one than that where the stream stood.
    :ivar pixels: how many are processed.
    """

    scale: float
    size: tuple[int, int]
    reencode: bool
    ratio: float
    prepare: bool
    lowest: bool
    moved: bool = False
    pixels: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pixels", number_of_pixels(self.size))


def make_plan(moment: Moment, costs: CostModel) -> Plan:
    """The plan for a frame; with a deadline, by what things cost."""
    scale = moment.ladder[0] if moment.left_ms is None else choose_scale(moment, moment.left_ms, costs)
    before = scale if moment.encoded_scale is None else moment.encoded_scale
    again = scale != before
    return Plan(
        scale=scale,
        size=scaled_size(*moment.size, scale),
        reencode=again,
        ratio=scale / before,
        prepare=again or not moment.ahead,
        lowest=scale <= moment.ladder[-1],
        moved=scale != moment.standing,
    )


def choose_scale(moment: Moment, left_ms: float, costs: CostModel) -> float:
    """The scale for a frame that has so much time.

    Frames that arrive while the one before is processed have waited, so the time that is left differs from frame to
    frame. What counts is the time that all but ``EXCEPTIONS`` of the last frames had. Only when a frame would be late
    without any iteration the scale goes down for its sake. No other change is made with a frame that has no time for
    it: it would have to encode two images.
    """
    scales = moment.ladder
    last = len(scales) - 1
    index = list(scales).index(moment.standing)
    usual_ms = sorted(moment.recent_ms)[: EXCEPTIONS + 1][-1] if moment.recent_ms else left_ms
    usually: tuple[str, ...] = () if moment.ahead else (PREPARE,)
    changed = usually if moment.encoded_scale is None else (PREPARE, REENCODE)

    def pixels(place: int) -> int:
        return number_of_pixels(scaled_size(*moment.size, scales[place]))

    known: dict[tuple[int, tuple[str, ...]], list[float]] = {}

    def takes(place: int, iterations: int, besides: tuple[str, ...]) -> float:
        if (place, besides) not in known:
            known[place, besides] = costs.frames(pixels(place), ITERATIONS_UP, *besides)
        return known[place, besides][iterations]

    def now(place: int, iterations: int) -> float:
        return takes(place, iterations, usually if scales[place] == moment.encoded_scale else changed)

    def every(place: int, iterations: int) -> float:
        return takes(place, iterations, usually)

    if now(index, 0) > left_ms:
        while index < last and now(index, 1) > left_ms:
            index += 1
    elif every(index, 1) > usual_ms:
        while index < last and (every(index, ITERATIONS_UP) > usual_ms or now(index, 0) > left_ms):
            index += 1
    elif len(moment.recent_ms) == PATIENCE:
        while (
            index > 0
            and every(index - 1, ITERATIONS_UP) <= ROOM * usual_ms
            and now(index - 1, ITERATIONS_UP) <= left_ms
        ):
            index -= 1
    return scales[index]


@dataclass(frozen=True)
class Limits:
    """When a solve ends.

    :ivar max_iterations: at most.
    :ivar tolerance: of the RMS update, in pixels of what is processed; None: only the other limits end it.
    :ivar deadline_ns: on the clock; what follows the solve must still fit before the frame's own deadline.
    :ivar min_iterations: to make whatever the deadline says.
    :ivar iteration_ms: expected cost of one.
    :ivar coarse_ms: expected cost of the coarse solves of a cold start.
    """

    max_iterations: int
    tolerance: float | None
    deadline_ns: int | None = None
    min_iterations: int = 0
    iteration_ms: float = 0.0
    coarse_ms: float = 0.0

    @classmethod
    def of(
        cls,
        plan: Plan,
        rest: Rest,
        deadline: Deadline | None,
        cold: bool,
        max_iterations: int,
        tolerance_px: float | None,
    ) -> Limits:
        """For one frame.

        :param cold: whether its solve starts from nothing.
        :param tolerance_px: in pixels of the input.
        """
        # A late answer is better than none: a cold state says nothing yet, and at the lowest scale nothing else is left
        # to give way, so the flow would never change again.
        return cls(
            max_iterations=max_iterations,
            tolerance=None if tolerance_px is None else tolerance_px * plan.scale,
            deadline_ns=None if deadline is None else deadline.work_until_ns - round(1e6 * rest.after),
            min_iterations=int(cold or plan.lowest),
            iteration_ms=rest.iteration,
            coarse_ms=rest.coarse,
        )

    @classmethod
    def common(cls, limits: Sequence[Limits]) -> Limits:
        """Of frames that are solved as one batch: the soonest deadline, the highest expectation of any of them."""
        ends = [one.deadline_ns for one in limits if one.deadline_ns is not None]
        return cls(
            limits[0].max_iterations,
            limits[0].tolerance,
            min(ends, default=None),
            max(one.min_iterations for one in limits),
            max(one.iteration_ms for one in limits),
            max(one.coarse_ms for one in limits),
        )
