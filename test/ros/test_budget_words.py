# SPDX-License-Identifier: Apache-2.0
"""What the log says of the budget: true, and rarely."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("rclpy", reason="needs ROS 2")
from frame_accounts import info

from deq_flow_ros.ros.accounts import BudgetWords


class Log:
    """A logger and a clock: 10 fields a second."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.now_s = 0.0
        self.words = BudgetWords(self, 0.5, lambda: self.now_s)  # type: ignore[arg-type]

    def info(self, text: str) -> None:
        """Of a logger."""
        self.said.append(text)

    warning = info

    def fields(self, count: int, **changes: Any) -> None:
        """So many flow fields come."""
        for _ in range(count):
            self.words.report(info(**changes))
            self.now_s += 0.1


def test_a_budget_that_is_missed_now_and_then_is_not_said_to_be_impossible() -> None:
    """For minutes "cannot be met" and "scale changed" came in turn, of a budget that was met most of the time."""
    log = Log()
    for _ in range(100):
        log.fields(8, starved=True, latency_ms=120.0, scale=0.25)
        log.fields(12, scale=0.625)
    assert log.said == []


def test_a_budget_that_cannot_be_met_is_said_rarely_and_that_it_is_met_again() -> None:
    """A log that is full of one line hides the others."""
    log = Log()
    log.fields(6000, starved=True, latency_ms=120.0, scale=0.25)
    assert len(log.said) == 4 and "the last 20 flow fields 15 were" not in log.said[0]
    assert all("cannot be met: of the last 20 flow fields 20 were late" in line for line in log.said)
    log.fields(6000)
    assert log.said[4:] == ["the budget of 90 ms is met again, at scale 0.5"]


def test_a_scale_is_told_when_it_stays() -> None:
    """What changes with each image is of no use to anybody."""
    log = Log()
    log.fields(700, scale=0.25)
    assert log.said == ["processing scale changed from 0.5 to 0.25"]
    for _ in range(100):
        log.fields(15, scale=0.25)
        log.fields(15, scale=0.375)
    assert len(log.said) == 1
