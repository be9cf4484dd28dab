# SPDX-License-Identifier: Apache-2.0
"""What a run trains on, by number: generated clips, or augmented pairs of a mix of data sets.

A sample is a function of the seed and its number alone, so that a run resumes at any of them without stored state. The
augmentation is that of RAFT (arXiv 2003.12039, supplement), with the values of its published code as defaults.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Annotated

import cv2
import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch.utils.data import DataLoader, Dataset

from training.datasets import open_dataset
from training.flow_dataset import Clip, FlowDataset, Sample, leaves_image, open_pairs
from training.generator import ProceduralGenerator
from training.recipe import PAIRS, SYNTHETIC, Recipe, Source
from training.settings import CHECKED, Count, Float, NotNegative, RecipeError, SceneSettings, Share, build

ERASED_SIDE_PX = (50, 100)  # least and largest side of an erased rectangle
HEADROOM = 1.25  # in the choice of workers: steps and clips vary in time; the faster of them must not wait


@dataclass(frozen=True, config=CHECKED)
class Augmentation:
    """Random changes of colour and geometry; ``augmentation(sample, rng)`` gives a sample of the size of the crop.

    What leaves the crop is occluded as well.

    :raises ValueError: for settings outside their ranges, and for a sample without true flow.
    """

    crop: tuple[Count, Count]  # height, width in px; images that are smaller are scaled up to it
    # The flow is known at some pixels only: each vector is moved to the nearest pixel. Dense flow is interpolated, and
    # valid where everything that goes into it is.
    sparse: bool = False
    min_scale: Annotated[Float, Field(ge=-4, le=4)] = -0.2  # binary logarithm of the least and largest change of size
    max_scale: Annotated[Float, Field(ge=-4, le=4)] = 0.5
    spatial_probability: Share = 0.8  # that size and shape are changed at all
    stretch: Annotated[NotNegative, Field(le=4)] = 0.2  # further change of width and of height, as binary logarithm
    stretch_probability: Share = 0.8
    horizontal_flip: Share = 0.5  # probabilities
    vertical_flip: Share = 0.1
    brightness: Share = 0.4  # largest relative changes
    contrast: Share = 0.4
    saturation: Share = 0.4
    hue: Annotated[NotNegative, Field(le=0.5)] = 0.5 / math.pi  # largest change, 1 is the full circle
    asymmetric_probability: Share = 0.2  # that the two images change their colours independently of each other
    eraser_probability: Share = 0.5  # that one or two rectangles of image 2 get its mean colour

    def __post_init__(self) -> None:
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale: expected at most max_scale, {self.max_scale}, got {self.min_scale}")

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The changed sample; everything random comes from ``rng``."""
        if sample.flow is None:
            raise ValueError(f"{sample.name} has no ground truth to train on")
        if rng.random() < self.eraser_probability:
            sample = replace(sample, image2=_erase(sample.image2, rng))
        sample = self._move(sample, rng)
        if rng.random() < self.asymmetric_probability:
            image1, image2 = self._recolour(sample.image1, rng), self._recolour(sample.image2, rng)
        else:
            image1, image2 = np.split(self._recolour(np.concatenate([sample.image1, sample.image2]), rng), 2)
        return replace(sample, image1=image1, image2=image2)

    def _move(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Scale, flip and crop in one step, so that each pixel is interpolated once."""
        assert sample.flow is not None
        size, extent, scale = np.array(sample.valid.shape[::-1]), np.array(self.crop[::-1]), np.ones(2)
        if rng.random() < self.spatial_probability:
            scale *= 2 ** rng.uniform(self.min_scale, self.max_scale)
            if rng.random() < self.stretch_probability:
                scale *= 2 ** rng.uniform(-self.stretch, self.stretch, 2)
        scale = np.maximum(scale, max(extent / size))  # what the crop needs
        sign = np.where(rng.random(2) < (self.horizontal_flip, self.vertical_flip), -1.0, 1.0)
        room = scale * size - extent + 1e-6  # never less than the crop but for rounding
        corner = rng.integers(0, np.floor(np.maximum(room, 0)).astype(int) + 1)
        # A pixel p of the crop comes from p * step + start: centres of pixels are at whole numbers, borders half-way.
        step = sign / scale
        start = (np.where(sign > 0, corner, corner + extent - 1) + 0.5) / scale - 0.5
        matrix = np.array([[step[0], 0, start[0]], [0, step[1], start[1]]])

        def resampled(array: np.ndarray) -> np.ndarray:
            flags, border = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, cv2.BORDER_REPLICATE
            return cv2.warpAffine(array, matrix, self.crop[::-1], flags=flags, borderMode=border)

        hidden = np.zeros_like(sample.valid) if sample.occluded is None else sample.occluded
        if self.sparse:  # each vector to the nearest pixel; of several that meet, the last one stays
            rows, columns = np.nonzero(sample.valid)
            x, y = np.rint((np.stack([columns, rows]) - start[:, None]) / step[:, None]).astype(int)
            inside = (x >= 0) & (y >= 0) & (x < extent[0]) & (y < extent[1])
            source, target = (rows[inside], columns[inside]), (y[inside], x[inside])
            flow, valid, occluded = np.zeros((*self.crop, 2), np.float32), *np.zeros((2, *self.crop), bool)
            flow[target], valid[target], occluded[target] = sample.flow[source], True, hidden[source]
        else:
            flow = resampled(np.where(sample.valid[:, :, None], sample.flow, np.float32(0)))  # NaN must not spread
            valid, occluded = resampled(np.uint8(255) * sample.valid) == 255, resampled(np.uint8(255) * hidden) > 127
        flow = np.where(valid[:, :, None], flow * (scale * sign).astype(np.float32), np.float32(0))
        seen = None if sample.occluded is None else occluded | leaves_image(flow)
        return Sample(sample.name, resampled(sample.image1), resampled(sample.image2), flow, valid, seen)

    def _recolour(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Brightness, contrast, saturation and hue of (H, W, 3) uint8, in random order."""
        colours = image.astype(np.float32) / 255
        for change in rng.permutation(("brightness", "contrast", "saturation", "hue")):
            reach = getattr(self, change)
            if change == "hue":
                hsv = cv2.cvtColor(colours, cv2.COLOR_RGB2HSV)
                hsv[:, :, 0] = (hsv[:, :, 0] + 360 * rng.uniform(-reach, reach)) % 360
                colours = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
                continue
            grey = cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY)
            middle = {"brightness": 0, "contrast": grey.mean(), "saturation": grey[:, :, None]}[change]
            factor = np.float32(rng.uniform(1 - reach, 1 + reach))
            colours = np.clip(factor * colours + (1 - factor) * middle, 0, 1)
        return np.rint(colours * 255).astype(np.uint8)


def _erase(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    erased = image.copy()
    for _ in range(rng.integers(1, 3)):
        left, top = rng.integers(0, image.shape[1::-1])
        across, down = rng.integers(ERASED_SIDE_PX[0], ERASED_SIDE_PX[1] + 1, 2)
        erased[top : top + down, left : left + across] = np.rint(image.mean(axis=(0, 1)))
    return erased


_ACROSS, _DOWN = -1, -2  # the axes of x and y
_MIRRORED = ((), (_ACROSS,), (_DOWN,), (_ACROSS, _DOWN))
_COLOURS = torch.tensor(list(itertools.permutations(range(3)))[1:])


def transform(clip: Clip, use: int) -> Clip:
    """The clip for its ``use``-th use: 0 is the clip itself, then horizontally, vertically and doubly mirrored.

    Nothing is resampled. From the second use on the colour channels are exchanged, as the clip's numbers decide.

    :param use: 0 to ``USES`` - 1.
    """
    if use == 0:
        return clip
    assert clip.numbers is not None
    axes = _MIRRORED[use]
    draws = [int(np.random.default_rng([number, use]).integers(len(_COLOURS))) for number in clip.numbers.tolist()]
    order = _COLOURS[draws].to(clip.images.device)
    signs = clip.flow.new_tensor([-1.0 if axis in axes else 1.0 for axis in (_ACROSS, _DOWN)]).view(2, 1, 1)
    return Clip(
        images=clip.images.gather(2, order.view(-1, 1, 3, 1, 1).expand_as(clip.images)).flip(axes),
        flow=clip.flow.flip(axes) * signs, occluded=clip.occluded.flip(axes), valid=clip.valid.flip(axes),
        numbers=clip.numbers,
    )  # fmt: skip


class Clips(Dataset[Clip]):
    """Generated clips; the index is a list of their numbers."""

    def __init__(self, generator: ProceduralGenerator) -> None:
        self._generator = generator

    def __getitem__(self, numbers: Sequence[int]) -> Clip:
        clip = self._generator.clips(numbers)
        clip.images = clip.images.round().clamp(0, 255).byte()  # as cameras give them, a quarter of the memory
        return clip


class Mix(Dataset[Clip]):
    """Augmented pairs of several data sets; the index is a list of sample numbers.

    A pass over the mix has every pair ``repeat`` times, in an order of its own (as RAFT, arXiv 2003.12039).
    """

    def __init__(self, parts: Sequence[tuple[FlowDataset, Augmentation, int]], seed: int, max_flow_px: float) -> None:
        self._pairs = [(data, change, i) for data, change, repeat in parts for i in [*range(len(data))] * repeat]
        self._seed, self._max_flow_px = seed, max_flow_px
        self._order: tuple[int, np.ndarray] = -1, np.zeros(0, np.int64)

    def __getitem__(self, numbers: Sequence[int]) -> Clip:
        clip = Clip.join([to_clip(self.sample(number), self._max_flow_px) for number in numbers])
        clip.numbers = torch.tensor(list(numbers))
        return clip

    def sample(self, number: int) -> Sample:
        """The pair with this number (>= 0), augmented."""
        epoch, position = divmod(number, len(self._pairs))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self._seed, epoch, 1]).permutation(len(self._pairs))
        dataset, augmentation, index = self._pairs[self._order[1][position]]
        return augmentation(dataset[index], np.random.default_rng([self._seed, number]))


def to_clip(sample: Sample, max_flow_px: float = np.inf) -> Clip:
    """A pair as a batch of one clip of two frames, uint8 until they are on the device.

    Flow of ``max_flow_px`` and more is invalid. What moves out of the frame is occluded, whatever the data set says.
    """
    assert sample.flow is not None  # else its augmentation refused it
    valid = sample.valid & (np.hypot(sample.flow[..., 0], sample.flow[..., 1]) < max_flow_px)
    flow, occluded = np.where(valid[..., None], sample.flow, np.float32(0)), leaves_image(sample.flow)
    if sample.occluded is not None:
        occluded |= sample.occluded
    images = np.stack([sample.image1, sample.image2]).transpose(0, 3, 1, 2)
    arrays = images, flow.transpose(2, 0, 1)[None], occluded[None], valid[None]
    return Clip(*(torch.from_numpy(np.ascontiguousarray(array))[None] for array in arrays))


def make_generator(recipe: Recipe, seed: int) -> ProceduralGenerator:
    """The generator that the recipe describes."""
    data = recipe.data
    shared = {name: value for name, value in vars(data).items() if name in SceneSettings.__dataclass_fields__}
    return ProceduralGenerator(*data.crop, textures=data.textures, seed=seed, **shared)


def open_source(recipe: Recipe, source: Source) -> list[FlowDataset]:
    """The data sets of a source, of a list one per group; ``RecipeError`` for no folder or an unknown option."""
    root = recipe.root(source.dataset)
    if root is None:
        raise RecipeError(f"where is the data set {source.dataset}? Give its folder: --data {source.dataset}=FOLDER")
    if source.dataset == PAIRS:
        return list(open_pairs(root))
    try:
        return [open_dataset(source.dataset, root, split=source.split, **source.options)]
    except TypeError as error:
        raise RecipeError(f"options of {source.dataset}: {error}") from error


def training_samples(recipe: Recipe) -> Clips | Mix:
    """What the recipe trains on. Clips are made on the CPU beside a GPU, too: they would take the trainer's time."""
    data = recipe.data
    if data.sources[0].dataset == SYNTHETIC:
        return Clips(make_generator(recipe, recipe.seed))
    parts = []
    for source in data.sources:
        for dataset in open_source(recipe, source):
            settings = {"crop": data.crop, "sparse": dataset.sparse, **source.augmentation}
            try:
                parts.append((dataset, build(Augmentation, settings), source.repeat))
            except RecipeError as error:
                raise RecipeError(f"augmentation of {source.dataset}: {error}") from None
    return Mix(parts, recipe.seed, data.max_flow_px)


def choose_workers(making: float, training: float, spare: int) -> int:
    """How many workers of ``spare`` ones keep up, by the seconds to make and to train on a batch, all uses together."""
    return min(spare, math.ceil(HEADROOM * making / max(training, 1e-6)))


def spare_cores(threads: int) -> int:
    """Cores left for workers of this process, which uses so many threads."""
    return max(0, len(os.sched_getaffinity(0)) - threads)


def load_ahead(samples: Dataset[Clip], first: int, batch: int, workers: int) -> Generator[Clip, None, None]:
    """Batches of samples, in order from number ``first`` on; ``close`` ends the workers at once.

    :param workers: processes that make them, two of each ahead; 0: each is made when it is asked for.
    """
    # Before the workers fork, and not in them: a copy of OpenCV's thread pool without its threads waits for ever.
    cv2.setNumThreads(0)
    others = set(multiprocessing.active_children())
    batches = iter(
        DataLoader(
            samples, batch_size=None, sampler=(range(n, n + batch) for n in itertools.count(first, batch)),
            num_workers=workers, worker_init_fn=_begin_worker,
        )
    )  # fmt: skip
    processes = set(multiprocessing.active_children()) - others
    try:
        yield from batches
    finally:
        for process in processes:  # PyTorch would let them finish the batches in hand, which takes seconds
            process.terminate()


def _begin_worker(_: int) -> None:
    # A signal to the process group must not take the clip away that the last step waits for.
    os.setpgrp()
