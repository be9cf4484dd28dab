# SPDX-License-Identifier: Apache-2.0
"""Accounts of frames with a clock that a test moves, for tests of accounts and of what is said about them."""

from __future__ import annotations

from typing import Any

from std_msgs.msg import Header

from deq_flow_ros.ros.accounts import FrameAccounts
from deq_flow_ros.streaming import FlowInfo

HEADER = Header(frame_id="camera")


def info(**changes: Any) -> FlowInfo:
    """Of an ordinary warm pair: 4 iterations in 60 of 90 ms."""
    values = {
        "stamp_ns": 2,
        "previous_stamp_ns": 1,
        "direction": "forward",
        "iterations": 4,
        "stop_reason": "converged",
        "warm": True,
        "residual_px": 0.04,
        "reset_reason": None,
        "scale": 0.5,
        "stage_ms": {"encode": 10.0, "solve": 40.0},
        "latency_ms": 60.0,
        "budget_ms": 90.0,
        "starved": False,
    }
    return FlowInfo(**{**values, **changes})


class CameraAt:
    """The accounts of a camera that started long ago; time passes when it is told to.

    :ivar accounts: of its frames, in a window of 10 s.
    :ivar now_s: the time.
    """

    def __init__(self) -> None:
        self.now_s = 100.0
        self.accounts = FrameAccounts("cpu", "forward", clock=lambda: self.now_s)
        self.now_s += 1000.0

    def arrives(self, lost_before: int = 0) -> None:
        """An image comes, after some that were lost."""
        self.accounts.arrivals.append((self.now_s, lost_before))

    def runs(self, seconds: float = 10.0, every_s: float = 0.1, age_ms: float = 5.0, **changes: Any) -> None:
        """Images at ``1 / every_s`` Hz all of which are processed."""
        for _ in range(round(seconds / every_s)):
            self.arrives()
            self.accounts.processed(HEADER, info(**changes), {"wait": 2.0, "publish": 1.0}, age_ms)
            self.now_s += every_s

    def gives_no_flow(self, outcome: str, reason: str, seconds: float) -> None:
        """Images at 10 Hz all of which are "first" or "dropped"."""
        for _ in range(round(10 * seconds)):
            self.arrives()
            getattr(self.accounts, outcome)(HEADER, reason, 5.0)
            self.now_s += 0.1
