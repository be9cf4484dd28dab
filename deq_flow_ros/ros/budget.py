# SPDX-License-Identifier: Apache-2.0
"""When a frame's budget starts to count, and what is said of budgets: what they cost, and that one cannot be met."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from rclpy.impl.rcutils_logger import RcutilsLogger

from deq_flow_ros.ros.accounts import LATELY, STARVED_SHARE
from deq_flow_ros.ros.messages import ReceivedFrame
from deq_flow_ros.streaming import FlowInfo

MAX_STAMP_AGE_MS = 10_000.0
"""Oldest stamp that is believed where the budget counts from it."""
UNMET_REMEDY = (
    "raise latency_budget_ms, use a faster device, or lower min_scale, which helps until the short side of the images "
    "is processed at 96 px"
)
"""What to do where one iteration at the lowest scale takes longer than the budget."""
QUIET_S = 60.0
"""Least time between two words about the same; it doubles from one to the next."""


class BudgetWords:
    """Says what the budget costs: when it is so, and rarely.

    :param scale: that at which no word is needed.
    :param clock: seconds.
    """

    def __init__(self, logger: RcutilsLogger, scale: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger, self._clock = logger, clock
        self._scale = scale
        self._lately: deque[FlowInfo] = deque(maxlen=LATELY)
        self._unmet = False
        self._next_s, self._quiet_s = 0.0, QUIET_S

    def start(self, frame: ReceivedFrame) -> tuple[int, str]:
        """When the budget of a frame starts to count, and from what: its "stamp", or else its "arrival"."""
        if frame.age_ms is not None and 0.0 <= frame.age_ms <= MAX_STAMP_AGE_MS:
            return frame.arrival_ns - round(1e6 * frame.age_ms), "stamp"
        if frame.age_ms is None:
            what = "use_sim_time is set, but no /clock has come"
        else:
            what = f"by their stamps the images are {frame.age_ms / 1000:.1f} s old on arrival"
        self._logger.warning(
            f"latency_from is stamp, but {what}, expected 0 to {MAX_STAMP_AGE_MS / 1000:.0f} s: the budget counts from "
            "their arrival; synchronise the clocks of camera and node, or set latency_from to arrival",
            throttle_duration_sec=QUIET_S,
        )
        return frame.arrival_ns, "arrival"

    def report(self, info: FlowInfo) -> None:
        """Take in a flow field, and say what has changed, if anything."""
        self._lately.append(info)
        if len(self._lately) < LATELY:
            return
        starved, now_s = sum(each.starved for each in self._lately), self._clock()
        if starved >= STARVED_SHARE * LATELY:
            if not self._unmet or now_s >= self._next_s:
                self._warn(info, starved)
                self._quiet_s *= 2 if self._unmet else 1
                self._unmet, self._next_s = True, now_s + self._quiet_s
        elif self._unmet:
            if not starved and now_s >= self._next_s:
                self._unmet, self._scale = False, info.scale
                self._logger.info(f"the budget of {info.budget_ms:g} ms is met again, at scale {info.scale:.3g}")
        elif {each.scale for each in self._lately} == {info.scale} != {self._scale} and now_s >= self._next_s:
            self._logger.info(f"processing scale changed from {self._scale:.3g} to {info.scale:.3g}")
            self._scale, self._next_s = info.scale, now_s + QUIET_S

    def _warn(self, info: FlowInfo, starved: int) -> None:
        latest_ms = max(each.latency_ms for each in self._lately)
        self._logger.warning(
            f"the budget of {info.budget_ms:g} ms cannot be met: of the last {LATELY} flow fields {starved} were late "
            f"with a single iteration at the lowest scale, {info.scale:.3g}, by up to {latest_ms:.0f} ms. Each image "
            f"gets that one iteration, its flow comes late, and the newest image wins. {UNMET_REMEDY.capitalize()}"
        )
