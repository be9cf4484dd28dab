# SPDX-License-Identifier: Apache-2.0
"""Points followed through a stream: dense flow leads, the images refine and check, and what is lost is named.

A step of a track begins where the flow leads. Lucas and Kanade's method then compares the surroundings with those in
the previous image, and in an anchor that is up to ``ANCHOR_STEPS`` old and reached by chained flow, forward and back
again (the check of Kalal et al., "Forward-backward error", ICPR 2010). Where no image confirms the flow, the track goes
on with the flow alone, and its expected error grows, until it is too large. docs/point_tracks.md says why.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from deq_flow_ros.settings import live, number

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
ANCHOR_STEPS = 10
"""Images after which another one becomes the anchor."""
CELL_PX, SMOOTHING = 4, 0.4
"""Of the flow by which images are warped: side of its cells, and deviation of the Gaussian as a share of the window."""
INVERSIONS = 4
"""Steps of the fixed-point iteration that follows backward flow forward."""


@dataclass(frozen=True)
class TrackSettings:
    """When tracks begin and end."""

    max_tracks: int = live(number(2000, 1, 30_000), "none begins while there are so many")
    spacing_px: int = live(number(12, 4, 500, "px"), "distance that a new track keeps from all others")
    min_texture: float = live(
        number(2.0, 0.1, 255.0, "grey levels per px"),
        "RMS gradient, in the direction in which it is least, with which a track may begin",
    )
    window_px: int = live(number(11, 5, 63, "px"), "side of the square that is compared between images; odd")
    max_correction_px: float = live(
        number(1.0, 0.0, 100.0, "px"), "how far the images may correct the flow, unless twice its uncertainty is more"
    )
    max_disagreement_px: float = live(
        number(1.0, 0.01, 100.0, "px"),
        "distance from the start, after a step forward and back, up to which the images confirm a step",
    )
    max_residual: float = live(
        number(20.0, 0.1, 255.0, "grey levels"), "mean difference of the squares up to which the images confirm a step"
    )
    max_error_px: float = live(number(1.0, 0.1, 100.0, "px"), "expected error of a position above which its track ends")


TRACK = np.dtype([("id", np.uint32), ("point", np.float64, 2), ("age", np.uint32), ("error", np.float64)])
"""A track in one image: its number, which is never used twice; where it is, px, x before y; steps since it began; and
the expected distance from where the point has gone, px."""


class _Reference:
    """An image, the tracks in it, and where all that it shows, in cells of ``CELL_PX``, was then and is now."""

    def __init__(self, image: np.ndarray, tracks: np.ndarray) -> None:
        self.image, self.tracks, self.steps = image, tracks, 0
        axes = (np.arange(CELL_PX / 2 - 0.5, side + CELL_PX / 2 - 0.5, CELL_PX) for side in image.shape[::-1])
        self.now = self.start = np.stack(np.meshgrid(*axes), axis=2).astype(np.float32)


class PointTracker:
    """Follows points through the flow of a stream.

    :ivar settings: may be exchanged between two fields.
    :ivar tracks: (N,) of ``TRACK``, in the latest image.
    """

    def __init__(self, settings: TrackSettings | None = None) -> None:
        self.settings = settings or TrackSettings()
        self.tracks = np.empty(0, TRACK)
        self._until_ns: int | None = None
        self._shape: tuple[int, ...] = ()
        self._next_id = 0
        self._anchor: _Reference | None = None

    def restart(self, reason: str = RESTART) -> Counter[str]:
        """End all tracks; returns how many ended for what reason."""
        ended = +Counter({reason: len(self.tracks)})
        self.tracks, self._until_ns, self._anchor = np.empty(0, TRACK), None, None
        return ended

    def follow(
        self, flow: np.ndarray, uncertainty: np.ndarray, first: np.ndarray, second: np.ndarray,
        stamps_ns: tuple[int, int], backward: bool = False,
    ) -> Counter[str]:  # fmt: skip
        """Take all tracks from one image to the next, and begin new ones there.

        :param flow: (H, W, 2) float32 px, from ``first`` to ``second``, or ``backward`` from ``second`` to ``first``;
            NaN where there is none.
        :param uncertainty: (H, W) float32 px, the expected error of the flow, on its pixels.
        :param first, second: (H, W) uint8 grey.
        :param stamps_ns: of the two images. Unless ``first`` is the ``second`` of the last call, all tracks end.
        :returns: how many tracks ended for what reason.
        :raises ValueError: for sizes that differ, or an image that is not later than the other; nothing changes.
        """
        shape = first.shape
        if flow.shape != (*shape, 2) or uncertainty.shape != shape or second.shape != shape:
            got = f"flow {flow.shape[:2]}, uncertainty {uncertainty.shape}, images {shape} and {second.shape}"
            raise ValueError(f"expected images and fields of one size, got {got}")
        if stamps_ns[1] <= stamps_ns[0]:
            raise ValueError(f"expected the stamp of the earlier image first, got {stamps_ns}")
        ended: Counter[str] = Counter()
        if self._until_ns is not None and stamps_ns[0] != self._until_ns:
            ended += self.restart(GAP if stamps_ns[0] > self._until_ns else RESTART)
        elif self._shape and shape != self._shape:
            ended += self.restart(SIZE)
        self._shape = shape
        if self._until_ns is None and not len(self.tracks):  # so that the first step is one as well
            self._begin(first)
        self._until_ns = stamps_ns[1]
        if len(self.tracks):
            ended += self._step(flow, uncertainty, first, second, backward)
        self._begin(second)
        return ended

    def _step(
        self, flow: np.ndarray, uncertainty: np.ndarray, first: np.ndarray, second: np.ndarray, backward: bool
    ) -> Counter[str]:
        tracks, settings = self.tracks.copy(), self.settings
        height, width = first.shape
        there = _led(flow, tracks["point"], backward)
        error = np.hypot(tracks["error"], _sampled(uncertainty, there if backward else tracks["point"]))
        reasons = np.full(len(there), "", object)
        reasons[~np.isfinite(there).all(axis=1) | ~np.isfinite(error)] = UNKNOWN
        tried = np.flatnonzero((reasons == "") & _inside(there, height, width))
        last = _Reference(first, self.tracks)
        if self._anchor is None or self._anchor.steps >= ANCHOR_STEPS:
            self._anchor = last
        for reference in dict.fromkeys((last, self._anchor)):
            reference.now, reference.steps = _led(flow, reference.now, backward), reference.steps + 1
            known = reference.tracks["id"]
            _, mine, theirs = np.intersect1d(tracks["id"][tried], known, assume_unique=True, return_indices=True)
            if mine.size:
                mine, start = tried[mine], reference.tracks[theirs]
                found, apart, good = self._matched(reference, second, start["point"], error[mine])
                total = np.hypot(start["error"], apart + STEP_ERROR_PX)
                better = good & ((total < error[mine]) | (reference is last))
                there[mine[better]], error[mine[better]] = found[better], total[better]
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
        tracks["point"], tracks["error"] = there, error
        tracks["age"] += 1
        self.tracks = tracks[alive]
        return Counter(reasons[~alive].tolist())

    def _matched(
        self, reference: _Reference, image: np.ndarray, start: np.ndarray, unsure: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where what the reference shows at the start is now, how far the way back ends off, and whether it is so.

        The method knows translations only, and takes a surface that grows or turns for one that shifts, which adds up:
        the image is therefore first warped to the reference by the flow.
        """
        settings = self.settings
        way = cv2.GaussianBlur(reference.now - reference.start, (0, 0), SMOOTHING * settings.window_px / CELL_PX)
        way = cv2.resize(way, None, fx=CELL_PX, fy=CELL_PX)[: image.shape[0], : image.shape[1]]
        rows, columns = (np.arange(side, dtype=np.float32) for side in image.shape)
        x, y = way[..., 0] + columns, way[..., 1] + rows[:, None]
        warped = cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        options: dict[str, Any] = {"winSize": (settings.window_px,) * 2, "maxLevel": 0}
        options["criteria"] = cv2.TERM_CRITERIA_COUNT + cv2.TERM_CRITERIA_EPS, 30, 0.01
        options["flags"] = cv2.OPTFLOW_USE_INITIAL_FLOW
        here = start.astype(np.float32)[:, None]
        found, there_ok, residual = cv2.calcOpticalFlowPyrLK(reference.image, warped, here, here.copy(), **options)
        back, back_ok, _ = cv2.calcOpticalFlowPyrLK(warped, reference.image, found, here.copy(), **options)
        apart, corrected = (np.linalg.norm(end - here, axis=2)[:, 0].astype(np.float64) for end in (back, found))
        there = found[:, 0].astype(np.float64) + _sampled(way, found[:, 0])
        good = (
            (there_ok[:, 0] == 1)
            & (back_ok[:, 0] == 1)
            & (apart <= settings.max_disagreement_px)
            & (corrected <= np.maximum(settings.max_correction_px, 2 * unsure))
            & (residual[:, 0] <= settings.max_residual)
            & np.isfinite(there).all(axis=1)
        )
        return there, apart, good

    def _begin(self, image: np.ndarray) -> None:
        """Tracks where there is texture and no track near."""
        settings = self.settings
        if (room := settings.max_tracks - len(self.tracks)) > 0:
            self.begin(corners(image, settings.spacing_px, settings.min_texture, self.tracks["point"])[:room])

    def begin(self, points: np.ndarray) -> None:
        """Begin tracks at points (N, 2) px of the latest image."""
        new = np.zeros(len(points), TRACK)
        new["id"], new["point"] = np.arange(self._next_id, self._next_id + len(points)), points
        self._next_id += len(points)
        self.tracks = np.concatenate([self.tracks, new])


def corners(image: np.ndarray, spacing_px: int, min_texture: float, taken: np.ndarray | None = None) -> np.ndarray:
    """Pixels with much texture, the most first, that keep a distance from each other (Shi and Tomasi, CVPR 1994).

    :param image: (H, W) uint8 grey.
    :param min_texture: as in ``TrackSettings``.
    :param taken: (N, 2) px, within the image, from which they keep the distance as well.
    :returns: (N, 2) float64 px, x before y.
    """
    # Sobel's operator is 8 times the gradient, and OpenCV divides its square by (4 * 255)^2.
    allowed = (cv2.cornerMinEigenVal(image, BLOCK) >= (min_texture * 2 / 255) ** 2).astype(np.uint8)
    margin = BLOCK // 2 + 1
    allowed[:margin], allowed[-margin:], allowed[:, :margin], allowed[:, -margin:] = 0, 0, 0, 0
    for x, y in [] if taken is None else np.rint(taken).astype(int).tolist():
        cv2.circle(allowed, (x, y), spacing_px, 0, cv2.FILLED)
    found = cv2.goodFeaturesToTrack(image, 0, 1e-6, spacing_px, mask=allowed, blockSize=BLOCK)
    return np.empty((0, 2)) if found is None else found[:, 0].astype(np.float64)


def _inside(points: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.all((points >= 0) & (points <= (width - 1, height - 1)), axis=1)


def _sampled(field: np.ndarray, points: np.ndarray) -> np.ndarray:
    """A field (H, W[, C]) at points (..., 2), bilinearly; NaN where a neighbour or the point is."""
    at = points.astype(np.float32).reshape(len(points), -1, 2)
    found = cv2.remap(field, at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    found[np.isnan(at[..., 0])] = np.nan
    return found.reshape(*points.shape[:-1], *field.shape[2:])


def _led(flow: np.ndarray, points: np.ndarray, backward: bool) -> np.ndarray:
    """Where the flow leads points (..., 2); against backward flow, a fixed point is where it leads back from."""
    if not backward:
        return points + _sampled(flow, points)
    there = points - _sampled(flow, points)
    for _ in range(INVERSIONS):
        there = points - _sampled(flow, there)
    return there
