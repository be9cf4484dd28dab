# SPDX-License-Identifier: Apache-2.0
"""Reading and writing of recordings: bags, videos, folders of images, cameras and flow files. Neither torch nor ROS.

Here are ``open_source``, reading any source ahead in a thread, and folders of images, by what their names say.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import queue
import re
import statistics
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from deq_flow_ros import needed_by
from deq_flow_ros.imaging import Frame, MediaError, frame_from_array
from deq_flow_ros.imaging.pictures import read_picture, several
from deq_flow_ros.recordings import files
from deq_flow_ros.recordings.source import DEFAULT_FPS, FIRST_STAMP_NS, CameraSource, Source, VideoSource

__all__ = ["Frame", "FrameReader", "MediaError", "Source", "open_source"]


def open_source(
    input: str | os.PathLike[str], topic: str | None = None, fps: float | None = None, start_s: float = 0.0,
    stop_s: float = math.inf,
) -> Source:  # fmt: skip
    """Open a bag (directory, .db3, .mcap, .bag), a video file, a folder of images or a camera ("0" or "/dev/video0").

    :param topic: image topic of a bag that has several.
    :param fps: rate of a folder (default 30 Hz), or asked of a camera; bags and videos carry their own.
    :param start_s, stop_s: part of a recording that is read, in s from its first frame.
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
    text = os.path.expanduser(os.fspath(input))  # in `input:=~/bag` no shell does
    files.check_name(text)
    if fps is not None and not fps > 0:
        raise MediaError(f"expected a frame rate above 0 Hz, got {fps}")
    path = Path(text)
    camera = re.fullmatch(r"(?:/dev/video)?([0-9]+)", text)
    is_bag = path.name.lower().endswith(files.BAG_SUFFIXES) or files.is_bag_file(path)
    if path.is_dir():
        inside = files.visible_files(path)
        is_bag |= files.has_metadata(path) or any(file.name.endswith(files.DATA_SUFFIXES) for file in inside)
    if topic is not None and not is_bag:
        raise MediaError(f"a topic ({topic}) was given, but {text} is not a bag; only bags have topics")
    if camera and not path.is_file() and not path.is_dir():
        return CameraSource(int(camera[1]), fps)
    if "://" in text:
        raise MediaError(f"{text} is an address; expected a file or folder. A camera driver receives streams for ROS")
    if not text or not path.exists():
        what = f"{text} does not exist" if text else "the input is empty"
        raise MediaError(f"{what}; expected a bag, a video file, a folder of images or a camera index")
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
    if path.suffix.lower() in files.IMAGE_SUFFIXES:
        what = "a single image, which shows no motion"
        with contextlib.suppress(MediaError):
            what = f"an image file: {several(pictures)}" if (pictures := read_picture(path)[1]) > 1 else what
        raise MediaError(f"{text} is {what}; give the folder that holds the sequence")
    return VideoSource(path)


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


DATE = re.compile(
    r"(?<![0-9])(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:[0-2]\d{1,9})?(?![0-9])", re.ASCII
)
"""A date, and a time of the day behind it, which do not count on as numbers do."""
USUAL_PERIODS_NS = (100_000, 60 * 10**9)
"""Numbers that count by less or more than these are no times of a camera."""


def times_in_names(names: Sequence[str]) -> list[int] | None:
    """The times in ns since 1970 that names of images without suffixes say; None unless all say different ones.

    EuRoC names images by nanoseconds, TUM RGB-D by seconds with a fraction, others by milliseconds, or by seconds and
    nanoseconds.
    """
    times: list[int] = []
    for name in names:
        match = re.fullmatch(r"(?:.*\D)?(\d{10}|\d{13}|\d{16}|\d{19})(?:([._-])(\d{1,9}))?\D*", name, re.ASCII)
        if match is None or (match[2] and len(match[1]) != 10):
            return None
        part = (match[3] or "0").ljust(9, "0") if match[2] == "." else match[3] or "0"
        time_ns = int(match[1]) * 10 ** (19 - len(match[1])) + int(part)
        if not 946_684_800 <= time_ns * 1e-9 < 4_102_444_800:  # from 2000 to 2100
            return None
        times.append(time_ns)
    if len(times) < 2 or len(set(times)) < len(times) or any(map(DATE.search, names)):
        return None
    period_ns = statistics.median(after - before for before, after in itertools.pairwise(sorted(times)))
    return times if USUAL_PERIODS_NS[0] <= period_ns <= USUAL_PERIODS_NS[1] else None


def places_in_names(names: Sequence[str]) -> tuple[list[int], list[int]]:
    """The places from 0 on that the numbers in the names of images give them, and the numbers that are missing.

    Without one number that counts on, image follows image. If every tenth number is there, none is missing.
    """
    following: tuple[list[int], list[int]] = list(range(len(names))), []
    parts = [re.split("([0-9]+)", name) for name in names]
    if len({tuple(part[::2]) for part in parts}) > 1:
        return following
    changing = [run for run in zip(*(map(int, part[1::2]) for part in parts), strict=True) if len(set(run)) > 1]
    if len(changing) != 1 or len(names) < 3 or all(map(DATE.search, names)):
        return following
    numbers = changing[0]
    steps = [after - before for before, after in itertools.pairwise(numbers)]
    step = math.gcd(*steps)
    if min(steps) < 1 or statistics.median(steps) != step:
        return following
    places = [(number - numbers[0]) // step for number in numbers]
    there = set(numbers)
    return places, [n for n in range(numbers[0], numbers[-1], step) if n not in there] if places[-1] < 10**6 else []


def check_one_kind(names: Iterable[str]) -> None:
    """Refuse images of which several have the same number, as those of two cameras or of colour and depth.

    :raises MediaError: naming two of them.
    """
    numbered: dict[tuple[int, ...], str] = {}
    for name in names:
        runs = re.findall("[0-9]+", name)
        before = numbered.setdefault(tuple(map(int, runs)), name) if runs else name
        if re.sub("[0-9]+", "#", before) != re.sub("[0-9]+", "#", name):
            why = "those of several cameras, or of colour and depth, are no sequence"
            hint = "move each kind into a folder of its own"
            raise MediaError(f"the images {before} and {name} have the same number: {why}; {hint}")


def _listed(names: Iterable[str]) -> str:
    """The first of some names, for people."""
    first = list(itertools.islice(names, 6))
    return ", ".join(first[:5]) + (", ..." if len(first) > 5 else "")


class FolderSource(Source):
    """The images of a folder, at the times in their names; without those or with ``fps``, in natural order.

    Their sizes may differ and are passed on as they are.
    """

    kind = "folder"

    def __init__(self, path: Path, fps: float | None) -> None:
        super().__init__()
        self.path = path
        named = (child for child in files.visible_files(path) if child.suffix.lower() in files.IMAGE_SUFFIXES)
        # A link that leads nowhere is an image that cannot be read.
        self.files = files.natural_order(child for child in named if child.is_file() or not child.exists())
        if not self.files:
            raise MediaError(f"the folder {path} {_what_is_in(path)}")
        check_one_kind(file.name for file in self.files)
        self.count, self._missing = len(self.files), ""
        names = [file.stem for file in self.files]
        times_ns = times_in_names(names) if fps is None else None
        if times_ns is not None:
            self._stamps_ns = sorted(times_ns)
            self.files = [file for _, file in sorted(zip(times_ns, self.files, strict=True))]
            steps_ns = (after - before for before, after in itertools.pairwise(self._stamps_ns))
            self.nominal_period_ns = round(statistics.median(steps_ns))
            rate = f"at the times in their names, about {1e9 / self.nominal_period_ns:.1f} Hz"
        else:
            self.nominal_period_ns = round(1e9 / (fps or DEFAULT_FPS))
            places, missing = places_in_names(names)
            self._stamps_ns = [FIRST_STAMP_NS + place * self.nominal_period_ns for place in places]
            if missing:
                words = f"images are missing, by the numbers in their names ({_listed(map(str, missing))})"
                self._missing = f"{words}: their times have no frame"
            rate = f"at {fps:g} Hz" if fps else f"at {DEFAULT_FPS:g} Hz, which is assumed (--fps sets another)"
        self.description = f"folder {path.name}: {self.count} images {rate}"

    def entries(self) -> Generator[tuple[int, Callable[[], Frame]], None, None]:
        """See ``Source.entries``. A file that cannot be read leaves its time slot empty."""
        self.skipped += [self._missing] if self._missing else []
        for file, stamp_ns in zip(self.files, self._stamps_ns, strict=True):
            yield stamp_ns - self._stamps_ns[0], partial(self._read, file, stamp_ns)

    def _read(self, file: Path, stamp_ns: int) -> Frame:
        try:
            image, pictures = read_picture(file)
            frame = frame_from_array(image, stamp_ns, stamp_ns, "camera")
        except (MediaError, OSError) as error:
            raise MediaError(f"{file.name}: {error}") from error
        if pictures > 1:
            self.note(f"{file.name}: {several(pictures)}")
        return frame


def _what_is_in(folder: Path) -> str:
    """Of a folder that is no recording itself, as the outer ones of data sets are: those below it, else what it has."""
    if below := _listed(str(recording.relative_to(folder)) for recording in files.recordings_below(folder, depth=5)):
        inner = f"the recordings below it: {below}"
        return f"holds no image itself; {inner}; give one of them, or all of them with evaluate_bag --bags"
    there = _listed(sorted(child.name for child in folder.iterdir())) or "nothing"
    return f"is not a bag and holds no image ({', '.join(sorted(files.IMAGE_SUFFIXES))}); it holds {there}"
