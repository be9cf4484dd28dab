# SPDX-License-Identifier: Apache-2.0
"""Runs one setting on a stream of frames: the outcome of every frame, in order, and the fields of every pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from deq_flow_ros.evaluation.inputs import InputFrame, Truth
from deq_flow_ros.evaluation.methods import Estimator, ReverseFlow, Setting, make_estimator
from deq_flow_ros.evaluation.records import (
    DROPPED,
    FIRST,
    SOURCE,
    FrameOutcome,
    FrameRecord,
    PairFields,
    measure,
)  # fmt: skip
from deq_flow_ros.host import TimeShares
from deq_flow_ros.imaging import MediaError, Pace
from deq_flow_ros.model import DEQFlow
from deq_flow_ros.streaming.clock import OVERHEAD, CostTable, VirtualClock, measure_costs
from deq_flow_ros.streaming.continuity import StampOrder, why_anew
from deq_flow_ros.streaming.interface import LARGEST_SCALE, SUPERSEDED
from deq_flow_ros.streaming.plan import scale_ladder


class SettingRun:
    """Runs one setting, and processes every frame, whatever time it takes.

    :param truth: gives the true flow of a pair, if it is known.
    :param reverse: computes the flow in the other direction; None: the consistency is not measured.
    :param shares: accounts for the time spent.
    :ivar played_s: how long the stream has lasted so far, if frames come at their own pace.
    """

    played_s: float | None = None

    def __init__(
        self, setting: Setting, estimator: Estimator, truth: Truth | None = None, reverse: ReverseFlow | None = None,
        shares: TimeShares | None = None,
    ) -> None:  # fmt: skip
        self.setting, self.estimator, self.shares = setting, estimator, shares or TimeShares()
        self._truth, self._reverse = truth, reverse
        self._previous: InputFrame | None = None
        self._order = StampOrder()
        self._last: dict[int, PairFields] = {}  # the last pair by the stamp of its later frame

    def take(self, frame: InputFrame) -> Iterator[FrameOutcome]:
        """Take the next frame. Yields the outcomes that are known by now, of it or of earlier frames."""
        reason = frame.problem if frame.image is None else self._order.why_out(frame.stamp_ns)
        if reason:
            yield from self.leave_out(_dropped(frame, reason))
        else:
            yield from self.queue(frame)

    def leave_out(self, outcome: FrameOutcome) -> Iterator[FrameOutcome]:
        """Take a frame that does not fit into the stream; see ``take``."""
        yield outcome

    def queue(self, frame: InputFrame) -> Iterator[FrameOutcome]:
        """Take the next frame that fits into the stream; see ``take``."""
        yield self.process(frame)

    def finish(self) -> Iterator[FrameOutcome]:
        """The remaining outcomes, after the last frame."""
        return iter(())

    def process(self, frame: InputFrame, arrival_ns: int | None = None) -> FrameOutcome:
        """Compute the flow of a frame, and measure it.

        :param arrival_ns: when the frame arrived, on the estimator's clock; None is now.
        """
        assert frame.image is not None
        if (last := self._previous) is not None:
            # Of two frames out of order, ``take`` has left out one; the estimator must not do so once more.
            if anew := why_anew(last.stamp_ns, frame.stamp_ns):
                self.estimator.reset(anew)
            for name in SOURCE:  # another camera, as in the node
                if (before := getattr(last, name)) != (now := getattr(frame, name)):
                    self.estimator.reset(f"{name} changed from {before!r} to {now!r}")
        try:
            with self.shares.of("computing"):
                result = self.estimator.update(frame.image, frame.stamp_ns, arrival_ns)
        except ValueError as error:  # the frame is too small; the stream stays as it was
            return _dropped(frame, str(error))
        if self.estimator.left_out:
            return _dropped(frame, self.estimator.left_out)
        previous, self._previous = self._previous, frame
        if result is None:
            reason = self.estimator.reset_reason or ""
            return FrameOutcome(FrameRecord(frame.index, frame.stamp_ns, FIRST, reason), frame=frame)
        assert previous is not None and previous.image is not None
        images, direction = (previous.image, frame.image), self.setting.direction
        with self.shares.of("measuring"):
            truth, visible = (self._truth and self._truth(previous, frame, direction)) or (None, None)
            backward = self._reverse.of(frame.index, *images) if self._reverse is not None else None
            fields = PairFields(
                *images, result.flow, result.residual, truth, visible, backward, direction, result.uncertainty
            )
            before = self._last.get(result.info.previous_stamp_ns)  # None at the beginning of a stream
            measures = measure(fields, before)
        self._last = {result.info.stamp_ns: fields}
        info = replace(result.info, stage_ms={"convert": frame.convert_ms, **result.info.stage_ms})
        return FrameOutcome(FrameRecord.of_flow(frame.index, info, measures), fields, info, frame)


def _dropped(frame: InputFrame, reason: str) -> FrameOutcome:
    return FrameOutcome(FrameRecord(frame.index, frame.stamp_ns, DROPPED, reason), frame=frame)


class SimulatedRun(SettingRun):
    """Runs one setting as on a robot: of the frames that arrive while it works, only the newest is kept.

    They arrive at their stamps, on a clock that is advanced by measured costs only. Deadlines, scale and drops are
    therefore those of the machine on which the costs were measured, and the same costs give the same results again.

    :param clock: the clock of the estimator.
    :param period_ns: the time between frames if their stamps do not tell it.
    """

    def __init__(self, clock: VirtualClock, period_ns: int, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._clock, self._period_ns, self._pace = clock, period_ns, Pace(period_ns)
        self._waiting: tuple[InputFrame, int] | None = None
        self._behind: list[FrameOutcome] = []  # of frames that came after the one that waits
        self._first_ns: int | None = None
        self._latest_ns = 0  # arrival of the frame that arrived last

    def queue(self, frame: InputFrame) -> Iterator[FrameOutcome]:
        # The outcome of the previous frame is known only now.
        if self._first_ns is None:
            assert frame.image is not None
            self.estimator.warm_up(*frame.image.shape[:2])  # as the node does in configure
            self._first_ns = self._latest_ns = self._clock.now_ns()
        # The arrival on the virtual clock: as long after the previous frame as the stamps say, without long gaps.
        self._latest_ns = arrival_ns = self._latest_ns + self._pace.step(frame.stamp_ns)[0]
        self.played_s = (arrival_ns - self._first_ns + self._period_ns) * 1e-9
        if self._waiting is not None:
            waiting, its_arrival_ns = self._waiting
            superseded = arrival_ns <= self._clock.now_ns()
            yield _dropped(waiting, SUPERSEDED) if superseded else self._work(waiting, its_arrival_ns)
            yield from self._behind
        self._waiting, self._behind = (frame, arrival_ns), []

    def leave_out(self, outcome: FrameOutcome) -> Iterator[FrameOutcome]:
        if self._waiting is None:
            yield outcome
        else:
            self._behind.append(outcome)  # outcomes keep the order of the frames

    def finish(self) -> Iterator[FrameOutcome]:
        if self._waiting is not None:
            yield self._work(*self._waiting)
            yield from self._behind
            self._waiting, self._behind = None, []

    def _work(self, frame: InputFrame, arrival_ns: int) -> FrameOutcome:
        clock = self._clock
        clock.wait_until(arrival_ns)
        waited_ms = (clock.now_ns() - arrival_ns) / 1e6
        assert frame.image is not None
        pixels, start_ns = frame.image.shape[0] * frame.image.shape[1], clock.now_ns()
        clock.charge("convert", pixels)
        clock.charge(OVERHEAD, pixels)
        frame = replace(frame, convert_ms=(clock.now_ns() - start_ns) / 1e6)
        outcome = self.process(frame, arrival_ns)
        with self.shares.of("computing"):
            self.estimator.prepare()
        if outcome.fields is None:
            return outcome
        stage_ms = {"wait": waited_ms, **outcome.record.stage_ms}
        return replace(outcome, record=replace(outcome.record, stage_ms=stage_ms))


def measure_setting(
    setting: Setting, model: DEQFlow | None, images: Sequence[np.ndarray], convert_ms: Sequence[float] = ()
) -> CostTable:
    """Measure how long the stages of a setting take on this machine, at every scale that it may use.

    :param images, convert_ms: see ``measure_costs``.
    :raises MediaError: if there are fewer than two images.
    """
    if len(images) < 2:
        raise MediaError(f"expected at least two readable frames to measure the costs, got {len(images)}")
    scales: tuple[float, ...] = (1.0,)
    if model is not None and setting.solves:
        height, width = images[0].shape[:2]
        ladder = scale_ladder((height, width), setting.min_scale, setting.max_scale, model.max_pixels)
        scales = ladder if setting.budget_ms else ladder[:1]
    iterations = min(4, setting.max_iterations)
    fixed = replace(setting, budget_ms=None, tolerance_px=None, max_iterations=iterations)

    def estimator(scale: float) -> Estimator:
        scale = min(scale, LARGEST_SCALE)  # small frames are enlarged beyond it
        return make_estimator(replace(fixed, min_scale=scale, max_scale=scale), model)

    return measure_costs(estimator, scales, images, convert_ms)
