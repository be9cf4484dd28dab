# SPDX-License-Identifier: Apache-2.0
"""``FlowEstimator`` computes the flow of a stream of frames, as well as the time allows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np

from deq_flow_ros.model import DEQFlow
from deq_flow_ros.streaming import batch
from deq_flow_ros.streaming.clock import MACHINE, Clock
from deq_flow_ros.streaming.engine import Engine
from deq_flow_ros.streaming.plan import number_of_pixels, scaled_size
from deq_flow_ros.streaming.result import FlowResult
from deq_flow_ros.streaming.runtime import engine_of
from deq_flow_ros.streaming.settings import LARGEST_SCALE, EstimatorSettings
from deq_flow_ros.streaming.stream import Stream


class FlowEstimator:
    """Dense flow of a stream of frames under a latency budget.

    Each frame is encoded once. The fixed point of a pair (hidden state and flow) is moved along the motion and becomes
    the start of the next solve, which stops before an absolute deadline. If not even one iteration fits by the costs
    that were learnt, frames are processed at a smaller scale until there is time again.

    Only one thread at a time may use the estimators of a model.

    :param model: a model from ``load_model``, which several estimators may share; or an engine, which has a clock.
    :param clock: the clock for deadlines and latencies; None: the clock of the machine.
    :param runtime: see ``choose_runtime``; not used with an engine.
    :param settings: settings of ``EstimatorSettings`` by name, such as ``latency_budget_ms=50``.
    :ivar model: the model of the engine.
    :ivar clock: the clock of the engine, for deadlines and latencies.
    :ivar engine: computes the flow.
    :ivar stream: decides what is computed.
    :ivar slot: the data that the engine keeps for this stream.
    :raises ValueError: for unknown settings, values outside of their range, or a runtime that the device cannot run.
    """

    def __init__(
        self, model: DEQFlow | Engine[Any], clock: Clock | None = None, runtime: str = "auto", **settings: Any
    ) -> None:
        if isinstance(model, Engine):
            self.engine: Engine[Any] = model
        elif isinstance(model, (str, Path)):
            raise ValueError(f"expected a model, got its name: write FlowEstimator(load_model({str(model)!r}))")
        else:
            self.engine = engine_of(model, MACHINE if clock is None else clock, runtime)
        self.model, self.clock = self.engine.model, self.engine.clock
        self.stream = Stream(self._checked(EstimatorSettings().changed(**settings)), self.model.max_pixels)
        self.slot = self.engine.slot()

    @property
    def settings(self) -> EstimatorSettings:
        """The present settings."""
        return self.stream.settings

    @property
    def reset_reason(self) -> str | None:
        """Why the next pair starts anew, or why the stream did with its last frame; None within a stream."""
        return self.stream.reset_reason

    @property
    def left_out(self) -> str | None:
        """Why the last frame was left out of the stream (it was sent twice or came late); None if it was not."""
        return self.stream.left_out

    def change(self, **settings: Any) -> None:
        """Change some settings. The stream goes on, unless the direction changes.

        :raises ValueError: for unknown settings, or values outside of their range; then none is changed.
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
        """Forget the stream, but not the learnt costs. The next frame is a first one, with this reason."""
        self.stream.reset(reason)
        self.slot.clear()

    def warm_up(self, height: int, width: int) -> None:
        """Learn the costs of frames of this size before the first one comes. Afterwards there is no stream.

        :raises ValueError: for a size that no frame may have.
        """
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        batch.UpdateRequest(self, noise, 0)  # refuses a size that no frame may have
        ladder = self.stream.ladder((height, width))
        for scale in sorted({ladder[0], ladder[-1], *(s for s in ladder if s == 1)}, reverse=True):
            trial = FlowEstimator(
                self.engine,
                min_scale=min(scale, LARGEST_SCALE),  # small frames are enlarged beyond it
                max_scale=min(scale, LARGEST_SCALE),
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
                if pair == 0:  # its time includes allocations and the choice of kernels
                    self.stream.costs.forget(number_of_pixels(scaled_size(height, width, scale)))
        self.reset("start")

    def take_costs_of(self, other: FlowEstimator) -> None:
        """Copy the costs that another estimator of the same model has learnt, instead of a warm-up."""
        self.stream.costs = copy.deepcopy(other.stream.costs)

    def update(
        self, frame: np.ndarray, stamp_ns: int, arrival_ns: int | None = None, time_limit_ms: float | None = None
    ) -> FlowResult | None:
        """Process the next frame of the stream.

        :param frame: (H, W, 3) uint8 RGB, at least 16x16. It is copied, so its memory may be used for the next one.
        :param stamp_ns: its time stamp, an integer in nanoseconds.
        :param arrival_ns: when it arrived, on ``clock.now_ns()``, from when the budget counts. None: now.
        :param time_limit_ms: the longest time from now on, whatever the budget allows, which is kept in the same way;
            None: only the budget holds.
        :returns: the flow between the last frame and this one. None if the frame is left out because its stamp is not
            later than the last one; then ``left_out`` says so, and the stream is unchanged. None also if there is no
            last frame; then ``reset_reason`` says why.
        :raises ValueError: if the frame, a time or the limit is not as described; the stream is unchanged.
        """
        own = frame.copy() if isinstance(frame, np.ndarray) else frame
        return batch.update_together([batch.UpdateRequest(self, own, stamp_ns, arrival_ns, time_limit_ms)])[0]

    def prepare(self) -> None:
        """Compute ahead what does not depend on the next frame. Call it after a result, while waiting for a frame."""
        last = self.stream.last
        if last is not None and not self.stream.ahead:
            height, width = last.image.shape[:2]
            self.engine.stages.begin(number_of_pixels(scaled_size(height, width, last.scale)))
            self.engine.prepare(self.slot, self.settings.direction)
            self.stream.ahead = True

    def snapshot(self) -> dict[str, np.ndarray]:
        """The present state of the stream for a bug report, as copies on the CPU.

        After the first frame, it has ``image2`` (H, W, 3) uint8 RGB, ``stamp2_ns`` and ``scale``. After a pair, it also
        has ``image1``, ``stamp1_ns``, the start of the solve, ``start_hidden`` (C, h, w) and ``start_flow`` (2, h, w),
        its end, ``hidden`` and ``flow`` (unless it diverged), and the ``likeness`` of the images at the flow, -1..1.
        Flow is float32, in cells of 8 px of the processed image.

        :returns: arrays by name; empty without a stream.
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
