# SPDX-License-Identifier: Apache-2.0
"""A camera and a user of `flow_node` in one, for tests: publishes images, collects outputs, calls its services."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
import torch
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import SetParameters
from rclpy.client import Client
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.publisher import Publisher
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from deq_flow_ros.host import Children
from deq_flow_ros.model import SIZES, DEQFlow, save_model

TIMEOUT_S = 60.0
PERIOD_NS = 33_333_333
CAMERA_TOPIC = "/camera/image"
QUICK = {
    "latency_budget_ms": 0.0,  # no deadline: a busy machine changes no outcome
    "max_iterations": 2,
    "warm_up_width": 0,
    "warm_up_height": 0,
    "always_on": True,  # that a subscription is known a moment later costs no image
    "qos_reliability": "reliable",
    "qos_depth": 100,
}
"""Parameters with which every frame of a test comes through, soon."""


def untrained_weights(folder: Path) -> Path:
    """Weights for tests that do not depend on how good the flow is."""
    torch.manual_seed(0)
    path = folder / "untrained.safetensors"
    save_model(DEQFlow(replace(SIZES["nano"], uncertainty_dim=8)), path)
    return path


def node_arguments(*remappings: str, **parameters: Any) -> list[str]:
    """Command line of `flow_node`."""
    words = [word for rule in remappings for word in ("-r", rule)]
    return ["--ros-args", *words, *(word for name, value in parameters.items() for word in ("-p", f"{name}:={value}"))]


@contextmanager
def running_node(
    folder: Path, *remappings: str, failures: int = 0, **parameters: Any
) -> Iterator[tuple[NodeClient, Children]]:
    """`flow_node` as a process with untrained weights, and a client; SIGINT must end it in time and with status 0.

    In between no callback may fail but for so many `failures` that the tests bring about on purpose.
    """
    arguments = node_arguments(*remappings, **{"model": untrained_weights(folder), **QUICK, **parameters})
    with Children(folder / "logs") as children:
        children.start("flow_node", "deq_flow_ros.ros.flow_node", arguments)
        rclpy.init()
        try:
            client = NodeClient()
            yield client, children
            client.destroy_node()
        finally:
            rclpy.shutdown()
        children.stop("flow_node", timeout_s=20.0)
        log = children.log("flow_node").read_text()
        assert log.count("a callback failed") == failures, log


class NodeClient(Node):
    """`flow`, `color`, `residual` and `accounts` hold the messages received since `forget()`.

    Of the camera NAME where one is named: it publishes on /NAME/image. Clients in one process share the executor of the
    first, so that waiting on one of them takes in what comes to all.
    """

    def __init__(self, name: str = "", beside: NodeClient | None = None) -> None:
        super().__init__(f"client_{name}" if name else "client")
        self._executor = SingleThreadedExecutor() if beside is None else beside._executor
        self._executor.add_node(self)
        qos = QoSProfile(depth=100)
        self.camera_topic = f"/{name}/image" if name else CAMERA_TOPIC
        self.prefix = f"/flow_node/{name}" if name else "/flow_node"
        self.camera = self.create_publisher(Image, self.camera_topic, qos)
        self.flow: list[Image] = []
        self.color: list[Image] = []
        self.residual: list[Image] = []
        self.messages: list[DiagnosticArray] = []
        best_effort = rclpy.qos.qos_profile_sensor_data  # as on the node's side; a reliable subscriber would not match
        for topic, received in (("flow", self.flow), ("flow_color", self.color), ("residual", self.residual)):
            self.create_subscription(Image, f"{self.prefix}/{topic}", received.append, best_effort)
        self.create_subscription(DiagnosticArray, f"{self.prefix}/statistics", self.messages.append, qos)
        self.next_stamp_ns = 1_000_000_000
        self._service_clients: dict[str, Client] = {}

    @property
    def accounts(self) -> list[dict[str, str]]:
        """Values of the accounts received."""
        return [{pair.key: pair.value for pair in message.status[0].values} for message in self.messages]

    def forget(self) -> None:
        """Empty the collections."""
        for received in (self.flow, self.color, self.residual, self.messages):
            received.clear()

    def until(self, condition: Callable[[], Any], what: str, timeout_s: float = TIMEOUT_S) -> Any:
        """Spin until the condition holds and return it; fail naming `what` otherwise."""
        give_up = time.monotonic() + timeout_s
        while not (result := condition()):
            assert time.monotonic() < give_up, f"waited {timeout_s:g} s for {what}; accounts: {self.accounts[-3:]}"
            self._executor.spin_once(timeout_sec=0.05)
        return result

    def spin_for(self, seconds: float) -> None:
        """Collect what comes."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._executor.spin_once(timeout_sec=0.02)

    def image(self, shape: tuple[int, int] = (48, 64), seed: int = 0, shift: int = 0) -> Image:
        """A textured bgr8 image with the next stamp, moved by `shift` px to the right."""
        height, width = shape
        texture = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width, 3), np.uint8)
        pixels = np.roll(texture.repeat(4, axis=0)[:height].repeat(4, axis=1)[:, :width], shift, axis=1)
        message = Image(height=height, width=width, step=3 * width, encoding="bgr8")
        message.data.frombytes(np.ascontiguousarray(pixels).tobytes())
        seconds, nanoseconds = divmod(self.next_stamp_ns, 10**9)
        message.header = Header(stamp=Time(sec=seconds, nanosec=nanoseconds), frame_id="camera")
        self.next_stamp_ns += PERIOD_NS
        return message

    def send(self, *images: Any, by: Publisher | None = None) -> list[dict[str, str]]:
        """Publish one after the other, each when the one before has its account; return their accounts."""
        before = len(self.messages)
        for number, image in enumerate(images, start=before + 1):
            (by or self.camera).publish(image)
            self.until(lambda expected=number: len(self.messages) >= expected, "the account of a frame")
        return self.accounts[before:]

    def call(self, kind: Any, name: str, request: Any) -> Any:
        """Call a service of the node."""
        if name not in self._service_clients:
            self._service_clients[name] = self.create_client(kind, f"/flow_node/{name}")
        client = self._service_clients[name]
        self.until(client.service_is_ready, f"the service {name}")
        future = client.call_async(request)
        self.until(future.done, f"the answer of {name}")
        return future.result()

    def change_state(self, transition: str) -> bool:
        """Call a lifecycle transition by name; returns whether it succeeded."""
        number = getattr(Transition, f"TRANSITION_{transition.upper()}")
        request = ChangeState.Request(transition=Transition(id=number))
        return self.call(ChangeState, "change_state", request).success

    def state(self) -> str:
        """Label of the lifecycle state."""
        return self.call(GetState, "get_state", GetState.Request()).current_state.label

    def set_parameters(self, **values: Any) -> str:
        """Set parameters; returns the reasons of refusal, joined."""
        request = SetParameters.Request()
        request.parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        results = self.call(SetParameters, "set_parameters", request).results
        return "; ".join(result.reason for result in results if not result.successful)

    def replace_camera(self, qos: QoSProfile) -> None:
        """Publish with another quality of service; the node must not be subscribed meanwhile."""
        self.destroy_publisher(self.camera)
        self.camera = self.create_publisher(Image, self.camera_topic, qos)

    def connect(self) -> None:
        """Wait until images reach the node and its outputs come back."""
        self.until(lambda: self.camera.get_subscription_count() == 1, "the node to subscribe")
        self.until(lambda: self.count_publishers(f"{self.prefix}/statistics") == 1, "the node's statistics")
        # Each side learns of the other by itself; a probe shows that both know, and is dropped as empty.
        probe = self.image()
        probe.height = 0
        for _ in range(100):
            self.camera.publish(probe)
            self.spin_for(0.1)
            if self.messages:
                break
        assert self.messages, "the node gave no account of any frame"
        self.spin_for(0.2)
        self.forget()
