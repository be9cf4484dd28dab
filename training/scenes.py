# SPDX-License-Identifier: Apache-2.0
"""Random scenes for the procedural generator: what there is and how it moves. Numbers only; `rendering` draws them.

A scene is a background and up to `max_layers` layers on top of it. Every layer lives in canonical coordinates c, which
are the pixel coordinates of frame 0, and moves by phi_t(c) = H_t (c + e_t(c)): a homography and, for some, an elastic
field of a few plane waves with a Lipschitz constant well below 1, so that phi_t has an inverse and a fixed-point
iteration finds it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from training.appearance import EVERYTHING
from training.ego_motion import WORLDS, ego_motion_scene
from training.layers import Layer, LayerSettings, complete, layer_count, object_layers, object_radius, still
from training.motion import log_uniform, pick, planar_motion

Kind = Literal["static", "particles", "fine", "planar", "ego-motion", "road", "flight"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Of the clips left when the shares that can be set are taken off.
MOVING_SHARES: dict[Kind, float] = {"planar": 0.5, "ego-motion": 0.22, "road": 0.2, "flight": 0.08}
FINE_RANGE_PX = (0.05, 1.0)  # of the typical displacement in clips with motion below a pixel


def draw_kind(rng: np.random.Generator, settings: LayerSettings) -> Kind:
    """Draw what kind of clip one is; all but "particles" are scenes."""
    shares: dict[Kind, float] = {
        "static": settings.static_share, "particles": settings.particle_share, "fine": settings.fine_share
    }  # fmt: skip
    rest = 1 - sum(shares.values())
    drawn: Kind = pick(rng, {**shares, **{kind: share * rest for kind, share in MOVING_SHARES.items()}})
    return drawn


def draw_scene(rng: np.random.Generator, settings: LayerSettings, kind: Kind) -> list[Layer]:
    """Draw a scene of a kind; layers are ordered from the far to the near, the background first.

    :raises ValueError: for "particles", which has no layers; see `particles`.
    """
    if kind == "particles":
        raise ValueError("clips of particles have no layers; draw_particles draws them")
    if kind == "fine":
        low, high = FINE_RANGE_PX
        settings = replace(
            settings, min_displacement_px=min(low, settings.min_displacement_px),
            max_displacement_px=min(high, settings.max_displacement_px),
        )  # fmt: skip
        kind = pick(rng, {"planar": 0.55, "ego-motion": 0.45})
    if kind in WORLDS:
        return ego_motion_scene(rng, settings, kind)
    return planar_scene(rng, settings, static=kind == "static")


def planar_scene(rng: np.random.Generator, settings: LayerSettings, static: bool = False) -> list[Layer]:
    """Everything moves in the image plane: a background, and objects with motions of their own.

    Half of the objects are carried along by the background's motion.
    """
    size = np.array([settings.width, settings.height])
    low, high = settings.min_displacement_px, settings.max_displacement_px
    magnitude = log_uniform(rng, low, high)
    still_background = static or rng.random() < 0.2

    def elastic_px(of: float, share: float) -> float:
        return 0.0 if static or rng.random() > share else of * rng.uniform(0.2, 1)

    if still_background:
        background = still(settings)
    else:
        background = planar_motion(rng, settings.frames, size / 2, settings.width / 2, magnitude)
    bend_px = 0.0 if still_background else elastic_px(magnitude, 0.3)
    layers = [complete(rng, settings, background, EVERYTHING, size / 2, settings.width / 3, bend_px)]
    count = layer_count(rng, settings)
    if still_background and not static:  # something has to move
        count = max(count, min(1, settings.max_layers))
    for _ in range(count):
        centre, radius = rng.uniform(0, 1, 2) * size, object_radius(rng, settings)
        carried = rng.random() < 0.5 and not still_background
        own = log_uniform(rng, low, min(magnitude, high / 2) + low) if carried else log_uniform(rng, low, high)
        if static or rng.random() < 0.06:  # also: dirt on the lens, a bonnet, a caption
            homographies = still(settings)
        else:
            homographies = planar_motion(rng, settings.frames, centre, radius, own)
            if carried:
                homographies = background @ homographies
        layers += object_layers(rng, settings, homographies, centre, radius, elastic_px(own, 0.25))
    return layers[: settings.max_layers + 1]
