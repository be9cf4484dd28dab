# SPDX-License-Identifier: Apache-2.0
"""Small pictures of a run. They are kept on disk during the run, and shown in the report and as a video.

Memory does not grow with the length of a run, and there are never more than some 200 pictures on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from deq_flow_ros.evaluation.measures import PairFields
from deq_flow_ros.evaluation.records import FrameRecord
from deq_flow_ros.imaging.frame import MediaError
from deq_flow_ros.imaging.metrics import photometric_map
from deq_flow_ros.imaging.pictures import GAP, flow_to_color, heat, top, write_animation, write_video

PREVIEW_WIDTH = 320
"""Largest width of a picture, in px."""
MAX_PREVIEWS = 200
"""Largest number of pictures. In a longer run, only every second, fourth, ... frame has one."""
BEST, MEDIAN, WORST = 1, 2, 3
"""Numbers of pairs of each kind in the report."""
RANKED_BY = ("epe_visible_px", "epe_px", "photometric")
"""Pairs are ranked by the first of these measures that they have."""
MAX_VIDEO_FRAMES, SLOWEST_FPS = 100, 4.0
"""VP9 takes up to 0.1 s per frame. A video with a lower frame rate than this is sped up to it."""
MAX_ANIMATION_FRAMES = 60
"""Keeps an animation below 3 MB."""


@dataclass(frozen=True, eq=False)
class Preview:
    """Small pictures of one pair, (h, w): the image, uint8 RGB, and maps as float16 in px of the full image.

    :ivar rank: the error that pairs are ranked by; NaN if it is not known.
    :ivar photometric: in grey levels.
    """

    index: int
    rank: float
    stamp_ns: np.ndarray
    image: np.ndarray
    flow: np.ndarray
    photometric: np.ndarray
    residual: np.ndarray | None = None
    truth: np.ndarray | None = None
    uncertainty: np.ndarray | None = None


class Gallery:
    """The previews of one setting, in a folder: some evenly spread over the run, of the same frames in all settings,
    and the best and the worst pairs of the setting.

    :raises MediaError: if the folder cannot be created.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ranks: dict[int, float] = {}
        self._last = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MediaError(f"cannot write to {folder}: {error}") from error

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, index: int) -> bool:
        return index in self._ranks

    def add(self, record: FrameRecord, fields: PairFields) -> None:
        """Keep the pictures of a pair, if it is one of those to be kept so far."""
        index = self._last = record.index
        rank = next((record.measures[key] for key in RANKED_BY if key in record.measures), float("nan"))
        self._ranks[index] = rank
        known = self._by_rank()
        kept = {*self.spread(), *known[:BEST], *known[-WORST:]}
        if index in kept:
            self._write(record, fields)
        for other in set(self._ranks) - kept:
            del self._ranks[other]
            self._file(other).unlink(missing_ok=True)

    def spread(self) -> list[int]:
        """Indices of the evenly spread previews, in the order of the stream."""
        step = 1
        while self._last // step >= MAX_PREVIEWS:
            step *= 2
        return [index for index in sorted(self._ranks) if index % step == 0]

    def ranked(self) -> list[tuple[str, int]]:
        """("best", "median" or "worst", index) of the pairs to show; fewer if there are not enough."""
        known, spread = self._by_rank(), self.spread()
        best, worst = (known[:BEST], known[: -WORST - 1 : -1]) if len(known) > BEST + WORST else ([], [])
        others = [index for index in known if index in spread and index not in (*best, *worst)]
        middle = max(0, (len(others) - MEDIAN) // 2)
        shown = (("best", best), ("median", others[middle : middle + MEDIAN]), ("worst", worst))
        return [(name, index) for name, indices in shown for index in indices]

    def preview(self, index: int) -> Preview:
        """One preview.

        :raises KeyError: if it was not kept.
        :raises MediaError: if it cannot be read.
        """
        rank, file = self._ranks[index], self._file(index)
        try:
            with np.load(file) as arrays:
                return Preview(index, rank=rank, **arrays)
        except (OSError, ValueError) as error:
            raise MediaError(f"the preview {file} cannot be read: {error}") from error

    def _by_rank(self) -> list[int]:
        return sorted((index for index, rank in self._ranks.items() if np.isfinite(rank)), key=self._ranks.__getitem__)

    def _file(self, index: int) -> Path:
        return self._folder / f"{index}.npz"

    def _write(self, record: FrameRecord, fields: PairFields) -> None:
        height, width = fields.flow.shape[:2]
        scale = min(1.0, PREVIEW_WIDTH / width)
        # Even numbers, because video codecs halve the colour resolution.
        size = max(2, round(width * scale / 2) * 2), max(2, round(height * scale / 2) * 2)
        here, there = (cv2.resize(image, size, interpolation=cv2.INTER_AREA) for image in (fields.here, fields.there))
        maps = {name: getattr(fields, name) for name in ("flow", "residual", "truth", "uncertainty")}
        known = {name: values for name, values in maps.items() if values is not None}
        # Nearest neighbours, because averaging would mix the flow of two objects, and spread NaN.
        small = {name: cv2.resize(values, size, interpolation=cv2.INTER_NEAREST) for name, values in known.items()}
        # In the small images, which takes a quarter of the time. This one is only for looking at.
        small_flow = small["flow"] * np.array([size[0] / width, size[1] / height], np.float32)
        small["photometric"], _ = photometric_map(here, there, small_flow)
        arrays = {name: values.astype(np.float16) for name, values in small.items()}
        file = self._file(record.index)
        try:
            np.savez(file, image=here, stamp_ns=np.int64(record.stamp_ns), **arrays)
        except OSError as error:
            raise MediaError(f"cannot write {file}: {error}; the results so far are kept") from error


def color_range(previews: Sequence[Preview]) -> float:
    """The length in px with the full colour in these pictures: the 95th percentile of flow and truth, at least 1."""
    fields = [field for preview in previews for field in (preview.flow, preview.truth) if field is not None]
    speeds = [np.hypot(*np.moveaxis(field[::4, ::4].astype(np.float32), 2, 0)).ravel() for field in fields]
    return top(np.concatenate(speeds), 1.0, 95)


def panels(preview: Preview) -> tuple[float, list[tuple[str, np.ndarray]]]:
    """The length in px with the full colour, and (caption, picture (h, w, 3) uint8 RGB) of each panel."""
    max_px, grey_levels = color_range([preview]), top(preview.photometric, 10.0)
    shown = [("image", preview.image), (f"flow, full colour {max_px:.1f} px", flow_to_color(preview.flow, max_px))]
    if preview.truth is not None:
        shown.append(("true flow", flow_to_color(preview.truth, max_px)))
    for name, values, least in (("residual", preview.residual, 0.1), ("expected error", preview.uncertainty, 1.0)):
        if values is not None:
            most = top(values, least)
            shown.append((f"{name} ≤ {most:.2g} px", heat(values, most)))
    shown.append((f"photometric error ≤ {grey_levels:.0f}", heat(preview.photometric, grey_levels)))
    return max_px, shown


def write_moving_pictures(video: Path, animation: Path, gallery: Gallery) -> None:
    """Write the evenly spread previews, image and flow side by side, at the speed of the stream.

    :param video: an MP4 file.
    :param animation: a WebP file of the first part of the same pictures.
    """
    spread = gallery.spread()
    shown = spread[:: -(-len(spread) // MAX_VIDEO_FRAMES) or 1]
    sampled = [gallery.preview(index) for index in shown[:: -(-len(shown) // 20) or 1]]
    max_px, first = color_range(sampled), [int(gallery.preview(index).stamp_ns) for index in shown[:20]]
    period_ns = float(np.median(np.diff(first))) if len(first) > 1 else 0.0
    fps = min(max(SLOWEST_FPS, 1e9 / period_ns if period_ns > 0 else 0.0), 60.0)

    def pictures(indices: Sequence[int]) -> Iterator[np.ndarray]:
        for preview in map(gallery.preview, indices):
            line = np.full((preview.image.shape[0], GAP, 3), 255, np.uint8)
            yield np.hstack([preview.image, line, flow_to_color(preview.flow, max_px)])

    write_video(video, pictures(shown), fps)
    write_animation(animation, pictures(shown[:MAX_ANIMATION_FRAMES]), fps)
