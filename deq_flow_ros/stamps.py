# SPDX-License-Identifier: Apache-2.0
"""The times of a recording's frames: what is a gap, and how clocks that made a step are replayed."""

from __future__ import annotations

import math

GAP_PERIODS = 3.0
"""So many periods without a frame are a gap, where that is longer than ``max_gap_ms``: one frame may get lost."""
LONGEST_PERIOD_MS = 60_000.0
"""Frames further apart than this are no stream, however regularly they come."""
MAX_PAUSE_S = 5.0
"""Longest pause of a replay, unless another is asked for."""


def longest_gap_ms(max_gap_ms: float, period_ns: float) -> float:
    """How far apart two frames may be that belong together, by the rate of their stream.

    :param max_gap_ms: at least so far.
    :param period_ns: usual time between two frames.
    """
    return max(max_gap_ms, GAP_PERIODS * min(period_ns * 1e-6, LONGEST_PERIOD_MS))


class Pace:
    """How long after the frame before it each frame of a recording is due in a replay.

    A pause beyond the longest one, and a step back of the clock, are skipped: the next frame follows after a usual
    period.

    :param period_ns: usual time between two frames.
    :param max_pause_s: longest pause; three usual periods are none, whatever it is. 0: pauses are not skipped.
    """

    def __init__(self, period_ns: int, max_pause_s: float = MAX_PAUSE_S) -> None:
        self._longest_ns = 1e6 * longest_gap_ms(1e3 * max_pause_s, period_ns) if max_pause_s else math.inf
        self._period_ns = min(period_ns, int(1e6 * LONGEST_PERIOD_MS))
        self._last_ns: int | None = None

    def step(self, record_ns: int) -> tuple[int, str | None]:
        """Take the next frame.

        :param record_ns: when it was recorded.
        :returns: time after the frame before, in ns, 0 for the first; and what was skipped, if anything.
        """
        last_ns, self._last_ns = self._last_ns, record_ns
        step_ns = 0 if last_ns is None else record_ns - last_ns
        if step_ns < 0:
            return self._period_ns, f"the clock of the recording steps back by {-step_ns * 1e-9:.1f} s"
        if step_ns > self._longest_ns:
            return self._period_ns, f"the recording pauses for {step_ns * 1e-9:.1f} s"
        return step_ns, None
