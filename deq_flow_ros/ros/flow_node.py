# SPDX-License-Identifier: Apache-2.0
"""`flow_node`: a lifecycle node that turns the images of one or more cameras into optical flow.

It holds what the cameras share: the model, the worker's thread, parameters, services, diagnostics. The way of a frame
is told in `camera_stream.py`. The executor's thread takes messages and answers services, the worker's thread computes.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rclpy
import rclpy.logging
import torch
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import SetParametersResult
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.task import Future
from rclpy.timer import Timer
from std_srvs.srv import SetBool, Trigger

from deq_flow_ros.imaging.colour import flow_to_color
from deq_flow_ros.model import choose_precision, load_model
from deq_flow_ros.ros import convert, process
from deq_flow_ros.ros.camera_input import STEADY_CLOCK
from deq_flow_ros.ros.camera_stream import CameraStream
from deq_flow_ros.ros.frame_worker import FrameWorker
from deq_flow_ros.ros.health import Health
from deq_flow_ros.ros.parameters import LIVE, Settings, check_change, misspelt_overrides, unused_qos_overrides
from deq_flow_ros.ros.snapshot import write_snapshot

SUCCESS, FAILURE, ERROR = (
    TransitionCallbackReturn.SUCCESS,
    TransitionCallbackReturn.FAILURE,
    TransitionCallbackReturn.ERROR,
)
SNAPSHOT_TIMEOUT_S = 5.0
DISABLED = "disabled by ~/enable"


class FlowNode(LifecycleNode):
    """`configure` loads the model, `activate` subscribes, `deactivate` unsubscribes, `cleanup` frees; then anew."""

    def __init__(self) -> None:
        super().__init__("flow_node")
        self._cameras: list[CameraStream] = []
        self._worker: FrameWorker | None = None
        self._diagnostics_timer: Timer | None = None
        self._enabled = True
        self._told: set[str] = set()
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
        # Of a group of its own: while it waits for the disk, the callbacks of all others go on.
        self.create_service(Trigger, "~/snapshot", self._on_snapshot, callback_group=ReentrantCallbackGroup())
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
            return super().on_configure(state)
        except Exception as error:
            reason = f"configure failed: {_words(error)}"
            self.get_logger().error(reason)
        self._free(failure=reason)  # behind the error, whose traceback holds the model
        return FAILURE

    def _configure(self, settings: Settings) -> None:
        self._settings = settings
        torch.set_num_threads(settings.compute_threads())
        cv2.setNumThreads(settings.compute_threads())
        precision = choose_precision(settings.precision, settings.device)
        model = load_model(settings.model, settings.device, precision=precision)
        self._device = model.device
        for name in settings.cameras:
            self._cameras.append(CameraStream(self, name, model, settings))
        if settings.warm_up_height:
            first, *others = [camera.estimator for camera in self._cameras]
            first.warm_up(settings.warm_up_height, settings.warm_up_width)
            for estimator in others:
                estimator.take_costs_of(first)
            flow_to_color(np.zeros((settings.warm_up_height, settings.warm_up_width, 2), np.float32))  # and its tables
        self._enabled = True
        threads = torch.get_num_threads()
        self._health.configured(
            self._device, settings.model, precision=precision, threads=threads, images=convert.BACKEND
        )
        self._health.cameras = {camera.name: camera.health for camera in self._cameras}
        self._publish_diagnostics_every(settings.diagnostics_period_s)
        self.get_logger().info(
            f"model {settings.model} on {self._device} in {precision}, {threads} thread(s), "
            f"{len(self._cameras)} camera(s), budget {settings.latency_budget_ms:g} ms, {settings.direction} flow"
        )

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe; where that fails, say why and stay inactive."""
        result = super().on_activate(state)
        self._worker = FrameWorker(self._cameras, self._device, self._settings.latency_budget_ms)
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
        if not self._succeeds(lambda: self._stop("the node was deactivated"), "deactivate"):
            return ERROR
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free everything that `configure` made."""
        if not self._succeeds(self._free, "cleanup"):
            return ERROR
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop from whatever state."""
        self._succeeds(self.close, "shutdown")
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """A transition went wrong: free everything, so that the node is unconfigured and can be configured anew."""
        self._succeeds(self.close, "freeing everything")
        self.get_logger().error("the node is unconfigured, because a transition went wrong")
        return super().on_error(state)

    def _succeeds(self, step: Callable[[], None], name: str) -> bool:
        """Whether a step raised no error; rclpy would say nothing of one in a transition."""
        try:
            step()
            return True
        except Exception:
            self.get_logger().error(f"{name} failed:\n{traceback.format_exc()}")
            return False

    def close(self) -> None:
        """Finish the frame in hand and free everything; may be called more than once."""
        try:
            self._stop("the node was shut down")
        finally:
            self._free()

    def _open(self) -> None:
        assert self._worker is not None
        if self._enabled:
            inputs = set[str]().union(*[camera.open(self._worker.take) for camera in self._cameras])
            for line in set(unused_qos_overrides(self, inputs)) - self._told:
                self.get_logger().warning(line)
                self._told.add(line)
        else:  # and then deactivated and activated
            self._close(DISABLED)
            self.get_logger().warning("active, but disabled: call the service ~/enable")

    def _close(self, reason: str) -> None:
        for camera in self._cameras:
            camera.close(reason)

    def _stop(self, reason: str) -> None:
        try:
            self._close(reason)
        finally:
            if self._worker is not None:
                self._worker.drop_waiting(reason)
                self._worker.stop()
                self._worker = None

    def _free(self, failure: str | None = None) -> None:
        self._health.cleaned_up(failure)
        device = self._device if self._cameras else None
        while self._cameras:
            self._cameras.pop().destroy()
        if device is not None and device.type == "cuda":
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
            if self._worker is not None:
                self._worker.latency_budget_ms = self._settings.latency_budget_ms

    # Services

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        if self._worker is None:
            response.success, response.message = False, "the node is not active: call the transition activate"
            return response
        if request.data != self._enabled:
            self._enabled = request.data
            if self._enabled and not self._succeeds(self._open, "enable"):
                self._enabled = False
            if not self._enabled:
                self._close(DISABLED)
                self._worker.drop_waiting(DISABLED)
        response.success = request.data == self._enabled
        response.message = ("enabled" if self._enabled else "disabled") if response.success else "failed, see the log"
        return response

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        for camera in self._cameras:
            camera.reset("asked for by ~/reset")
        if self._cameras:
            response.success, response.message = True, "each stream starts anew with its next image"
        else:
            response.success, response.message = False, "the node is unconfigured: there is no stream"
        return response

    async def _on_snapshot(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Copy what the streams hold, between two frames, and write it, while images go on coming in."""
        worker = self._worker
        if worker is None:
            response.success, response.message = False, "the node is not active: there is no stream"
            return response
        log_folder = rclpy.logging.get_logging_directory()
        folder = Path(self._settings.snapshot_folder or log_folder / "flow_snapshots").expanduser()
        about = {"parameters": dataclasses.asdict(self._settings), "device": str(self._device)}

        def write() -> list[str]:
            copies = worker.call(lambda: [camera.snapshot() for camera in self._cameras], SNAPSHOT_TIMEOUT_S)
            return [str(write_snapshot(folder, copy, about)) for copy in copies if copy is not None]

        try:
            paths = await self._in_a_thread(write)
            response.success = bool(paths)
            response.message = ", ".join(paths) or "no stream yet: no pair of images has been processed"
        except TimeoutError as error:
            response.success, response.message = False, f"no snapshot, the frame in hand takes too long: {error}"
        except Exception as error:
            response.success, response.message = False, f"cannot write into {folder}: {_words(error)}"
        return response

    def _in_a_thread(self, job: Callable[[], Any]) -> Future:
        """What a callback may await while the executor takes up other work. The process does not end before it."""
        executor = self.executor
        future = Future(executor=executor)

        def run() -> None:
            try:
                future.set_result(job())
            except Exception as error:
                future.set_exception(error)
            if executor is not None:
                executor.wake()

        threading.Thread(target=run, name="snapshot").start()
        return future

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
