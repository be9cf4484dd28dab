# SPDX-License-Identifier: Apache-2.0
"""``python -m deq_flow_ros.live.recorder BAG TOPIC...``: record topics as they come, undecoded, into a rosbag2.

A topic is subscribed to once it has a publisher; SIGINT or SIGTERM ends the recording and closes the bag. The last
line on stdout is a JSON object of the number of messages per topic. Exit status: 0 recorded, 2 the bag cannot be
written, or not as fast as messages come, or a type is unknown.
"""

from __future__ import annotations

import importlib
import json
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy

from deq_flow_ros.command_line import CommandLine, exit_status
from deq_flow_ros.errors import UNUSABLE, UserError
from deq_flow_ros.host import StopRequest
from deq_flow_ros.recordings import MediaError
from deq_flow_ros.recordings.bags import STORAGES, BagWriter
from deq_flow_ros.ros import process

DEPTH = 200
"""Messages per topic that may wait in the middleware; a recorder must not lose the frames of a busy moment."""
MAX_BACKLOG_BYTES = 1 << 30
"""Of messages that wait for the disk; with more, the recording ends with an error."""
DRAIN_S = 0.5
"""After the request to stop, what has already arrived is still recorded, for at most this long."""


Message = tuple[str, str, bytes, int]
"""Topic, type, serialized message, time of recording in ns."""


class Backlog:
    """Messages on their way from one thread to another.

    :param max_bytes: of messages that may wait at a time.
    """

    def __init__(self, max_bytes: int = MAX_BACKLOG_BYTES) -> None:
        self._max_bytes = max_bytes
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        # Each has one writer, so that neither needs a lock.
        self._put_bytes = self._taken_bytes = 0

    def put(self, message: Message) -> None:
        """Append a message.

        :raises MediaError: where there is no room for it: none may get lost unnoticed.
        """
        size, waiting = len(message[2]), self._put_bytes - self._taken_bytes
        if waiting + size > self._max_bytes:
            raise MediaError(
                f"the disk is too slow: {waiting / 1e6:.0f} MB wait to be written, at most {self._max_bytes / 1e6:.0f} "
                "MB may; record to a faster disk, play slower (--rate), or use smaller images"
            )
        self._put_bytes += size
        self._messages.put(message)

    def close(self) -> None:
        """Say that no more is to come."""
        self._messages.put(None)

    def __iter__(self) -> Iterator[Message]:
        """The messages in turn, waiting for each, until ``close``; one counts until the next is asked for."""
        while (message := self._messages.get()) is not None:
            yield message
            self._taken_bytes += len(message[2])


class Recorder(Node):
    """Subscribes to topics as their publishers appear.

    :param strip: a namespace that is left out of the topics' names in the bag.
    :param messages: where serialized messages go; the callbacks raise ``MediaError`` where it is full.
    """

    def __init__(self, topics: Sequence[str], strip: str, messages: Backlog) -> None:
        super().__init__("recorder")
        self._strip = strip
        self._messages = messages
        self._wanted = {self.resolve_topic_name(topic) for topic in topics}
        self.counts = {self.bag_topic(topic): 0 for topic in sorted(self._wanted)}
        self.create_timer(0.1, self.subscribe_to_new)

    def bag_topic(self, topic: str) -> str:
        """Name of a topic in the bag."""
        return topic.removeprefix(self._strip)

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

        name = self.bag_topic(topic)

        def received(data: bytes) -> None:
            self._messages.put((name, msgtype, data, time.time_ns()))
            self.counts[name] += 1

        self.create_subscription(message_class, topic, received, qos, raw=True)
        self.get_logger().info(f"recording {topic} ({msgtype}, {qos.reliability.name.lower()})")


def _write(bag: str, storage: str, messages: Backlog, failure: list[Exception]) -> None:
    """Body of the writing thread, so that a slow disk delays no subscription; ends when ``messages`` is closed."""
    try:
        with BagWriter(bag, storage) as writer:  # here, because SQLite binds a connection to its thread
            for message in messages:
                writer.write_raw(*message)
    except Exception as error:  # disk full, unknown type: reported by the main thread
        failure.append(error)


def record(bag: str, storage: str, topics: Sequence[str], strip: str, stop: StopRequest) -> dict[str, int]:
    """Record until stopped; returns the number of messages per topic.

    :raises MediaError: where the bag cannot be written, or not fast enough.
    """
    messages = Backlog()
    failure: list[Exception] = []
    node = Recorder(topics, strip, messages)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    thread = threading.Thread(target=_write, args=(bag, storage, messages, failure), name="bag_writer")
    thread.start()
    try:
        while not stop.requested and not failure:
            executor.spin_once(timeout_sec=0.2)
        _drain(executor, node)
    finally:
        messages.close()
        thread.join()
        node.destroy_node()
    if failure:
        raise MediaError(f"recording to {bag} failed: {failure[0]}") from failure[0]
    return node.counts


def _drain(executor: SingleThreadedExecutor, node: Recorder) -> None:
    until, before = time.monotonic() + DRAIN_S, -1
    while time.monotonic() < until and sum(node.counts.values()) != before:
        before = sum(node.counts.values())
        for _ in range(20):
            executor.spin_once(timeout_sec=0.005)


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
        return exit_status(work, {UserError: UNUSABLE, OSError: UNUSABLE}, prefix="recorder", stream=sys.stderr)
    finally:
        rclpy.try_shutdown()


if __name__ == "__main__":
    sys.exit(main())
