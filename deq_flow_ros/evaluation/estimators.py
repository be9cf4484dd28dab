# SPDX-License-Identifier: Apache-2.0
"""What computes the flow of a setting: `FlowEstimator`, or one of OpenCV's methods behind the same calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Protocol

import numpy as np
import torch

from deq_flow_ros.evaluation.classical import dense_inverse_search, farneback
from deq_flow_ros.evaluation.settings import Setting
from deq_flow_ros.model import DEQFlow
from deq_flow_ros.streaming import EstimatorSettings, FlowEstimator, FlowInfo, FlowResult
from deq_flow_ros.streaming.clock import Clock
from deq_flow_ros.streaming.continuity import Seen

OPPOSITE = {"forward": "backward", "backward": "forward"}


class Estimator(Protocol):
    """Frames in, flow out; see `FlowEstimator`."""

    reset_reason: str | None

    def update(self, frame: np.ndarray, stamp_ns: int, arrival_ns: int | None = None) -> FlowResult | None:
        """Take the next frame of the stream."""

    def prepare(self) -> None:
        """Do what the next pair needs and its frame does not."""

    def warm_up(self, height: int, width: int) -> None:
        """Learn what frames of this size cost."""

    def reset(self, reason: str) -> None:
        """Forget the stream."""

    def snapshot(self) -> dict[str, np.ndarray]:
        """The stream as it stands."""

    def restore(self, arrays: Mapping[str, np.ndarray], reset_reason: str | None) -> None:
        """Go on from a snapshot."""

    def learnt(self) -> bytes:
        """What was learnt of costs."""

    def learn(self, learnt: bytes) -> None:
        """Go on with what was learnt."""


class ClassicalEstimator:
    """One of OpenCV's methods on a stream; it starts anew where `FlowEstimator` does."""

    def __init__(self, setting: Setting, clock: Clock) -> None:
        self.reset_reason: str | None = "start"
        self._direction, self._clock = setting.direction, clock
        self._flow = farneback if setting.method == "farneback" else dense_inverse_search()
        self._max_gap_ms = EstimatorSettings().max_gap_ms
        self._previous: tuple[np.ndarray, Seen] | None = None

    def update(self, frame: np.ndarray, stamp_ns: int, arrival_ns: int | None = None) -> FlowResult | None:
        """Flow between the last frame and this one; its residual is NaN, as there is none."""
        arrival_ns = self._clock.now_ns() if arrival_ns is None else arrival_ns
        seen = Seen.of(frame, stamp_ns)
        if self._previous is not None and (reason := seen.break_after(self._previous[1], self._max_gap_ms)):
            self.reset(reason)
        previous, self._previous = self._previous, (frame, seen)
        if previous is None:
            return None
        stages = self._clock.stages(torch.device("cpu"), frame.shape[0] * frame.shape[1])
        images = (previous[0], frame) if self._direction == "forward" else (frame, previous[0])
        with stages.stage("solve"):
            flow = stages.counted(self._flow)(*images)
        info = FlowInfo(
            stamp_ns=stamp_ns,
            previous_stamp_ns=previous[1].stamp_ns,
            direction=self._direction,
            iterations=0,
            stop_reason="",
            warm=False,
            residual_px=float("nan"),
            reset_reason=self.reset_reason,
            scale=1.0,
            stage_ms=stages.read(),
            latency_ms=(self._clock.now_ns() - arrival_ns) / 1e6,
            budget_ms=None,
        )
        self.reset_reason = None
        return FlowResult(flow, np.full(flow.shape[:2], np.nan, np.float32), info)

    def prepare(self) -> None:
        """There is nothing to prepare."""

    def warm_up(self, height: int, width: int) -> None:
        """There is nothing to learn."""

    def reset(self, reason: str) -> None:
        """Forget the last frame."""
        self.reset_reason, self._previous = reason, None

    def snapshot(self) -> dict[str, np.ndarray]:
        """The last frame, under the names that `FlowEstimator` uses."""
        if self._previous is None:
            return {}
        image, seen = self._previous
        return {"image2": image.copy(), "stamp2_ns": np.array(seen.stamp_ns, np.int64)}

    def restore(self, arrays: Mapping[str, np.ndarray], reset_reason: str | None) -> None:
        """See `FlowEstimator.restore`."""
        self.reset_reason, self._previous = reset_reason, None
        if arrays:
            image = arrays["image2"]
            self._previous = image, Seen.of(image, int(arrays["stamp2_ns"]))

    def learnt(self) -> bytes:
        """There is nothing to learn."""
        return b""

    def learn(self, learnt: bytes) -> None:
        """There is nothing to learn."""


def make_estimator(setting: Setting, model: DEQFlow | None, clock: Clock) -> Estimator:
    """The estimator of a setting; `model` where its method is "deq". Raises ValueError for impossible settings."""
    if not setting.solves:
        return ClassicalEstimator(setting, clock)
    assert model is not None
    # Named alike on purpose, but for the budget, whose name there says that it is one of time.
    same = {field.name for field in fields(EstimatorSettings)} & vars(setting).keys()
    values = {name: getattr(setting, name) for name in same}
    return FlowEstimator(model, clock, latency_budget_ms=setting.budget_ms, **values)
