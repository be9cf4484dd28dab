# SPDX-License-Identifier: Apache-2.0
"""`flow_view` over DDS: subscribed while somebody looks and not otherwise; a process that starts and ends cleanly."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.node import Node
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from deq_flow_ros.imaging.encodings import encode_image
from deq_flow_ros.ros import view as view_server
from deq_flow_ros.ros.messages import array_to_image, compressed_image
from deq_flow_ros.ros.view import Board
from deq_flow_ros.ros.view.flow_view import FlowView, main

ACCOUNT = {"outcome": "processed", "latency_ms": "61.5", "budget_ms": "90", "iterations": "3"} | dict.fromkeys(
    ("stop_reason", "residual_px", "scale"), "0"
)
TOPICS: dict[str, Any] = {
    "/robot/eye/front/flow": Image, "/robot/eye/front/residual": Image, "/robot/eye/front/uncertainty": Image,
    "/robot/eye/front/statistics": DiagnosticArray, "/diagnostics": DiagnosticArray,
    "/lens/compressed": CompressedImage,
}  # fmt: skip


class FakeFlowNode(Node):
    """Publishes what a flow node does that has a camera with compressed images, and its camera."""

    def __init__(self) -> None:
        super().__init__("eye", namespace="robot")
        self.topics = {topic: self.create_publisher(kind, topic, 10) for topic, kind in TOPICS.items()}

    def publish(self) -> None:
        """One message on each topic."""
        header, field = Header(), np.full((48, 64, 2), 3.0, np.float32)
        values = [KeyValue(key=key, value=value) for key, value in ACCOUNT.items()]
        account = DiagnosticStatus(name="flow front", values=values)
        topic = [KeyValue(key="image_topic", value="/lens")]
        status = DiagnosticStatus(name="robot/eye: front", message="fine", values=topic)
        jpeg = encode_image(np.zeros((48, 64, 3), np.uint8), "jpeg")
        maps = [array_to_image(field[..., 0], "32FC1", header)] * 2
        messages = [array_to_image(field, "32FC2", header), *maps, DiagnosticArray(status=[account])]
        messages += [DiagnosticArray(status=[status]), compressed_image(jpeg, "jpeg", header)]
        for publisher, message in zip(self.topics.values(), messages, strict=True):
            publisher.publish(message)

    def heard(self) -> set[str]:
        """Topics that somebody subscribes to."""
        return {topic for topic, publisher in self.topics.items() if publisher.get_subscription_count()}


@pytest.fixture
def nodes() -> Iterator[tuple[FakeFlowNode, FlowView, Board]]:
    parameters = [word for text in ("node:=/robot/eye", "camera:=front", "rate_hz:=30.0") for word in ("-p", text)]
    rclpy.init(args=["test", "--ros-args", *parameters])
    board = Board()
    fake, view = FakeFlowNode(), FlowView(board)
    yield fake, view, board
    view.destroy_node()
    fake.destroy_node()
    rclpy.shutdown()


def test_it_subscribes_to_what_is_looked_at_while_it_is(
    nodes: tuple[FakeFlowNode, FlowView, Board], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flow node sleeps while nobody subscribes: a view that did so all the time would keep it awake for nobody."""
    fake, view, board = nodes
    monkeypatch.setattr(view_server, "LOOKING_S", 1.0)
    give_up = time.monotonic() + 20
    seen: dict[str, Any] = {"pictures": {}}
    assert not fake.heard()
    while seen.get("state") != "live" or [*map(len, seen["pictures"].values())] != [2, 2, 2]:
        assert time.monotonic() < give_up, seen
        seen = board.look(0, ["image", "flow", "residual"], 0.0)
        fake.publish()
        view.step()
    assert fake.heard() == TOPICS.keys() - {"/robot/eye/front/uncertainty"}
    assert seen["node"] == "/robot/eye" and seen["latest"]["latency_ms"] == "61.5"
    assert seen["pictures"]["image"]["note"] == "64x48" and "4.2 px" in seen["pictures"]["flow"]["note"]
    fake.destroy_publisher(fake.topics.pop("/lens/compressed"))
    while "nobody publishes" not in seen["pictures"].get("image", {}).get("note", ""):
        assert time.monotonic() < give_up, seen
        seen = board.look(0, ["image"], 0.0)
        view.step()
    view.create_subscription(DiagnosticArray, "/nobody/statistics", print, 1)
    assert view._running() == ["/robot/eye/front"], "a subscription is no node that runs"
    looked_s = time.monotonic()
    while fake.heard():
        assert time.monotonic() < looked_s + 10
        view.step()
    assert time.monotonic() - looked_s > 0.5
    assert board.look(0, ["image"], 0.0)["pictures"] == {}


def test_the_process_says_where_its_page_is_and_ends_on_ctrl_c() -> None:
    """Also while a browser waits; and what a page that all may see means stands in the log."""
    words = ["--ros-args", "-p", "port:=0", "-p", "host:=0.0.0.0"]
    command = [sys.executable, "-m", "deq_flow_ros.ros.view.flow_view", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        lines = []
        while "without a password" not in (lines or [""])[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        port = int("".join(lines).partition("the page is at http://")[2].partition("/")[0].rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/live?after=0&pictures=image")
        told = json.loads(connection.getresponse().read())
        assert told["state"] == "connecting" and told["node"] == "/flow_node"
        connection.request("GET", "/live?after=999999&pictures=image")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
        assert process.returncode == 0 and "Traceback" not in out, out
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("parameter", "words"), [("port:=TAKEN", "is in use"), ("width:=wide", "width"), ("camera:=a b", "'a b'")]
)
def test_a_page_that_cannot_be_served_ends_with_a_line(
    parameter: str, words: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is read in the log of a launch, between lines of the flow node."""
    no_signals = nullcontext(SimpleNamespace(requested=False))
    monkeypatch.setattr("deq_flow_ros.ros.process.StopRequest", lambda: no_signals)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status = main(["--ros-args", "-p", parameter.replace("TAKEN", str(taken.getsockname()[1]))])
    err = capfd.readouterr().err
    assert status == 2 and words in err and "Traceback" not in err, err
