# SPDX-License-Identifier: Apache-2.0
"""What the generator's scenes are drawn by: settings, random numbers, outlines, motions. T is the number of frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pydantic.dataclasses
import torch
from pydantic import Field
from torch import Tensor

from training.settings import CHECKED, Count, Flag, Natural, Positive, Share

MAX_LIPSCHITZ = 0.25  # of an elastic field: each step of its inversion gains a factor of 4
WAVES = 3  # plane waves in an elastic field
_UNIT_GRID = np.stack(np.meshgrid(np.linspace(-1, 1, 5), np.linspace(-1, 1, 5)), axis=-1).reshape(-1, 2)


def grid(centre: np.ndarray, half_size: npt.ArrayLike) -> np.ndarray:
    """A 5 x 5 grid of points, (25, 2), over centre +- half_size."""
    return centre + _UNIT_GRID * np.asarray(half_size)


Side = Annotated[int, Field(ge=16)]


@pydantic.dataclasses.dataclass(frozen=True, config=CHECKED)
class SceneSettings:
    """What is drawn. Shares are of all clips."""

    height: Side
    width: Side
    max_displacement_px: Positive
    min_displacement_px: Positive = 0.5  # both: typical motion of background and layers between two frames
    frames: Annotated[Count, Field(ge=2)] = 3  # per clip
    max_layers: Annotated[Natural, Field(le=8)] = 8  # over the background
    static_share: Share = 0.06  # nothing moves but noise and light
    particle_share: Share = 0.08  # see ``particles``
    fine_share: Share = 0.06  # displacements of 0.05 to 1 px
    photographs: Natural = 0  # textures with indices below this are photographs, the ``patterns`` after them procedural
    patterns: Count = 120
    seed: Natural = 0  # another one, other clips
    photometric: Flag = True  # fog, shadows, changes of light and colour, blur and noise

    def __post_init__(self) -> None:
        low, high = self.min_displacement_px, self.width / 2
        if not low < self.max_displacement_px <= high:
            raise ValueError(f"max_displacement_px: expected above min_displacement_px, {low}, and at most half the "
                             f"width, {high}, got {self.max_displacement_px}")  # fmt: skip
        if (shares := self.static_share + self.particle_share + self.fine_share) > 1:
            raise ValueError(f"static_share + particle_share + fine_share: expected at most 1, got {shares}")


class Dice(np.random.Generator):
    """Random numbers for a clip of these settings: those of ``np.random.default_rng(seed)``."""

    def __init__(self, settings: SceneSettings, seed: int | Sequence[int]) -> None:
        super().__init__(np.random.PCG64(seed))
        self.settings = settings

    def pick(self, weights: dict[Any, float]) -> Any:
        """Draw a key with its weight (they sum to 1); a tenth of the time of ``choice``."""
        rest = self.random()
        for key, weight in weights.items():
            rest -= weight
            if rest < 0:
                return key
        return key

    def sign(self) -> float:
        """1 or -1."""
        return 1.0 if self.random() < 0.5 else -1.0

    def log_uniform(self, low: float, high: float) -> float:
        """A number in low..high, every factor equally likely."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def layer_count(self) -> int:
        """0 to max_layers, about 3 on average: few things are the rule, many the exception."""
        weights = {0: 0.06, 1: 0.14, 2: 0.18, 3: 0.2, 4: 0.16, 5: 0.1, 6: 0.07, 7: 0.05, 8: 0.04}
        return min(self.pick(weights), self.settings.max_layers)

    def object_radius(self) -> float:
        """Half the size of an object in px: its size is log-uniform from 7 % to 70 % of the frame."""
        return 0.5 * self.log_uniform(0.07, 0.7) * float(np.sqrt(self.settings.height * self.settings.width))

    def thin_px(self, most: float = 4.0) -> float:
        """A thickness of 1 to ``most`` px, in proportion in frames wider than 400 px."""
        return self.log_uniform(1, most) * max(1.0, self.settings.width / 400)

    def schedule(self) -> np.ndarray:
        """Progress of a motion at each frame, (T,): 0, 1, about 2 (+- 0.3), ...: near-constant velocity."""
        frames = self.settings.frames
        steps = np.concatenate([[0.0, 1.0], 1 + self.uniform(-0.3, 0.3, max(0, frames - 2))])
        return np.cumsum(steps)[:frames]


Outline = Callable[[Tensor, Tensor], Tensor]
"""Where a layer is: from x, y (T, H, W) in px of frame 0 to the signed distance from its border in px, negative inside,
and about right near the border.
"""


def everywhere(x: Tensor, y: Tensor) -> Tensor:
    """The outline of what has no border."""
    return torch.full_like(x, -torch.inf)


def polygon(*inside: np.ndarray) -> Outline:
    """Where a x + b y + c >= 0 for each of these half-planes (a, b, c)."""
    planes = np.array(inside) / -np.linalg.norm(np.array(inside)[:, :2], axis=1, keepdims=True)  # to distances in px

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return reduce(torch.maximum, (a * x + b * y + c for a, b, c in torch.tensor(planes, dtype=torch.float32)))

    return distance


def rectangle(centre: np.ndarray, angle: float, half_size: npt.ArrayLike) -> Outline:
    """A box of this half width and height about ``centre`` (x, y in px), turned by ``angle`` in rad."""
    half_width, half_height = np.asarray(half_size, float).tolist()

    def distance(x: Tensor, y: Tensor) -> Tensor:
        u, v = _local(x, y, centre, angle)
        return torch.maximum(u.abs() - half_width, v.abs() - half_height)

    return distance


def bars(
    centre: np.ndarray, angle: float, half_size: npt.ArrayLike, period: float, thickness: float, crossing: bool = False,
    offset: float = 0.0,
) -> Outline:  # fmt: skip
    """Bars of this thickness along the height of a box, every ``period``, the first ``offset`` periods from its middle.

    With ``crossing``, others cross them. The box is a ``rectangle``; period and thickness are in px.
    """
    box = rectangle(centre, angle, half_size)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        u, v = _local(x, y, centre, angle)
        nearest = (torch.remainder(u / period - offset + 0.5, 1) - 0.5).abs() * period
        if crossing:
            nearest = torch.minimum(nearest, (torch.remainder(v / period + 0.5, 1) - 0.5).abs() * period)
        return torch.maximum(nearest - thickness / 2, box(x, y))

    return distance


def _local(x: Tensor, y: Tensor, centre: np.ndarray, angle: float) -> tuple[Tensor, Tensor]:
    """Coordinates about a centre (x, y), turned by an angle."""
    cos, sin, across, down = math.cos(angle), math.sin(angle), x - float(centre[0]), y - float(centre[1])
    return cos * across + sin * down, cos * down - sin * across


def _blob(centre: np.ndarray, angle: float, radii: tuple[float, float], hole: float, harmonics: np.ndarray) -> Outline:
    """An ellipse whose radius 4 harmonics (8,) modulate; ``hole`` is the relative radius of a hole in it."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        u, v = _local(x, y, centre, angle)
        u, v = u / radii[0], v / radii[1]
        radius = (u * u + v * v).sqrt_().clamp_min_(1e-4)
        cos, sin = u / radius, v / radius
        stretch = radius / torch.hypot(u / radii[0], v / radii[1]).clamp_min_(1e-9)  # to px, to first order
        outline = torch.ones_like(radius)
        re, im = cos, sin
        for even, odd in harmonics.reshape(4, 2).tolist():  # cos and sin of 2, 3, 4, 5 times the angle
            re, im = re * cos - im * sin, re * sin + im * cos
            outline = outline + even * re + odd * im
        return torch.maximum(radius - outline, hole * outline - radius) * stretch

    return distance


def object_outline(rng: Dice, centre: np.ndarray, radius: float) -> Outline:
    """A random outline of about ``radius`` px around ``centre`` (x, y in px).

    A blob, at times with a hole, a convex polygon, or thin bars: a pole, a fence, a grid.
    """
    kind = rng.pick({"blob": 0.46, "polygon": 0.36, "bars": 0.18})
    angle, aspect = rng.uniform(0, np.pi), rng.log_uniform(0.35, 1)
    if kind == "polygon":
        corners = int(rng.integers(3, 8))
        angles = 2 * np.pi * (np.arange(corners) + rng.uniform(-0.3, 0.3, corners) + rng.random()) / corners
        ellipse = np.stack([np.cos(angles), aspect * np.sin(angles)], axis=1)  # whose points make a convex polygon
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        points = centre + 1.3 * radius * ellipse @ turn
        edges = np.roll(points, -1, axis=0) - points
        normals = np.stack([-edges[:, 1], edges[:, 0]], axis=1)
        return polygon(*np.concatenate([normals, -(normals * points).sum(1, keepdims=True)], axis=1))
    if kind == "blob":
        decay = np.array([1, 1, 0.8, 0.8, 0.5, 0.5, 0.3, 0.3])
        harmonics = rng.normal(0, 0.13, 8) * decay * (rng.random() < 0.6)
        hole = rng.uniform(0.25, 0.6) * (rng.random() < 0.15)
        return _blob(centre, angle, (radius / np.sqrt(aspect), radius * np.sqrt(aspect)), hole, harmonics)
    thickness = rng.thin_px()
    single, crossing = rng.pick({(True, False): 0.5, (False, False): 0.3, (False, True): 0.2})
    period = 1e5 if single else rng.log_uniform(3, 8) * thickness
    return bars(centre, angle, np.array([radius, 2 * radius]), period, thickness, crossing)


def apply_homography(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Map (N, 2) points, which should lie in front of the camera."""
    mapped = points @ homography[:, :2].T + homography[:, 2]
    return mapped[:, :2] / np.maximum(mapped[:, 2:], 1e-3)


def mean_displacement(homography: np.ndarray, points: np.ndarray) -> float:
    """Mean length in px by which a homography moves (N, 2) points."""
    shift = apply_homography(homography, points) - points
    return float(np.sqrt((shift * shift).sum(1)).mean())


def planar_motion(rng: Dice, centre: np.ndarray, radius: float, magnitude: float) -> np.ndarray:
    """Homographies (T, 3, 3) of a plane that shifts, turns, zooms and tilts about ``centre`` (x, y in px).

    The mean displacement over ``centre`` +- ``radius`` px from frame 0 to frame 1 is ``magnitude`` px.
    """
    direction = rng.uniform(0, 2 * np.pi)
    shift = np.array([np.cos(direction), np.sin(direction)]) * rng.pick({1.0: 0.67, 0.3: 0.33})
    # Small things may move far, but not spin or swell as far: that would be a blur, not a motion.
    reach = min(magnitude, 0.3 * radius) / magnitude / radius
    turn = rng.normal(0, 0.6) * reach * (rng.random() < 0.7)
    zoom = rng.normal(0, 0.6) * reach * (rng.random() < 0.7)
    tilt = rng.normal(0, 0.15, 2) * reach / radius * (rng.random() < 0.5)
    along, around = rng.schedule(), rng.schedule()
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


def elastic(rng: Dice, radius: float, magnitude: float) -> tuple[np.ndarray, np.ndarray]:
    """An elastic field of at most ``magnitude`` px and with a Lipschitz constant of at most ``MAX_LIPSCHITZ``.

    :returns: plane waves (WAVES, 5): amplitude x, y (px), wave vector x, y (rad/px), phase; and gains (T,) in 0..1.
    """
    lengths = np.maximum(rng.uniform(0.7, 2.5, WAVES) * radius, 24.0)
    directions, headings = rng.uniform(0, 2 * np.pi, (2, WAVES))
    vectors = 2 * np.pi / lengths[:, None] * np.stack([np.cos(directions), np.sin(directions)], axis=1)
    amplitudes = rng.uniform(0.3, 1, WAVES)[:, None] * np.stack([np.cos(headings), np.sin(headings)], axis=1)
    sizes = np.linalg.norm(amplitudes, axis=1)
    steepness = float((sizes * np.linalg.norm(vectors, axis=1)).sum())
    amplitudes *= min(rng.uniform(0.2, 1) * MAX_LIPSCHITZ / steepness, magnitude / sizes.sum())
    waves = np.concatenate([amplitudes, vectors, rng.uniform(0, 2 * np.pi, (WAVES, 1))], axis=1)
    gains = rng.schedule()
    return waves, gains / gains[-1]
