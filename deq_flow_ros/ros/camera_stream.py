# SPDX-License-Identifier: Apache-2.0
"""One camera of `flow_node`: its stream, its outputs, and the account of each of its frames.

The way of a frame: `_on_image` (executor's thread) hands the message to the worker (`frame_worker.py`). There `begin`
makes an array of it, the estimator is run, for several cameras at once where that pays, and `finish` publishes what
came out.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions

from deq_flow_ros.model import DEQFlow
from deq_flow_ros.ros import convert
from deq_flow_ros.ros.camera_input import CameraInput, ImageMessage
from deq_flow_ros.ros.diagnostics import FrameAccounts
from deq_flow_ros.ros.health import CameraHealth
from deq_flow_ros.ros.outputs import FlowOutputs, OutputOptions
from deq_flow_ros.ros.parameters import OVERRIDABLE, Settings
from deq_flow_ros.ros.rate_limit import RateLimit
from deq_flow_ros.ros.snapshot import Snapshot
from deq_flow_ros.ros.window import RATE_LIMITED
from deq_flow_ros.streaming import FlowEstimator, FlowInfo, FlowResult, UpdateRequest

MAX_STAMP_AGE_MS = 10_000.0
"""Oldest stamp that is believed where the budget counts from it."""


@dataclass(eq=False)
class ReceivedFrame:
    """A message, when it came, and how old it was then.

    :ivar arrival_ns: on the `time.monotonic_ns` clock.
    :ivar age_ms: from its stamp to its arrival by the ROS clock; None while that clock stands at zero.
    :ivar accounted: whether it has had its account.
    """

    camera: CameraStream
    message: ImageMessage
    arrival_ns: int
    age_ms: float | None
    accounted: bool = False


@dataclass(frozen=True)
class Attempt:
    """A frame under way in the worker: what the estimator is asked, and where the time went until then.

    :ivar image_size: height and width of the whole image, of which the request may hold a part.
    """

    frame: ReceivedFrame
    settings: Settings
    image_size: tuple[int, int]
    request: UpdateRequest
    begun_ns: int
    converted_ns: int
    latency_from: str


class CameraStream:
    """Everything of one camera from configure to cleanup; `open` and `close` its input in between.

    :param name: of the camera, as in the parameter `cameras`.
    :ivar last_arrival_ns: when the last image that was computed with came, on the `time.monotonic_ns` clock.
    :ivar last_shape: (height, width) of the last frame that was processed.
    """

    def __init__(self, node: LifecycleNode, name: str, model: DEQFlow, settings: Settings) -> None:
        self.name = name
        self.prefix = f"~/{name}/" if name else "~/"
        self.health = CameraHealth(node.resolve_topic_name(f"{self.prefix}image"))
        self.health.idle = "the node is not active"
        self.estimator = FlowEstimator(model, **settings.of_estimator())
        self.last_arrival_ns = 0
        self.last_shape: tuple[int, int] | None = None
        self._node = node
        # A logger of its own, so that throttling one camera's words does not swallow another's.
        self._logger = node.get_logger().get_child(name) if name else node.get_logger()
        self._settings = self._applied = settings
        self._input: CameraInput | None = None
        # Asked for by the executor's thread, done by the worker's: the last one, as all are done with the next frame.
        self._resets: deque[str] = deque(maxlen=1)
        self._previous: ImageMessage | None = None
        self._last: FlowResult | None = None
        self._logged_scale = settings.max_scale
        self._rate = RateLimit()
        self._accounts = FrameAccounts(str(model.device), settings.direction, name, self.health)
        self._statistics = node.create_lifecycle_publisher(
            DiagnosticArray,
            f"{self.prefix}statistics",
            QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE),
            qos_overriding_options=QoSOverridingOptions(OVERRIDABLE),
        )
        try:
            self._outputs = FlowOutputs(node, self.prefix)
        except Exception:  # a QoS override that cannot be read, for example
            node.destroy_lifecycle_publisher(self._statistics)
            raise

    def destroy(self) -> None:
        """Free the publishers; the input is to be closed before."""
        self._outputs.destroy()
        self._node.destroy_lifecycle_publisher(self._statistics)

    # Executor's thread

    def open(self, on_frame: Callable[[ReceivedFrame], None]) -> set[str]:
        """Subscribe; `on_frame` is called with each frame that is to be processed. Returns the topics it may be on."""
        self._on_frame = on_frame
        self.health.idle = None
        self._input = CameraInput(self._node, self.prefix, self._settings, self.health, self._logger, self._on_image)
        return self._input.topics()

    def close(self, reason: str) -> None:
        """Unsubscribe; the stream starts anew with the next `open`, for this reason."""
        if self._input is not None:
            self._input.close()
            self._input = None
        self.health.idle = reason
        self.reset(reason)

    def reset(self, reason: str) -> None:
        """The next frame starts the stream anew, for this reason."""
        self._resets.append(reason)

    def change(self, settings: Settings) -> None:
        """Work with other settings from the next frame on."""
        self._settings = settings
        if self._input is not None:
            self._input.silence_warning_s = settings.silence_warning_s

    def _on_image(self, message: ImageMessage, arrival_ns: int, lost_before: int) -> None:
        self._accounts.received(lost_before)
        frame = ReceivedFrame(self, message, arrival_ns, self._age_ms(message.header.stamp, arrival_ns))
        if self._rate.passes(arrival_ns, self._settings.max_rate_hz):
            self._on_frame(frame)
        else:
            self.drop(frame, RATE_LIMITED)

    def _age_ms(self, stamp: Time, arrival_ns: int) -> float | None:
        now_ns = self._node.get_clock().now().nanoseconds
        if not now_ns:
            return None  # simulated time has not begun
        return (now_ns - (time.monotonic_ns() - arrival_ns) - convert.stamp_to_ns(stamp)) * 1e-6

    # Any thread

    def drop(self, frame: ReceivedFrame, reason: str) -> None:
        """The account of a frame that gives no flow."""
        self._publish_account(frame, self._accounts.dropped(frame.message.header, reason, frame.age_ms))

    # Worker's thread

    def begin(self, frame: ReceivedFrame, time_limit_ms: float | None) -> Attempt | None:
        """What the estimator is to be asked for a frame; None where the frame cannot be used: it has its account."""
        begun_ns = time.monotonic_ns()
        try:
            settings = self._apply_changes()
            whole = convert.image_to_rgb(frame.message)
            rgb = _region(whole, settings.roi)
            start_ns, latency_from = self._budget_start(frame, settings.latency_from)
            stamp_ns = convert.stamp_to_ns(frame.message.header.stamp)
            request = UpdateRequest(self.estimator, rgb, stamp_ns, start_ns, time_limit_ms)
            self._reset_if_another_source(frame.message)
        except Exception as error:
            self.fail(frame, error)
            return None
        # Only images that take time take a share of it from other cameras.
        self.last_arrival_ns, self.last_shape = frame.arrival_ns, rgb.shape[:2]
        return Attempt(frame, settings, whole.shape[:2], request, begun_ns, time.monotonic_ns(), latency_from)

    def finish(self, attempt: Attempt, result: FlowResult | None) -> None:
        """Publish what the estimator made of a frame, and the frame's account."""
        frame, header = attempt.frame, attempt.frame.message.header
        previous, self._previous = self._previous, frame.message
        self._last = result
        if result is None:
            reason = self.estimator.reset_reason or "start"
            self._publish_account(frame, self._accounts.first(header, reason, frame.age_ms))
            return
        assert previous is not None
        estimated_ns = time.monotonic_ns()
        try:
            self._publish(attempt, result, previous)
        except Exception as error:
            self.fail(frame, error)
            return
        self._report(result.info)
        stages = {
            "wait": attempt.begun_ns - frame.arrival_ns,
            "convert": attempt.converted_ns - attempt.begun_ns,
            "publish": time.monotonic_ns() - estimated_ns,
        }
        stage_ms = {name: value * 1e-6 for name, value in stages.items()}
        self._publish_account(
            frame, self._accounts.processed(header, result.info, stage_ms, frame.age_ms, attempt.latency_from)
        )

    def fail(self, frame: ReceivedFrame, error: Exception) -> None:
        """The account of a frame that something went wrong with.

        A ValueError means that the image cannot be used as things are; the stream stays as it was. Anything else must
        not end the stream either, but what it left in the estimator is unknown.
        """
        if isinstance(error, ValueError):
            self._logger.warning(f"cannot use the image: {error}", throttle_duration_sec=5.0)
            self.drop(frame, str(error))
        else:
            self.give_up(frame, error)

    def give_up(self, frame: ReceivedFrame, error: Exception) -> None:
        """End the work on a frame after an error in it that nobody expected: its account, unless it has had it."""
        if not frame.accounted:
            self.drop(frame, _named(error))
        self.recover(error)

    def recover(self, error: Exception) -> None:
        """Start the stream anew after an error that nobody expected."""
        trace = "".join(traceback.format_exception(error))
        self._logger.error(f"a frame failed:\n{trace}", throttle_duration_sec=5.0)
        self._reset_now(f"a frame failed ({_named(error)})")

    def prepare(self) -> None:
        """Do what the next pair needs and its frame does not."""
        try:
            self.estimator.prepare()
        except Exception as error:
            self.recover(error)

    def snapshot(self) -> Snapshot | None:
        """Copies of the last pair and the state, with its flow; None where there is no stream yet."""
        arrays = self.estimator.snapshot()
        if not arrays:
            return None
        flow, residual = (self._last.flow, self._last.residual) if self._last is not None else (None, None)
        info = vars(self._last.info) if self._last is not None else {}
        return Snapshot(arrays, flow, residual, {"camera": self.name, "info": info})

    def _apply_changes(self) -> Settings:
        """Take over what other threads have asked for since the last frame: settings, a reset."""
        settings, before = self._settings, self._applied
        if settings is not before:
            self.estimator.change(**settings.of_estimator())
            self._accounts.direction = settings.direction
            self._applied = settings
        self._ask_for_uncertainty()
        if settings.roi != before.roi:  # another part of the image, perhaps of the same size
            self._reset_now(f"roi changed from {list(before.roi)} to {list(settings.roi)}")
        if self._resets:
            self._reset_now(self._resets.popleft())
        return settings

    def _ask_for_uncertainty(self) -> None:
        """Nobody pays for it while nobody subscribes to it."""
        wanted = "uncertainty" in self._outputs.wanted()
        if wanted and self.estimator.model.uncertainty is None:
            self._logger.warning(
                f"nothing is published on {self.prefix}uncertainty: the weights of the parameter model have no head "
                "for it; those that ship have one, and python -m training.train --recipe uncertainty --init WEIGHTS "
                "adds one to others",
                once=True,
            )
        elif wanted != self.estimator.settings.uncertainty:
            self.estimator.change(uncertainty=wanted)

    def _budget_start(self, frame: ReceivedFrame, latency_from: str) -> tuple[int, str]:
        """When the budget of a frame starts to count, and from what: "stamp" or "arrival"."""
        if latency_from == "arrival":
            return frame.arrival_ns, "arrival"
        if frame.age_ms is not None and 0.0 <= frame.age_ms <= MAX_STAMP_AGE_MS:
            return frame.arrival_ns - round(1e6 * frame.age_ms), "stamp"
        age = "unknown, as the ROS clock stands at zero" if frame.age_ms is None else f"{frame.age_ms:.0f} ms"
        self._logger.warning(
            f"latency_from is stamp, but the age of the images by their stamps is {age}, expected 0 to "
            f"{MAX_STAMP_AGE_MS:.0f} ms: the budget counts from their arrival; synchronise the clocks, or set "
            "use_sim_time",
            throttle_duration_sec=10.0,
        )
        return frame.arrival_ns, "arrival"

    def _reset_if_another_source(self, message: ImageMessage) -> None:
        """The estimator sees only pixels and stamps; that another camera took over the topic shows in the message."""
        if self._previous is None:
            return
        before, now = _source(self._previous), _source(message)
        changed = [name for name in now if now[name] != before.get(name, now[name])]
        if changed:
            self._reset_now(", ".join(f"{name} changed from {before[name]!r} to {now[name]!r}" for name in changed))

    def _reset_now(self, reason: str) -> None:
        self._previous = None
        self.estimator.reset(reason)

    def _publish(self, attempt: Attempt, result: FlowResult, previous: ImageMessage) -> None:
        """With the header of the image on whose pixels the flow lives."""
        settings, source, message = attempt.settings, self._input, attempt.frame.message
        elapsed_s = (result.info.stamp_ns - result.info.previous_stamp_ns) * 1e-9
        header = previous.header
        if result.info.direction == "backward":
            header, elapsed_s = message.header, -elapsed_s  # it points to an image of before
        options = OutputOptions(
            units=settings.units,
            output_scale=settings.output_scale,
            points_stride=settings.points_stride,
            color_max_px=settings.color_max_px,
            compressed_format=settings.compressed_format,
            jpeg_quality=settings.jpeg_quality,
            roi=settings.roi,
            image_size=attempt.image_size,
            info_topic=(source and source.info_topic) or "camera_info",
            rectified=source is not None and source.rectified,
        )
        camera_info = source.camera_info if source is not None else None
        self._outputs.publish(
            result.flow, result.residual, header, camera_info, elapsed_s, options, result.uncertainty
        )

    def _report(self, info: FlowInfo) -> None:
        """Say what the budget costs: a smaller scale, or flow that comes late."""
        if info.scale != self._logged_scale and self._logger.info(
            f"processing scale changed from {self._logged_scale:.3g} to {info.scale:.3g}", throttle_duration_sec=5.0
        ):
            self._logged_scale = info.scale
        if info.starved:
            self._logger.warning(
                f"the budget of {info.budget_ms:g} ms cannot be met: one iteration at the lowest scale, "
                f"{info.scale:.3g}, took until {info.latency_ms:.0f} ms. Each image gets that one iteration, its flow "
                "comes late, and the newest image wins. Raise latency_budget_ms, lower min_scale, or use a faster "
                "device",
                throttle_duration_sec=10.0,
            )

    def _publish_account(self, frame: ReceivedFrame, account: DiagnosticArray) -> None:
        frame.accounted = True
        try:
            self._statistics.publish(account)
        except Exception as error:  # one account that is lost must end neither the worker nor the executor
            self._logger.error(f"cannot publish the account of a frame: {error}", throttle_duration_sec=5.0)


def _region(rgb: np.ndarray, roi: tuple[int, ...]) -> np.ndarray:
    """The part of an (H, W, 3) image that is processed: (height, width, 3), contiguous."""
    x, y, width, height = roi
    if not width:
        return rgb
    if x + width > rgb.shape[1] or y + height > rgb.shape[0]:
        raise ValueError(f"roi {list(roi)} reaches outside of the image, {rgb.shape[1]}x{rgb.shape[0]}")
    return np.ascontiguousarray(rgb[y : y + height, x : x + width])


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _source(message: ImageMessage) -> dict[str, str]:
    encoding = message.encoding if hasattr(message, "encoding") else message.format
    return {"encoding": encoding, "frame_id": message.header.frame_id}
