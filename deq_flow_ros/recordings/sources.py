# SPDX-License-Identifier: Apache-2.0
"""``open_source``, and the sources that OpenCV's video reader opens: video files and cameras."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2

from deq_flow_ros.errors import needed_by
from deq_flow_ros.imaging.frame import Frame, MediaError, frame_from_array
from deq_flow_ros.imaging.pictures import read_picture, several
from deq_flow_ros.imaging.video import INTERLACED
from deq_flow_ros.recordings.files import (
    BAG_SUFFIXES,
    DATA_SUFFIXES,
    IMAGE_SUFFIXES,
    check_name,
    has_metadata,
    is_bag_file,
    no_video,
    visible_files,
)  # fmt: skip
from deq_flow_ros.recordings.folder_source import FolderSource
from deq_flow_ros.recordings.source import DEFAULT_FPS, FIRST_STAMP_NS, Source

log = logging.getLogger(__name__)


def open_source(
    input: str | os.PathLike[str], topic: str | None = None, fps: float | None = None, start_s: float = 0.0,
    stop_s: float = math.inf,
) -> Source:  # fmt: skip
    """Open a bag (directory, .db3, .mcap, .bag), a video file, a folder of images or a camera ("0" or "/dev/video0").

    :param topic: image topic of a bag that has several.
    :param fps: rate of a folder (default 30 Hz), or asked of a camera; bags and videos carry their own.
    :param start_s: of a recording only the part from here to before ``stop_s`` is read, in s from its first frame.
    :raises MediaError: naming what is wrong with the input.
    """
    source = _open(input, topic or None, fps)
    try:
        source.choose_part(start_s, stop_s)
    except MediaError:
        source.close()
        raise
    return source


def _open(input: str | os.PathLike[str], topic: str | None, fps: float | None) -> Source:
    text = os.path.expanduser(os.fspath(input))  # a launch file, or quotes, may leave it to us
    check_name(text)
    if not text:
        raise MediaError("the input is empty; expected a bag, a video file, a folder of images or a camera index")
    if fps is not None and not fps > 0:
        raise MediaError(f"expected a frame rate above 0 Hz, got {fps}")
    path = Path(text).expanduser()  # in `input:=~/bag` no shell does
    camera = re.fullmatch(r"(?:/dev/video)?([0-9]+)", text)
    is_bag = path.name.lower().endswith(BAG_SUFFIXES) or is_bag_file(path)
    if path.is_dir():
        is_bag |= has_metadata(path) or any(file.name.endswith(DATA_SUFFIXES) for file in visible_files(path))
    if topic is not None and not is_bag:
        raise MediaError(f"a topic ({topic}) was given, but {text} is not a bag; only bags have topics")
    if camera and not path.is_file() and not path.is_dir():
        return CameraSource(int(camera[1]), fps)
    if "://" in text:
        raise MediaError(f"{text} is an address; expected a file or folder. A camera driver receives streams for ROS")
    if not path.exists():
        raise MediaError(f"{text} does not exist; expected a bag, a video file, a folder of images or a camera index")
    if not os.access(path, os.R_OK):
        raise MediaError(f"this user may not read {text}; check its permissions")
    if fps is not None and (is_bag or not path.is_dir()):
        kind = "bag" if is_bag else "file"
        raise MediaError(f"a frame rate ({fps:g} Hz) was given, but {text} is a {kind}, which has times of its own")
    if is_bag:
        with needed_by(f"reading the bag {path}"):  # what reads bags is not for apt to install
            from deq_flow_ros.recordings.bag_source import BagSource
        return BagSource(path, topic)
    if path.is_dir():
        return FolderSource(path, fps)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        pictures = 1
        with contextlib.suppress(MediaError):
            pictures = read_picture(path)[1]
        what = f"an image file: {several(pictures)}" if pictures > 1 else "a single image, which shows no motion"
        raise MediaError(f"{text} is {what}; give the folder that holds the sequence")
    return VideoSource(path)


class VideoSource(Source):
    """Frames of a video file, stamped by their presentation time."""

    kind = "video"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        capture = self._open()
        fps = capture.get(cv2.CAP_PROP_FPS)
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        size = _size(capture)
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
        """See ``Source.frames``. The frames are bgr8; stamps start at 1 s."""
        capture = self._open()
        number, stamp_ns, self.left_out = 0, 0, 0
        try:
            while capture.grab():
                due_ns = FIRST_STAMP_NS + round(capture.get(cv2.CAP_PROP_POS_MSEC) * 1e6)
                # Some containers repeat or lose time stamps; a stream whose time stands still is no stream.
                stamp_ns = due_ns if due_ns > stamp_ns else stamp_ns + self.nominal_period_ns
                part = self.part_of(stamp_ns - FIRST_STAMP_NS)
                if part > 0:
                    break
                if part < 0:
                    self.left_out += 1
                    continue
                read, image = capture.retrieve()
                if not read:
                    break
                yield frame_from_array(image, stamp_ns, stamp_ns, "camera")
                number += 1
        finally:
            capture.release()
        if number == 0:
            self.check_part()
            raise MediaError(
                f"{self.path} opens as a video, but not one of its frames can be decoded; it is damaged or truncated"
            )
        self.skipped = []
        if self.whole and self.count is not None and number < self.count:
            states, found = f"{self.count} frames", f"{number}"
            if not self._counted:
                length_s = self.count * self.nominal_period_ns * 1e-9 - self._starts_s
                read_s = (stamp_ns - FIRST_STAMP_NS + self.nominal_period_ns) * 1e-9
                if length_s - read_s < 3 * self.nominal_period_ns * 1e-9:  # only its rate is not constant
                    return
                states, found = f"a length of {length_s:.1f} s", f"{read_s:.1f} s"
            self.skipped = [f"{self.path.name} states {states}, only {found} can be decoded; it may be truncated"]
            log.warning(self.skipped[0])


def _look_at(path: Path) -> tuple[float, str]:
    """What a video's first frame adds to the length that it states, in s, and a word if its rate is only assumed.

    Without PyAV (``pip install av``), nothing is known of it.

    :raises MediaError: if its frames are interlaced. Each is of two times then, and OpenCV 5 fills them with whatever
        lies in its memory.
    """
    try:
        import av  # not at the top: it takes 50 ms, and no rosdep key installs it
    except ImportError:
        return 0.0, ""
    try:
        with av.open(str(path.absolute())) as container:
            # The length that Matroska states counts from 0, that of other containers from the first frame.
            start_s = (container.start_time or 0) * 1e-6 if "matroska" in container.format.name else 0.0
            untimed = container.format.name in ("h264", "hevc", "m4v", "mjpeg")
            frame = next(container.decode(video=0), None)
    except (av.error.FFmpegError, IndexError):
        return 0.0, ""
    if frame is not None and frame.interlaced_frame:
        raise MediaError(f"{path}: {INTERLACED}. Make whole ones first: ffmpeg -i INPUT -vf yadif OUTPUT.mp4")
    return max(0.0, start_s), ", which is assumed (it has no times)" if untimed else ""


def _size(capture: cv2.VideoCapture) -> str:
    return f"{capture.get(cv2.CAP_PROP_FRAME_WIDTH):.0f}x{capture.get(cv2.CAP_PROP_FRAME_HEIGHT):.0f}"


class CameraSource(Source):
    """A camera that OpenCV can open, stamped by the system clock at capture."""

    kind = "camera"
    live = True

    def __init__(self, index: int, fps: float | None) -> None:
        super().__init__()
        log_level: Any = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging  # OpenCV 4 and 5
        before = log_level.getLogLevel()
        log_level.setLogLevel(0)  # OpenCV's lines about a camera that is not there say no more than ours
        self.capture = cv2.VideoCapture(index)
        log_level.setLogLevel(before)
        if not self.capture.isOpened():
            present = sorted(str(device) for device in Path("/dev").glob("video*")) or ["none"]
            raise MediaError(
                f"camera {index} cannot be opened; video devices on this machine: {', '.join(present)}. Check that it "
                "is plugged in, that no other program holds it, and that this user may read it (group video)"
            )
        if fps is not None:
            self.capture.set(cv2.CAP_PROP_FPS, fps)
        actual = self.capture.get(cv2.CAP_PROP_FPS)
        actual = actual if 0 < actual < 1000 else DEFAULT_FPS
        self.index = index
        self.nominal_period_ns = round(1e9 / actual)
        self.description = f"camera {index}: {_size(self.capture)} at {actual:g} Hz"

    def frames(self) -> Iterator[Frame]:
        """See ``Source.frames``. Ends with ``MediaError`` when the camera stops delivering."""
        try:
            while True:
                read, image = self.capture.read()
                stamp_ns = time.time_ns()
                if not read:
                    raise MediaError(f"camera {self.index} stopped delivering images; is it still plugged in?")
                yield frame_from_array(image, stamp_ns, stamp_ns, f"camera_{self.index}")
        finally:
            self.close()

    def close(self) -> None:
        """See ``Source.close``."""
        self.capture.release()
