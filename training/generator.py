# SPDX-License-Identifier: Apache-2.0
"""Procedural training clips with exact dense flow and occlusion: ``ProceduralGenerator``.

Look at what training sees: python -m training.generator --out DIR [--clips N] [--textures DIR] [--kind KIND]
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch

from deq_flow_ros.command_line import CommandLine, exit_status
from deq_flow_ros.imaging.colour import flow_to_color
from deq_flow_ros.imaging.pictures import write_picture
from training.exposure import draw_exposure, expose
from training.layers import LayerSettings
from training.particles import draw_particle_exposure, draw_particles, render_particles
from training.rendering import Clip, render
from training.scenes import KINDS, Kind, draw_kind, draw_scene
from training.textures import TEXTURE_SIZE, halve, load_photographs, procedural_textures

__all__ = ["Clip", "ProceduralGenerator"]

PARTICLE_SHARE, FINE_SHARE = 0.08, 0.06


class ProceduralGenerator:
    """Endless, seeded training clips: layered moving shapes, a camera that moves past planes, particles in a flow.

    A clip is a pure function of the settings, the seed and its number, so that training resumes at any step without
    stored state and processes share the numbers among them. The scene is drawn on the CPU and is the same on every
    device; only the sensor noise is the device's own.

    :param height, width: frame size in px, at least 16.
    :param batch_size: clips per batch.
    :param frames: frames per clip, at least 2.
    :param textures: folder of photographs (see ``load_photographs``), or None for procedural textures only.
    :param device: where the textures live and the clips are made.
    :param seed: another seed, other clips.
    :param min_displacement_px, max_displacement_px: the typical displacement of background and layers between two
        frames is log-uniform in this range (maximum: a quarter of the width unless given); single pixels may move
        farther.
    :param max_layers: most layers over the background, 0 to 8.
    :param static_share: share of clips in which nothing moves (they still differ by noise and light).
    :param particle_share: share of clips that are particle images, see ``particles``.
    :param fine_share: share of clips in which the typical displacements lie below a pixel (0.05 to 1 px).
    :param patterns: number of different procedural textures.
    :param pattern_share: how often one of them is used when there are photographs too.
    :param limit_px: longer flow is marked invalid, and 0; the longer side of the frame unless given.
    :param photometric: False gives clean frames, without fog, shadows, changes of light and colour, blur and noise.
    :raises ValueError: for settings outside these ranges, and as ``load_photographs`` raises it.
    :raises FileNotFoundError: as ``load_photographs`` raises it.
    """

    def __init__(
        self, height: int, width: int, *, batch_size: int, frames: int = 3, textures: str | Path | None = None,
        device: str | torch.device = "cpu", seed: int = 0, min_displacement_px: float = 0.5,
        max_displacement_px: float | None = None, max_layers: int = 8, static_share: float = 0.06,
        particle_share: float = PARTICLE_SHARE, fine_share: float = FINE_SHARE, patterns: int = 120,
        pattern_share: float = 0.25, limit_px: float | None = None, photometric: bool = True,
    ) -> None:  # fmt: skip
        max_displacement_px = width / 4 if max_displacement_px is None else max_displacement_px
        limit_px = float(max(height, width)) if limit_px is None else limit_px
        for name, value, ok, expected in (
            ("height", height, height >= 16, "at least 16"),
            ("width", width, width >= 16, "at least 16"),
            ("batch_size", batch_size, batch_size >= 1, "at least 1"),
            ("frames", frames, frames >= 2, "at least 2"),
            ("seed", seed, seed >= 0, "at least 0"),
            ("min_displacement_px", min_displacement_px, min_displacement_px > 0, "above 0"),
            (
                "max_displacement_px",
                max_displacement_px,
                min_displacement_px < max_displacement_px <= width / 2,
                f"above min_displacement_px, {min_displacement_px}, and at most half the width, {width / 2}",
            ),
            ("max_layers", max_layers, 0 <= max_layers <= 8, "0 to 8"),
            ("static_share", static_share, 0 <= static_share <= 1, "0 to 1"),
            ("particle_share", particle_share, 0 <= particle_share <= 1, "0 to 1"),
            ("fine_share", fine_share, 0 <= fine_share <= 1, "0 to 1"),
            (
                "static_share + particle_share + fine_share",
                static_share + particle_share + fine_share,
                static_share + particle_share + fine_share <= 1,
                "at most 1",
            ),
            ("patterns", patterns, patterns >= 1, "at least 1"),
            ("pattern_share", pattern_share, 0 <= pattern_share <= 1, "0 to 1"),
            ("limit_px", limit_px, limit_px > 0, "above 0"),
        ):
            if not ok:  # also catches NaN
                raise ValueError(f"{name}: expected {expected}, got {value}")
        self.batch_size, self.seed, self.limit_px, self.photometric = batch_size, seed, limit_px, photometric
        self.device = torch.device(device)
        photographs = _photographs(textures)
        self._banks = _banks(textures, patterns, seed, self.device)
        self.settings = LayerSettings(
            height, width, frames, max_layers, min_displacement_px, max_displacement_px, static_share,
            particle_share, fine_share, len(photographs), patterns, pattern_share,
        )  # fmt: skip

    def batch(self, index: int) -> Clip:
        """Batch number ``index`` (>= 0) of the endless sequence; shapes as in ``Clip``, on the generator's device."""
        return self.clips(range(index * self.batch_size, (index + 1) * self.batch_size))

    def clips(self, numbers: Sequence[int]) -> Clip:
        """The clips with these numbers (each >= 0); a clip is the same whatever it is drawn together with."""
        if not numbers or min(numbers) < 0:
            raise ValueError(f"numbers of clips: expected one or more, each at least 0, got {list(numbers)}")
        scenes = [i for i, number in enumerate(numbers) if self.kind(number) != "particles"]
        # A CPU is fastest when a clip's arrays stay in its cache, a GPU when one launch serves the whole batch.
        at_once = 1 if self.device.type == "cpu" else len(numbers)
        groups = [scenes[start : start + at_once] for start in range(0, len(scenes), at_once)]
        groups += [[i] for i in range(len(numbers)) if i not in set(scenes)]
        parts = [self._together([numbers[i] for i in group]) for group in groups]
        order = np.argsort([i for group in groups for i in group]).tolist()
        return Clip(
            images=torch.cat([part.images for part in parts])[order],
            flow=torch.cat([part.flow for part in parts])[order],
            occluded=torch.cat([part.occluded for part in parts])[order],
            valid=torch.cat([part.valid for part in parts])[order],
            numbers=torch.tensor(list(numbers)),
        )

    def kind(self, number: int) -> Kind:
        """What kind of clip the one with this number is."""
        return draw_kind(np.random.default_rng([self.seed, number]), self.settings)

    def _together(self, numbers: Sequence[int]) -> Clip:
        """Draw clips of scenes, any number, or one clip of particles."""
        height, width, frames = self.settings.height, self.settings.width, self.settings.frames
        draws = [np.random.default_rng([self.seed, number]) for number in numbers]
        kinds = [draw_kind(rng, self.settings) for rng in draws]
        if kinds == ["particles"]:
            particles = draw_particles(draws[0], height, width, frames, self.settings.max_displacement_px)
            exposures = [draw_particle_exposure(draws[0], frames)] if self.photometric else []
            clip = render_particles(particles, height, width, self.limit_px).to(self.device)
        else:
            scenes = [draw_scene(rng, self.settings, kind) for rng, kind in zip(draws, kinds, strict=True)]
            exposures = [draw_exposure(rng, frames) for rng in draws] if self.photometric else []
            shutters = [exposure.shutter for exposure in exposures] or None
            clip = render(scenes, self._banks, height, width, self.limit_px, shutters)
        exposed = []
        for i, exposure in enumerate(exposures):
            noise_seed = int(np.random.default_rng([self.seed, numbers[i]]).integers(2**62))
            noise = torch.Generator(self.device).manual_seed(noise_seed)
            exposed.append(expose(clip.images[i : i + 1], [exposure], noise))
        if exposed:
            clip.images = torch.cat(exposed)
        return clip


@lru_cache(maxsize=1)
def _photographs(textures: str | Path | None) -> torch.Tensor:
    return load_photographs(textures) if textures is not None else torch.empty(0, 3, *TEXTURE_SIZE).byte()


@lru_cache(maxsize=2)
def _banks(textures: str | Path | None, patterns: int, seed: int, device: torch.device) -> list[torch.Tensor]:
    """All textures, and halved; the generators of a run's stages and of its validation share them."""
    full = torch.cat([_photographs(textures), procedural_textures(patterns, seed)]).to(device)
    return [full, halve(full)]


def contact_sheet(clip: Clip) -> np.ndarray:
    """One row per clip, (rows, columns, 3) uint8 RGB: all frames, then flow and occlusion of the first pair."""
    rows = []
    for i in range(len(clip.images)):
        images, flow, occluded = (whole[i].cpu().numpy() for whole in (clip.images, clip.flow, clip.occluded))
        pictures = [frame.transpose(1, 2, 0).astype(np.uint8) for frame in images]
        colour = flow_to_color(flow[0].transpose(1, 2, 0))
        text = f"{np.hypot(*flow[0]).mean():.1f} px"
        cv2.putText(colour, text, (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
        hidden = np.repeat(occluded[0][:, :, None], 3, axis=2).astype(np.uint8) * 255
        rows.append(np.concatenate([*pictures, colour, hidden], axis=1))
    return np.concatenate(rows)


def _of_kinds(generator: ProceduralGenerator, kinds: Sequence[Kind]) -> Iterator[int]:
    """Numbers of clips whose kinds are these in turn, endlessly."""
    number = itertools.count()
    for kind in itertools.cycle(kinds):
        yield next(n for n in number if generator.kind(n) == kind)


def main(arguments: list[str] | None = None) -> int:
    """Write contact sheets of the generator's clips; returns the exit status."""
    line = CommandLine("python -m training.generator", "Write contact sheets of the generator's clips.")
    line.add_path("--out", "folder for the sheets, made if missing", required=True)
    line.add_number("--clips", 8, "number of clips, in full sheets", least=1)
    line.add_path("--textures", "folder of photographs; default: procedural textures only")
    line.add_size(128, 192, "of a frame", least=1)
    line.add_number("--seed", 0, "of the generator")
    kind_help = "clips of this kind only, or each in turn; default: as they come in training"
    line.add_argument("--kind", choices=[*KINDS, "each"], help=kind_help)
    options = line.parse_args(arguments)

    def work() -> int:
        generator = ProceduralGenerator(
            options.height, options.width, batch_size=8, textures=options.textures, seed=options.seed
        )
        options.out.mkdir(parents=True, exist_ok=True)
        kinds = {None: None, "each": KINDS}.get(options.kind, (options.kind,))
        wanted = itertools.count() if kinds is None else _of_kinds(generator, kinds)
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
