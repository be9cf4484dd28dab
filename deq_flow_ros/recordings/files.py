# SPDX-License-Identifier: Apache-2.0
"""Files: their names, of which kind they are, writing them completely or not at all, and recordings in folders."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from deq_flow_ros.host import replacing
from deq_flow_ros.imaging import MediaError

log = logging.getLogger(__name__)

DATA_SUFFIXES = (".mcap", ".db3", ".mcap.zstd", ".db3.zstd")  # of a rosbag2
BAG_SUFFIXES = (*DATA_SUFFIXES, ".bag", ".bag.active")
MCAP_MAGIC, ROS1_MAGIC, SQLITE_MAGIC = b"\x89MCAP0\r\n", b"#ROSBAG V2.0\n", b"SQLite format 3\0"
"""What the files of bags begin with."""
METADATA = "metadata.yaml"
STATUS_NAME = "deq_flow_ros: flow"
"""The name of the status of a frame's account, in recordings and on the topic. A camera's name is appended."""
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def is_bag_file(file: Path) -> bool:
    """Whether a file begins as those of bags do, whatever its name is."""
    return file.is_file() and any(begins(file, magic) for magic in (MCAP_MAGIC, ROS1_MAGIC, SQLITE_MAGIC))


def no_video(path: Path) -> str | None:
    """What a file is that FFmpeg has no use for; None if it may be a video."""
    with path.open("rb") as file:
        start = file.read(1024)
    if path.name == METADATA:
        return "the list of a bag's files; give the folder of the bag"
    if start and all(byte >= 32 or byte in b"\t\n\r" for byte in start):
        return "a text file"  # FFmpeg would play it, as a terminal that shows it
    if start[257:262] == b"ustar":
        return "packed by tar; unpack it first"
    packed = {b"PK": "zip", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"7z\xbc": "7z"}
    return next((f"packed by {by}; unpack it first" for magic, by in packed.items() if start.startswith(magic)), None)


def begins(file: Path, magic: bytes) -> bool:
    """Whether a file begins with these bytes."""
    with file.open("rb") as opened:
        return opened.read(len(magic)) == magic


def _by_number(name: str) -> str:
    """The name of a part without suffixes, with its number at the end as until 2025: "drive_3" of
    "3_drive_2026_01_31-10_00_00.mcap".
    """
    return re.sub(r"^(\d+)_(.*)_\d{4}_\d\d_\d\d-\d\d_\d\d_\d\d$", r"\2_\1", name.partition(".")[0])


def stem_of_part(name: str) -> str:
    """What the names of a split recording's files have in common: "drive" of "drive_3.mcap"."""
    return re.sub(r"_\d+$", "", _by_number(name))


def missing_parts(names: Iterable[str], folder: str) -> list[str]:
    """The parts of a split recording that must have been there: rosbag2 numbers them from 0, without leading zeros.

    :param folder: name of their folder, which rosbag2 names its files after.
    """
    parts = set(map(_by_number, names))
    numbers = [re.fullmatch(r"(.*)_(0|[1-9]\d{0,4})", part) for part in parts]
    found = {int(match[2]): match[1] for match in numbers if match}
    stem = next(iter(found.values()), "")
    if len(found) < len(parts) or (len(parts) < 2 and stem not in (folder, re.sub(r"_[\d_-]+$", "", folder))):
        return []
    return [f"{stem}_{number}" for number in range(max(found, default=0)) if number not in found]


def check_name(path: str | os.PathLike[str]) -> None:
    """Refuse a name with which OpenCV ends the process.

    :raises MediaError: for a name that is not UTF-8, from an old disk or a foreign system for instance.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        got = f"{os.fsencode(path)!r}; rename it, or give a link to it"
        raise MediaError(f"expected a name in UTF-8, got {got}") from None


def visible_files(folder: Path) -> list[Path]:
    """What lies in a folder, without what is hidden: macOS puts ``._name`` beside each file that it copies."""
    return [child for child in folder.iterdir() if not child.name.startswith(".")]


def natural_order(paths: Iterable[Path]) -> list[Path]:
    """Sorted by name, numbers by their value: 2 before 10."""

    def key(path: Path) -> list[int | str]:
        return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", path.name))]

    return sorted(paths, key=key)


def has_metadata(folder: Path) -> bool:
    """Whether a folder has the ``metadata.yaml`` of a rosbag2; data sets have others of this name."""
    file = folder / METADATA
    return file.is_file() and b"rosbag2_bagfile_information" in file.read_bytes()


def is_bag(folder: Path) -> bool:
    """Whether a folder is a rosbag2, which may have lost its ``metadata.yaml``, and not several of them."""
    names = [child.name for child in visible_files(folder) if child.is_file()]
    # Without it, the parts of one recording are numbered.
    return has_metadata(folder) or len({stem_of_part(n) for n in names if n.endswith(DATA_SUFFIXES)}) == 1


def write_text(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all.

    :raises MediaError: if it cannot be written.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")  # file names may be in another
    except OSError as error:
        raise MediaError(f"cannot write {path}: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file. Numbers that are infinite or NaN become null.

    :raises MediaError: if it cannot be written.
    """
    finite = json.loads(json.dumps(content), parse_constant=lambda name: None)  # JSON has no word for the others
    write_text(path, json.dumps(finite, indent=1) + "\n")


def files_below(path: Path) -> list[Path]:
    """The file itself, or all files below a folder; none for a camera."""
    if path.is_dir():
        return sorted(child for child in path.rglob("*") if child.is_file())
    return [path] if path.is_file() else []


def sha256(path: Path) -> str:
    """The SHA-256 of a file, or of the names and contents of all files of a folder, in hexadecimal; "" for a camera.

    :raises OSError: if a file cannot be read.
    """
    files, digest = files_below(path), hashlib.sha256()
    for file in files:
        if file != path:
            digest.update(os.fsencode(file.relative_to(path)) + b"\0")
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest() if files else ""


def find_recordings(folder: Path, without: Path | None = None) -> list[Path]:
    """All recordings below a folder, in natural order: bags, videos and folders of images, but hidden ones.

    A rosbag2 is one recording, whatever else its folder holds. A folder of images without any bag or video is one
    as well, beside those in folders below it.

    :param without: a folder that is left out.
    :raises MediaError: if there is no recording, or the folder itself is one.
    """
    if not folder.is_dir():
        raise MediaError(f"expected a folder of recordings, got {folder}, which is not a folder")
    found = list(recordings_below(folder, None if without is None else without.resolve()))
    if has_metadata(folder) or (not found and _holds_images(folder)):
        raise MediaError(f"expected a folder of recordings, got {folder}, which is a recording itself; omit --bags")
    if not found:
        raise MediaError(f"the folder {folder} holds no recording: neither a bag nor a video nor a folder of images")
    return found


def recordings_below(folder: Path, without: Path | None = None, depth: int = 100) -> Iterator[Path]:
    """Those of ``find_recordings``, as they are found, so many levels deep; ``without`` is a path without links."""
    for child in natural_order(visible_files(folder)):
        if child.is_dir():
            real = child.resolve()
            if real == without or real in child.absolute().parents:  # a link that leads back would be followed for ever
                continue
            try:
                bag, images = is_bag(child), _holds_images(child)
                yield from [child] if bag or images else []
                yield from recordings_below(child, without, depth - 1) if depth > 1 and not bag else ()
            except PermissionError as error:
                log.warning("left out %s: %s", child, error)
        elif _holds_frames(child.name):
            yield child


def _holds_frames(name: str) -> bool:
    return name.lower().endswith((*BAG_SUFFIXES, *VIDEO_SUFFIXES))


def _holds_images(folder: Path) -> bool:
    """Whether it is a recording because of its images: beside a bag or a video, they are something else."""
    names = [entry.name.lower() for entry in visible_files(folder) if entry.is_file()]
    return any(name.endswith(IMAGE_SUFFIXES) for name in names) and not any(map(_holds_frames, names))
