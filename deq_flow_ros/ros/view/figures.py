# SPDX-License-Identifier: Apache-2.0
"""What a page shows of a flow node: its state, with a cure, its figures, and small pictures of image, flow and maps."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from sensor_msgs.msg import Image

from deq_flow_ros.imaging.encodings import Levels
from deq_flow_ros.imaging.pictures import data_uri, flow_to_color, heat, top
from deq_flow_ros.ros.messages import ImageMessage, field_of, image_to_rgb

QUIET_S = 3.0
"""Without an account for so long no images come; without diagnostics for twice as long no node runs."""
HISTORY = 60
"""Flow fields in the bars."""
COUNTS = ("received", "processed", "first", "dropped", "lost")
LATEST = ("latency_ms", "budget_ms", "iterations", "stop_reason", "residual_px", "scale")
LEVELS = ("ok", "warning", "error", "stale")
"""By the levels of ``diagnostic_msgs/DiagnosticStatus``."""
SEVERITY = ("ok", "warning", "stale", "error")
FIELDS = {"flow": "32FC2", "residual": "32FC1", "uncertainty": "32FC1"}
"""Pictures of fields of the flow node, by name; with the encoding of their messages."""
NAMES = ("image", *FIELDS)
QUALITY = 75
LEAST_PX, LEAST_PER_S = {"flow": 1.0, "residual": 0.1, "uncertainty": 1.0}, 0.01
"""The full colour stands for at least so much, so that what is next to nothing does not look like something."""
FADE = 0.95
"""The full colour stands for the largest recent value, which fades by this factor: colours would flicker otherwise."""


class Figures:
    """Collects what one camera of a node says, from when somebody begins to look.

    :param node: full name of the node, "/robot/flow_node".
    :param camera: name of the camera; empty for one without a name.
    :param clock: seconds.
    :ivar image_topic: where the node expects its images; empty as long as that is unknown.
    :ivar units: of the flow, as the parameter of the node has them.
    """

    def __init__(self, node: str, camera: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._node, self._camera, self._clock = node, camera or "flow", clock
        self.image_topic, self.units = "", "px"
        self._began_s = self._account_s = self._flow_s = self._diagnostics_s = clock()
        self._statuses: dict[str, tuple[str, str]] = {}
        self._rates: dict[str, str] = {}
        self._account: dict[str, str] = {}
        self._latest: dict[str, str] = {}
        self._history: deque[tuple[float, int]] = deque(maxlen=HISTORY)

    def take_account(self, values: dict[str, str]) -> None:
        """An account of ``~/statistics`` (docs/node.md); anything else that comes there is left out."""
        try:
            if values["outcome"] == "processed":
                latest = {name: values[name] for name in LATEST}
                self._history.append((float(values["latency_ms"]), int(values["iterations"])))
                self._latest, self._flow_s = latest, self._clock()
        except (KeyError, ValueError):
            return
        self._account, self._account_s = values, self._clock()
        self.units = values.get("units", self.units)

    def take_status(self, level: int, name: str, message: str, values: Mapping[str, str]) -> None:
        """A status of ``/diagnostics``; those of other nodes are left out."""
        node, colon, what = name.partition(": ")
        if not colon or node != self._node.lstrip("/"):
            return
        self._diagnostics_s = self._clock()
        if what == "process":  # the first of a message
            self._statuses.clear()
        self._statuses[what] = LEVELS[min(level, 3)], message
        if what == self._camera:
            self.image_topic = values.get("image_topic", "")
            self._rates = {key: values[key] for key in ("in_hz", "out_hz") if key in values}

    def summary(self, running: Callable[[], Sequence[str]]) -> dict[str, Any]:
        """All that the page shows beside the pictures.

        :param running: gives the names of the flow nodes that run; asked where this one does not.
        """
        state, headline, cure = self._state(running)
        latest_first = reversed(self._statuses.items())  # of equal ones, cameras before the process
        what, (level, message) = max(latest_first, key=lambda item: SEVERITY.index(item[1][0]), default=("", ("", "")))
        return {
            "node": self._node, "state": state, "headline": headline, "cure": cure,
            "counts": {name: self._account.get(f"frames_{name}", "") for name in COUNTS}, "latest": self._latest,
            "rates": self._rates, "history": list(self._history),
            "worst": {"level": level, "of": what, "message": message},
        }  # fmt: skip

    def _state(self, running: Callable[[], Sequence[str]]) -> tuple[str, str, str]:
        """In a word, in a headline, and what to do."""
        now_s = self._clock()
        if now_s - self._flow_s < QUIET_S and self._latest:
            return "live", f"flow of {self.image_topic}", ""
        if now_s - self._began_s < QUIET_S:
            return "connecting", f"connecting to {self._node}", ""
        quiet = now_s - self._account_s >= QUIET_S
        if (quiet and now_s - self._diagnostics_s >= 2 * QUIET_S) or not (self._statuses or self._account):
            found = running()
            if any(name == self._node or name.startswith(f"{self._node}/") for name in found):
                return "waiting", f"{self._node} is starting", "loading its model; its log says more"
            cure = "start it (ros2 launch deq_flow_ros flow.launch.py image:=TOPIC), or set its ROS_DOMAIN_ID here"
            if found:
                cure = f"these run: {', '.join(found)}; give namespace:= and name:= of one"
            return "waiting", f"waiting for the flow node {self._node}", cure
        message = self._statuses.get(self._camera, ("", ""))[1]
        if self._statuses and not message:
            cameras = ", ".join(sorted(set(self._statuses) - {"process"}))
            if cameras:
                return "waiting", f"{self._node} has no camera {self._camera}", f"give cameras:= one of {cameras}"
            return "waiting", f"{self._node} is not configured", self._statuses["process"][1]
        if quiet:
            return "waiting", f"waiting for images on {self.image_topic}", message
        return "waiting", f"images come on {self.image_topic}, but no flow", self._account.get("reason") or message


class Pictures:
    """Draws the messages of one camera.

    :param width: of a picture at most, px; larger images are reduced by whole numbers.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._levels = Levels()
        self._tops: dict[str, float] = {}

    def draw(self, name: str, message: ImageMessage, units: str = "px") -> dict[str, str]:
        """A picture of a message, one of ``NAMES``.

        :param units: of the flow.
        :returns: ``src``, a ``data:`` address, and ``note``: its size, or what the full colour stands for, or, where it
            cannot be drawn, why; then there is no ``src``.
        """
        try:
            rgb, note = self._image(message) if name == "image" else self._field(name, message, units)
        except ValueError as error:
            return {"note": f"cannot be shown: {error}"}
        return {"src": data_uri(rgb, QUALITY), "note": note}

    def _image(self, message: ImageMessage) -> tuple[np.ndarray, str]:
        rgb = image_to_rgb(message, self._levels)
        height, width = rgb.shape[:2]
        step = math.ceil(width / self._width)
        size = max(1, width // step), max(1, height // step)
        return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA) if step > 1 else rgb, f"{width}x{height}"

    def _field(self, name: str, message: Image, units: str) -> tuple[np.ndarray, str]:
        values = field_of(message, FIELDS[name])
        step = math.ceil(message.width / self._width)
        values = values[::step, ::step]  # none are mixed: between two motions there is none
        lengths = np.hypot(values[..., 0], values[..., 1]) if values.ndim == 3 else values
        least, unit = (LEAST_PX[name], "px") if units == "px" or name != "flow" else (LEAST_PER_S, "1/s")
        most = self._tops[name] = max(top(lengths, least), FADE * self._tops.get(name, 0.0))
        rgb = flow_to_color(values, most) if values.ndim == 3 else heat(lengths, most)
        return rgb, f"full colour: {most:.{0 if most >= 10 else 1 if most >= 1 else 2}f} {unit}"
