# SPDX-License-Identifier: Apache-2.0
"""The times of a stream's frames: which to leave out, what is a gap, and how clocks that made a step are replayed."""

from __future__ import annotations

import math

GAP_PERIODS = 3.0
"""So many periods without a frame are a gap, where that is longer than ``max_gap_ms``: one frame may get lost."""
LEFT_OUT = "left out"
"""How every reason ends why a frame takes no part in its stream."""
SAME_STAMP = f"the stamp of the frame before: {LEFT_OUT}"
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


class StampOrder:
    """Finds frames that do not fit into the order of the stamps, so that one of them does not end a stream.

    A message that was sent twice, a late one, or one with a stamp of zero is left out. Where a second frame comes after
    the first one that was late, the time did go back, and the stream starts anew from there.
    """

    def __init__(self) -> None:
        self._last_ns: int | None = None
        self._late_ns: int | None = None

    def why_out(self, stamp_ns: int) -> str | None:
        """Why the next frame is to be left out; None if it is to be taken."""
        last_ns, late_ns = self._last_ns, self._late_ns
        if last_ns is None or stamp_ns > last_ns or (late_ns is not None and late_ns < stamp_ns < last_ns):
            self._last_ns, self._late_ns = stamp_ns, None
            return None
        if stamp_ns == last_ns:
            self._late_ns = None  # the clock is where it was
            return SAME_STAMP
        self._late_ns = stamp_ns
        return f"stamped {(last_ns - stamp_ns) / 1e6:.1f} ms before the frame before: {LEFT_OUT}"


class Pace:
    """How long after the frame before it each frame of a recording is due in a replay.

    A pause beyond the longest one, and a step back, are skipped: the next frame follows after a usual period. So
    neither a clock that was set while a robot recorded nor an hour without a frame holds up a replay.

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
