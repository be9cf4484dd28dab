# SPDX-License-Identifier: Apache-2.0
"""Procedural training clips with exact dense flow and occlusion: ``ProceduralGenerator``.

Look at what training sees: python -m training.generator --out DIR [--clips N] [--textures DIR] [--kind KIND]
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deq_flow_ros.command_line import CommandLine, exit_status
from deq_flow_ros.imaging.pictures import flow_to_color, write_picture
from training.flow_dataset import Clip, Sample
from training.particles import draw_particles, render_particles
from training.rendering import render, tensor
from training.scenes import KINDS, draw_kind, draw_scene
from training.settings import Dice, SceneSettings, build
from training.textures import LUMA, MEAN_LEVEL, TEXTURE_SIZE, halve, load_photographs, procedural_textures

HELD_OUT_SEED = 2**32
"""Added to the seed of a run for the clips of validation and benchmarks, so that none of them is trained on."""


class ProceduralGenerator:
    """Endless, seeded training clips: layered moving shapes, a camera that moves past planes, particles in a flow.

    A clip is a pure function of the settings and its number, so that training resumes at any step without stored state
    and processes share the numbers among them. Clips are made on the CPU, one after the other.

    :param height, width: frame size in px, at least 16.
    :param textures: folder of photographs (see ``load_photographs``), or None for procedural textures only.
    :param settings: further ones of ``SceneSettings``; ``max_displacement_px`` is a quarter of the width unless given.
        Beyond the longer side of the frame, the flow of a pixel is invalid.
    :raises ValueError: for settings outside these ranges; both this and FileNotFoundError as ``load_photographs``.
    """

    def __init__(self, height: int, width: int, *, textures: str | Path | None = None, **settings: Any) -> None:
        if settings.get("max_displacement_px") is None:
            settings["max_displacement_px"] = width / 4
        values = {"height": height, "width": width, "photographs": len(_photographs(textures)), **settings}
        self.settings = build(SceneSettings, values)
        self.banks = _banks(textures, self.settings.patterns, self.settings.seed)

    def clips(self, numbers: Sequence[int]) -> Clip:
        """The clips with these numbers (each >= 0); a clip is the same whatever it is drawn together with."""
        if not numbers or min(numbers) < 0:
            raise ValueError(f"numbers of clips: expected one or more, each at least 0, got {list(numbers)}")
        clip = Clip.join([self._clip(number) for number in numbers])
        clip.numbers = torch.tensor(list(numbers))
        return clip

    def pairs(self, name: str, number: int) -> list[Sample]:
        """The pairs of the clip with this number, each with both and its place behind the name."""
        clip = self.clips([number])
        clip.images = clip.images.round().byte()
        images, flows = (part[0].permute(0, 2, 3, 1).contiguous().numpy() for part in (clip.images, clip.flow))
        parts = zip(images[:-1], images[1:], flows, clip.valid[0].numpy(), clip.occluded[0].numpy(), strict=True)
        return [Sample(f"{name}/{number}/{t}", *of_pair) for t, of_pair in enumerate(parts)]

    def kind(self, number: int) -> str:
        """What kind of clip the one with this number is."""
        return draw_kind(Dice(self.settings, [self.settings.seed, number]))

    def _clip(self, number: int) -> Clip:
        s, exposure = self.settings, None
        rng, of_noise = (Dice(s, [s.seed, number]) for _ in range(2))
        size, limit_px = (s.height, s.width), float(max(s.height, s.width))
        if (kind := draw_kind(rng)) == "particles":
            particles = draw_particles(rng)
            exposure = _draw_particle_exposure(rng) if s.photometric else None
            clip = render_particles(particles, *size, limit_px)
        else:
            scene = draw_scene(rng, kind)
            exposure = _draw_exposure(rng) if s.photometric else None
            clip = render(scene, self.banks, *size, limit_px, exposure.shutter if exposure else 0.0)
        if exposure:
            noise = torch.Generator().manual_seed(int(of_noise.integers(2**62)))
            clip.images = _expose(clip.images[0], exposure, noise)[None]
        return clip


@lru_cache(maxsize=1)
def _photographs(textures: str | Path | None) -> Tensor:
    return load_photographs(textures) if textures is not None else torch.empty(0, 3, *TEXTURE_SIZE).byte()


@lru_cache(maxsize=2)
def _banks(textures: str | Path | None, patterns: int, seed: int) -> list[Tensor]:
    """All textures, and halved; the generators of a run's stages and of its validation share them."""
    full = torch.cat([_photographs(textures), procedural_textures(patterns, seed)])
    return [full, halve(full)]


@dataclass
class Exposure:
    """What happens to the T frames of a clip on the way to the picture; None: nothing."""

    colour: np.ndarray  # (T, 3, 4)
    gamma: np.ndarray | None  # (T,)
    noise: float  # standard deviation in grey levels
    grey: bool = False  # the noise is the same in all channels, as that of a camera without colours
    shutter: float = 0.0  # share of the time between two frames for which it is open; `rendering` smears what moves
    light: np.ndarray | None = None  # (T, 4, 6): log gain at the knots of a smooth field
    blur: np.ndarray | None = None  # (7, 7) kernel
    fog: np.ndarray | None = None  # (T, 6, 9): density at the knots of a smooth field
    fog_colour: float = 0.0
    shadow: np.ndarray | None = None  # (T, 6, 9): what is above 0 of a smooth field lies in the shadow
    shadow_depth: float = 0.0
    bands: np.ndarray | None = None  # (T, 3): amplitude, rad/px down the rows, phase of light that flickers in them


def _draw_exposure(rng: Dice) -> Exposure:
    """Draw photometric changes between the frames of a clip, blur and noise."""
    frames = rng.settings.frames
    strength = rng.choice([0.0, 0.3, 1.0])  # most cameras change little from frame to frame, some a lot
    colour = np.empty((frames, 3, 4))
    for t, d in enumerate(rng.normal(0, 1, (frames, 6))):
        contrast, saturation = np.exp(0.12 * strength * d[0]), 1 + 0.15 * strength * d[1]
        gains = contrast * np.exp(0.04 * strength * d[2:5])
        colour[t, :, :3] = gains[:, None] * (saturation * np.eye(3) + (1 - saturation) * LUMA)
        colour[t, :, 3] = MEAN_LEVEL * (1 - contrast) + 12 * strength * d[5]
    gamma = np.exp(rng.normal(0, 0.25) + rng.normal(0, 0.05 * strength, frames)) if rng.random() < 0.4 else None
    exposure = Exposure(colour, gamma, noise=0.0)
    if rng.random() < 0.35:  # uneven light that moves, and not with the scene
        exposure.light = rng.normal(0, 0.15, (4, 6)) + rng.normal(0, 0.1, (frames, 4, 6)) * rng.random()
    if rng.random() < 0.3:
        exposure.blur = _blur_kernel(rng)
    if rng.random() < 0.7:
        exposure.noise = rng.log_uniform(0.5, 10)
    if rng.random() < 0.2:
        exposure.shutter = rng.uniform(0.1, 0.6)
    if rng.random() < 0.08:
        exposure.fog, exposure.fog_colour = rng.uniform(0.1, 0.5) + _drifting(rng, 0.12), rng.uniform(120, 235)
    if rng.random() < 0.12:
        exposure.shadow, exposure.shadow_depth = rng.uniform(-0.8, 0.4) + _drifting(rng, 1.0), rng.uniform(0.2, 0.65)
    if rng.random() < 0.06:  # a rolling shutter under lamps that flicker
        bands = [rng.uniform(0.03, 0.15), 2 * np.pi / rng.uniform(80, 600)]
        exposure.bands = np.array([[*bands, rng.uniform(0, 2 * np.pi)] for _ in range(frames)])
    return exposure


def _drifting(rng: Dice, strength: float) -> np.ndarray:
    """Knots (T, 6, 9) of a smooth random field that changes a little from frame to frame."""
    change = rng.normal(0, 1, (6, 9)) * rng.uniform(0, 0.25)
    return strength * (rng.normal(0, 1, (6, 9)) + np.arange(rng.settings.frames)[:, None, None] * change)


def _blur_kernel(rng: Dice) -> np.ndarray:
    """A 7 x 7 kernel: Gaussian (out of focus), or now and then a line (motion)."""
    ys, xs = np.mgrid[-3:4, -3:4]
    if rng.random() < 0.7:
        kernel = np.exp(-(xs**2 + ys**2) / (2 * rng.uniform(0.4, 1.3) ** 2))
    else:
        angle, half = rng.uniform(0, np.pi), rng.uniform(0.5, 3)
        along, across = np.cos(angle) * xs + np.sin(angle) * ys, np.cos(angle) * ys - np.sin(angle) * xs
        kernel = np.clip(half + 0.5 - np.abs(along), 0, 1) * np.clip(1 - np.abs(across), 0, 1)
    return kernel / kernel.sum()


def _draw_particle_exposure(rng: Dice) -> Exposure:
    """Laser pulses that differ in energy and the noise of a grey camera, on the T frames of a clip."""
    frames = rng.settings.frames
    gains = np.exp(rng.normal(0, rng.choice([0.0, 0.03, 0.12]), frames))
    tint = 1 + rng.normal(0, 0.02, 3) * (rng.random() < 0.2)
    colour = np.zeros((frames, 3, 4))
    colour[:, :, :3] = gains[:, None, None] * tint[:, None] * np.eye(3)
    gamma = np.full(frames, np.exp(rng.normal(0, 0.25))) if rng.random() < 0.25 else None
    return Exposure(colour, gamma, rng.log_uniform(0.5, 9) * (rng.random() < 0.65), grey=True)


def _expose(images: Tensor, exposure: Exposure, generator: torch.Generator) -> Tensor:
    """All but the smear of an open shutter, which needs the scene, on (T, 3, H, W); new images within 0..255."""
    frames, _, height, width = images.shape

    def field(knots: np.ndarray) -> Tensor:
        return F.interpolate(tensor(knots).unsqueeze(1), size=(height, width), mode="bicubic", align_corners=True)

    if exposure.shadow is not None:  # soft edges, some 5 % of the frame wide
        images = images * (1 - exposure.shadow_depth * torch.sigmoid(8 * field(exposure.shadow)))
    if exposure.fog is not None:
        images = images.lerp(tensor(exposure.fog_colour), field(exposure.fog).clamp_(0, 0.8))
    if exposure.blur is not None:
        padded = F.pad(images, (3, 3, 3, 3), mode="replicate").flatten(0, 1).unsqueeze(1)
        images = F.conv2d(padded, tensor(exposure.blur)[None, None]).view_as(images)
    if exposure.light is not None:
        images = images * field(exposure.light).exp_()
    if exposure.bands is not None:
        amplitude, frequency, phase = tensor(exposure.bands)[..., None].unbind(1)  # (T, 1) each
        rows = torch.arange(height, dtype=torch.float32)
        images = images * (1 + amplitude * torch.sin(frequency * rows + phase))[:, None, :, None]
    if exposure.gamma is not None:
        images = (images.clamp(0, 255) / 255).pow_(tensor(exposure.gamma)[:, None, None, None]) * 255
    colour = tensor(exposure.colour)
    images = torch.baddbmm(colour[:, :, 3:], colour[:, :, :3], images.flatten(2)).view(frames, 3, height, width)
    noise = torch.randn(images.shape, generator=generator)
    return (images + exposure.noise * (noise[:, :1] if exposure.grey else noise)).clamp_(0, 255)


def contact_sheet(clip: Clip) -> np.ndarray:
    """One row per clip, (rows, columns, 3) uint8 RGB: all frames, then flow and occlusion of the first pair."""
    rows = []
    for images, flow, occluded in zip(clip.images.numpy(), clip.flow.numpy(), clip.occluded.numpy(), strict=True):
        pictures = [frame.transpose(1, 2, 0).astype(np.uint8) for frame in images]
        colour = flow_to_color(flow[0].transpose(1, 2, 0))
        text = f"{np.hypot(*flow[0]).mean():.1f} px"
        cv2.putText(colour, text, (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
        hidden = np.repeat(occluded[0][:, :, None], 3, axis=2).astype(np.uint8) * 255
        rows.append(np.concatenate([*pictures, colour, hidden], axis=1))
    return np.concatenate(rows)


def main(arguments: list[str] | None = None) -> int:
    """Write contact sheets of the generator's clips; returns the exit status."""
    line = CommandLine("python -m training.generator", "Write contact sheets of the generator's clips.")
    line.add_path("--out", "folder for the sheets, made if missing", required=True)
    line.add_number("--clips", 8, "number of clips, in full sheets", least=1)
    line.add_path("--textures", "folder of photographs; default: procedural textures only")
    line.add_size(128, 192, "of a frame", least=1)
    line.add_number("--seed", 0, "of the generator")
    line.add_argument("--kind", choices=[*KINDS, "each"], help="this only, or each in turn; default: as in training")
    options = line.parse_args(arguments)

    def work() -> int:
        generator = ProceduralGenerator(options.height, options.width, textures=options.textures, seed=options.seed)
        options.out.mkdir(parents=True, exist_ok=True)
        numbers = itertools.count()
        kinds = {None: (None,), "each": KINDS}.get(options.kind, (options.kind,))
        wanted = (next(n for n in numbers if kind in (None, generator.kind(n))) for kind in itertools.cycle(kinds))
        rows = len(KINDS) if options.kind == "each" else min(8, options.clips)
        for index in range(math.ceil(options.clips / rows)):
            path = options.out / f"{options.kind or 'clips'}_{index:03d}.png"
            write_picture(path, contact_sheet(generator.clips(list(itertools.islice(wanted, rows)))))
            print(f"{path}: frames, flow and occlusion of the first pair; one clip a row")
        return 0

    return exit_status(work)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    raise SystemExit(main())
