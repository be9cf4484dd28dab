# SPDX-License-Identifier: Apache-2.0
"""Folders of image files."""

from __future__ import annotations

import io
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from deq_flow_ros.imaging.frame import Frame, MediaError, frame_from_array
from deq_flow_ros.recordings.files import recordings_below
from deq_flow_ros.recordings.names import IMAGE_SUFFIXES, natural_order, visible_files
from deq_flow_ros.recordings.source import DEFAULT_FPS, FIRST_STAMP_NS, Source

log = logging.getLogger(__name__)


def read_picture(file: Path, flags: int = cv2.IMREAD_UNCHANGED) -> tuple[np.ndarray, int]:
    """An image file as OpenCV decodes it, and the number of pictures in it, of which this is the first.

    :param flags: of ``cv2.imdecode``.
    :raises OSError: if the file cannot be read.
    :raises MediaError: if it is no image, or not a whole one.
    """
    data = np.fromfile(file, np.uint8)  # given a name that is not UTF-8, OpenCV ends the process
    pictures = 1
    try:
        # OpenCV makes a picture of half a JPEG file, and says nothing of the further pages of a file.
        with Image.open(io.BytesIO(data.data)) as look:
            if look.format in ("JPEG", "MPO"):
                look.draft(None, (1, 1))  # an eighth of the size, which is decoded fast
                look.load()
            else:
                pictures = getattr(look, "n_frames", 1)
    except (UnidentifiedImageError, Image.DecompressionBombError):
        pass
    except (OSError, ValueError) as error:
        raise MediaError(f"not a whole image: {error}") from error
    image = cv2.imdecode(data, flags) if data.size else None
    if image is None:
        raise MediaError("not a readable image")
    return image, pictures


def several(pictures: int) -> str:
    """What is said of a file that holds so many pictures."""
    return f"it holds {pictures} pictures, of which only the first is read; a video of them is read to its end"


class FolderSource(Source):
    """The images of a folder in natural order (2 before 10); their sizes may differ and are passed on as they are."""

    kind = "folder"

    def __init__(self, path: Path, fps: float | None) -> None:
        super().__init__()
        self.path = path
        named = (child for child in visible_files(path) if child.suffix.lower() in IMAGE_SUFFIXES)
        # A link that leads nowhere is an image that cannot be read.
        files = [child for child in named if child.is_file() or (child.is_symlink() and not child.exists())]
        if not files:
            raise MediaError(f"the folder {path} {_what_is_in(path)}")
        self.files = natural_order(files)
        fps = fps or DEFAULT_FPS
        self.count = len(files)
        self.nominal_period_ns = round(1e9 / fps)
        self.description = f"folder {path.name}: {self.count} images at {fps:g} Hz"

    def frames(self) -> Iterator[Frame]:
        """See ``Source.frames``. A file that cannot be read leaves its time slot empty and is named in ``skipped``."""
        numbers = [n for n in range(len(self.files)) if self.part_of(n * self.nominal_period_ns) == 0]
        if not numbers:
            self.check_part()
        self.skipped, self.left_out, unreadable = [], numbers[0], 0
        for number in numbers:
            file, stamp_ns = self.files[number], FIRST_STAMP_NS + number * self.nominal_period_ns
            try:
                image, pictures = read_picture(file)
                frame = frame_from_array(image, stamp_ns, stamp_ns, "camera")
            except (MediaError, OSError) as error:
                self.skipped.append(f"{file.name}: {error}")
                self.left_out += 1
                log.warning("left out %s: %s", file, error)
                unreadable += 1
                continue
            if pictures > 1:
                self.skipped.append(f"{file.name}: {several(pictures)}")
                log.warning("%s: %s", file, self.skipped[-1])
            yield frame
        if unreadable == len(numbers):
            none = f"none of the {len(numbers)} images in {self.path} can be read"
            raise MediaError(f"{none}; the first: {self.skipped[0]}")
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


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
