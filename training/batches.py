# SPDX-License-Identifier: Apache-2.0
"""The samples of a run, by number: generated clips, or pairs of a mix of data sets; and the processes that make them.

Which sample a number stands for, and how it is augmented, is a function of the seed and the number alone, so that a run
resumes at any sample without stored state.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.synchronize import Event

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from training.augmentation import Augmentation
from training.datasets import FlowDataset, Sample, open_dataset
from training.flow_dataset import leaves_image
from training.generator import ProceduralGenerator
from training.pairs import open_pairs
from training.recipe import PAIRS, Recipe, Source
from training.rendering import Clip
from training.settings import RecipeError, build


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

    One pass over the mix has every pair of a source ``repeat`` times, in an order of its own (as RAFT, arXiv
    2003.12039).
    """

    def __init__(self, parts: Sequence[tuple[FlowDataset, Augmentation, int]], seed: int, max_flow_px: float) -> None:
        self._parts, self._seed, self._max_flow_px = parts, seed, max_flow_px
        self._starts = np.cumsum([0, *(len(dataset) * repeat for dataset, _, repeat in parts)])
        self._order: tuple[int, np.ndarray] = -1, np.zeros(0, np.int64)

    def __getitem__(self, numbers: Sequence[int]) -> Clip:
        return to_clip([self.sample(number) for number in numbers], self._max_flow_px)

    def sample(self, number: int) -> Sample:
        """The pair with this number (>= 0), augmented."""
        epoch, position = divmod(number, int(self._starts[-1]))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self._seed, epoch, 1]).permutation(self._starts[-1])
        place = self._order[1][position]
        part = int(np.searchsorted(self._starts, place, "right")) - 1
        dataset, augmentation, _ = self._parts[part]
        index = int(place - self._starts[part]) % len(dataset)
        return augmentation(dataset[index], np.random.default_rng([self._seed, number]))


def to_clip(samples: Sequence[Sample], max_flow_px: float = np.inf) -> Clip:
    """Pairs of one size as clips of two frames, (B, 2, 3, H, W) uint8 until they are on the device.

    Flow of ``max_flow_px`` and more is invalid. What moves out of the frame counts as occluded even where the data set
    does not say so: its match cannot be seen.
    """
    flows, valids, hidden = [], [], []
    for sample in samples:
        assert sample.flow is not None  # else its augmentation refused it
        valid = sample.valid & (np.hypot(sample.flow[..., 0], sample.flow[..., 1]) < max_flow_px)
        outside = leaves_image(sample.flow)
        flows.append(np.where(valid[..., None], sample.flow, 0).astype(np.float32))
        valids.append(valid)
        hidden.append(outside if sample.occluded is None else outside | sample.occluded)
    images = np.stack([[sample.image1, sample.image2] for sample in samples])
    return Clip(
        images=torch.from_numpy(images).permute(0, 1, 4, 2, 3).contiguous(),
        flow=torch.from_numpy(np.stack(flows)).permute(0, 3, 1, 2).unsqueeze(1).contiguous(),
        occluded=torch.from_numpy(np.stack(hidden)).unsqueeze(1),
        valid=torch.from_numpy(np.stack(valids)).unsqueeze(1),
    )


def make_generator(recipe: Recipe, seed: int) -> ProceduralGenerator:
    """The generator that the recipe describes."""
    names = (
        "textures", "frames", "max_displacement_px", "patterns", "max_layers", "particle_share", "fine_share",
        "photometric",
    )  # fmt: skip
    return ProceduralGenerator(*recipe.data.crop, seed=seed, **{name: getattr(recipe.data, name) for name in names})


def open_source(recipe: Recipe, source: Source) -> list[FlowDataset]:
    """The data sets of a source; a list of pairs has one per group.

    :raises RecipeError: if nobody said where it lies, or it does not know an option.
    """
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
    """What the recipe trains on.

    Clips are made on the CPU beside a GPU, too: the many small kernels of the generator would take the trainer's time.
    """
    data = recipe.data
    if data.synthetic:
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


AHEAD = 2  # batches that each worker has ready or in the making
HEADROOM = 1.25  # steps and clips vary in time; the faster of them must not wait


@contextmanager
def loading(samples: Clips | Mix, batches: Iterable[Sequence[int]], workers: int) -> Iterator[Callable[[], Clip]]:
    """What gives the batches of these sample numbers, in order; the end of the context ends the workers.

    :param batches: sample numbers of each batch; may be endless.
    :param workers: processes that make them ahead; with 0 a batch is made when it is asked for.
    """
    # Before the workers fork, and not in them: a copy of OpenCV's thread pool without its threads waits for ever.
    # The workers are the parallelism.
    cv2.setNumThreads(0)
    stop = multiprocessing.Event()
    loader = DataLoader(
        _Stoppable(samples, stop) if workers else samples, batch_size=None, sampler=batches, num_workers=workers,
        prefetch_factor=AHEAD if workers else None, worker_init_fn=_begin_worker,
    )  # fmt: skip
    running = [iter(loader)]
    try:
        yield lambda: next(running[0])
    finally:
        stop.set()
        running.clear()  # PyTorch ends the workers with it


class _Stoppable(Dataset[Clip | None]):
    """Samples that are made one by one, until all are to stop: a large batch takes longer than an end may."""

    def __init__(self, samples: Clips | Mix, stop: Event) -> None:
        self._samples, self._stop = samples, stop

    def __getitem__(self, numbers: Sequence[int]) -> Clip | None:
        parts = []
        for number in numbers:
            if self._stop.is_set():
                return None
            parts.append(self._samples[[number]])
        return Clip.join(parts)


def choose_workers(making: float, training: float, spare: int) -> int:
    """The number of workers that keeps the training from waiting, as far as there are cores.

    :param making: seconds that one batch takes to make.
    :param training: seconds that are trained on it, all its uses together.
    :param spare: cores that the training does not use.
    """
    return min(spare, math.ceil(HEADROOM * making / max(training, 1e-6)))


def spare_cores(threads: int) -> int:
    """Cores that are left for workers of this process.

    :param threads: what each training process uses; those that ``torchrun`` started on this machine share its cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - threads)


def _begin_worker(_: int) -> None:
    # A signal to the process group must not take the clip away that the last step waits for; one from the trainer, when
    # it ends, must be heard.
    os.setpgrp()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
