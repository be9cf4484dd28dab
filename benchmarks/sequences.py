# SPDX-License-Identifier: Apache-2.0
"""What benchmarks run on: pairs and sequences of images, recorded or generated, and the rendered drive."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from torch import Tensor

from benchmarks.peers import padded_pair
from benchmarks.report import Benchmark
from deq_flow_ros.demo.scene import Scene
from deq_flow_ros.equilibrium import State
from deq_flow_ros.imaging.camera import CameraModel
from deq_flow_ros.imaging.encodings import to_rgb
from deq_flow_ros.model import DEQFlow, crop, usable_levels
from deq_flow_ros.recordings import open_source
from deq_flow_ros.streaming import FlowEstimator, FlowResult
from deq_flow_ros.streaming.eager import COARSE_ITERATIONS, COARSE_LEVELS
from deq_flow_ros.streaming.fields import resize_field
from training.evaluate import pair_error
from training.flow_dataset import Sample, open_pairs, to_array
from training.generator import HELD_OUT_SEED, ProceduralGenerator

MOTIONS = {"slow": (0.5, 3.0), "fast": (8.0, 24.0)}
"""Smallest and largest typical displacement between two frames of a generated sequence, in px at a width of 320 px."""
CUTS = "cuts"
PATTERNS = 24  # textures in generated sequences
PERIOD_NS = 33_333_333  # of a camera at 30 Hz
CONFIG = Path(__file__).parents[1] / "config" / "perception.yaml"
EVERY = 3
"""Which frames of the drive the benchmarks of ``perception`` take: those at 10 Hz, the rate of its parameter file."""
CHECK_PX = 1.0
"""How far a point that is tracked forward and back may end from where it began."""


@dataclass(frozen=True)
class ImageSequence:
    """Pairs that follow each other: image 2 of one pair is image 1 of the next.

    :ivar group: sequences of one group are summarised together.
    :ivar first: index of the first pair to measure. Those before it lead up to it.
    """

    group: str
    pairs: list[Sample]
    first: int = 1

    @property
    def frames(self) -> list[np.ndarray]:
        """All frames, (H, W, 3) uint8 RGB each; there is one more frame than there are pairs."""
        return [self.pairs[0].image1, *(pair.image2 for pair in self.pairs)]


def moving_frames(path: str, count: int, skip: int = 0) -> list[np.ndarray]:
    """Frames of a source behind the first ``skip``, (H, W, 3) RGB each, without those that equal the one before.

    There are such in a video that was converted to a higher rate.

    :raises ValueError: if less than 3 are left.
    """
    frames: list[np.ndarray] = []
    for f in islice(open_source(path).frames(), skip, skip + count):
        frame = to_rgb(f.data, f.height, f.width, f.step, f.encoding, f.is_bigendian)
        if not frames or not np.array_equal(frames[-1], frame):
            frames.append(frame)
    if len(frames) < 3:
        after = f" after the first {skip}" if skip else ""
        wanted = f"at least 3 frames{after} that differ from the one before, for a pair with one before it"
        raise ValueError(f"{path}: expected {wanted}, got {len(frames)}")
    return frames


def recorded(path: str, count: int, size: tuple[int, int], skip: int = 0) -> ImageSequence:
    """As ``moving_frames``, for a video, bag or folder of images, made smaller to fit into ``size`` (H, W)."""
    name, images = Path(path).stem, pairwise(moving_frames(path, count, skip))
    return ImageSequence(name, [fitted(without_truth(f"{name}/{n}", *pair), size) for n, pair in enumerate(images)])


def listed(path: Path, size: tuple[int, int]) -> Iterator[ImageSequence]:
    """The sequences among the pairs of a list (docs/datasets.md), made smaller to fit into ``size`` (H, W)."""
    for group in open_pairs(path):
        for run in group.sequences():
            if len(run) > 1:
                yield ImageSequence(group.name, [fitted(group[index], size) for index in run])


def generated(count: int, frames: int, size: tuple[int, int]) -> Iterator[ImageSequence]:
    """``count`` procedural sequences of each kind in ``MOTIONS``, and as many with a cut, measured right behind it."""
    height, width = size
    clips = {}
    for name, (low, high) in MOTIONS.items():
        generator = ProceduralGenerator(
            height, width, frames=frames, seed=HELD_OUT_SEED, static_share=0.0,
            particle_share=0.0, fine_share=0.0,  # whose motion is not the one named
            patterns=PATTERNS, min_displacement_px=low * width / 320, max_displacement_px=high * width / 320,
        )  # fmt: skip
        clips[name] = [generator.pairs(name, n) for n in range(count)]
        yield from (ImageSequence(name, pairs) for pairs in clips[name])
    for n in range(count):
        before, after = clips["fast"][n], clips["slow"][n]
        if n % 2:
            before, after = after, before
        cut = without_truth(f"{CUTS}/{n}", before[-1].image2, after[0].image1)
        yield ImageSequence(CUTS, [*before, cut, after[0]], len(before) + 1)


def stream(model: DEQFlow, frames: Sequence[np.ndarray], **settings: Any) -> list[FlowResult | None]:
    """The result of each frame by an estimator with these settings; None where it began a new stream."""
    estimator = FlowEstimator(model, **{"tolerance_px": None, **settings})
    results = []
    for number, frame in enumerate(frames):
        estimator.prepare()
        results.append(estimator.update(frame, number * PERIOD_NS))
    return results


class EncodedPair:
    """An encoded pair of images: its fixed-point problem, its cold starts, and the flow of a state.

    :ivar sample: the images, with their true flow if it is known.
    :ivar problem: the flow is its fixed point.
    """

    def __init__(self, model: DEQFlow, sample: Sample) -> None:
        self.sample, self._model = sample, model
        self._padding, image1, image2 = padded_pair(sample.image1, sample.image2, model.device)
        self._first, second = model.encode(image1), model.encode(image2)
        self._images = image1, image2
        self.problem = model.problem(self._first, second)

    def zero(self) -> State:
        """The start with hidden state and flow zero."""
        return self._model.initial_state(self._first)

    def coarse(self, iterations: int = COARSE_ITERATIONS) -> State:
        """The start that the estimator uses for a pair without a predecessor.

        :param iterations: at each of the smaller resolutions.
        """
        levels = min(COARSE_LEVELS, usable_levels(*self._images[0].shape[-2:]))
        return self._model.coarse_start(*self._images, levels, iterations) or self.zero()

    def flow(self, state: State) -> Tensor:
        """The flow of a state at full resolution, (1, 2, H, W) px."""
        return crop(self._model.upsample(state), self._padding)

    def error(self, state: State, truth: Sample | None = None) -> float:
        """Mean endpoint error of a state's flow in px, against ``truth`` or else the truth of the sample."""
        return pair_error(truth or self.sample, to_array(self.flow(state)))


def without_truth(name: str, image1: np.ndarray, image2: np.ndarray) -> Sample:
    """A pair whose true flow is not known."""
    return Sample(name, image1, image2, None, np.zeros(image1.shape[:2], bool), None)


def fitted(pair: Sample, size: tuple[int, int]) -> Sample:
    """The pair and its true flow, made smaller to fit into ``size`` (H, W), in proportion; unchanged if it fits."""
    height, width = pair.image1.shape[:2]
    scale = min(size[0] / height, size[1] / width, 1.0)
    if scale == 1.0:
        return pair
    height, width = round(height * scale), round(width * scale)

    def smaller(field: np.ndarray) -> np.ndarray:
        return cv2.resize(field, (width, height), interpolation=cv2.INTER_AREA)

    # A pixel that any invalid one is part of would have a mean of its flow and of the zero that stands for none.
    valid = smaller(pair.valid.astype(np.float32)) > 0.999
    flow = None if pair.flow is None else resize_field(pair.flow, (height, width)) * valid[:, :, None]
    return replace(
        pair, image1=smaller(pair.image1), image2=smaller(pair.image2), flow=flow, valid=valid, occluded=None,
        alternatives=(),
    )  # fmt: skip


def perception_stream(model: DEQFlow, **changed: Any) -> FlowEstimator:
    """The estimator as ``flow_node`` runs it with ``config/perception.yaml``, without a latency budget.

    :param changed: settings of ``EstimatorSettings`` by name that are to be others than in the file.
    """
    given = yaml.safe_load(CONFIG.read_text())["/**"]["ros__parameters"]
    names = ("max_iterations", "min_scale", "max_scale", "refinement", "direction")
    settings = {name: given[name] for name in names} | changed
    return FlowEstimator(model, latency_budget_ms=None, tolerance_px=None, max_gap_ms=1e9, uncertainty=True, **settings)


def camera_of(scene: Scene) -> CameraModel:
    """The calibration of the rendered images."""
    width, height = scene.settings.width, scene.settings.height
    return CameraModel(scene.focal, scene.focal, (width - 1) / 2, (height - 1) / 2, width, height)


def klt(first: np.ndarray, second: np.ndarray, points: np.ndarray, window_px: int = 21) -> tuple[np.ndarray, ...]:
    """Points (N, 1, 2) float32 px of one grey image in another, by OpenCV, whose default window it is.

    :returns: where they are, (N, 1, 2) float32 px; how far from the start, (N,) px, they end when they are followed
        back, infinite where they are lost; and the mean difference (N,) of the windows in grey levels.
    """
    there, found, differ = cv2.calcOpticalFlowPyrLK(first, second, points, None, winSize=(window_px, window_px))
    back, found_back, _ = cv2.calcOpticalFlowPyrLK(second, first, there, None, winSize=(window_px, window_px))
    apart = np.linalg.norm(back - points, axis=2)[:, 0]
    lost = np.float32(np.inf)
    return there, np.where((found & found_back)[:, 0] == 1, apart, lost), np.where(found == 1, differ, lost)[:, 0]


def add_inputs(line: Benchmark, frames: int, size: tuple[int, int] = (240, 320)) -> None:
    """Add the options that choose the inputs, with these defaults."""
    line.add_pairs()
    line.add_argument("--sequence", nargs="+", default=[], help="videos, bags or folders of images")
    line.add_number("--frames", frames, "frames of each --sequence", least=3)
    line.add_number("--skip", 0, "so many frames of each at its beginning", least=0)
    line.add_size(*size, "images are made smaller to fit")


def recordings(options: argparse.Namespace) -> Iterator[ImageSequence]:
    """What ``--sequence`` names, see ``recorded``; ``ValueError`` if there are no other inputs either."""
    if not (options.pairs or options.sequence or getattr(options, "clips", 0)):
        others = ", or --clips above 0" if "clips" in options else ""
        raise ValueError(f"expected --pairs or --sequence{others}: without them there is nothing to measure")
    for path in options.sequence:
        yield recorded(path, options.frames, (options.height, options.width), options.skip)


def every_sequence(options: argparse.Namespace, frames: int) -> Iterator[ImageSequence]:
    """The sequences of ``--pairs`` and ``--sequence``, and ``--clips`` generated ones of each kind, ``frames`` long."""
    size = options.height, options.width
    yield from listed(options.pairs, size) if options.pairs else ()
    yield from recordings(options)
    yield from generated(options.clips, frames, size) if options.clips else ()
