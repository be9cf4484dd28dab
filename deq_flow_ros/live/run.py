# SPDX-License-Identifier: Apache-2.0
"""Plays an input through the flow node and records what comes out: player, node and recorder as processes over DDS."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import State
from lifecycle_msgs.srv import GetState
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions

from deq_flow_ros.host import ChildError, Children
from deq_flow_ros.recordings.bags import (
    COLOR_TOPIC,
    FLOW_TOPIC,
    IMAGE_TOPIC,
    RESIDUAL_TOPIC,
    STATISTICS_TOPIC,
    FrameReport,
    remove_recording,
    report_of,
)
from deq_flow_ros.ros import process

RECORDED_TOPICS = (FLOW_TOPIC, COLOR_TOPIC, RESIDUAL_TOPIC, STATISTICS_TOPIC)
"""Names in the recording. While a run lasts, they stand in a namespace of its own, so that neither a robot nor another
run in the same ROS domain gets mixed up with it.
"""
READY_TIMEOUT_S = 120.0
"""For loading the model, warming it up and discovery; a first run on a busy machine takes its time."""
QUIET_S = 3.0
"""Without any news for this long after the player's end, no more is to come."""


@dataclass(frozen=True)
class RunOptions:
    """What to play, with which parameters, and where to record it.

    :ivar play: the arguments of the player: the input, and options.
    :ivar live: whether the input is a camera.
    """

    play: Sequence[str]
    live: bool
    node_parameters: Mapping[str, str]
    bag: Path
    logs: Path
    storage: str = "mcap"


@dataclass
class Progress:
    """The state of a run, for a line on the screen.

    :ivar latency_ms: that of the last frame with flow, as the node reported it.
    """

    phase: str = "starting"
    received: int = 0
    dropped: int = 0
    latency_ms: float = math.nan

    def add(self, report: FrameReport) -> None:
        """Take in the report of one more frame."""
        self.received += 1
        self.dropped += report.outcome == "dropped"
        if report.outcome == "processed":
            self.latency_ms = report.number("latency_ms")


@dataclass(frozen=True)
class Published:
    """What the player published: stamps in ns, and how long it took, in s, the last frame's period included."""

    stamps_ns: list[int]
    seconds: float


def profiles_file() -> Path:
    """The package's Fast DDS profile, from the source tree or from where the package is installed."""
    in_tree = Path(__file__).parents[2] / "config" / "fastdds.xml"
    if in_tree.is_file():
        return in_tree
    from ament_index_python.packages import get_package_share_directory

    return Path(get_package_share_directory("deq_flow_ros")) / "config" / "fastdds.xml"


def prepare_environment(profiles: Path, logs: Path) -> None:
    """Keep the run to this machine and to itself: a ROS domain of its own, unless the user has chosen one."""
    # Domains above 101 map to ports that Linux hands out to others.
    os.environ.setdefault("ROS_DOMAIN_ID", str(20 + os.getpid() % 80))
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    os.environ.setdefault("FASTRTPS_DEFAULT_PROFILES_FILE", str(profiles))
    os.environ.setdefault("ROS_LOG_DIR", str(logs / "ros"))


def run_live(options: RunOptions, show: Callable[[Progress], None]) -> Published:
    """Play the input through the node and record its outputs, in place of an earlier recording.

    On return all processes have ended and the bag is closed. On a live input, Ctrl-C ends the stream, not the run.

    :param show: called now and then with the progress.
    :raises ChildError: when a process fails.
    :raises MediaError: where something else is at the recording's place.
    """
    remove_recording(options.bag, RECORDED_TOPICS)
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    node = Node("evaluate_bag")
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    progress = Progress()
    qos = QoSProfile(depth=500, reliability=ReliabilityPolicy.RELIABLE)
    statistics = _namespace() + STATISTICS_TOPIC
    node.create_subscription(DiagnosticArray, statistics, lambda message: progress.add(report_of(message)), qos)
    try:
        with Children(options.logs) as children:
            return _play(options, children, _Spinner(node, executor, children, progress, show))
    finally:
        process.end_node(node)
        rclpy.try_shutdown()


def _namespace() -> str:
    return f"/evaluate_{os.getpid()}"


@dataclass(frozen=True)
class _Spinner:
    """Lets time pass: takes in reports, watches the children, shows the progress."""

    node: Node
    executor: SingleThreadedExecutor
    children: Children
    progress: Progress
    show: Callable[[Progress], None]

    def until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Whether ``done`` came true in time."""
        give_up = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > give_up:
                return False
            self.executor.spin_once(timeout_sec=0.1)
            self.children.check()
            self.show(self.progress)
        return True


def _play(options: RunOptions, children: Children, spinner: _Spinner) -> Published:
    node, progress = spinner.node, spinner.progress
    space = _namespace()
    image, statistics = space + IMAGE_TOPIC, space + STATISTICS_TOPIC
    remap = ["-r", f"__ns:={space}", "-r", f"~/image:={image}"]
    topics = [space + topic for topic in RECORDED_TOPICS]
    # A recorded input can be read again, a camera's images are gone unless they are recorded as well.
    recorded = [*topics, image] if options.live else topics
    where = ["--storage", options.storage, "--strip", space]
    children.start("recorder", "deq_flow_ros.live.recorder", [str(options.bag), *recorded, *where])
    # A subscription is known to the node a moment after it is known here.
    parameters = ["-p", "always_on:=true"]
    parameters += [word for name, value in options.node_parameters.items() for word in ("-p", f"{name}:={value}")]
    children.start("flow_node", "deq_flow_ros.ros.flow_node", ["--ros-args", *remap, *parameters])

    progress.phase = "loading the model"
    _wait_until_active(spinner)
    progress.phase = "connecting"
    # Statistics have two listeners: the recorder and this process.
    wanted = dict.fromkeys(topics, 1) | {statistics: 2, image: 1}
    if not spinner.until(lambda: all(node.count_subscribers(t) >= n for t, n in wanted.items()), 20.0):
        raise children.failure("recorder", "did not subscribe to the outputs within 20 s")

    log = options.logs / "published.jsonl"
    log.unlink(missing_ok=True)
    arguments = [*options.play, "--log", str(log), "--wait-for-subscribers", "2" if options.live else "1"]
    children.start("player", "deq_flow_ros.ros.player", [*arguments, "--ros-args", *remap])
    progress.phase = "playing"
    try:
        spinner.until(lambda: children.processes["player"].poll() is not None, float("inf"))
    except KeyboardInterrupt:
        if not options.live:
            raise
        children.stop("player", 10.0)
    children.check()
    published = read_published(log)

    progress.phase = "finishing"
    _drain(spinner, len(published.stamps_ns))
    children.stop("flow_node", 15.0)
    children.stop("recorder", 60.0)
    return published


def _wait_until_active(spinner: _Spinner) -> None:
    """The node starts itself before it answers services: its first answer tells whether that went well."""
    client = spinner.node.create_client(GetState, f"{_namespace()}/flow_node/get_state")
    if not spinner.until(client.service_is_ready, READY_TIMEOUT_S):
        raise spinner.children.failure("flow_node", f"did not come up within {READY_TIMEOUT_S:g} s")
    give_up = time.monotonic() + READY_TIMEOUT_S
    answer = client.call_async(GetState.Request())
    # Asked again and again: the node may know our request before it knows where to send the answer, which is then lost.
    while not spinner.until(answer.done, 2.0):
        if time.monotonic() > give_up:
            raise spinner.children.failure("flow_node", f"did not start within {READY_TIMEOUT_S:g} s")
        client.remove_pending_request(answer)
        answer = client.call_async(GetState.Request())
    state = answer.result().current_state
    if state.id != State.PRIMARY_STATE_ACTIVE:
        raise spinner.children.failure("flow_node", f"could not start and is {state.label}")


def _drain(spinner: _Spinner, expected: int) -> None:
    """Wait until every frame is reported, or nothing has been heard for ``QUIET_S``."""
    progress = spinner.progress
    while progress.received < expected:
        before = progress.received
        if not spinner.until(lambda before=before: progress.received > before, QUIET_S):  # type: ignore[misc]
            break
    # The flow of the last frame is on its way when its report is there.
    spinner.until(lambda: False, 0.3)


def read_published(log: Path) -> Published:
    """Read the player's log.

    :raises ChildError: where there is none.
    """
    try:
        lines: Sequence[dict[str, int]] = [json.loads(line) for line in log.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ChildError(f"the player's log {log} cannot be read: {error}") from error
    if not lines:
        return Published([], 0.0)
    span = (lines[-1]["published_ns"] - lines[0]["published_ns"]) * 1e-9
    return Published([line["stamp_ns"] for line in lines], span * len(lines) / max(1, len(lines) - 1))
