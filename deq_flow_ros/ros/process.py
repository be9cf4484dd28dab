# SPDX-License-Identifier: Apache-2.0
"""What every process of this package does at its start and end: signals, memory, log of the libraries below."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from types import FrameType

import rclpy
from rclpy.signals import SignalHandlerOptions

from deq_flow_ros.host import keep_freed_memory


class StopRequest:
    """Set by SIGINT and SIGTERM, so that a process can finish the frame in hand and say how many it had.

    ROS's own handlers would close the context at once, and whatever is still to be published with it. A plain
    attribute, because a lock taken in a signal handler can meet itself. Under `ros2 launch` Ctrl-C arrives twice; the
    second one changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def start(args: Sequence[str] | None) -> StopRequest:
    """Initialise ROS with `args` (the command line, ROS arguments included) and take over the signals."""
    stop = StopRequest()
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="[%(levelname)s] [%(name)s]: %(message)s")
    rclpy.init(args=None if args is None else list(args), signal_handler_options=SignalHandlerOptions.NO)
    return stop
