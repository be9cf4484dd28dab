# SPDX-License-Identifier: Apache-2.0
"""Several recordings: which ones a folder holds, and which of them this process takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from deq_flow_ros.media.bag_reader import BAG_SUFFIXES, DATA_SUFFIXES, natural_order, stem_of_part
from deq_flow_ros.media.frame import MediaError
from deq_flow_ros.media.sources import IMAGE_SUFFIXES

T = TypeVar("T")
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}


def find_recordings(folder: Path, without: Path | None = None) -> list[Path]:
    """Every recording below a folder, in natural order: bags, videos, folders of images.

    What is hidden is left out, and so is the folder `without`, where the results go. A rosbag2 is one recording,
    whatever else it holds, and so is a folder of images without any bag or video. Raises `MediaError` where there is
    none, or the folder itself is one.
    """
    if not folder.is_dir():
        raise MediaError(f"expected a folder of recordings, got {folder}, which is no folder")
    found = list(_below(folder, None if without is None else without.resolve()))
    if (folder / "metadata.yaml").exists() or (not found and _is_recording(folder)):
        raise MediaError(f"expected a folder of recordings, got {folder}, which is a single one; leave out --bags")
    if not found:
        raise MediaError(f"the folder {folder} holds no recording: no bag, no video, no folder of images")
    return found


def _below(folder: Path, without: Path | None) -> list[Path]:
    found: list[Path] = []
    for child in natural_order(folder.iterdir()):
        if child.name.startswith(".") or child.resolve() == without:
            continue
        if child.is_dir():
            found += [child] if _is_recording(child) else _below(child, without)
        elif _is_file_of_frames(child.name):
            found.append(child)
    return found


def _is_file_of_frames(name: str) -> bool:
    return name.lower().endswith(BAG_SUFFIXES) or Path(name).suffix.lower() in VIDEO_SUFFIXES


def _is_recording(folder: Path) -> bool:
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    if "metadata.yaml" in names:
        return True
    if not any(_is_file_of_frames(name) for name in names):
        return any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in names)
    # Without metadata.yaml, the parts of one recording are numbered.
    stems = {stem_of_part(name) for name in names if name.endswith(DATA_SUFFIXES)}
    return len(stems) == 1


def share(items: Sequence[T], environment: Mapping[str, str] = os.environ) -> list[T]:
    """Those of this process, where `torchrun` started several; all of them where it did not.

    Nothing is exchanged between the processes, so they may run on any machines, even one after the other. Raises what
    `processes` does.
    """
    rank, count = processes(environment)
    return list(items[rank::count])


def processes(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """The number of this process, and how many `torchrun` started; (0, 1) where it did not.

    Raises `MediaError` for an environment that makes no sense.
    """
    try:
        rank, count = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
        if not 0 <= rank < count:
            raise ValueError
    except ValueError:
        got = {name: environment.get(name) for name in ("RANK", "WORLD_SIZE")}
        raise MediaError(f"expected RANK from 0 to WORLD_SIZE - 1, as torchrun sets them, got {got}") from None
    return rank, count


def device_of(device: str, environment: Mapping[str, str] = os.environ) -> str:
    """Each process of a machine takes a GPU of its own, where the device is just "cuda"."""
    return f"cuda:{environment['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in environment else device
