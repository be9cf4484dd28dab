# SPDX-License-Identifier: Apache-2.0
"""Draws the scenes of ``scenes`` with batched tensor operations: frames, exact flow, occlusion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from training.appearance import SIGNED_DISTANCES
from training.layers import Layer
from training.motion import MAX_LIPSCHITZ

MIN_DEPTH_RATIO = 0.02  # points with less are at or behind the camera
INVERSION_ERROR_PX = 0.005
MAX_SMEAR_PX = 10.0  # beyond, the few moments would show as ghosts
SHUTTER_MOMENTS = (-0.5, -0.25, 0.0, 0.25, 0.5)  # of the time for which the shutter is open


@dataclass
class Clip:
    """Frames and what is known about them. B clips of T frames of H x W px."""

    images: torch.Tensor  # (B, T, 3, H, W) float32, RGB 0..255
    flow: torch.Tensor  # (B, T - 1, 2, H, W) float32 px: frame t to t + 1, on frame t's pixels, also where occluded
    occluded: torch.Tensor  # (B, T - 1, H, W) bool: not visible in frame t + 1, or outside it
    valid: torch.Tensor  # (B, T - 1, H, W) bool: the flow is defined and shorter than the limit
    numbers: torch.Tensor | None = None  # (B,) int64: which clips these are, of all that a run trains on

    def to(self, device: torch.device | str) -> Clip:
        """The clip on a device; images that were kept as bytes become float32."""
        images, flow, occluded, valid = (t.to(device) for t in (self.images, self.flow, self.occluded, self.valid))
        return Clip(images.float(), flow, occluded, valid, self.numbers)


class _Canvas:
    """A window of the frame's pixels: x (1, 1, 1, W) and y (1, 1, H, 1), and small helpers around them."""

    def __init__(self, window: tuple[int, int, int, int], device: torch.device) -> None:
        self.left, self.top, self.right, self.bottom = window
        self.device = device
        self.x = torch.arange(self.left, self.right, device=device, dtype=torch.float32).view(1, 1, 1, -1)
        self.y = torch.arange(self.top, self.bottom, device=device, dtype=torch.float32).view(1, 1, -1, 1)

    def tensor(self, values: Sequence[np.ndarray] | np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.float32)).to(self.device)

    def select(self, chosen: list[int], count: int) -> torch.Tensor | slice:
        """An index of ``chosen`` out of ``count`` rows that does not copy when all are chosen."""
        return slice(None) if len(chosen) == count else torch.tensor(chosen, device=self.device)

    def project(self, homographies: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Map all pixels by (n, T, 3, 3): x, y and the reciprocal depth (0: behind the camera), each (n, T, H, W)."""
        h = self.tensor(homographies).flatten(2)[..., None, None]  # (n, T, 9, 1, 1)
        # On a regular grid a row term plus a column term is all there is: one full-size addition per component.
        across, down, depth = ((h[:, :, i] * self.x) + (h[:, :, i + 1] * self.y + h[:, :, i + 2]) for i in (0, 3, 6))
        corners = np.array([(x, y, 1) for x in (self.left, self.right) for y in (self.top, self.bottom)])
        if (homographies[..., 2, :] @ corners.T > MIN_DEPTH_RATIO).all():
            reciprocal = depth.reciprocal_()
        else:
            reciprocal = torch.where(depth > MIN_DEPTH_RATIO, 1 / depth, 0.0)
        return across.mul_(reciprocal), down.mul_(reciprocal), reciprocal


def _window(layers: Sequence[Layer], height: int, width: int) -> tuple[int, int, int, int]:
    """The part of the picture that any of the layers may touch in any frame: left, top, right, bottom.

    It is empty if right <= left or bottom <= top.
    """
    if not all(np.isfinite(layer.outline.box).all() for layer in layers):
        return 0, 0, width, height
    lows, highs = [], []
    for layer in layers:
        reach = np.abs(layer.waves[:, :2]).sum(0) if layer.elastic else 0.0
        low, high = layer.outline.box[0] - reach - 1, layer.outline.box[1] + reach + 1
        corners = np.array([(x, y, 1) for x in (low[0], high[0]) for y in (low[1], high[1])])
        mapped = corners @ layer.homographies.transpose(0, 2, 1)  # (T, 4, 3)
        if mapped[..., 2].min() < MIN_DEPTH_RATIO:
            return 0, 0, width, height
        mapped = mapped[..., :2] / mapped[..., 2:]
        lows.append(mapped.min((0, 1)))
        highs.append(mapped.max((0, 1)))
    left, top = np.maximum(np.floor(np.min(lows, 0)) - 1, 0).astype(int)
    right, bottom = np.minimum(np.ceil(np.max(highs, 0)) + 2, (width, height)).astype(int)
    return int(left), int(top), int(right), int(bottom)


def render(
    scenes: Sequence[Sequence[Layer]], banks: Sequence[torch.Tensor], height: int, width: int, limit_px: float,
    shutters: Sequence[float] | None = None,
) -> Clip:  # fmt: skip
    """Draw n scenes, each a list of layers from far to near, on the banks' device.

    ``banks[i]`` holds the textures halved i times, (N, 3, h, w) uint8. Flow of ``limit_px`` and more is invalid (and
    0). ``shutters`` (n) are the shares of the time between two frames for which the shutter is open, in the middle of
    which a frame's flow holds; None: what moves is as sharp as what rests.
    """
    device = banks[0].device
    n, frames = len(scenes), len(scenes[0][0].homographies)
    shutters = [0.0] * n if shutters is None else shutters
    images, _, flow = _draw([scene[0] for scene in scenes], banks, _Canvas((0, 0, width, height), device), shutters)
    identity = torch.zeros(n, frames, height, width, dtype=torch.uint8, device=device)
    for level in range(1, max(len(scene) for scene in scenes)):
        members = [i for i, scene in enumerate(scenes) if len(scene) > level]
        layers = [scenes[i][level] for i in members]
        left, top, right, bottom = window = _window(layers, height, width)
        if right <= left or bottom <= top:
            continue
        canvas = _Canvas(window, device)
        colours, alpha, motion = _draw(layers, banks, canvas, [shutters[i] for i in members])
        on_top = alpha > 0.5
        index = canvas.select(members, n)
        image_view, flow_view, identity_view = (x[..., top:bottom, left:right] for x in (images, flow, identity))
        image_view[index] = image_view[index].lerp(colours, alpha.unsqueeze(2))
        flow_view[index] = torch.where(on_top[:, :-1].unsqueeze(2), motion, flow_view[index])
        identity_view[index] = identity_view[index].masked_fill(on_top, level)
    valid = flow.square().sum(2) < limit_px**2  # False for NaN as well
    return Clip(images, torch.where(valid.unsqueeze(2), flow, 0.0), _occluded(flow, identity), valid)


def _draw(
    layers: Sequence[Layer], banks: Sequence[torch.Tensor], canvas: _Canvas, shutters: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw one layer of each of n scenes: colours (n, T, 3, H, W), alpha (n, T, H, W), flow (n, T - 1, 2, H, W)."""
    n = len(layers)
    matrices = np.stack([layer.homographies for layer in layers])
    inverses = np.linalg.inv(matrices)
    x, y, reciprocal = canvas.project(inverses)
    next_x, next_y, _ = canvas.project(matrices[:, 1:] @ inverses[:, :-1])  # all there is to a rigid layer

    elastic = [i for i, layer in enumerate(layers) if layer.elastic]
    if elastic:
        index = canvas.select(elastic, n)
        waves = np.stack([layers[i].waves for i in elastic])
        gains = canvas.tensor([layers[i].wave_gains for i in elastic])
        straight_x, straight_y = _unbend(x[index, 1:], y[index, 1:], waves, gains[:, 1:], canvas)
        x[index, 1:], y[index, 1:] = straight_x, straight_y  # frame 0 is straight by definition
        bent_x, bent_y = _bend(x[index, :-1], y[index, :-1], canvas.tensor(waves), gains[:, 1:])
        h = canvas.tensor(matrices[elastic, 1:]).flatten(2)[..., None, None]
        depth = (h[:, :, 6] * bent_x + h[:, :, 7] * bent_y + h[:, :, 8]).clamp_min(MIN_DEPTH_RATIO)
        next_x[index] = (h[:, :, 0] * bent_x + h[:, :, 1] * bent_y + h[:, :, 2]) / depth
        next_y[index] = (h[:, :, 3] * bent_x + h[:, :, 4] * bent_y + h[:, :, 5]) / depth
    flow = torch.stack([next_x.sub_(canvas.x), next_y.sub_(canvas.y)], dim=2)

    # The soft edge is one frame px wide; canonical px per frame px are the square root of the Jacobian's determinant.
    units = canvas.tensor(np.abs(np.linalg.det(inverses)) ** 0.5)[..., None, None] * reciprocal * reciprocal.sqrt()
    behind = reciprocal == 0
    if not any(shutters):
        alpha = _coverage(layers, x, y, units, behind, canvas)
        return _paint(layers, x, y, banks, canvas), alpha, flow
    # While the shutter is open a frame's pixel sees what lies between here and where it looks in the next frame.
    open_for = canvas.tensor(np.array(shutters))[:, None, None, None]
    across, down = (open_for * torch.diff(c, dim=1, append=2 * c[:, -1:] - c[:, -2:-1]) for c in (x, y))
    limit = (MAX_SMEAR_PX / torch.hypot(across, down).clamp_min(1e-6)).clamp_max(1)
    across, down = across * limit, down * limit
    covered, light = torch.zeros_like(x), torch.zeros(n, x.shape[1], 3, *x.shape[2:], device=x.device)
    for moment in SHUTTER_MOMENTS:
        there = x + moment * across, y + moment * down
        alpha = _coverage(layers, *there, units, behind, canvas)
        covered += alpha / len(SHUTTER_MOMENTS)
        light += alpha.unsqueeze(2) * _paint(layers, *there, banks, canvas) / len(SHUTTER_MOMENTS)
    return light / covered.clamp_min(1e-6).unsqueeze(2), covered, flow


def _coverage(
    layers: Sequence[Layer], x: torch.Tensor, y: torch.Tensor, units: torch.Tensor, behind: torch.Tensor,
    canvas: _Canvas,
) -> torch.Tensor:  # fmt: skip
    """How much of each pixel the layers cover, (n, T, H, W), at canonical coordinates x, y (n, T, H, W).

    ``units``: canonical px per frame px; ``behind``: where a layer is behind the camera.
    """
    n = len(layers)
    alpha = torch.ones_like(x)
    for shape, function in SIGNED_DISTANCES.items():
        chosen = [i for i, layer in enumerate(layers) if layer.outline.shape == shape]
        if chosen:
            index = canvas.select(chosen, n)
            parameters = canvas.tensor([layers[i].outline.parameters for i in chosen])[..., None, None, None]
            distance = function(x[index], y[index], parameters.unbind(1))
            edge = distance / units[index].clamp_min(1e-6)
            alpha[index] = (0.5 - edge).clamp_(0, 1).masked_fill_(behind[index], 0)
    return alpha


def _bend(
    x: torch.Tensor, y: torch.Tensor, waves: torch.Tensor, gains: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates plus waves, c + e_t(c), for c (n, T, H, W), waves (n, K, 5), gains (n, T)."""
    new_x, new_y = x, y
    for wave in waves.unbind(1):
        amplitude_x, amplitude_y, k_x, k_y, phase = (v[:, None, None, None] for v in wave.unbind(1))
        sine = torch.sin(k_x * x + k_y * y + phase)
        gain = gains[..., None, None]
        new_x, new_y = new_x + gain * amplitude_x * sine, new_y + gain * amplitude_y * sine
    return new_x, new_y


def _unbend(
    x: torch.Tensor, y: torch.Tensor, waves: np.ndarray, gains: torch.Tensor, canvas: _Canvas
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve c + e_t(c) = (x, y) for c by fixed-point iteration; the Lipschitz bound says how many steps are enough."""
    largest = float(np.linalg.norm(waves[:, :, :2], axis=2).sum(1).max())
    steps = max(1, math.ceil(math.log(INVERSION_ERROR_PX / max(largest, 1e-6)) / math.log(MAX_LIPSCHITZ)))
    on_device = canvas.tensor(waves)
    c_x, c_y = x, y
    for _ in range(steps):
        bent_x, bent_y = _bend(c_x, c_y, on_device, gains)
        c_x, c_y = c_x + (x - bent_x), c_y + (y - bent_y)
    return c_x, c_y


def _paint(
    layers: Sequence[Layer], x: torch.Tensor, y: torch.Tensor, banks: Sequence[torch.Tensor], canvas: _Canvas
) -> torch.Tensor:
    """Sample the textures at canonical coordinates (n, T, H, W): colours (n, T, 3, H, W)."""
    n, frames, height, width = x.shape
    sampled = torch.empty(n, 3, frames * height, width, device=canvas.device)
    for halvings, bank in enumerate(banks):
        chosen = [i for i, layer in enumerate(layers) if layer.texture.halvings == halvings]
        if not chosen:
            continue
        index = canvas.select(chosen, n)
        textures = bank[torch.tensor([layers[i].texture.index for i in chosen], device=canvas.device)].float()
        # From texture px (counted at full size) to -1..1.
        rows, columns = textures.shape[2:]
        to_unit = 2.0 ** (1 - halvings) / np.array([[columns - 1], [rows - 1]])
        maps = np.stack([layers[i].texture.placement for i in chosen]) * to_unit - np.array([[0, 0, 1]])
        m = canvas.tensor(maps).flatten(1)[..., None, None, None]
        grid = torch.empty(len(chosen), frames, height, width, 2, device=canvas.device)
        torch.add(m[:, 0] * x[index] + m[:, 2], m[:, 1] * y[index], out=grid[..., 0])
        torch.add(m[:, 3] * x[index] + m[:, 5], m[:, 4] * y[index], out=grid[..., 1])
        sampled[index] = F.grid_sample(
            textures, grid.flatten(1, 2), mode="bilinear", padding_mode="reflection", align_corners=True
        )
    colour = canvas.tensor([layer.texture.colour for layer in layers])
    painted = torch.baddbmm(colour[:, :, 3:], colour[:, :, :3], sampled.flatten(2)).clamp_(0, 255)
    return painted.view(n, 3, frames, height, width).transpose(1, 2)


def _occluded(flow: torch.Tensor, identity: torch.Tensor) -> torch.Tensor:
    """Where the target lies outside frame t + 1, or a nearer layer covers any of the pixels around it there.

    What lies behind may be around it: so it is at the edge of a surface, and all along a thin pole.
    From flow (n, T - 1, 2, H, W) and visible layers (n, T, H, W); returns (n, T - 1, H, W) bool.
    """
    height, width = identity.shape[2:]
    canvas = _Canvas((0, 0, width, height), flow.device)
    x, y = canvas.x + flow[:, :, 0], canvas.y + flow[:, :, 1]
    hidden = ~((x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1))
    # A target on a pixel centre has one neighbour, not four: static scenes have no occlusion.
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    left, right = (x + 0.01).floor().long(), (x - 0.01).ceil().long()
    above, below = (y + 0.01).floor().long() * width, (y - 0.01).ceil().long() * width
    target, here = identity[:, 1:].flatten(2), identity[:, :-1]
    for row in (above, below):
        for column in (left, right):
            hidden |= target.gather(2, (row + column).flatten(2)).view_as(here) > here
    return hidden
