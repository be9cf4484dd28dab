# SPDX-License-Identifier: Apache-2.0
"""The base of the nodes that consume flow: what belongs together is, what is missing is named, nothing else is done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header

from deq_flow_ros.ros.messages import array_to_image, field_of
from deq_flow_ros.ros.perception import WARN, FlowField, Pairing, Verdict, check_account
from deq_flow_ros.ros.perception.flow_consumer import ConsumerSettings, FlowConsumer

FLOW = np.dstack(np.meshgrid(np.arange(6.0), np.arange(4.0))).astype(np.float32)


def message(second: int, field: np.ndarray = FLOW) -> Image:
    """A field with a stamp."""
    encoding = "32FC2" if field.ndim == 3 else "32FC1"
    return array_to_image(field, encoding, Header(stamp=Time(sec=second), frame_id="lens"))


def account(first: int, second: int, direction: str = "forward", outcome: str = "processed") -> DiagnosticArray:
    """As `flow_node` publishes it of a pair."""
    values = {"outcome": outcome, "direction": direction}
    values |= {"image1_stamp_ns": f"{first}000000000", "image2_stamp_ns": f"{second}000000000"}
    pairs = [KeyValue(key=key, value=value) for key, value in values.items()]
    return DiagnosticArray(header=Header(stamp=Time(sec=second)), status=[DiagnosticStatus(values=pairs)])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("units", "normalized_per_second", "got units normalized_per_second: set the parameter units of the flow node"),
        ("matched", "false", "the two images have nothing in common"),
    ],
)
def test_flow_that_is_not_the_motion_is_refused(key: str, value: str, words: str) -> None:
    """Velocities are a hundredth of a pixel, and flow between two scenes is none."""
    given = {"outcome": "processed", "image1_stamp_ns": "1", "image2_stamp_ns": "2"}
    check_account(given)
    with pytest.raises(ValueError, match=words):
        check_account({**given, key: value})


def test_parts_of_one_stamp_come_together_and_what_is_missing_is_named() -> None:
    """The second field has lost its uncertainty: the third must not get that of another, and the second is named."""
    wholes: list[Any] = []
    missing: list[str] = []
    pairing = Pairing(wholes.append, missing.append)
    pairing.add("statistics", account(0, 1, outcome="first"))  # has no flow field
    for second in (1, 2, 3):
        pairing.add("flow", message(second))
        if second != 2:
            pairing.add("uncertainty", message(second, FLOW[..., 0]))
        pairing.add("statistics", account(second, second + 1))
    stamps = [[whole[part].header.stamp.sec for part in ("flow", "uncertainty")] for whole in wholes]
    assert stamps == [[1, 1], [3, 3]]
    assert [whole["statistics"]["image2_stamp_ns"] for whole in wholes] == ["2000000000", "4000000000"]
    assert missing == ["uncertainty"]
    for second in range(10, 40):
        pairing.add("flow", message(second))  # an input that nobody publishes must not fill the memory
    assert len(missing) == 21


def test_fields_are_read_whatever_their_rows_and_bytes() -> None:
    """Padded rows and the other byte order come from other publishers; what is no flow is refused by name."""
    padded = np.zeros((4, 6 * 8 + 8), np.uint8)
    padded[:, :48] = FLOW.astype(">f4").view(np.uint8).reshape(4, 48)
    odd = Image(height=4, width=6, step=56, encoding="32FC2", is_bigendian=1)
    odd.data.frombytes(padded.tobytes())
    assert (field_of(odd, "32FC2") == FLOW).all() and field_of(odd, "32FC2").dtype == np.float32
    with pytest.raises(ValueError, match=r"32FC2.*rgb8"):
        field_of(Image(encoding="rgb8"), "32FC2")
    odd.height = 5
    with pytest.raises(ValueError, match="5 rows of 48 bytes"):
        field_of(odd, "32FC2")


class Consumer(FlowConsumer):
    """Publishes the flow it got; waits where a test says so."""

    def __init__(self) -> None:
        self.given: list[FlowField] = []
        self.go = threading.Event()
        self.go.set()
        super().__init__("consumer", ConsumerSettings, {"echo": Image})

    def process(self, given: FlowField) -> Verdict:
        """Remember."""
        self.given.append(given)
        self.go.wait(10.0)
        if given.header.stamp.sec == 3:
            raise ValueError("three is no field")
        self.publish("echo", lambda: array_to_image(given.flow, "32FC2", given.header))
        return Verdict("bad", WARN) if given.header.stamp.sec == 4 else Verdict("good", values={"figure": "7"})


def test_each_field_has_the_calibration_of_its_own_stamp() -> None:
    """flow_node sends none while the camera zooms; that of another field would make an approach of the zoom."""
    node = SimpleNamespace(_infos={}, _paired=False, settings=ConsumerSettings(), resolve_topic_name=lambda name: name)
    focal = [CameraInfo(height=4, width=6, k=[f, 0, 3.0, 0, f, 2.0, 0, 0, 1.0]) for f in (5.0, 6.0)]
    node._info = focal[0]
    assert FlowConsumer._camera(node, 1, (4, 6))[0].fx == 5.0, "one that was published once"
    node._infos, node._info = {2: focal[0], 3: focal[1]}, focal[1]
    assert [FlowConsumer._camera(node, stamp, (4, 6))[0].fx for stamp in (2, 3)] == [5.0, 6.0]
    assert "no camera_info with the stamp of the flow" in FlowConsumer._camera(node, 4, (4, 6))[1]


@pytest.fixture
def consumer() -> Iterator[tuple[Consumer, Any, Callable[[Callable[[], Any]], None]]]:
    """The node, a peer that publishes, and a function that spins until something holds."""
    rclpy.init(args=["test", "--ros-args", "-p", "qos_reliability:=reliable"])
    node, peer = Consumer(), rclpy.create_node("flow_node", use_global_arguments=False)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    executor.add_node(peer)

    def until(condition: Callable[[], Any]) -> None:
        give_up = time.monotonic() + 20.0
        while not condition():
            assert time.monotonic() < give_up, "nothing came"
            executor.spin_once(timeout_sec=0.05)

    try:
        yield node, peer, until
    finally:
        node.go.set()
        node.close()
        node.destroy_node()
        peer.destroy_node()
        rclpy.shutdown()


def test_a_consumer_works_for_its_subscribers_alone_and_accounts_for_each_field(consumer: Any) -> None:
    """Lazy, the calibration and the time between the images with the field, drops by name, verdicts in diagnostics."""
    node, peer, until = consumer
    flow = peer.create_publisher(Image, "~/flow", 10)
    uncertainty = peer.create_publisher(Image, "~/uncertainty", 10)
    statistics = peer.create_publisher(DiagnosticArray, "~/statistics", 10)
    infos = peer.create_publisher(CameraInfo, "~/camera_info", 10)
    echoes: list[Image] = []
    statuses: list[DiagnosticStatus] = []
    peer.create_subscription(DiagnosticArray, "/diagnostics", lambda array: statuses.extend(array.status), 10)
    until(lambda: statuses)
    assert "nobody subscribes to /consumer/echo" in statuses[-1].message and not flow.get_subscription_count()
    subscription = peer.create_subscription(Image, "/consumer/echo", echoes.append, 10)
    until(lambda: all(each.get_subscription_count() for each in (flow, uncertainty, statistics, infos)))
    infos.publish(CameraInfo(height=4, width=6, k=[5.0, 0.0, 3.0, 0.0, 5.0, 2.0, 0.0, 0.0, 1.0]))

    def send(second: int) -> None:
        flow.publish(message(second))
        uncertainty.publish(message(second, FLOW[..., 0]))
        statistics.publish(account(second, second + 2))

    send(1)
    until(lambda: echoes)
    send(1)
    until(lambda: len(echoes) == 2)
    given = node.given[1]  # the calibration has come by then
    assert given.stamps_ns == (10**9, 3 * 10**9) and given.camera.fx == 5.0 and (given.flow == FLOW).all()
    assert echoes[0].header == message(1).header
    node.go.clear()
    for second in (2, 3, 4):  # the third waits until the fourth takes its place
        send(second)
        until(lambda second=second: second > 2 or len(node.given) == 3)
    superseded = "dropped: superseded by a newer field"
    until(lambda: any(pair.key == superseded and pair.value == "1" for status in statuses for pair in status.values))
    node.go.set()
    until(lambda: len(echoes) == 4)
    until(
        lambda: any(
            "of 2 fields: bad" in status.message or status.message == "1 of 1 fields: bad" for status in statuses
        )
    )
    send(3)
    until(lambda: any("three is no field" in status.message and status.level == WARN for status in statuses))
    assert node.set_parameters([Parameter("silence_warning_s", value=0.3)])[0].successful
    assert not node.set_parameters([Parameter("silence_warning_s", value=-1.0)])[0].successful
    until(lambda: "no flow for" in statuses[-1].message and statuses[-1].level == DiagnosticStatus.STALE)
    offers = node.get_publishers_info_by_topic(flow.topic_name)
    offers[0].topic_type = "std_msgs/msg/String"  # one process cannot publish two types on a topic
    node.get_publishers_info_by_topic = lambda topic: offers
    until(lambda: "expected sensor_msgs/msg/Image on /flow_node/flow, got std_msgs" in statuses[-1].message)
    peer.destroy_subscription(subscription)
    until(lambda: not flow.get_subscription_count())
