# SPDX-License-Identifier: Apache-2.0
"""`time_to_contact` and `point_tracks` as processes: flow of known motion goes in over DDS, their messages come out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, Image, PointCloud2
from std_msgs.msg import Float32, Header

from deq_flow_ros.host import Children
from deq_flow_ros.ros.messages import array_to_image
from deq_flow_ros.ros.perception.point_tracks_node import COLUMNS

HEIGHT, WIDTH, FOCAL, PERIOD_NS = 96, 128, 100.0, 100_000_000


class FlowPeer:
    """Stands for `flow_node` and the camera; `received` holds what came on each topic."""

    def __init__(self, children: Children, name: str, outputs: dict[str, type]) -> None:
        self.node, self._children, self._name = rclpy.create_node("flow_node"), children, name
        kinds = {"flow": Image, "uncertainty": Image, "statistics": DiagnosticArray, "camera_info": CameraInfo}
        self.publishers = {each: self.node.create_publisher(kind, f"~/{each}", 10) for each, kind in kinds.items()}
        self.publishers["image"] = self.node.create_publisher(Image, "/image", 10)
        self.received: dict[str, list[Any]] = {each: [] for each in outputs}
        self.statuses: list[DiagnosticStatus] = []
        for topic, kind in outputs.items():
            self.node.create_subscription(kind, topic, self.received[topic].append, qos_profile_sensor_data)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", lambda m: self.statuses.extend(m.status), 10)

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        give_up = time.monotonic() + 60.0
        while not (result := condition()):
            assert time.monotonic() < give_up, f"no {what}; {self._children.log(self._name).read_text()}"
            rclpy.spin_once(self.node, timeout_sec=0.05)
        return result

    def said(self, words: str) -> DiagnosticStatus:
        return self.until(lambda: next((s for s in self.statuses if words in s.message), None), words)

    def send(self, number: int, flow: np.ndarray, backward: bool = False, repeated: str = "false") -> Header:
        """The field between image `number` and the next one; what belongs to no field comes before it."""
        header = Header(stamp=Time(sec=1, nanosec=(number + backward) * PERIOD_NS), frame_id="lens")
        k = [FOCAL, 0.0, (WIDTH - 1) / 2, 0.0, FOCAL, (HEIGHT - 1) / 2, 0.0, 0.0, 1.0]
        self.publishers["camera_info"].publish(CameraInfo(header=header, height=HEIGHT, width=WIDTH, k=k))
        time.sleep(0.1)
        self.publishers["flow"].publish(array_to_image(flow, "32FC2", header))
        sure = np.full((HEIGHT, WIDTH), 0.02, np.float32)
        self.publishers["uncertainty"].publish(array_to_image(sure, "32FC1", header))
        first_ns = 10**9 + number * PERIOD_NS
        direction = "backward" if backward else "forward"
        values = {"outcome": "processed", "direction": direction, "image1_stamp_ns": str(first_ns)}
        values |= {"image2_stamp_ns": str(first_ns + PERIOD_NS), "repeated": repeated}
        status = DiagnosticStatus(values=[KeyValue(key=key, value=value) for key, value in values.items()])
        self.publishers["statistics"].publish(DiagnosticArray(header=header, status=[status]))
        return header


@contextmanager
def running(folder: Path, name: str, inputs: tuple[str, ...], outputs: dict[str, type]) -> Iterator[FlowPeer]:
    with Children(folder) as children:
        arguments = ["--ros-args", "-p", "qos_reliability:=reliable", "-p", "diagnostics_period_s:=0.2"]
        children.start(name, f"deq_flow_ros.ros.perception.{name}_node", arguments)
        rclpy.init()
        try:
            peer = FlowPeer(children, name, outputs)
            peer.until(lambda: all(peer.publishers[each].get_subscription_count() for each in inputs), "subscriptions")
            yield peer
            peer.node.destroy_node()
        finally:
            rclpy.shutdown()
        children.stop(name, timeout_s=20.0)
        assert "Traceback" not in children.log(name).read_text()


def test_times_come_as_a_small_image_with_the_first_contact_beside_it(tmp_path: Path) -> None:
    """Everything approaches in 2 s; the images of the grid carry the header of the field."""
    outputs = {
        "/time_to_contact/seconds": Image,
        "/time_to_contact/confidence": Image,
        "/time_to_contact/first": Float32,
    }
    y, x = np.indices((HEIGHT, WIDTH), np.float32)
    flow = np.stack([x - (WIDTH - 1) / 2, y - (HEIGHT - 1) / 2], axis=2) * np.float32(1 / (1 - 0.1 / 2.0) - 1)
    inputs = ("flow", "uncertainty", "statistics", "camera_info")
    with running(tmp_path, "time_to_contact", inputs, outputs) as peer:
        header = peer.send(0, flow)
        peer.until(lambda: all(peer.received.values()), "times")
        for topic in list(outputs)[:2]:
            message = peer.received[topic][0]
            assert (message.header, message.encoding, message.height, message.width) == (header, "32FC1", 6, 8)
        seconds, confidence = (np.frombuffer(peer.received[t][0].data, np.float32) for t in list(outputs)[:2])
        # The wall is upright: off the axis it is farther away, and the speed along the line of sight is lower.
        assert np.nanmin(seconds) == pytest.approx(2.0, rel=0.05) and np.nanmax(seconds) < 3.2
        assert (confidence >= 0).all() and (confidence <= 1).all() and (confidence > 0.5).mean() > 0.5
        assert peer.received["/time_to_contact/first"][0].data == pytest.approx(float(np.nanmin(seconds)))
        status = peer.said("the first contact is in 2")
        assert status.level == DiagnosticStatus.OK, status.message
        peer.send(1, np.zeros_like(flow), repeated="true")
        peer.said("the image is exactly the one before")
        assert len(peer.received["/time_to_contact/first"]) == 1, "nothing would seem to come near"
        peer.statuses.clear()
        peer.send(2, flow)
        values = {pair.key: pair.value for pair in peer.said("the first contact is in").values}
        assert values["continues"] == "true", "what was known before the repeated image is not forgotten"
        peer.send(3, np.zeros((HEIGHT, WIDTH, 2), np.float32) * np.nan)
        peer.said("no region has a time that is to be trusted")


def test_tracks_come_with_ids_and_a_gap_ends_them_by_name(tmp_path: Path) -> None:
    """Over DDS: positions move with the picture, ids stay, however the flow points; after a lost field none is left."""
    picture = np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH + 40, 3), np.uint8)
    picture = picture.repeat(2, axis=0)[:HEIGHT].repeat(2, axis=1)[:, : WIDTH + 40]
    flow = np.zeros((HEIGHT, WIDTH, 2), np.float32) + np.float32([-2.0, 0.0])
    inputs = ("flow", "uncertainty", "statistics", "image")
    with running(tmp_path, "point_tracks", inputs, {"/point_tracks/tracks": PointCloud2}) as peer:
        for number in range(6):
            header = Header(stamp=Time(sec=1, nanosec=number * PERIOD_NS), frame_id="lens")
            shown = np.ascontiguousarray(picture[:, 2 * number : 2 * number + WIDTH])
            peer.publishers["image"].publish(array_to_image(shown, "bgr8", header))
        came, tables = peer.received["/point_tracks/tracks"], []
        for number, backward in ((0, False), (1, True), (3, True)):
            peer.send(number, -flow if backward else flow, backward)
            peer.until(lambda: len(came) == len(tables) + 1, f"tracks of field {number}")
            message = came[-1]
            assert [field.name for field in message.fields] == list(COLUMNS)
            assert message.header.stamp.nanosec == (number + 1) * PERIOD_NS and message.header.frame_id == "lens"
            tables.append(np.frombuffer(message.data, list(COLUMNS.items())))
            assert len(tables[-1]) == message.width > 20
        first, second, after_gap = tables
        both, here, there = np.intersect1d(first["id"], second["id"], return_indices=True)
        assert len(both) > 20 and (second["age"][there] == first["age"][here] + 1).all()
        moved = second["x"][there] - first["x"][here]
        assert np.abs(moved + 2.0).max() < 0.2 and (second["confidence"] > 0.5).all()
        assert not set(second["id"]) & set(after_gap["id"])
        assert peer.said("a gap in the flow").level == DiagnosticStatus.WARN
        peer.send(8, flow)
        assert "has the stamp" in peer.said("none of the 1 images that wait on /image").message
