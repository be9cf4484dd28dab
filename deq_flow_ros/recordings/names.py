# SPDX-License-Identifier: Apache-2.0
"""Names of files: which are recordings, which belong together, and in which order they come."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

DATA_SUFFIXES = (".mcap", ".db3", ".mcap.zstd", ".db3.zstd")
"""Data files of a rosbag2."""
BAG_SUFFIXES = (*DATA_SUFFIXES, ".bag", ".bag.active")
METADATA = "metadata.yaml"
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def stem_of_part(name: str) -> str:
    """What the names of a split recording's files have in common: "drive" of "drive_3.mcap"."""
    return re.sub(r"_\d+$", "", name.partition(".")[0])


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
