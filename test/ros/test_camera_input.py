# SPDX-License-Identifier: Apache-2.0
"""When an image came, and whether it came too soon: from times alone; and a calibration that comes once."""

import random
from collections import deque
from collections.abc import Iterator

import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
from node_client import NodeClient
from rclpy.node import Node
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, Image

from deq_flow_ros.ros import qos
from deq_flow_ros.ros.camera_input import MAX_WAIT_NS, CameraInput, RateLimit, arrival
from deq_flow_ros.ros.health import Clocks
from deq_flow_ros.ros.parameters import NodeSettings

MS = 1_000_000
WALL_NS, NOW_NS = 1_700_000_000_000_000_000, 5_000_000_000


@pytest.mark.parametrize(
    ("received_ns", "waited_ns"),
    [
        (WALL_NS - 7 * MS, 7 * MS),
        (WALL_NS, 0),
        (WALL_NS - MAX_WAIT_NS, MAX_WAIT_NS),
        (0, 0),
        (-1, 0),
        (WALL_NS + 1, 0),
        (WALL_NS - MAX_WAIT_NS - 1, 0),
    ],
    ids=["waited", "at once", "longest", "no time given", "invalid", "clock set back", "clock set forward"],
)
def test_only_a_wait_that_can_be_counts_against_the_budget(received_ns: int, waited_ns: int) -> None:
    """Cyclone DDS gives no time of reception: taken for a wait of a second, every deadline would be past."""
    assert arrival(received_ns, WALL_NS, NOW_NS) == NOW_NS - waited_ns


def test_a_rate_limit_keeps_its_rate_and_forgives_jitter() -> None:
    """A limit at the camera's own rate must let its images pass, although none comes exactly in time."""
    rng = random.Random(0)
    times = [round(1e9 * (number / 30 + rng.uniform(-0.01, 0.01))) for number in range(1, 3000)]
    for rate_hz, share in ((0.0, 1.0), (30.0, 1.0), (20.0, 2 / 3), (1.0, 1 / 30)):
        limit = RateLimit()
        passed = sum(limit.passes(time_ns, rate_hz) for time_ns in times)
        assert passed == pytest.approx(share * len(times), rel=0.02), rate_hz


@pytest.fixture
def client() -> Iterator[NodeClient]:
    """Whose executor also has a node with the image topic /once/image."""
    rclpy.init(args=["--ros-args", "-r", "~/image:=/once/image"])
    client, node = NodeClient(), Node("flow_node")
    client.executor.add_node(node)
    try:
        yield client
    finally:
        node.destroy_node()
        client.destroy_node()
        rclpy.shutdown()


def input_of(client: NodeClient) -> CameraInput:
    """Of the node beside it."""
    node = next(node for node in client.executor.get_nodes() if node.get_name() == "flow_node")
    return CameraInput(node, "~/", NodeSettings(), set, deque(), node.get_logger(), lambda frame: None)


def test_a_calibration_that_was_published_once_for_late_comers_is_received(client: NodeClient) -> None:
    """Simulators and players do so; without it there are no bearings, and nobody knows why."""
    client.create_publisher(CameraInfo, "/once/camera_info", qos.latched()).publish(CameraInfo(width=123))
    received = input_of(client)
    client.until(lambda: received.camera_info, "the calibration")
    assert received.camera_info is not None and received.camera_info.width == 123
    again = client.create_publisher(CameraInfo, "/once/camera_info", qos.sensor_data())  # and with each image
    later = CameraInfo(width=456)
    client.until(lambda: again.publish(later) or received.camera_info.width == 456, "the one that is sent")
    received.close()


def test_a_player_and_a_clock_are_noticed(client: NodeClient) -> None:
    """By them it is judged whether old stamps are a fault, and whether use_sim_time is of any use."""
    received = input_of(client)
    assert received.clocks() == Clocks()
    player = Node("rosbag2_player")
    player.create_publisher(Image, "/once/image", 10)
    client.until(lambda: received.clocks() == Clocks(played=True), "the player")
    client.create_publisher(Clock, "/clock", 10)
    client.until(lambda: received.clocks() == Clocks(played=True, offered=True), "the clock")
    received.close()
    player.destroy_node()
