# SPDX-License-Identifier: Apache-2.0
"""`flow_node` and its cameras in the process of a test: images go to callbacks, without a middleware between."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import rclpy
import torch
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.lifecycle import LifecycleNode
from sensor_msgs.msg import Image

from deq_flow_ros.ros.flow_node import FlowNode

MS = 1_000_000


@contextmanager
def configured_node(*parameters: str) -> Iterator[FlowNode]:
    """A node in this process; what it sets for the whole process is put back."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    quick = ("warm_up_width:=0", "warm_up_height:=0", "latency_budget_ms:=0.0", "max_iterations:=1", "always_on:=true")
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


def image(value: int) -> Image:
    """An image whose left half has one value, and whose right half another; the value is its stamp in ms as well."""
    message = Image(height=32, width=32, step=96, encoding="rgb8", data=(bytes([value]) * 48 + bytes([99]) * 48) * 32)
    message.header.stamp.nanosec = value * MS
    return message


def service(node: FlowNode, name: str, request: Any, response: Any) -> Any:
    """The answer of a service of a node."""
    return next(s for s in node.services if s.srv_name.endswith(f"/{name}")).callback(request, response)


def deliver(node: FlowNode, message: Image, topic: str = "/flow_node/image") -> None:
    """Hand an image to a node, as if it had come on a topic just now."""
    info = {"received_timestamp": 0, "publication_sequence_number": 0}
    next(s for s in node.subscriptions if s.topic_name == topic).callback(message, info)


class Said:
    """The accounts that the cameras of a node publish.

    :ivar messages: what each says, by topic.
    :ivar failing: called with each message before it is published.
    """

    def __init__(self, node: LifecycleNode, monkeypatch: Any) -> None:
        self.messages: dict[str, list[str]] = {}
        self.last: dict[str, str] = {}
        self.failing: Callable[[str], None] = lambda message: None
        for publisher in node.publishers:
            if publisher.topic_name.endswith("/statistics"):
                said = self.messages.setdefault(publisher.topic_name, [])
                monkeypatch.setattr(publisher, "publish", lambda account, said=said: self._take(said, account))

    def all(self) -> list[str]:
        """Of all cameras together."""
        return [message for said in self.messages.values() for message in said]

    def wait_for(self, number: int) -> None:
        """Wait until so many were published."""
        give_up = time.monotonic() + 10.0
        while len(self.all()) < number:
            assert time.monotonic() < give_up, self.messages
            time.sleep(0.001)

    def _take(self, said: list[str], account: DiagnosticArray) -> None:
        status = account.status[0]
        said.append(status.message)
        self.last = {pair.key: pair.value for pair in status.values}
        self.failing(status.message)
