# SPDX-License-Identifier: Apache-2.0
"""One camera of ``flow_node``: its stream, its outputs, and the account of each of its frames.

Its input hands a message to the worker, where ``begin`` makes an array of it, and ``finish`` publishes the flow.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.lifecycle import LifecycleNode

from deq_flow_ros.model import DEQFlow
from deq_flow_ros.ros.accounts import UNHEARD, FrameAccounts, kind_of
from deq_flow_ros.ros.camera_info import WHOLE, Calibration, region
from deq_flow_ros.ros.camera_input import CameraInput
from deq_flow_ros.ros.health import Clocks, camera_status
from deq_flow_ros.ros.messages import ImageMessage, ReceivedFrame, image_to_rgb
from deq_flow_ros.ros.outputs import COLORED, RESIDUAL, FlowOutputs, make_palette
from deq_flow_ros.ros.parameters import NodeSettings
from deq_flow_ros.streaming import FlowEstimator, FlowResult, UpdateRequest

MAX_STAMP_AGE_MS = 10_000.0
"""Oldest stamp that is believed where the budget counts from it."""
QUIET_S = 300.0
"""Least time between two words in the log about the same."""


@dataclass(frozen=True)
class Attempt:
    """A frame under way in the worker: what the estimator is asked, and where the time went until then.

    :ivar image_size: height and width of the whole image, of which the request may hold a part.
    """

    camera: Camera
    frame: ReceivedFrame
    settings: NodeSettings
    image_size: tuple[int, int]
    request: UpdateRequest
    begun_ns: int
    converted_ns: int
    latency_from: str


class Camera:
    """Everything of one camera from configure to cleanup; ``open`` and ``close`` its input in between.

    The executor's thread opens, closes and changes; the worker's begins, finishes and prepares; both may drop.

    :param name: of the camera, as in the parameter ``cameras``.
    :ivar last_arrival_ns: when the last image that was computed with came, on the ``time.monotonic_ns`` clock.
    :ivar last_shape: (height, width) of the last frame that was processed.
    :ivar idle: why no images are expected ("disabled by ~/enable"); None while they are.
    """

    def __init__(self, node: LifecycleNode, name: str, model: DEQFlow, settings: NodeSettings) -> None:
        self.name = name
        self.prefix = f"~/{name}/" if name else "~/"
        self.idle: str | None = "the node is not active"
        self.estimator = FlowEstimator(model, runtime=settings.gpu_runtime, **settings.of_estimator())
        self.last_arrival_ns, self.last_shape = 0, (0, 0)
        self._node = node
        self._settings = self._applied = settings
        self._input: CameraInput | None = None
        # Asked for by one thread, done by the other: the last one, as all are done with the next frame.
        self._resets: deque[str] = deque(maxlen=1)
        self._levels = settings.levels()
        self._previous: ImageMessage | None = None
        self._last: FlowResult | None = None
        self._accounts = FrameAccounts(str(model.device), settings.direction, name)
        self._accounts.units = settings.units
        self._outputs = FlowOutputs(node, self.prefix)
        self._logger = self._outputs.logger
        self._told_s: dict[str, float] = {}

    def destroy(self) -> None:
        """Free the publishers; the input is to be closed before."""
        self._outputs.destroy()

    def open(self, take: Callable[[Camera, ReceivedFrame], None]) -> set[str]:
        """Subscribe; ``take`` is called with each frame that comes. Returns the topics that they may come on."""
        self.idle = None
        parts = self._settings, self._outputs.wanted, self._accounts.arrivals, self._logger, partial(take, self)
        self._input = CameraInput(self._node, self.prefix, *parts)
        return self._input.topics()

    def close(self, reason: str) -> None:
        """Unsubscribe; the stream starts anew with the next ``open``, for this reason."""
        if self._input is not None:
            self._input.close()
            self._input = None
        self.idle = reason
        self.reset(reason)

    def reset(self, reason: str, whatever_stamp: bool = True) -> None:
        """The next frame starts the stream anew, for this reason."""
        if self._input is not None and whatever_stamp:
            self._input.forget_order()
        self._resets.append(reason)

    def change(self, settings: NodeSettings) -> None:
        """Work with other settings from the next frame on."""
        self._settings = settings
        if self._input is not None:
            self._input.settings = settings

    def status(self, name: str) -> DiagnosticStatus:
        """How the camera has been doing, for ``/diagnostics``; what is wrong goes to the log as well, but rarely."""
        topic = self._node.resolve_topic_name(f"{self.prefix}image")
        idle, silence, clocks = self.idle, None, Clocks()
        if self._input is not None:
            silence, clocks = self._input.silence, self._input.clocks()
            if silence is None and not self._input.heard:
                idle = f"{UNHEARD}: images come and are not processed until somebody does, or always_on is set"
        status = camera_status(name, topic, self._accounts.window(), idle, silence, clocks)
        kind, now_s = kind_of(status.message), time.monotonic()
        if status.level in (DiagnosticStatus.WARN, DiagnosticStatus.ERROR) and now_s >= self._told_s.get(kind, 0.0):
            self._told_s = {one: until_s for one, until_s in self._told_s.items() if until_s > now_s}
            self._told_s[kind] = now_s + QUIET_S
            self._logger.warning(status.message)
        return status

    def drop(self, frame: ReceivedFrame, reason: str) -> None:
        """The account of a frame that gives no flow."""
        self._publish_account(frame, self._accounts.dropped(frame.message.header, reason, frame.age_ms))

    def begin(self, frame: ReceivedFrame, time_limit_ms: float | None) -> Attempt | None:
        """What the estimator is to be asked for a frame; None where the frame cannot be used: it has its account."""
        begun_ns = time.monotonic_ns()
        try:
            settings = self._apply_changes(frame.wanted)
            whole = image_to_rgb(frame.message, self._levels)
            rgb = whole if settings.roi == WHOLE else region(whole, settings.roi)
            start_ns, latency_from, age_ms = frame.arrival_ns, settings.latency_from, frame.age_ms
            if latency_from == "stamp" and age_ms is not None and 0.0 <= age_ms <= MAX_STAMP_AGE_MS:
                start_ns -= round(1e6 * age_ms)
            else:  # the account says so, and a status what is wrong with the stamps
                latency_from = "arrival"
            request = UpdateRequest(self.estimator, rgb, frame.stamp_ns, start_ns, time_limit_ms)
            self._reset_if_another_source(frame.message)
        except Exception as error:
            self.fail(frame, error)
            return None
        # Only images that take time take a share of it from other cameras.
        self.last_arrival_ns, self.last_shape = frame.arrival_ns, rgb.shape[:2]
        return Attempt(self, frame, settings, whole.shape[:2], request, begun_ns, time.monotonic_ns(), latency_from)

    def finish(self, attempt: Attempt, result: FlowResult | None) -> None:
        """Publish what the estimator made of a frame, and the frame's account."""
        frame, header = attempt.frame, attempt.frame.message.header
        if (left_out := self.estimator.stream.left_out) is not None:  # it knows no order of frames that it did not see
            return self.drop(frame, left_out)
        previous, self._previous, self._last = self._previous, frame.message, result
        if result is None:
            reason = self.estimator.reset_reason or "start"
            return self._publish_account(frame, self._accounts.first(header, reason, frame.age_ms))
        assert previous is not None
        estimated_ns = time.monotonic_ns()
        try:
            self._publish(attempt, result, previous)
        except Exception as error:
            return self.fail(frame, error)
        stage_ms = {
            "wait": (attempt.begun_ns - frame.arrival_ns) * 1e-6,
            "convert": (attempt.converted_ns - attempt.begun_ns) * 1e-6,
            "publish": (time.monotonic_ns() - estimated_ns) * 1e-6,
        }
        account = self._accounts.processed(header, result.info, stage_ms, frame.age_ms, attempt.latency_from)
        return self._publish_account(frame, account)

    def fail(self, frame: ReceivedFrame, error: Exception) -> None:
        """The account of a frame that something went wrong with, unless it has had it.

        A ValueError before that means that the image cannot be used as things are; the stream stays as it was. After
        anything else what is left in the estimator is unknown.
        """
        if isinstance(error, ValueError) and not frame.accounted:
            return self.drop(frame, str(error))
        if not frame.accounted:
            self.drop(frame, f"{type(error).__name__}: {error}")
        self.recover(error)

    def recover(self, error: Exception) -> None:
        """Start the stream anew after an error that nobody expected."""
        trace = "".join(traceback.format_exception(error))
        self._logger.error(f"a frame failed:\n{trace}", throttle_duration_sec=5.0)
        self._reset_now(f"a frame failed ({type(error).__name__}: {error})")

    def prepare(self) -> None:
        """Do what the next pair needs and its frame does not."""
        try:
            self.estimator.prepare()
        except Exception as error:
            self.recover(error)

    def snapshot(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Copies of the last pair and the state, with its flow, and how it came about; None if there is no stream."""
        arrays, last = self.estimator.snapshot(), self._last
        if not arrays:
            return None
        if last is not None:
            arrays |= {"flow": last.flow} | ({} if last.residual is None else {"residual": last.residual})
        return arrays, {"camera": self.name, "info": {} if last is None else vars(last.info)}

    def _apply_changes(self, outputs: AbstractSet[str]) -> NodeSettings:
        """Take over what other threads have asked for since the last frame: settings, a reset."""
        settings, before = self._settings, self._applied
        if settings is not before:
            self.estimator.change(**settings.of_estimator())
            self._accounts.direction, self._accounts.units = settings.direction, settings.units
            self._applied = settings
        known = self.estimator.model.uncertainty is not None
        if "uncertainty" in outputs and not known:
            self._logger.warning(
                f"nothing is published on {self.prefix}uncertainty: the weights of the parameter model have no head "
                "for it; those that ship have one, and python -m training.train --recipe uncertainty --init WEIGHTS "
                "adds one to others",
                once=True,
            )
        painted = settings.output_scale == 1.0 and outputs & COLORED
        # Nobody pays for what nobody subscribes to.
        asked = {
            "uncertainty": known and "uncertainty" in outputs,
            "residual": bool(outputs & RESIDUAL),
            "palette": make_palette(settings.color_max_px) if painted else None,
        }
        if asked != {name: getattr(self.estimator.stream.settings, name) for name in asked}:
            self.estimator.change(**asked)
        if settings.intensity_range != before.intensity_range:
            self._levels = settings.levels()
            self._reset_now(f"intensity_range changed to {list(settings.intensity_range)}")
        if settings.roi != before.roi:  # another part of the image, perhaps of the same size
            self._reset_now(f"roi changed from {list(before.roi)} to {list(settings.roi)}")
        if self._resets:
            self._reset_now(self._resets.popleft())
        return settings

    def _reset_if_another_source(self, message: ImageMessage) -> None:
        """The estimator sees only pixels and stamps; that another camera took over the topic shows in the message."""
        before, now = _source(self._previous or message), _source(message)
        if changed := [name for name in now if now[name] != before[name]]:
            self._reset_now(", ".join(f"{name} changed from {before[name]!r} to {now[name]!r}" for name in changed))

    def _reset_now(self, reason: str) -> None:
        self.estimator.reset(reason)
        self._previous = None

    def _publish(self, attempt: Attempt, result: FlowResult, previous: ImageMessage) -> None:
        """With the header of the image on whose pixels the flow lives."""
        info, source, header = result.info, self._input, previous.header
        elapsed_s = (info.stamp_ns - info.previous_stamp_ns) * 1e-9
        ends = info.previous_stamp_ns, info.stamp_ns
        if info.direction == "backward":  # it points to an image of before
            header, elapsed_s, ends = attempt.frame.message.header, -elapsed_s, ends[::-1]
        calibration = Calibration(image_size=attempt.image_size)
        if source is not None:
            message, other = (source.infos.get(stamp_ns, source.camera_info) for stamp_ns in ends)
            topic = source.info_topic or "camera_info"
            calibration = Calibration(message, attempt.image_size, topic, source.rectified, other)
        self._outputs.publish(result, header, calibration, elapsed_s, attempt.settings)

    def _publish_account(self, frame: ReceivedFrame, account: DiagnosticArray) -> None:
        frame.accounted = True
        try:
            self._outputs.publish_account(account)
        except Exception as error:  # one account that is lost must end neither the worker nor the executor
            self._logger.error(f"cannot publish the account of a frame: {error}", throttle_duration_sec=5.0)


def _source(message: ImageMessage) -> dict[str, str]:
    kind = getattr(message, "encoding", "") or getattr(message, "format", "")
    return {"encoding": kind, "frame_id": message.header.frame_id}
