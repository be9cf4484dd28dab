# SPDX-License-Identifier: Apache-2.0
"""Worker processes that make samples ahead of the training, and how many of them it takes."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.synchronize import Event
from types import TracebackType

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from training.batches import Clips, Mix
from training.rendering import Clip

AHEAD = 2  # batches that each worker has ready or in the making
HEADROOM = 1.25  # steps and clips vary in time; the faster of them must not wait


class Loader:
    """The batches of these sample numbers, in order. A context manager: its end ends the workers.

    :param batches: sample numbers of each batch; may be endless.
    :param workers: processes that make them ahead; with 0 a batch is made when it is asked for.
    """

    def __init__(self, samples: Clips | Mix, batches: Iterable[Sequence[int]], workers: int) -> None:
        # Before the workers fork, and not in them: a copy of OpenCV's thread pool without its threads waits for ever.
        # The workers are the parallelism.
        cv2.setNumThreads(0)
        self._stop = multiprocessing.Event()
        self._batches = DataLoader(
            _Stoppable(samples, self._stop) if workers else samples,
            batch_size=None,
            sampler=batches,
            num_workers=workers,
            prefetch_factor=AHEAD if workers else None,
            worker_init_fn=_begin_worker,
        )
        self._iterator: Iterator[Clip] | None = iter(self._batches)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Clip:
        assert self._iterator is not None, "the loader is closed"
        return next(self._iterator)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._iterator = None  # PyTorch ends the workers with it


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
        known = [name for name, tensor in vars(parts[0]).items() if tensor is not None]
        return Clip(**{name: torch.cat([getattr(part, name) for part in parts]) for name in known})


def choose_workers(making: float, training: float, spare: int) -> int:
    """The number of workers that keeps the training from waiting, as far as there are cores.

    :param making: seconds that one batch takes to make.
    :param training: seconds that are trained on it, all its uses together.
    :param spare: cores that the training does not use.
    """
    return min(spare, math.ceil(HEADROOM * making / max(training, 1e-6)))


def spare_cores(threads: int) -> int:
    """Cores that are left for workers of this process.

    :param threads: what each training process uses; those that `torchrun` started on this machine share its cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - threads)


def _begin_worker(_: int) -> None:
    # A signal to the process group must not take the clip away that the last step waits for; one from the trainer, when
    # it ends, must be heard.
    os.setpgrp()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
