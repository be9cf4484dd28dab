# SPDX-License-Identifier: Apache-2.0
"""The demo scene as a rosbag2, which is rendered once and kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from pathlib import Path

import cv2
import numpy as np

from deq_flow_ros.demo.scene import Scene, SceneSettings
from deq_flow_ros.imaging import MediaError, frame_from_array
from deq_flow_ros.recordings.bags import BagWriter

SIDECAR = "scene.json"
"""File in the bag's directory with the settings of the scene, which give the exact flow between any two frames."""
TOPIC = "/camera/image_raw"
ExactFlow = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
"""Takes the stamps of two images and returns the flow (H, W, 2) px on the first one, and where it is visible (H, W)."""


def render_scene_bag(
    bag: Path, settings: SceneSettings, progress: Callable[[int], None], storage: str = "mcap"
) -> Scene:
    """Render the stream into a rosbag2 directory, unless the directory already holds this very stream.

    The frames are bgr8 images on ``TOPIC`` with the frame_id "camera". The bag appears complete or not at all. Another
    rendered scene is replaced.

    :param progress: called with the number of frames that are done.
    :raises MediaError: if the directory holds anything else, which is left alone, or if the bag cannot be written.
    """
    scene = Scene(settings)
    if bag.is_symlink() or bag.exists():
        try:
            if load_scene(bag) == settings:
                return scene
        except MediaError:
            pass  # written by another version, so it is rendered again
        if bag.is_symlink() or not (bag / SIDECAR).is_file():
            raise MediaError(
                f"the demo scene is to be rendered into {bag}, but that is not a rendered scene (not a directory with "
                f"{SIDECAR}) and is left alone; move it away, or choose another --out"
            )
        try:
            shutil.rmtree(bag)
        except OSError as error:
            raise MediaError(f"cannot replace the demo scene {bag}: {error}") from error
    # It is written under its own name in a directory beside, because the data file is named after the bag.
    nursery = bag.parent / f".partial-{os.getpid()}"
    partial = nursery / bag.name
    try:
        nursery.mkdir(parents=True, exist_ok=True)
        # Spawned, not forked, because a fork would copy locks that other threads of the caller hold.
        workers = min(4, os.cpu_count() or 1, settings.frames)
        spawn = multiprocessing.get_context("spawn")
        with BagWriter(partial, storage) as writer, ProcessPoolExecutor(workers, spawn) as pool:
            tasks = ((settings, number) for number in range(settings.frames))
            for number, image in enumerate(pool.map(_render, tasks, chunksize=4)):
                stamp_ns, bgr = settings.stamp_ns(number), cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
                writer.write_frame(TOPIC, frame_from_array(bgr, stamp_ns, stamp_ns, "camera"))
                progress(number + 1)
        (partial / SIDECAR).write_text(json.dumps(asdict(settings), indent=1))
        os.replace(partial, bag)
    except OSError as error:
        raise MediaError(f"cannot write the demo scene to {bag}: {error}") from error
    finally:
        shutil.rmtree(nursery, ignore_errors=True)
    return scene


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


@cache
def _scene(settings: SceneSettings) -> Scene:
    cv2.setNumThreads(1)
    return Scene(settings)


def _render(task: tuple[SceneSettings, int]) -> np.ndarray:
    settings, number = task
    return _scene(settings).render(number)


def exact_flow(bag: Path) -> ExactFlow | None:
    """The exact flow of a rendered bag; None for any other input."""
    settings = load_scene(bag) if bag.is_dir() else None
    if settings is None:
        return None
    scene = Scene(settings)
    numbers = {settings.stamp_ns(number): number for number in range(settings.frames)}
    return lambda here_ns, there_ns: scene.flow(numbers[here_ns], numbers[there_ns])
