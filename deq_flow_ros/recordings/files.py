# SPDX-License-Identifier: Apache-2.0
"""Writing files completely or not at all, hashes of their content, and the recordings that a folder holds."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deq_flow_ros.host import replacing
from deq_flow_ros.imaging.frame import MediaError
from deq_flow_ros.recordings.names import (
    BAG_SUFFIXES,
    DATA_SUFFIXES,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    natural_order,
    stem_of_part,
    visible_files,
)  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all.

    :raises MediaError: if it cannot be written.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
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
    recording as well. Hidden files and folders are left out.

    :param without: a folder that is left out as well.
    :raises MediaError: if there is no recording, or the folder itself is one.
    """
    if not folder.is_dir():
        raise MediaError(f"expected a folder of recordings, got {folder}, which is not a folder")
    found = list(_below(folder, None if without is None else without.resolve()))
    if (folder / "metadata.yaml").exists() or (not found and _is_recording(folder)):
        raise MediaError(f"expected a folder of recordings, got {folder}, which is a recording itself; omit --bags")
    if not found:
        raise MediaError(f"the folder {folder} holds no recording: neither a bag nor a video nor a folder of images")
    return found


def _below(folder: Path, without: Path | None) -> Iterator[Path]:
    for child in natural_order(visible_files(folder)):
        if child.resolve() == without:
            continue
        if child.is_dir():
            yield from [child] if _is_recording(child) else _below(child, without)
        elif _holds_frames(child.name):
            yield child


def _holds_frames(name: str) -> bool:
    return name.lower().endswith(BAG_SUFFIXES) or Path(name).suffix.lower() in VIDEO_SUFFIXES


def _is_recording(folder: Path) -> bool:
    names = [entry.name for entry in visible_files(folder) if entry.is_file()]
    if "metadata.yaml" in names:
        return True
    if not any(_holds_frames(name) for name in names):
        return any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in names)
    # Without metadata.yaml, the parts of one recording are numbered.
    stems = {stem_of_part(name) for name in names if name.endswith(DATA_SUFFIXES)}
    return len(stems) == 1
