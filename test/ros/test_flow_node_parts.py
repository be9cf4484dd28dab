# SPDX-License-Identifier: Apache-2.0
"""Parts of `flow_node` that another middleware, or a middleware that fails, reaches: within this process."""

import ctypes
import queue
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
import torch
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.node import Node
from rclpy.qos import ReliabilityPolicy
from sensor_msgs.msg import Image
from std_srvs.srv import SetBool, Trigger

from deq_flow_ros.ros import flow_node, frame_worker
from deq_flow_ros.ros.camera_input import MAX_WAIT_NS, arrival
from deq_flow_ros.ros.camera_stream import CameraStream, ReceivedFrame
from deq_flow_ros.ros.flow_node import DISABLED, FlowNode
from deq_flow_ros.ros.rate_limit import RateLimit
from deq_flow_ros.streaming import FlowResult, UpdateRequest, update_together

NODE_TOPICS = {"/parameter_events", "/diagnostics"}
MS = 1_000_000
WALL_NS, NOW_NS = 1_700_000_000_000_000_000, 5_000_000_000


@contextmanager
def configured_node(*parameters: str) -> Iterator[FlowNode]:
    """A node in this process; what it sets for the whole process is put back."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    quick = ("warm_up_width:=0", "warm_up_height:=0", "latency_budget_ms:=0.0", "max_iterations:=1")
    rclpy.init(args=["--ros-args", *(word for value in (*quick, *parameters) for word in ("-p", value))])
    try:
        node = FlowNode()
        node.trigger_configure()
        try:
            yield node
        finally:
            node.close()
            node.destroy_node()
    finally:
        rclpy.shutdown()
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


@pytest.fixture
def node() -> Iterator[FlowNode]:
    """An active node with three threads."""
    with configured_node("threads:=3") as node:
        node.trigger_activate()
        yield node


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


def test_an_account_that_cannot_be_published_ends_no_thread(node: FlowNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker thread is not started again: one failure of the middleware would stop the flow for good."""
    camera = node._cameras[0]
    assert node._worker is not None
    accounts: queue.Queue[DiagnosticArray] = queue.Queue()

    def publish(account: DiagnosticArray) -> None:
        accounts.put(account)
        if "dropped" in account.status[0].message:
            raise RuntimeError("the middleware failed")

    monkeypatch.setattr(camera._statistics, "publish", publish)
    camera.drop(ReceivedFrame(camera, Image(), NOW_NS, None), "superseded by a newer frame")  # in the executor's thread
    messages = [accounts.get(timeout=10.0).status[0].message]
    good = Image(height=32, width=32, step=96, encoding="rgb8", data=bytes(32 * 96))
    for image in (Image(), good):  # the worker drops the first as empty
        node._worker.submit("", ReceivedFrame(camera, image, NOW_NS, None))
        messages.append(accounts.get(timeout=10.0).status[0].message)
    assert [message.split(":")[0] for message in messages] == ["dropped", "dropped", "stream starts"]


def test_threads_bind_torch_and_opencv(node: FlowNode) -> None:
    """OpenCV would take all cores beside torch, the one left to the middleware included; and so would oneDNN, whose
    number of threads is that of OpenMP in the thread that computes, whatever was set in another.
    """
    assert (torch.get_num_threads(), cv2.getNumThreads()) == (3, 3)
    assert node._worker is not None
    loaded = re.search(r"(/\S*lib[gi]omp\S*\.so\S*)", Path("/proc/self/maps").read_text())
    assert loaded is not None
    openmp = ctypes.CDLL(loaded[1])  # not torch's own figure: to ask for it sets it
    assert node._worker.call(openmp.omp_get_max_threads, 10.0) == 3


def test_qos_overrides_hold_for_the_image_and_a_wrong_one_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    """ROS's own way to set a quality of service; it comes before our parameters, as it names the topic."""
    image = "qos_overrides./flow_node/image"
    start = f"{image}.subscription."
    with configured_node(f"{start}depth:=7", f"{start}reliability:=reliable") as node:
        assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
        profile = next(s for s in node.subscriptions if s.topic_name == "/flow_node/image").qos_profile
        assert (profile.depth, profile.reliability) == (7, ReliabilityPolicy.RELIABLE)
        assert "changes nothing" not in capfd.readouterr().err
    useless = (f"{start}dept:=7", "qos_overrides./image.subscription.depth:=7", f"{image}.publisher.depth:=7")
    with configured_node(*useless, f"{image}/compressed.subscription.depth:=7") as node:
        assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
        words = capfd.readouterr().err
        assert [f"'{name.partition(':=')[0]}' changes nothing" in words for name in useless] == [True] * 3
        assert words.count("changes nothing") == 3  # that of the compressed images would, if they came
    with configured_node("qos_overrides./flow_node/points.publisher.depth:=deep", "cameras:=['']") as node:
        assert "configure failed" in capfd.readouterr().err
        assert {publisher.topic_name for publisher in node.publishers} - {"/rosout"} == NODE_TOPICS
    with configured_node(f"{start}reliability:=sometimes") as node:
        before = len(list(node.subscriptions)), len(list(node.timers))
        assert node.trigger_activate() == TransitionCallbackReturn.FAILURE
        assert "activate failed: Unexpected QoS override for policy `reliability`: `some" in capfd.readouterr().err
        assert (len(list(node.subscriptions)), len(list(node.timers))) == before and node._worker is None


def received(camera: CameraStream, value: int) -> ReceivedFrame:
    """An image whose left half has one value, and whose right half another."""
    image = Image(height=32, width=32, step=96, encoding="rgb8", data=(bytes([value]) * 48 + bytes([99]) * 48) * 32)
    return ReceivedFrame(camera, image, NOW_NS, None)


@pytest.fixture
def two_cameras(node: FlowNode) -> FlowNode:
    """The active node, with another camera of the same model."""
    first = node._cameras[0]
    node._cameras.append(CameraStream(node, "second", first.estimator.model, node._settings))
    return node


def test_a_batch_that_fails_costs_only_the_frame_that_made_it_fail(
    two_cameras: FlowNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU two cameras are one batch: an error of one image must not lose the other camera's."""
    accounts: dict[str, list[str]] = {"": [], "second": []}
    for camera in two_cameras._cameras:
        publish = accounts[camera.name].append
        monkeypatch.setattr(camera._statistics, "publish", lambda account, p=publish: p(account.status[0].message))

    def failing(requests: list[UpdateRequest]) -> list[FlowResult | None]:
        if any(request.frame.max() == 255 for request in requests):
            raise RuntimeError("out of memory")
        return update_together(requests)

    monkeypatch.setattr(frame_worker, "update_together", failing)
    good, bad = two_cameras._cameras
    assert two_cameras._worker is not None
    two_cameras._worker.process([received(good, 7), received(bad, 255)])
    assert accounts == {
        "": ["stream starts: a frame failed (RuntimeError: out of memory)"],
        "second": ["dropped: RuntimeError: out of memory"],
    }


STARTS, DROPPED, FLOW = "stream starts", "dropped", "1 iterations"


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (["_budget_start"], [STARTS, DROPPED, STARTS, FLOW]),
        (["_report"], [STARTS, DROPPED, STARTS, FLOW]),
        (["prepare"], [STARTS, FLOW, STARTS, FLOW]),
        (["_report", "recover"], [STARTS, DROPPED, FLOW, FLOW]),
    ],
)
def test_an_error_that_nobody_expected_costs_one_frame_and_is_told(
    node: FlowNode,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    places: list[str],
    expected: list[str],
) -> None:
    """Wherever it comes from, the worker goes on, each image has one account, and the log says where it was."""
    camera, worker = node._cameras[0], node._worker
    assert worker is not None
    accounts: list[str] = []
    monkeypatch.setattr(camera._statistics, "publish", lambda account: accounts.append(account.status[0].message))

    def send(*values: int) -> None:
        for value in values:
            frame = received(camera, value)
            frame.message.header.stamp.nanosec = value * MS
            camera._accounts.received(0)
            worker.submit("", frame)
            while not worker.idle:
                worker.call(lambda: None, 10.0)
        worker.call(lambda: None, 10.0)

    def fail(*arguments: object) -> None:
        raise KeyError("nobody expected this")

    send(1)
    with monkeypatch.context() as patch:
        for place in places:
            patch.setattr(camera, place, fail)
        send(2)
    send(3, 4)
    assert [re.split("[:,]", message)[0] for message in accounts] == expected
    counters = vars(camera._accounts._counters)
    assert counters["received"] == counters["processed"] + counters["first"] + counters["dropped"] == 4
    log = capfd.readouterr().err
    assert "KeyError: 'nobody expected this'" in log and "in fail" in log


def test_resets_asked_for_while_no_image_comes_are_one(node: FlowNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that calls ~/reset for hours must not fill the memory; the last reason is the one that is told."""
    camera = node._cameras[0]
    accounts: list[str] = []
    monkeypatch.setattr(camera._statistics, "publish", lambda account: accounts.append(account.status[0].message))
    for number in range(1000):
        camera.reset(f"reason {number}")
    assert len(camera._resets) == 1
    assert node._worker is not None
    node._worker.process([received(camera, 1)])
    assert accounts == ["stream starts: reason 999"] and not camera._resets


def test_a_disabled_node_stays_so_until_it_is_enabled(node: FlowNode) -> None:
    """What a person has switched off must not go on because a manager restarted the node; and it must be seen."""
    image_topics = {"/flow_node/image", "/flow_node/image/compressed"}

    def subscribed() -> bool:
        return any(subscription.topic_name in image_topics for subscription in node.subscriptions)

    assert subscribed() and node._on_enable(SetBool.Request(data=False), SetBool.Response()).success
    assert node.trigger_deactivate() == node.trigger_activate() == TransitionCallbackReturn.SUCCESS
    assert not subscribed() and node._cameras[0].health.idle == DISABLED
    assert node._on_enable(SetBool.Request(data=True), SetBool.Response()).message == "enabled"
    assert subscribed() and node._cameras[0].health.idle is None
    node.trigger_deactivate()
    answer = node._on_enable(SetBool.Request(data=False), SetBool.Response())
    assert not answer.success and "not active" in answer.message


def test_one_warm_up_serves_all_cameras() -> None:
    """With a warm-up each, four cameras would take half a minute to configure."""
    with configured_node("warm_up_width:=128", "warm_up_height:=96", "cameras:=[front,rear]") as node:
        front, rear = (camera.estimator for camera in node._cameras)
        known = rear.stream.costs.stages[128 * 96]
        assert known.keys() >= {"encode", "iteration"} and known == front.stream.costs.stages[128 * 96]
        assert rear.stream.costs is not front.stream.costs  # what each learns from its own images is its own


def test_the_worker_begins_with_the_newest_of_frames_that_have_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor makes way for the worker at once, but not with a frame that newer ones may stand behind."""
    pauses: list[float] = []
    clock = SimpleNamespace(monotonic_ns=lambda: NOW_NS, sleep=pauses.append)
    monkeypatch.setattr(frame_worker, "time", clock)
    camera = SimpleNamespace(name="", last_arrival_ns=0, last_shape=None, begin=lambda frame, limit_ms: None)
    worker = frame_worker.FrameWorker([], torch.device("cpu"), 0.0)
    try:
        for waited_ms, expected in ((100, 0), (1, 1), (100, 1)):
            worker.take(ReceivedFrame(camera, Image(), NOW_NS - waited_ms * MS, 0.0))
            worker.call(lambda: None, 5.0)  # the frame is done
            assert len(pauses) == expected
    finally:
        worker.stop()


def test_cameras_that_deliver_share_the_budget(two_cameras: FlowNode) -> None:
    """One camera that used all of the budget would leave none to the other; a silent one needs no share."""
    cameras, worker = two_cameras._cameras, two_cameras._worker
    assert worker is not None
    worker.latency_budget_ms = 90.0
    now_ns = time.monotonic_ns()
    for ages_s, limit_ms in (((0.0, 0.1), 45.0), ((0.0, 1.1), None), ((5.0, 0.0), 45.0), ((5.0, 5.0), None)):
        for camera, age_s in zip(cameras, ages_s, strict=True):
            camera.last_arrival_ns = now_ns - round(age_s * 1e9)
        assert worker.time_limit_ms(cameras[:1]) == limit_ms
    for camera in cameras:
        camera.last_arrival_ns = now_ns
    worker.latency_budget_ms = 0.0
    assert worker.time_limit_ms(cameras[:1]) is None


def test_images_that_cannot_be_used_take_no_share_of_the_budget(two_cameras: FlowNode) -> None:
    """They take no time either."""
    second = two_cameras._cameras[1]
    assert second.begin(ReceivedFrame(second, Image(encoding="none"), NOW_NS, None), None) is None
    assert second.last_arrival_ns == 0
    assert second.begin(received(second, 1), None) is not None and second.last_arrival_ns == NOW_NS


def test_everything_goes_on_while_a_snapshot_is_written(node: FlowNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk may take seconds, in which images would be lost."""
    written, ticks = threading.Event(), []

    def slow(*_: object) -> Path:
        assert written.wait(30.0)
        return Path("there")

    monkeypatch.setattr(flow_node, "write_snapshot", slow)
    monkeypatch.setattr(node._cameras[0], "snapshot", lambda: "a copy")
    node.create_timer(0.01, lambda: ticks.append(1))
    user = Node("user")
    executor = SingleThreadedExecutor()
    for one in (node, user):
        executor.add_node(one)
    try:
        client = user.create_client(Trigger, "/flow_node/snapshot")
        assert client.wait_for_service(30.0)
        answer = client.call_async(Trigger.Request())
        give_up = time.monotonic() + 30.0
        while len(ticks) < 50 and time.monotonic() < give_up:
            executor.spin_once(timeout_sec=0.1)
        assert len(ticks) == 50 and not answer.done()
        written.set()
        executor.spin_until_future_complete(answer, 30.0)
        assert answer.result().success and answer.result().message == "there"
    finally:
        written.set()
        user.destroy_node()
        executor.shutdown()


def test_an_error_in_a_transition_leaves_a_node_that_can_be_configured(
    node: FlowNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rclpy says nothing of the error, and without a handler that frees all, the node would stay half alive."""

    def fail(reason: str) -> None:
        raise RuntimeError("the middleware failed")

    camera = node._cameras[0]
    with monkeypatch.context() as patch:
        patch.setattr(camera, "close", fail)
        assert node.trigger_deactivate() == TransitionCallbackReturn.ERROR
    assert not node._cameras and node._worker is None
    assert node.trigger_configure() == node.trigger_activate() == TransitionCallbackReturn.SUCCESS


def test_a_rate_limit_keeps_its_rate_and_forgives_jitter() -> None:
    """A limit at the camera's own rate must let its images pass, although none comes exactly in time."""
    rng = random.Random(0)
    times = [round(1e9 * (number / 30 + rng.uniform(-0.01, 0.01))) for number in range(1, 3000)]
    for rate_hz, share in ((0.0, 1.0), (30.0, 1.0), (20.0, 2 / 3), (1.0, 1 / 30)):
        limit = RateLimit()
        passed = sum(limit.passes(time_ns, rate_hz) for time_ns in times)
        assert passed == pytest.approx(share * len(times), rel=0.02), rate_hz
