# SPDX-License-Identifier: Apache-2.0
"""An image with its stamp, whatever it was read from, and the error of inputs that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from deq_flow_ros.errors import UserError


class MediaError(UserError):
    """An input or a file cannot be used; the message says which, why, and what to do about it."""


def stamp_to_ns(stamp: Any) -> int:
    """Nanoseconds of a ``builtin_interfaces/Time``, from ROS or from a bag read without it."""
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


@dataclass(frozen=True)
class Frame:
    """One image in the layout of `sensor_msgs/Image`.

    `data` holds the rows one after the other, (height * step,) uint8; `step` is the length of a row in bytes, padding
    included. `stamp_ns` belongs into the message header. `record_ns` is when the frame is due in a replay; only its
    differences matter.
    """

    data: np.ndarray
    height: int
    width: int
    step: int
    encoding: str
    is_bigendian: bool
    stamp_ns: int
    record_ns: int
    frame_id: str


def frame_from_array(image: np.ndarray, stamp_ns: int, record_ns: int, frame_id: str) -> Frame:
    """Frame of an image as OpenCV decodes it: (H, W) or (H, W, 3 or 4), uint8 or uint16, colour as BGR(A).

    16-bit colour keeps its upper 8 bits: ROS has no widely read encoding for it. Raises `MediaError` for any other
    layout.
    """
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim == 3 and image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    encodings = {
        (2, 1, "uint8"): "mono8",
        (2, 1, "uint16"): "mono16",
        (3, 3, "uint8"): "bgr8",
        (3, 4, "uint8"): "bgra8",
    }
    channels = 1 if image.ndim == 2 else image.shape[2]
    encoding = encodings.get((image.ndim, channels, image.dtype.name))
    if encoding is None:
        raise MediaError(
            f"expected an image of 8 or 16 bits with 1, 3 or 4 channels, got {image.dtype.name} of shape {image.shape}"
        )
    image = np.ascontiguousarray(image)
    height, width = image.shape[:2]
    data = image.reshape(-1).view(np.uint8)
    return Frame(data, height, width, data.size // height, encoding, False, stamp_ns, record_ns, frame_id)
