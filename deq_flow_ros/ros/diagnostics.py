# SPDX-License-Identifier: Apache-2.0
"""``/diagnostics``: how a node has been doing, now and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.timer import Timer
from std_msgs.msg import Header

STEADY_CLOCK = Clock(clock_type=ClockType.STEADY_TIME)
"""For timers that must run on while simulated time stands still, as before a bag is played."""


class Diagnostics:
    """Publishes what a node says of itself.

    :param statuses: what that is at the time.
    """

    def __init__(self, node: Node, statuses: Callable[[], Sequence[DiagnosticStatus]]) -> None:
        self._node, self._statuses = node, statuses
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._timer: Timer | None = None

    def publish_every(self, period_s: float) -> None:
        """From now on in this period, also while simulated time stands still."""
        if self._timer is not None:
            self._node.destroy_timer(self._timer)
        self._timer = self._node.create_timer(period_s, self._publish, clock=STEADY_CLOCK)

    def _publish(self) -> None:
        header = Header(stamp=self._node.get_clock().now().to_msg())
        self._publisher.publish(DiagnosticArray(header=header, status=self._statuses()))
