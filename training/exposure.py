# SPDX-License-Identifier: Apache-2.0
"""The camera's imperfections: light and colours that change from frame to frame, blur, noise."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .appearance import LUMA, MEAN_LEVEL


@dataclass
class Exposure:
    """What the camera does to the T frames of a clip, beginning with the blur; None: nothing."""

    colour: np.ndarray  # (T, 3, 4)
    gamma: np.ndarray | None  # (T,)
    light: np.ndarray | None  # (T, 4, 6): log gain at the knots of a smooth field
    blur: np.ndarray | None  # (T, 7, 7) kernels
    noise: np.ndarray  # (T,) standard deviation in grey levels


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
