# SPDX-License-Identifier: Apache-2.0
"""Names of files: which are recordings, which belong together, and in which order they come; and a name within them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from deq_flow_ros.imaging.frame import MediaError

DATA_SUFFIXES = (".mcap", ".db3", ".mcap.zstd", ".db3.zstd")
"""Data files of a rosbag2."""
BAG_SUFFIXES = (*DATA_SUFFIXES, ".bag", ".bag.active")
MCAP_MAGIC, ROS1_MAGIC, SQLITE_MAGIC = b"\x89MCAP0\r\n", b"#ROSBAG V2.0\n", b"SQLite format 3\0"
"""What the files of bags begin with."""
METADATA = "metadata.yaml"
STATUS_NAME = "deq_flow_ros: flow"
"""The name of the status of a frame's account, in recordings and on the topic. A camera's name is appended."""
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def is_bag_file(file: Path) -> bool:
    """Whether a file begins as those of bags do, whatever its name is."""
    return file.is_file() and any(begins(file, magic) for magic in (MCAP_MAGIC, ROS1_MAGIC, SQLITE_MAGIC))


def begins(file: Path, magic: bytes) -> bool:
    """Whether a file begins with these bytes."""
    with file.open("rb") as opened:
        return opened.read(len(magic)) == magic


def stem_of_part(name: str) -> str:
    """What the names of a split recording's files have in common: "drive" of "drive_3.mcap"."""
    return re.sub(r"_\d+$", "", name.partition(".")[0])


def missing_parts(names: Iterable[str], folder: str) -> list[str]:
    """The parts of a split recording that must have been there: rosbag2 numbers them from 0, without leading zeros.

    :param names: of the files that are there.
    :param folder: name of their folder, which rosbag2 names its files after.
    """
    parts = {name.partition(".")[0] for name in names}
    numbers = [re.fullmatch(r"(.*)_(0|[1-9]\d{0,4})", part) for part in parts]
    found = {int(match[2]): match[1] for match in numbers if match}
    stem = next(iter(found.values()), "")
    if len(found) < len(parts) or (len(parts) < 2 and stem != folder):
        return []
    return [f"{stem}_{number}" for number in range(max(found, default=0)) if number not in found]


def check_name(path: str | os.PathLike[str]) -> None:
    """Refuse the name of a file or folder that not every library can handle: OpenCV ends the process.

    :raises MediaError: for a name that is not UTF-8, from an old disk or a foreign system for instance.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise MediaError(
            f"expected a name in UTF-8, got {os.fsencode(path)!r}; rename it, or give a link to it"
        ) from None


def visible_files(folder: Path) -> list[Path]:
    """What lies in a folder, without what is hidden: macOS puts ``._name`` beside each file that it copies."""
    return [child for child in folder.iterdir() if not child.name.startswith(".")]


def natural_order(paths: Iterable[Path]) -> list[Path]:
    """Sorted by name, numbers by their value: 2 before 10."""
    return sorted(
        paths, key=lambda path: [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", path.name))]
    )


def has_metadata(folder: Path) -> bool:
    """Whether a folder has the ``metadata.yaml`` of a rosbag2; data sets have others of this name."""
    file = folder / METADATA
    return file.is_file() and b"rosbag2_bagfile_information" in file.read_bytes()


def is_bag(folder: Path) -> bool:
    """Whether a folder is a rosbag2, which may have lost its ``metadata.yaml``, and not several of them."""
    names = [child.name for child in visible_files(folder) if child.is_file()]
    # Without it, the parts of one recording are numbered.
    return has_metadata(folder) or len({stem_of_part(n) for n in names if n.endswith(DATA_SUFFIXES)}) == 1
