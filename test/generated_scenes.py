# SPDX-License-Identifier: Apache-2.0
"""Generators and scenes for the tests of the procedural generator: small, and known in every pixel."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from training.flow_dataset import Clip
from training.generator import ProceduralGenerator
from training.rendering import Layer, Outline, everywhere
from training.scenes import draw_kind, draw_scene
from training.settings import Dice
from training.textures import Texture, halve, procedural_textures

HEIGHT, WIDTH = 72, 104


def make(**settings: object) -> ProceduralGenerator:
    return ProceduralGenerator(HEIGHT, WIDTH, **{"patterns": 6, "particle_share": 0, "fine_share": 0, **settings})


def batch(generator: ProceduralGenerator, index: int, count: int = 6) -> Clip:
    return generator.clips(range(index * count, (index + 1) * count))


def draw(generator: ProceduralGenerator, seed: int) -> list[Layer]:
    rng = Dice(generator.settings, seed)
    return draw_scene(rng, draw_kind(rng))


def sample(field: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Backward-warp (B, C, H, W) by flow (B, 2, H, W)."""
    height, width = field.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack([(x + flow[:, 0]) * 2 / (width - 1) - 1, (y + flow[:, 1]) * 2 / (height - 1) - 1], dim=-1)
    return F.grid_sample(field, grid, align_corners=True)


def warping_errors(clip: object, pair: int, inside: torch.Tensor, offset: float) -> list[float]:
    """Mean difference in grey levels between an image and the next one warped onto it by the flow, per clip.

    :param inside: (B, H, W) bool, where it counts; clips with 50 pixels or fewer of it are left out.
    :param offset: px, added to both components of the flow.
    """
    warped = sample(clip.images[:, pair + 1], clip.flow[:, pair] + offset)
    difference = (warped - clip.images[:, pair]).abs().mean(1)
    return [difference[i][inside[i]].mean().item() for i in range(len(inside)) if inside[i].sum() > 50]


def layer(homographies: np.ndarray, outline: Outline = everywhere, elastic=None) -> Layer:
    texture = Texture(0, 0, np.array([[1.0, 0, 40], [0, 1.0, 40]]), np.eye(3, 4))
    return Layer(homographies, outline, texture, elastic)


def shifts(*steps: tuple[float, float]) -> np.ndarray:
    homographies = np.tile(np.eye(3), (len(steps), 1, 1))
    homographies[:, :2, 2] = steps
    return homographies


def banks() -> list[torch.Tensor]:
    full = procedural_textures(1)
    return [full, halve(full)]
