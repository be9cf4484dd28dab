# SPDX-License-Identifier: Apache-2.0
"""What every image source yields, whatever it reads from; and folders of images, in the order and at the times that
their names say.
"""

from __future__ import annotations

import abc
import itertools
import logging
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deq_flow_ros.imaging import Frame, MediaError, frame_from_array
from deq_flow_ros.imaging.pictures import read_picture, several
from deq_flow_ros.recordings.files import IMAGE_SUFFIXES, natural_order, recordings_below, visible_files

log = logging.getLogger(__name__)

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


DATE = re.compile(
    r"(?<![0-9])(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:[0-2]\d{1,9})?(?![0-9])", re.ASCII
)
"""A date, and a time of the day behind it, which do not count on as numbers do."""
USUAL_PERIODS_NS = (100_000, 60 * 10**9)
"""Numbers that count by less or more than these are no times of a camera."""


def times_in_names(names: Sequence[str]) -> list[int] | None:
    """The times in ns since 1970 that the names of images say; None unless all say different ones.

    :param names: without their suffixes. EuRoC names images by nanoseconds, TUM RGB-D by
        seconds with a fraction, others by milliseconds, or by seconds and nanoseconds.
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

    :param names: without their suffixes, in natural order.
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
            raise MediaError(
                f"the images {before} and {name} have the same number: those of several cameras, or of colour and "
                "depth, are no sequence; move each kind into a folder of its own"
            )


def _listed(names: Sequence[str]) -> str:
    """The first of some names, for people."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


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
        self.count = len(files)
        self.description = f"folder {path.name}: {self.count} images {self._put_in_order(files, fps)}"

    def _put_in_order(self, files: Iterable[Path], fps: float | None) -> str:
        """Put images at the times in their names; without those or with ``fps``, in natural order by their numbers.

        :returns: how often they come, and how that is known, for people.
        :raises MediaError: see ``check_one_kind``.
        """
        self.files, self._missing = natural_order(files), ""
        names = [file.stem for file in self.files]
        check_one_kind(file.name for file in self.files)
        times_ns = times_in_names(names) if fps is None and len(names) > 1 else None
        if times_ns is not None:
            self._stamps_ns = sorted(times_ns)
            self.files = [file for _, file in sorted(zip(times_ns, self.files, strict=True))]
            steps_ns = (after - before for before, after in itertools.pairwise(self._stamps_ns))
            self.nominal_period_ns = round(statistics.median(steps_ns))
            return f"at the times in their names, about {1e9 / self.nominal_period_ns:.1f} Hz"
        self.nominal_period_ns = round(1e9 / (fps or DEFAULT_FPS))
        places, missing = places_in_names(names)
        self._stamps_ns = [FIRST_STAMP_NS + place * self.nominal_period_ns for place in places]
        if missing:
            numbers = _listed([str(number) for number in missing])
            words = f"images are missing, by the numbers in their names ({numbers})"
            self._missing = f"{words}: their times have no frame"
        return f"at {fps:g} Hz" if fps else f"at {DEFAULT_FPS:g} Hz, which is assumed (--fps sets another)"

    def frames(self) -> Iterator[Frame]:
        """See ``Source.frames``. A file that cannot be read leaves its time slot empty and is named in ``skipped``."""
        stamps_ns, missing = self._stamps_ns, self._missing
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
        inner = f"the recordings below it: {_listed(below)}"
        return f"holds no image itself; {inner}; give one of them, or all of them with evaluate_bag --bags"
    there = _listed(sorted(child.name for child in folder.iterdir())) or "nothing"
    return f"is not a bag and holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); it holds {there}"
