# SPDX-License-Identifier: Apache-2.0
"""Points followed through a stream: dense flow leads, the images refine and check, and what is lost is named.

Each step of a track begins where the flow leads. From there, Lucas and Kanade's method finds the position at which the
surroundings fit best, forward and back again (the check of Kalal et al., "Forward-backward error: automatic detection
of tracking failures", ICPR 2010). It is at full resolution, and needs no pyramid, because the flow has taken it near.
Where the images do not confirm the flow (blur, little texture), the track goes on with the flow alone, and its expected
error grows by the flow's uncertainty, until it is too large.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

UNKNOWN = "no flow at the point"
OUTSIDE = "outside of the image"
UNCERTAIN = "expected error too large"
CONVERGED = "another track came to the same place"
GAP = "a gap in the flow"
RESTART = "the stream started anew"
SIZE = "the images changed their size"
BLOCK = 7
"""Side of the square, px, whose texture decides where a track begins."""
STEP_ERROR_PX = 0.05
"""Error of a step that the images confirm, beside the distance by which forward and backward disagree."""


@dataclass(frozen=True)
class TrackSettings:
    """When tracks begin and end.

    :ivar max_tracks: none begins while there are so many.
    :ivar spacing_px: side of the cells of which each without a track gets one; tracks nearer than a quarter of it are
        one.
    :ivar min_texture: gradient in the direction in which it is least, RMS in grey levels per px, with which a track
        may begin.
    :ivar window_px: side of the square of which Lucas and Kanade's method compares the pixels, odd.
    :ivar max_correction_px: distance from where the flow leads, beyond which the method is not believed; or twice the
        uncertainty of the flow, if that is more.
    :ivar max_disagreement_px: distance from the start after a step forward and back, beyond which it is not believed.
    :ivar max_residual: mean difference of the two squares in grey levels, beyond which it is not believed.
    :ivar max_error_px: expected error of a position beyond which a track ends.
    """

    max_tracks: int = 2000
    spacing_px: int = 16
    min_texture: float = 2.0
    window_px: int = 15
    max_correction_px: float = 1.0
    max_disagreement_px: float = 1.0
    max_residual: float = 20.0
    max_error_px: float = 3.0


@dataclass(frozen=True)
class Tracks:
    """The tracks in one image; arrays of N.

    :ivar ids: uint32, never used twice.
    :ivar points: (N, 2) float64 px, x before y.
    :ivar ages: uint32, steps since the track began.
    :ivar errors: float64 px, the expected distance from where the point has gone.
    """

    ids: np.ndarray
    points: np.ndarray
    ages: np.ndarray
    errors: np.ndarray

    @property
    def confidence(self) -> np.ndarray:
        """1 / (1 + expected error in px), 0..1."""
        return 1 / (1 + self.errors)

    def only(self, kept: np.ndarray) -> Tracks:
        """Those of a mask (N,) or of indices."""
        return Tracks(self.ids[kept], self.points[kept], self.ages[kept], self.errors[kept])


NONE = Tracks(np.empty(0, np.uint32), np.empty((0, 2)), np.empty(0, np.uint32), np.empty(0))


class PointTracker:
    """Follows points through the forward flow of a stream.

    :ivar settings: may be exchanged between two fields.
    :ivar tracks: in the latest image.
    """

    def __init__(self, settings: TrackSettings | None = None) -> None:
        self.settings = settings or TrackSettings()
        self.tracks = NONE
        self._until_ns: int | None = None
        self._shape: tuple[int, ...] = ()
        self._next_id = 0

    def restart(self, reason: str = RESTART) -> Counter[str]:
        """End all tracks; returns how many ended for what reason."""
        ended = Counter({reason: len(self.tracks.ids)} if len(self.tracks.ids) else {})
        self.tracks, self._until_ns = NONE, None
        return ended

    def follow(
        self,
        flow: np.ndarray,
        uncertainty: np.ndarray,
        first: np.ndarray,
        second: np.ndarray,
        stamps_ns: tuple[int, int],
    ) -> Counter[str]:
        """Take all tracks from one image to the next, and begin new ones there.

        :param flow: (H, W, 2) float32 px, from ``first`` to ``second``; NaN where there is none.
        :param uncertainty: (H, W) float32 px, the expected error of the flow.
        :param first: (H, W) uint8 grey.
        :param second: likewise.
        :param stamps_ns: of the two images. Unless ``first`` is the ``second`` of the last call, all tracks end.
        :returns: how many tracks ended for what reason.
        :raises ValueError: for sizes that differ, or an image that is not later than the other; nothing changes.
        """
        shape = first.shape
        if flow.shape != (*shape, 2) or uncertainty.shape != shape or second.shape != shape:
            got = f"flow {flow.shape[:2]}, uncertainty {uncertainty.shape}, images {shape} and {second.shape}"
            raise ValueError(f"expected images and fields of one size, got {got}")
        if stamps_ns[1] <= stamps_ns[0]:
            raise ValueError("expected flow that points to a later image (direction: forward of flow_node)")
        ended: Counter[str] = Counter()
        if self._until_ns is not None and stamps_ns[0] != self._until_ns:
            ended += self.restart(GAP if stamps_ns[0] > self._until_ns else RESTART)
        elif self._shape and shape != self._shape:
            ended += self.restart(SIZE)
        self._shape = shape
        if self._until_ns is None and not len(self.tracks.ids):  # so that the first step is one as well
            self._begin(first)
        self._until_ns = stamps_ns[1]
        if len(self.tracks.ids):
            ended += self._step(flow, uncertainty, first, second)
        self._begin(second)
        return ended

    def _step(self, flow: np.ndarray, uncertainty: np.ndarray, first: np.ndarray, second: np.ndarray) -> Counter[str]:
        tracks, settings = self.tracks, self.settings
        height, width = first.shape
        here = tracks.points
        led = here + _sampled(flow, here)
        unsure = _sampled(uncertainty, here)
        reasons = np.full(len(here), "", object)
        reasons[~np.isfinite(led).all(axis=1) | ~np.isfinite(unsure)] = UNKNOWN
        there, error = led.copy(), unsure.astype(np.float64)
        tried = np.flatnonzero((reasons == "") & _inside(led, height, width))
        if tried.size:
            found, apart, good = self._matched(first, second, here[tried], led[tried], unsure[tried])
            there[tried[good]] = found[good]
            error[tried[good]] = apart[good] + STEP_ERROR_PX
        error = np.hypot(tracks.errors, error)
        reasons[(reasons == "") & ~_inside(there, height, width)] = OUTSIDE
        reasons[(reasons == "") & (error > settings.max_error_px)] = UNCERTAIN
        kept = np.flatnonzero(reasons == "")
        # Of tracks that meet, the surest goes on: what covers something else brings its own track along.
        order = kept[np.argsort(error[kept], kind="stable")]
        close = max(settings.spacing_px / 4, 1.0)
        cells = (there[order] // close).astype(np.int64)
        _, surest = np.unique(cells[:, 1] * (width + 1) + cells[:, 0], return_index=True)
        reasons[np.setdiff1d(order, order[surest])] = CONVERGED
        alive = reasons == ""
        self.tracks = Tracks(tracks.ids, there, tracks.ages + np.uint32(1), error).only(alive)
        return Counter(reasons[~alive].tolist())

    def _matched(
        self, first: np.ndarray, second: np.ndarray, here: np.ndarray, led: np.ndarray, unsure: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the surroundings fit best, how far forward and backward disagree, and whether to believe it."""
        settings = self.settings
        options: dict[str, Any] = {
            "winSize": (settings.window_px, settings.window_px),
            "maxLevel": 0,
            "criteria": (cv2.TERM_CRITERIA_COUNT + cv2.TERM_CRITERIA_EPS, 30, 0.01),
            "flags": cv2.OPTFLOW_USE_INITIAL_FLOW,
        }
        start, guess = (points.astype(np.float32)[:, None] for points in (here, led))
        found, there_ok, residual = cv2.calcOpticalFlowPyrLK(first, second, start, guess.copy(), **options)
        back, back_ok, _ = cv2.calcOpticalFlowPyrLK(second, first, found, start.copy(), **options)
        apart = np.linalg.norm(back - start, axis=2)[:, 0].astype(np.float64)
        corrected = np.linalg.norm(found - guess, axis=2)[:, 0]
        good = (
            (there_ok[:, 0] == 1)
            & (back_ok[:, 0] == 1)
            & (apart <= settings.max_disagreement_px)
            & (corrected <= np.maximum(settings.max_correction_px, 2 * unsure))
            & (residual[:, 0] <= settings.max_residual)
        )
        return found[:, 0].astype(np.float64), apart, good

    def _begin(self, image: np.ndarray) -> None:
        """A track at the best textured pixel of each cell that has none."""
        spacing_px, room = self.settings.spacing_px, self.settings.max_tracks - len(self.tracks.ids)
        if room <= 0:
            return
        free = corners(image, spacing_px, self.settings.min_texture)
        if len(free) and len(self.tracks.ids):
            taken = np.zeros((image.shape[0] // spacing_px + 1, image.shape[1] // spacing_px + 1), bool)
            cells, wanted = ((points // spacing_px).astype(int) for points in (self.tracks.points, free))
            taken[cells[:, 1], cells[:, 0]] = True
            free = free[~taken[wanted[:, 1], wanted[:, 0]]]
            # Not beside a track of the next cell either.
            free = free[np.abs(free[:, None] - self.tracks.points[None]).max(axis=2).min(axis=1) >= spacing_px / 2]
        self.begin(free[:room])

    def begin(self, points: np.ndarray) -> None:
        """Begin tracks at points (N, 2) px of the latest image."""
        count, old = len(points), self.tracks
        ids = np.arange(self._next_id, self._next_id + count).astype(np.uint32)
        self._next_id += count
        self.tracks = Tracks(
            np.concatenate([old.ids, ids]),
            np.concatenate([old.points, np.asarray(points, np.float64)]),
            np.concatenate([old.ages, np.zeros(count, np.uint32)]),
            np.concatenate([old.errors, np.zeros(count)]),
        )


def corners(image: np.ndarray, spacing_px: int, min_texture: float) -> np.ndarray:
    """The pixel with the most texture in each cell of the image that has enough.

    :param image: (H, W) uint8 grey.
    :param min_texture: as in ``TrackSettings``.
    :returns: (N, 2) float64 px, x before y; those with the most texture first.
    """
    # Sobel's operator is 8 times the gradient, and OpenCV divides its square by (4 * 255)^2.
    texture = np.sqrt(np.maximum(cv2.cornerMinEigenVal(image, BLOCK), 0)) * (255 / 2)
    margin = BLOCK // 2 + 1
    texture[:margin], texture[-margin:], texture[:, :margin], texture[:, -margin:] = 0, 0, 0, 0
    found = []
    for top in range(0, image.shape[0], spacing_px):
        for left in range(0, image.shape[1], spacing_px):
            cell = texture[top : top + spacing_px, left : left + spacing_px]
            best = int(cell.argmax())
            if (value := float(cell.flat[best])) >= min_texture:
                found.append((-value, left + best % cell.shape[1], top + best // cell.shape[1]))
    chosen: dict[tuple[int, int], tuple[int, int]] = {}  # by cell
    for _, x, y in sorted(found):  # those of neighbouring cells may lie side by side
        row, column = y // spacing_px, x // spacing_px
        around = [(row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
        near = [chosen[cell] for cell in around if cell in chosen]
        if all(max(abs(x - other_x), abs(y - other_y)) >= spacing_px / 2 for other_x, other_y in near):
            chosen[row, column] = x, y
    return np.array(list(chosen.values()), np.float64).reshape(-1, 2)


def _inside(points: np.ndarray, height: int, width: int) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.all((points >= 0) & (points <= (width - 1, height - 1)), axis=1)


def _sampled(field: np.ndarray, points: np.ndarray) -> np.ndarray:
    """A field (H, W[, C]) at points (N, 2), bilinearly; NaN where a neighbour is."""
    columns, rows = (points[:, axis].astype(np.float32)[:, None] for axis in (0, 1))
    found = cv2.remap(field, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return found.reshape(len(points), *field.shape[2:])
