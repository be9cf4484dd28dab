# SPDX-License-Identifier: Apache-2.0
"""Parts of `flow_node` that another middleware, or a middleware that fails, reaches: within this process."""

import ctypes
import re
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import cv2
import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2")
import torch
from node_parts import configured_node, service
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import ReliabilityPolicy
from std_srvs.srv import SetBool, Trigger

from deq_flow_ros.ros import flow_node, process
from deq_flow_ros.ros.flow_node import DISABLED, FlowNode

NODE_TOPICS = {"/parameter_events", "/diagnostics"}


@pytest.fixture
def node() -> Iterator[FlowNode]:
    """An active node with three threads."""
    with configured_node("threads:=3") as node:
        node.trigger_activate()
        yield node


def test_threads_bind_torch_and_opencv(node: FlowNode) -> None:
    """OpenCV would take all cores beside torch, the one left to the middleware included; and so would oneDNN, whose
    number of threads is that of OpenMP in the thread that computes, whatever was set in another.
    """
    assert (torch.get_num_threads(), cv2.getNumThreads()) == (3, 3)
    assert node.worker is not None
    loaded = re.search(r"(/\S*lib[gi]omp\S*\.so\S*)", Path("/proc/self/maps").read_text())
    assert loaded is not None
    openmp = ctypes.CDLL(loaded[1])  # not torch's own figure: to ask for it sets it
    assert node.worker.call(openmp.omp_get_max_threads, 10.0) == 3


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
        assert (len(list(node.subscriptions)), len(list(node.timers))) == before and node.worker is None


def test_a_disabled_node_stays_so_until_it_is_enabled(node: FlowNode) -> None:
    """What a person has switched off must not go on because a manager restarted the node; and it must be seen."""
    image_topics = {"/flow_node/image", "/flow_node/image/compressed"}

    def subscribed() -> bool:
        return any(subscription.topic_name in image_topics for subscription in node.subscriptions)

    def enable(data: bool) -> SetBool.Response:
        return service(node, "enable", SetBool.Request(data=data), SetBool.Response())

    assert subscribed() and enable(False).success
    assert node.trigger_deactivate() == node.trigger_activate() == TransitionCallbackReturn.SUCCESS
    assert not subscribed() and node.cameras[0].status("flow").message == DISABLED
    assert enable(True).message == "enabled"
    assert subscribed() and node.cameras[0].status("flow").message != DISABLED
    node.trigger_deactivate()
    answer = enable(False)
    assert not answer.success and "not active" in answer.message


def test_another_node_of_the_same_name_is_told(node: FlowNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that an earlier launch left behind publishes on the same topics, and each image seems to give two fields."""
    known = [("camera", "/"), ("flow_node", "/front"), ("flow_node", "/")]  # of earlier tests, the graph knows more
    monkeypatch.setattr(node, "get_node_names_and_namespaces", lambda: known)
    monkeypatch.setattr(flow_node, "NAMESAKE_S", 0.0)
    assert node._statuses()[0].level == b"\x00"
    known.append(("flow_node", "/"))
    status = node._statuses()[0]
    assert status.level == b"\x01" and "2 nodes are called /flow_node" in status.message


def test_one_warm_up_serves_all_cameras() -> None:
    """With a warm-up each, four cameras would take half a minute to configure."""
    with configured_node("warm_up_width:=128", "warm_up_height:=96", "cameras:=[front,rear]") as node:
        front, rear = (camera.estimator for camera in node.cameras)
        known = rear.stream.costs.stages[128 * 96]
        assert known.keys() >= {"encode", "iteration"} and known == front.stream.costs.stages[128 * 96]
        assert rear.stream.costs is not front.stream.costs  # what each learns from its own images is its own


def test_everything_goes_on_while_a_snapshot_is_written(node: FlowNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk may take seconds, in which images would be lost."""
    written, ticks = threading.Event(), []

    def slow(*_: object) -> Path:
        assert written.wait(30.0)
        return Path("there")

    monkeypatch.setattr(flow_node, "write_snapshot", slow)
    monkeypatch.setattr(node.cameras[0], "snapshot", lambda: ({}, {}))
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

    camera = node.cameras[0]
    with monkeypatch.context() as patch:
        patch.setattr(camera, "close", fail)
        assert node.trigger_deactivate() == TransitionCallbackReturn.ERROR
    assert not node.cameras and node.worker is None
    assert node.trigger_configure() == node.trigger_activate() == TransitionCallbackReturn.SUCCESS


@pytest.mark.parametrize("ends", [True, False])
def test_a_node_that_cannot_start_stays_to_be_mended_or_ends_the_process(
    ends: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """A robot's operator configures it anew; a replay, and whoever waits for it, must not wait for ever."""
    with configured_node("model:=~/no/such/weights", f"exit_on_failure:={ends}".lower()) as node:
        assert node.start(SimpleNamespace(requested=False)) is not ends
        assert node.get_parameter("autostart").value
        said = capfd.readouterr().err
        assert f"no weights '{Path.home()}/no/such/weights'" in said  # no shell expands ~ in a file
        assert ("the process ends" if ends else "then call the transition configure") in said


def test_what_a_parameter_is_already_may_be_set_to_it(node: FlowNode) -> None:
    """`ros2 param load` of what `ros2 param dump` wrote was refused for all that is read in configure or at start."""
    for name in ("autostart", "device", "cameras"):
        parameter = node.get_parameter(name)
        assert node.set_parameters_atomically([parameter]).successful, name
    assert "deactivate and cleanup first" in node.set_parameters_atomically([Parameter("threads", value=2)]).reason
    assert not node.set_parameters_atomically([Parameter("autostart", value=False)]).successful


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, "ros2 run deq_flow_ros flow_node --ros-args -r"),
        (["device=cuda"], 2, "unrecognized arguments: device=cuda"),
        (["--ros-args", "-p", "device=cuda"], 2, "'-p device=cuda'"),
        (["--ros-args", "-p", "threads:=two"], 2, "threads"),
    ],
    ids=["help", "unknown", "malformed", "wrong type"],
)
def test_the_command_line_helps_and_refuses_what_it_does_not_know(
    words: list[str], status: int, said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--help started the node, and a parameter without --ros-args was left out in silence."""
    monkeypatch.setattr(process, "StopRequest", MagicMock())  # the signals stay those of the tests
    try:
        ended: object = flow_node.main(words)
    except SystemExit as exit:
        ended = exit.code
    finally:
        rclpy.try_shutdown()
    printed = capfd.readouterr()
    assert ended == status and said in printed.out + printed.err


def test_a_manager_is_offered_a_bond_while_the_node_is_active(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """nav2's manager takes a node without one for dead after its bond_timeout. The message is played by a stand-in."""
    sent: list[tuple[str, str, bool]] = []

    def cycle(*parameters: str) -> list[tuple[str, str, bool]]:
        sent.clear()
        with configured_node(*parameters) as node:
            keep = SimpleNamespace(publish=lambda each: sent.append((each.id, each.instance_id, each.active)))
            monkeypatch.setattr(node, "create_publisher", lambda kind, topic, depth: {"bond": keep}[topic])
            node.trigger_activate()
            for timer in node.timers:
                if timer.timer_period_ns == 100_000_000:
                    timer.callback()
            node.trigger_deactivate()
        return sent

    monkeypatch.setitem(sys.modules, "bond", None)
    assert cycle("autostart:=false") == [] and "give nav2's manager the bond_timeout 0.0" in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "bond", ModuleType("bond"))
    status = partial(SimpleNamespace, header=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "bond.msg", SimpleNamespace(Status=status))
    assert cycle() == []  # it starts by itself
    *alive, last = cycle("autostart:=false")
    assert alive and set(alive) == {("flow_node", last[1], True)} and last == ("flow_node", last[1], False)
    assert last[1] not in {one for _, one, _ in cycle("autostart:=false")}  # or the manager takes it for the old one


def test_the_heartbeat_of_the_bond_arrives_and_so_does_the_notice_of_its_end() -> None:
    """Each time the node is active. The notice was lost now and then, as its publisher was destroyed behind it."""
    status = pytest.importorskip("bond.msg", reason="needs the ROS package bond").Status
    with configured_node("autostart:=false") as node:
        manager, executor = Node("manager"), SingleThreadedExecutor()
        received: list[Any] = []
        manager.create_subscription(status, "/bond", received.append, 100)
        executor.add_node(node)
        executor.add_node(manager)
        for _ in range(3):
            node.trigger_activate()
            received.clear()
            deadline = time.monotonic() + 20
            while len(received) < 3 and time.monotonic() < deadline:
                executor.spin_once(timeout_sec=0.1)
            node.trigger_deactivate()
            while received and received[-1].active and time.monotonic() < deadline:
                executor.spin_once(timeout_sec=0.1)
            assert [each.active for each in received] == [True] * (len(received) - 1) + [False] and len(received) > 3
            assert {each.id for each in received} == {"flow_node"} and len({each.instance_id for each in received}) == 1
            assert received[0].heartbeat_period == pytest.approx(0.1)
        manager.destroy_node()
