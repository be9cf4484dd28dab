# SPDX-License-Identifier: Apache-2.0
"""Frames of cameras in the worker of `flow_node`: who takes part, who fails, and how time is shared."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
import numpy as np
import torch
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from node_parts import MS, Said, configured_node, deliver, image
from rclpy.lifecycle import LifecycleNode
from rclpy.node import Node
from sensor_msgs.msg import Image

from deq_flow_ros.model import SIZES, DEQFlow
from deq_flow_ros.ros import camera as camera_module
from deq_flow_ros.ros import worker
from deq_flow_ros.ros.accounts import UNHEARD, FrameAccounts
from deq_flow_ros.ros.camera import Camera
from deq_flow_ros.ros.flow_node import FlowNode
from deq_flow_ros.ros.messages import ReceivedFrame
from deq_flow_ros.ros.parameters import NodeSettings
from deq_flow_ros.ros.worker import FrameWorker
from deq_flow_ros.streaming import FlowEstimator, FlowResult, UpdateRequest, update_together

NOW_NS = 5_000_000_000
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def received(value: int) -> ReceivedFrame:
    message = image(value)
    return ReceivedFrame(message, NOW_NS, message.header.stamp.nanosec)


@pytest.fixture
def cameras() -> Iterator[tuple[LifecycleNode, list[Camera]]]:
    """A node with two cameras of one model, neither of them open."""
    rclpy.init()
    node = LifecycleNode("flow_node")
    NodeSettings.declare(node)
    settings = replace(NodeSettings(), latency_budget_ms=0.0, max_iterations=1)
    model = DEQFlow(replace(SIZES["nano"], uncertainty_dim=8)).eval()
    both = [Camera(node, name, model, settings) for name in ("first", "second")]
    yield node, both
    for camera in both:
        camera.destroy()
    node.destroy_node()
    rclpy.shutdown()


@pytest.fixture
def node() -> Iterator[FlowNode]:
    """An active node of one camera."""
    with configured_node() as node:
        node.trigger_activate()
        yield node


def test_a_batch_that_fails_costs_only_the_frame_that_made_it_fail(
    cameras: tuple[LifecycleNode, list[Camera]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU two cameras are one batch: an error of one image must not lose the other camera's."""

    def failing(requests: list[UpdateRequest]) -> list[FlowResult | None]:
        if any(request.frame.max() == 255 for request in requests):
            raise RuntimeError("out of memory")
        return update_together(requests)

    node, (good, bad) = cameras
    said = Said(node, monkeypatch)
    monkeypatch.setattr(worker, "update_together", failing)
    together = FrameWorker([good, bad], GPU, 0.0)
    together.process([(good, received(7)), (bad, received(255))])
    together.stop()
    assert said.messages == {
        "/flow_node/first/statistics": ["stream starts: a frame failed (RuntimeError: out of memory)"],
        "/flow_node/second/statistics": ["dropped: RuntimeError: out of memory"],
    }


STARTS, DROPPED, FLOW = "stream starts", "dropped", "1 iterations"
IN_BEGIN, IN_FINISH = (camera_module, "image_to_rgb"), (FrameAccounts, "processed")
IN_PREPARE, IN_RESET = (FlowEstimator, "prepare"), (FlowEstimator, "reset")


def test_what_is_wrong_is_logged_once_in_a_while(node: FlowNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """For those who read the log alone; every second, whatever the figures in it are, it would bury all else there."""
    logged: list[str] = []
    camera, now_s = node.cameras[0], time.monotonic()
    monkeypatch.setattr(camera, "_logger", SimpleNamespace(warning=logged.append))
    monkeypatch.setattr(camera_module, "time", SimpleNamespace(monotonic=lambda: now_s))
    for said in ("2 images could not be used", "3 images could not be used", "the solver diverged"):
        status = DiagnosticStatus(level=DiagnosticStatus.WARN, message=said)
        monkeypatch.setattr(camera_module, "camera_status", lambda *_, status=status: status)
        camera.status("flow")
    assert logged == ["2 images could not be used", "the solver diverged"]
    now_s += camera_module.QUIET_S
    camera.status("flow")
    assert logged[2:] == ["the solver diverged"]


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([IN_BEGIN], [STARTS, DROPPED, STARTS, FLOW]),
        ([IN_FINISH], [STARTS, DROPPED, STARTS, FLOW]),
        ([IN_PREPARE], [STARTS, FLOW, STARTS, FLOW]),
        ([IN_FINISH, IN_RESET], [STARTS, DROPPED, FLOW, FLOW]),
    ],
    ids=["begin", "finish", "prepare", "finish and reset"],
)
def test_an_error_that_nobody_expected_costs_one_frame_and_is_told(
    node: FlowNode,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    places: list[tuple[Any, str]],
    expected: list[str],
) -> None:
    """Wherever it comes from, the worker goes on, each image has one account, and the log says where it was."""
    said = Said(node, monkeypatch)

    def send(*values: int) -> None:
        for value in values:
            deliver(node, image(value))
            said.wait_for(value)
            node.worker.call(lambda: None, 10.0)  # behind what follows the account

    def fail(*arguments: object) -> None:
        raise KeyError("nobody expected this")

    send(1)
    with monkeypatch.context() as patch:
        for place in places:
            patch.setattr(*place, fail)
        send(2)
    send(3, 4)
    assert [re.split("[:,]", message)[0] for message in said.all()] == expected
    counted = {name: int(said.last[f"frames_{name}"]) for name in ("received", "processed", "first", "dropped")}
    assert counted.pop("received") == sum(counted.values()) == 4
    log = capfd.readouterr().err
    assert "KeyError: 'nobody expected this'" in log and "in fail" in log


def test_an_account_that_cannot_be_published_ends_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker thread is not started again: one failure of the middleware would stop the flow for good."""

    def fail(message: str) -> None:
        if "dropped" in message:
            raise RuntimeError("the middleware failed")

    with configured_node("max_rate_hz:=20.0") as node:
        node.trigger_activate()
        said = Said(node, monkeypatch)
        said.failing = fail
        deliver(node, Image())  # dropped as empty, by the worker
        deliver(node, image(1))  # dropped as too soon, in the executor's thread
        said.wait_for(2)
        time.sleep(0.06)
        deliver(node, image(2))
        said.wait_for(3)
    kinds = [message.split(":")[0] for message in said.all()]
    assert kinds == ["dropped", "dropped", "stream starts"]


def test_images_are_not_processed_while_nobody_subscribes_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A robot that does not use the flow at the moment pays nothing for it; whoever reads the accounts is told why."""
    user = None
    with configured_node("always_on:=false") as node:
        node.trigger_activate()
        said = Said(node, monkeypatch)
        publishers = {publisher.topic_name: publisher for publisher in node.publishers}

        def subscribe(name: str, kind: type) -> None:
            topic = f"/flow_node/{name}"
            subscription = user.create_subscription(kind, topic, lambda message: None, 10)
            give_up = time.monotonic() + 10.0
            while not publishers[topic].get_subscription_count():
                assert time.monotonic() < give_up and subscription is not None
                time.sleep(0.005)

        try:
            user = Node("user")
            subscribe("statistics", DiagnosticArray)  # hears of the images, not of the flow
            for value in (1, 2):
                deliver(node, image(value))
            said.wait_for(2)
            status = node.cameras[0].status("flow")
            assert status.level == DiagnosticStatus.OK and status.message.startswith(UNHEARD)
            subscribe("flow", Image)
            for value in (3, 4):
                deliver(node, image(value))
                said.wait_for(value)
            assert not node.cameras[0].status("flow").message.startswith(UNHEARD)
        finally:
            user.destroy_node()
    dropped, first = f"dropped: {UNHEARD}", "stream starts: nobody subscribed to the flow before"
    assert said.all()[:3] == [dropped, dropped, first] and said.all()[3].startswith(FLOW)
    log = capfd.readouterr().err
    assert log.count("its images are not processed until somebody does") == 1


def test_the_counts_of_a_16_bit_camera_are_mapped_as_asked(cameras: tuple[LifecycleNode, list[Camera]]) -> None:
    """A range of the images themselves is not that of another camera, or of another day."""
    camera = cameras[1][0]
    message = Image(height=32, width=32, step=64, encoding="mono16", data=np.full(1024, 7500, "<u2").tobytes())
    asked = replace(NodeSettings(), intensity_range=(7000, 8000))
    for settings, grey in ((asked, 128), (replace(asked, intensity_range=(7000, 9000)), 64)):
        camera.change(settings)
        attempt = camera.begin(ReceivedFrame(message, NOW_NS, 0), None)
        assert attempt is not None and attempt.request.frame.max() == pytest.approx(grey, abs=1)


def test_resets_asked_for_while_no_image_comes_are_one(node: FlowNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that calls ~/reset for hours must not fill the memory; the last reason is the one that is told."""
    said = Said(node, monkeypatch)
    for number in range(1000):
        node.cameras[0].reset(f"reason {number}")
    for value in (1, 2):
        deliver(node, image(value))
        said.wait_for(value)
    assert said.all()[0] == "stream starts: reason 999" and said.all()[1].startswith(FLOW)


def test_the_worker_begins_with_the_newest_of_frames_that_have_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor makes way for the worker at once, but not with a frame that newer ones may stand behind."""
    pauses: list[float] = []
    clock = SimpleNamespace(monotonic_ns=lambda: NOW_NS, sleep=pauses.append)
    monkeypatch.setattr(worker, "time", clock)
    camera = SimpleNamespace(name="", begin=lambda frame, limit_ms: None, last_arrival_ns=0, last_shape=None)
    alone = FrameWorker([camera], CPU, 0.0)
    try:
        for waited_ms, expected in ((100, 0), (1, 1), (100, 1)):
            alone.take(camera, ReceivedFrame(Image(), NOW_NS - waited_ms * MS, 0))
            alone.call(lambda: None, 5.0)  # the frame is done
            assert len(pauses) == expected
    finally:
        alone.stop()


def test_cameras_that_deliver_share_the_budget() -> None:
    """One camera that used all of the budget would leave none to the other; a silent one needs no share."""
    cameras = [SimpleNamespace(name=name, last_arrival_ns=0, last_shape=None) for name in ("first", "second")]
    both = FrameWorker(cameras, CPU, 90.0)
    now_ns = time.monotonic_ns()
    for ages_s, limit_ms in (((0.0, 0.1), 45.0), ((0.0, 1.1), None), ((5.0, 0.0), 45.0), ((5.0, 5.0), None)):
        for camera, age_s in zip(cameras, ages_s, strict=True):
            camera.last_arrival_ns = now_ns - round(age_s * 1e9)
        assert both.time_limit_ms(cameras[:1]) == limit_ms
    for camera in cameras:
        camera.last_arrival_ns = now_ns
    both.latency_budget_ms = 0.0
    assert both.time_limit_ms(cameras[:1]) is None
    both.stop()


def test_images_that_cannot_be_used_take_no_share_of_the_budget(
    cameras: tuple[LifecycleNode, list[Camera]],
) -> None:
    """They take no time either."""
    camera = cameras[1][0]
    assert camera.begin(ReceivedFrame(Image(encoding="none"), NOW_NS, 0), None) is None
    assert camera.last_arrival_ns == 0
    assert camera.begin(received(1), None) is not None and camera.last_arrival_ns == NOW_NS


def test_colours_and_residual_are_asked_for_while_somebody_subscribes(
    cameras: tuple[LifecycleNode, list[Camera]],
) -> None:
    """Why: a GPU would copy what nobody looks at to the host; it paints, but a smaller picture is painted there."""
    camera = cameras[1][0]

    def asked_for(wanted: set[str], **changed: Any) -> Any:
        camera.change(replace(NodeSettings(), **changed))
        assert camera.begin(replace(received(7), wanted=wanted), None) is not None
        assert camera.estimator.settings.residual == bool(wanted & {"residual", "points"})
        return camera.estimator.settings.palette

    assert asked_for({"flow", "residual"}) is None
    palette = asked_for({"flow_color/compressed"}, color_max_px=5.0)
    assert palette is not None and palette.max_px == 5.0
    assert asked_for({"flow_color"}, color_max_px=5.0) is palette, "no new one for each frame"
    assert asked_for({"flow_color"}).max_px is None
    assert asked_for({"flow_color"}, output_scale=0.5) is None
    assert asked_for({"flow", "points"}) is None
