# SPDX-License-Identifier: Apache-2.0
"""The few things that a graph engine asks of a device; all it knows of CUDA."""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")
WARM_UPS = 3
"""Calls before a capture: libraries choose their kernels, compilers compile, tensors of a size are made."""


class Done(Protocol):
    """A place in what is queued."""

    def query(self) -> bool:
        """Whether the device has got there."""

    def synchronize(self) -> None:
        """Wait until it has."""


@dataclass(frozen=True)
class Captured(Generic[T]):
    """A captured function.

    :ivar replay: queues all that it did, on the same tensors.
    :ivar outputs: what it returned: tensors that each replay writes anew.
    """

    replay: Callable[[], None]
    outputs: T


class GraphDevice(ABC):
    """Captures, replays, marks and page-locked memory of one device.

    :ivar device: as PyTorch calls it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @abstractmethod
    def pool(self) -> Any:
        """Memory that captures share which are never replayed at the same time."""

    @abstractmethod
    def capture(self, function: Callable[[], T], pool: Any) -> Captured[T]:
        """Capture a function that reads nothing on the host, has no shape that depends on values, and makes no memory
        of the host; it is called a few times before.
        """

    @abstractmethod
    def beside(self) -> AbstractContextManager[object]:
        """Within it, what is queued runs beside the other work: copies between the device and page-locked memory.

        Nothing but marks keeps the two in order. What is copied must not be memory of a pool, which other graphs use.
        """

    @abstractmethod
    def hold(self, mark: Done) -> None:
        """What is queued from now on waits for a mark, on the device. The host does not wait."""

    @abstractmethod
    def mark(self) -> Done:
        """The end of what is queued so far; within ``beside``, of what is queued there."""

    @abstractmethod
    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the host that the device copies to and from by itself; used again when nobody has it any more."""

    @abstractmethod
    def trim(self) -> None:
        """Give back memory that nobody uses, such as that of the calls before captures."""

    @abstractmethod
    def pause(self) -> None:
        """Let other threads of the host run before it looks again."""


class CudaDevice(GraphDevice):
    """A CUDA device, by PyTorch's graphs and events.

    Work is on the current stream of the thread, and copies are on another one.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._side = torch.cuda.Stream(device)  # one for all captures: memory of a pool is shared within a stream
        self._copies = torch.cuda.Stream(device)  # not that of the captures, which other threads make meanwhile

    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], T], pool: Any) -> Captured[T]:
        main, side = torch.cuda.current_stream(self.device), self._side
        side.wait_stream(main)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                function()
            side.synchronize()
            gc.collect()  # what it frees later might not be freed within a capture
            # Other threads go on with work of their own: a stream that has no graphs of its size yet, for one.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                outputs = function()
            finally:
                graph.capture_end()
        main.wait_stream(side)
        return Captured(graph.replay, outputs)

    def beside(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._copies)

    def hold(self, mark: Done) -> None:
        torch.cuda.current_stream(self.device).wait_event(cast(torch.cuda.Event, mark))

    def mark(self) -> Done:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def trim(self) -> None:
        torch.cuda.empty_cache()

    def pause(self) -> None:
        time.sleep(0)
