# SPDX-License-Identifier: Apache-2.0
"""What every ROS process of this package does at its start: signals, memory, log of the libraries below it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import rclpy
from rclpy.signals import SignalHandlerOptions

from deq_flow_ros.host import StopRequest, keep_freed_memory


def start(args: Sequence[str] | None) -> StopRequest:
    """Initialise ROS, and take over the signals.

    ROS's own handlers would close the context at once, and with it whatever is still to be published.

    :param args: the command line, ROS arguments included.
    """
    stop = StopRequest().__enter__()  # for as long as the process lives
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="[%(levelname)s] [%(name)s]: %(message)s")
    rclpy.init(args=None if args is None else list(args), signal_handler_options=SignalHandlerOptions.NO)
    return stop
