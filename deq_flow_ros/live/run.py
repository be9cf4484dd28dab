# SPDX-License-Identifier: Apache-2.0
"""Plays an input through the flow node and records what comes out: player and node are processes of their own."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import Image

from deq_flow_ros.host import ChildError, Children
from deq_flow_ros.imaging import MediaError
from deq_flow_ros.recordings import bags
from deq_flow_ros.recordings.bag_source import IMAGE
from deq_flow_ros.ros import process

RECORDED_TOPICS = (bags.FLOW_TOPIC, bags.COLOR_TOPIC, bags.RESIDUAL_TOPIC, bags.STATISTICS_TOPIC)
"""Names in the recording. While a run lasts, they stand in a namespace of its own, so that neither a robot nor another
run in the same ROS domain gets mixed up with it.
"""
QOS = QoSProfile(depth=200, reliability=ReliabilityPolicy.RELIABLE)
"""So many messages of a topic may wait while the disk is busy. Of more than that, the oldest are lost; the account of
the run then names the frames whose flow was not recorded."""
READY_TIMEOUT_S = 120.0
"""For loading the model, warming it up and discovery; a first run on a busy machine takes its time."""
QUIET_S, LAST_S = 3.0, 0.5
"""After the player's end, no more is to come if nothing came for ``QUIET_S``, or ``LAST_S`` once all reports are here:
the flow of the last frame may be on its way then."""


@dataclass(frozen=True)
class RunOptions:
    """What to play, with which parameters, and where to record it.

    :ivar play: the arguments of the player: the input, and options.
    :ivar live: whether the input is a camera, whose images are recorded as well, since they cannot be read again.
    """

    play: Sequence[str]
    live: bool
    node_parameters: Mapping[str, str]
    bag: Path
    logs: Path
    storage: str = "mcap"


@dataclass(frozen=True)
class Published:
    """What the player published: stamps in ns, and how long it took, in s, the last frame's period included."""

    stamps_ns: list[int]
    seconds: float


def prepare_environment(profiles: Path, logs: Path) -> None:
    """Keep the run to this machine and to itself: a ROS domain of its own, unless the user has chosen one.

    :param profiles: of Fast DDS, in ``config/fastdds.xml``.
    """
    # Domains above 101 map to ports that Linux hands out to others.
    os.environ.setdefault("ROS_DOMAIN_ID", str(20 + os.getpid() % 80))
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    os.environ.setdefault("FASTRTPS_DEFAULT_PROFILES_FILE", str(profiles))
    os.environ.setdefault("ROS_LOG_DIR", str(logs / "ros"))


def run_live(options: RunOptions, show: Callable[[str], None]) -> Published:
    """Play the input through the node and record its outputs.

    On return all processes have ended and the bag is closed. On a live input, Ctrl-C ends the stream, not the run.

    :param show: called every few seconds with a line that tells how it goes.
    :raises ChildError: when a process fails.
    :raises MediaError: where the recording cannot be written.
    """
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    node = Node("evaluate_bag")
    try:
        with bags.BagWriter(options.bag, options.storage) as writer, Children(options.logs) as children:
            return _Run(options, node, writer, children, show).play()
    except (OSError, sqlite3.Error) as error:  # the disk is full
        raise MediaError(f"recording to {options.bag} failed: {error}") from error
    finally:
        process.end_node(node)
        rclpy.try_shutdown()


class _Run:
    """One run, and what has come of it so far."""

    def __init__(
        self, options: RunOptions, node: Node, writer: bags.BagWriter, children: Children, show: Callable[[str], None]
    ) -> None:
        self.options, self.node, self.writer, self.children, self.show = options, node, writer, children, show
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(node)
        self.space = f"/evaluate_{os.getpid()}"
        self.phase, self.latency, self.shown_s = "loading the model", "", 0.0
        self.messages = self.reports = self.dropped = 0
        for topic in (*RECORDED_TOPICS, *([bags.IMAGE_TOPIC] if options.live else [])):
            kind = DiagnosticArray if topic == bags.STATISTICS_TOPIC else Image
            node.create_subscription(kind, self.space + topic, partial(self.record, topic), QOS, raw=True)

    def record(self, topic: str, data: bytes) -> None:
        """Take in a message as it came."""
        statistics = topic == bags.STATISTICS_TOPIC
        self.writer.write_raw(topic, bags.DIAGNOSTIC_ARRAY if statistics else IMAGE, data, time.time_ns())
        self.messages += 1
        if statistics:
            report = bags.report_of(deserialize_message(data, DiagnosticArray))
            self.reports += 1
            self.dropped += report.outcome == "dropped"
            if report.outcome == "processed":
                self.latency = f", latency {report.number('latency_ms'):.1f} ms"

    def step(self) -> None:
        """Take in what has come, look after the processes, and tell how it goes."""
        self.executor.spin_once(timeout_sec=0.1)
        self.children.check()
        if time.monotonic() - self.shown_s > 3.0:
            self.shown_s = time.monotonic()
            self.show(f"{self.phase}: {self.reports} frames, {self.dropped} dropped{self.latency}")

    def play(self) -> Published:
        """Start the processes one after the other, and end them."""
        options, children, image = self.options, self.children, self.space + bags.IMAGE_TOPIC
        remap = ["-r", f"__ns:={self.space}", "-r", f"~/image:={image}"]
        # Here we are known to the node a moment later than it is to us: it must not wait for us.
        parameters = {**options.node_parameters, "autostart": "true", "exit_on_failure": "true", "always_on": "true"}
        given = [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
        children.start("flow_node", "deq_flow_ros.ros.flow_node", ["--ros-args", *remap, *given])
        listeners = 1 + options.live  # of the images: the node, and for a camera also we

        def ready() -> bool:
            outputs = (self.node.count_publishers(self.space + topic) for topic in RECORDED_TOPICS)
            return self.node.count_subscribers(image) >= listeners and all(outputs)

        give_up = time.monotonic() + READY_TIMEOUT_S
        while not ready():
            if time.monotonic() > give_up:
                raise children.failure("flow_node", f"was not ready within {READY_TIMEOUT_S:g} s")
            self.step()
        log = options.logs / "published.jsonl"
        log.unlink(missing_ok=True)
        play = [*options.play, "--log", str(log), "--wait-for-subscribers", str(listeners)]
        children.start("player", "deq_flow_ros.ros.player", [*play, "--ros-args", *remap])
        self.phase = "playing"
        try:
            while children.processes["player"].poll() is None:
                self.step()
        except KeyboardInterrupt:
            if not options.live:
                raise
            children.stop("player", 10.0)
        children.check()
        published, self.phase = read_published(log), "finishing"
        before, heard_s = self.messages, time.monotonic()
        while time.monotonic() - heard_s < (LAST_S if self.reports >= len(published.stamps_ns) else QUIET_S):
            self.step()
            if self.messages > before:
                before, heard_s = self.messages, time.monotonic()
        children.stop("flow_node", 15.0)
        return published


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
