# SPDX-License-Identifier: Apache-2.0
"""Procedural textures of the demo scene, all of them and their halved copies in one image."""

from __future__ import annotations

import cv2
import numpy as np

SIDE, LEVELS = 512, 8
"""Texels along the side of a texture, which repeats seamlessly; and copies of it, each of half the size."""


class Atlas:
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
