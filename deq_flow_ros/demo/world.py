# SPDX-License-Identifier: Apache-2.0
"""What stands and moves in the demo scene, the textures that it is made of, and the way of the camera through it.

Axes and units as in ``scene``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import cv2
import numpy as np

FLOOR = 1.0
"""Height of the floor: the camera drives one metre above it."""
LAMP = np.array([-0.45, -0.80, -0.40])
"""Where the light comes from, in the world's axes: above, from the left, and from behind the camera."""
SIDE = 512
"""Texels along the side of a texture, which repeats seamlessly."""
# The speed of the camera in m/s: cruise, brake, stand, start, cruise, dash, cruise; and the metres driven by each time.
_WHEN, _SPEED = [0.0, 1.6, 1.95, 2.85, 3.3, 3.9, 4.2, 5.1, 5.4, 60.0], [1.2, 1.2, 0, 0, 1.2, 1.2, 3.6, 3.6, 1.2, 0]
_TIMES = np.arange(0, 60, 0.001)
_METRES = np.cumsum(np.interp(_TIMES, _WHEN, _SPEED)) * 0.001


class Surface(NamedTuple):
    """The surface at N points, all fields (N,) or one value for all.

    :ivar u, v: texture coordinates in units of the texture's side; ``per_metre`` sides are one metre.
    :ivar facing: cosine between surface and ray, 0..1.
    :ivar light: brightness under the hall's light.
    """

    u: np.ndarray
    v: np.ndarray
    per_metre: np.ndarray | float
    face: np.ndarray | int
    facing: np.ndarray
    light: np.ndarray


@dataclass(frozen=True)
class Body:
    """A box of half sizes ``half``, or a ball of radius ``half[0]``.

    :ivar rotation: its columns are the axes of the body in the world.
    :ivar textures: one for all, or one per face (-x, +x, -y, +y, -z, +z).
    :ivar inside_out: whether it is seen from within: the hall.
    :ivar tile: length in metres that a texture covers; None stretches it over each face.
    """

    half: np.ndarray
    centre: np.ndarray
    rotation: np.ndarray
    textures: tuple[str, ...]
    ball: bool = False
    inside_out: bool = False
    tile: float | None = None

    @property
    def reach(self) -> float:
        """Largest distance of a surface point from the centre."""
        return float(self.half[0] if self.ball else np.linalg.norm(self.half))

    def intersect(self, origin: np.ndarray, rays: np.ndarray, near: float) -> np.ndarray:
        """Ray parameter (N,) of the first hit beyond ``near``, infinite without one; origin (3,) and rays (3, N) in the
        body's axes.
        """
        single = rays.dtype.type
        infinite = single(np.inf)
        if self.ball:
            a, b = np.einsum("in,in->n", rays, rays), origin @ rays
            inner = b * b - a * (origin @ origin - single(self.half[0] ** 2))
            hit = (-b - np.sqrt(np.maximum(inner, 0))) / a
            return np.where((inner > 0) & (hit > near), hit, infinite)
        slope = 1 / np.where(rays == 0, single(1e-12), rays)
        middle, half = -origin[:, None] * slope, np.abs(slope) * self.half.astype(single)[:, None]
        enter, leave = (middle - half).max(axis=0), (middle + half).min(axis=0)
        if self.inside_out:
            return np.where(leave > near, leave, infinite)
        return np.where((enter < leave) & (enter > near), enter, infinite)

    def surface(self, point: np.ndarray, rays: np.ndarray, length: np.ndarray) -> Surface:
        """Surface at points (3, N) on the body, met by rays (3, N) of the given length (N,), all in its axes."""
        single = point.dtype.type
        lamp = (self.rotation.T @ LAMP).astype(point.dtype)
        if self.ball:
            normal = point / single(self.half[0])
            u = np.arctan2(normal[0], normal[2]) * single(0.5 / np.pi)
            v = np.arccos(np.clip(normal[1], -1, 1)) * single(1 / np.pi)
            facing = np.abs(np.einsum("in,in->n", normal, rays)) / length
            return Surface(u, v, 1 / (np.pi * self.half[0]), 0, facing, _brightness(lamp @ normal))
        gap_x, gap_y, gap_z = self.half.astype(single)[:, None] - np.abs(point)
        on_x = (gap_x < gap_y) & (gap_x < gap_z)
        on_y = ~on_x & (gap_y < gap_z)
        x, y, z = point
        across, down = np.where(on_x, z, x), np.where(on_y, z, y)
        outward, along = (np.where(on_x, a, np.where(on_y, b, c)) for a, b, c in (point, rays))
        face = np.where(on_x, 0, np.where(on_y, 2, 4)) + (outward > 0)
        # The lamp shines on a whole face alike; the hall's faces look inwards.
        light = _brightness(np.stack([-lamp, lamp], axis=1).ravel() * (-1 if self.inside_out else 1))[face]
        facing = np.abs(along) / length
        if self.tile is not None:
            tile = single(self.tile)
            return Surface(across / tile, down / tile, 1 / self.tile, face, facing, light)
        size = 2 * self.half.astype(point.dtype)
        size_u, size_v = np.where(on_x, size[2], size[0]), np.where(on_y, size[2], size[1])
        u, v = across / size_u + single(0.5), down / size_v + single(0.5)
        return Surface(u, v, 1 / np.minimum(size_u, size_v), face, facing, light)


def _brightness(facing_lamp: np.ndarray) -> np.ndarray:
    """Brightness of surfaces by the cosine of their angle to the lamp."""
    return (0.66 + 0.40 * np.maximum(facing_lamp, 0) + 0.12 * np.minimum(facing_lamp, 0)).astype(np.float32)


def camera_at(time: float) -> tuple[np.ndarray, np.ndarray]:
    """(rotation, position) of the camera at ``time`` in seconds: columns of the rotation are its axes in the world."""
    way = float(np.interp(time, _TIMES, _METRES))
    position = np.array([0.75 * math.sin(0.55 * way), 0.02 * math.sin(5.0 * way), way])
    yaw = 0.10 + 0.34 * math.sin(0.75 * way + 0.4)
    pitch, roll = 0.06 + 0.006 * math.sin(5.0 * way + 1.0), 0.02 * math.sin(0.75 * way)
    return _turn(yaw, pitch, roll), position


def _turn(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> np.ndarray:
    """Rotation matrix: roll about z, then pitch about x, then yaw about y (right, with y down), in radians."""
    cy, sy, cp, sp, cr, sr = (value for angle in (yaw, pitch, roll) for value in (math.cos(angle), math.sin(angle)))
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return about_y @ about_x @ about_z


def _box(
    size: tuple[float, float, float], x: float, z: float, texture: str, lift: float = 0.0, yaw: float = 0.0,
    tile: float | None = None,
) -> Body:  # fmt: skip
    """A box of the given width, height and length that stands on the floor, or ``lift`` metres above it."""
    half = np.array(size) / 2
    return Body(half, np.array([x, FLOOR - lift - half[1], z]), _turn(yaw), (texture,), tile=tile)


@cache
def _standing() -> tuple[Body, ...]:
    """What never moves; the hall comes first."""
    inside = ("wall", "wall", "ceiling", "floor", "wall", "wall")
    middle = np.array([0.0, FLOOR - 1.9, 10.0])
    hall = Body(np.array([4.5, 1.9, 13.0]), middle, np.eye(3), inside, inside_out=True, tile=2.0)
    pillars = [_box((0.5, 3.8, 0.5), x, z, "concrete", tile=1.6) for x in (-2.9, 2.9) for z in (5.0, 10.5, 16.0)]
    crates = [
        _box((1.0, 1.0, 1.0), -2.6, 3.3, "wood", yaw=0.3),
        _box((0.8, 0.8, 0.8), -2.5, 3.3, "wood", lift=1.0, yaw=-0.25),
        _box((1.1, 1.1, 1.1), 2.7, 7.6, "wood", yaw=-0.4),
        _box((0.9, 0.9, 0.9), 3.6, 12.6, "wood", yaw=0.2),
        _box((1.2, 1.2, 1.2), -3.4, 13.5, "wood", yaw=0.1),
        _box((0.9, 1.7, 0.6), 3.9, 3.9, "metal", yaw=0.05),
        _box((0.9, 1.7, 0.6), -3.9, 8.2, "metal", yaw=-1.5),
    ]
    posters = [_box((1.8, 1.8, 0.04), x, 22.96, "poster", lift=0.9) for x in (-2.6, 0.0, 2.6)]
    places = ((-4.47, 6.0), (4.47, 9.0), (-4.47, 11.0), (4.47, 14.0))
    posters += [_box((0.04, 1.4, 1.4), x, z, "poster", lift=1.1) for x, z in places]
    return (hall, *pillars, *crates, *posters)


@cache
def bodies_at(time: float) -> tuple[Body, ...]:
    """Everything there is, at ``time`` in seconds, always in the same order; the hall comes first."""
    bounce = abs(math.sin(2.6 * time))
    place = np.array([-2.2 + 0.75 * time, FLOOR - 0.38 - 0.7 * bounce, 5.2 + 0.55 * time])
    ball = Body(np.full(3, 0.38), place, _turn(0.0, 0.3, 1.97 * time), ("ball",), ball=True)
    swing = 0.75 * math.sin(2.0 * time)
    place = np.array([0.9 + 2.0 * math.sin(swing), -2.6 + 2.0 * math.cos(swing), 8.6])
    pendulum = Body(np.full(3, 0.30), place, _turn(1.1 * time, 0.2, -swing), ("ball",), ball=True)
    cart = _box((0.9, 0.8, 1.4), -1.75, 13.0 - 1.1 * time, "hazard", lift=0.08, yaw=0.04 * math.sin(time))
    truck = _box((1.6, 1.3, 1.0), 4.2 - 1.25 * time, 14.5, "hazard", lift=0.1)
    cube = Body(np.full(3, 0.36), np.array([1.75, -0.25, 5.6]), _turn(1.4 * time, 0.5, 0.35), ("poster",))
    return (*_standing(), ball, pendulum, cart, truck, cube)


def _noise(rng: np.random.Generator, slope: float) -> np.ndarray:
    """(SIDE, SIDE) periodic noise with an amplitude spectrum 1 / f^slope, mean 0, standard deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None]) * SIDE
    spectrum = np.fft.rfft2(rng.standard_normal((SIDE, SIDE))) / np.maximum(frequency, 1.0) ** slope
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, (SIDE, SIDE))
    return noise / noise.std()


def _tint(grey: np.ndarray, *color: float) -> np.ndarray:
    return grey[..., None] * np.array(color)


def _edge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the nearest edge of the unit square."""
    return np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y))


def _joints(
    x: np.ndarray, y: np.ndarray, columns: int, rows: int, width: float, shift: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows of tiles, every other row shifted by half a one: (True in the joints, number of tile)."""
    row = np.floor(y * rows).astype(int)
    along, across = x * columns + (0.5 * (row % 2) if shift else 0.0), y * rows
    edge = np.minimum(np.minimum(along % 1, 1 - along % 1) / columns, np.minimum(across % 1, 1 - across % 1) / rows)
    return edge < width / 2, (np.floor(along).astype(int) % columns) + columns * row


def _floor(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    joint, tile = _joints(x, y, 4, 4, 0.012)
    light = np.array([(number + number // 4) % 2 for number in range(16)]) * 0.22
    grey = 0.50 + light[tile] + 0.04 * rng.standard_normal(16)[tile] + 0.05 * _noise(rng, 1.0) + 0.02 * _noise(rng, 0.2)
    return _tint(np.where(joint, 0.28, grey), 1.0, 0.94, 0.86)


def _wall(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    joint, tile = _joints(x, y, 6, 14, 0.012, shift=True)
    brick = _tint(0.62 + 0.09 * rng.standard_normal(84)[tile] + 0.06 * _noise(rng, 0.9), 0.98, 0.62, 0.48)
    return np.where(joint[..., None], _tint(0.66 + 0.04 * _noise(rng, 0.6), 1.0, 0.97, 0.92), brick)


def _ceiling(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    joint, tile = _joints(x, y, 3, 3, 0.02)
    grey = np.where(joint, 0.30, 0.62 + 0.03 * rng.standard_normal(9)[tile] + 0.03 * _noise(rng, 0.5))
    return np.where((tile == 4)[..., None] & ~joint[..., None], 0.97, _tint(grey, 0.92, 0.96, 1.0))


def _wood(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    planks, frame, brace = np.floor(x * 6).astype(int), _edge(x, y), np.abs(x - y) < 0.07
    grain = np.sin(2 * np.pi * (8 * x + 0.5 * _noise(rng, 1.6) + rng.uniform(0, 1, 6)[planks])) * 0.05
    grey = 0.66 + 0.07 * rng.standard_normal(6)[planks] + grain + 0.04 * _noise(rng, 0.6)
    grey = np.where((x * 6) % 1 < 0.05, 0.25, grey)
    grey = np.where(brace, 0.56 + 0.05 * _noise(rng, 0.8), grey)
    grey = np.where(frame < 0.1, 0.50 + 0.05 * _noise(rng, 0.8), grey)
    grey = np.where((np.abs(frame - 0.1) < 0.007) | (brace & (np.abs(x - y) > 0.062)), 0.18, grey)
    return _tint(grey, 1.0, 0.76, 0.46)


def _concrete(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    spots = (_noise(rng, 0.1) > 2.6) * 0.15
    return _tint(0.58 + 0.09 * _noise(rng, 1.1) + 0.03 * _noise(rng, 0.0) - spots, 0.95, 0.97, 1.0)


def _ball(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    colors = np.array([[0.92, 0.23, 0.20], [0.97, 0.96, 0.92], [0.18, 0.42, 0.85], [0.97, 0.80, 0.18]])
    poles = ((y < 0.08) | (y > 0.92))[..., None]
    return np.where(poles, colors[1], colors[np.floor(x * 8).astype(int) % 4]) * (1 + _tint(_noise(rng, 0.9), 0.06))


def _hazard(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    color = np.where((((x + y) * 5) % 1 < 0.5)[..., None], [0.95, 0.74, 0.10], [0.12, 0.12, 0.13])
    panel = (y > 0.3) & (y < 0.85)
    rivet = panel & (np.hypot((x * 8) % 1 - 0.5, (y * 8) % 1 - 0.5) < 0.14)
    color = np.where(rivet[..., None], 0.75, np.where(panel[..., None], [0.20, 0.48, 0.55], color))
    return color * (1 + _tint(_noise(rng, 1.0), 0.07))


def _poster(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    color = np.tile(np.array([0.93, 0.90, 0.80]), (SIDE, SIDE, 1))
    for _ in range(26):
        centre, radius, paint = rng.uniform(0.1, 0.9, 2), rng.uniform(0.03, 0.14), rng.uniform(0.1, 0.95, 3)
        color[np.hypot(x - centre[0], y - centre[1]) < radius] = paint
    ends = 0.1 + 0.75 * rng.uniform(0.5, 1, 35)[np.floor(y * 34).astype(int)]
    color[(y > 0.74) & (y < 0.92) & ((y * 34) % 1 < 0.5) & (x > 0.1) & (x < ends)] = 0.15
    color[_edge(x, y) < 0.03] = 0.2
    return color * (1 + _tint(_noise(rng, 0.8), 0.03))


def _metal(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    brushed = cv2.blur(rng.standard_normal((SIDE, SIDE)), (41, 1), borderType=cv2.BORDER_REFLECT)
    slots = ((y * 12) % 1 < 0.35) & (x > 0.2) & (x < 0.8) & (y > 0.25) & (y < 0.75)
    grey = np.where(slots, 0.22, 0.60 + 0.35 * brushed + 0.05 * _noise(rng, 1.2))
    return _tint(grey, 0.86, 0.92, 1.0)


TEXTURES = {
    "floor": _floor, "wall": _wall, "ceiling": _ceiling, "wood": _wood, "concrete": _concrete, "ball": _ball,
    "hazard": _hazard, "poster": _poster, "metal": _metal,
}  # fmt: skip
"""What makes each, of random numbers and the positions (SIDE, SIDE) of the texels: (SIDE, SIDE, 3) RGB, 0..1."""
