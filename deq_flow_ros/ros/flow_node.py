# SPDX-License-Identifier: Apache-2.0
"""`flow_node`: a lifecycle node that turns an image topic into optical flow.

The way of a frame: `_on_image` (executor thread) notes its arrival and leaves it to the worker; `_process` (worker
thread) converts, estimates and publishes. Every frame received gets exactly one account on `~/statistics`.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import rclpy
import torch
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecyclePublisher, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rclpy.subscription import Subscription
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from deq_flow_ros.media.colour import flow_to_color
from deq_flow_ros.model import load_model
from deq_flow_ros.ros import convert, process
from deq_flow_ros.ros.diagnostics import FrameAccounts
from deq_flow_ros.ros.parameters import Settings, check_change, misspelt_overrides
from deq_flow_ros.ros.worker import NewestFirstWorker
from deq_flow_ros.streaming import FlowEstimator

MAX_WAIT_NS = 1_000_000_000
"""Longest time in the middleware that is believed; beyond it, the wall clock was set, or no time was given."""
SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE


@dataclass(frozen=True)
class ReceivedFrame:
    """A message and the time at which it came, on the `time.monotonic_ns` clock."""

    message: Image
    arrival_ns: int


@dataclass(frozen=True)
class Outputs:
    """Publishers, from configure to cleanup."""

    flow: LifecyclePublisher
    flow_color: LifecyclePublisher
    residual: LifecyclePublisher
    statistics: LifecyclePublisher


class FlowNode(LifecycleNode):
    """`configure` loads the model, `activate` subscribes, `deactivate` unsubscribes, `cleanup` frees; then anew."""

    def __init__(self) -> None:
        super().__init__("flow_node")
        self._estimator: FlowEstimator | None = None
        self._outputs: Outputs | None = None
        self._subscription: Subscription | None = None
        self._worker: NewestFirstWorker[ReceivedFrame] | None = None
        self.add_on_set_parameters_callback(self._on_set_parameters)
        Settings.declare(self)
        for line in misspelt_overrides(self):
            self.get_logger().warning(line)
        self.get_logger().info(f"images are converted by {convert.BACKEND}")

    # Lifecycle

    def start(self, stop: process.StopRequest) -> None:
        """Configure and activate, where the parameter `autostart` says so; a failure leaves the node unconfigured."""
        if not self.get_parameter("autostart").value:
            return
        if self.trigger_configure() != SUCCESS:
            self.get_logger().error("not started; once what is named above is mended, call the transition configure")
        elif not stop.requested:
            self.trigger_activate()

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the model and measure its cost; on failure say what to do, and stay unconfigured."""
        try:
            self._configure(Settings.read(self))
        except Exception as error:
            expected = isinstance(error, (OSError, ValueError, RuntimeError))
            self.get_logger().error(f"configure failed: {error if expected else traceback.format_exc()}")
            self._free()
            return FAILURE
        return super().on_configure(state)

    def _configure(self, settings: Settings) -> None:
        self._settings = settings
        torch.set_num_threads(settings.compute_threads())
        cv2.setNumThreads(settings.compute_threads())
        model = load_model(settings.model, settings.device)
        self._device = model.device
        self._estimator = FlowEstimator(
            model,
            latency_budget_ms=settings.latency_budget_ms or None,
            max_iterations=settings.max_iterations,
            tolerance_px=settings.tolerance_px or None,
            direction=settings.direction,
            min_scale=settings.min_scale,
            max_gap_ms=settings.max_gap_ms,
        )
        if settings.warm_up_height:
            self._estimator.warm_up(settings.warm_up_height, settings.warm_up_width)
            flow_to_color(np.zeros((settings.warm_up_height, settings.warm_up_width, 2), np.float32))  # and its tables
        self._accounts = FrameAccounts(str(self._device), settings.direction)
        self._previous: Image | None = None
        reliable = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
        self._outputs = Outputs(
            self.create_lifecycle_publisher(Image, "~/flow", qos_profile_sensor_data),
            self.create_lifecycle_publisher(Image, "~/flow_color", qos_profile_sensor_data),
            self.create_lifecycle_publisher(Image, "~/residual", qos_profile_sensor_data),
            self.create_lifecycle_publisher(DiagnosticArray, "~/statistics", reliable),
        )
        self.get_logger().info(
            f"model {settings.model} on {self._device}, {torch.get_num_threads()} thread(s), "
            f"budget {settings.latency_budget_ms:g} ms, {settings.direction} flow"
        )

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe."""
        result = super().on_activate(state)
        self._worker = NewestFirstWorker(self._process, "flow")
        self._last_number = 0
        qos = QoSProfile(
            depth=self._settings.qos_depth, reliability=ReliabilityPolicy[self._settings.qos_reliability.upper()]
        )
        self._subscription = self.create_subscription(Image, "~/image", self._on_image, qos)
        self.get_logger().info(f"waiting for images on {self._subscription.topic_name}")
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unsubscribe, finish the frame in hand, forget the stream."""
        self._stop_stream("the node was deactivated")
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free everything that `configure` made."""
        self._free()
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop from whatever state."""
        self.close()
        return super().on_shutdown(state)

    def close(self) -> None:
        """Finish the frame in hand and free everything; may be called more than once."""
        self._stop_stream("the node was shut down")
        self._free()

    def _stop_stream(self, reason: str) -> None:
        if self._subscription is not None:
            self.destroy_subscription(self._subscription)
            self._subscription = None
        if self._worker is not None:
            waiting = self._worker.stop()
            self._worker = None
            if waiting is not None:
                self._drop(waiting.message, reason)
            self._reset(reason)

    def _free(self) -> None:
        if self._outputs is not None:
            for publisher in vars(self._outputs).values():
                self.destroy_lifecycle_publisher(publisher)
            self._outputs = None
        if self._estimator is not None:
            self._estimator = None
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _on_set_parameters(self, parameters: Sequence[Parameter]) -> SetParametersResult:
        return check_change(parameters, configured=self._estimator is not None)

    # Frames

    def _on_image(self, message: Image, info: dict[str, int]) -> None:
        arrival_ns = arrival(info["received_timestamp"], time.time_ns(), time.monotonic_ns())
        if self._worker is None:
            return  # taken from the middleware just before the subscription went
        self._accounts.received(self._lost_before(info["publication_sequence_number"]))
        replaced = self._worker.submit(ReceivedFrame(message, arrival_ns))
        if replaced is not None:
            self._drop(replaced.message, "superseded by a newer frame")

    def _lost_before(self, number: int) -> int:
        """Messages that the middleware lost between the last one and this, by the publisher's numbers."""
        lost = number - self._last_number - 1 if self._last_number else 0
        self._last_number = number
        if lost <= 0 or self._subscription is None or self.count_publishers(self._subscription.topic_name) != 1:
            return 0  # another publisher, or several: their numbers are not related
        return lost

    def _process(self, frame: ReceivedFrame) -> None:
        try:
            account = self._estimate(frame)
        except ValueError as error:  # the image cannot be used; the estimator's stream stays as it was
            self.get_logger().warning(f"cannot use the image: {error}", throttle_duration_sec=5.0)
            account = self._accounts.dropped(frame.message.header, str(error))
        except Exception as error:
            account = self._accounts.dropped(frame.message.header, self._recover(error))
        self._publish_account(account)
        try:
            if self._estimator is not None:
                self._estimator.prepare()  # what the next pair needs and its frame does not
        except Exception as error:
            self._recover(error)

    def _estimate(self, frame: ReceivedFrame) -> DiagnosticArray:
        message, started_ns = frame.message, time.monotonic_ns()
        assert self._estimator is not None
        rgb = convert.image_to_rgb(message)
        converted_ns = time.monotonic_ns()
        self._reset_if_another_source(message)
        result = self._estimator.update(rgb, convert.stamp_to_ns(message.header.stamp), frame.arrival_ns)
        previous, self._previous = self._previous, message
        if result is None:
            return self._accounts.first(message.header, self._estimator.reset_reason or "start")
        assert previous is not None
        estimated_ns = time.monotonic_ns()
        on_previous = result.info.direction == "forward"
        self._publish(result.flow, result.residual, (previous if on_previous else message).header)
        stages = {
            "wait": started_ns - frame.arrival_ns,
            "convert": converted_ns - started_ns,
            "publish": time.monotonic_ns() - estimated_ns,
        }
        return self._accounts.processed(
            message.header, result.info, {name: value * 1e-6 for name, value in stages.items()}
        )

    def _reset_if_another_source(self, message: Image) -> None:
        """The estimator sees only pixels and stamps; that another camera took over the topic shows in the message."""
        if self._previous is None:
            return
        before, now = _source(self._previous), _source(message)
        changed = [name for name in now if now[name] != before[name]]
        if changed:
            self._reset(", ".join(f"{name} changed from {before[name]!r} to {now[name]!r}" for name in changed))

    def _recover(self, error: Exception) -> str:
        """Reason of a frame that failed. It must not end the stream, but what it left in the estimator is unknown."""
        reason = f"{type(error).__name__}: {error}"
        self.get_logger().error(f"a frame failed: {reason}", throttle_duration_sec=5.0)
        self._reset(f"a frame failed ({reason})")
        return reason

    def _reset(self, reason: str) -> None:
        self._previous = None
        if self._estimator is not None:
            self._estimator.reset(reason)

    def _publish(self, flow: np.ndarray, residual: np.ndarray, header: Header) -> None:
        """Publish (H, W, 2) and (H, W) float32, in pixels; what nobody subscribes to is not computed."""
        assert self._outputs is not None
        if self._outputs.flow.get_subscription_count():
            self._outputs.flow.publish(convert.array_to_image(flow, "32FC2", header))
        if self._outputs.residual.get_subscription_count():
            self._outputs.residual.publish(convert.array_to_image(residual, "32FC1", header))
        if self._outputs.flow_color.get_subscription_count():
            self._outputs.flow_color.publish(convert.array_to_image(flow_to_color(flow), "rgb8", header))

    def _drop(self, message: Image, reason: str) -> None:
        self._publish_account(self._accounts.dropped(message.header, reason))

    def _publish_account(self, account: DiagnosticArray) -> None:
        assert self._outputs is not None
        try:
            self._outputs.statistics.publish(account)
        except Exception as error:  # one account that is lost must end neither the worker nor the executor
            self.get_logger().error(f"cannot publish the account of a frame: {error}", throttle_duration_sec=5.0)


def arrival(received_ns: int, wall_ns: int, monotonic_ns: int) -> int:
    """When a message arrived, on the clock of `monotonic_ns`, from the wall-clock time at which the middleware got it.

    A wait that cannot be is not believed, and the message counts as just arrived: some middlewares (Cyclone DDS) give 0
    for the time, and the wall clock may be set between the two readings.
    """
    waited_ns = wall_ns - received_ns
    believed = received_ns > 0 and 0 <= waited_ns <= MAX_WAIT_NS
    return monotonic_ns - waited_ns if believed else monotonic_ns


def _source(message: Image) -> dict[str, str]:
    return {"encoding": message.encoding, "frame_id": message.header.frame_id}


def main(args: Sequence[str] | None = None) -> int:
    """Run the process until SIGINT or SIGTERM; returns its exit status: 0, or 2 for a wrong parameter."""
    stop = process.start(args)
    node = None
    try:
        node = FlowNode()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        node.start(stop)
        while not stop.requested:
            executor.spin_once(timeout_sec=0.2)
    except ParameterException as error:
        print(f"flow_node: {error}", file=sys.stderr, flush=True)
        return 2
    except ExternalShutdownException:
        pass
    finally:
        if node is not None:
            node.close()
            node.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
