# SPDX-License-Identifier: Apache-2.0
"""The camera's and the air's imperfections: fog, shadows, light and colours that change, blur, noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from training.appearance import LUMA, MEAN_LEVEL


@dataclass
class Exposure:
    """What happens to the T frames of a clip on the way to the picture, beginning with the blur; None: nothing."""

    shutter: float  # share of the time between two frames for which it is open; what moves is smeared by `rendering`
    colour: np.ndarray  # (T, 3, 4)
    gamma: np.ndarray | None  # (T,)
    light: np.ndarray | None  # (T, 4, 6): log gain at the knots of a smooth field
    blur: np.ndarray | None  # (T, 7, 7) kernels
    noise: np.ndarray  # (T,) standard deviation in grey levels
    fog: np.ndarray | None = None  # (T, 6, 9): density at the knots of a smooth field
    fog_colour: float = 0.0
    shadow: np.ndarray | None = None  # (T, 6, 9): what is above 0 of a smooth field lies in the shadow
    shadow_depth: float = 0.0
    bands: np.ndarray | None = None  # (T, 3): amplitude, rad/px down the rows, phase of light that flickers in them
    grey: bool = False  # the noise is the same in all channels, as that of a camera without colours


def draw_exposure(rng: np.random.Generator, frames: int) -> Exposure:
    """Draw photometric changes between the frames of a clip, blur and noise."""
    strength = rng.choice([0.0, 0.3, 1.0])  # most cameras change little from frame to frame, some a lot
    drift = rng.normal(0, 1, (frames, 6))
    colour = np.empty((frames, 3, 4))
    for t, d in enumerate(drift):
        contrast, saturation = np.exp(0.12 * strength * d[0]), 1 + 0.15 * strength * d[1]
        gains = contrast * np.exp(0.04 * strength * d[2:5])
        colour[t, :, :3] = gains[:, None] * (saturation * np.eye(3) + (1 - saturation) * LUMA)
        colour[t, :, 3] = MEAN_LEVEL * (1 - contrast) + 12 * strength * d[5]
    gamma = np.exp(rng.normal(0, 0.25) + rng.normal(0, 0.05 * strength, frames)) if rng.random() < 0.4 else None
    light = None
    if rng.random() < 0.35:  # uneven light that moves, and not with the scene
        light = rng.normal(0, 0.15, (4, 6)) + rng.normal(0, 0.1, (frames, 4, 6)) * rng.random()
    blur = None
    if rng.random() < 0.3:
        blur = np.tile(_blur_kernel(rng), (frames, 1, 1))
    noise = np.full(frames, np.exp(rng.uniform(np.log(0.5), np.log(10)))) if rng.random() < 0.7 else np.zeros(frames)
    shutter = rng.uniform(0.1, 0.6) if rng.random() < 0.2 else 0.0
    exposure = Exposure(shutter, colour, gamma, light, blur, noise)
    if rng.random() < 0.08:
        exposure.fog = rng.uniform(0.1, 0.5) + _drifting(rng, frames, 0.12)
        exposure.fog_colour = rng.uniform(120, 235)
    if rng.random() < 0.12:
        exposure.shadow = rng.uniform(-0.8, 0.4) + _drifting(rng, frames, 1.0)
        exposure.shadow_depth = rng.uniform(0.2, 0.65)
    if rng.random() < 0.06:  # a rolling shutter under lamps that flicker
        bands = [rng.uniform(0.03, 0.15), 2 * np.pi / rng.uniform(80, 600)]
        exposure.bands = np.array([[*bands, rng.uniform(0, 2 * np.pi)] for _ in range(frames)])
    return exposure


def _drifting(rng: np.random.Generator, frames: int, strength: float) -> np.ndarray:
    """Knots (T, 6, 9) of a smooth random field that changes a little from frame to frame."""
    change = rng.normal(0, 1, (6, 9)) * rng.uniform(0, 0.25)
    return strength * (rng.normal(0, 1, (6, 9)) + np.arange(frames)[:, None, None] * change)


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
    """Fog, photometric changes, blur and noise on (n, T, 3, H, W); returns new images, clamped to 0..255.

    Blur by motion (``Exposure.shutter``) is not done here: it needs the scene.
    """
    n, frames, _, height, width = images.shape
    device = images.device

    def tensor(values: object) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.float32)).to(device)

    def field(knots: np.ndarray) -> torch.Tensor:
        return F.interpolate(tensor(knots).unsqueeze(1), size=(height, width), mode="bicubic", align_corners=True)

    images = images.clone()
    for i, exposure in enumerate(exposures):
        if exposure.shadow is not None:  # soft edges, some 5 % of the frame wide
            images[i] *= 1 - exposure.shadow_depth * torch.sigmoid(8 * field(exposure.shadow))
        if exposure.fog is not None:
            images[i] = images[i].lerp(tensor(exposure.fog_colour), field(exposure.fog).clamp_(0, 0.8))
        if exposure.blur is not None:
            kernels = tensor(exposure.blur).repeat_interleave(3, 0).unsqueeze(1)
            padded = F.pad(images[i].reshape(1, frames * 3, height, width), (3, 3, 3, 3), mode="replicate")
            images[i] = F.conv2d(padded, kernels, groups=frames * 3).view_as(images[i])
        if exposure.light is not None:
            images[i] *= field(exposure.light).exp_()
        if exposure.bands is not None:
            amplitude, frequency, phase = tensor(exposure.bands)[..., None].unbind(1)  # (T, 1) each
            rows = torch.arange(height, device=device, dtype=torch.float32)
            images[i] *= (1 + amplitude * torch.sin(frequency * rows + phase))[:, None, :, None]
        if exposure.gamma is not None:
            images[i] = (images[i].clamp_(0, 255) / 255).pow_(tensor(exposure.gamma)[:, None, None, None]) * 255
    colour = tensor([exposure.colour for exposure in exposures]).flatten(0, 1)
    images = torch.baddbmm(colour[:, :, 3:], colour[:, :, :3], images.view(n * frames, 3, height * width))
    images = images.view(n, frames, 3, height, width)
    sigma = tensor([exposure.noise for exposure in exposures])[..., None, None, None]
    noise = torch.randn(images.shape, generator=generator, device=device)
    for i, exposure in enumerate(exposures):
        if exposure.grey:
            noise[i] = noise[i, :, :1].clone()
    images += sigma * noise
    return images.clamp_(0, 255)
