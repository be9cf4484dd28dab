# SPDX-License-Identifier: Apache-2.0
"""What is wrong with the frames of a recording, in a few sentences however long it is."""

from __future__ import annotations

from dataclasses import dataclass, field

from deq_flow_ros.evaluation.runner import Shot


@dataclass
class Problems:
    """What is wrong with the frames of a recording: one sentence a kind, however often it occurs."""

    first: dict[str, str] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)

    def note(self, kind: str, what: str) -> None:
        """One more; `kind` says what these frames are or do; `what` tells of the first."""
        self.first.setdefault(kind, what)
        self.count[kind] = self.count.get(kind, 0) + 1

    def check(self, previous: Shot | None, shot: Shot) -> None:
        """Look at a frame, after the one before."""
        if shot.image is None:
            self.note("cannot be read", f"frame {shot.index}: {shot.problem}")
        if previous is None:
            return
        if shot.stamp_ns <= previous.stamp_ns:
            stamps = f"frame {shot.index}: {shot.stamp_ns} ns after {previous.stamp_ns} ns"
            self.note("have a stamp that is not after the one before (see --stamps record)", stamps)
        if shot.image is not None and previous.image is not None and shot.image.shape != previous.image.shape:
            (h0, w0), (h1, w1) = previous.image.shape[:2], shot.image.shape[:2]
            self.note("have another size than the one before", f"frame {shot.index}: {w1}x{h1} after {w0}x{h0}")

    def sentences(self) -> list[str]:
        """For people."""
        return [f"frames that {kind}: {self.count[kind]}; the first is {what}" for kind, what in self.first.items()]
