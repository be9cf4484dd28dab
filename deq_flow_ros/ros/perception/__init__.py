# SPDX-License-Identifier: Apache-2.0
"""Nodes that make something of the flow of ``flow_node``. Their processes import neither PyTorch nor the network.

Here is what they get and say: flow fields, whose parts are brought together by their stamps. message_filters does that
as well, but is not there where ROS comes from wheels, and does not say what it gives up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from deq_flow_ros.imaging import stamp_to_ns
from deq_flow_ros.imaging.camera import CameraModel

PARTS: dict[str, type] = {"flow": Image, "uncertainty": Image, "statistics": DiagnosticArray}
"""Topics of ``flow_node``, of each of which a flow field needs a message."""
PENDING = 10
"""Stamps of which parts are kept while others are missing. The parts of a field are published at once."""
OK, WARN = DiagnosticStatus.OK, DiagnosticStatus.WARN
REPEATED = (
    "the image is exactly the one before: is the camera frozen, does its driver repeat images, or is it a simulated "
    "one that stands still?"
)
"""Of flow that is zero because of this."""


@dataclass(frozen=True)
class FlowField:
    """A flow field and what belongs to it.

    :ivar header: stamp and frame of the image on whose pixels the flow lives.
    :ivar flow: (H, W, 2) float32 px; NaN where there is none.
    :ivar uncertainty: (H, W) float32 px, the expected error of the flow.
    :ivar repeated: whether the flow is zero because an image came twice.
    :ivar stamps_ns: of that image, and of the one that the flow points to: for backward flow, the earlier one.
    :ivar camera: of these pixels; None while none is known, which ``camera_problem`` then says why.
    """

    header: Header
    flow: np.ndarray
    uncertainty: np.ndarray
    repeated: bool
    stamps_ns: tuple[int, int]
    camera: CameraModel | None
    camera_problem: str


class Verdict(NamedTuple):
    """What ``/diagnostics`` says of a field: what was found, or, with ``WARN``, what is wrong; and figures by name."""

    words: str
    level: bytes = OK
    values: Mapping[str, str] = {}


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

    def _give_up(self, stamp_ns: int) -> None:
        parts = self._pending.pop(stamp_ns)
        if "flow" in parts:
            self._on_drop(next(name for name in PARTS if name not in parts))


def stamps_of(account: Mapping[str, str]) -> tuple[int, int]:
    """What an account on ``~/statistics`` (docs/node.md) says of its flow field: see ``FlowField.stamps_ns``."""
    first_ns, second_ns = int(account["image1_stamp_ns"]), int(account["image2_stamp_ns"])
    return (second_ns, first_ns) if account["direction"] == "backward" else (first_ns, second_ns)


def check_account(account: Mapping[str, str]) -> None:
    """Refuse flow that would be taken for another motion than there is, by the account of its frame.

    :raises ValueError: saying why, and what to do.
    """
    if (units := account.get("units", "px")) != "px":
        raise ValueError(f"expected flow in pixels, got units {units}: set the parameter units of the flow node to px")
    if account.get("matched") == "false":
        raise ValueError("the two images have nothing in common (`matched` is false in ~/statistics of the flow node)")
