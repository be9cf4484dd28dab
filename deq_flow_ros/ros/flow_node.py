# SPDX-License-Identifier: Apache-2.0
"""``flow_node``: a lifecycle node that turns the images of one or more cameras into optical flow.

The executor's thread takes messages and answers services, the worker's thread computes. ``docs/design.md`` has the way
of a frame.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from diagnostic_msgs.msg import DiagnosticStatus
from rcl_interfaces.msg import SetParametersResult
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.logging import get_logging_directory
from rclpy.parameter import Parameter
from std_srvs.srv import SetBool, Trigger

from deq_flow_ros.imaging.pictures import flow_to_color
from deq_flow_ros.model import choose_precision, load_model
from deq_flow_ros.ros import process, qos
from deq_flow_ros.ros.camera import QUIET_S, Camera
from deq_flow_ros.ros.health import ProcessStatus
from deq_flow_ros.ros.messages import BACKEND
from deq_flow_ros.ros.parameters import LIVE, NodeSettings, check_change
from deq_flow_ros.ros.process import Diagnostics, ManagerBond
from deq_flow_ros.ros.snapshot import write_snapshot
from deq_flow_ros.ros.worker import FrameWorker

SUCCESS, FAILURE, ERROR = (getattr(TransitionCallbackReturn, name) for name in ("SUCCESS", "FAILURE", "ERROR"))
DISABLED = "disabled by ~/enable"
SNAPSHOT_TIMEOUT_S = 5.0
NAMESAKE_S = 30.0
"""How long another node has this one's name before it is worth a word: one that was killed is still known for 20 s."""
USAGE = """Dense optical flow of a camera's images, as a lifecycle node. It takes the arguments of ROS alone:

  ros2 run deq_flow_ros flow_node --ros-args -r '~/image:=/camera/image_raw' -p device:=cuda --params-file FILE

docs/node.md describes its topics, docs/parameters.md (and `ros2 param describe`) its parameters."""


class FlowNode(LifecycleNode):
    """``configure`` loads the model, ``activate`` subscribes, ``deactivate`` unsubscribes, ``cleanup`` frees.

    :ivar cameras: from configure to cleanup.
    :ivar worker: while the node is active; else None.
    """

    def __init__(self) -> None:
        super().__init__("flow_node")
        self.cameras: list[Camera] = []
        self.worker: FrameWorker | None = None
        self._alone_s = time.monotonic()
        self._enabled = True
        self._bond = ManagerBond(self)
        self._health = ProcessStatus(f"{self.get_fully_qualified_name()[1:]}: process")
        self.add_on_set_parameters_callback(self._on_set_parameters)
        NodeSettings.declare(self, self._on_parameters_set)
        self._diagnostics = Diagnostics(self, self._statuses)
        self._diagnostics.publish_every(self.get_parameter("diagnostics_period_s").value)
        self.create_service(SetBool, "~/enable", self._on_enable)
        self.create_service(Trigger, "~/reset", self._on_reset)
        # Of a group of its own: while it waits for the disk, the callbacks of all others go on.
        self.create_service(Trigger, "~/snapshot", self._on_snapshot, callback_group=ReentrantCallbackGroup())
        process.refuse_impossible_transitions(self)
        self.get_logger().info(f"images are converted by {BACKEND}")

    def start(self, stop: process.StopRequest) -> bool:
        """Configure and activate, where the parameter ``autostart`` says so; returns whether the process goes on."""
        if not self.get_parameter("autostart").value:
            return True
        for transition, trigger in (("configure", self.trigger_configure), ("activate", self.trigger_activate)):
            if not stop.requested and trigger() != SUCCESS:
                ends: bool = self.get_parameter("exit_on_failure").value
                then = "the process ends (exit_on_failure)" if ends else f"then call the transition {transition}"
                self.get_logger().error(f"not started; mend what is named above; {then}")
                return not ends
        return True

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the model and measure its cost; on failure say what to do, and stay unconfigured."""
        try:
            self._configure(NodeSettings.read(self))
            return super().on_configure(state)
        except Exception as error:
            reason = f"configure failed: {process.words_of(error)}"
        self.get_logger().error(reason)
        self._free(failure=reason)  # behind the error, whose traceback holds the model
        return FAILURE

    def _configure(self, settings: NodeSettings) -> None:
        self._settings = settings
        torch.set_num_threads(settings.compute_threads())
        cv2.setNumThreads(settings.compute_threads())
        precision = choose_precision(settings.precision, settings.device)
        model = load_model(Path(settings.model).expanduser(), settings.device, precision=precision)
        self._device = model.device
        for name in settings.cameras:
            self.cameras.append(Camera(self, name, model, settings))
        if settings.warm_up_height:
            first, *others = [camera.estimator for camera in self.cameras]
            first.warm_up(settings.warm_up_height, settings.warm_up_width)
            for estimator in others:
                estimator.take_costs_of(first)
            flow_to_color(np.zeros((settings.warm_up_height, settings.warm_up_width, 2), np.float32))  # and its tables
        self._enabled = True
        runtime, threads = self.cameras[0].estimator.engine.about, torch.get_num_threads()
        about = {"precision": precision, "gpu_runtime": runtime, "threads": threads, "images": BACKEND}
        self._health.configured(self._device, settings.model, **about)
        self._diagnostics.publish_every(settings.diagnostics_period_s)
        self.get_logger().info(
            f"model {settings.model} on {self._device} in {precision}, {runtime}, {threads} thread(s), "
            f"{len(self.cameras)} camera(s), budget {settings.latency_budget_ms:g} ms, {settings.direction} flow"
        )

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe; where that fails, say why and stay inactive."""
        result = super().on_activate(state)
        self.worker = FrameWorker(self.cameras, self._device, self._settings.latency_budget_ms)
        try:
            self._open()
            self._bond.form()
        except Exception as error:  # a QoS override that ROS cannot read, for example
            self.get_logger().error(f"activate failed: {process.words_of(error)}")
            self._stop("the node could not be activated")
            super().on_deactivate(state)
            return FAILURE
        return result

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unsubscribe, finish the frame in hand, forget the streams."""
        done = self._succeeds(lambda: self._stop("the node was deactivated"), "deactivate")
        return super().on_deactivate(state) if done else ERROR

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free everything that ``configure`` made."""
        return super().on_cleanup(state) if self._succeeds(self._free, "cleanup") else ERROR

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop from whatever state."""
        self._succeeds(self.close, "shutdown")
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """A transition went wrong: free everything, so that the node can be configured anew."""
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
        assert self.worker is not None
        if not self._enabled:  # and then deactivated and activated
            self._close(DISABLED)
            self.get_logger().warning("active, but disabled: call the service ~/enable")
            return
        inputs = set[str]().union(*[camera.open(self.worker.take) for camera in self.cameras])
        for line in qos.unused_overrides(self, inputs):
            self.get_logger().warning(line)

    def _close(self, reason: str) -> None:
        for camera in self.cameras:
            camera.close(reason)
        if self.worker is not None:
            self.worker.drop_waiting(reason)

    def _stop(self, reason: str) -> None:
        self._bond.end()
        try:
            self._close(reason)
        finally:
            if self.worker is not None:
                self.worker.stop()
                self.worker = None

    def _free(self, failure: str | None = None) -> None:
        self._health.cleaned_up(failure)
        device = self._device if self.cameras else None
        while self.cameras:
            self.cameras[-1].estimator.engine.close()
            self.cameras.pop().destroy()
        if device is not None and device.type == "cuda":
            torch.cuda.empty_cache()

    def _statuses(self) -> list[DiagnosticStatus]:
        name = self.get_fully_qualified_name()[1:]
        status = self._health.status()
        if (namesake := self._namesake()) and status.level == DiagnosticStatus.OK:
            status.level, status.message = DiagnosticStatus.WARN, namesake
        return [status, *(each.status(f"{name}: {each.name or 'flow'}") for each in self.cameras)]

    def _namesake(self) -> str:
        """What it means that other nodes have the name of this one, if some do for long; the log has it as well."""
        count = self.get_node_names_and_namespaces().count((self.get_name(), self.get_namespace()))
        if count < 2:
            self._alone_s = time.monotonic()
        if count < 2 or time.monotonic() - self._alone_s < NAMESAKE_S:
            return ""
        reason = (
            f"{count} nodes are called {self.get_fully_qualified_name()}: what they publish is mixed, and a service "
            "reaches any of them; end those that an earlier start left behind, or give each a name (-r __node:=NAME)"
        )
        self.get_logger().warning(reason, throttle_duration_sec=QUIET_S)
        return reason

    def _on_set_parameters(self, parameters: Sequence[Parameter]) -> SetParametersResult:
        return check_change(parameters, self, configured=bool(self.cameras))

    def _on_parameters_set(self, parameters: Sequence[Parameter]) -> None:
        if self.cameras and any(parameter.name in LIVE for parameter in parameters):
            self._settings = NodeSettings.read(self)
            for camera in self.cameras:
                camera.change(self._settings)
            if self.worker is not None:
                self.worker.latency_budget_ms = self._settings.latency_budget_ms

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        if self.worker is None:
            response.success, response.message = False, "the node is not active: call the transition activate"
            return response
        if request.data != self._enabled:
            self._enabled = request.data
            self._enabled = request.data and self._succeeds(self._open, "enable")
            if not self._enabled:
                self._close(DISABLED)
        response.success = request.data == self._enabled
        response.message = ("enabled" if self._enabled else "disabled") if response.success else "failed, see the log"
        return response

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        for camera in self.cameras:
            camera.reset("asked for by ~/reset")
        response.success = bool(self.cameras)
        anew = "each stream starts anew with its next image"
        response.message = anew if response.success else "the node is unconfigured: there is no stream"
        return response

    async def _on_snapshot(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        """Copy what the streams hold, between two frames, and write it, while images go on coming in."""
        response.success, worker = False, self.worker
        if worker is None:
            response.message = "the node is not active: there is no stream"
            return response
        about = {"parameters": dataclasses.asdict(self._settings), "device": str(self._device)}
        folder = Path(self._settings.snapshot_folder or get_logging_directory() / "flow_snapshots").expanduser()

        def write() -> list[str]:
            copies = worker.call(lambda: [camera.snapshot() for camera in self.cameras], SNAPSHOT_TIMEOUT_S)
            return [str(write_snapshot(folder, arrays, {**about, **more})) for arrays, more in filter(None, copies)]

        try:
            paths = await process.in_a_thread(write, self.executor, "snapshot")
            response.success = bool(paths)
            response.message = ", ".join(paths) or "no stream yet: no image has been processed"
        except TimeoutError as error:
            response.message = f"no snapshot, the frames in hand take too long, or the node is stopping: {error}"
        except Exception as error:
            response.message = f"cannot write into {folder}: {process.words_of(error)}"
        return response


def main(args: Sequence[str] | None = None) -> int:
    """Run the process until SIGINT or SIGTERM; returns its exit status, 1 where ``exit_on_failure`` says so."""
    return process.run(FlowNode, "flow_node", USAGE, args, FlowNode.start)


if __name__ == "__main__":
    sys.exit(main())
