# SPDX-License-Identifier: Apache-2.0
"""Random motions for the procedural generator, and the random numbers it draws them with. T is the number of frames."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_LIPSCHITZ = 0.25  # of an elastic field: each step of its inversion gains a factor of 4
WAVES = 3  # plane waves in an elastic field


def pick(rng: np.random.Generator, weights: dict[Any, float]) -> Any:
    """Draw a key with its weight (they sum to 1); a tenth of the time of ``rng.choice``."""
    rest = rng.random()
    for key, weight in weights.items():
        rest -= weight
        if rest < 0:
            return key
    return key


def sign(rng: np.random.Generator) -> float:
    """1 or -1."""
    return 1.0 if rng.random() < 0.5 else -1.0


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number in low..high, every factor equally likely."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def schedule(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Progress of a motion at each frame, (T,): 0, 1, about 2 (+- 0.3), ...: near-constant velocity."""
    steps = np.concatenate([[0.0, 1.0], 1 + rng.uniform(-0.3, 0.3, max(0, frames - 2))])
    return np.cumsum(steps)[:frames]


def apply_homography(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Map (N, 2) points, which should lie in front of the camera."""
    mapped = points @ homography[:, :2].T + homography[:, 2]
    return mapped[:, :2] / np.maximum(mapped[:, 2:], 1e-3)


def mean_displacement(homography: np.ndarray, points: np.ndarray) -> float:
    """Mean length in px by which a homography moves (N, 2) points."""
    shift = apply_homography(homography, points) - points
    return float(np.sqrt((shift * shift).sum(1)).mean())


_UNIT_GRID = np.stack(np.meshgrid(np.linspace(-1, 1, 5), np.linspace(-1, 1, 5)), axis=-1).reshape(-1, 2)


def grid(centre: np.ndarray, half_size: npt.ArrayLike) -> np.ndarray:
    """A 5 x 5 grid of points, (25, 2), over centre +- half_size."""
    return centre + _UNIT_GRID * np.asarray(half_size)


def planar_motion(
    rng: np.random.Generator, frames: int, centre: np.ndarray, radius: float, magnitude: float
) -> np.ndarray:
    """Homographies (T, 3, 3) of a plane that shifts, turns, zooms and tilts about ``centre`` (x, y in px).

    The mean displacement over ``centre`` +- ``radius`` px from frame 0 to frame 1 is ``magnitude`` px.
    """
    direction = rng.uniform(0, 2 * np.pi)
    shift = np.array([np.cos(direction), np.sin(direction)]) * pick(rng, {1.0: 0.67, 0.3: 0.33})
    # Small things may move far, but not spin or swell as far: that would be a blur, not a motion.
    reach = min(magnitude, 0.3 * radius) / magnitude / radius
    turn = rng.normal(0, 0.6) * reach * (rng.random() < 0.7)
    zoom = rng.normal(0, 0.6) * reach * (rng.random() < 0.7)
    tilt = rng.normal(0, 0.15, 2) * reach / radius * (rng.random() < 0.5)
    along, around = schedule(rng, frames), schedule(rng, frames)
    bend = rng.uniform(-0.2, 0.2) * (rng.random() < 0.5)  # rad per frame: the path is an arc

    def at(progress: float, turned: float, scale: float) -> np.ndarray:
        angle, factor, arc = scale * turned * turn, math.exp(scale * turned * zoom), bend * max(progress - 1, 0)
        cos, sin = factor * math.cos(angle), factor * math.sin(angle)
        path = scale * progress * np.array([[math.cos(arc), -math.sin(arc)], [math.sin(arc), math.cos(arc)]]) @ shift
        p, q = np.clip(scale * turned * tilt, -0.15 / radius, 0.15 / radius)
        about_centre = np.array([[cos, -sin, path[0]], [sin, cos, path[1]], [p, q, 1]])
        return back @ about_centre @ to_centre

    to_centre = np.array([[1, 0, -centre[0]], [0, 1, -centre[1]], [0, 0, 1]])
    back = np.array([[1, 0, centre[0]], [0, 1, centre[1]], [0, 0, 1]])
    points, scale = grid(centre, radius), magnitude
    for _ in range(2):  # the displacement is nearly linear in the scale
        scale *= magnitude / max(mean_displacement(at(1, 1, scale), points), 1e-6)
    return np.stack([at(p, q, scale) for p, q in zip(along, around, strict=True)])


def elastic(rng: np.random.Generator, frames: int, radius: float, magnitude: float) -> tuple[np.ndarray, np.ndarray]:
    """An elastic field of at most ``magnitude`` px and with a Lipschitz constant of at most ``MAX_LIPSCHITZ``.

    Returns plane waves (WAVES, 5), each amplitude x, y in px, wave vector x, y in rad/px and phase, and gains (T,) in
    0..1.
    """
    lengths = np.maximum(rng.uniform(0.7, 2.5, WAVES) * radius, 24.0)
    directions, headings = rng.uniform(0, 2 * np.pi, (2, WAVES))
    vectors = 2 * np.pi / lengths[:, None] * np.stack([np.cos(directions), np.sin(directions)], axis=1)
    amplitudes = rng.uniform(0.3, 1, WAVES)[:, None] * np.stack([np.cos(headings), np.sin(headings)], axis=1)
    sizes = np.linalg.norm(amplitudes, axis=1)
    steepness = float((sizes * np.linalg.norm(vectors, axis=1)).sum())
    amplitudes *= min(rng.uniform(0.2, 1) * MAX_LIPSCHITZ / steepness, magnitude / sizes.sum())
    waves = np.concatenate([amplitudes, vectors, rng.uniform(0, 2 * np.pi, (WAVES, 1))], axis=1)
    gains = schedule(rng, frames)
    return waves, gains / gains[-1]


def rotation(vector: np.ndarray) -> np.ndarray:
    """Rotation matrix of a rotation vector in rad (Rodrigues)."""
    angle = float(np.linalg.norm(vector))
    x, y, z = vector / max(angle, 1e-12)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
