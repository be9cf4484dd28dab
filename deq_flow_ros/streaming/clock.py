# SPDX-License-Identifier: Apache-2.0
"""The time that deadlines and latencies are measured by, and that a simulation may replace."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


class StageClock:
    """Times of the named stages of one piece of work, in ms, on the device that does it, without making it wait.

    A stage lasts from the end of the one before it, so that the stages together are all of the time that passed.

    :param device: what does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._laps: list[tuple[str, object, object]] = []
        self._last = self._mark()

    def restart(self) -> None:
        """Let the next stage begin now: what was done since the last one belongs to none."""
        self._last = self._mark()

    def lap(self, name: str) -> None:
        """The stage of this name ends here; one that occurs twice counts both."""
        now = self._mark()
        self._laps.append((name, self._last, now))
        self._last = now

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage that begins here, whatever was before it."""
        self.restart()
        yield
        self.lap(name)

    def counted(self, function: Callable[..., T]) -> Callable[..., T]:
        """The function as it is; a clock that simulates time lets some pass with each call."""
        return function

    def read(self, wait: bool = True) -> dict[str, float]:
        """The times. On CUDA this waits for the last stage; or leaves out the stages that are not done."""
        times: dict[str, float] = {}
        for name, start, end in self._laps:
            if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                if not wait and not end.query():
                    continue
                end.synchronize()
                value = start.elapsed_time(end)
            else:
                value = 1e3 * (float(end) - float(start))  # type: ignore[arg-type]
            times[name] = times.get(name, 0.0) + value
        return times

    def _mark(self) -> object:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class Clock:
    """The machine's own time."""

    def now_ns(self) -> int:
        """Time that never goes back, ns: ``time.monotonic_ns()``."""
        return time.monotonic_ns()

    def stages(self, device: torch.device, pixels: int) -> StageClock:
        """Times the stages of work on frames that are processed with so many pixels each."""
        return StageClock(device)


MACHINE = Clock()
