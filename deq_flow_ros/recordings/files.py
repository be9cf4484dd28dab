# SPDX-License-Identifier: Apache-2.0
"""Writing files completely or not at all, hashes of their content, and the recordings that a folder holds."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deq_flow_ros.host import replacing
from deq_flow_ros.imaging.frame import MediaError
from deq_flow_ros.recordings.names import (
    BAG_SUFFIXES,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    has_metadata,
    is_bag,
    natural_order,
    visible_files,
)  # fmt: skip

log = logging.getLogger(__name__)


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
    write_text(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def files_below(path: Path) -> list[Path]:
    """The file itself, or all files below a folder. The list is empty for a camera."""
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
    """All recordings below a folder, in natural order: bags, videos and folders of images.

    A rosbag2 is one recording, whatever else its folder holds. A folder of images without any bag or video is one
    recording as well, beside those in folders below it. Hidden files and folders are left out.

    :param without: a folder that is left out as well.
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
    """Those of ``find_recordings``, as they are found.

    :param without: a folder that is left out, as a path without links.
    :param depth: so many levels of folders are looked through.
    """
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
    return name.lower().endswith(BAG_SUFFIXES) or Path(name).suffix.lower() in VIDEO_SUFFIXES


def _holds_images(folder: Path) -> bool:
    """Whether it is a recording because of its images: beside a bag or a video, they are something else."""
    names = [entry.name for entry in visible_files(folder) if entry.is_file()]
    images = any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in names)
    return images and not any(map(_holds_frames, names))
