# SPDX-License-Identifier: Apache-2.0
"""``open_source``, cameras that OpenCV opens, and reading any source ahead in a thread."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import queue
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2

from deq_flow_ros import needed_by
from deq_flow_ros.imaging import Frame, MediaError, frame_from_array
from deq_flow_ros.imaging.pictures import read_picture, several
from deq_flow_ros.recordings.files import (
    BAG_SUFFIXES,
    DATA_SUFFIXES,
    IMAGE_SUFFIXES,
    check_name,
    has_metadata,
    is_bag_file,
    visible_files,
)  # fmt: skip
from deq_flow_ros.recordings.source import DEFAULT_FPS, FolderSource, Source
from deq_flow_ros.recordings.video_source import VideoSource, size_of


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
        self.description = f"camera {index}: {size_of(self.capture)} at {actual:g} Hz"

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
