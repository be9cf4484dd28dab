# SPDX-License-Identifier: Apache-2.0
"""Draws the scenes of `scenes` with batched tensor operations: frames, exact flow, occlusion, and the camera's imperfections."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from .scenes import MAX_LIPSCHITZ, Layer, Shape

MIN_DEPTH_RATIO = 0.02  # points with less are at or behind the camera
INVERSION_ERROR_PX = 0.005


@dataclass
class Clip:
    """Frames and what is known about them. B clips of T frames of H x W px."""

    images: torch.Tensor  # (B, T, 3, H, W) float32, RGB 0..255
    flow: torch.Tensor  # (B, T - 1, 2, H, W) float32 px: from frame t to t + 1, on frame t's pixels, also where occluded
    occluded: torch.Tensor  # (B, T - 1, H, W) bool: not visible in frame t + 1, or outside it
    valid: torch.Tensor  # (B, T - 1, H, W) bool: the flow is defined and shorter than the limit


class _Canvas:
    """Pixel coordinates of the frames, x (1, 1, 1, W) and y (1, 1, H, 1), and small helpers around them."""

    def __init__(self, height: int, width: int, device: torch.device) -> None:
        self.height, self.width, self.device = height, width, device
        self.x = torch.arange(width, device=device, dtype=torch.float32).view(1, 1, 1, width)
        self.y = torch.arange(height, device=device, dtype=torch.float32).view(1, 1, height, 1)

    def tensor(self, values: Sequence[np.ndarray] | np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.float32)).to(self.device)

    def project(self, homographies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Map all pixels by (n, T, 3, 3): x, y and the reciprocal denominator (which is 0 behind the camera), each (n, T, H, W)."""
        h = homographies.flatten(2)[..., None, None]  # (n, T, 9, 1, 1)
        # On a regular grid a row term plus a column term is all there is: one full-size addition per component.
        across, down, depth = ((h[:, :, i] * self.x) + (h[:, :, i + 1] * self.y + h[:, :, i + 2]) for i in (0, 3, 6))
        reciprocal = torch.where(depth > MIN_DEPTH_RATIO, 1 / depth, 0.0)
        return across * reciprocal, down * reciprocal, reciprocal


def render(layers: Sequence[Sequence[Layer]], bank: torch.Tensor, height: int, width: int, limit_px: float) -> Clip:
    """Draw n scenes, each a list of layers from far to near, on the bank's device. `bank` is (N, 3, h, w) uint8."""
    canvas = _Canvas(height, width, bank.device)
    n, frames = len(layers), len(layers[0][0].homographies)
    images = torch.empty(n, frames, 3, height, width, device=bank.device)
    flow = torch.zeros(n, frames - 1, 2, height, width, device=bank.device)
    identity = torch.zeros(n, frames, height, width, dtype=torch.uint8, device=bank.device)
    for level in range(max(len(scene) for scene in layers)):
        members = [i for i, scene in enumerate(layers) if len(scene) > level]
        colours, alpha, motion = _draw([layers[i][level] for i in members], bank, canvas)
        if level == 0:
            images, flow = colours, motion
            continue
        on_top = alpha > 0.5
        index = slice(None) if len(members) == n else torch.tensor(members, device=bank.device)
        images[index] = images[index].lerp_(colours, alpha.unsqueeze(2))
        flow[index] = torch.where(on_top[:, :-1].unsqueeze(2), motion, flow[index])
        identity[index] = identity[index].masked_fill_(on_top, level)
    valid = (flow.square().sum(2) < limit_px**2) & flow.isfinite().all(2)
    return Clip(images, torch.where(valid.unsqueeze(2), flow, 0.0), _occluded(flow, identity, canvas), valid)


def _draw(layers: Sequence[Layer], bank: torch.Tensor, canvas: _Canvas) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw one layer of each of n scenes: colours (n, T, 3, H, W), alpha (n, T, H, W), flow (n, T - 1, 2, H, W)."""
    matrices = np.stack([layer.homographies for layer in layers])
    inverses = np.linalg.inv(matrices)
    # Scaling keeps the sign: a positive denominator means "in front of the camera".
    x, y, reciprocal = canvas.project(canvas.tensor(inverses))
    # For rigid layers frame t -> t + 1 is a homography itself.
    next_x, next_y, _ = canvas.project(canvas.tensor(matrices[:, 1:] @ inverses[:, :-1]))

    elastic = [i for i, layer in enumerate(layers) if layer.elastic]
    if elastic:
        waves = canvas.tensor([layers[i].waves for i in elastic])
        gains = canvas.tensor([layers[i].wave_gains for i in elastic])
        forward = canvas.tensor(matrices[elastic, 1:])
        index = torch.tensor(elastic, device=canvas.device)
        x_still, y_still = _unbend(x[index], y[index], waves, gains)
        x[index], y[index] = x_still, y_still
        bent_x, bent_y = _bend(x_still[:, :-1], y_still[:, :-1], waves, gains[:, 1:])
        h = forward.flatten(2)[..., None, None]
        depth = (h[:, :, 6] * bent_x + h[:, :, 7] * bent_y + h[:, :, 8]).clamp_min(MIN_DEPTH_RATIO)
        next_x[index] = (h[:, :, 0] * bent_x + h[:, :, 1] * bent_y + h[:, :, 2]) / depth
        next_y[index] = (h[:, :, 3] * bent_x + h[:, :, 4] * bent_y + h[:, :, 5]) / depth
    flow = torch.stack([next_x - canvas.x, next_y - canvas.y], dim=2)

    # Canonical px per frame px, the square root of the Jacobian's determinant, turns distances into frame px for the soft edge.
    unit = canvas.tensor(np.abs(np.linalg.det(inverses)) ** 0.5)[..., None, None] * reciprocal * reciprocal.sqrt()
    alpha = torch.ones_like(x)
    for shape, function in _OUTLINES.items():
        index_list = [i for i, layer in enumerate(layers) if layer.shape == shape]
        if index_list:
            index = torch.tensor(index_list, device=canvas.device)
            parameters = canvas.tensor([layers[i].shape_parameters for i in index_list])[..., None, None, None]
            distance = function(x[index], y[index], parameters.unbind(1))
            alpha[index] = (0.5 - distance / unit[index].clamp_min(1e-6)).clamp_(0, 1)
    alpha.masked_fill_(reciprocal == 0, 0)
    return _paint(layers, x, y, bank, canvas), alpha, flow


def _bend(x: torch.Tensor, y: torch.Tensor, waves: torch.Tensor, gains: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """c + e_t(c) for coordinates (n, T, H, W), waves (n, K, 5), gains (n, T)."""
    new_x, new_y = x, y
    for wave in waves.unbind(1):
        amplitude_x, amplitude_y, k_x, k_y, phase = (v[:, None, None, None] for v in wave.unbind(1))
        sine = torch.sin(k_x * x + k_y * y + phase)
        gain = gains[..., None, None]
        new_x, new_y = new_x + gain * amplitude_x * sine, new_y + gain * amplitude_y * sine
    return new_x, new_y


def _unbend(x: torch.Tensor, y: torch.Tensor, waves: torch.Tensor, gains: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve c + e_t(c) = (x, y) for c by fixed-point iteration; the Lipschitz bound says how many steps are enough."""
    largest = float(waves[:, :, :2].norm(dim=2).sum(1).max())
    steps = max(1, math.ceil(math.log(INVERSION_ERROR_PX / max(largest, 1e-6)) / math.log(MAX_LIPSCHITZ)))
    c_x, c_y = x, y
    for _ in range(steps):
        bent_x, bent_y = _bend(c_x, c_y, waves, gains)
        c_x, c_y = c_x + (x - bent_x), c_y + (y - bent_y)
    return c_x, c_y


def _paint(layers: Sequence[Layer], x: torch.Tensor, y: torch.Tensor, bank: torch.Tensor, canvas: _Canvas) -> torch.Tensor:
    """Sample the textures at canonical coordinates (n, T, H, W): colours (n, T, 3, H, W)."""
    n, frames, height, width = x.shape
    textures = bank[torch.tensor([layer.texture for layer in layers], device=canvas.device)].float()
    for i, layer in enumerate(layers):
        for _ in range(layer.halvings):
            half = F.avg_pool2d(textures[i], 2)
            half = torch.cat([half, half.flip(2)], 2)  # mirrored, as `reflection` below goes on with it
            textures[i] = torch.cat([half, half.flip(1)], 1)
    m = canvas.tensor([layer.texture_map for layer in layers]).flatten(1)[..., None, None, None]
    rows, columns = textures.shape[2:]
    u = (m[:, 0] * x + m[:, 1] * y + m[:, 2]) * (2 / (columns - 1)) - 1
    v = (m[:, 3] * x + m[:, 4] * y + m[:, 5]) * (2 / (rows - 1)) - 1
    grid = torch.stack([u, v], dim=-1).view(n, frames * height, width, 2)
    sampled = F.grid_sample(textures, grid, mode="bilinear", padding_mode="reflection", align_corners=True)
    colour = canvas.tensor([layer.colour for layer in layers])
    painted = torch.baddbmm(colour[:, :, 3:], colour[:, :, :3], sampled.flatten(2)).clamp_(0, 255)
    return painted.view(n, 3, frames, height, width).transpose(1, 2)


# Outlines: signed distance in canonical px, negative inside, of coordinates (n, T, H, W); parameters: 24 of (n, 1, 1, 1).


def _local(x: torch.Tensor, y: torch.Tensor, p: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates about the centre p[0], p[1], turned by p[2]."""
    cos, sin = torch.cos(p[2]), torch.sin(p[2])
    across, down = x - p[0], y - p[1]
    return cos * across + sin * down, cos * down - sin * across


def _blob(x: torch.Tensor, y: torch.Tensor, p: Sequence[torch.Tensor]) -> torch.Tensor:
    """An ellipse with radii p[3], p[4], its radius modulated by 4 harmonics p[6:14]; p[5]: relative radius of a hole. The distance is
    exact to first order for ellipses."""
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
    """Parallel bars within a box of half extents p[3], p[4]; period p[5], half thickness p[6]; p[7] = 1: crossing bars as well."""
    u, v = _local(x, y, p)
    distance = (torch.remainder(u / p[5] + 0.5, 1) - 0.5).abs() * p[5]
    crossing = (torch.remainder(v / p[5] + 0.5, 1) - 0.5).abs() * p[5]
    distance = torch.where(p[7] > 0, torch.minimum(distance, crossing), distance) - p[6]
    return torch.maximum(distance, torch.maximum(u.abs() - p[3], v.abs() - p[4]))


_OUTLINES = {Shape.BLOB: _blob, Shape.POLYGON: _polygon, Shape.BARS: _bars}


def _occluded(flow: torch.Tensor, identity: torch.Tensor, canvas: _Canvas) -> torch.Tensor:
    """Where the target lies outside frame t + 1, or another layer covers any of the pixels around it there; (n, T - 1, H, W) bool."""
    height, width = canvas.height, canvas.width
    x, y = canvas.x + flow[:, :, 0], canvas.y + flow[:, :, 1]
    hidden = ~((x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1))
    # A target on a pixel centre has one neighbour, not four: static scenes have no occlusion. NaN and infinity are hidden already.
    x, y = x.nan_to_num(0).clamp(0, width - 1), y.nan_to_num(0).clamp(0, height - 1)
    left, right = (x + 0.01).floor().long(), (x - 0.01).ceil().long()
    above, below = (y + 0.01).floor().long() * width, (y - 0.01).ceil().long() * width
    target, here = identity[:, 1:].flatten(2), identity[:, :-1]
    for row in (above, below):
        for column in (left, right):
            hidden |= target.gather(2, (row + column).flatten(2)).view_as(here) != here
    return hidden


# ---------------------------------------------------------------- the camera


@dataclass
class Exposure:
    """Imperfections of n clips of T frames, drawn with `scenes`-like reproducibility by `draw_exposure`; all optional ones per clip."""

    colour: np.ndarray  # (T, 3, 4)
    gamma: np.ndarray | None  # (T,)
    light: np.ndarray | None  # (T, 4, 6): log gain at the knots of a smooth field
    blur: np.ndarray | None  # (T, 7, 7) kernels
    noise: np.ndarray  # (T,) standard deviation in grey levels


def draw_exposure(rng: np.random.Generator, frames: int) -> Exposure:
    """Draw photometric changes between the frames of a clip, blur and noise."""
    strength = rng.choice([0.0, 0.3, 1.0])  # most cameras change little from frame to frame, some a lot
    luma = np.array([0.299, 0.587, 0.114])
    drift = rng.normal(0, 1, (frames, 6))
    colour = np.empty((frames, 3, 4))
    for t, d in enumerate(drift):
        contrast, saturation = np.exp(0.12 * strength * d[0]), 1 + 0.15 * strength * d[1]
        gains = contrast * np.exp(0.04 * strength * d[2:5])
        colour[t, :, :3] = gains[:, None] * (saturation * np.eye(3) + (1 - saturation) * luma)
        colour[t, :, 3] = 118 * (1 - contrast) + 12 * strength * d[5]
    gamma = np.exp(rng.normal(0, 0.25) + rng.normal(0, 0.05 * strength, frames)) if rng.random() < 0.4 else None
    light = None
    if rng.random() < 0.35:  # uneven light that moves, and not with the scene
        light = rng.normal(0, 0.15, (4, 6)) + rng.normal(0, 0.1, (frames, 4, 6)) * rng.random()
    blur = None
    if rng.random() < 0.3:
        blur = np.tile(_blur_kernel(rng), (frames, 1, 1))
    noise = np.full(frames, np.exp(rng.uniform(np.log(0.5), np.log(10)))) if rng.random() < 0.7 else np.zeros(frames)
    return Exposure(colour, gamma, light, blur, noise)


def _blur_kernel(rng: np.random.Generator) -> np.ndarray:
    """A 7 x 7 kernel: Gaussian (out of focus), or now and then a line (motion)."""
    ys, xs = np.mgrid[-3:4, -3:4]
    if rng.random() < 0.7:
        kernel = np.exp(-(xs**2 + ys**2) / (2 * rng.uniform(0.4, 1.3) ** 2))
    else:
        angle, half = rng.uniform(0, np.pi), rng.uniform(0.5, 3)
        along, across = np.cos(angle) * xs + np.sin(angle) * ys, np.cos(angle) * ys - np.sin(angle) * xs
        kernel = np.clip(half + 0.5 - np.abs(along), 0, 1) * np.clip(1 - np.abs(across), 0, 1)
    return kernel / kernel.sum()


def expose(images: torch.Tensor, exposures: Sequence[Exposure], generator: torch.Generator) -> torch.Tensor:
    """Photometric changes, blur and noise on (n, T, 3, H, W); returns new images, clamped to 0..255."""
    n, frames, _, height, width = images.shape
    device = images.device

    def tensor(values: object) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.float32)).to(device)

    images = images.clone()
    for i, exposure in enumerate(exposures):
        if exposure.blur is not None:
            kernels = tensor(exposure.blur).repeat_interleave(3, 0).unsqueeze(1)
            padded = F.pad(images[i].reshape(1, frames * 3, height, width), (3, 3, 3, 3), mode="replicate")
            images[i] = F.conv2d(padded, kernels, groups=frames * 3).view_as(images[i])
        if exposure.light is not None:
            knots = tensor(exposure.light).unsqueeze(1)
            images[i] *= F.interpolate(knots, size=(height, width), mode="bicubic", align_corners=True).exp_()
        if exposure.gamma is not None:
            images[i] = (images[i].clamp_(0, 255) / 255).pow_(tensor(exposure.gamma)[:, None, None, None]) * 255
    colour = tensor([exposure.colour for exposure in exposures]).flatten(0, 1)
    images = torch.baddbmm(colour[:, :, 3:], colour[:, :, :3], images.view(n * frames, 3, height * width))
    images = images.view(n, frames, 3, height, width)
    sigma = tensor([exposure.noise for exposure in exposures])[..., None, None, None]
    images += sigma * torch.randn(images.shape, generator=generator, device=device)
    return images.clamp_(0, 255)
