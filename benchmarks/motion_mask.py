# SPDX-License-Identifier: Apache-2.0
"""How well what moves by itself is told from what the camera moves, on the rendered drive.

``python -m benchmarks.motion_mask [--every 3] [--max-scale 2.0] [--plot OUT] [--recording VIDEO] [--json OUT]``

The flow is that of the shipped model with the parameters of ``config/perception.yaml``, through the stream, frame by
frame. Beside it, with the same segmentation, are DIS flow, and sparse points tracked by KLT, each of which stands for
the pixels nearest to it. Neither knows its uncertainty; of the limits ``LIMITS_PX`` for them, the best is shown.

A body counts as moving in a pair of frames if it covers 0.5 % of the image, and half of its pixels move by 0.5 px or
more by themselves. Smaller and slower ones are left out: they count neither for nor against. Precision, recall and IoU
are those of all pixels of all pairs together. The last columns are the recall by body.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import pairwise

import cv2
import numpy as np
from rich.console import Console

from benchmarks.report import Benchmark, Row, picture, print_table
from benchmarks.sequences import CHECK_PX, PERIOD_NS, camera_of, klt, moving_frames, perception_stream
from deq_flow_ros.demo.scene import Scene, SceneSettings
from deq_flow_ros.evaluation.methods import dense_inverse_search
from deq_flow_ros.model import choose_precision, load_model
from deq_flow_ros.perception.motion_mask import MaskSettings, MotionMask, MotionSegmenter
from deq_flow_ros.streaming import FlowEstimator

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


def stream(options: argparse.Namespace) -> FlowEstimator:
    """With the precision that ``flow_node`` chooses, and the scale asked for."""
    model = load_model(options.model, options.device, precision=choose_precision("auto", options.device))
    return perception_stream(model, max_scale=options.max_scale)


def sparse(here: np.ndarray, there: np.ndarray) -> Field:
    """KLT points: each pixel moves as the nearest point does; NaN farther than ``REACH`` from all of them."""
    first, second = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (here, there))
    flow = np.full((*first.shape, 2), np.nan, np.float32)
    points = cv2.goodFeaturesToTrack(first, 4000, 0.005, SPACING)
    if points is not None:
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
    bodies = scene.body_count - len(BODIES)
    for body in range(len(BODIES)):
        shown = owner == bodies + body
        counts = shown.mean() >= LEAST_AREA and np.median(motion[shown]) >= LEAST_MOTION_PX
        numbers[shown & counts] = body + 1
        ignored |= shown & ~counts
    return numbers, ignored


def pairs(scene: Scene, options: argparse.Namespace) -> Iterator[tuple[int, int, dict[str, Field], np.ndarray]]:
    """Frames ``here`` and ``there`` (the one before), the flow of each method between them, and the image of here."""
    estimator, settings = stream(options), scene.settings
    numbers = range(0, settings.frames, options.every)
    images, dis = {numbers[0]: scene.render(numbers[0])}, dense_inverse_search()
    estimator.update(images[numbers[0]], settings.stamp_ns(numbers[0]))
    for there, here in pairwise(numbers):
        images = {there: images[there], here: scene.render(here)}
        result = estimator.update(images[here], settings.stamp_ns(here))
        if result is not None and result.uncertainty is not None:
            both = images[here], images[there]
            fields = {options.model: (result.flow, result.uncertainty), "KLT points": sparse(*both)}
            yield here, there, fields | {"DIS medium": (dis(*both), np.zeros_like(result.uncertainty))}, images[here]


def counts(mask: np.ndarray, numbers: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Pixels right, wrong and missed, then found and all of each body."""
    true = numbers > 0
    first = [(mask & true).sum(), (mask & ~true & ~ignored).sum(), (~mask & true).sum()]
    bodies = range(1, len(BODIES) + 1)
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


def outlined(image: np.ndarray, mask: np.ndarray, numbers: np.ndarray | None = None) -> np.ndarray:
    """The image with the mask in red, and the outline of what truly moves in green."""
    shown = image.copy()
    shown[mask] = 0.5 * shown[mask] + (127, 0, 0)
    if numbers is not None:
        outlines, _ = cv2.findContours((numbers > 0).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(shown, outlines, -1, (60, 255, 60), 1)
    return shown


def recorded(options: argparse.Namespace) -> list[tuple[str, np.ndarray]]:
    """Pictures of a recording without calibration and truth, with what was found in it."""
    if not options.recording:
        return []
    frames = moving_frames(options.recording, options.recording_frames, options.recording_start)[:: options.every]
    width = min(640, frames[0].shape[1])
    frames = [cv2.resize(f, (width, round(width * f.shape[0] / f.shape[1]) // 8 * 8)) for f in frames]
    options.max_scale = 1.0 if width >= 640 else options.max_scale
    estimator, shown = stream(options), []
    for number, image in enumerate(frames):
        result = estimator.update(image, number * options.every * PERIOD_NS)
        if result is not None and result.uncertainty is not None:
            found = MotionSegmenter(image.shape[:2], None)(result.flow, result.uncertainty, MaskSettings())
            shown.append((_words(found), outlined(image, found.mask)))
    return shown[:: max(1, len(shown) // 2)][-2:]


def _words(found: MotionMask) -> str:
    motion = found.ego_motion
    if found.problem or motion is None:
        return "not to be trusted, no mask"
    return f"{motion.model}, {len(found.boxes)} regions"


def run(options: argparse.Namespace, console: Console) -> Row:
    """Measure, and draw what ``--plot`` asks for."""
    scene = Scene(SceneSettings(width=options.width, height=options.height, frames=options.frames))
    segmenter = MotionSegmenter((options.height, options.width), camera_of(scene))
    totals: dict[tuple[str, float], np.ndarray] = {}
    shown: list[tuple[str, np.ndarray]] = []
    for here, there, fields, image in pairs(scene, options):
        numbers, ignored = truth(scene, here, there)
        for method, (flow, uncertainty) in fields.items():
            for limit in LIMITS_PX[: 1 if method == options.model else None]:
                found = segmenter(flow, uncertainty, MaskSettings(min_motion_px=limit))
                mask = found.mask & (found.problem == "")  # the node publishes none then
                totals[method, limit] = totals.get((method, limit), 0) + counts(mask, numbers, ignored)
                if method != "DIS medium" and limit == (LIMITS_PX[0] if method == options.model else SHOWN_PX):
                    shown.append((f"{method}: frame {here}, {_words(found)}", outlined(image, mask, numbers)))
    figures: dict[str, Row] = {}
    for (method, limit), total in totals.items():
        row = {"method": method, **figures_of(total), "min_motion_px": limit}
        figures[method] = max(figures.get(method, row), row, key=lambda each: each["IoU"])
    columns = {name: "{method}" if name == "method" else f"{{{name}:.3f}}" for name in figures[options.model]}
    title = f"every {options.every}. of {options.frames} frames, {options.width}x{options.height}"
    print_table(console, title, columns, figures.values())
    if options.plot:
        step = max(1, len(shown) // 2 // SHOWN)
        chosen = [n for n in range(step // 2, len(shown) // 2, step)][:SHOWN]
        extra = recorded(options)
        with picture(options.plot, 10.0, 4.4 + 3.0 * bool(extra)) as figure:
            grid = figure.add_gridspec(2 + bool(extra), SHOWN)
            places = [(grid[row, n], shown[2 * pair + row]) for row in (0, 1) for n, pair in enumerate(chosen)]
            places += [(grid[2, 2 * n : 2 * n + 2], each) for n, each in enumerate(extra)]
            for place, (words, image) in places:
                axes = figure.add_subplot(place)
                axes.imshow(image)
                axes.set_title(words, fontsize=7)
                axes.axis("off")
    return {"figures": figures}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__, plot="masks and truth on some frames", threads=1)
    line.add_size(240, 320, "of the rendered frames")
    line.add_number("--frames", 180, "of the drive, which has 30 a second", least=2)
    line.add_number("--every", 3, "take every so many-th frame: 3 is 10 Hz", least=1)
    line.add_number("--max-scale", 2.0, "scale of the images that the flow is computed at", least=0.25)
    line.add_argument("--recording", default="", help="a video, bag or folder of images, for the picture alone")
    line.add_number("--recording-frames", 60, "of it", least=6)
    line.add_number("--recording-start", 0, "its first frame", least=0)
    line.add_model()
    return line.run(line.parse_args(arguments), run)


if __name__ == "__main__":
    raise SystemExit(main())
