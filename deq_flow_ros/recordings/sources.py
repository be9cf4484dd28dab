# SPDX-License-Identifier: Apache-2.0
"""``open_source``, and all sources but bags: video files, cameras and folders of image files."""

from __future__ import annotations

import contextlib
import itertools
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
from deq_flow_ros.recordings.files import (
    BAG_SUFFIXES,
    DATA_SUFFIXES,
    IMAGE_SUFFIXES,
    check_name,
    has_metadata,
    is_bag_file,
    no_video,
    recordings_below,
    visible_files,
)  # fmt: skip
from deq_flow_ros.recordings.image_names import in_order, listed
from deq_flow_ros.recordings.look_at_video import look_at_video
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
        self._starts_s, assumed = look_at_video(path)
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


class FolderSource(Source):
    """The images of a folder, ``in_order``. Their sizes may differ and are passed on as they are."""

    kind = "folder"

    def __init__(self, path: Path, fps: float | None) -> None:
        super().__init__()
        self.path = path
        named = (child for child in visible_files(path) if child.suffix.lower() in IMAGE_SUFFIXES)
        # A link that leads nowhere is an image that cannot be read.
        files = [child for child in named if child.is_file() or not child.exists()]
        if not files:
            raise MediaError(f"the folder {path} {_what_is_in(path)}")
        self._order = in_order(files, fps)
        self.files, self.count, self.nominal_period_ns = self._order.files, len(files), self._order.period_ns
        self.description = f"folder {path.name}: {self.count} images {self._order.rate}"

    def frames(self) -> Iterator[Frame]:
        """See ``Source.frames``. A file that cannot be read leaves its time slot empty and is named in ``skipped``."""
        stamps_ns, missing = self._order.stamps_ns, self._order.missing
        numbers = [n for n, stamp_ns in enumerate(stamps_ns) if self.part_of(stamp_ns - stamps_ns[0]) == 0]
        if not numbers:
            self.check_part()
        self.skipped, self.left_out = [missing] if missing else [], numbers[0]
        for number in numbers:
            file, stamp_ns = self.files[number], stamps_ns[number]
            try:
                image, pictures = read_picture(file)
                frame = frame_from_array(image, stamp_ns, stamp_ns, "camera")
            except (MediaError, OSError) as error:
                self.skipped.append(f"{file.name}: {error}")
                self.left_out += 1
                log.warning("left out %s: %s", file, error)
                continue
            if pictures > 1:
                self.skipped.append(f"{file.name}: {several(pictures)}")
                log.warning("%s: %s", file, self.skipped[-1])
            yield frame
        if (unreadable := self.left_out - numbers[0]) == len(numbers):
            none = f"none of the {len(numbers)} images in {self.path} can be read"
            raise MediaError(f"{none}; the first: {self.skipped[bool(missing)]}")
        if unreadable:
            log.warning("%d of %d images in %s could not be read", unreadable, len(numbers), self.path)


def _what_is_in(folder: Path) -> str:
    """Of a folder that is no recording itself, as the outer ones of data sets are: those below it, else what it has."""
    below = [str(recording.relative_to(folder)) for recording in itertools.islice(recordings_below(folder, depth=5), 6)]
    if below:
        inner = f"the recordings below it: {listed(below)}"
        return f"holds no image itself; {inner}; give one of them, or all of them with evaluate_bag --bags"
    there = listed(sorted(child.name for child in folder.iterdir())) or "nothing"
    return f"is not a bag and holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); it holds {there}"
