# SPDX-License-Identifier: Apache-2.0
"""What became of the flow fields that a node received, as a status for ``/diagnostics``."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

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
        status = DiagnosticStatus(level=level, name=name, message=words)
        status.values = [KeyValue(key=key, value=value) for key, value in values.items()]
        return status
