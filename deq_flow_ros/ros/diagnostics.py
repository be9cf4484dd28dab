# SPDX-License-Identifier: Apache-2.0
"""The account of every frame received: one `diagnostic_msgs/DiagnosticArray` each, with that frame's header."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from std_msgs.msg import Header

from deq_flow_ros.ros.convert import stamp_to_ns
from deq_flow_ros.ros.health import CameraHealth
from deq_flow_ros.streaming.result import pair_values

if TYPE_CHECKING:
    from deq_flow_ros.streaming import FlowInfo

STATUS_NAME = "deq_flow_ros: flow"


@dataclass
class Counters:
    """Frames since the node was configured; those received are processed, first, dropped, or still in hand.

    Those lost never reached the node: the middleware dropped them on the way.
    """

    received: int = 0
    processed: int = 0
    first: int = 0
    dropped: int = 0
    lost: int = 0


class FrameAccounts:
    """Counts the frames of one camera by outcome, words the account of each, and feeds the camera's health.

    Callable from any thread. The values of an account are described in `docs/node.md`.

    :ivar direction: of the flow that is asked for now, "forward" or "backward".
    """

    def __init__(self, device: str, direction: str, camera: str = "", health: CameraHealth | None = None) -> None:
        self.direction = direction
        self._device = device
        self._camera = camera
        self._health = health
        self._lock = threading.Lock()
        self._counters = Counters()

    def received(self, lost_before: int) -> None:
        """A frame came in, after some that were lost in the middleware."""
        with self._lock:
            self._counters.received += 1
            self._counters.lost += lost_before
        if self._health is not None:
            self._health.received(lost_before)

    def first(self, header: Header, reason: str, age_ms: float | None = None) -> DiagnosticArray:
        """The frame starts a stream, so there is no pair yet; `reason` says why it starts.

        In this and all others, `age_ms` is the time from the frame's stamp to its arrival by the ROS clock; None where
        it was not measured.
        """
        self._feed("first", reason, age_ms)
        return self._account(header, "first", f"stream starts: {reason}", {"reason": reason}, age_ms)

    def dropped(self, header: Header, reason: str, age_ms: float | None = None) -> DiagnosticArray:
        """The frame gave no flow and takes no part in that of others."""
        self._feed("dropped", reason, age_ms)
        return self._account(header, "dropped", f"dropped: {reason}", {"reason": reason}, age_ms, DiagnosticStatus.WARN)

    def processed(
        self,
        header: Header,
        info: FlowInfo,
        stage_ms: Mapping[str, float],
        age_ms: float | None = None,
        latency_from: str = "arrival",
    ) -> DiagnosticArray:
        """The frame gave flow; `stage_ms` are the node's own stages, beside those of the estimator.

        :param latency_from: where latency and budget count from, "arrival" or "stamp".
        """
        self._feed("processed", "", age_ms, info, stage_ms)
        level = DiagnosticStatus.OK
        message = f"{info.iterations} iterations, {info.residual_px:.3f} px residual, {info.latency_ms:.1f} ms"
        if info.over_budget:
            level, message = DiagnosticStatus.WARN, f"over the budget of {info.budget_ms:g} ms: {message}"
        if info.stop_reason == "diverged":
            level, message = DiagnosticStatus.ERROR, f"the solver diverged: {message}"
        values = pair_values(info, {**info.stage_ms, **stage_ms}) | {"latency_from": latency_from}
        return self._account(header, "processed", message, values, age_ms, level)

    def _feed(
        self,
        outcome: str,
        reason: str,
        age_ms: float | None,
        info: FlowInfo | None = None,
        stage_ms: Mapping[str, float] | None = None,
    ) -> None:
        if self._health is not None:
            self._health.accounted(outcome, reason, age_ms, info, stage_ms)

    def _account(
        self,
        header: Header,
        outcome: str,
        message: str,
        values: Mapping[str, str],
        age_ms: float | None,
        level: bytes = DiagnosticStatus.OK,
    ) -> DiagnosticArray:
        pairs = {
            "camera": self._camera,
            "outcome": outcome,
            "reason": "",
            "image1_stamp_ns": "",
            "image2_stamp_ns": str(stamp_to_ns(header.stamp)),
            "age_ms": "" if age_ms is None else f"{age_ms:.3f}",
            "direction": self.direction,
            **values,
        }
        with self._lock:
            setattr(self._counters, outcome, getattr(self._counters, outcome) + 1)
            pairs.update({f"frames_{name}": str(value) for name, value in vars(self._counters).items()})
        name = f"{STATUS_NAME} {self._camera}".rstrip()
        status = DiagnosticStatus(level=level, name=name, hardware_id=self._device, message=message)
        status.values = [KeyValue(key=key, value=value) for key, value in pairs.items()]
        return DiagnosticArray(header=header, status=[status])
