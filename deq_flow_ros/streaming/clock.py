# SPDX-License-Identifier: Apache-2.0
"""The time that deadlines and latencies are measured by, and that a simulation may replace."""

from __future__ import annotations

import time

import torch

from deq_flow_ros.streaming.costs import StageClock


class Clock:
    """The machine's own time."""

    def now_ns(self) -> int:
        """Time that never goes back, ns: ``time.monotonic_ns()``."""
        return time.monotonic_ns()

    def stages(self, device: torch.device, pixels: int) -> StageClock:
        """Times the stages of one update, of frames that are processed with so many pixels each."""
        return StageClock(device)


MACHINE = Clock()
