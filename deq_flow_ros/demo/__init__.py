# SPDX-License-Identifier: Apache-2.0
"""A drive through a 3D scene with exact flow, as a rosbag2 to try the project with: rendered once, and kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np

from deq_flow_ros.demo.scene import Scene, SceneSettings
from deq_flow_ros.imaging import MediaError, frame_from_array

SIDECAR = "scene.json"
"""File in the bag's directory with the settings of the scene, which give the exact flow between any two frames."""
ExactFlow = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
"""Takes the stamps of two images and returns the flow (H, W, 2) px on the first one, and where it is visible (H, W)."""


def render_scene_bag(bag: Path, settings: SceneSettings) -> None:
    """Render the stream into a rosbag2 directory, unless the directory already holds this very stream.

    The frames are bgr8 images on ``bags.IMAGE_TOPIC`` with the frame_id "camera". The bag appears complete or not at
    all. Another rendered scene is replaced.

    :raises MediaError: if the directory holds anything else, which is left alone, or if the bag cannot be written.
    """
    from deq_flow_ros.recordings import bags  # it needs rosbags, which nothing else of this package does

    try:
        if load_scene(bag) == settings:
            return
    except MediaError:
        pass  # written by another version, so it is rendered again
    if bag.is_symlink() or (bag.exists() and not (bag / SIDECAR).is_file()):
        raise MediaError(
            f"the demo scene is to be rendered into {bag}, but that is not a rendered scene (not a directory with "
            f"{SIDECAR}) and is left alone; move it away, or choose another --out"
        )
    # It is written under its own name in a directory beside, because the data file is named after the bag.
    nursery = bag.parent / f".partial-{os.getpid()}"
    partial, scene = nursery / bag.name, Scene(settings)
    try:
        nursery.mkdir(parents=True, exist_ok=True)
        with bags.BagWriter(partial, "mcap") as writer:
            for number in range(settings.frames):
                stamp_ns, bgr = settings.stamp_ns(number), cv2.cvtColor(scene.render(number), cv2.COLOR_RGB2BGR)
                writer.write_frame(bags.IMAGE_TOPIC, frame_from_array(bgr, stamp_ns, stamp_ns, "camera"))
        (partial / SIDECAR).write_text(json.dumps(asdict(settings), indent=1))
        if bag.exists():
            shutil.rmtree(bag)
        os.replace(partial, bag)
    except OSError as error:
        raise MediaError(f"cannot write the demo scene to {bag}: {error}") from error
    finally:
        shutil.rmtree(nursery, ignore_errors=True)


def load_scene(bag: Path) -> SceneSettings | None:
    """The settings of the scene that the bag was rendered from; None for another kind of bag.

    :raises MediaError: if this code renders another version of the scene.
    """
    sidecar = bag / SIDECAR
    if not sidecar.is_file():
        return None
    try:
        settings = SceneSettings(**json.loads(sidecar.read_text()))
        Scene(settings)
    except (TypeError, ValueError) as error:
        raise MediaError(f"{sidecar} does not describe a scene that can be rendered here: {error}") from error
    return settings


def exact_flow(bag: Path) -> ExactFlow | None:
    """The exact flow of a rendered bag; None for any other input."""
    settings = load_scene(bag)
    if settings is None:
        return None
    scene, numbers = Scene(settings), {settings.stamp_ns(number): number for number in range(settings.frames)}
    return lambda here_ns, there_ns: scene.flow(numbers[here_ns], numbers[there_ns])
