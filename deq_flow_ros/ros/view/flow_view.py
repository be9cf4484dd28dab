# SPDX-License-Identifier: Apache-2.0
"""``flow_view``: the process that serves the page of a flow node.

Exit status: 0 stopped, 2 a parameter cannot be, or the page cannot be served on this host and port.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import cv2
import rclpy
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException

from deq_flow_ros.command_line import UNUSABLE, USER_ERRORS, exit_status
from deq_flow_ros.ros import process
from deq_flow_ros.ros.view.board import Board
from deq_flow_ros.ros.view.node import FlowView
from deq_flow_ros.ros.view.pictures import NAMES
from deq_flow_ros.ros.view.server import ViewServer

USAGE = """A flow node and its live pictures in a web page. It takes the arguments of ROS alone:

  ros2 run deq_flow_ros flow_view --ros-args -p node:=/flow_node -p port:=8080

docs/view.md describes the page and the parameters."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the process until SIGINT or SIGTERM; returns its exit status.

    :raises SystemExit: for a command line that is wrong (2), or asks for help (0).
    """
    process.parse_no_options("flow_view", USAGE, args)
    stop = process.start(args)

    def view() -> int:
        cv2.setNumThreads(1)  # the pictures are small, and the flow node needs the other cores
        board, node, server = Board(), None, None
        try:
            node = FlowView(board)
            server = ViewServer(board, node.settings.host, node.settings.port, NAMES)
            server.start()
            node.get_logger().info(f"the page is at {server.url}")
            if not server.local:
                node.get_logger().warning(
                    f"whoever reaches this machine sees the camera, without a password: host is {node.settings.host}. "
                    f"Safer is host:=127.0.0.1 and, where the browser is, ssh -L {server.server_port}:localhost:"
                    f"{server.server_port} ROBOT"
                )
            while not stop.requested:
                node.step()
        except ExternalShutdownException:
            pass
        finally:
            if server is not None:
                server.close()
            if node is not None:
                node.destroy_node()
        return 0

    try:
        return exit_status(view, {ParameterException: UNUSABLE, **USER_ERRORS}, prefix="flow_view", stream=sys.stderr)
    finally:
        rclpy.try_shutdown()


if __name__ == "__main__":
    sys.exit(main())
