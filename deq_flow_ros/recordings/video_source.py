# SPDX-License-Identifier: Apache-2.0
"""Video files, read by PyAV where it is installed, else by OpenCV."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from deq_flow_ros.imaging import Frame, MediaError, frame_from_array
from deq_flow_ros.imaging.video import INTERLACED, LEAST_PYAV
from deq_flow_ros.recordings.files import BAG_SUFFIXES, no_video
from deq_flow_ros.recordings.source import DEFAULT_FPS, FIRST_STAMP_NS, Source

log = logging.getLogger(__name__)

Decoded = tuple[int, Callable[[], np.ndarray], str]
"""Time from the first picture in ns, the picture once it is wanted, (H, W, 3) uint8 BGR, and why it is not usable."""
DAMAGED = "the picture is damaged, or made of one that is, back to a key frame"
MOST_B = 16
"""B-pictures in a row that may be made of the picture behind them: a decoder of H.264 or H.265 holds no more."""


class VideoSource(Source):
    """Frames of a video file, stamped by their presentation time."""

    kind = "video"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        capture = self._open()
        fps = capture.get(cv2.CAP_PROP_FPS)
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        size = size_of(capture)
        capture.release()
        if not 0 < fps < 1000:
            log.warning("%s states no usable frame rate (%s); assuming %g Hz", path, fps, DEFAULT_FPS)
            fps = DEFAULT_FPS
        self.count = count if count > 0 else None
        with path.open("rb") as file:
            head = file.read(12)
        self._counted = head[4:8] == b"ftyp" or head[:4] == b"RIFF"
        """Whether the file (MP4, MOV, AVI) counts its frames. OpenCV guesses from length and rate of any other."""
        self._starts_s, assumed = _look_at(path)
        self.nominal_period_ns = round(1e9 / fps)
        count_words = f"{'' if self._counted else 'about '}{self.count}" if self.count else "unknown number of"
        self.description = f"video {path.name}: {size} at {fps:g} Hz{assumed}, {count_words} frames"

    def _open(self) -> cv2.VideoCapture:
        if what := no_video(self.path):
            raise MediaError(f"{self.path} is not readable as a video: it is {what}")
        # FFmpeg takes what stands before a colon for a protocol, except behind a slash.
        capture = cv2.VideoCapture(str(self.path.absolute()), cv2.CAP_FFMPEG)
        if not capture.isOpened() or capture.get(cv2.CAP_PROP_FRAME_WIDTH) <= 0:
            raise MediaError(
                f"{self.path} is not readable as a video, and no bag ({', '.join(BAG_SUFFIXES)}) by its name: "
                "it is damaged, truncated or not a video. Try to play it, or convert it to H.264 in .mp4"
            )
        return capture

    def frames(self) -> Iterator[Frame]:
        """See ``Source.frames``. The frames are bgr8, each of its own size; stamps start at 1 s.

        With PyAV, a picture that is damaged, or needs one that is, is a frame without an image. OpenCV smears it, and
        stretches all pictures to one size.
        """
        number, readable, stamp_ns, why, self.left_out, self.skipped = 0, 0, 0, "", 0, []
        with contextlib.closing(self._by_pyav() if _with_pyav() else self._by_opencv()) as pictures:
            for time_ns, image, problem in pictures:
                due_ns = FIRST_STAMP_NS + time_ns
                # Some containers repeat or lose time stamps; a stream whose time stands still is no stream.
                stamp_ns = due_ns if due_ns > stamp_ns else stamp_ns + self.nominal_period_ns
                part = self.part_of(stamp_ns - FIRST_STAMP_NS)
                if part > 0:
                    break
                if part < 0:
                    self.left_out += 1
                    continue
                if problem:
                    why = f": {problem}"
                    yield Frame.without_image(problem, stamp_ns, stamp_ns, "camera")
                else:
                    yield frame_from_array(image(), stamp_ns, stamp_ns, "camera")
                    readable += 1
                number += 1
        if readable == 0:
            if number == 0:
                self.check_part()
            raise MediaError(
                f"{self.path} opens as a video, but not one of its frames can be decoded; "
                f"it is damaged or truncated{why}"
            )
        number += len(self.skipped)
        if self.whole and self.count is not None and number < self.count:
            states, found = f"{self.count} frames", f"{number}"
            if not self._counted:
                length_s = self.count * self.nominal_period_ns * 1e-9 - self._starts_s
                read_s = (stamp_ns - FIRST_STAMP_NS + self.nominal_period_ns) * 1e-9
                if length_s - read_s < 3 * self.nominal_period_ns * 1e-9:  # only its rate is not constant
                    return
                states, found = f"a length of {length_s:.1f} s", f"{read_s:.1f} s"
            self.skipped.append(f"{self.path.name} states {states}, only {found} can be decoded; it may be truncated")
            log.warning(self.skipped[-1])

    def _by_opencv(self) -> Generator[Decoded, None, None]:
        capture = self._open()
        try:
            while capture.grab():
                yield round(capture.get(cv2.CAP_PROP_POS_MSEC) * 1e6), lambda: capture.retrieve()[1], ""
        finally:
            capture.release()

    def _by_pyav(self) -> Generator[Decoded, None, None]:
        import av

        with av.open(str(self.path.absolute())) as container:
            stream = container.streams.video[0]
            context, damaged, run, first = stream.codec_context, "", list[Any](), None
            context.thread_type = "AUTO"
            context.flags |= av.codec.context.Flags.output_corrupt  # marked as such, not just missing
            if context.name == "mjpeg":  # it marks none; others would refuse pictures that are right
                context.options = {"err_detect": "explode"}
            for packet in container.demux(stream):
                try:
                    run += packet.decode()
                except av.error.FFmpegError as error:
                    damaged = DAMAGED
                    at_s = "?" if packet.pts is None else f"{float((packet.pts - (first or 0)) * stream.time_base):.3f}"
                    self.skipped.append(f"{self.path.name}: the picture at {at_s} s is damaged ({error.strerror})")
                    log.warning(self.skipped[-1])
                if packet.size and 0 < len(run) <= MOST_B and run[-1].pict_type == av.video.frame.PictureType.B:
                    continue  # it is made of the picture behind it as well; hardware may write B-pictures alone
                corrupt = any(frame.is_corrupt for frame in run)
                for frame in run:
                    damaged = DAMAGED if corrupt else "" if frame.key_frame else damaged
                    if first is None:
                        first = frame.pts
                    time_ns = 0 if frame.pts is None else round(1e9 * (frame.pts - first) * stream.time_base)
                    yield time_ns, partial(_upright, frame), damaged
                run = []


def _upright(frame: Any) -> np.ndarray:
    """BGR of a decoded frame, turned as OpenCV turns it, by what the file says of its orientation."""
    image = frame.reformat(format="bgr24", threads=1).to_ndarray()
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))


def _with_pyav() -> bool:
    try:
        import av  # not at the top: it takes 50 ms, and no rosdep key installs it
    except ImportError:
        return False
    return int(av.__version__.partition(".")[0]) >= LEAST_PYAV  # Ubuntu's is older, and lacks what is used here


def _look_at(path: Path) -> tuple[float, str]:
    """What a video's first frame adds to the length that it states, in s, and a word if its rate is only assumed.

    Without PyAV (``pip install av``), nothing is known of it.

    :raises MediaError: if its frames are interlaced. Each is of two times then, and OpenCV 5 fills them with whatever
        lies in its memory.
    """
    if not _with_pyav():
        return 0.0, ""
    import av

    try:
        with av.open(str(path.absolute())) as container:
            frame = next(container.decode(video=0), None)
            # The length that Matroska states counts from 0, that of other containers from the first frame.
            start_s = frame.time or 0.0 if frame is not None and "matroska" in container.format.name else 0.0
            untimed = container.format.name in ("h264", "hevc", "m4v", "mjpeg")
    except (av.error.FFmpegError, IndexError):
        return 0.0, ""
    if frame is not None and frame.interlaced_frame:
        raise MediaError(f"{path}: {INTERLACED}. Make whole ones first: ffmpeg -i INPUT -vf yadif OUTPUT.mp4")
    return max(0.0, start_s), ", which is assumed (it has no times)" if untimed else ""


def size_of(capture: cv2.VideoCapture) -> str:
    """Width and height of the pictures that OpenCV gives, for people."""
    return f"{capture.get(cv2.CAP_PROP_FRAME_WIDTH):.0f}x{capture.get(cv2.CAP_PROP_FRAME_HEIGHT):.0f}"
