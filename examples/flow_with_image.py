# SPDX-License-Identifier: Apache-2.0
"""Flow together with the image whose pixels it lives on, and with that image's calibration, by message_filters.

    python3 flow_with_image.py --ros-args -r image:=/camera/image_raw -r flow:=/flow_node/flow
        [-p with_camera_info:=true -r camera_info:=/flow_node/camera_info]

The header rule of flow_node makes this an exact match of stamps: a flow field has the header of the image that it
lives on, the earlier one of a pair (direction: forward) or the later one (backward). `~/overlay` shows the flow as
arrows on that image. With the calibration, the log gives the median motion as an angle as well.
"""

import sys

import cv2
import numpy as np
import rclpy
from message_filters import Subscriber, TimeSynchronizer
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, Image

from deq_flow_ros.ros.messages import array_to_image, image_to_rgb

HELD = 60
"""Messages held of each topic: flow comes later than its image by the node's latency, forward flow by a frame more; 60
images are two seconds at 30 Hz.
"""
SPACING = 16
"""Pixels from one arrow to the next."""


class FlowWithImage(Node):
    """Pairs the topics `flow`, `image` and, with the parameter `with_camera_info`, `camera_info`."""

    def __init__(self) -> None:
        super().__init__("flow_with_image")
        topics = {"flow": Image, "image": Image}
        if self.declare_parameter("with_camera_info", False).value:
            topics["camera_info"] = CameraInfo
        # Sensor data QoS receives from any publisher. Most camera drivers offer no more, so that a reliable subscriber
        # gets nothing from them.
        inputs = [Subscriber(self, kind, name, qos_profile=qos_profile_sensor_data) for name, kind in topics.items()]
        self.synchronizer = TimeSynchronizer(inputs, HELD)
        self.synchronizer.registerCallback(self.on_pair)
        self.overlay = self.create_publisher(Image, "~/overlay", qos_profile_sensor_data)
        names = ", ".join(self.resolve_topic_name(name) for name in topics)
        self.get_logger().info(f"waiting for messages of the same stamp on {names}")

    def on_pair(self, flow_message: Image, image_message: Image, info: CameraInfo | None = None) -> None:
        """Messages with one stamp: show the flow on its image, say how fast the image moves."""
        height, width = flow_message.height, flow_message.width
        # (H, W, 2) float32: x and y displacement in pixels, NaN where there is none.
        flow = np.frombuffer(flow_message.data, np.float32).reshape(height, width, 2)
        motion = np.nanmedian(flow.reshape(-1, 2), axis=0)
        stamp = image_message.header.stamp
        line = f"image {stamp.sec}.{stamp.nanosec:09d}: median motion ({motion[0]:+.2f}, {motion[1]:+.2f}) px"
        if info is not None and info.k[0] > 0.0:
            angles = np.degrees(np.arctan2(motion, (info.k[0], info.k[4])))  # at the image centre
            line += f", ({angles[0]:+.3f}, {angles[1]:+.3f}) degrees"
        self.get_logger().info(line)
        if self.overlay.get_subscription_count():
            self.overlay.publish(array_to_image(arrows(image_to_rgb(image_message), flow), "rgb8", flow_message.header))


def arrows(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 copy of the image with an arrow from every `SPACING`-th pixel to where it moves."""
    shown = image.copy()
    # The field may be smaller than the image (flow_node's output_scale).
    scale = np.array([image.shape[1] / flow.shape[1], image.shape[0] / flow.shape[0]])
    for y in range(SPACING // 2, flow.shape[0], SPACING):
        for x in range(SPACING // 2, flow.shape[1], SPACING):
            if np.isfinite(flow[y, x]).all():
                start, end = np.rint(scale * (x, y)), np.rint(scale * ((x, y) + flow[y, x]))
                cv2.arrowedLine(shown, start.astype(int).tolist(), end.astype(int).tolist(), (0, 255, 0), tipLength=0.3)
    return shown


def main() -> None:
    """Run until Ctrl-C."""
    rclpy.init(args=sys.argv)
    try:
        rclpy.spin(FlowWithImage())
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
