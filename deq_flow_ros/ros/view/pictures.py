# SPDX-License-Identifier: Apache-2.0
"""Small JPEG pictures of image, flow and maps, for a page."""

from __future__ import annotations

import base64

import cv2
import numpy as np
from sensor_msgs.msg import Image

from deq_flow_ros.imaging.encodings import Levels, encode_image
from deq_flow_ros.imaging.pictures import flow_to_color, heat, top
from deq_flow_ros.ros.convert import field_of, image_to_rgb
from deq_flow_ros.ros.topics import ImageMessage

FIELDS = {"flow": "32FC2", "residual": "32FC1", "uncertainty": "32FC1"}
"""Pictures of fields of the flow node, by name; with the encoding of their messages."""
NAMES = ("image", *FIELDS)
QUALITY = 75
LEAST_PX, LEAST_PER_S = {"flow": 1.0, "residual": 0.1, "uncertainty": 1.0}, 0.01
"""The full colour stands for at least so much, so that what is next to nothing does not look like something."""
FADE = 0.95
"""The full colour stands for the largest recent value, which fades by this factor: colours would flicker otherwise."""


class Pictures:
    """Draws the messages of one camera.

    :param width: of a picture at most, px; larger images are reduced by whole numbers.
    :ivar in_px: whether the flow is in px; else it is in normalized image coordinates per second.
    """

    def __init__(self, width: int) -> None:
        self.in_px = True
        self._width = width
        self._levels = Levels()
        self._tops: dict[str, float] = {}

    def draw(self, name: str, message: ImageMessage) -> dict[str, str]:
        """A picture of a message, one of ``NAMES``.

        :returns: ``jpeg`` (base64) and ``note`` (its size, or what the full colour stands for, or, where it cannot be
            drawn, why: then there is no ``jpeg``).
        """
        try:
            rgb, note = self._camera(message) if name == "image" else self._field(name, message)
        except ValueError as error:
            return {"note": f"cannot be shown: {error}"}
        return {"jpeg": base64.b64encode(encode_image(rgb, "jpeg", QUALITY).tobytes()).decode(), "note": note}

    def _camera(self, message: ImageMessage) -> tuple[np.ndarray, str]:
        rgb = image_to_rgb(message, self._levels)
        height, width = rgb.shape[:2]
        step = self._step(width)
        size = max(1, width // step), max(1, height // step)
        return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA) if step > 1 else rgb, f"{width}x{height}"

    def _field(self, name: str, message: Image) -> tuple[np.ndarray, str]:
        step = self._step(message.width)
        values = field_of(message, FIELDS[name])[::step, ::step]  # none are mixed: between two motions there is none
        lengths = np.hypot(values[..., 0], values[..., 1]) if values.ndim == 3 else values
        least, unit = (LEAST_PX[name], "px") if self.in_px or name != "flow" else (LEAST_PER_S, "1/s")
        most = self._tops[name] = max(top(lengths, least), FADE * self._tops.get(name, 0.0))
        rgb = flow_to_color(values, most) if values.ndim == 3 else heat(lengths, most)
        return rgb, f"full colour: {most:.{0 if most >= 10 else 1 if most >= 1 else 2}f} {unit}"

    def _step(self, width: int) -> int:
        return max(1, -(-width // self._width))
