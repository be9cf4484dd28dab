# SPDX-License-Identifier: Apache-2.0
"""Small pictures of a run, on disk while it lasts: a run of any length needs no more memory, and may go on later."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from deq_flow_ros.media.frame import MediaError
from deq_flow_ros.media.metrics import photometric_map

if TYPE_CHECKING:
    from deq_flow_ros.evaluation.results import FrameRecord, PairFields

PREVIEW_WIDTH = 320
"""Pictures are kept no wider than this, in px."""
MAX_PREVIEWS = 200
"""Of a longer run every second frame is pictured only, then every fourth, ..., so that no more are kept."""
BEST, MEDIAN, WORST = 1, 2, 3
"""So many of each are shown in the report."""
KEYS = ("epe_visible_px", "epe_px", "photometric")
"""Pairs are ranked by the first of these measures that is known."""
MAPS = ("residual", "truth")


@dataclass(frozen=True)
class Preview:
    """Small pictures of one pair, (h, w): image uint8 RGB; flow and truth in px of the full image, residual px and
    photometric error in grey levels, all float16. None where there is none.

    :ivar rank: the error that pairs are ranked by; NaN where it is not known.
    """

    index: int
    stamp_ns: int
    rank: float
    image: np.ndarray
    flow: np.ndarray
    photometric: np.ndarray
    residual: np.ndarray | None = None
    truth: np.ndarray | None = None


class Gallery:
    """The previews of one setting's run in a folder, evenly spread over it, and those of its best and worst pairs.

    A folder that is there is gone on with. Which frames are spread depends on how long the run is by now and on nothing
    else, so all settings of a run keep the same ones.

    :raises MediaError: where the folder cannot be made or read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ranks: dict[int, float] = {}
        self._last = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file in folder.glob("*.npz"):
                with np.load(file) as arrays:
                    self._ranks[int(file.stem)] = float(arrays["rank"])
        except (OSError, ValueError, KeyError) as error:
            raise MediaError(f"the previews in {folder} cannot be used: {error}; remove that folder") from error
        self._last = max(self._ranks, default=0)

    def add(self, record: FrameRecord, fields: PairFields) -> None:
        """Keep the pictures of a pair, if it is one of those to be kept as far as is known by now."""
        index = record.index
        self._last = max(self._last, index)
        self._ranks[index] = next((record.measures[key] for key in KEYS if key in record.measures), float("nan"))
        kept = self._kept()
        if index in kept:
            self._write(record, fields)
        for other in set(self._ranks) - kept:
            del self._ranks[other]
            (self.folder / f"{other}.npz").unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._ranks)

    @property
    def step(self) -> int:
        """Every so manieth frame is pictured."""
        step = 1
        while self._last // step >= MAX_PREVIEWS:
            step *= 2
        return step

    def indices(self) -> list[int]:
        """Of the evenly spread previews, in the order of the stream."""
        return [index for index in sorted(self._ranks) if index % self.step == 0]

    def preview(self, index: int) -> Preview:
        """One preview. Raises KeyError where it was not kept, `MediaError` where it cannot be read."""
        rank = self._ranks[index]
        file = self.folder / f"{index}.npz"
        try:
            with np.load(file) as arrays:
                kept = {name: arrays[name] for name in arrays.files if name not in ("rank", "stamp_ns")}
                return Preview(index, int(arrays["stamp_ns"]), rank, **kept)
        except (OSError, ValueError) as error:
            raise MediaError(f"the preview {file} cannot be read: {error}") from error

    def __contains__(self, index: int) -> bool:
        return index in self._ranks

    def ranked(self) -> list[tuple[str, int]]:
        """("best", "median" or "worst", index) of the pairs to show; fewer where there are fewer."""
        known = self._by_rank()
        best, worst = known[:BEST], known[len(known) - WORST :][::-1] if len(known) > BEST + WORST else []
        spread = [index for index in known if index % self.step == 0 and index not in (*best, *worst)]
        middle = max(0, (len(spread) - MEDIAN) // 2)
        shown = [("best", best), ("median", spread[middle : middle + MEDIAN]), ("worst", worst)]
        return [(name, index) for name, indices in shown for index in indices]

    def remove(self) -> None:
        """Delete the folder: the report holds what it needs of it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._ranks.clear()

    def _by_rank(self) -> list[int]:
        return sorted((index for index, rank in self._ranks.items() if np.isfinite(rank)), key=self._ranks.__getitem__)

    def _kept(self) -> set[int]:
        known, step = self._by_rank(), self.step
        return {index for index in self._ranks if index % step == 0} | set(known[:BEST]) | set(known[-WORST:])

    def _write(self, record: FrameRecord, fields: PairFields) -> None:
        height, width = fields.flow.shape[:2]
        size = _size(height, width)
        here, there = (cv2.resize(image, size, interpolation=cv2.INTER_AREA) for image in (fields.here, fields.there))
        flow = _small(fields.flow, size)
        # In the small images, and a quarter of the time: it is for the eye, what is measured is measured in full.
        photometric, _ = photometric_map(here, there, flow * np.array([size[0] / width, size[1] / height], np.float32))
        maps = {"flow": flow, "photometric": photometric}
        maps |= {name: _small(values, size) for name in MAPS if (values := getattr(fields, name)) is not None}
        arrays = {"rank": np.float64(self._ranks[record.index]), "stamp_ns": np.int64(record.stamp_ns), "image": here}
        arrays |= {name: values.astype(np.float16) for name, values in maps.items()}
        file = self.folder / f"{record.index}.npz"
        try:
            with (self.folder / "partial").open("wb") as partial:
                np.savez(partial, **arrays)
            (self.folder / "partial").replace(file)
        except OSError as error:
            raise MediaError(f"cannot write {file}: {error}; what is there so far is kept") from error


def _size(height: int, width: int) -> tuple[int, int]:
    """Width and height of the small picture; even, as video codecs halve the colour resolution."""
    scale = min(1.0, PREVIEW_WIDTH / width)
    return max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


def _small(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    # Nearest: averaging would mix the flow of two objects into a third, and NaN into everything.
    return cv2.resize(values, size, interpolation=cv2.INTER_NEAREST)
