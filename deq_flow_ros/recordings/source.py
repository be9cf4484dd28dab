# SPDX-License-Identifier: Apache-2.0
"""What every image source yields, whatever it reads from; videos and cameras."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from deq_flow_ros.imaging import Frame, MediaError, frame_from_array
from deq_flow_ros.imaging.encodings import EncodingError
from deq_flow_ros.imaging.video import INTERLACED, import_pyav
from deq_flow_ros.recordings.files import BAG_SUFFIXES, no_video

log = logging.getLogger(__name__)

FIRST_STAMP_NS = 1_000_000_000
"""Stamp of the first frame where the input has none: not 0, which ROS reads as "no stamp"."""
DEFAULT_FPS = 30.0
DAMAGED = "the picture is damaged, or made of one that is, back to a key frame"
MOST_B = 16
"""B-pictures in a row that may be made of the picture behind them: a decoder of H.264 or H.265 holds no more."""


class Source:
    """A stream of frames, opened by ``open_source``.

    :ivar kind: "bag", "video", "folder" or "camera".
    :ivar description: one line for people: what is read, how many frames, which size where it is known.
    :ivar nominal_period_ns: usual time between two frames.
    :ivar count: number of frames as the file claims it; None where nobody knows.
    :ivar calibration: fields of ``sensor_msgs/CameraInfo`` but the header, as plain values under their ROS 2 names,
        ``roi`` a mapping as well; None where there is none.
    :ivar live: whether frames appear by themselves, at their own pace, and cannot be read again.
    :ivar skipped: what is wrong, a line for each frame that could not be read, filled while ``frames()`` runs.
    :ivar left_out: frames of this pass so far that were not yielded: unreadable ones, and those before ``start_s``.
    :ivar odd_stamps: what is wrong with the stamps as a whole; empty: nothing that is known.
    :ivar start_s, stop_s: the part that is read, in seconds from the first frame of the recording.
    """

    kind: str
    description: str
    nominal_period_ns: int
    count: int | None = None
    calibration: Mapping[str, Any] | None = None
    live: bool = False
    odd_stamps = ""

    def __init__(self) -> None:
        self.skipped: list[str] = []
        self.left_out = 0
        self.start_s, self.stop_s = 0.0, math.inf

    def frames(self) -> Iterator[Frame]:
        """The frames from the first on; may be called again for another pass, except on a live source.

        :raises MediaError: if the input turns out to be unreadable while it is read.
        """
        self.skipped, self.left_out = [], 0
        read, unreadable, why = 0, 0, ""
        with contextlib.closing(self.entries()) as entries:
            for offset_ns, load in entries:
                part = self.part_of(offset_ns)
                if part > 0:
                    break
                if part < 0:
                    self.left_out += 1
                    continue
                read += 1
                try:
                    frame = load()
                except MediaError as error:
                    self.left_out += 1
                    self.note(str(error))
                    unreadable, why = unreadable + 1, why or str(error)
                    continue
                unreadable, why = unreadable + bool(frame.problem), why or frame.problem
                yield frame
        if unreadable == read and not read and not self.whole:
            raise MediaError(f"no frame lies in the chosen part: {self.description}")
        if unreadable == read:
            none = f"none of the {read} images" if read else "no image"
            what = why or "; ".join(self.skipped[-1:]) or "there is none"
            raise MediaError(f"{none} of {self.description} can be read: {what}")

    def entries(self) -> Generator[tuple[int, Callable[[], Frame]], None, None]:
        """What is to be a frame: when it comes, in ns after the first one, and how it is read.

        Reading one raises ``MediaError`` where that fails, which costs this one only.
        """
        raise NotImplementedError

    def note(self, problem: str) -> None:
        """Add to ``skipped``, and warn."""
        self.skipped.append(problem)
        log.warning("%s: %s", self.kind, problem)

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
        if self.count is not None:
            rate = 1e9 / self.nominal_period_ns
            last = min(self.count, math.ceil(min(stop_s * rate, self.count) - 1e-6))
            self.count = max(0, last - math.ceil(start_s * rate - 1e-6))
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

    def close(self) -> None:
        """Give back what the source holds, a camera for one; it yields no frames afterwards."""
        return


class VideoSource(Source):
    """Frames of a video file, decoded by FFmpeg through PyAV and stamped by their presentation time."""

    kind = "video"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        if what := no_video(path):
            raise MediaError(f"{path} is not readable as a video: it is {what}")
        try:
            self._av = import_pyav(f"the video {path}")
        except EncodingError as error:
            raise MediaError(str(error)) from None
        first = None
        try:
            with self._open() as container:
                stream = container.streams.video[0]
                context, form, counted = stream.codec_context, container.format.name, stream.frames
                rate, length_s = stream.guessed_rate, (container.duration or 0) / self._av.time_base
                with contextlib.suppress(self._av.error.FFmpegError):
                    first = next(container.decode(stream), None)
                size = context.width, context.height
        except (self._av.error.FFmpegError, IndexError) as error:
            raise MediaError(
                f"{path} is not readable as a video, and no bag ({', '.join(BAG_SUFFIXES)}) by its name: "
                f"it is damaged, truncated or not a video ({error}). Try to play it, or convert it to H.264 in .mp4"
            ) from error
        if first is not None and first.interlaced_frame:
            raise MediaError(f"{path}: {INTERLACED}. Make whole ones first: ffmpeg -i INPUT -vf yadif OUTPUT.mp4")
        if not rate or rate >= 1000:
            log.warning("%s states no usable frame rate (%s); assuming %g Hz", path, rate, DEFAULT_FPS)
            rate = DEFAULT_FPS
        self.nominal_period_ns = round(1e9 / rate)
        if first is not None and "matroska" in form:  # its length counts from 0, that of others from the first frame
            length_s -= first.time or 0.0
        self._counted, self._length_s = counted > 0, length_s
        """Other files than MP4, MOV and AVI do not count their frames, but state their length."""
        self.count = counted or max(0, round(length_s * rate)) or None
        words = f"{'' if counted else 'about '}{self.count}" if self.count else "unknown number of"
        assumed = ", which is assumed (it has no times)" if form in ("h264", "hevc", "m4v", "mjpeg") else ""
        sides = "x".join(map(str, size if first is None else _upright(first).shape[1::-1]))
        self.description = f"video {path.name}: {sides} at {float(rate):g} Hz{assumed}, {words} frames"

    def _open(self) -> Any:
        # FFmpeg takes what stands before a colon for a protocol, except behind a slash.
        return self._av.open(str(self.path.absolute()))

    def entries(self) -> Generator[tuple[int, Callable[[], Frame]], None, None]:
        """See ``Source.entries``. The frames are bgr8, each of its own size; stamps start at 1 s.

        A picture that is damaged, or needs one that is, is a frame without an image.
        """
        number, stamp_ns = 0, 0
        with contextlib.closing(self._decoded()) as pictures:
            for time_ns, picture, problem in pictures:
                due_ns = FIRST_STAMP_NS + time_ns
                # Some containers repeat or lose time stamps; a stream whose time stands still is no stream.
                stamp_ns = due_ns if due_ns > stamp_ns else stamp_ns + self.nominal_period_ns
                number += 1
                yield stamp_ns - FIRST_STAMP_NS, partial(_video_frame, picture, problem, stamp_ns)
        number += len(self.skipped)
        period_s, read_s = self.nominal_period_ns * 1e-9, (stamp_ns - FIRST_STAMP_NS + self.nominal_period_ns) * 1e-9
        lost = ""
        if self._counted and number < (self.count or 0):
            lost = f"{self.count} frames, only {number}"
        elif not self._counted and self._length_s - read_s > 3 * period_s:  # by less if its rate is not constant
            lost = f"a length of {self._length_s:.1f} s, only {read_s:.1f} s"
        if self.whole and lost:
            self.note(f"{self.path.name} states {lost} can be decoded; it may be truncated")

    def _decoded(self) -> Generator[tuple[int, Any, str], None, None]:
        """Time from the first picture in ns, the decoded picture, and why it is not usable, if it is not."""
        with self._open() as container:
            stream = container.streams.video[0]
            context, damaged, run, first = stream.codec_context, "", list[Any](), None
            context.thread_type = "AUTO"
            context.flags |= self._av.codec.context.Flags.output_corrupt  # marked as such, not just missing
            if context.name == "mjpeg":  # it marks none; others would refuse pictures that are right
                context.options = {"err_detect": "explode"}
            for packet in container.demux(stream):
                try:
                    run += packet.decode()
                except self._av.error.FFmpegError as error:
                    damaged = DAMAGED
                    at_s = "?" if packet.pts is None else f"{float((packet.pts - (first or 0)) * stream.time_base):.3f}"
                    self.note(f"{self.path.name}: the picture at {at_s} s is damaged ({error.strerror})")
                if packet.size and 0 < len(run) <= MOST_B and run[-1].pict_type == self._av.video.frame.PictureType.B:
                    continue  # it is made of the picture behind it as well; hardware may write B-pictures alone
                corrupt = any(picture.is_corrupt for picture in run)
                for picture in run:
                    damaged = DAMAGED if corrupt else "" if picture.key_frame else damaged
                    if first is None:
                        first = picture.pts
                    pts = first if picture.pts is None else picture.pts
                    yield 0 if pts is None else round(1e9 * (pts - first) * stream.time_base), picture, damaged
                run = []


def _upright(picture: Any) -> np.ndarray:
    """BGR of a decoded picture, (H, W, 3) uint8, turned by what the file says of its orientation."""
    image = picture.reformat(format="bgr24", threads=1).to_ndarray()
    return np.ascontiguousarray(np.rot90(image, round(picture.rotation / 90)))


def _video_frame(picture: Any, problem: str, stamp_ns: int) -> Frame:
    if problem:
        return Frame.without_image(problem, stamp_ns, stamp_ns, "camera")
    return Frame.of(_upright(picture), "bgr8", stamp_ns, stamp_ns, "camera")


class CameraSource(Source):
    """A camera that OpenCV can open, stamped by the system clock at capture."""

    kind = "camera"
    live = True

    def __init__(self, index: int, fps: float | None) -> None:
        super().__init__()
        log_level: Any = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging  # OpenCV 4 and 5
        before = log_level.getLogLevel()
        log_level.setLogLevel(0)  # OpenCV's lines about a camera that is not there say no more than ours
        self._capture, self._index = cv2.VideoCapture(index), index
        log_level.setLogLevel(before)
        if not self._capture.isOpened():
            present = sorted(str(device) for device in Path("/dev").glob("video*")) or ["none"]
            raise MediaError(
                f"camera {index} cannot be opened; video devices on this machine: {', '.join(present)}. Check that it "
                "is plugged in, that no other program holds it, and that this user may read it (group video)"
            )
        if fps is not None:
            self._capture.set(cv2.CAP_PROP_FPS, fps)
        actual, *sides = map(self._capture.get, (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        actual = actual if 0 < actual < 1000 else DEFAULT_FPS
        self.nominal_period_ns = round(1e9 / actual)
        self.description = f"camera {index}: {sides[0]:.0f}x{sides[1]:.0f} at {actual:g} Hz"

    def frames(self) -> Iterator[Frame]:
        """See ``Source.frames``. Ends with ``MediaError`` when the camera stops delivering."""
        try:
            while True:
                read, image = self._capture.read()
                stamp_ns = time.time_ns()
                if not read:
                    raise MediaError(f"camera {self._index} stopped delivering images; is it still plugged in?")
                yield frame_from_array(image, stamp_ns, stamp_ns, f"camera_{self._index}")
        finally:
            self.close()

    def close(self) -> None:
        """See ``Source.close``."""
        self._capture.release()
