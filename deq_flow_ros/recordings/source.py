# SPDX-License-Identifier: Apache-2.0
"""What every image source yields, whatever it reads from, and reading it ahead in a thread."""

from __future__ import annotations

import abc
import contextlib
import itertools
import math
import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from deq_flow_ros.imaging.frame import Frame, MediaError

FIRST_STAMP_NS = 1_000_000_000
"""Stamp of the first frame where the input has none: not 0, which ROS reads as "no stamp"."""
DEFAULT_FPS = 30.0


class Source(abc.ABC):
    """A stream of frames, opened by ``open_source``.

    :ivar kind: "bag", "video", "folder" or "camera".
    :ivar description: one line for people: what is read, how many frames, which size where it is known.
    :ivar nominal_period_ns: usual time between two frames.
    :ivar count: number of frames as the file claims it; None where nobody knows.
    :ivar calibration: fields of ``sensor_msgs/CameraInfo`` but the header, as plain values under their ROS 2 names,
        ``roi`` a mapping as well; None where there is none.
    :ivar live: whether frames appear by themselves, at their own pace, and cannot be read again.
    :ivar skipped: one line per frame that could not be read, filled while ``frames()`` runs.
    :ivar left_out: frames of this pass so far that were not yielded: unreadable ones, and those before ``start_s``.
    :ivar start_s, stop_s: the part that is read, in seconds from the first frame of the recording.
    """

    kind: str
    description: str
    nominal_period_ns: int
    count: int | None = None
    calibration: Mapping[str, Any] | None = None
    live: bool = False

    def __init__(self) -> None:
        self.skipped: list[str] = []
        self.left_out = 0
        self.odd_stamps = ""
        """What is wrong with the stamps as a whole; empty: nothing that is known."""
        self.start_s, self.stop_s = 0.0, math.inf

    @abc.abstractmethod
    def frames(self) -> Iterator[Frame]:
        """The frames from the first on; may be called again for another pass, except on a live source.

        :raises MediaError: if the input turns out to be unreadable while it is read.
        """

    def choose_part(self, start_s: float, stop_s: float) -> None:
        """Read from ``start_s`` on, up to before ``stop_s``, in seconds from the first frame; adapts ``count``.

        :raises MediaError: where that is no part of a recording.
        """
        if not 0 <= start_s < stop_s:
            raise MediaError(f"expected a part from 0 s or later to a later time, got {start_s:g} s to {stop_s:g} s")
        if (start_s, stop_s) == (self.start_s, self.stop_s):
            return
        if self.live:
            raise MediaError(f"{self.description}: a part can be chosen of recordings only, not of a camera")
        period_s = self.nominal_period_ns * 1e-9
        if self.count is not None:
            last = self.count if math.isinf(stop_s) else min(self.count, math.ceil(stop_s / period_s - 1e-6))
            self.count = max(0, last - math.ceil(start_s / period_s - 1e-6))
        self.start_s, self.stop_s = start_s, stop_s
        end = "its end" if math.isinf(stop_s) else f"{stop_s:g} s"
        self.description += f"; from {start_s:g} s to {end}"

    @property
    def whole(self) -> bool:
        """Whether all of the recording is read."""
        return self.start_s <= 0 and math.isinf(self.stop_s)

    def part_of(self, offset_ns: int) -> int:
        """Where a frame so long after the first one lies: -1 before the part that is read, 0 in it, 1 behind it."""
        return 1 if offset_ns * 1e-9 >= self.stop_s else 0 if offset_ns * 1e-9 >= self.start_s else -1

    def check_part(self) -> None:
        """To be called where the part that is read holds no frame.

        :raises MediaError: unless the whole recording is read.
        """
        if not self.whole:
            raise MediaError(f"no frame lies in the chosen part: {self.description}")

    def close(self) -> None:
        """Give back what the source holds, a camera for one; it yields no frames afterwards."""
        return


READ_AHEAD = 4
"""Frames decoded in advance, so that a slow one does not come late."""


class FrameReader:
    """Iterates (pass number, frame) of a source, read ahead in a thread of its own; None where none is ready yet."""

    def __init__(self, source: Source, loop: bool) -> None:
        self._source, self._closed = source, False
        self._passes = itertools.count() if loop and not source.live else range(1)
        self._frames: queue.Queue[tuple[int, Frame] | Exception | None] = queue.Queue(READ_AHEAD)
        # A daemon, because a camera that delivers nothing cannot be interrupted.
        self._thread = threading.Thread(target=self._read, name="frame_reader", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for number in self._passes:
                for frame in self._source.frames():
                    if not self._put((number, frame)):
                        return
            self._put(None)
        except Exception as error:  # handed to the thread that plays
            self._put(error)

    def _put(self, item: tuple[int, Frame] | Exception | None) -> bool:
        while not self._closed:
            with contextlib.suppress(queue.Full):
                self._frames.put(item, timeout=0.1)
                return True
        return False

    def __iter__(self) -> Iterator[tuple[int, Frame] | None]:
        while True:
            try:
                item = self._frames.get(timeout=0.05)
            except queue.Empty:
                yield None
                continue
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item

    def close(self) -> None:
        """Stop reading ahead."""
        self._closed = True
        self._thread.join(timeout=1.0)  # a process that ends while a thread of it decodes a video is aborted
