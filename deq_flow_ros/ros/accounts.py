# SPDX-License-Identifier: Apache-2.0
"""The account of every frame of one camera: counted, worded as a message, and kept for as long as a window lasts."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from std_msgs.msg import Header

from deq_flow_ros.imaging import stamp_to_ns
from deq_flow_ros.recordings.files import STATUS_NAME
from deq_flow_ros.ros.process import status_of
from deq_flow_ros.streaming.interface import SUPERSEDED, FlowInfo, pair_values

RATE_LIMITED = "skipped to keep to max_rate_hz"
UNHEARD = "nobody subscribes to the flow"
BY_DESIGN = (SUPERSEDED, RATE_LIMITED, UNHEARD)
"""Reasons of drops that are no fault of the images; every other reason is one."""
WINDOW_S = 10.0
FEWEST_AGES = 9
"""Of images, to tell how their stamps advance."""
MAX_REASON = 500
"""Characters kept of a reason; it may quote the camera."""


@lru_cache(maxsize=256)
def kind_of(reason: str) -> str:
    """A reason without what differs from frame to frame: numbers become N, quoted words '...', and it is cut short.

    "expected 9216 bytes, got 9209" and "expected 9216 bytes, got 12" are of one kind. Digits of names are no numbers.
    """
    return re.sub(r"\b\d+(\.\d+)?(x\d+)?\b", "N", re.sub(r"'[^']*'", "'...'", reason[:MAX_REASON]))[:80].strip()


@dataclass(frozen=True)
class Sample:
    """One frame: when it had its account, and what that says."""

    time_s: float
    outcome: str
    reason: str
    age_ms: float | None
    info: FlowInfo | None
    stage_ms: Mapping[str, float]


@dataclass(frozen=True)
class Window:
    """What happened to one camera's frames within ``seconds``; ``full`` if images have been coming all the time."""

    seconds: float
    full: bool
    received: int
    lost: int
    samples: Sequence[Sample]

    @cached_property
    def infos(self) -> list[FlowInfo]:
        """Of the processed frames, oldest first."""
        return [sample.info for sample in self.samples if sample.info is not None]

    @cached_property
    def ages_ms(self) -> list[float]:
        """Of all frames whose age is known."""
        return [sample.age_ms for sample in self.samples if sample.age_ms is not None]

    @cached_property
    def drift(self) -> float:
        """By how many seconds stamps fall behind in each second; 0 for a single odd stamp or step of a clock."""
        if not self.full or len(self.ages_ms) < FEWEST_AGES:
            return 0.0
        first, middle, last = (float(np.median(third)) for third in np.array_split(self.ages_ms, 3))
        steps_ms = middle - first, last - middle
        return 3e-3 * min(steps_ms, key=abs) / self.seconds if steps_ms[0] * steps_ms[1] > 0 else 0.0

    @cached_property
    def drops(self) -> Counter[str]:
        """Dropped frames by kind of reason."""
        return Counter(kind_of(sample.reason) for sample in self.samples if sample.outcome == "dropped")

    def latest_reason(self, kind: str) -> str:
        """What was said of the last frame of a kind, numbers and names included."""
        return next(sample.reason for sample in reversed(self.samples) if kind_of(sample.reason) == kind)

    @cached_property
    def resets(self) -> list[str]:
        """Why the stream started anew, oldest first: with a first frame, or with a pair whose state was of no use."""
        resets, before = [], ""
        for sample in self.samples:
            if sample.outcome == "first":
                resets.append(sample.reason)
            elif sample.info and sample.info.reset_reason and before != "first":  # the pair after it has its reason
                resets.append(sample.info.reset_reason)
            before = before if sample.outcome == "dropped" else sample.outcome
        return resets

    @cached_property
    def stage_means(self) -> dict[str, float]:
        """Mean time by stage over all processed frames, in ms; a stage that a frame did not have counts as 0."""
        totals: Counter[str] = Counter()
        for sample in self.samples:
            totals.update(sample.stage_ms)
        return {name: total / len(self.infos) for name, total in totals.items()}


class FrameAccounts:
    """Counts the frames of one camera by outcome, and words the account of each. Callable from any thread.

    The counts and the values of an account are described in ``docs/node.md``.

    :param device: what computes, "cpu" or "cuda:0".
    :param clock: seconds, for the window.
    :ivar direction, units: of the flow that is asked for now, as the parameters of these names have them.
    :ivar arrivals: of the frames that came in, to be appended to without waiting: when, by the clock, and how many were
        lost before it. They are counted with the next account or window.
    """

    def __init__(
        self, device: str, direction: str, camera: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.direction, self.units = direction, "px"
        self._device, self._camera, self._clock = device, camera, clock
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(("received", "processed", "first", "dropped", "lost"), 0)
        self._started_s, self._arriving_since_s = clock(), 0.0
        self.arrivals: deque[tuple[float, int]] = deque()
        self._received: deque[tuple[float, int]] = deque()
        self._samples: deque[Sample] = deque()

    def first(self, header: Header, reason: str, age_ms: float | None = None) -> DiagnosticArray:
        """The account of a frame that starts a stream, for this reason, so that there is no pair yet."""
        return self._account(header, "first", f"stream starts: {reason}", {"reason": reason}, age_ms)

    def dropped(self, header: Header, reason: str, age_ms: float | None = None) -> DiagnosticArray:
        """The account of a frame that gave no flow and takes no part in that of others."""
        return self._account(header, "dropped", f"dropped: {reason}", {"reason": reason}, age_ms, DiagnosticStatus.WARN)

    def processed(
        self, header: Header, info: FlowInfo, stage_ms: Mapping[str, float], age_ms: float | None = None,
        latency_from: str = "arrival",
    ) -> DiagnosticArray:  # fmt: skip
        """The account of a frame that gave flow; ``stage_ms`` has the node's own stages, beside the estimator's."""
        level, stage_ms = DiagnosticStatus.OK, {**info.stage_ms, **stage_ms}
        message = f"{info.iterations} iterations, {info.residual_px:.3f} px residual, {info.latency_ms:.1f} ms"
        if info.over_budget:
            level, message = DiagnosticStatus.WARN, f"over the budget of {info.budget_ms:g} ms: {message}"
        if info.stop_reason == "diverged":
            level, message = DiagnosticStatus.ERROR, f"the solver diverged: {message}"
        values = pair_values(info, stage_ms) | {"latency_from": latency_from}
        return self._account(header, "processed", message, values, age_ms, level, info, stage_ms)

    def window(self) -> Window:
        """What happened within the window that ends now."""
        now_s = self._clock()
        oldest_s = now_s - WINDOW_S
        with self._lock:
            self._count_arrivals()
            received = [entry for entry in self._received if entry[0] >= oldest_s]
            samples = [sample for sample in self._samples if sample.time_s >= oldest_s]
            full = bool(received) and self._arriving_since_s <= oldest_s
        seconds = max(1e-3, min(WINDOW_S, now_s - self._started_s))
        return Window(seconds, full, len(received), sum(lost for _, lost in received), samples)

    def _account(
        self, header: Header, outcome: str, message: str, values: Mapping[str, str], age_ms: float | None,
        level: bytes = DiagnosticStatus.OK, info: FlowInfo | None = None, stage_ms: Mapping[str, float] | None = None,
    ) -> DiagnosticArray:  # fmt: skip
        pairs = {
            "camera": self._camera,
            "outcome": outcome,
            "reason": "",
            "image1_stamp_ns": "",
            "image2_stamp_ns": str(stamp_to_ns(header.stamp)),
            "age_ms": "" if age_ms is None else f"{age_ms:.3f}",
            "direction": self.direction,
            "units": self.units,
            **values,
        }
        now_s = self._clock()
        with self._lock:
            self._count_arrivals()
            self._counts[outcome] += 1
            pairs.update({f"frames_{name}": str(count) for name, count in self._counts.items()})
            self._samples.append(Sample(now_s, outcome, pairs["reason"][:MAX_REASON], age_ms, info, stage_ms or {}))
            while self._samples[0].time_s < now_s - WINDOW_S:
                self._samples.popleft()
        name = f"{STATUS_NAME} {self._camera}".rstrip()
        return DiagnosticArray(header=header, status=[status_of(level, name, message, self._device, pairs)])

    def _count_arrivals(self) -> None:
        while self.arrivals:
            arrival_s, lost_before = arrived = self.arrivals.popleft()
            self._counts["received"] += 1
            self._counts["lost"] += lost_before
            while self._received and self._received[0][0] < arrival_s - WINDOW_S:
                self._received.popleft()
            if not self._received:  # they begin to come, at the start or after silence
                self._arriving_since_s = arrival_s
            self._received.append(arrived)
