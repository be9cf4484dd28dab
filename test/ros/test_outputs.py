# SPDX-License-Identifier: Apache-2.0
"""What one camera publishes: only what is subscribed to, all of it describing the same field."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
from frame_accounts import info
from outputs_rig import HEADER, HEIGHT, OVERRIDDEN, TOPICS, UNCERTAINTY, WIDTH, Rig, calibration, field, result
from sensor_msgs.msg import CameraInfo, Image

from deq_flow_ros.imaging.pictures import flow_to_color
from deq_flow_ros.ros import outputs
from deq_flow_ros.ros.camera_info import Calibration
from deq_flow_ros.ros.messages import image_to_rgb
from deq_flow_ros.ros.outputs import FlowOutputs
from deq_flow_ros.ros.parameters import NodeSettings
from deq_flow_ros.streaming import FlowResult


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """One for all tests, as discovery is slow."""
    rig = Rig()
    yield rig
    rig.close()


def values(message: Image, channels: int) -> np.ndarray:
    assert message.encoding == f"32FC{channels}" and message.step == 4 * channels * message.width
    return np.frombuffer(message.data, np.float32).reshape(message.height, message.width, channels)


def test_everything_is_published_as_computed(rig: Rig) -> None:
    """Raw and compressed colours, and every other output, of one field with one header."""
    rig.subscribe(*TOPICS)
    flow, residual = field()
    messages = rig.publish(calibration(), compressed_format="png", points_stride=3, color_max_px=5.0)
    assert all(message.header == HEADER for message in messages.values())
    assert np.array_equal(values(messages["flow"], 2), flow, equal_nan=True)
    assert np.array_equal(values(messages["residual"], 1)[..., 0], residual)
    assert np.array_equal(values(messages["uncertainty"], 1)[..., 0], UNCERTAINTY)
    color = flow_to_color(flow, 5.0)
    assert np.array_equal(image_to_rgb(messages["flow_color"]), color)
    assert np.array_equal(image_to_rgb(messages["flow_color/compressed"]), color)
    assert messages["flow_color/compressed"].format == "rgb8; png compressed bgr8"
    assert (messages["points"].height, messages["points"].width, len(messages["points"].fields)) == (7, 10, 11)
    assert messages["camera_info"].k.tolist() == calibration().k.tolist()


def test_nobody_pays_for_what_nobody_wants(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs without a subscriber are not computed, and the colours of raw and compressed once."""
    calls = []

    def count(name: str, place: Any = outputs) -> None:
        original = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *arguments: (calls.append(name), original(*arguments))[1])

    for name in ("flow_to_color", "encode_image", "flow_points", "_resized"):
        count(name)
    count("of_field", Calibration)
    rig.subscribe()
    rig.publish(calibration())
    assert calls == []
    rig.subscribe("residual")
    rig.publish(calibration())
    assert calls == ["_resized"]
    calls.clear()
    rig.subscribe("flow_color", "flow_color/compressed")
    messages = rig.publish(calibration(), jpeg_quality=100)
    assert calls == ["_resized", "flow_to_color", "encode_image"]
    assert messages["flow_color/compressed"].format == "rgb8; jpeg compressed bgr8"


def test_what_the_device_painted_is_published(rig: Rig) -> None:
    """Why: painting takes the host longer than the whole field takes a GPU. A smaller field is painted here."""
    painted = np.full((*field()[1].shape, 3), 7, np.uint8)
    rig.subscribe("flow_color")
    for scale in (1.0, 0.5):
        rig.outputs.publish(result(painted), HEADER, Calibration(), 0.1, NodeSettings(output_scale=scale))
        rig.until(lambda: all(rig.received.values()))
        assert np.array_equal(image_to_rgb(rig.received["flow_color"].pop()), painted) == (scale == 1.0)


def test_smaller_fields_keep_their_meaning(rig: Rig) -> None:
    """Values in pixels of the published field, colours and camera_info to match, no value mixed of two."""
    rig.subscribe("flow", "residual", "uncertainty", "flow_color", "points", "camera_info")
    flow, residual = field()
    messages = rig.publish(calibration(), output_scale=0.5, color_max_px=5.0, points_stride=2)
    assert np.array_equal(values(messages["flow"], 2), flow[::2, ::2] / 2, equal_nan=True)
    assert np.array_equal(values(messages["residual"], 1)[..., 0], residual[::2, ::2] / 2)
    assert np.array_equal(values(messages["uncertainty"], 1)[..., 0], UNCERTAINTY[::2, ::2] / 2)
    assert np.array_equal(image_to_rgb(messages["flow_color"]), flow_to_color(flow, 5.0)[::2, ::2])
    assert messages["camera_info"].k.tolist() == [25.0, 0, 7.5, 0, 25, 5, 0, 0, 1]
    assert (messages["points"].height, messages["points"].width) == (5, 8)


def test_regions_and_rectified_images_have_their_own_rays(rig: Rig) -> None:
    """The field may be a part of the image, and P instead of K describe it; camera_info and bearings must follow."""
    rig.subscribe("points", "camera_info")
    whole = calibration(200, 100)
    whole.p = [40.0, 0, 100, 0, 0, 40, 50, 0, 0, 0, 1, 0]
    region = (70, 25, WIDTH, HEIGHT)
    for rectified, bearing in ((False, (70 - 15, 25 - 10, 50)), (True, (70 - 100, 25 - 50, 40))):
        messages = rig.publish(whole, roi=region, image_size=(100, 200), rectified=rectified)
        roi = messages["camera_info"].roi
        assert (roi.x_offset, roi.y_offset, roi.width, roi.height) == region
        first = np.frombuffer(messages["points"].data, np.float32)[5:8]
        assert np.allclose(first, bearing / np.linalg.norm(bearing), atol=1e-6)


def test_velocities_are_in_normalized_coordinates(rig: Rig) -> None:
    """Of the image point, so that backward flow, which points back in time, gives the same sign as forward flow."""
    rig.subscribe("flow")
    flow, _ = field()
    units = "normalized_per_second"
    for scale in (1.0, 0.5):
        for elapsed_s in (0.1, -0.1):
            found = values(rig.publish(calibration(), elapsed_s, units=units, output_scale=scale)["flow"], 2)
            step = round(1 / scale)
            assert np.allclose(found, flow[::step, ::step] / 50 / elapsed_s, atol=1e-5, equal_nan=True)


def test_units_that_cannot_be_are_refused_with_a_reason(rig: Rig) -> None:
    """Pixels where somebody asked for velocities would be taken for velocities."""
    rig.subscribe("flow")
    for camera_info, elapsed_s, words in (
        (None, 0.1, "need camera_info; none has come on /camera/camera_info"),
        (CameraInfo(width=WIDTH, height=HEIGHT), 0.1, "that on /camera/camera_info cannot be used: .*not calibrated"),
        (calibration(), 0.0, "two images with different stamps"),
    ):
        with pytest.raises(ValueError, match=words):
            rig.publish(camera_info, elapsed_s, units="normalized_per_second", topic="/camera/camera_info")
    assert rig.received == {"flow": []}


def test_a_camera_info_of_another_size_is_not_used(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers that make images smaller and forget camera_info: said once, and no bearings rather than wrong ones."""
    rig.subscribe("points")
    said: list[str] = []
    monkeypatch.setattr(type(rig.outputs.logger), "warning", lambda self, text: said.append(text))
    for _ in range(2):
        message = rig.publish(calibration(60, 40), image_size=(HEIGHT, WIDTH), topic="/camera/camera_info")
        assert [point.name for point in message["points"].fields] == ["u", "v", "du", "dv", "residual"]
    assert len(said) == 1 and "describes images of 60x40 px, these are 30x20" in said[0]
    (info := calibration()).header.frame_id = "other"
    assert [len(rig.publish(info, image_size=(HEIGHT, WIDTH))["points"].fields) for _ in "12"] == [11, 11]
    assert len(said) == 2 and "has the frame_id 'other', the images have " in said[1]


def test_qos_can_be_overridden_in_every_cycle(rig: Rig) -> None:
    """ROS's own parameters, declared once for all lifecycle cycles; the defaults of other topics must not follow."""

    def offered(name: str) -> list[tuple[str, int]]:
        profiles = [info.qos_profile for info in rig.node.get_publishers_info_by_topic(f"/flow_node/rear/{name}")]
        return [(profile.reliability.name, profile.depth) for profile in profiles]

    for _ in range(3):
        rear = FlowOutputs(rig.node, "~/rear/")
        rig.until(lambda: offered("flow") and offered("residual"))
        assert offered("flow")[0][0] == "BEST_EFFORT" and offered("residual")[0][0] == "RELIABLE"
        assert rig.node.get_parameter(OVERRIDDEN.format("depth")).value == 3
        rear.destroy()
        rig.until(lambda: not offered("flow") and not offered("residual"))


READ_AND_STOP = """
import os, signal, rclpy
from rclpy.node import Node
from sensor_msgs.msg import Image
rclpy.init()
node = Node("stopped")
node.create_subscription(Image, "/flow_node/flow", lambda message: os.kill(os.getpid(), signal.SIGSTOP), 10)
rclpy.spin(node)
"""


def test_a_reliable_subscriber_that_stands_still_holds_nothing_up(rig: Rig) -> None:
    """It is owed every field; a publisher that waited for it would stop the flow of all others. Waits last 100 ms."""
    flow = np.zeros((480, 640, 2), np.float32)

    def publish_s() -> float:
        begun_s = time.monotonic()
        rig.outputs.publish(FlowResult(flow, flow[..., 0], info()), HEADER, Calibration(), 0.1, NodeSettings())
        return time.monotonic() - begun_s

    rig.subscribe()
    stopped = subprocess.Popen([sys.executable, "-c", READ_AND_STOP], env=dict(os.environ))
    try:
        rig.until(lambda: rig.outputs.wanted() == {"flow"})
        while Path(f"/proc/{stopped.pid}/stat").read_text().split()[2] != "T":
            publish_s()
            time.sleep(0.05)
        took_s = sorted(publish_s() for _ in range(40))
        assert took_s[20] < 0.08, took_s  # the median: the machine may be busy with something else
    finally:
        stopped.kill()
        stopped.wait()
    rig.subscribe("flow")
    assert rig.publish()["flow"].height == HEIGHT


def test_a_wrong_override_leaves_nothing_behind(rig: Rig) -> None:
    """A failing configure must give back what it had made."""
    before = len(list(rig.node.publishers))
    with pytest.raises(RuntimeError, match="perhaps"):
        FlowOutputs(rig.node, "~/broken/")
    assert len(list(rig.node.publishers)) == before
