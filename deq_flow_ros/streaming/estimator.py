# SPDX-License-Identifier: Apache-2.0
"""``FlowEstimator``: frames in, flow out, as good as the time allows."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from deq_flow_ros.model import DEQFlow
from deq_flow_ros.streaming import batch
from deq_flow_ros.streaming.clock import MACHINE, Clock
from deq_flow_ros.streaming.continuity import Seen
from deq_flow_ros.streaming.engine import Engine
from deq_flow_ros.streaming.plan import number_of_pixels, scaled_size
from deq_flow_ros.streaming.result import FlowResult
from deq_flow_ros.streaming.runtime import engine_of
from deq_flow_ros.streaming.settings import EstimatorSettings
from deq_flow_ros.streaming.stream import Last, Stream


class FlowEstimator:
    """Dense flow of a stream of frames under a latency budget.

    Each frame is encoded once. The fixed point of a pair, hidden state and flow, is moved along the motion and is the
    start of the next. Costs are learnt, the solver gets an absolute deadline and stops before it would pass it; when
    not even one iteration fits, the frames are processed at a smaller scale until there is room again.

    One thread at a time, for all estimators of a model.

    :param model: from ``load_model``, on its device. Several estimators may share it. Or an engine, which has its own
        clock.
    :param clock: what deadlines and latencies are measured by; None is the machine's.
    :param runtime: what computes, see ``choose_runtime``; an engine is one already.
    :param settings: those of ``EstimatorSettings``, by name: ``latency_budget_ms=50``.
    :ivar engine: what computes.
    :ivar stream: what decides.
    :ivar slot: what the engine keeps of the stream.
    :raises ValueError: for settings that are none, or outside of their range, or a runtime that the device cannot have.
    """

    def __init__(
        self, model: DEQFlow | Engine[Any], clock: Clock | None = None, runtime: str = "auto", **settings: Any
    ) -> None:
        if isinstance(model, Engine):
            self.engine: Engine[Any] = model
        else:
            self.engine = engine_of(model, MACHINE if clock is None else clock, runtime)
        self.stream = Stream(self._checked(EstimatorSettings().changed(**settings)), self.engine.model.max_pixels)
        self.slot = self.engine.slot()

    @property
    def model(self) -> DEQFlow:
        """What the engine computes with."""
        return self.engine.model

    @property
    def clock(self) -> Clock:
        """What deadlines and latencies are measured by."""
        return self.engine.clock

    @property
    def settings(self) -> EstimatorSettings:
        """As they are now."""
        return self.stream.settings

    @property
    def reset_reason(self) -> str | None:
        """Why the next pair begins anew, or the stream did with its last frame; None within a stream."""
        return self.stream.reset_reason

    @property
    def left_out(self) -> str | None:
        """Why the last frame takes no part in the stream: it was sent twice, or came late; None where it does."""
        return self.stream.left_out

    def change(self, **settings: Any) -> None:
        """Go on with other settings: all of those named, or none of them if they are refused.

        The stream goes on as well, at another scale if the limits demand it; only another direction, in which the last
        fixed point means something else, starts it anew.

        :raises ValueError: for settings that are none, or outside of their range.
        """
        self.stream.change(self._checked(self.settings.changed(**settings)))
        if self.stream.last is None:
            self.slot.clear()

    def _checked(self, settings: EstimatorSettings) -> EstimatorSettings:
        if settings.uncertainty and self.model.uncertainty is None:
            raise ValueError(
                "uncertainty must be False with these weights, which have no head for it; python -m training.train "
                "--recipe uncertainty --init WEIGHTS adds one"
            )
        return settings

    def reset(self, reason: str) -> None:
        """Forget the stream (not the learnt costs); the next frame is a first one, for this reason."""
        self.stream.reset(reason)
        self.slot.clear()

    def warm_up(self, height: int, width: int) -> None:
        """Learn the costs of frames of this size before the first one comes; leaves no stream behind."""
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        ladder = self.stream.ladder((height, width))
        for scale in sorted({ladder[0], ladder[-1], *(s for s in ladder if s == 1)}, reverse=True):
            trial = FlowEstimator(
                self.engine,
                min_scale=scale,
                max_scale=scale,
                tolerance_px=None,
                max_iterations=min(self.settings.max_iterations, 4),
                direction=self.settings.direction,
                warm=self.settings.warm,
                uncertainty=self.settings.uncertainty,
                refinement=self.settings.refinement,
            )
            trial.stream.costs = self.stream.costs
            self.engine.make_ready((height, width), scaled_size(height, width, scale))
            for pair in range(4):
                trial.reset("warm-up")
                trial.update(noise, 0)
                trial.update(noise, 1)
                if pair == 0:  # it paid for allocations and kernel choices
                    self.stream.costs.forget(number_of_pixels(scaled_size(height, width, scale)))
        self.reset("start")

    def take_costs_of(self, other: FlowEstimator) -> None:
        """Know what another estimator of the same model has learnt, in place of a warm-up of one's own."""
        self.stream.costs = copy.deepcopy(other.stream.costs)

    def update(
        self, frame: np.ndarray, stamp_ns: int, arrival_ns: int | None = None, time_limit_ms: float | None = None
    ) -> FlowResult | None:
        """Take the next frame of the stream.

        :param frame: (H, W, 3) uint8 RGB, at least 16x16; kept until the next pair, so not to be written to.
        :param stamp_ns: its time stamp.
        :param arrival_ns: when it arrived, on ``clock.now_ns()``; the budget counts from here. None is now.
        :param time_limit_ms: take no longer than this from now on, whatever the budget allows; None: the budget alone.
            It is kept as the budget is, and shortened as it is: fewer iterations first, then a smaller scale.
        :returns: the flow between the last frame and this one. None where the frame is left out, as its stamp is not
            after that of the last one: ``left_out`` then says so, and the stream stays as it was. None also if there
            is no last frame to compare with: ``reset_reason`` then says why.
        :raises ValueError: if frame or limit are not as described; the stream stays as it was.
        """
        return batch.update_together([batch.UpdateRequest(self, frame, stamp_ns, arrival_ns, time_limit_ms)])[0]

    def prepare(self) -> None:
        """Do what the next pair needs and its frame does not: to be called when a result is out, before a frame."""
        batch.prepare(self)

    def snapshot(self) -> dict[str, np.ndarray]:
        """The stream as it stands, for a bug report; copies, on the CPU.

        After the first frame ``image2`` (H, W, 3) uint8 RGB, ``stamp2_ns`` and ``scale``. After a pair also ``image1``,
        ``stamp1_ns``, where its solve started, ``start_hidden`` (C, h, w) and ``start_flow`` (2, h, w), and where it
        ended, ``hidden`` and ``flow`` (unless it diverged); the flow in cells of 8 px of the processed image, float32;
        and ``likeness`` of its images at the flow that was found, -1..1, which that of the next pair is compared with.

        :returns: by name; empty without a stream.
        """
        stream, last = self.stream, self.stream.last
        if last is None:
            return {}
        arrays = {
            "image2": last.image.copy(),
            "stamp2_ns": np.array(last.seen.stamp_ns, np.int64),
            "scale": np.array(last.scale),
        }
        if stream.likeness is not None:
            arrays["likeness"] = np.array(stream.likeness)
        if last.before is not None:
            arrays["image1"] = last.before[0].copy()
            arrays["stamp1_ns"] = np.array(last.before[1], np.int64)
        return arrays | self.engine.snapshot(self.slot)

    def restore(self, arrays: Mapping[str, np.ndarray], reset_reason: str | None = None) -> None:
        """Go on with the stream of a ``snapshot`` of an estimator with the same model and settings.

        What was learnt of costs is not part of it: see ``learnt``.

        :param reset_reason: that of the estimator when the snapshot was taken.
        """
        self.reset("restored")
        stream = self.stream
        stream.reset_reason = reset_reason
        if not arrays:
            return
        image, scale = arrays["image2"], float(arrays["scale"])
        height, width = image.shape[:2]
        self.engine.restore(self.slot, image, scaled_size(height, width, scale), arrays)
        stream.scale, stream.warm = scale, "hidden" in arrays
        stream.restore(Last(image, Seen.of(image, int(arrays["stamp2_ns"])), scale))
        stream.likeness = float(arrays["likeness"]) if "likeness" in arrays else None

    def learnt(self) -> bytes:
        """What was learnt of costs, and where the processing scale stands; JSON, for ``learn``."""
        return json.dumps(self.stream.learnt(), allow_nan=False).encode()

    def learn(self, learnt: bytes) -> None:
        """Go on with what an estimator with the same model and settings had ``learnt``.

        :raises ValueError: if it is anything else; the estimator stays as it was.
        """
        try:
            self.stream.learn(json.loads(learnt))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"expected what an estimator has learnt, got something else: {error!r}") from error
