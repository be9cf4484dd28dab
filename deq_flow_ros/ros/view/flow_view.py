# SPDX-License-Identifier: Apache-2.0
"""``flow_view``: subscribes to a flow node while somebody looks at its page, and puts up what that shows and says.

Exit status: 0 stopped, 2 a parameter cannot be, or the page cannot be served on this host and port.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import cv2
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image

from deq_flow_ros.command_line import USER_ERRORS
from deq_flow_ros.ros import process
from deq_flow_ros.ros.parameter_table import ParameterTable
from deq_flow_ros.ros.view import Board, ViewServer
from deq_flow_ros.ros.view.figures import FIELDS, NAMES, Figures, Pictures
from deq_flow_ros.settings import at_start, number

USAGE = """A flow node and its live pictures in a web page. It takes the arguments of ROS alone:

  ros2 run deq_flow_ros flow_view --ros-args -p node:=/flow_node -p port:=8080

docs/view.md describes the page and the parameters."""
Topic: TypeAlias = tuple[str, type]
"""Name and message type."""

MOST = 25
"""Messages taken for one picture at most; of a flood, the middleware drops the oldest."""


@dataclass(frozen=True)
class ViewSettings(ParameterTable):
    """The parameters of ``flow_view``, all read at the start."""

    node: str = at_start("flow_node", "name of the flow node; without a leading slash, in the namespace of this node")
    camera: str = at_start("", "name of its camera; empty = the one without a name")
    host: str = at_start("127.0.0.1", "address to serve the page on; 0.0.0.0 = all: whoever reaches it sees the camera")
    port: int = at_start(number(8080, 0, 65535), "port of the page; 0 = a free one")
    rate_hz: float = at_start(number(8.0, 0.5, 30.0, "Hz"), "pictures a second at most")
    width: int = at_start(number(480, 64, 4096, "px"), "width of a picture at most")


class FlowView(Node):
    """Looks at one camera of a flow node.

    Of pictures, only the newest message waits in the middleware until it is time for the next one; the others are never
    converted to Python, which would be most of the work.

    :param board: to put all up on; None: one that is served until ``close``.
    :raises ValueError: for names that cannot be.
    :raises OSError: where the page cannot be served on this host and port; the message says what to do.
    """

    def __init__(self, board: Board | None = None) -> None:
        super().__init__("flow_view")
        ViewSettings.declare(self)
        self.settings = ViewSettings.read(self)
        node, camera = self.settings.node, self.settings.camera
        try:
            self._flow_node = self.resolve_topic_name(node)
            self._prefix = self.resolve_topic_name("/".join(filter(None, [self._flow_node, camera])))
        except RuntimeError:
            raise ValueError(
                "node, camera: expected the name of a flow node, such as /flow_node, and that of its camera, if the "
                f"cameras have names, got {node!r} and {camera!r}"
            ) from None
        self._open: dict[str, tuple[Topic, Subscription]] = {}
        self._arrived: list[tuple[str, Any]] = []
        self._figures: Figures | None = None
        self._board, host = board or Board(), self.settings.host
        self._server = None if board else ViewServer(self._board, host, self.settings.port, NAMES)
        if self._server is not None:
            self._server.start()
            self.get_logger().info(f"the page is at {self._server.url}")
            if not self._server.local:
                port = self._server.server_port
                self.get_logger().warning(
                    f"whoever reaches this machine sees the camera, without a password: host is {host}. Safer is "
                    f"host:=127.0.0.1 and, where the browser is, ssh -L {port}:localhost:{port} ROBOT"
                )
        self._executor = SingleThreadedExecutor()  # last: what is refused above ends the process without one
        self._executor.add_node(self)

    def close(self) -> None:
        """Answer nobody any more."""
        if self._server is not None:
            self._server.close()

    def step(self) -> None:
        """Put up what is new, or see whether somebody looks; takes as long as there is time for it."""
        wanted, began_s = self._board.looked_at(), time.monotonic()
        if not wanted:
            self._fall_asleep()
            process.spin_once(self._executor, self)
            return
        if self._figures is None:
            self.get_logger().info(f"somebody looks: subscribed to {self._prefix}")
            self._figures = Figures(self._flow_node, self.settings.camera)
            self._pictures = Pictures(self.settings.width)
        figures = self._figures
        self._follow(self._topics(wanted, figures))
        imageless = "image" in wanted - self._open.keys() and figures.image_topic
        pictures = self._take_all(figures)
        if imageless:
            pictures["image"] = {"note": f"nobody publishes raw or compressed images on {figures.image_topic}"}
        self._board.put_up(figures.summary(self._running), pictures)
        time.sleep(max(0.0, began_s + 1.0 / self.settings.rate_hz - time.monotonic()))

    def _fall_asleep(self) -> None:
        if self._figures is not None:
            self._figures = None
            self._follow({})
            self._arrived.clear()
            self._board.clear()
            self.get_logger().info("nobody looks: subscribed to nothing")

    def _topics(self, wanted: set[str], figures: Figures) -> dict[str, Topic]:
        topics: dict[str, Topic] = {name: (f"{self._prefix}/{name}", Image) for name in FIELDS if name in wanted}
        topics["accounts"] = f"{self._prefix}/statistics", DiagnosticArray
        topics["diagnostics"] = "/diagnostics", DiagnosticArray
        if "image" in wanted and (images := self._images(figures.image_topic)):
            topics["image"] = images
        return topics

    def _images(self, topic: str) -> Topic | None:
        """Where the images are that the flow node takes: on this topic or beside it, as image_transport names it."""
        places = ((topic, Image), (f"{topic}/compressed", CompressedImage), (topic, CompressedImage)) if topic else ()
        for name, kind in places:
            offers = self.get_publishers_info_by_topic(name)
            if f"sensor_msgs/msg/{kind.__name__}" in {offer.topic_type for offer in offers}:
                return name, kind
        return None

    def _follow(self, topics: dict[str, Topic]) -> None:
        """Subscribe to these, and to nothing else."""
        for name, (topic, subscription) in list(self._open.items()):
            if topics.get(name) != topic:
                self.destroy_subscription(subscription)
                del self._open[name]
        for name, topic in topics.items():
            if name not in self._open:
                place, kind = topic
                depth = MOST if kind is DiagnosticArray else 1
                qos = QoSProfile(depth=depth, reliability=ReliabilityPolicy.BEST_EFFORT)
                self._open[name] = topic, self.create_subscription(kind, place, partial(self._take, name), qos)

    def _take(self, name: str, message: Any) -> None:
        self._arrived.append((name, message))

    def _take_all(self, figures: Figures) -> dict[str, dict[str, str]]:
        """Take what waits in the middleware; returns the pictures of it."""
        arrived, idle = self._arrived, 0
        while idle < 2 and len(arrived) < MOST:  # events of the middleware come in between
            before = len(arrived)
            process.spin_once(self._executor, self, 0.0)
            idle = idle + 1 if len(arrived) == before else 0
        newest = dict(arrived)
        for name, message in arrived:
            for status in message.status if name in ("accounts", "diagnostics") else ():
                values = {pair.key: pair.value for pair in status.values}
                if name == "accounts":
                    figures.take_account(values)
                else:
                    figures.take_status(ord(status.level), status.name, status.message, values)
        arrived.clear()
        return {name: self._pictures.draw(name, newest[name], figures.units) for name in NAMES if name in newest}

    def _running(self) -> Sequence[str]:
        """Names of the flow nodes that run, with those of their cameras."""
        suffix, kind = "/statistics", "diagnostic_msgs/msg/DiagnosticArray"
        found = [name for name, kinds in self.get_topic_names_and_types() if name.endswith(suffix) and kind in kinds]
        return [name.removesuffix(suffix) for name in found if self.count_publishers(name)]  # we ourselves subscribe


def main(args: Sequence[str] | None = None) -> int:
    """Run the process until SIGINT or SIGTERM; returns its exit status."""
    cv2.setNumThreads(1)  # the pictures are small, and the flow node needs the other cores
    return process.run(FlowView, "flow_view", USAGE, args, step=FlowView.step, errors=tuple(USER_ERRORS))


if __name__ == "__main__":
    sys.exit(main())
