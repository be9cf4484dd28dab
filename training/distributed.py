# SPDX-License-Identifier: Apache-2.0
"""Several processes that train one model: ``torchrun --nproc-per-node 4 -m training.train ...``, on any machines.

Every process takes its share of each batch; gradients are averaged by one explicit reduction per step. The objective
calls the model's parts, not its forward pass, so the hooks of DistributedDataParallel would not fit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; one alone by default.

    :ivar rank: 0 to count - 1; only rank 0 writes files.
    """

    rank: int = 0
    count: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of a batch, in order: the parts of all ranks put together are the batch.

        :raises ValueError: if it cannot be shared evenly; means over unequal parts would weigh samples differently.
        """
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


def join(device: str, patience: timedelta | None = None) -> tuple[Processes, torch.device]:
    """Join the processes that ``torchrun`` started, if it did; and this process's device.

    :param device: "cpu" or "cuda"; each process of a machine takes a GPU of its own.
    :param patience: how long a process waits for the others in an exchange; None is PyTorch's own limit of minutes.
    """
    if not dist.is_torchelastic_launched():
        return Processes(), torch.device(device)
    chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=patience)
    return Processes(dist.get_rank(), dist.get_world_size()), chosen


def leave() -> None:
    """End what ``join`` began."""
    if dist.is_initialized():
        dist.destroy_process_group()
