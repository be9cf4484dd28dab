# SPDX-License-Identifier: Apache-2.0
"""Each launch file started for real, by launch_testing: its images reach the node, flow comes out where it says."""

import http.client
import json
import os
import socket
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import cv2
import numpy as np
import pytest

launch_testing = pytest.importorskip(
    "launch_testing", reason="launch_testing is not among the wheels: test/launch_environment.sh"
)
import rclpy
from builtin_interfaces.msg import Time
from installed_package import SHARE, install
from launch.actions import IncludeLaunchDescription, SetLaunchConfiguration
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch_testing.actions import ReadyToTest
from launch_testing.asserts import assertExitCodes
from node_client import untrained_weights
from rclpy.qos import qos_profile_sensor_data
from ros_environment import set_ros_environment
from sensor_msgs.msg import CameraInfo, Image, PointCloud2
from std_msgs.msg import Header

from deq_flow_ros.ros.messages import array_to_image
from launch import LaunchDescription

FOLDER = Path(tempfile.mkdtemp(prefix="launch_test_"))
"""Not a fixture's: launch_testing has none."""
with socket.create_server(("127.0.0.1", 0)) as free:
    PORT = free.getsockname()[1]
CASES: dict[str, dict[str, Any]] = {
    "flow": {
        "arguments": {
            "namespace": "robot",
            "name": "eye",
            "image": "/cam/image_raw",
            "camera_info": "/calibration",
            "remap": "~/residual:=/certainty",
            "view": "true",
            "port": str(PORT),
        },
        "cameras": ["/cam/image_raw"],
        "infos": ["/calibration"],
        "outputs": {"/robot/eye/flow": Image, "/robot/eye/camera_info": CameraInfo, "/certainty": Image},
    },
    "multi_camera": {
        "arguments": {"cameras": "front, rear", "log_level": "warn"},
        "cameras": ["/front/image_raw", "/rear/image_raw"],
        "infos": ["/front/camera_info", "/rear/camera_info"],
        "outputs": {
            "/flow_node/front/flow": Image,
            "/flow_node/rear/flow": Image,
            "/flow_node/rear/camera_info": CameraInfo,
        },
    },
    "motion_mask": {
        "arguments": {"name": "eye", "image": "/cam/image_raw", "mask_params_file": str(FOLDER / "mask.yaml")},
        "cameras": ["/cam/image_raw"],
        "infos": ["/cam/camera_info"],
        "beside": ["time_to_contact", "point_tracks"],
        "outputs": {
            "/motion_mask/mask": Image,
            "/time_to_contact/seconds": Image,
            "/point_tracks/tracks": PointCloud2,
        },
        "sizes": {"/time_to_contact/seconds": (6, 8), "/point_tracks/tracks": (1, ANY)},
    },
    "replay": {
        "arguments": {"namespace": "show", "input": str(FOLDER), "loop": "true", "compressed": "jpeg"},
        "cameras": [],
        "infos": [],
        "outputs": {"/show/flow_node/flow": Image},
    },
}


@pytest.mark.launch_test
@launch_testing.parametrize("name", CASES)
def generate_test_description(name: str) -> LaunchDescription:
    """A launch file of an installation of the tree, with a small and fast node."""
    set_ros_environment(FOLDER / "log")
    prefix = install(FOLDER)
    os.environ["AMENT_PREFIX_PATH"] = os.pathsep.join([str(prefix), os.environ["AMENT_PREFIX_PATH"]])
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # of the wrappers
    parameters = FOLDER / "small.yaml"
    parameters.write_text("/**: {ros__parameters: {warm_up_width: 0, warm_up_height: 0, threads: 1}}\n")
    # What untrained weights give is nothing to rely on.
    trusting = "{min_inliers: 0.0, max_uncertainty_px: 1000.0}"
    (FOLDER / "mask.yaml").write_text(f"/**: {{ros__parameters: {trusting}}}\n")
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    for number in range(6):
        cv2.imwrite(str(FOLDER / f"{number}.png"), np.roll(picture, number, axis=1))
    arguments = {"model": str(untrained_weights(FOLDER)), "params_file": str(parameters), **CASES[name]["arguments"]}
    source = PythonLaunchDescriptionSource(str(prefix / SHARE / "launch" / f"{name}.launch.py"))
    patience = SetLaunchConfiguration("sigterm_timeout", "60")  # s; on a busy machine 5 are too few to end in
    includes = [IncludeLaunchDescription(source, launch_arguments=list(arguments.items()))]
    for other in CASES[name].get("beside", ()):  # as from other terminals, with the flow node that runs
        source = PythonLaunchDescriptionSource(str(prefix / SHARE / "launch" / f"{other}.launch.py"))
        arguments["start_flow_node"] = "false"
        includes.append(IncludeLaunchDescription(source, launch_arguments=list(arguments.items())))
    return LaunchDescription([patience, *includes, ReadyToTest()])


def page_shows_flow() -> bool:
    """Whether the page of the view has the flow of the node that was launched beside it."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=5)
    try:
        connection.request("GET", "/live?pictures=image,flow")
        seen = json.loads(connection.getresponse().read())
    except OSError:  # it has not started yet
        return False
    finally:
        connection.close()
    return seen.get("state") == "live" and seen["pictures"].keys() == {"image", "flow"}


class TestFlowComes(unittest.TestCase):
    """While the launch file runs."""

    def test_flow_comes_of_the_images_sent(self, name: str) -> None:
        """Names, remappings, parameters and camera_info in one: a slip in any of them and nothing comes."""
        case, received = CASES[name], {}
        rclpy.init()
        node = rclpy.create_node("launch_test")
        try:
            for topic, kind in case["outputs"].items():
                node.create_subscription(
                    kind, topic, lambda m, topic=topic: received.setdefault(topic, m), qos_profile_sensor_data
                )
            images = [node.create_publisher(Image, topic, 10) for topic in case["cameras"]]
            infos = [node.create_publisher(CameraInfo, topic, 10) for topic in case["infos"]]
            give_up, sent = time.monotonic() + 90.0, 0
            while len(received) < len(case["outputs"]) or not ("port" not in case["arguments"] or page_shows_flow()):
                assert time.monotonic() < give_up, f"nothing came on {set(case['outputs']) - set(received)}, or no page"
                sent += 1
                header = Header(stamp=Time(sec=1 + sent // 20, nanosec=sent % 20 * 50_000_000), frame_id="lens")
                pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
                for publisher in infos:
                    k = [50.0, 0.0, 32.0, 0.0, 50.0, 24.0, 0.0, 0.0, 1.0]
                    publisher.publish(CameraInfo(header=header, height=48, width=64, k=k))
                for publisher in images:
                    publisher.publish(array_to_image(np.roll(pixels, sent, axis=1), "bgr8", header))
                rclpy.spin_once(node, timeout_sec=0.05)
            for topic, message in received.items():
                assert (message.height, message.width) == case.get("sizes", {}).get(topic, (48, 64)), topic
                assert message.header.frame_id == ("lens" if case["cameras"] else "camera"), topic
        finally:
            node.destroy_node()
            rclpy.try_shutdown()


@launch_testing.post_shutdown_test()
class TestAfterwards(unittest.TestCase):
    """When launch has been asked to end."""

    def test_processes_end_cleanly(self, proc_info: Any) -> None:
        """On Ctrl-C: a status other than 0 would be reported as a crash."""
        assertExitCodes(proc_info)
