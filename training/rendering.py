# SPDX-License-Identifier: Apache-2.0
"""Layers, their outlines, and how they are drawn: frames, exact flow, occlusion. T is the number of frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from training.flow_dataset import Clip
from training.settings import Dice
from training.textures import Texture

MAX_LIPSCHITZ = 0.25  # of an elastic field: each step of its inversion gains a factor of 4
MIN_DEPTH_RATIO = 0.02  # points with less are at or behind the camera
INVERSION_ERROR_PX = 0.005
STEP = 8  # px, from one to the next that tell which part of the picture a layer touches
MAX_SMEAR_PX = 10.0  # beyond, the few moments would show as ghosts
SHUTTER_MOMENTS = (-0.5, -0.25, 0.0, 0.25, 0.5)  # of the time for which the shutter is open

Window = tuple[int, int, int, int]  # left, top, right, bottom
Outline = Callable[[Tensor, Tensor], Tensor]
"""From x, y (T, H, W) in px of frame 0 to the signed distance from the border in px, negative inside, right near it."""


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


@dataclass(frozen=True)
class Layer:
    """One textured surface. T is the number of frames."""

    homographies: np.ndarray  # (T, 3, 3), frame 0 px -> frame t px, identity for t = 0
    outline: Outline
    texture: Texture
    elastic: tuple[np.ndarray, np.ndarray] | None = None  # waves and gains, see there: e_t = gain_t * sum of waves


def tensor(values: object) -> Tensor:
    """As float32."""
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def _pixels(window: Window, step: int = 1) -> tuple[Tensor, Tensor]:
    """The x (W,) and y (H, 1) of every ``step``-th pixel in a window."""
    left, top, right, bottom = window
    rows = torch.arange(top, bottom, step, dtype=torch.float32)
    return torch.arange(left, right, step, dtype=torch.float32), rows[:, None]


def _project(homographies: np.ndarray, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Map points or a grid of them by (T, 3, 3): x, y and the reciprocal depth (0: behind the camera), (T, H, W)."""
    h = tensor(homographies).flatten(1)[..., None, None]  # (T, 9, 1, 1)
    # On a regular grid a row term plus a column term is all there is: one full-size addition per component.
    across, down, depth = ((h[:, i] * x) + (h[:, i + 1] * y + h[:, i + 2]) for i in (0, 3, 6))
    reciprocal = torch.where(depth > MIN_DEPTH_RATIO, 1 / depth, 0.0)
    return across.mul_(reciprocal), down.mul_(reciprocal), reciprocal


def _canonical(layer: Layer, inverses: np.ndarray, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The canonical coordinates of points in each frame; how many px of them make one of it, 0 behind the camera."""
    x, y, reciprocal = _project(inverses, x, y)
    if layer.elastic:  # frame 0 is straight by definition
        x[1:], y[1:] = _unbend(x[1:], y[1:], layer.elastic[0], tensor(layer.elastic[1])[1:])
    # The square root of the Jacobian's determinant.
    return x, y, tensor(np.abs(np.linalg.det(inverses)) ** 0.5)[:, None, None] * reciprocal * reciprocal.sqrt()


def _window(layer: Layer, height: int, width: int) -> Window:
    """The part of the picture that a layer may touch in any frame; empty if right <= left or bottom <= top."""
    grid = _pixels((0, 0, width + STEP - 1, height + STEP - 1), STEP)
    x, y, units = _canonical(layer, np.linalg.inv(layer.homographies), *grid)
    # If a layer touches a pixel, one of these is closer than a step; but outlines are exact at their borders alone.
    near = (layer.outline(x, y) < 1.5 * STEP * units) & (units > 0)
    columns, rows = (near.any(0).any(dim).nonzero().flatten() * STEP for dim in (0, 1))
    if not len(rows):
        return 0, 0, 0, 0
    left, top = (max(0, int(places[0]) - STEP) for places in (columns, rows))
    return left, top, min(width, int(columns[-1]) + STEP + 1), min(height, int(rows[-1]) + STEP + 1)


def render(
    scene: Sequence[Layer], banks: Sequence[Tensor], height: int, width: int, limit_px: float, shutter: float = 0.0
) -> Clip:
    """Draw a scene, a list of layers from far to near, as a batch of one clip.

    :param banks: item i holds the textures halved i times, (N, 3, h, w) uint8.
    :param limit_px: flow of this length and more is invalid (and 0).
    :param shutter: share of the time between two frames for which it is open, with a frame's moment in the middle.
    """
    images, _, flow = _draw(scene[0], banks, (0, 0, width, height), shutter)
    identity = torch.zeros(len(images), height, width, dtype=torch.uint8)
    for level, layer in enumerate(scene[1:], 1):
        left, top, right, bottom = window = _window(layer, height, width)
        if right <= left or bottom <= top:
            continue
        colours, alpha, motion = _draw(layer, banks, window, shutter)
        on_top = alpha > 0.5
        image_view, flow_view, identity_view = (x[..., top:bottom, left:right] for x in (images, flow, identity))
        image_view.lerp_(colours, alpha.unsqueeze(1))
        flow_view.copy_(torch.where(on_top[:-1].unsqueeze(1), motion, flow_view))
        identity_view.masked_fill_(on_top, level)
    valid = flow.square().sum(1) < limit_px**2  # False for NaN as well
    occluded = _occluded(flow, identity)
    return Clip(images[None], torch.where(valid.unsqueeze(1), flow, 0.0)[None], occluded[None], valid[None])


def _draw(layer: Layer, banks: Sequence[Tensor], window: Window, shutter: float) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one layer: colours (T, 3, H, W), alpha (T, H, W), flow (T - 1, 2, H, W)."""
    matrices, (here_x, here_y) = layer.homographies, _pixels(window)
    inverses = np.linalg.inv(matrices)
    x, y, units = _canonical(layer, inverses, here_x, here_y)
    if layer.elastic:
        bent = _bend(x[:-1], y[:-1], layer.elastic[0], tensor(layer.elastic[1])[1:])
        next_x, next_y, _ = _project(matrices[1:], *bent)
    else:
        next_x, next_y, _ = _project(matrices[1:] @ inverses[:-1], here_x, here_y)
    flow = torch.stack([next_x.sub_(here_x), next_y.sub_(here_y)], dim=1)

    def coverage(x: Tensor, y: Tensor) -> Tensor:
        edge = layer.outline(x, y) / units.clamp_min(1e-6)  # soft: one frame px wide
        return (0.5 - edge).clamp_(0, 1).masked_fill_(units == 0, 0)

    if not shutter:
        return _paint(layer, x, y, banks), coverage(x, y), flow
    # While the shutter is open a frame's pixel sees what lies between here and where it looks in the next frame.
    across, down = (shutter * torch.diff(c, dim=0, append=2 * c[-1:] - c[-2:-1]) for c in (x, y))
    limit = (MAX_SMEAR_PX / torch.hypot(across, down).clamp_min(1e-6)).clamp_max(1)
    across, down = across * limit, down * limit
    covered, light = torch.zeros_like(x), torch.zeros(len(x), 3, *x.shape[1:])
    for moment in SHUTTER_MOMENTS:
        there = x + moment * across, y + moment * down
        alpha = coverage(*there)
        covered += alpha / len(SHUTTER_MOMENTS)
        light += alpha.unsqueeze(1) * _paint(layer, *there, banks) / len(SHUTTER_MOMENTS)
    return light / covered.clamp_min(1e-6).unsqueeze(1), covered, flow


def _bend(x: Tensor, y: Tensor, waves: np.ndarray, gains: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates plus waves, c + e_t(c), for c (T, H, W), waves (K, 5), gains (T,)."""
    new_x, new_y, gain = x, y, gains[:, None, None]
    for amplitude_x, amplitude_y, k_x, k_y, phase in tensor(waves):
        sine = torch.sin(k_x * x + k_y * y + phase)
        new_x, new_y = new_x + gain * amplitude_x * sine, new_y + gain * amplitude_y * sine
    return new_x, new_y


def _unbend(x: Tensor, y: Tensor, waves: np.ndarray, gains: Tensor) -> tuple[Tensor, Tensor]:
    """Solve c + e_t(c) = (x, y) for c by fixed-point iteration; the Lipschitz bound says how many steps are enough."""
    largest = float(np.linalg.norm(waves[:, :2], axis=1).sum())
    steps = max(1, math.ceil(math.log(INVERSION_ERROR_PX / max(largest, 1e-6)) / math.log(MAX_LIPSCHITZ)))
    c_x, c_y = x, y
    for _ in range(steps):
        bent_x, bent_y = _bend(c_x, c_y, waves, gains)
        c_x, c_y = c_x + (x - bent_x), c_y + (y - bent_y)
    return c_x, c_y


def _paint(layer: Layer, x: Tensor, y: Tensor, banks: Sequence[Tensor]) -> Tensor:
    """Sample the texture at canonical coordinates (T, H, W): colours (T, 3, H, W)."""
    texture = layer.texture
    picture = banks[texture.halvings][texture.index].float()
    # From texture px (counted at full size) to -1..1.
    rows, columns = picture.shape[1:]
    to_unit = 2.0 ** (1 - texture.halvings) / np.array([[columns - 1], [rows - 1]])
    m = tensor(texture.placement * to_unit - np.array([[0, 0, 1]]))
    grid = torch.stack([a * x + c + b * y for a, b, c in m], dim=-1)
    sampled = F.grid_sample(
        picture[None], grid.flatten(0, 1)[None], mode="bilinear", padding_mode="reflection", align_corners=True
    )
    colour = tensor(texture.colour)
    painted = torch.addmm(colour[:, 3:], colour[:, :3], sampled[0].flatten(1)).clamp_(0, 255)
    return painted.view(3, *x.shape).transpose(0, 1)


def _occluded(flow: Tensor, identity: Tensor) -> Tensor:
    """Whether the target of flow (T - 1, 2, H, W) is outside, or nearer layers of (T, H, W) cover a pixel around it."""
    height, width = identity.shape[1:]
    here_x, here_y = _pixels((0, 0, width, height))
    x, y = here_x + flow[:, 0], here_y + flow[:, 1]
    hidden = ~((x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1))
    # A target on a pixel centre has one neighbour, not four: static scenes have no occlusion.
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    left, right = (x + 0.01).floor().long(), (x - 0.01).ceil().long()
    above, below = (y + 0.01).floor().long() * width, (y - 0.01).ceil().long() * width
    target, here = identity[1:].flatten(1), identity[:-1]
    for row in (above, below):
        for column in (left, right):
            hidden |= target.gather(1, (row + column).flatten(1)).view_as(here) > here
    return hidden
