# SPDX-License-Identifier: Apache-2.0
"""Images: frames, encodings, compression, calibrated cameras, flow as colour, and measures on pixels.

This package uses neither torch nor ROS, and does not read recordings.
"""

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
    """An image in the layout of ``sensor_msgs/Image``.

    :ivar data: (height * step,) uint8, the rows one after the other.
    :ivar step: length of a row in bytes, padding included.
    :ivar stamp_ns: the stamp of the message header.
    :ivar record_ns: when the frame is due in a replay; only differences matter.
    :ivar problem: why there is no image, where a video has none that can be used; empty: there is one.
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
    problem: str = ""

    @classmethod
    def of(cls, array: np.ndarray, encoding: str, stamp_ns: int, record_ns: int, frame_id: str) -> Frame:
        """The frame of an array (H, W) or (H, W, C) whose layout is that of the encoding."""
        height, width = array.shape[:2]
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return cls(data, height, width, data.size // height, encoding, False, stamp_ns, record_ns, frame_id)

    @classmethod
    def without_image(cls, problem: str, stamp_ns: int, record_ns: int, frame_id: str) -> Frame:
        """A frame that should be there; see ``problem``."""
        return cls(np.empty(0, np.uint8), 0, 0, 0, "", False, stamp_ns, record_ns, frame_id, problem)


def frame_from_array(image: np.ndarray, stamp_ns: int, record_ns: int, frame_id: str) -> Frame:
    """The frame of an image as OpenCV decodes it.

    :param image: (H, W) or (H, W, 3 or 4), uint8 or uint16, with colour as BGR(A).
    :raises MediaError: for any other layout.
    """
    name = {(): "mono", (1,): "mono", (3,): "bgr", (4,): "bgra"}.get(image.shape[2:])
    if image.ndim < 2 or name is None or image.dtype not in (np.uint8, np.uint16):
        got = f"{image.dtype.name} of shape {image.shape}"
        raise MediaError(f"expected an image of 8 or 16 bits with 1, 3 or 4 channels, got {got}")
    return Frame.of(image, f"{name}{8 * image.dtype.itemsize}", stamp_ns, record_ns, frame_id)
