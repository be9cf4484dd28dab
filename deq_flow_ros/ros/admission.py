# SPDX-License-Identifier: Apache-2.0
"""Which of the images that come from a camera are processed, decided before any work is done for them."""

from __future__ import annotations

from deq_flow_ros.ros.accounts import RATE_LIMITED
from deq_flow_ros.ros.camera_input import ReceivedFrame
from deq_flow_ros.stamps import StampOrder


class Admission:
    """The order of one camera's images.

    It is looked at where images come in, not in the stream behind: there a message that was sent twice would take the
    place of the image that waits.
    """

    def __init__(self) -> None:
        self._order = StampOrder()
        self._latest_ns: int | None = None

    def why_out(self, frame: ReceivedFrame) -> str | None:
        """Why an image is not processed; None if it is."""
        if frame.too_soon:
            return RATE_LIMITED
        return self._order.why_out(frame.stamp_ns)

    def went_back_ms(self, frame: ReceivedFrame) -> float:
        """By how much the clock was set back between the last image that was admitted and this one; else 0."""
        latest_ns, self._latest_ns = self._latest_ns, frame.stamp_ns
        return 0.0 if latest_ns is None else max(0.0, (latest_ns - frame.stamp_ns) / 1e6)
