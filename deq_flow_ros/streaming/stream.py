# SPDX-License-Identifier: Apache-2.0
"""A stream decides when it starts anew, at which scale and until when a frame is processed, and where its solve starts.

It deals with times, costs and figures, and has no tensors. An engine carries out its decisions.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace

import numpy as np

from deq_flow_ros.streaming.continuity import MIN_MATCH, UNMATCHED, Seen, StampOrder, look, why_no_start
from deq_flow_ros.streaming.costs import COARSE, REFINE, CostModel
from deq_flow_ros.streaming.eager import Slot
from deq_flow_ros.streaming.interface import EstimatorSettings, FlowInfo, FlowResult, Likeness, Solved
from deq_flow_ros.streaming.plan import PATIENCE, Deadline, Limits, Moment, Plan, make_plan, scale_ladder


@dataclass(eq=False)
class Turn:
    """A frame on its way through a stream."""

    stream: Stream
    image: np.ndarray  # (H, W, 3) uint8 RGB
    arrival_ns: int
    time_limit_ms: float | None
    seen: Seen
    starts: bool  # whether it is the first frame of its stream
    repeated: bool  # whether it is the same as the one before
    plan: Plan | None = None  # known once its turn has come
    deadline: Deadline | None = None  # likewise; None also without a budget or limit
    alike: Likeness | None = None  # how alike it and the last one are; None where the solve starts cold anyway
    result: FlowResult | None = None  # at its end; None for a first frame


@dataclass(frozen=True)
class Last:
    """What a stream keeps of its last frame; of the one before, image and stamp, if the pair was solved."""

    image: np.ndarray
    seen: Seen
    scale: float
    before: tuple[np.ndarray, int] | None = None


class Stream:
    """The frames of one camera.

    :param max_pixels: the largest number of pixels of a processed frame.
    :param slot: what an engine keeps of the stream, which is cleared when that begins anew; nobody else looks into it.
    :ivar reset_reason: see ``FlowEstimator``, likewise ``left_out``.
    :ivar last: the first frame of the next pair; None: the next frame is a first one.
    :ivar warm: whether there is a state from which the next solve can start.
    :ivar ahead: whether that state was moved along already.
    :ivar likeness: the likeness of the last pair at its flow; None if it is not known.
    """

    def __init__(self, settings: EstimatorSettings, max_pixels: int, slot: Slot) -> None:
        self.settings, self.max_pixels, self.slot = settings, max_pixels, slot
        self.costs = CostModel()
        self.scale = settings.max_scale
        self._recent_ms: deque[float] = deque(maxlen=PATIENCE)
        self.reset("start")

    def reset(self, reason: str) -> None:
        """Forget everything except the learnt costs and the scale."""
        self.left_out: str | None = None
        self._order = StampOrder()
        self._begin_anew(reason)

    def _begin_anew(self, reason: str) -> None:
        self.reset_reason: str | None = reason
        self.last: Last | None = None
        self.warm = self.ahead = False
        self.likeness: float | None = None
        self.slot.clear()

    def change(self, settings: EstimatorSettings) -> None:
        """Change the settings. The scale changes if their limits require it.

        Another direction starts the stream anew, because the last fixed point then means something else.
        """
        before, self.settings = self.settings, settings
        if settings.refinement != before.refinement:
            self.costs.forget_stage(REFINE)
        if settings.direction != before.direction and self.last is not None:
            self.reset(f"direction changed from {before.direction} to {settings.direction}")

    def ladder(self, size: tuple[int, int]) -> tuple[float, ...]:
        """The scales for frames of this size (H, W), largest first."""
        return scale_ladder(size, self.settings.min_scale, self.settings.max_scale, self.max_pixels)

    def take(self, image: np.ndarray, stamp_ns: int, arrival_ns: int, time_limit_ms: float | None) -> Turn | None:
        """Take the next frame. If it does not continue the stream, the stream starts anew.

        :returns: None if the frame is left out (``left_out`` says why); then the stream is unchanged.
        """
        previous = None if self.last is None else self.last.seen
        seen, reason = look(image, stamp_ns, self._order, previous, self.settings.max_gap_ms)
        self.left_out = reason if seen is None else None
        if seen is None:
            return None
        if reason is not None:
            self._begin_anew(reason)
        last = self.last
        repeated = last is not None and np.array_equal(seen.layout, last.seen.layout)  # first, as these are small
        repeated = repeated and last is not None and np.array_equal(image, last.image)
        return Turn(self, image, arrival_ns, time_limit_ms, seen, last is None, repeated)

    def deadline(self, turn: Turn, now_ns: int) -> Deadline | None:
        """The deadline of a frame if the work on it begins now."""
        return Deadline.soonest(turn.arrival_ns, self.settings.latency_budget_ms, turn.time_limit_ms, now_ns)

    def plan(self, turn: Turn, now_ns: int, batch_size: int) -> Plan:
        """The plan for a frame, now that its turn has come."""
        deadline = turn.deadline = self.deadline(turn, now_ns)
        left_ms = None if deadline is None else (deadline.at_ns - now_ns) / 1e6
        if left_ms is not None:
            self._recent_ms.append(left_ms)
        encoded_scale, ahead = (None, True) if self.last is None else (self.last.scale, self.ahead)
        size, ladder = turn.seen.size, self.ladder(turn.seen.size)
        moment = Moment(size, ladder, self.scale, encoded_scale, ahead, left_ms, self._recent_ms)
        plan = turn.plan = make_plan(moment, self._costs(batch_size))
        if left_ms is not None:
            if plan.moved:
                self._recent_ms.clear()
            self.scale = plan.scale
        if plan.reencode:
            assert self.last is not None
            self.last, self.likeness = replace(self.last, scale=plan.scale), None  # nothing compares across scales
        return plan

    def limits(self, turn: Turn, so_far_ms: dict[str, float], batch_size: int) -> Limits:
        """When the solve of a frame ends, given the times of its stages so far.

        If the last motion does not fit, a cold start is better: ``warm`` is False from now on.
        """
        if self.warm and turn.alike is not None and (reason := why_no_start(*turn.alike, self.likeness)) is not None:
            self.warm, self.reset_reason = False, reason
        assert turn.plan is not None
        settings, rest = self.settings, self._costs(batch_size).rest(math.prod(turn.plan.size), so_far_ms)
        return Limits.of(turn.plan, rest, turn.deadline, not self.warm, settings.max_iterations, settings.tolerance_px)

    def _costs(self, batch_size: int) -> CostModel:
        return self.costs if batch_size == 1 else self.costs.of_batch(batch_size)

    def begin(self, turn: Turn) -> None:
        """Note that a frame is encoded, and that it is the first of the stream."""
        assert turn.plan is not None
        self.last = Last(turn.image, turn.seen, turn.plan.scale)

    def conclude(
        self, turn: Turn, solved: Solved, stage_ms: dict[str, float], now_ns: int, batch_size: int
    ) -> FlowInfo:
        """Learn the costs of a pair, and return how its flow was computed. The frame is the last one now."""
        plan, last, settings = turn.plan, self.last, self.settings
        assert plan is not None and last is not None
        self._costs(batch_size).add(math.prod(plan.size), stage_ms, solved.evaluations)
        latency_ms = (now_ns - turn.arrival_ns) / 1e6
        late = settings.latency_budget_ms is not None and latency_ms > settings.latency_budget_ms
        info = FlowInfo(
            stamp_ns=turn.seen.stamp_ns, previous_stamp_ns=last.seen.stamp_ns, direction=settings.direction,
            iterations=solved.iterations, stop_reason=solved.stop_reason, warm=self.warm,
            residual_px=solved.residual_px / plan.scale if solved.iterations else math.nan,
            reset_reason=self.reset_reason, scale=plan.scale, stage_ms=stage_ms, latency_ms=latency_ms,
            budget_ms=settings.latency_budget_ms, time_limit_ms=turn.time_limit_ms, batch_size=batch_size,
            starved=late and plan.lowest and solved.evaluations <= 1 and COARSE not in stage_ms,
            runtime=solved.runtime, likeness=solved.likeness, repeated=turn.repeated,
        )  # fmt: skip
        self.last = Last(turn.image, turn.seen, plan.scale, (last.image, last.seen.stamp_ns))
        self.reset_reason, self.ahead, self.warm = None, False, settings.warm
        self.likeness = solved.likeness
        if settings.warm and solved.likeness < MIN_MATCH:
            self.warm, self.reset_reason = False, UNMATCHED
        if solved.stop_reason == "diverged":
            self.warm, self.reset_reason = False, "the state was not finite"
        return info
