# SPDX-License-Identifier: Apache-2.0
"""When a frame's result has to be there."""

from __future__ import annotations

from dataclasses import dataclass

# Share of the time allowed that is left for what no stage measures: other threads, the scheduler.
RESERVE = 0.03


@dataclass(frozen=True)
class Deadline:
    """A time on a stream's clock.

    :ivar at_ns: when the result has to be there.
    :ivar work_until_ns: when the work should end: a reserve before.
    """

    at_ns: int
    work_until_ns: int

    @classmethod
    def soonest(
        cls, arrival_ns: int, budget_ms: float | None, limit_ms: float | None, now_ns: int
    ) -> Deadline | None:
        """Whichever comes first: the budget, which counts from the arrival, or the limit, which counts from now.

        :returns: None without either.
        """
        ends = []
        if budget_ms is not None:
            ends.append((arrival_ns + round(1e6 * budget_ms), budget_ms))
        if limit_ms is not None:
            ends.append((now_ns + round(1e6 * limit_ms), max(limit_ms, 0.0)))
        if not ends:
            return None
        at_ns, allowed_ms = min(ends)
        return cls(at_ns, at_ns - round(1e6 * RESERVE * allowed_ms))

    def left_ms(self, now_ns: int) -> float:
        """The time until then; negative when it has passed."""
        return (self.at_ns - now_ns) / 1e6
