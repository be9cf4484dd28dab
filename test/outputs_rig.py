# SPDX-License-Identifier: Apache-2.0
"""The outputs of one camera, a field to publish on them, and a node that subscribes."""

from __future__ import annotations

from typing import Any

import numpy as np
import rclpy
from frame_accounts import info
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode
from rclpy.node import Node
from rclpy.parameter import Parameter
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2
from std_msgs.msg import Header

from deq_flow_ros.ros.camera_info import Calibration
from deq_flow_ros.ros.outputs import FlowOutputs
from deq_flow_ros.ros.parameters import NodeSettings
from deq_flow_ros.streaming import FlowResult

TOPICS = dict.fromkeys(("flow", "flow_color", "residual", "uncertainty"), Image)
TOPICS |= {"flow_color/compressed": CompressedImage, "points": PointCloud2, "camera_info": CameraInfo}
HEADER, ABOUT = Header(frame_id="camera"), ("image_size", "topic", "rectified")
HEIGHT, WIDTH = 20, 30
OVERRIDDEN = "qos_overrides./flow_node/rear/flow.publisher.{}"
UNCERTAINTY = np.random.default_rng(1).random((HEIGHT, WIDTH)).astype(np.float32)


def field() -> tuple[np.ndarray, np.ndarray]:
    """Flow (H, W, 2) and residual (H, W) px, different at every pixel, one of them invalid."""
    generator = np.random.default_rng(0)
    flow = generator.normal(0, 3, (HEIGHT, WIDTH, 2)).astype(np.float32)
    flow[4, 6] = np.nan
    return flow, generator.random((HEIGHT, WIDTH)).astype(np.float32)


def result(colors: np.ndarray | None = None) -> FlowResult:
    return FlowResult(*field(), info(), UNCERTAINTY, colors)


def calibration(width: int = WIDTH, height: int = HEIGHT) -> CameraInfo:
    return CameraInfo(width=width, height=height, k=[50.0, 0, 15, 0, 50, 10, 0, 0, 1])


class Rig:
    """A lifecycle node with outputs, active, and a node that subscribes to them."""

    def __init__(self) -> None:
        self.context = Context()
        rclpy.init(context=self.context)
        overrides = [
            Parameter(OVERRIDDEN.format("reliability"), value="best_effort"),
            Parameter(OVERRIDDEN.format("depth"), value=3),
            Parameter("qos_overrides./flow_node/broken/residual.publisher.reliability", value="perhaps"),
        ]
        self.node = LifecycleNode("flow_node", context=self.context, parameter_overrides=overrides)
        self.user = Node("user", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        for node in (self.node, self.user):
            self.executor.add_node(node)
        self.received: dict[str, list[Any]] = {}
        self.node.trigger_configure()
        self.outputs = FlowOutputs(self.node, "~/")
        self.node.trigger_activate()

    def subscribe(self, *names: str) -> None:
        """Subscribe to these outputs and no others, and wait until both sides know."""
        for subscription in list(self.user.subscriptions):
            self.user.destroy_subscription(subscription)
        self.received = {name: [] for name in names}
        for name in names:
            # As in every tutorial of ROS: reliable.
            self.user.create_subscription(TOPICS[name], f"/flow_node/{name}", self.received[name].append, 10)
        self.until(lambda: self.outputs.wanted() == set(names))

    def until(self, condition: Any) -> None:
        """Spin until the condition holds."""
        for _ in range(400):
            if condition():
                return
            self.executor.spin_once(timeout_sec=0.05)
        raise AssertionError(f"waited in vain; wanted {self.outputs.wanted()}, got {self.received}")

    def publish(self, camera_info: CameraInfo | None = None, elapsed_s: float = 0.1, **options: Any) -> dict[str, Any]:
        """Publish the field and return the messages that come, one of each output subscribed to."""
        known = Calibration(camera_info, **{name: options.pop(name) for name in ABOUT if name in options})
        self.outputs.publish(result(), HEADER, known, elapsed_s, NodeSettings(**options))
        self.until(lambda: all(self.received.values()))
        messages = {name: received.pop() for name, received in self.received.items()}
        assert not any(self.received.values())
        return messages

    def close(self) -> None:
        self.outputs.destroy()
        self.executor.shutdown()
        self.node.destroy_node()
        self.user.destroy_node()
        rclpy.shutdown(context=self.context)
