# SPDX-License-Identifier: Apache-2.0
"""The flow fields that a node receives: their parts brought together by their stamps, and what became of each field.

message_filters brings messages together as well, but is not there where ROS comes from wheels, and does not say what it
gives up.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from sensor_msgs.msg import Image

from deq_flow_ros.imaging import stamp_to_ns
from deq_flow_ros.ros.process import status_of

PARTS: dict[str, type] = {"flow": Image, "uncertainty": Image, "statistics": DiagnosticArray}
"""Topics of ``flow_node``, of each of which a flow field needs a message."""
PENDING = 10
"""Stamps of which parts are kept while others are missing. The parts of a field are published at once."""


class Pairing:
    """Takes messages one by one, and hands over those of one stamp together.

    A topic keeps its order, so that a part that has not come before the same part of a later field never comes.

    :param on_whole: gets the messages of one stamp by the names of ``PARTS``; of an account its values.
    :param on_drop: gets the name of what was missing for a flow field that is given up.
    """

    def __init__(self, on_whole: Callable[[Mapping[str, Any]], None], on_drop: Callable[[str], None]) -> None:
        self._on_whole, self._on_drop = on_whole, on_drop
        self._pending: dict[int, dict[str, Any]] = {}  # in the order in which their first parts came

    def add(self, name: str, message: Any) -> None:
        """Take a message of the topic ``name``; an account of a frame without a flow field belongs to none."""
        if name == "statistics":
            message = {pair.key: pair.value for status in message.status for pair in status.values}
            if message.get("outcome") != "processed":
                return
        stamp_ns = stamps_of(message)[0] if name == "statistics" else stamp_to_ns(message.header.stamp)
        parts = self._pending.setdefault(stamp_ns, {})
        parts[name] = message
        if len(parts) == len(PARTS):
            while (first := next(iter(self._pending))) != stamp_ns:
                self._give_up(first)
            self._on_whole(self._pending.pop(stamp_ns))
        elif len(self._pending) > PENDING:
            self._give_up(next(iter(self._pending)))

    def forget(self) -> None:
        """Start anew, without a word of the parts that wait."""
        self._pending.clear()

    def _give_up(self, stamp_ns: int) -> None:
        parts = self._pending.pop(stamp_ns)
        if "flow" in parts:
            self._on_drop(next(name for name in PARTS if name not in parts))


def stamps_of(account: Mapping[str, str]) -> tuple[int, int]:
    """What an account on ``~/statistics`` (docs/node.md) says of the flow field of its frame.

    :returns: the stamps in ns of the image on whose pixels the flow lives, which is also that of the field, and of the
        image that it points to, which is the earlier one for backward flow.
    """
    first_ns, second_ns = int(account["image1_stamp_ns"]), int(account["image2_stamp_ns"])
    return (second_ns, first_ns) if account["direction"] == "backward" else (first_ns, second_ns)


def check_account(account: Mapping[str, str]) -> bool:
    """Refuse flow that would be taken for another motion than there is, by the account of its frame.

    :returns: whether the flow is zero because an image came twice.
    :raises ValueError: saying why, and what to do.
    """
    if (units := account.get("units", "px")) != "px":
        raise ValueError(f"expected flow in pixels, got units {units}: set the parameter units of the flow node to px")
    if account.get("matched") == "false":
        raise ValueError("the two images have nothing in common (`matched` is false in ~/statistics of the flow node)")
    return account.get("repeated") == "true"


REPEATED = (
    "the image is exactly the one before: is the camera frozen, does its driver repeat images, or is it a simulated "
    "one that stands still?"
)
"""Of flow that is zero because of this."""
OK, WARN, STALE = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.STALE
SUPERSEDED = "superseded by a newer field"
"""The one reason of a drop that is no fault: the node is slower than the flow."""


@dataclass(frozen=True)
class Verdict:
    """What is to be said of the results of one field on ``/diagnostics``.

    :ivar words: what was found; with the level ``WARN``, what is wrong and what to do.
    :ivar values: figures by name.
    """

    words: str
    level: bytes = OK
    values: Mapping[str, str] = field(default_factory=dict)


class Tally:
    """Counts since the last status. Callable from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since_s = time.monotonic()
        self._forget()

    def add(self, verdict: Verdict, seconds: float) -> None:
        """A field was processed in so many seconds."""
        with self._lock:
            self._verdicts.append(verdict)
            self._busy_s += seconds

    def drop(self, kind: str, reason: str) -> None:
        """A field was dropped.

        :param kind: the words under which it is counted, of which there are few.
        :param reason: why, in full.
        """
        with self._lock:
            self._drops[kind] += 1
            if kind != SUPERSEDED:
                self._reason = reason

    def _forget(self) -> None:
        self._verdicts: list[Verdict] = []
        self._drops: Counter[str] = Counter()
        self._busy_s, self._reason = 0.0, ""

    def status(self, name: str, idle: str, silence: str) -> DiagnosticStatus:
        """What has happened since the last status; figures are those of the last field.

        :param idle: why nothing is computed; empty while something is.
        :param silence: why no field comes; empty while they do.
        """
        with self._lock:
            verdicts, drops, reason, busy_s = self._verdicts, self._drops, self._reason, self._busy_s
            self._forget()
            seconds, self._since_s = time.monotonic() - self._since_s, time.monotonic()
        values = {"fields_hz": f"{len(verdicts) / seconds:.2f}"}
        if verdicts:
            values |= {"compute_ms": f"{1e3 * busy_s / len(verdicts):.1f}", **verdicts[-1].values}
        values |= {f"dropped: {kind}": str(count) for kind, count in drops.items()}
        level, words = OK, "no flow field has come"
        if idle:
            words = f"nothing is computed: {idle}"
        elif silence:
            level, words = STALE, silence
        elif verdicts:
            level = max(verdict.level for verdict in verdicts)
            worst = [verdict for verdict in verdicts if verdict.level == level]
            words = worst[-1].words if level == OK else f"{len(worst)} of {len(verdicts)} fields: {worst[-1].words}"
        faults = drops.total() - drops[SUPERSEDED]
        if faults and not idle:
            level, words = max(level, WARN), f"{faults} fields dropped: {reason}; {words}"
        return status_of(level, name, words, "", values)
