# SPDX-License-Identifier: Apache-2.0
"""The methods that compute the flow of a setting: ``FlowEstimator``, and OpenCV's methods with the same interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace

import cv2
import numpy as np
import torch

from deq_flow_ros.evaluation.settings import Setting
from deq_flow_ros.model import DEQFlow, load_model
from deq_flow_ros.streaming import EstimatorSettings, FlowEstimator, FlowInfo, FlowResult
from deq_flow_ros.streaming.clock import Clock
from deq_flow_ros.streaming.continuity import Seen

FlowFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Takes image 1 and image 2, (H, W, 3) uint8 RGB; returns the flow (H, W, 2) float32 px on the pixels of image 1."""
Models = Mapping[tuple[str, str, str], DEQFlow]  # by ``Setting.network``


def farneback(image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
    """Farneback's method (2003) with the settings of OpenCV's examples, as a ``FlowFunction``."""
    return cv2.calcOpticalFlowFarneback(
        _grey(image1), _grey(image2), None, pyr_scale=0.5, levels=5, winsize=15, iterations=3, poly_n=5, poly_sigma=1.2,
        flags=0,
    )  # fmt: skip


def dense_inverse_search(preset: int = cv2.DISOPTICAL_FLOW_PRESET_MEDIUM) -> FlowFunction:
    """DIS flow (Kroeger et al., 2016) with one of OpenCV's presets."""
    method = cv2.DISOpticalFlow.create(preset)
    return lambda image1, image2: method.calc(_grey(image1), _grey(image2), None)


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


class ClassicalEstimator:
    """One of OpenCV's methods on a stream. It starts anew under the same conditions as ``FlowEstimator``."""

    left_out: str | None = None
    """Nothing is left out here: a run does so before."""

    def __init__(self, setting: Setting, clock: Clock) -> None:
        self.reset_reason: str | None = "start"
        self._direction, self._clock = setting.direction, clock
        self._flow = farneback if setting.method == "farneback" else dense_inverse_search()
        self._max_gap_ms = setting.max_gap_ms or EstimatorSettings().max_gap_ms
        self._previous: tuple[np.ndarray, Seen] | None = None

    def update(self, frame: np.ndarray, stamp_ns: int, arrival_ns: int | None = None) -> FlowResult | None:
        """The flow between the last frame and this one. There is no solver, so the residual is NaN."""
        arrival_ns = self._clock.now_ns() if arrival_ns is None else arrival_ns
        seen = Seen.of(frame, stamp_ns)
        if self._previous is not None and (reason := seen.break_after(self._previous[1], self._max_gap_ms)):
            self.reset(reason)
        previous, self._previous = self._previous, (frame, seen)
        if previous is None:
            return None
        stages = self._clock.stages(torch.device("cpu"), frame.shape[0] * frame.shape[1])
        images = (previous[0], frame) if self._direction == "forward" else (frame, previous[0])
        flow = stages.counted(self._flow)(*images)
        stages.lap("solve")
        info = FlowInfo(
            stamp_ns, previous[1].stamp_ns, self._direction, iterations=0, stop_reason="", warm=False,
            residual_px=float("nan"), reset_reason=self.reset_reason, scale=1.0, stage_ms=stages.read(),
            latency_ms=(self._clock.now_ns() - arrival_ns) / 1e6, budget_ms=None,
        )  # fmt: skip
        self.reset_reason = None
        return FlowResult(flow, np.full(flow.shape[:2], np.nan, np.float32), info)

    def prepare(self) -> None:
        """Do nothing, because there is nothing to prepare."""

    def warm_up(self, height: int, width: int) -> None:
        """Do nothing, because there are no costs to learn."""

    def reset(self, reason: str) -> None:
        """Forget the last frame."""
        self.reset_reason, self._previous = reason, None


Estimator = FlowEstimator | ClassicalEstimator


def make_estimator(setting: Setting, model: DEQFlow | None, clock: Clock | None = None) -> Estimator:
    """The estimator of a setting.

    :param clock: None: the clock of the machine.
    :raises ValueError: for impossible settings.
    """
    clock = Clock() if clock is None else clock
    if not setting.solves:
        return ClassicalEstimator(setting, clock)
    assert model is not None
    same = {field.name for field in fields(EstimatorSettings)} & vars(setting).keys()
    values = {name: getattr(setting, name) for name in same if name != "max_gap_ms" or setting.max_gap_ms is not None}
    # Graphs would be captured during the recording, so that no two runs would use the same operations.
    return FlowEstimator(model, clock, "eager", latency_budget_ms=setting.budget_ms, **values)


class ReverseFlow:
    """Computes the flow in the other direction for some pairs, to measure the forward-backward consistency.

    Every such pair starts cold. The first pair is one of them.

    :param every: the least number of frames from one such pair to the next.
    """

    def __init__(self, setting: Setting, model: DEQFlow | None, every: int) -> None:
        direction = "backward" if setting.direction == "forward" else "forward"
        self._estimator = make_estimator(replace(setting, direction=direction, budget_ms=None, warm=False), model)
        self._every, self._next_index = every, 0

    def of(self, index: int, image1: np.ndarray, image2: np.ndarray) -> np.ndarray | None:
        """The flow (H, W, 2) px of the pair whose later frame has this index; None if the pair is not one of those."""
        if index < self._next_index:
            return None
        self._next_index = index + self._every
        self._estimator.reset("another pair")
        self._estimator.update(image1, 0)
        result = self._estimator.update(image2, 1)
        return None if result is None else result.flow


def load_models(settings: Iterable[Setting]) -> Models:
    """Load every model that the settings name, once each. It fails as ``load_model`` does."""
    wanted = {setting.network for setting in settings if setting.solves}
    return {network: load_model(*network[:2], precision=network[2]) for network in sorted(wanted)}


@contextmanager
def deterministic() -> Iterator[None]:
    """A context in which a machine computes exactly the same flow in every run. Some GPU operations get slower."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # Without `warn_only`, an operation without a deterministic form would raise an error.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
