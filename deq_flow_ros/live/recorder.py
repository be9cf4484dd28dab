# SPDX-License-Identifier: Apache-2.0
"""``python -m deq_flow_ros.live.recorder BAG TOPIC...``: record topics as they come, undecoded, into a rosbag2.

A topic is subscribed to once it has a publisher; SIGINT or SIGTERM ends the recording and closes the bag. The last
line on stdout is a JSON object of the number of messages per topic. Exit status: 0 recorded, 2 the bag cannot be
written, or a type is unknown.
"""

from __future__ import annotations

import importlib
import json
import sqlite3
import sys
import time
from collections.abc import Sequence

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy

from deq_flow_ros import UNUSABLE, UserError
from deq_flow_ros.command_line import CommandLine, exit_status
from deq_flow_ros.host import StopRequest
from deq_flow_ros.recordings import MediaError
from deq_flow_ros.recordings.bags import STORAGES, BagWriter
from deq_flow_ros.ros import process

DEPTH = 200
"""Messages per topic that may wait in the middleware while the disk is busy. Of more than that, the oldest are lost;
the account of the run then names the frames whose flow was not recorded."""
DRAIN_S = 0.5
"""After the request to stop, what has already arrived is still recorded, for at most this long."""


class Recorder(Node):
    """Subscribes to topics as their publishers appear.

    :param strip: a namespace that is left out of the topics' names in the bag.
    :param writer: of the bag; the callbacks raise its errors.
    """

    def __init__(self, topics: Sequence[str], strip: str, writer: BagWriter) -> None:
        super().__init__("recorder")
        self._strip, self._writer = strip, writer
        self._wanted = {self.resolve_topic_name(topic) for topic in topics}
        self.counts = {topic.removeprefix(strip): 0 for topic in sorted(self._wanted)}
        self.create_timer(0.1, self.subscribe_to_new)

    def subscribe_to_new(self) -> None:
        """Subscribe to every wanted topic that has a publisher by now.

        :raises MediaError: for a message type that is not installed.
        """
        types = dict(self.get_topic_names_and_types()) if self._wanted else {}
        for topic in sorted(self._wanted):
            publishers = self.get_publishers_info_by_topic(topic)
            if not publishers or topic not in types:
                continue
            # Reliable where every publisher offers it: a reliable subscriber never matches a best-effort publisher.
            reliable = all(info.qos_profile.reliability == ReliabilityPolicy.RELIABLE for info in publishers)
            reliability = ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT
            self._subscribe(topic, types[topic][0], QoSProfile(depth=DEPTH, reliability=reliability))
            self._wanted.discard(topic)

    def _subscribe(self, topic: str, msgtype: str, qos: QoSProfile) -> None:
        package, _, name = msgtype.split("/")
        try:
            message_class = getattr(importlib.import_module(f"{package}.msg"), name)
        except (ImportError, AttributeError) as error:
            raise MediaError(f"cannot record {topic}: its type {msgtype} is not installed here") from error

        recorded_as = topic.removeprefix(self._strip)

        def received(data: bytes) -> None:
            self._writer.write_raw(recorded_as, msgtype, data, time.time_ns())
            self.counts[recorded_as] += 1

        self.create_subscription(message_class, topic, received, qos, raw=True)
        self.get_logger().info(f"recording {topic} ({msgtype}, {qos.reliability.name.lower()})")


def record(bag: str, storage: str, topics: Sequence[str], strip: str, stop: StopRequest) -> dict[str, int]:
    """Record until stopped; returns the number of messages per topic.

    :raises MediaError: where the bag cannot be written.
    """
    try:
        with BagWriter(bag, storage) as writer:
            node, executor = Recorder(topics, strip, writer), SingleThreadedExecutor()
            executor.add_node(node)
            try:
                while not stop.requested:
                    executor.spin_once(timeout_sec=0.2)
                until, before = time.monotonic() + DRAIN_S, -1
                while time.monotonic() < until and sum(node.counts.values()) != before:
                    before = sum(node.counts.values())
                    for _ in range(20):
                        executor.spin_once(timeout_sec=0.005)
            finally:
                process.end_node(node)
            return node.counts
    except (OSError, sqlite3.Error) as error:  # the disk is full
        raise MediaError(f"recording to {bag} failed: {error}") from error


def main(args: Sequence[str] | None = None) -> int:
    """Run the process; returns its exit status."""
    args = sys.argv if args is None else args
    line = CommandLine("recorder", "Record topics into a new rosbag2 until interrupted.")
    line.add_argument("bag", help="directory of the new bag")
    line.add_argument("topics", nargs="+", help="topics to record")
    line.add_argument("--storage", choices=sorted(STORAGES), default="mcap", help="default: mcap")
    line.add_argument("--strip", default="", metavar="NAMESPACE", help="leave this out of the topics' names in the bag")
    options = line.parse_args(process.own_arguments(args))
    stop = process.start(args)

    def work() -> int:
        print(json.dumps(record(options.bag, options.storage, options.topics, options.strip, stop)), flush=True)
        return 0

    try:
        return exit_status(work, {UserError: UNUSABLE}, prefix="recorder", stream=sys.stderr)
    finally:
        rclpy.try_shutdown()


if __name__ == "__main__":
    sys.exit(main())
