# SPDX-License-Identifier: Apache-2.0
"""What every image source yields, whatever it reads from."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from typing import Any

from deq_flow_ros.imaging.frame import Frame


class Source(abc.ABC):
    """A stream of frames, opened by `open_source`."""

    kind: str
    """"bag", "video", "folder" or "camera"."""
    description: str
    """One line for people: what is read, how many frames, which size where it is known."""
    nominal_period_ns: int
    """Usual time between two frames."""
    count: int | None = None
    """Number of frames as the file claims it; None where nobody knows."""
    calibration: Mapping[str, Any] | None = None
    """Fields of `sensor_msgs/CameraInfo` but the header, as plain values under their ROS 2 names, `roi` a mapping as
    well; None where the input has no calibration of the camera.
    """
    live: bool = False
    """True where frames appear by themselves, at their own pace, and cannot be read again."""

    def __init__(self) -> None:
        self.skipped: list[str] = []
        """One line per frame that could not be read, filled while `frames()` runs."""
        self.left_out = 0
        """Frames of this pass that could not be read so far."""

    @abc.abstractmethod
    def frames(self) -> Iterator[Frame]:
        """The frames from the first on; may be called again for another pass, except on a live source.

        Raises `MediaError` when the input turns out to be unreadable while it is read.
        """

    def close(self) -> None:
        """Give back what the source holds, a camera for one; it yields no frames afterwards."""
        return
