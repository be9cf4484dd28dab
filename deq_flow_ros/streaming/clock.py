# SPDX-License-Identifier: Apache-2.0
"""The time that deadlines and latencies are measured by, and that a simulation may replace."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deq_flow_ros.streaming.costs import StageTimes


class StageClock(StageTimes):
    """Times of stages on the device that does the work.

    :param device: that does it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        super().__init__(self._recorded if device.type == "cuda" else None)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage that begins here, whatever was before it."""
        self.restart()
        yield
        self.lap(name)

    def _recorded(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class Clock:
    """The machine's own time."""

    now_ns = staticmethod(time.monotonic_ns)
    """Time that never goes back, ns."""

    def stages(self, device: torch.device, pixels: int) -> StageTimes:
        """Times the stages of work on frames that are processed with so many pixels each."""
        return StageClock(device)


MACHINE = Clock()
