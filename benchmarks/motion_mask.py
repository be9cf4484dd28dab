# SPDX-License-Identifier: Apache-2.0
"""How well what moves by itself is told from what the camera moves, on the rendered drive.

``python -m benchmarks.motion_mask [--max-scale 2.0] [--plot OUT] [--json OUT]``

The flow is that of the shipped model with the parameters of ``config/perception.yaml``, through the stream, frame by
frame at 10 Hz. Beside it, with the same segmentation, are DIS flow, and sparse points tracked by KLT, each of which
stands for the pixels nearest to it. Neither knows its uncertainty; of the limits 0.5, 1, 2 and 4 px for
them, the best is shown.

A body counts as moving in a pair of frames if it covers 0.5 % of the image, and half of its pixels move by 0.5 px or
more by themselves. Smaller and slower ones are left out: they count neither for nor against. Precision, recall and IoU
are those of all pixels of all pairs together. The last columns are the recall by body.
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import cv2
import numpy as np
from rich.console import Console

from benchmarks.report import Benchmark, Row, picture, print_table
from benchmarks.sequences import CHECK_PX, EVERY, camera_of, klt, perception_stream
from deq_flow_ros.demo.scene import Scene, SceneSettings
from deq_flow_ros.evaluation.methods import dense_inverse_search
from deq_flow_ros.model import choose_precision, load_model
from deq_flow_ros.perception.motion_mask import MaskSettings, MotionSegmenter

BODIES = ("ball", "pendulum", "cart", "truck", "cube")
"""What moves in the scene, in the order of its numbers, which are the last ones."""
LEAST_AREA, LEAST_MOTION_PX = 0.005, 0.5
"""Of a moving body: as a share of the image, and between the two frames."""
SHOWN = 4
"""Pairs in the picture."""
SPACING, REACH = 5, 12
"""Of tracked points, px: the least distance between two, and how far from one its motion is taken to hold."""
LIMITS_PX = (0.5, 1.0, 2.0, 4.0)
SHOWN_PX = 1.0
Field = tuple[np.ndarray, np.ndarray]
"""Flow (H, W, 2) px and its uncertainty (H, W) px."""


def sparse(here: np.ndarray, there: np.ndarray) -> Field:
    """KLT points: each pixel moves as the nearest point does; NaN farther than ``REACH`` from all of them."""
    first, second = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (here, there))
    points = cv2.goodFeaturesToTrack(first, 4000, 0.005, SPACING)
    tracked, apart, _ = klt(first, second, points)
    kept = apart < CHECK_PX
    motion, cells = (tracked - points)[kept, 0], np.rint(points[kept, 0]).astype(int)
    seeds = np.ones(first.shape, np.uint8)
    seeds[cells[:, 1], cells[:, 0]] = 0
    distance, labels = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    of_label = np.full((labels.max() + 1, 2), np.nan, np.float32)
    of_label[labels[cells[:, 1], cells[:, 0]]] = motion
    flow = np.where((distance < REACH)[..., None], of_label[labels], np.float32(np.nan))
    return flow, np.zeros(first.shape, np.float32)


def truth(scene: Scene, here: int, there: int) -> tuple[np.ndarray, np.ndarray]:
    """What moves by itself from frame ``here`` to frame ``there``.

    :returns: the number (H, W) of the body in ``BODIES``, counted from 1, 0 where nothing moves; and where nothing
        counts (H, W).
    """
    motion, owner = scene.own_motion(here, there)
    numbers, ignored = np.zeros(owner.shape, np.int8), np.zeros(owner.shape, bool)
    for number, body in enumerate(range(scene.body_count - len(BODIES), scene.body_count), 1):
        shown = owner == body
        counts = shown.mean() >= LEAST_AREA and np.median(motion[shown]) >= LEAST_MOTION_PX
        numbers[shown & counts] = number
        ignored |= shown & ~counts
    return numbers, ignored


def counts(mask: np.ndarray, numbers: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Pixels right, wrong and missed, then found and all of each body."""
    true, bodies = numbers > 0, range(1, len(BODIES) + 1)
    first = [(mask & true).sum(), (mask & ~true & ~ignored).sum(), (~mask & true).sum()]
    found = [(mask & (numbers == body)).sum() for body in bodies]
    return np.array([*first, *found, *((numbers == body).sum() for body in bodies)])


def figures_of(total: np.ndarray) -> Row:
    """IoU, precision, recall, and the recall of each body that there was."""
    right, wrong, missed = (float(value) for value in total[:3])
    found, there = np.split(total[3:], 2)
    return {
        "IoU": right / max(1.0, right + wrong + missed), "precision": right / max(1.0, right + wrong),
        "recall": right / max(1.0, right + missed),
        **{f"recall {name}": float(a / b) for name, a, b in zip(BODIES, found, there, strict=True) if b},
    }  # fmt: skip


def outlined(image: np.ndarray, mask: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The image with the mask in red, and the outline of what truly moves in green."""
    shown = image.copy()
    shown[mask] = 0.5 * shown[mask] + (127, 0, 0)
    outlines, _ = cv2.findContours((numbers > 0).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(shown, outlines, -1, (60, 255, 60), 1)


def run(options: argparse.Namespace, console: Console) -> Row:
    """Measure, and draw what ``--plot`` asks for."""
    settings = SceneSettings(frames=options.frames)
    scene, dis = Scene(settings), dense_inverse_search()
    segmenter = MotionSegmenter((settings.height, settings.width), camera_of(scene))
    model = load_model(options.model, options.device, precision=choose_precision("auto", options.device))
    estimator = perception_stream(model, max_scale=options.max_scale)
    totals: dict[tuple[str, float], np.ndarray] = {}
    shown: list[tuple[str, np.ndarray]] = []
    images = {number: scene.render(number) for number in range(0, settings.frames, EVERY)}
    estimator.update(images[0], settings.stamp_ns(0))
    for there, here in pairwise(images):
        image, result = images[here], estimator.update(images[here], settings.stamp_ns(here))
        if result is None or result.uncertainty is None:
            continue
        numbers, ignored = truth(scene, here, there)
        fields: dict[str, Field] = {options.model: (result.flow, result.uncertainty)}
        fields |= {"KLT points": sparse(image, images[there])}
        fields |= {"DIS medium": (dis(image, images[there]), np.zeros_like(result.uncertainty))}
        for method, field in fields.items():
            for limit in LIMITS_PX[: 1 if method == options.model else None]:
                found = segmenter(*field, MaskSettings(min_motion_px=limit))
                mask = found.mask & (found.problem == "")  # the node publishes none then
                totals[method, limit] = totals.get((method, limit), 0) + counts(mask, numbers, ignored)
                if method == options.model or (method == "KLT points" and limit == SHOWN_PX):
                    words = "no mask" if found.problem else f"{len(found.boxes)} regions"
                    shown.append((f"{method}: frame {here}, {words}", outlined(image, mask, numbers)))
    figures: dict[str, Row] = {}
    for (method, limit), total in totals.items():
        row = {"method": method, **figures_of(total), "min_motion_px": limit}
        figures[method] = max(figures.get(method, row), row, key=lambda each: each["IoU"])
    columns = {name: "{method}" if name == "method" else f"{{{name}:.3f}}" for name in figures[options.model]}
    title = f"one in {EVERY} of {settings.frames} frames, {settings.width}x{settings.height}"
    print_table(console, title, columns, figures.values())
    if options.plot:
        step = max(1, len(shown) // 2 // SHOWN)
        chosen = range(step // 2, len(shown) // 2, step)[:SHOWN]
        with picture(options.plot, 10.0, 4.4) as figure:
            for pair, axes in zip(chosen, figure.subplots(2, SHOWN, squeeze=False).T, strict=False):
                for (words, image), place in zip(shown[2 * pair :], axes, strict=False):
                    place.imshow(image)
                    place.set_title(words, fontsize=7)
                    place.axis("off")
    return {"figures": figures}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__, plot="masks and truth on some frames", threads=1)
    line.add_number("--frames", 180, "of the drive, which has 30 a second", least=4)
    line.add_number("--max-scale", 2.0, "scale of the images that the flow is computed at", least=0.25)
    line.add_model()
    return line.run(line.parse_args(arguments), run)


if __name__ == "__main__":
    raise SystemExit(main())
