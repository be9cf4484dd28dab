# SPDX-License-Identifier: Apache-2.0
"""The examples run as they are printed: what users copy first must work."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
pytest.importorskip("message_filters", reason="message_filters is not among the wheels: test/launch_environment.sh")
from builtin_interfaces.msg import Time
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header

from deq_flow_ros.ros.messages import array_to_image

EXAMPLE = Path(__file__).parents[2] / "examples" / "flow_with_image.py"


def test_flow_is_paired_with_the_image_that_it_lives_on() -> None:
    """Of three images, flow and calibration come for the second alone, later: only that pair may reach the callback."""
    spec = importlib.util.spec_from_file_location("flow_with_image", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rclpy.init(args=["test", "--ros-args", "-p", "with_camera_info:=true"])
    node, pairs, overlays = example.FlowWithImage(), [], []
    node.synchronizer.registerCallback(lambda *messages: pairs.append(messages))
    peer = rclpy.create_node("peer")
    try:
        publishers: dict[str, Any] = {
            name: peer.create_publisher(kind, name, 10)
            for name, kind in {"image": Image, "flow": Image, "camera_info": CameraInfo}.items()
        }
        peer.create_subscription(Image, "/flow_with_image/overlay", overlays.append, qos_profile_sensor_data)
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        executor.add_node(peer)

        def until(condition: Any) -> None:
            for _ in range(400):
                if condition():
                    return
                executor.spin_once(timeout_sec=0.05)
            raise AssertionError("nothing came")

        until(lambda: all(publisher.get_subscription_count() for publisher in publishers.values()))
        until(lambda: node.overlay.get_subscription_count())
        headers = [Header(stamp=Time(sec=number), frame_id="camera") for number in (1, 2, 3)]
        for header in headers:
            publishers["image"].publish(array_to_image(np.full((48, 64, 3), 9, np.uint8), "bgr8", header))
        flow = np.full((48, 64, 2), np.nan, np.float32)
        flow[:, 8:] = 6.0, -2.0
        publishers["flow"].publish(array_to_image(flow, "32FC2", headers[1]))
        info = CameraInfo(header=headers[1], k=[100.0, 0.0, 32.0, 0.0, 100.0, 24.0, 0.0, 0.0, 1.0])
        publishers["camera_info"].publish(info)
        until(lambda: pairs and overlays)
        assert [[message.header for message in messages] for messages in pairs] == [[headers[1]] * 3]
        shown = np.frombuffer(overlays[0].data, np.uint8).reshape(48, 64, 3)
        assert overlays[0].header == headers[1] and (shown[8, 24:30] == (0, 255, 0)).all(axis=1).any(), "no arrow"
        assert (shown[:, :7] == 9).all(), "an arrow where there is no flow"
    finally:
        node.destroy_node()
        peer.destroy_node()
        rclpy.shutdown()
