# SPDX-License-Identifier: Apache-2.0
"""Clips of particle images, as particle image velocimetry (PIV) takes them: small bright particles in a dense flow.

After the synthetic images by which PIV methods are judged (Raffel et al., Particle Image Velocimetry, 3rd edition,
chapters 2 and 5; Cai et al., Experiments in Fluids 60:73, 2019).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from training.flow_dataset import Clip
from training.settings import Dice

PARTICLE_RANGE_PX = (0.2, 12.0)  # of the mean displacement between two frames
MAX_GRADIENT = 0.3  # px of displacement per px: nothing folds, and neighbours stay neighbours
MAX_FILL = 0.5  # of the picture that particles would cover if none overlapped
PATCH_SIGMAS = 3.2  # beyond, a particle adds less than one grey level


@dataclass(frozen=True)
class FlowField:
    """A smooth displacement field. T is the number of frames."""

    uniform: np.ndarray  # (2,) the same everywhere
    linear: np.ndarray  # (2, 2) strain, shear and rotation about ``centre``
    centre: np.ndarray  # (2,) px
    vortices: np.ndarray  # (V, 4) Lamb-Oseen vortices: x, y, core radius (px), displacement (px, signed)
    waves: np.ndarray  # (W, 5) divergence-free plane waves: amplitude x, y (px), wave vector x, y (rad/px), phase
    # (8,) a jet, a mixing layer or the flow behind a step: x, y, direction (rad), half width (px), relative widening
    # per px, then the px of the jet, of the mixing layer and of the reverse flow beside the jet.
    stream: np.ndarray
    gains: np.ndarray  # (T - 1,) by which all of the above, px per frame, is multiplied from frame to frame
    drift: np.ndarray  # (2,) px per frame by which its pattern moves on

    def __call__(self, x: torch.Tensor, y: torch.Tensor, frame: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Displacement (px) from frame ``frame`` to the next of what is at x, y (px, any one shape) in it."""
        x, y = x - float(frame * self.drift[0]), y - float(frame * self.drift[1])
        (a, b), (c, d) = self.linear.tolist()
        across, down = x - float(self.centre[0]), y - float(self.centre[1])
        u, v = a * across + b * down + float(self.uniform[0]), c * across + d * down + float(self.uniform[1])
        for vortex_x, vortex_y, radius, strength in self.vortices.tolist():
            across, down = x - vortex_x, y - vortex_y
            q = ((across * across + down * down) / radius**2).clamp_min_(1e-6)
            turn = -torch.expm1(-q) / q * (strength / radius)
            u, v = u - turn * down, v + turn * across
        for amplitude_x, amplitude_y, k_x, k_y, phase in self.waves.tolist():
            sine = torch.sin(k_x * x + k_y * y + phase)
            u, v = u + amplitude_x * sine, v + amplitude_y * sine
        stream_x, stream_y, direction, width, widening, *parts = self.stream.tolist()
        if any(parts):
            cos, sin = math.cos(direction), math.sin(direction)
            across, down = x - stream_x, y - stream_y
            growth = (1 + widening * (cos * across + sin * down)).clamp_(0.5, 3)
            s = (cos * down - sin * across) / (width * growth)
            speed = parts[0] * torch.exp(-s * s) + parts[1] * torch.tanh(s) + parts[2] * torch.exp(-((s - 2) ** 2))
            u, v = u + cos * speed, v + sin * speed
        gain = float(self.gains[frame])
        return u * gain, v * gain


@dataclass(frozen=True)
class ParticleScene:
    """Particles and the flow that moves them. T is the number of frames, N of particles."""

    field: FlowField
    positions: np.ndarray  # (T, N, 2) px
    brightness: np.ndarray  # (T, N) grey levels at the middle of each; it follows the place in the laser sheet
    sigmas: np.ndarray  # (N,) px: standard deviation of the Gaussian that a particle looks like
    background: np.ndarray  # (6,) grey levels under the particles: a polynomial of second order in x, y from -1 to 1


def draw_field(rng: Dice, magnitude: float) -> FlowField:
    """A flow of a few kinds at once, of ``magnitude`` px on average or as much as ``MAX_GRADIENT`` allows."""
    height, width = rng.settings.height, rng.settings.width
    size = np.array([width, height], dtype=float)
    extent = float(np.sqrt(size.prod()))
    finest = min(max(10.0, 5 * magnitude), extent)  # of a vortex; steeper flow would be scaled down again
    heading = rng.uniform(0, 2 * np.pi)
    uniform = rng.uniform(0.2, 1) * np.array([np.cos(heading), np.sin(heading)]) * (rng.random() < 0.7)
    linear = rng.normal(0, 1, (2, 2)) / extent * (rng.random() < 0.4)
    count = int(rng.integers(1, 7)) if rng.random() < 0.5 else 0
    vortices = np.stack(
        [
            rng.uniform(-0.1, 1.1, count) * width, rng.uniform(-0.1, 1.1, count) * height,
            np.exp(rng.uniform(np.log(finest), np.log(max(extent / 3, finest * 1.1)), count)),
            rng.uniform(0.4, 1.6, count) * rng.choice([-1.0, 1.0], count),
        ],
        axis=1,
    )  # fmt: skip
    count = int(rng.integers(2, 9)) if rng.random() < 0.45 else 0
    lengths = np.exp(rng.uniform(np.log(3 * finest), np.log(max(1.5 * extent, 3.5 * finest)), count))
    angles = rng.uniform(0, 2 * np.pi, count)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    sizes = rng.uniform(0.3, 1, count) * (lengths / extent) ** rng.uniform(0.3, 1)  # small eddies are slow
    amplitudes = sizes[:, None] * np.stack([-directions[:, 1], directions[:, 0]], axis=1)
    vectors = 2 * np.pi / np.maximum(lengths[:, None], 1e-6) * directions
    waves = np.concatenate([amplitudes, vectors, rng.uniform(0, 2 * np.pi, (count, 1))], axis=1)
    stream = np.zeros(8)
    still = not (uniform.any() or linear.any() or len(vortices) or len(waves))
    if still or rng.random() < 0.35:
        kind = rng.pick({"jet": 0.35, "step": 0.4, "layer": 0.25})
        strength = rng.uniform(0.8, 2)
        parts = {"jet": (1, 0, 0), "step": (1, 0, -rng.uniform(0.05, 0.3) * rng.sign()), "layer": (0, 1, 0)}[kind]
        direction = rng.pick({0.0: 0.4, np.pi: 0.2, rng.uniform(0, 2 * np.pi): 0.4}) + rng.normal(0, 0.05)
        half_width = rng.log_uniform(max(0.07 * extent, finest), max(0.35 * extent, 1.1 * finest))
        stream[:] = [
            *rng.uniform(0.1, 0.9, 2) * size, direction, half_width, rng.uniform(0, 0.6) / extent,
            *np.array(parts) * strength,
        ]  # fmt: skip
    gains = np.diff(rng.schedule())
    field = FlowField(uniform, linear, rng.uniform(0, 1, 2) * size, vortices, waves, stream, gains, np.zeros(2))
    ys, xs = (torch.from_numpy(a) for a in np.mgrid[0 : height : max(1, height // 32), 0 : width : max(1, width // 32)])
    u, v = torch.stack(field(torch.stack([xs, xs + 1, xs]).float(), torch.stack([ys, ys, ys + 1]).float(), 0))
    lengths_px = torch.hypot(u[0], v[0])
    steepest = max(float((part[1:] - part[:1]).abs().max()) for part in (u, v))
    scale = min(magnitude / max(float(lengths_px.mean()), 1e-6), MAX_GRADIENT / max(steepest, 1e-9))
    return replace(field, gains=scale * gains, drift=rng.uniform(0, 1) * scale * uniform)


def draw_particles(rng: Dice) -> ParticleScene:
    """Draw a flow, and the particles that it carries through all frames, some of which leave or enter the laser sheet.

    The mean displacement is log-uniform in ``PARTICLE_RANGE_PX``, cut off at ``max_displacement_px``.
    """
    height, width, frames = rng.settings.height, rng.settings.width, rng.settings.frames
    low, high = PARTICLE_RANGE_PX
    high = min(high, rng.settings.max_displacement_px)
    field = draw_field(rng, rng.log_uniform(min(low, high / 2), high))
    diameter = rng.log_uniform(1.9, 5.0)  # px, four standard deviations
    density = min(rng.log_uniform(0.012, 0.12), MAX_FILL / (math.pi / 4 * diameter**2))  # particles per px
    # Around the frame lies what will flow into it.
    ys, xs = np.meshgrid(np.linspace(0, height, 12), np.linspace(0, width, 12), indexing="ij")
    u, v = field(torch.from_numpy(xs), torch.from_numpy(ys), 0)
    largest = float(torch.hypot(u, v).max()) / max(abs(float(field.gains[0])), 1e-6)  # with gain 1
    margin = 2 * diameter + 1.3 * float(np.abs(field.gains).sum()) * largest
    low_corner, high_corner = np.array([-margin, -margin]), np.array([width + margin, height + margin])
    count = max(1, round(density * float((high_corner - low_corner).prod())))
    sigmas = np.clip(diameter / 4 * np.exp(rng.normal(0, rng.uniform(0, 0.2), count)), 0.4, 1.6)
    peak = rng.uniform(70, 260) * np.exp(rng.normal(0, rng.uniform(0, 0.4), count))
    depth, rise = rng.uniform(-1, 1, count), rng.choice([0.0, 0.05, 0.2]) * rng.normal(0, 1, 2)
    profile = rng.uniform(0.4, 1.2)  # how deep the sheet's light reaches, in its own thickness
    places = rng.uniform(low_corner, high_corner, (count, 2))
    positions, brightness = np.empty((frames, count, 2)), np.empty((frames, count))
    for frame in range(frames):
        positions[frame], brightness[frame] = places, peak * np.exp(-((depth / profile) ** 2))
        if frame == frames - 1:
            break
        x, y = torch.from_numpy(places).unbind(1)
        u, v = field(x, y, frame)
        places = places + torch.stack([u, v], dim=1).numpy()
        depth = depth + rise[0] + np.abs(rise[1]) * rng.normal(0, 0.5, count)
        lost = np.abs(depth) > 1
        depth = (depth + 1) % 2 - 1  # as many come in on the other side
        places[lost] = rng.uniform(low_corner, high_corner, (int(lost.sum()), 2))
    level = rng.choice([0.0, 3.0, 25.0])
    background = level * np.array([rng.uniform(0, 1), *rng.normal(0, 0.3, 5)])
    # The sheet is brightest on a line through it.
    direction, position, darker = rng.uniform(0, 2 * np.pi), rng.uniform(-0.5, 0.5), rng.uniform(0, 0.8)
    darker *= rng.random() < 0.6
    off = (2 * positions / (width, height) - 1) @ (np.cos(direction), np.sin(direction)) - position
    return ParticleScene(field, positions, brightness * (1 - darker * (1 - np.exp(-(off**2)))), sigmas, background)


def render_particles(scene: ParticleScene, height: int, width: int, limit_px: float) -> Clip:
    """Draw a clip of one such scene. Occluded is what flows out of the frame; flow from ``limit_px`` on is invalid."""
    frames = len(scene.positions)
    rows, columns = torch.arange(height, dtype=torch.float32), torch.arange(width, dtype=torch.float32)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    flow = torch.stack([torch.stack(scene.field(x, y, frame)) for frame in range(frames - 1)])
    down, across = (2 * rows / height - 1)[:, None], 2 * columns / width - 1
    a = scene.background.tolist()
    under = a[0] + a[1] * across + a[2] * down + a[3] * across * across + a[4] * across * down + a[5] * down * down
    frames_of = zip(scene.positions, scene.brightness, strict=True)
    light = [_splat(places, brightness, scene.sigmas, height, width) for places, brightness in frames_of]
    images = (torch.stack(light) + under.clamp_min(0)).clamp_(0, 255)
    valid = flow.square().sum(1) < limit_px**2
    there_x, there_y = x + flow[:, 0], y + flow[:, 1]
    occluded = ~((there_x >= 0) & (there_x <= width - 1) & (there_y >= 0) & (there_y <= height - 1))
    return Clip(
        images=images[None, :, None].repeat(1, 1, 3, 1, 1), flow=torch.where(valid.unsqueeze(1), flow, 0.0)[None],
        occluded=occluded[None], valid=valid[None],
    )  # fmt: skip


def _splat(places: np.ndarray, brightness: np.ndarray, sigmas: np.ndarray, height: int, width: int) -> torch.Tensor:
    """The sum of Gaussian spots, (H, W), each integrated over every pixel as a sensor does."""
    half = math.ceil(PATCH_SIGMAS * float(sigmas.max()))
    near = ((places > -half) & (places < (width - 1 + half, height - 1 + half))).all(1) & (brightness > 0.1)
    middle = torch.from_numpy(places[near])
    sigma, peak = torch.from_numpy(sigmas[near]), torch.from_numpy(brightness[near])
    corner = middle.round() - half
    steps = torch.arange(2 * half + 2) - 0.5  # the borders between the pixels of a patch
    offsets = corner.unsqueeze(2) + steps - middle.unsqueeze(2)  # (N, 2, K + 1)
    share = torch.erf((offsets / (math.sqrt(2) * sigma[:, None, None])).float()).diff(dim=2) / 2  # (N, 2, K)
    spots = (peak * 2 * math.pi * sigma**2).float()[:, None, None] * share[:, 1, :, None] * share[:, 0, None, :]
    # On a canvas with a border, so that spots need not be cut.
    border, wide = 2 * half + 1, width + 2 * (2 * half + 1)
    cells = (corner.long() + border).unsqueeze(2) + torch.arange(2 * half + 1)
    index = cells[:, 1, :, None] * wide + cells[:, 0, None, :]
    canvas = np.bincount(index.flatten().numpy(), spots.flatten().numpy(), (height + 2 * border) * wide)
    whole = torch.from_numpy(canvas).float().view(-1, wide)
    return whole[border : border + height, border : border + width]
