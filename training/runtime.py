# SPDX-License-Identifier: Apache-2.0
"""What a run needs of the machine: processes, workers that make samples ahead, its log, how long it has taken.

``torchrun --nproc-per-node 4 -m training.train ...`` starts several processes, on any machines. Every process takes its
share of each batch; gradients are averaged by one explicit reduction per step. The objective calls the model's parts,
not its forward pass, so the hooks of DistributedDataParallel would not fit.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from deq_flow_ros.host import replacing
from training.rendering import Clip

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; one alone by default."""

    rank: int = 0
    count: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of a batch, in order; ``ValueError`` if it cannot be shared evenly."""
        if len(items) % self.count:
            raise ValueError(f"data.batch: expected a multiple of the {self.count} processes, got {len(items)}")
        size = len(items) // self.count
        return items[self.rank * size : (self.rank + 1) * size]

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their mean over the processes, in one reduction."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.count
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(mean.view_as(tensor))

    def largest(self, value: float, device: torch.device) -> float:
        """The largest value of all processes."""
        if self.count == 1:
            return value
        together = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(together, dist.ReduceOp.MAX)
        return together.item()

    def gather(self, item: T) -> list[T]:
        """The items of all processes, by rank."""
        items: list[T | None] = [item] * self.count
        if self.count > 1:
            dist.all_gather_object(items, item)
        return [item for item in items if item is not None]

    def from_first(self, item: T) -> T:
        """What rank 0 has: files of a run may be on its machine alone."""
        items = [item]
        if self.count > 1:
            dist.broadcast_object_list(items, src=0)
        return items[0]


@contextmanager
def joined(device: str, patience: timedelta | None = None) -> Iterator[tuple[Processes, torch.device]]:
    """Join the processes that ``torchrun`` started, if it did: them, and this process's device.

    :param device: "cpu" or "cuda"; each process of a machine takes a GPU of its own.
    :param patience: how long a process waits for the others in an exchange; None is PyTorch's own limit of minutes.
    """
    if not dist.is_torchelastic_launched():
        yield Processes(), torch.device(device)
        return
    chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=patience)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size()), chosen
    finally:
        dist.destroy_process_group()


AHEAD = 2  # batches that each worker has ready or in the making
HEADROOM = 1.25  # steps and clips vary in time; the faster of them must not wait


@contextmanager
def loading(samples: Dataset[Clip], batches: Iterable[Sequence[int]], workers: int) -> Iterator[Callable[[], Clip]]:
    """What gives the batches of these sample numbers, in order; the end of the context ends the workers.

    :param batches: sample numbers of each; may be endless.
    :param workers: processes that make them ahead; 0: each is made when it is asked for.
    """
    # Before the workers fork, and not in them: a copy of OpenCV's thread pool without its threads waits for ever.
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

    def __init__(self, samples: Dataset[Clip], stop: Event) -> None:
        self._samples, self._stop = samples, stop

    def __getitem__(self, numbers: Sequence[int]) -> Clip | None:
        parts = []
        for number in numbers:
            if self._stop.is_set():
                return None
            parts.append(self._samples[[number]])
        return Clip.join(parts)


def choose_workers(making: float, training: float, spare: int) -> int:
    """The number of workers that keeps the training from waiting, as far as there are ``spare`` cores.

    :param making, training: seconds that one batch takes to make, and to train on, all its uses together.
    """
    return min(spare, math.ceil(HEADROOM * making / max(training, 1e-6)))


def spare_cores(threads: int) -> int:
    """Cores left for workers of this process; it and those that ``torchrun`` started here use ``threads`` each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - threads)


def _begin_worker(_: int) -> None:
    # A signal to the process group must not take the clip away that the last step waits for; one from the trainer, when
    # it ends, must be heard.
    os.setpgrp()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


SHOWN = ("epe_cold", "epe_warm", "matching", "waiting")


class Log:
    """The figures of a run: ``log.jsonl``, TensorBoard, and a bar of running means. Not ``active``, it does nothing.

    :param step, total: where the run stands, and where it ends; None if it is the time that ends it.
    :param every: steps from one line of their means to the next.
    """

    def __init__(
        self, out: Path, step: int, total: int | None, every: int, tensorboard: bool, active: bool = True
    ) -> None:
        self._active, self._every = active, every
        self._since_last: list[dict[str, float]] = []
        self._running: dict[str, float] = {}
        self._board = None
        if not active:
            return
        out.mkdir(parents=True, exist_ok=True)
        self._file = (out / "log.jsonl").open("a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step)
        self._bar = tqdm(
            total=total, initial=step, unit="step", mininterval=2, dynamic_ncols=True, disable=None, file=sys.stderr
        )

    def step(self, step: int, figures: dict[str, float], counts: dict[str, float], left: str = "") -> None:
        """The ``figures`` of a step, of which means are written; ``counts``, as they are; the time left, in words."""
        if not self._active:
            return
        self._since_last.append(figures)
        self._running = {k: v + 0.98 * (self._running.get(k, v) - v) for k, v in figures.items()}
        self._bar.update()
        shown = {k: f"{self._running[k]:.3g}" for k in SHOWN if k in self._running}
        self._bar.set_postfix(shown | ({"left": left} if left else {}), refresh=False)
        if step % self._every == 0:
            means = {k: float(np.mean([entry[k] for entry in self._since_last])) for k in figures}
            self._since_last = []
            self._write({"step": step, **counts, **{k: float(f"{v:.7g}") for k, v in means.items()}})
            self._scalars("training", step, means | counts)

    def validation(self, step: int, errors: dict[str, float], best: bool, picture: np.ndarray | None) -> None:
        """Endpoint errors in px per set, whether they are the best so far, and a picture (H, W, 3) uint8 RGB."""
        if not self._active:
            return
        self._write({"step": step, "validation": {k: round(v, 4) for k, v in errors.items()}, "best": best})
        self._scalars("validation", step, errors)
        if self._board is not None and picture is not None:
            self._board.add_image("validation/first pair: image, truth, flow, error", picture, step, dataformats="HWC")
        text = "  ".join(f"{name} {error:.2f}" for name, error in errors.items())
        self._bar.write(f"step {step}  endpoint error, px: {text}{'  (best so far)' if best else ''}", file=sys.stdout)

    def close(self) -> None:
        """End the bar, and close the files."""
        if not self._active:
            return
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def _scalars(self, group: str, step: int, figures: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{group}/{name}", value, step)


FILE = "seconds.txt"


def keep_seconds(out: Path, seconds: float) -> None:
    """Write the time of a run into its folder; a run that is killed has taken longer than its last checkpoint says."""
    # A full disk is for the next checkpoint to report; the time is in there, too.
    with suppress(OSError), replacing(out / FILE, flush=False) as temporary:
        temporary.write_text(f"{seconds:.2f}\n")


def kept_seconds(out: Path) -> float:
    """The time that was last written into the folder of a run; 0 if none was, or if it cannot be read."""
    try:
        return float((out / FILE).read_text())
    except (OSError, ValueError):
        return 0.0


def process_age() -> float:
    """Seconds since this process was started: importing PyTorch alone takes some. 0 where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
