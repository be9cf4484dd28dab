# SPDX-License-Identifier: Apache-2.0
"""How the layers of the procedural generator look: outlines, as parameters and as signed distances, and textures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from training.motion import log_uniform, pick, sign
from training.textures import TEXTURE_SIZE

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
MEAN_LEVEL = 118  # of natural photographs


class Shape(IntEnum):
    """Kinds of outline; ``rendering`` has a function for each that says what the parameters mean."""

    EVERYTHING = 0
    BLOB = 1
    POLYGON = 2
    BARS = 3


@dataclass(frozen=True)
class Outline:
    """Where a layer is, in canonical coordinates (px of frame 0)."""

    shape: Shape
    parameters: np.ndarray  # (24,)
    box: np.ndarray  # (2, 2): smallest and largest x, y; infinite if there are no bounds


_UNBOUNDED = np.array([[-np.inf, -np.inf], [np.inf, np.inf]])
EVERYTHING = Outline(Shape.EVERYTHING, np.zeros(24), _UNBOUNDED)


def polygon(planes: np.ndarray, box: np.ndarray = _UNBOUNDED) -> Outline:
    """The intersection of at most 8 half-planes (N, 3): inside where a x + b y + c <= 0."""
    parameters = np.tile([0.0, 0.0, -1e6], 8)  # the unused ones hold everywhere
    planes = planes / np.linalg.norm(planes[:, :2], axis=1, keepdims=True)  # so that this is the distance in px
    parameters[: planes.size] = planes.reshape(-1)
    return Outline(Shape.POLYGON, parameters, box)


def bounded_polygon(planes: np.ndarray, low: np.ndarray, high: np.ndarray) -> Outline:
    """The intersection of at most 8 half-planes (N, 3), with a box that leaves out what lies outside low..high (x, y).

    Layers with a small box are drawn faster.
    """
    corners = np.array([[low[0], low[1]], [high[0], low[1]], [high[0], high[1]], [low[0], high[1]]])
    for plane in planes:  # each cuts off a part (Sutherland and Hodgman, CACM 17:32, 1974)
        outside = corners @ plane[:2] + plane[2]
        kept = []
        for i in range(len(corners)):
            if outside[i - 1] * outside[i] < 0:
                share = outside[i - 1] / (outside[i - 1] - outside[i])
                kept.append(corners[i - 1] + share * (corners[i] - corners[i - 1]))
            if outside[i] <= 0:
                kept.append(corners[i])
        corners = np.array(kept).reshape(-1, 2)
    box = np.stack([corners.min(0), corners.max(0)]) if len(corners) else np.stack([low, low]) - 2 * (high - low)
    return polygon(planes, box)


def rectangle(centre: np.ndarray, half_size: np.ndarray, angle: float) -> Outline:
    """A box of this half width and height about ``centre`` (x, y in px), turned by ``angle`` in rad."""
    cos, sin = np.cos(angle), np.sin(angle)
    axes = np.array([[cos, sin], [-sin, cos]])
    normals = np.concatenate([axes, -axes])
    offsets = -normals @ centre - np.tile(half_size, 2)
    reach = np.abs(axes.T) @ half_size
    return polygon(np.concatenate([normals, offsets[:, None]], axis=1), np.stack([centre - reach, centre + reach]))


def bars(
    centre: np.ndarray, angle: float, half_size: np.ndarray, period: float, thickness: float, crossing: bool = False,
    offset: float = 0.0,
) -> Outline:  # fmt: skip
    """Bars of this thickness along the height of a box, every ``period``, the first ``offset`` periods from its middle.

    With ``crossing``, others cross them. ``half_size``, the box's half width and height, and the rest are in px.
    """
    parameters = np.zeros(24)
    parameters[:9] = [*centre, angle, *half_size, period, thickness / 2, crossing, offset]
    reach = np.hypot(*half_size)
    return Outline(Shape.BARS, parameters, np.stack([centre - reach, centre + reach]))


def object_outline(rng: np.random.Generator, frame_width: int, centre: np.ndarray, radius: float) -> Outline:
    """A random outline of about ``radius`` px around ``centre`` (x, y in px).

    A blob, at times with a hole, a convex polygon, or thin bars: a pole, a fence, a grid.
    """
    kind = pick(rng, {"blob": 0.46, "polygon": 0.36, "bars": 0.18})
    angle, aspect = rng.uniform(0, np.pi), log_uniform(rng, 0.35, 1)
    if kind == "polygon":
        corners = int(rng.integers(3, 8))
        angles = 2 * np.pi * (np.arange(corners) + rng.uniform(-0.3, 0.3, corners) + rng.random()) / corners
        ellipse = np.stack([np.cos(angles), aspect * np.sin(angles)], axis=1)  # whose points make a convex polygon
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        points = centre + 1.3 * radius * ellipse @ turn
        edges = np.roll(points, -1, axis=0) - points
        normals = np.stack([edges[:, 1], -edges[:, 0]], axis=1)
        planes = np.concatenate([normals, -(normals * points).sum(1, keepdims=True)], axis=1)
        return polygon(planes, np.stack([points.min(0), points.max(0)]))
    if kind == "blob":
        parameters = np.zeros(24)
        decay = np.array([1, 1, 0.8, 0.8, 0.5, 0.5, 0.3, 0.3])
        harmonics = rng.normal(0, 0.13, 8) * decay * (rng.random() < 0.6)
        hole = rng.uniform(0.25, 0.6) * (rng.random() < 0.15)
        longest = radius / np.sqrt(aspect)
        parameters[:14] = [*centre, angle, longest, radius * np.sqrt(aspect), hole, *harmonics]
        reach = longest * (1 + np.hypot(harmonics[::2], harmonics[1::2]).sum())
        return Outline(Shape.BLOB, parameters, np.stack([centre - reach, centre + reach]))
    # Bars: one pole, a fence, or a grid, 1 to 4 px thick (in proportion in frames wider than 400 px).
    thickness = log_uniform(rng, 1, 4) * max(1.0, frame_width / 400)
    single, crossing = pick(rng, {(True, False): 0.5, (False, False): 0.3, (False, True): 0.2})
    period = 1e5 if single else log_uniform(rng, 3, 8) * thickness
    return bars(centre, angle, np.array([radius, 2 * radius]), period, thickness, crossing)


@dataclass(frozen=True)
class Look:
    """How often a kind of surface is plain, and what it then looks like."""

    plain_share: float = 0.12
    contrast: tuple[float, float] = (0.05, 0.4)  # of plain ones, beside that of photographs
    level: tuple[float, float] = (30, 225)  # their mean grey level


USUAL = Look()
OBJECT = Look(0.3)  # furniture, walls, car bodies
SKY = Look(1.0, (0.01, 0.15), (130, 252))
ROAD = Look(0.6, (0.12, 0.5), (60, 170))
THIN = Look(0.7, (0.05, 0.3), (10, 240))  # poles, wires


@dataclass(frozen=True)
class Texture:
    """What a layer is painted with."""

    index: int  # in the bank
    halvings: int  # how many times it is halved in size before use
    placement: np.ndarray  # (2, 3), canonical px -> px of the texture before it is halved
    colour: np.ndarray  # (3, 4): linear map of the texture's RGB, and offset


def draw_texture(
    rng: np.random.Generator, photographs: int, patterns: int, pattern_share: float, centre: np.ndarray,
    look: Look = USUAL,
) -> Texture:  # fmt: skip
    """Choose one of ``photographs`` textures, or with probability ``pattern_share`` one of the ``patterns`` after them.

    Its middle comes to lie near ``centre`` (x, y in px).
    """
    pattern = photographs == 0 or rng.random() < pattern_share
    index = photographs + rng.integers(patterns) if pattern else rng.integers(photographs)
    # At most 1.1 texels per frame px keep bilinear sampling free of aliasing; coarser use goes through halving.
    halvings = int(rng.random() < 0.35)
    step = log_uniform(rng, 0.55, 1.1) * 2**halvings
    angle = rng.uniform(0, 2 * np.pi) if pattern or rng.random() < 0.2 else rng.normal(0, 0.1)
    cos, sin = step * np.cos(angle), step * np.sin(angle)
    linear = np.array([[cos, -sin], [sin, cos]]) * np.array([[sign(rng)], [1]])
    height, width = TEXTURE_SIZE
    target = rng.uniform(0.2, 0.8, 2) * (width, height)
    placement = np.concatenate([linear, (target - linear @ centre)[:, None]], axis=1)

    saturation = rng.uniform(0.2, 1.3)
    gains = np.exp(rng.normal(0, 0.12, 3))
    plain = rng.random() < look.plain_share
    contrast = log_uniform(rng, *look.contrast) if plain else rng.uniform(0.6, 1.3)
    linear = contrast * gains[:, None] * (saturation * np.eye(3) + (1 - saturation) * LUMA)
    middle = rng.uniform(*look.level) if plain else rng.uniform(85, 165)
    offset = middle - contrast * MEAN_LEVEL * gains
    colour = np.concatenate([linear, offset[:, None]], axis=1)
    return Texture(int(index), halvings, placement, colour)


# Signed distances. Each function takes coordinates (n, T, H, W) in canonical px and 24 parameters (n, 1, 1, 1), and
# returns the distance in canonical px, negative inside.


def _local(x: torch.Tensor, y: torch.Tensor, p: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates about the centre p[0], p[1], turned by p[2]."""
    cos, sin = torch.cos(p[2]), torch.sin(p[2])
    across, down = x - p[0], y - p[1]
    return cos * across + sin * down, cos * down - sin * across


def _blob(x: torch.Tensor, y: torch.Tensor, p: Sequence[torch.Tensor]) -> torch.Tensor:
    """An ellipse with radii p[3], p[4], its radius modulated by 4 harmonics p[6:14]; p[5]: relative radius of a hole.

    The distance is exact to first order for ellipses.
    """
    u, v = _local(x, y, p)
    u, v = u / p[3], v / p[4]
    radius = (u * u + v * v).sqrt_().clamp_min_(1e-4)
    cos, sin = u / radius, v / radius
    stretch = radius / torch.hypot(u / p[3], v / p[4]).clamp_min_(1e-9)
    outline = torch.ones_like(radius)
    re, im = cos, sin
    for k in range(4):  # cos and sin of 2, 3, 4, 5 times the angle
        re, im = re * cos - im * sin, re * sin + im * cos
        outline = outline + p[6 + 2 * k] * re + p[7 + 2 * k] * im
    return torch.maximum(radius - outline, p[5] * outline - radius) * stretch


def _polygon(x: torch.Tensor, y: torch.Tensor, p: Sequence[torch.Tensor]) -> torch.Tensor:
    """The intersection of 8 half-planes p[3 i] x + p[3 i + 1] y + p[3 i + 2] <= 0."""
    distance = p[0] * x + p[1] * y + p[2]
    for i in range(3, 24, 3):
        distance = torch.maximum(distance, p[i] * x + p[i + 1] * y + p[i + 2])
    return distance


def _bars(x: torch.Tensor, y: torch.Tensor, p: Sequence[torch.Tensor]) -> torch.Tensor:
    """Bars in a box of half extents p[3], p[4]; period p[5], half thickness p[6]; p[7] = 1: crossing bars as well.

    p[8], in periods, is how far the first bar lies from the middle.
    """
    u, v = _local(x, y, p)
    distance = (torch.remainder(u / p[5] - p[8] + 0.5, 1) - 0.5).abs() * p[5]
    crossing = (torch.remainder(v / p[5] + 0.5, 1) - 0.5).abs() * p[5]
    distance = torch.where(p[7] > 0, torch.minimum(distance, crossing), distance) - p[6]
    return torch.maximum(distance, torch.maximum(u.abs() - p[3], v.abs() - p[4]))


SIGNED_DISTANCES = {Shape.BLOB: _blob, Shape.POLYGON: _polygon, Shape.BARS: _bars}
