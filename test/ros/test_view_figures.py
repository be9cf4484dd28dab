# SPDX-License-Identifier: Apache-2.0
"""What the page of `flow_view` says and draws: the state of the node with a cure, and pictures of its messages."""

import base64
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
from std_msgs.msg import Header

from deq_flow_ros.imaging.encodings import encode_image
from deq_flow_ros.ros.messages import array_to_image, compressed_image
from deq_flow_ros.ros.view.figures import HISTORY, Figures, Pictures

ACCOUNT = {
    "outcome": "processed", "reason": "", "latency_ms": "61.5", "budget_ms": "90", "iterations": "3",
    "stop_reason": "deadline", "residual_px": "0.2", "scale": "1", "frames_received": "7", "frames_processed": "4",
    "frames_first": "1", "frames_dropped": "2", "frames_lost": "0",
}  # fmt: skip
DROPPED = {**ACCOUNT, "outcome": "dropped", "reason": "nobody subscribes to the flow"}


class Scene:
    """The figures of a node at a time that the test sets."""

    def __init__(self, camera: str = "") -> None:
        self.now_s = 50.0
        self.figures = Figures("/robot/eye", camera, lambda: self.now_s)

    def status(self, what: str, message: str, level: int = 0, **values: str) -> None:
        self.figures.take_status(level, f"robot/eye: {what}", message, values)

    def told(self, after_s: float = 0.0, running: Sequence[str] = ()) -> tuple[str, str, str]:
        self.now_s += after_s
        summary = self.figures.summary(lambda: running)
        return summary["state"], summary["headline"], summary["cure"]


def test_a_node_that_is_not_there_is_named_with_those_that_are() -> None:
    """The name is what is wrong most often; before anything can be known, nothing is claimed."""
    scene = Scene()
    assert scene.told() == ("connecting", "connecting to /robot/eye", "")
    state, headline, cure = scene.told(4.0, ["/flow_node", "/rig/front"])
    assert (state, headline) == ("waiting", "waiting for the flow node /robot/eye")
    assert "/flow_node, /rig/front" in cure and "name:=" in cure
    assert "ros2 launch" in scene.told()[2]
    assert scene.told(running=["/robot/eye/front"])[1] == "/robot/eye is starting"


def test_a_node_without_images_says_where_it_waits_and_what_to_do() -> None:
    """The cure is the node's own, which knows of publishers and qualities of service."""
    scene = Scene()
    scene.now_s += 4.0
    scene.status("process", "nano on cpu")
    scene.status("flow", "nobody publishes /lens; start the camera", level=3, image_topic="/lens", in_hz="0.00")
    expected = "waiting", "waiting for images on /lens", "nobody publishes /lens; start the camera"
    assert scene.told() == expected and scene.figures.image_topic == "/lens"
    scene.figures.take_account(DROPPED)
    assert scene.told()[1:] == ("images come on /lens, but no flow", "nobody subscribes to the flow")
    scene.figures.take_account(ACCOUNT)
    assert scene.told() == ("live", "flow of /lens", "")
    assert scene.told(5.0) == expected
    assert scene.told(5.0)[1] == "waiting for the flow node /robot/eye"


def test_a_node_that_failed_or_has_other_cameras_says_so() -> None:
    """Its outputs do not exist then; the page would wait for them for ever."""
    scene = Scene("front")
    scene.now_s += 4.0
    scene.status("process", "configure failed: no file x", level=2)
    assert scene.told()[1:] == ("/robot/eye is not configured", "configure failed: no file x")
    for what in ("process", "left", "right"):
        scene.status(what, "fine")
    assert scene.told()[1:] == ("/robot/eye has no camera front", "give cameras:= one of left, right")


def test_figures_are_those_of_the_accounts_and_of_the_worst_status() -> None:
    """All that people judge the node by; statuses of other nodes on the same topic are not its own."""
    scene = Scene()
    scene.figures.take_status(2, "robot/eyes: flow", "not ours", {})
    scene.figures.take_status(2, "motor", "not ours", {})
    scene.status("process", "busy", level=1)
    scene.status("flow", "no images", level=3, image_topic="/lens", in_hz="15.0", out_hz="14.0", dropped="3")
    for _ in range(HISTORY + 5):
        scene.figures.take_account({**ACCOUNT, "latency_ms": "70.0", "iterations": "2"})
    scene.figures.take_account(ACCOUNT)
    scene.figures.take_account(DROPPED)
    for wrong in ({}, {"outcome": "processed"}, {**ACCOUNT, "iterations": "many"}):
        scene.figures.take_account(wrong)
    summary = scene.figures.summary(list)
    assert summary["counts"] == {"received": "7", "processed": "4", "first": "1", "dropped": "2", "lost": "0"}
    assert summary["latest"].items() <= ACCOUNT.items() and summary["latest"]["latency_ms"] == "61.5"
    assert summary["history"] == [(70.0, 2)] * (HISTORY - 1) + [(61.5, 3)]
    assert scene.figures.units == "px"
    scene.figures.take_account({**ACCOUNT, "units": "normalized_per_second"})
    assert scene.figures.units == "normalized_per_second"
    assert summary["rates"] == {"in_hz": "15.0", "out_hz": "14.0"}
    assert summary["worst"] == {"level": "stale", "of": "flow", "message": "no images"}


def pixels(picture: dict[str, str]) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(picture["src"].removeprefix("data:image/jpeg;base64,")), np.uint8)
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def message(array: Any, encoding: str) -> Any:
    return array_to_image(np.ascontiguousarray(array), encoding, Header())


def test_pictures_are_small_and_show_what_is_in_the_messages() -> None:
    """Reduced by whole numbers: a field keeps its values, a camera's image its mean."""
    pictures = Pictures(width=100)
    image = np.zeros((60, 200, 3), np.uint8)
    image[:, 100:] = 255, 0, 0
    shown = pictures.draw("image", message(image, "rgb8"))
    assert shown["note"] == "200x60" and pixels(shown).shape == (30, 100, 3)
    assert np.abs(pixels(shown)[15, [20, 80]].astype(int) - [[0, 0, 0], [255, 0, 0]]).max() < 25
    jpeg = compressed_image(encode_image(image, "jpeg"), "jpeg", Header())
    assert np.abs(pixels(pictures.draw("image", jpeg)).astype(int) - pixels(shown)).mean() < 5
    flow = np.zeros((60, 200, 2), np.float32)
    flow[:, 100:, 0] = 12.0
    shown = pictures.draw("flow", message(flow, "32FC2"))
    assert shown["note"] == "full colour: 12 px"
    assert np.abs(pixels(shown)[15, [20, 80]].astype(int) - [[255, 255, 255], [255, 0, 0]]).max() < 25
    shown = pictures.draw("residual", message(np.full((60, 90), 0.02, np.float32), "32FC1"))
    assert shown["note"] == "full colour: 0.10 px" and pixels(shown).shape == (60, 90, 3)


def test_the_full_colour_fades_and_knows_its_unit() -> None:
    """Colours that jump with each field cannot be read; flow in normalized coordinates is not in pixels."""
    pictures = Pictures(width=100)
    notes = [pictures.draw("flow", message(np.full((4, 4, 2), x, np.float32), "32FC2"))["note"] for x in (8, 1)]
    assert notes == ["full colour: 11 px", f"full colour: {0.95 * 8 * 2**0.5:.0f} px"]
    field = message(np.full((4, 4, 2), 0.3, np.float32), "32FC2")
    shown = Pictures(width=100).draw("flow", field, "normalized_per_second")
    assert shown["note"] == "full colour: 0.42 1/s"


@pytest.mark.parametrize(("name", "encoding"), [("flow", "32FC1"), ("residual", "32FC2"), ("image", "32FC1")])
def test_a_message_that_cannot_be_drawn_is_named(name: str, encoding: str) -> None:
    """Another node's topic under this name; the view must go on."""
    array = np.zeros((8, 8) if encoding == "32FC1" else (8, 8, 2), np.float32)
    shown = Pictures(width=100).draw(name, message(array, encoding))
    assert "src" not in shown and "cannot be shown" in shown["note"] and encoding in shown["note"]
