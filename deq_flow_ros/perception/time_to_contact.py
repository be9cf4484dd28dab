# SPDX-License-Identifier: Apache-2.0
"""In how many seconds the camera and what it sees would meet, region by region, from how the image expands.

The divergence of the flow of a surface at right angles to the line of sight is 2 / tau, with the time to contact tau
(Lee, 1976). Rotation of the camera changes it, but not on the sphere of directions (Koenderink and van Doorn, 1987), so
each region is fitted in the planes that touch the sphere at its centre, in one image and in the other. A slanted
surface is stretched along the direction d in which translation moves it (Cipolla and Blake, 1992): the Jacobian of the
flow is ``I / tau + d q^T``, with the slant q. With n at right angles to d, ``n^T J n = 1 / tau`` for every plane. The
direction d is that of the mean flow less the rotation, which is fitted to the whole field. docs/time_to_contact.md has
the titles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from deq_flow_ros.imaging.camera import CameraModel, NormalizedFlow
from deq_flow_ros.perception import fit_ego_motion
from deq_flow_ros.settings import live, number

SAMPLES = 20_000
"""About so many pixels of a field are used."""
CORRELATED_PX = 8
"""Errors of the flow are alike within cells of this size, which are those of the network."""
ERROR_FLOOR_PX = 0.05
"""Error that the flow has everywhere, beside its uncertainty."""
STEPS, TOLERATED = 8, 1.0
"""Of the robust fit; and expected errors from which a pixel loses its weight (Geman and McClure)."""
SURE, FEWEST_SURE = 4.0, 3
"""Standard errors that rates must have to count for the change of the camera's speed, and how many must."""
FITTED = 1200
"""About so many pixels are used for the rotation."""


@dataclass(frozen=True)
class ContactSettings:
    """How the image is divided, and what is said of a region."""

    rows: int = live(number(6, 1, 100), "rows of the grid of regions")
    columns: int = live(number(8, 1, 100), "columns of the grid of regions")
    smoothing_s: float = live(
        number(0.1, 0.0, 10.0, "s"),
        "time constant with which a region remembers what was measured before. 0 = it does not",
    )
    horizon_s: float = live(number(20.0, 1.0, 1000.0, "s"), "a time above it counts as no approach, and is infinite")
    tolerance: float = live(number(0.15, 0.01, 1.0), "relative error of a time within which confidence calls it right")
    min_confidence: float = live(number(0.5, 0.0, 1.0), "confidence below which a region is NaN, with confidence 0")
    min_known: float = live(
        number(0.5, 0.1, 1.0),
        "share of the pixels of a region that must have flow and fit one plane; below, the region is NaN",
    )


@dataclass(frozen=True)
class Contacts:
    """What is known of the regions, all (rows, columns).

    :ivar seconds: until contact, at the time of the image on whose pixels the flow lives; infinite where nothing
        approaches within the horizon; NaN where it is not known.
    :ivar confidence: 0..1, for a time the probability that it is right within the tolerance; for an infinite one, 1
        less twice the probability of a contact within the horizon, so that 0 is a mere guess; 0 where it is not known.
    :ivar rotation_known: whether the rotation of the camera could be fitted; else slanted regions count as upright.
    """

    seconds: np.ndarray
    confidence: np.ndarray
    rotation_known: bool

    @property
    def first(self) -> float:
        """The smallest time, s; infinite where nothing approaches, NaN where nothing is known."""
        known = self.seconds[self.confidence > 0]
        return float(known.min()) if known.size else math.nan


class ContactEstimator:
    """Times to contact in the flow fields of one camera, which follow each other.

    :param shape: height and width of the fields.
    :param camera: of their pixels.
    :raises ValueError: for more regions than there are pixels for.
    """

    def __init__(self, shape: tuple[int, int], camera: CameraModel, settings: ContactSettings) -> None:
        self.shape, self.camera, self.settings = shape, camera, settings
        height, width = shape
        self._grid = rows, columns = settings.rows, settings.columns
        # Three samples across a region are the fewest that show an expansion robustly.
        self._stride = max(1, min(round(math.sqrt(height * width / SAMPLES)), height // rows // 3))
        self._tall, self._wide = height // rows // self._stride, width // columns // self._stride
        if min(self._tall, self._wide) < 3:
            raise ValueError(
                f"expected regions of at least 3x3 px, got {columns}x{rows} of them in fields of {width}x{height} px: "
                "make rows and columns fewer"
            )
        self._normalized = NormalizedFlow(camera)
        samples = self.regions(np.mgrid[:height, :width][::-1].transpose(1, 2, 0).astype(np.float64))
        self._here = camera.normalized(samples.reshape(-1, 2)).reshape(samples.shape)
        self.forget()

    def forget(self) -> None:
        """The next field does not follow those before."""
        self._weight, self._rate = np.zeros((2, self.settings.rows * self.settings.columns))

    def regions(self, field: np.ndarray) -> np.ndarray:
        """(regions, n, channels): the samples of a field (H, W[, channels]) by region."""
        (rows, columns), tall, wide, start = self._grid, self._tall, self._wide, self._stride // 2
        samples = field[start :: self._stride, start :: self._stride][: rows * tall, : columns * wide]
        blocks = samples.reshape(rows, tall, columns, wide, -1).swapaxes(1, 2)
        return blocks.reshape(rows * columns, tall * wide, -1)

    def __call__(
        self, flow: np.ndarray, uncertainty: np.ndarray, elapsed_s: float, rotation: np.ndarray | None = None
    ) -> Contacts:
        """The times of a field.

        :param flow: (H, W, 2) float32 px; NaN where there is none.
        :param uncertainty: (H, W) float32 px, the expected error of the flow.
        :param elapsed_s: time from the field's image to the one that the flow points to, below 0 for backward flow.
        :param rotation: (3, 3), takes directions of the first camera to those of the second; None: it is fitted.
        :raises ValueError: for no time between the images.
        """
        if not elapsed_s or not math.isfinite(elapsed_s):
            raise ValueError(f"expected a time between the two images, got {elapsed_s} s")
        there = self._here + self.regions(self._normalized(flow))
        focal = math.sqrt(self.camera.fx * self.camera.fy)
        sigma = (self.regions(uncertainty)[..., 0].astype(np.float64) + ERROR_FLOOR_PX) / focal
        known = np.isfinite(there).all(axis=2) & np.isfinite(self._here).all(axis=2) & np.isfinite(sigma)
        if rotation is None:
            rotation = _rotation(self._here[known], there[known], sigma[known])
        rate, error, explained = self._expansion(there, np.where(known, sigma, 1.0), known, rotation)
        # The scale between the images is 1 + rate, and 1 - 1 / scale the part of the distance that was covered.
        with np.errstate(divide="ignore", invalid="ignore"):
            rate, error = rate / (1 + rate) / elapsed_s, np.abs(error / elapsed_s)
        usable = (explained >= self.settings.min_known) & np.isfinite(rate + error)
        self._remember(np.where(usable, rate, 0.0), np.where(usable, error, np.inf), elapsed_s)
        return self._judged(usable, rotation is not None)

    def _expansion(
        self, there: np.ndarray, sigma: np.ndarray, known: np.ndarray, rotation: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each region the relative expansion between the images, its standard error, and the share explained."""
        start = np.where(known, 1 / sigma**2, 0.0)
        rays, targets = _directions(self._here), _directions(there)
        to_centre, to_target = _turns_to_z(rays, start), _turns_to_z(targets, start)
        x, y = _on_plane(to_centre, rays), _on_plane(to_target, targets)
        design = np.concatenate([np.ones((*x.shape[:2], 1)), x], axis=2)
        weight = start
        for _ in range(STEPS):
            normal = np.einsum("rni,rn,rnj->rij", design, weight, design) + 1e-9 * np.eye(3)
            fitted = np.linalg.solve(normal, np.einsum("rni,rn,rnj->rij", design, weight, y))
            residual = np.linalg.norm(y - design @ fitted, axis=2) / sigma
            weight = start / (1 + (residual / TOLERATED) ** 2) ** 2
        jacobian = fitted[:, 1:].swapaxes(1, 2) - np.eye(2)
        explained = ((residual < TOLERATED) & known).mean(axis=1)
        if rotation is None:
            rate = np.trace(jacobian, axis1=1, axis2=2) / 2
        else:
            arrived = np.concatenate([fitted[:, 0], np.ones((len(fitted), 1))], axis=1)
            seen = np.einsum("ij,rkj,rk->ri", rotation.T, to_target, arrived)
            moved = _on_plane(to_centre, seen[:, None])[:, 0]
            across = np.stack([-moved[:, 1], moved[:, 0]], axis=1)
            across /= np.maximum(np.linalg.norm(across, axis=1, keepdims=True), 1e-12)
            rate = np.einsum("ri,rij,rj->r", across, jacobian, across)
        covariance = np.linalg.inv(normal)
        # Samples within a cell of the network share their error, and count as one. A component of an error vector has
        # half of its square.
        alike = max(1.0, (CORRELATED_PX / self._stride) ** 2)
        error = np.sqrt(alike * (covariance[:, 1, 1] + covariance[:, 2, 2]) / 4)
        return rate, error, explained

    def _remember(self, rate: np.ndarray, error: np.ndarray, elapsed_s: float) -> None:
        """Take a measurement into the running mean, whose rates grow as those of a steady approach do.

        When the camera changes its speed, those of all regions change by one factor: a weighted median. The
        rates of before change by it as well, so that they do not lag; those of now, which are the mean over the time
        between the images, by its square root.
        """
        smoothing_s, time_s = self.settings.smoothing_s, abs(elapsed_s)
        kept = math.exp(-time_s / smoothing_s) if smoothing_s > 0 else 0.0
        before = self._rate + time_s * self._rate * np.abs(self._rate)
        weight = 1 / np.maximum(error, 1e-9) ** 2
        sure = np.minimum(before * np.sqrt(self._weight), rate * np.sqrt(weight))
        chosen = np.flatnonzero(sure > SURE)
        if chosen.size >= FEWEST_SURE:
            ordered = chosen[np.argsort(rate[chosen] / before[chosen])]
            total = np.cumsum(sure[ordered])
            median = ordered[np.searchsorted(total, total[-1] / 2)]
            change = rate[median] / before[median]
            before, rate = before * change, rate * change ** (0.5 if elapsed_s < 0 else -0.5)
        self._weight = kept * self._weight
        total = self._weight + weight
        self._rate = np.divide(self._weight * before + weight * rate, total, out=before, where=total > 0)
        self._weight = total

    def _judged(self, usable: np.ndarray, rotation_known: bool) -> Contacts:
        """What is said of the running means."""
        settings = self.settings
        error = 1 / np.sqrt(np.maximum(self._weight, 1e-12))
        near = self._rate > 1 / settings.horizon_s
        with np.errstate(divide="ignore", invalid="ignore"):
            margin = np.where(near, settings.tolerance * self._rate, 1 / settings.horizon_s - self._rate) / error
            seconds = np.where(near, 1 / self._rate, np.inf)
        confidence = np.array([math.erf(value / math.sqrt(2)) for value in margin])
        told = usable & (confidence >= settings.min_confidence)
        seconds, confidence = np.where(told, seconds, np.nan), np.where(told, confidence, 0.0)
        seconds, confidence = np.stack([seconds, confidence]).reshape(2, *self._grid).astype(np.float32)
        return Contacts(seconds, confidence, rotation_known)


def _rotation(here: np.ndarray, there: np.ndarray, sigma: np.ndarray) -> np.ndarray | None:
    """The rotation (3, 3) of the camera from the one image to the other; None where it cannot be fitted."""
    step = max(1, len(here) // FITTED)
    motion = fit_ego_motion(here[::step], there[::step], sigma[::step])
    if motion is None or not np.isfinite(motion.matrix).all():
        return None
    # Of a homography, the nearest rotation: what it has beyond that is the translation past a plane.
    left, _, right = np.linalg.svd(motion.matrix)
    turn = left @ right
    return turn if np.linalg.det(turn) > 0 else None


def _directions(normalized: np.ndarray) -> np.ndarray:
    """Unit vectors (..., 3) of normalized coordinates (..., 2); 0 for NaN."""
    rays = np.concatenate([normalized, np.ones((*normalized.shape[:-1], 1))], axis=-1)
    return np.nan_to_num(rays / np.linalg.norm(rays, axis=-1, keepdims=True))


def _turns_to_z(rays: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(regions, 3, 3): the shortest rotations that take the mean directions of regions to the z axis."""
    mean = np.einsum("rni,rn->ri", rays, weight)
    length = np.linalg.norm(mean, axis=1, keepdims=True)
    directions = np.where(length > 0, mean / np.maximum(length, 1e-12), (0.0, 0.0, 1.0))
    axis = np.cross(directions, (0.0, 0.0, 1.0))
    sine = np.linalg.norm(axis, axis=1)
    scale = np.arctan2(sine, directions[:, 2]) / np.maximum(sine, 1e-12)
    return np.array([cv2.Rodrigues(vector)[0] for vector in axis * scale[:, None]])


def _on_plane(turns: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """(regions, n, 2): where rays (regions, n, 3), turned, meet the plane that touches the sphere at the z axis."""
    turned = np.einsum("rij,rnj->rni", turns, rays)
    return turned[..., :2] / np.maximum(turned[..., 2:], 1e-6)
