# SPDX-License-Identifier: Apache-2.0
"""Images: frames and their times, encodings, compression, calibrated cameras, flow as colour, and measures on pixels.

This package uses neither torch nor ROS, and does not read recordings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from deq_flow_ros import UserError

GAP_PERIODS = 3.0
"""So many periods without a frame are a gap, where that is longer than ``max_gap_ms``: one frame may get lost."""
LONGEST_PERIOD_MS = 60_000.0
"""Frames further apart than this are no stream, however regularly they come."""
MAX_PAUSE_S = 5.0
"""Longest pause of a replay, unless another is asked for."""


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


def longest_gap_ms(max_gap_ms: float, period_ns: float) -> float:
    """How far apart two frames may be that belong together, by the rate of their stream.

    :param max_gap_ms: at least so far.
    :param period_ns: usual time between two frames.
    """
    return max(max_gap_ms, GAP_PERIODS * min(period_ns * 1e-6, LONGEST_PERIOD_MS))


class Pace:
    """How long after the frame before it each frame of a recording is due in a replay.

    A pause beyond the longest one, and a step back of the clock, are skipped: the next frame follows after a usual
    period.

    :param period_ns: usual time between two frames.
    :param max_pause_s: longest pause; three usual periods are none, whatever it is. 0: pauses are not skipped.
    """

    def __init__(self, period_ns: int, max_pause_s: float = MAX_PAUSE_S) -> None:
        self._longest_ns = 1e6 * longest_gap_ms(1e3 * max_pause_s, period_ns) if max_pause_s else math.inf
        self._period_ns = min(period_ns, int(1e6 * LONGEST_PERIOD_MS))
        self._last_ns: int | None = None

    def step(self, record_ns: int) -> tuple[int, str | None]:
        """Take the next frame.

        :param record_ns: when it was recorded.
        :returns: time after the frame before, in ns, 0 for the first; and what was skipped, if anything.
        """
        last_ns, self._last_ns = self._last_ns, record_ns
        step_ns = 0 if last_ns is None else record_ns - last_ns
        if step_ns < 0:
            return self._period_ns, f"the clock of the recording steps back by {-step_ns * 1e-9:.1f} s"
        if step_ns > self._longest_ns:
            return self._period_ns, f"the recording pauses for {step_ns * 1e-9:.1f} s"
        return step_ns, None
