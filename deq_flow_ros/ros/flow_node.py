# SPDX-License-Identifier: Apache-2.0
"""`flow_node`: a lifecycle node that turns the images of one or more cameras into optical flow.

It holds what the cameras share: the model, the worker's thread, parameters, services, diagnostics. The way of a frame
is told in `camera_stream.py`. The executor's thread takes messages and answers services, the worker's thread computes.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import rclpy
import rclpy.logging
import torch
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import SetParametersResult
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.timer import Timer
from std_srvs.srv import SetBool, Trigger

from deq_flow_ros.media.colour import flow_to_color
from deq_flow_ros.model import load_model
from deq_flow_ros.ros import convert, process
from deq_flow_ros.ros.camera_input import STEADY_CLOCK
from deq_flow_ros.ros.camera_stream import Attempt, CameraStream, ReceivedFrame
from deq_flow_ros.ros.health import SUPERSEDED, Health
from deq_flow_ros.ros.parameters import LIVE, Settings, check_change, misspelt_overrides
from deq_flow_ros.ros.worker import FairWorker
from deq_flow_ros.streaming import FlowResult, update_together

SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE
DELIVERING_NS = 1_000_000_000
"""A camera that delivered an image within this time takes its share of the budget."""
SNAPSHOT_TIMEOUT_S = 5.0
DISABLED = "disabled by ~/enable"


class FlowNode(LifecycleNode):
    """`configure` loads the model, `activate` subscribes, `deactivate` unsubscribes, `cleanup` frees; then anew."""

    def __init__(self) -> None:
        super().__init__("flow_node")
        self._cameras: list[CameraStream] = []
        self._worker: FairWorker[ReceivedFrame] | None = None
        self._diagnostics_timer: Timer | None = None
        self._enabled = True
        self._health = Health(self.get_fully_qualified_name())
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self.add_post_set_parameters_callback(self._on_parameters_set)
        Settings.declare(self)
        for line in misspelt_overrides(self):
            self.get_logger().warning(line)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._publish_diagnostics_every(self.get_parameter("diagnostics_period_s").value)
        self.create_service(SetBool, "~/enable", self._on_enable)
        self.create_service(Trigger, "~/reset", self._on_reset)
        self.create_service(Trigger, "~/snapshot", self._on_snapshot)
        self._refuse_impossible_transitions()
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
            reason = f"configure failed: {_words(error)}"
            self.get_logger().error(reason)
            self._free(failure=reason)
            return FAILURE
        return super().on_configure(state)

    def _configure(self, settings: Settings) -> None:
        self._settings = settings
        torch.set_num_threads(settings.compute_threads())
        cv2.setNumThreads(settings.compute_threads())
        model = load_model(settings.model, settings.device)
        self._device = model.device
        for name in settings.cameras:
            self._cameras.append(CameraStream(self, name, model, settings, self._on_frame))
        if settings.warm_up_height:
            for camera in self._cameras:
                camera.estimator.warm_up(settings.warm_up_height, settings.warm_up_width)
            flow_to_color(np.zeros((settings.warm_up_height, settings.warm_up_width, 2), np.float32))  # and its tables
        self._enabled = True
        threads = torch.get_num_threads()
        self._health.configured(self._device, model=settings.model, threads=threads, images=convert.BACKEND)
        self._health.cameras = {camera.name: camera.health for camera in self._cameras}
        self._publish_diagnostics_every(settings.diagnostics_period_s)
        self.get_logger().info(
            f"model {settings.model} on {self._device}, {threads} thread(s), {len(self._cameras)} camera(s), "
            f"budget {settings.latency_budget_ms:g} ms, {settings.direction} flow"
        )

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe; where that fails, say why and stay inactive."""
        result = super().on_activate(state)
        self._worker = FairWorker(self._process, "flow", together=self._device.type == "cuda")
        try:
            self._open()
        except Exception as error:  # a QoS override that ROS cannot read, for example
            self.get_logger().error(f"activate failed: {_words(error)}")
            self._stop("the node could not be activated")
            super().on_deactivate(state)
            return FAILURE
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unsubscribe, finish the frame in hand, forget the streams."""
        self._stop("the node was deactivated")
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free everything that `configure` made."""
        self._free()
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop from whatever state."""
        self.close()
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """A transition raised an error: free everything, so that the node is unconfigured and can be configured."""
        self.get_logger().error(f"an error in the transition from {state.label}; the node is unconfigured now")
        self.close()
        return super().on_error(state)

    def close(self) -> None:
        """Finish the frame in hand and free everything; may be called more than once."""
        self._stop("the node was shut down")
        self._free()

    def _open(self) -> None:
        if self._enabled:
            for camera in self._cameras:
                camera.open()

    def _stop(self, reason: str) -> None:
        for camera in self._cameras:
            camera.close(reason)
        if self._worker is not None:
            waiting = self._worker.stop()
            self._worker = None
            for frame in waiting:
                frame.camera.drop(frame, reason)

    def _free(self, failure: str | None = None) -> None:
        self._health.cleaned_up(failure)
        for camera in self._cameras:
            camera.destroy()
        if self._cameras:
            self._cameras = []
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _refuse_impossible_transitions(self) -> None:
        """Answer the request of a transition that the state does not have with "no".

        rclpy raises an error in the executor instead, and the caller waits for ever.
        """
        service = self._service_change_state
        change = service.callback

        def callback(request: ChangeState.Request, response: ChangeState.Response) -> ChangeState.Response:
            try:
                return change(request, response)
            except RuntimeError as error:
                self.get_logger().warning(f"cannot do the transition that was asked for: {error}")
                response.success = False
                return response

        service.callback = callback

    # Parameters

    def _on_set_parameters(self, parameters: Sequence[Parameter]) -> SetParametersResult:
        return check_change(parameters, self, configured=bool(self._cameras))

    def _on_parameters_set(self, parameters: Sequence[Parameter]) -> None:
        if self._cameras and any(parameter.name in LIVE for parameter in parameters):
            self._settings = Settings.read(self)
            for camera in self._cameras:
                camera.change(self._settings)

    # Services

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        if self._worker is None:
            response.success, response.message = False, "the node is not active: call the transition activate"
            return response
        if request.data != self._enabled:
            self._enabled = request.data
            if self._enabled:
                self._open()
            else:
                for camera in self._cameras:
                    camera.close(DISABLED)
                for frame in self._worker.withdraw():
                    frame.camera.drop(frame, DISABLED)
        response.success, response.message = True, "enabled" if self._enabled else "disabled"
        return response

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        for camera in self._cameras:
            camera.reset("asked for by ~/reset")
        if self._cameras:
            response.success, response.message = True, "each stream starts anew with its next image"
        else:
            response.success, response.message = False, "the node is unconfigured: there is no stream"
        return response

    def _on_snapshot(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Write what the streams hold, between two frames."""
        if self._worker is None:
            response.success, response.message = False, "the node is not active: there is no stream"
            return response
        log_folder = rclpy.logging.get_logging_directory()
        folder = Path(self._settings.snapshot_folder or log_folder / "flow_snapshots").expanduser()
        about = {"parameters": dataclasses.asdict(self._settings), "device": str(self._device)}

        def write() -> list[Path | None]:
            return [camera.write_snapshot(folder, about) for camera in self._cameras]

        try:
            paths = [str(path) for path in self._worker.call(write, SNAPSHOT_TIMEOUT_S) if path is not None]
            response.success = bool(paths)
            response.message = ", ".join(paths) or "no stream yet: no pair of images has been processed"
        except Exception as error:
            response.success, response.message = False, f"cannot write into {folder}: {_words(error)}"
        return response

    # Frames

    def _on_frame(self, frame: ReceivedFrame) -> None:
        assert self._worker is not None  # inputs are open only while it runs
        replaced = self._worker.submit(frame.camera.name, frame)
        if replaced is not None:
            replaced.camera.drop(replaced, SUPERSEDED)

    def _process(self, frames: list[ReceivedFrame]) -> None:
        """The worker's share: frames of different cameras."""
        limit_ms = self._time_limit_ms()
        begun = (frame.camera.begin(frame, limit_ms) for frame in frames)
        attempts = [attempt for attempt in begun if attempt is not None]
        for attempt, result in self._update(attempts):
            attempt.frame.camera.finish(attempt, result)
        assert self._worker is not None
        for attempt in attempts:
            # Not at the cost of another camera's image that waits.
            if len(self._cameras) == 1 or self._worker.idle:
                attempt.frame.camera.prepare()

    def _update(self, attempts: list[Attempt]) -> list[tuple[Attempt, FlowResult | None]]:
        """Run the estimators; a frame that fails has its account and is left out."""
        try:
            results = update_together([attempt.request for attempt in attempts])
            return list(zip(attempts, results, strict=True))
        except Exception as error:
            if len(attempts) == 1:
                attempts[0].frame.camera.fail(attempts[0].frame, error)
                return []
            # Whose frame it was is not known, so each stream starts anew, and each frame is tried alone.
            for attempt in attempts:
                attempt.frame.camera.recover(error)
            return [done for attempt in attempts for done in self._update([attempt])]

    def _time_limit_ms(self) -> float | None:
        """Time that one camera may take of the thread: its share of the budget, while others deliver images as well."""
        now_ns, budget_ms = time.monotonic_ns(), self._settings.latency_budget_ms
        delivering = [camera for camera in self._cameras if now_ns - camera.last_arrival_ns < DELIVERING_NS]
        shares = len(delivering)
        if self._device.type == "cuda":  # images of one size share a turn
            shares = len({camera.last_shape for camera in delivering})
        return budget_ms / shares if shares > 1 and budget_ms else None

    # Diagnostics

    def _publish_diagnostics_every(self, period_s: float) -> None:
        if self._diagnostics_timer is not None:
            self.destroy_timer(self._diagnostics_timer)
        self._diagnostics_timer = self.create_timer(period_s, self._publish_diagnostics, clock=STEADY_CLOCK)

    def _publish_diagnostics(self) -> None:
        message = DiagnosticArray(status=self._health.statuses())
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(message)


def _words(error: Exception) -> str:
    """An error as the user should read it: what we raise says all; of anything else, the place matters."""
    return str(error) if isinstance(error, (OSError, ValueError, RuntimeError)) else traceback.format_exc()


def _spin_once(executor: SingleThreadedExecutor, node: FlowNode) -> None:
    """Do what is next; rclpy raises for requests that are malformed, and one client's must not end the node."""
    try:
        executor.spin_once(timeout_sec=0.2)
    except ExternalShutdownException:
        raise
    except Exception:
        node.get_logger().error(f"a callback failed:\n{traceback.format_exc()}", throttle_duration_sec=1.0)


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
            _spin_once(executor, node)
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
