# SPDX-License-Identifier: Apache-2.0
"""`motion_mask` as a process: flow of a known scene goes in, mask and boxes come out, and what was fitted is said."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from geometry_msgs.msg import Vector3
from rclpy.exceptions import ParameterException
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, Image, Imu, PointCloud2
from std_msgs.msg import Header

from deq_flow_ros.host import Children
from deq_flow_ros.perception.motion_mask import Box
from deq_flow_ros.ros.messages import array_to_image
from deq_flow_ros.ros.perception.flow_consumer import ConsumerSettings
from deq_flow_ros.ros.perception.motion_mask_node import (
    DETECTIONS,
    FIELDS,
    MaskNodeSettings,
    MotionMaskNode,
    detections,
)
from deq_flow_ros.ros.perception.point_tracks_node import TrackNodeSettings
from deq_flow_ros.ros.perception.time_to_contact_node import ContactNodeSettings

WIDTH, HEIGHT, FOCAL = 160, 120, 130.0
RATE = 0.3  # rad/s, of the camera about its y
UNTIL_NS = 100_000_000


def flow() -> np.ndarray:
    """(H, W, 2) px within 0.1 s: the camera turns and drives past a scene with depth, and a box moves by itself."""
    x, y = np.meshgrid(np.arange(WIDTH) - (WIDTH - 1) / 2, np.arange(HEIGHT) - (HEIGHT - 1) / 2)
    depth = 6 + 2 * np.sin(y / 17) * np.cos(x / 23)
    points = np.stack([x / FOCAL * depth, y / FOCAL * depth, depth])
    turn = cv2.Rodrigues(np.array([0.0, -RATE * 0.1, 0.0]))[0]
    seen = np.einsum("ij,jhw->ihw", turn, points) + np.array([0.3, 0.0, -0.3]).reshape(3, 1, 1)
    field = np.stack([FOCAL * seen[0] / seen[2] - x, FOCAL * seen[1] / seen[2] - y], axis=2).astype(np.float32)
    field[40:80, 100:140] += (-1.0, 4.0)
    return field


def test_mask_and_boxes_come_of_flow_and_diagnostics_say_what_was_fitted(tmp_path: Path) -> None:
    """Over DDS, with a gyroscope: the header of the field, the box where it is; then a field that is of no use."""
    arguments = ["--ros-args", "-p", "qos_reliability:=reliable", "-p", "imu:=true"]
    received: dict[str, list[Any]] = {"diagnostics": []}
    with Children(tmp_path) as children:
        children.start("motion_mask", "deq_flow_ros.ros.perception.motion_mask_node", arguments)
        rclpy.init()
        peer = rclpy.create_node("flow_node")
        try:
            kinds = {"flow": Image, "uncertainty": Image, "statistics": DiagnosticArray, "camera_info": CameraInfo}
            publishers = {name: peer.create_publisher(kind, f"~/{name}", 10) for name, kind in kinds.items()}
            gyroscope = peer.create_publisher(Imu, "/imu", 100)
            outputs = {"mask": Image, "boxes": PointCloud2} | ({"detections": DETECTIONS} if DETECTIONS else {})
            for name, kind in outputs.items():
                received[name] = []
                peer.create_subscription(kind, f"/motion_mask/{name}", received[name].append, qos_profile_sensor_data)
            peer.create_subscription(
                DiagnosticArray, "/diagnostics", lambda message: received["diagnostics"].extend(message.status), 10
            )

            def until(condition: Callable[[], Any], what: str) -> None:
                give_up = time.monotonic() + 60.0
                while not condition():
                    assert time.monotonic() < give_up, f"no {what}; {children.log('motion_mask').read_text()}"
                    rclpy.spin_once(peer, timeout_sec=0.05)

            def send(second: int, field: np.ndarray, error_px: float, repeated: str = "false") -> Header:
                header = Header(stamp=Time(sec=second), frame_id="lens")
                for step in range(-1, 12):
                    stamp = divmod(second * 10**9 + step * 10_000_000, 10**9)
                    measured = Imu(header=Header(stamp=Time(sec=stamp[0], nanosec=stamp[1])))
                    measured.angular_velocity = Vector3(y=RATE)
                    gyroscope.publish(measured)
                k = [FOCAL, 0.0, (WIDTH - 1) / 2, 0.0, FOCAL, (HEIGHT - 1) / 2, 0.0, 0.0, 1.0]
                publishers["camera_info"].publish(CameraInfo(header=header, height=HEIGHT, width=WIDTH, k=k))
                time.sleep(0.1)  # what belongs to no field comes before the field
                publishers["flow"].publish(array_to_image(field, "32FC2", header))
                unsure = np.full((HEIGHT, WIDTH), error_px, np.float32)
                publishers["uncertainty"].publish(array_to_image(unsure, "32FC1", header))
                values = {"outcome": "processed", "direction": "forward", "image1_stamp_ns": str(second * 10**9)}
                values |= {"image2_stamp_ns": str(second * 10**9 + UNTIL_NS), "repeated": repeated}
                status = DiagnosticStatus(values=[KeyValue(key=key, value=value) for key, value in values.items()])
                publishers["statistics"].publish(DiagnosticArray(header=header, status=[status]))
                return header

            connected = [*publishers.values(), gyroscope]
            until(lambda: all(each.get_subscription_count() for each in connected), "subscriptions")
            header = send(5, flow(), 0.2)
            until(lambda: all(received[name] for name in outputs), "mask")
            mask = np.frombuffer(received["mask"][0].data, np.uint8).reshape(HEIGHT, WIDTH)
            assert received["mask"][0].header == header and received["mask"][0].encoding == "mono8"
            true = np.zeros_like(mask)
            true[40:80, 100:140] = 255
            assert set(np.unique(mask)) == {0, 255} and np.mean(mask == true) > 0.98
            table = received["boxes"][0]
            assert [column.name for column in table.fields] == list(FIELDS) and table.width == 1
            x, y, width, height, area, motion = np.frombuffer(table.data, np.float32)
            assert abs(x - 119.5) < 2 and abs(y - 59.5) < 2 and abs(width - 40) < 4 and abs(height - 40) < 4
            assert 1400 < area < 1700 and 3 < motion < 5
            for array in received.get("detections", ()):  # where vision_msgs is installed
                (found,) = array.detections
                assert array.header == found.header == header and found.results[0].hypothesis.class_id == "moving"
                assert found.results[0].hypothesis.score == pytest.approx(area / (width * height))
                bounds = (
                    found.bbox.center.position.x,
                    found.bbox.center.position.y,
                    found.bbox.size_x,
                    found.bbox.size_y,
                )
                assert bounds == (x, y, width, height)
            until(lambda: any("essential matrix explains" in s.message for s in received["diagnostics"]), "diagnostics")
            fitted = next(s for s in received["diagnostics"] if "essential matrix" in s.message)
            assert fitted.level == DiagnosticStatus.OK, fitted.message  # else the gyroscope was not used
            send(6, flow(), 20.0)
            until(lambda: any("too little texture" in s.message for s in received["diagnostics"]), "warning")
            assert len(received["mask"]) == 1, "a mask that is not to be trusted was published"
            send(7, np.zeros_like(flow()), 0.2, "true")
            until(lambda: any("exactly the one before" in s.message for s in received["diagnostics"]), "standstill")
        finally:
            peer.destroy_node()
            rclpy.shutdown()
        children.stop("motion_mask", timeout_s=20.0)
        assert "Traceback" not in children.log("motion_mask").read_text()


@pytest.mark.parametrize(
    ("given", "named"), [("min_area:=2.0", "min_area"), ("imu_to_camera:=[0.0, 0.0, 0.0, 0.0]", "quaternion")]
)
def test_a_wrong_parameter_is_named(given: str, named: str) -> None:
    """The process ends with status 2 and this error as its one line."""
    rclpy.init(args=["test", "--ros-args", "-p", given])
    try:
        with pytest.raises(ParameterException, match=named):
            MotionMaskNode()
    finally:
        rclpy.shutdown()


def _type(*names: str) -> Callable[..., SimpleNamespace]:
    def make(**values: Any) -> SimpleNamespace:
        assert set(values) <= set(names), f"no field {set(values) - set(names)}"
        return SimpleNamespace(**values)

    return make


def test_detections_have_the_fields_of_vision_msgs() -> None:
    """vision_msgs has no wheel; its definitions of Humble to now are written down here."""
    messages = SimpleNamespace(
        Point2D=_type("x", "y"),
        Pose2D=_type("position", "theta"),
        BoundingBox2D=_type("center", "size_x", "size_y"),
        ObjectHypothesis=_type("class_id", "score"),
        ObjectHypothesisWithPose=_type("hypothesis", "pose"),
        Detection2D=_type("header", "results", "bbox", "id"),
        Detection2DArray=_type("header", "detections"),
    )
    array = detections(Header(frame_id="lens"), [Box(12.0, 21.5, 5, 4, 15, 2.0)], messages)
    (found,) = array.detections
    assert (found.bbox.center.position.x, found.bbox.center.position.y) == (12.0, 21.5)
    assert (found.bbox.size_x, found.bbox.size_y) == (5.0, 4.0) and array.header.frame_id == "lens"
    assert found.results[0].hypothesis.class_id == "moving" and found.results[0].hypothesis.score == 0.75


@pytest.mark.parametrize(
    ("page", "table"),
    [("motion_mask", MaskNodeSettings), ("time_to_contact", ContactNodeSettings), ("point_tracks", TrackNodeSettings)],
)
def test_the_page_has_the_parameters_as_they_are(page: str, table: type[ConsumerSettings]) -> None:
    """Name, default and range of each; a row is missed or left behind easily."""
    text = (Path(__file__).parents[2] / "docs" / f"{page}.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in text.splitlines() if line.startswith("| `")]
    written = {row[0].strip("`"): row[1:] for row in rows}
    for parameter in dataclasses.fields(table):
        about, default = parameter.metadata, parameter.default
        shown = json.dumps(list(default) if isinstance(default, tuple) else default)
        limits = ", ".join(f"`{choice}`" for choice in about["choices"])
        if about["minimum"] is not None:
            limits = f"{about['minimum']:g} to {about['maximum']:g}"
        assert written.get(parameter.name) == [f"`{shown}`", limits], parameter.name
