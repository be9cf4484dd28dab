# SPDX-License-Identifier: Apache-2.0
"""A short camera drive through a hall with moving things, ray cast in numpy, with its exact optical flow.

The world's axes are those of a ROS optical frame at rest (REP 103): x right, y down, z ahead; lengths are metres.
Pixel (0, 0) has its centre at the image coordinate (0, 0). The drive cruises, stands still for a second while the
objects move on, dashes and turns, and cruises again, so that both warm starts and large motion can be seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import cv2
import numpy as np

from deq_flow_ros.demo.world import FLOOR, SIDE, TEXTURES, Body, bodies_at, camera_at

NEAR = 0.05  # in metres; what is nearer is not drawn
SUPERSAMPLING = 2
LEVELS = 8  # copies of a texture, each of half the size
HAZE = np.array([150, 160, 172], np.float32)  # the colour into which distant things fade
SENSOR_NOISE = 1.5  # standard deviation of the noise of every pixel, of 255


@dataclass(frozen=True)
class SceneSettings:
    """The settings of a rendered stream. The same settings give the same pixels and the same flow."""

    width: int = 320
    height: int = 240
    fps: float = 30.0
    frames: int = 180
    seed: int = 0
    first_stamp_ns: int = 1_000_000_000
    version: int = 1

    def stamp_ns(self, frame: int) -> int:
        """Stamp of a frame, counted from 0."""
        return self.first_stamp_ns + round(frame * 1e9 / self.fps)


class _Part(NamedTuple):
    """The rays that hit one body first: their numbers (n,), and their origin (3,), directions (3, n) and the points
    (3, n) that they hit in the axes of the body.
    """

    body: Body
    number: int
    hit: np.ndarray
    origin: np.ndarray
    rays: np.ndarray
    point: np.ndarray


class _Atlas:
    """All textures with their halved copies in one image, so that any number of surfaces is looked up in one call.

    The halved copies ("mip levels") keep distant surfaces from flickering (Williams, "Pyramidal parametrics", 1983).
    The same seed gives the same textures.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:SIDE, :SIDE] / SIDE
        textures = [np.clip(255 * make(rng, x, y), 0, 255).astype(np.uint8) for make in TEXTURES.values()]
        sides = [SIDE >> level for level in range(LEVELS)]
        self._left = np.cumsum([0] + [side + 2 for side in sides[:-1]]).astype(np.float32)
        self._sides = np.array(sides, np.float32)
        # One texel of the opposite edge all around each copy: interpolation runs over the seam.
        self._image = np.zeros((len(textures) * (SIDE + 2), sum(side + 2 for side in sides), 3), np.uint8)
        for number, texture in enumerate(textures):
            for left, side in zip(self._left.astype(int), sides, strict=True):
                small = cv2.resize(texture, (side, side), interpolation=cv2.INTER_AREA)
                place = self._image[number * (SIDE + 2) :, left:][: side + 2, : side + 2]
                place[:] = np.pad(small, ((1, 1), (1, 1), (0, 0)), mode="wrap")

    def sample(
        self, texture: np.ndarray | np.int32, u: np.ndarray, v: np.ndarray, density: np.ndarray, blend: np.ndarray
    ) -> np.ndarray:
        """(N, 3) uint8 RGB at the positions ``u``, ``v`` (N,) in units of the texture's side, any range.

        :param texture: number in ``TEXTURES``.
        :param density: (N,) texels per pixel, by which the level is chosen.
        :param blend: (N,) 0..1, what happens between two levels: 0 takes the finer one, 1 the coarser.
        """
        level = np.clip(np.log2(np.maximum(density, 1.0)) + blend, 0, LEVELS - 1).astype(np.int32)
        side = self._sides[level]
        columns = (self._left[level] + (u - np.floor(u)) * side + 0.5).astype(np.float32)
        rows = ((v - np.floor(v)) * side + (texture * (SIDE + 2) + 0.5)).astype(np.float32)
        # OpenCV bounds the rows of a map by 32767, so the list of pixels goes in as a rectangle.
        maps = [np.pad(part, (0, -len(u) % 1024)).reshape(-1, 1024) for part in (columns, rows)]
        return cv2.remap(self._image, maps[0], maps[1], cv2.INTER_LINEAR).reshape(-1, 3)[: len(u)]


class Scene:
    """Renders the frames of a stream and computes the exact flow between any two of them.

    :raises ValueError: for settings of another version.
    """

    def __init__(self, settings: SceneSettings | None = None) -> None:
        self.settings = settings or SceneSettings()
        if self.settings.version != SceneSettings.version:
            raise ValueError(
                f"expected a scene of version {SceneSettings.version}, got {self.settings.version}; render it again"
            )
        width, height = self.settings.width, self.settings.height
        self.focal, self._shape = 0.72 * width, (height, width)
        self._principal = np.array([(width - 1) / 2, (height - 1) / 2])

    @cached_property
    def _atlas(self) -> _Atlas:
        return _Atlas(self.settings.seed)

    def render(self, frame: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        (height, width), s = self._shape, SUPERSAMPLING
        offsets = (np.arange(s) + 0.5) / s - 0.5
        columns, rows = ((np.arange(side)[:, None] + offsets).ravel() for side in (width, height))
        x, y = (grid.ravel().astype(np.float32) for grid in np.meshgrid(columns, rows))
        color = self._shade(frame, x, y, len(columns)).reshape(height, s, width, s, 3)
        image = sum(color[:, row, :, column] for row in range(s) for column in range(s)) / np.float32(s * s)
        rng = np.random.default_rng([self.settings.seed, frame])
        image += np.float32(SENSOR_NOISE) * rng.standard_normal(image.shape, np.float32)
        return np.clip(np.rint(image), 0, 255).astype(np.uint8)

    def flow(self, first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
        """The exact flow from frame ``first`` to frame ``second``, which may be earlier, on the pixels of ``first``.

        :returns: the flow (H, W, 2) float32 px, and a mask (H, W) bool, which is False where the point is occluded in
            ``second`` or outside of its image. The flow is correct there as well, except for points that are behind the
            camera then, where it is NaN.
        """
        height, width = self._shape
        x, y = self._pixels()
        seen, _ = self._seen(first, second / self.settings.fps)
        target, depth = self._projected(seen), seen[2]
        ahead = depth > NEAR
        flow = np.where(ahead, target - np.stack([x, y]), np.nan)
        inside = ahead & (target >= -0.5).all(axis=0) & (target[0] <= width - 0.5) & (target[1] <= height - 0.5)
        visible = np.zeros(len(x), bool)
        # A second ray through the target decides: it hits the same point, or something nearer.
        _, nearest, _ = self._cast(second, target[0, inside], target[1, inside])
        visible[inside] = nearest > depth[inside] * (1 - 1e-4) - 1e-3
        return np.ascontiguousarray(flow.T, np.float32).reshape(height, width, 2), visible.reshape(height, width)

    @property
    def body_count(self) -> int:
        """The number of bodies; those that move are the last ones."""
        return len(bodies_at(0.0))

    def own_motion(self, first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
        """How far what each pixel of frame ``first`` shows moves by itself until frame ``second``.

        :returns: the length (H, W) float32 px of the difference between the exact flow and the one that there would be
            if nothing but the camera moved; and the number (H, W) of the body that the pixel shows.
        """
        before, after = first / self.settings.fps, second / self.settings.fps
        (moved, owner), (resting, _) = self._seen(first, after), self._seen(first, after, before)
        length = np.hypot(*(self._projected(moved) - self._projected(resting)))
        return length.astype(np.float32).reshape(self._shape), owner.reshape(self._shape)

    def closing_rate(self, frame: int, step_s: float = 1e-3) -> np.ndarray:
        """The speed (H, W) at which what each pixel shows comes nearer, divided by its distance, in 1/s.

        Both are along the line of sight. 1 divided by it is the time to contact; below 0, it recedes.
        """
        now = frame / self.settings.fps
        before, after = (np.linalg.norm(self._seen(frame, time)[0], axis=0) for time in (now, now + step_s))
        return (np.log(before / after) / step_s).reshape(self._shape)

    def _pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """Image coordinates x and y, (N,) float64 each, of all pixels, row by row."""
        y, x = np.indices(self._shape, np.float64)
        return x.ravel(), y.ravel()

    def _seen(self, frame: int, time: float, stopped: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The points that the pixels of a frame show, at another time, in s.

        :param stopped: when everything but the camera stops.
        :returns: the points (3, N) in the axes of the camera, and the numbers (N,) of the bodies.
        """
        x, y = self._pixels()
        (rotation, position), bodies = camera_at(time), bodies_at(time if stopped is None else stopped)
        seen, owner = np.empty((3, len(x))), np.empty(len(x), np.int8)
        for part in self._parts(frame, x, y):
            body = bodies[part.number]
            seen[:, part.hit] = rotation.T @ (body.rotation @ part.point + (body.centre - position)[:, None])
            owner[part.hit] = part.number
        return seen, owner

    def _projected(self, points: np.ndarray) -> np.ndarray:
        """Image positions (2, N) px of points (3, N) in camera axes."""
        with np.errstate(divide="ignore", invalid="ignore"):
            image: np.ndarray = self.focal * points[:2] / points[2] + self._principal[:, None]
        return image

    def _cast(self, frame: int, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cast rays through image positions ``x``, ``y`` (N,) px, in the precision of ``x``.

        :returns: the rays (3, N) in camera axes, the depth (N,) of the first hit, and the number (N,) of the body hit.
        """
        rotation, position = camera_at(frame / self.settings.fps)
        across, down = self._principal
        rays = np.stack([(x - across) / self.focal, (y - down) / self.focal, np.ones_like(x)]).astype(x.dtype)
        squares = np.einsum("in,in->n", rays, rays)
        depth, owner = np.full(len(x), np.inf, x.dtype), np.zeros(len(x), np.int8)
        for number, body in enumerate(bodies_at(frame / self.settings.fps)):
            centre = (rotation.T @ (body.centre - position)).astype(x.dtype)
            # Only what meets the ball around the body, with a margin for rounding, can hit it.
            ahead = np.maximum(centre @ rays, 0)
            near = np.flatnonzero(ahead * ahead >= (centre @ centre - (1.01 * body.reach) ** 2) * squares)
            origin, turn = _relative(body, rotation, position, x.dtype)
            found = body.intersect(origin, turn @ rays[:, near], NEAR)
            nearer = found < depth[near]
            depth[near[nearer]], owner[near[nearer]] = found[nearer], number
        return rays, depth, owner

    def _parts(self, frame: int, x: np.ndarray, y: np.ndarray) -> Iterator[_Part]:
        """The first hits of ``_cast``, body by body."""
        rotation, position = camera_at(frame / self.settings.fps)
        rays, depth, owner = self._cast(frame, x, y)
        for number, body in enumerate(bodies_at(frame / self.settings.fps)):
            hit = np.flatnonzero(owner == number)
            if hit.size:
                origin, turn = _relative(body, rotation, position, x.dtype)
                turned = turn @ rays[:, hit]
                yield _Part(body, number, hit, origin, turned, turned * depth[hit] + origin[:, None])

    def _shade(self, frame: int, x: np.ndarray, y: np.ndarray, row_length: int) -> np.ndarray:
        """The colours (N, 3) float32 RGB 0..255 that are seen at image positions ``x``, ``y`` (N,) px, row by row."""
        bodies = bodies_at(frame / self.settings.fps)
        pixel = 1 / (self.focal * SUPERSAMPLING)
        color = np.empty((len(x), 3), np.float32)
        for part in self._parts(frame, x, y):
            body = part.body
            length = np.sqrt(np.einsum("in,in->n", part.rays, part.rays))
            away = part.point - part.origin[:, None]
            distance = np.sqrt(np.einsum("in,in->n", away, away))
            surface = body.surface(part.point, part.rays, length)
            light = surface.light
            if body.inside_out:
                light = light * (1.06 + 0.16 * np.cos(part.point[2] * np.float32(2 * np.pi / 5)))
                floor = np.flatnonzero(part.point[1] + np.float32(body.centre[1]) > FLOOR - 1e-3)
                light[floor] *= _shadows(bodies, part.point[:, floor] + body.centre[:, None].astype(np.float32))
            # Slanted surfaces are squeezed along one direction only: between the sharp and the smooth level lies the
            # geometric mean.
            density = (SIDE * pixel) * surface.per_metre * distance / np.sqrt(np.maximum(surface.facing, 0.02))
            numbers = np.array([list(TEXTURES).index(name) for name in body.textures], np.int32)
            texture = numbers[surface.face if len(numbers) > 1 else 0]
            haze = np.exp(distance * np.float32(-1 / 45))[:, None]
            # The samples of a pixel take their texture from slightly different levels, so that levels blend into one
            # another.
            blend = (part.hit % 2 + 2 * (part.hit // row_length % 2)) * np.float32(0.25)
            found = self._atlas.sample(texture, surface.u, surface.v, density, blend)
            color[part.hit] = found * (light[:, None] * haze) + (1 - haze) * HAZE
        return color


def _relative(body: Body, rotation: np.ndarray, position: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(camera position, camera rotation) in the body's own axes."""
    return (body.rotation.T @ (position - body.centre)).astype(dtype), (body.rotation.T @ rotation).astype(dtype)


def _shadows(bodies: tuple[Body, ...], point: np.ndarray) -> np.ndarray:
    """Soft darkening (n,) of the floor at points (3, n) in the world, below every body that stands or moves on it."""
    shade = np.ones(point.shape[1], np.float32)
    for body in bodies[1:]:
        if body.half.min() < 0.05:
            continue  # a poster
        height = max(0.0, FLOOR - body.centre[1] - body.reach)
        radius = 0.85 * body.reach + 0.5 * height
        x, z = (point[axis] * np.float32(1 / radius) - np.float32(body.centre[axis] / radius) for axis in (0, 2))
        shade *= 1 - np.float32(0.55 / (1 + height)) * np.exp(-(x * x + z * z))
    return shade
