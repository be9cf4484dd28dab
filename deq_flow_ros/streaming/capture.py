# SPDX-License-Identifier: Apache-2.0
"""What is captured of a computation, as it is or compiled, and all that a graph engine knows of CUDA."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from deq_flow_ros.equilibrium import Rules, Samples, State
from deq_flow_ros.model import DEQFlow, Encoding, FlowProblem, pad_to_multiple, update_px
from deq_flow_ros.model.cells import carry_by

T = TypeVar("T")
WARM_UPS = 3
"""Calls before a capture: libraries choose their kernels, compilers compile, tensors of a size are made."""
_numbers = itertools.count()


@dataclass(frozen=True)
class Captured(Generic[T]):
    """A captured function."""

    replay: Callable[[], None]  # queues all that it did, on the same tensors
    outputs: T  # what it returned: tensors that each replay writes anew


class GraphDevice:
    """Captures, replays, marks and page-locked memory of a CUDA device, by PyTorch's graphs and events.

    Work is on the current stream of the thread, and copies are on another one. Tests have devices of their own.

    :ivar device: as PyTorch calls it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device)  # one for all captures: memory of a pool is shared within a stream
        self._copies = torch.cuda.Stream(device)  # not that of the captures, which other threads make meanwhile

    def pool(self) -> Any:
        """Memory that captures share which are never replayed at the same time."""
        return torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], T], pool: Any) -> Captured[T]:
        """Capture a function that reads nothing on the host, has no shape that depends on values, and makes no memory
        of the host; it is called a few times before.
        """
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
        """Within it, what is queued runs beside the other work: copies between the device and page-locked memory.

        Nothing but marks keeps the two in order. What is copied must not be memory of a pool, which other graphs use.
        """
        return torch.cuda.stream(self._copies)

    def hold(self, mark: torch.cuda.Event) -> None:
        """What is queued from now on waits for a mark, on the device. The host does not wait."""
        torch.cuda.current_stream(self.device).wait_event(mark)

    def mark(self) -> torch.cuda.Event:
        """The end of what is queued so far; within ``beside``, of what is queued there."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the host that the device copies to and from by itself; used again when nobody has it any more."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def trim(self) -> None:
        """Give back memory that nobody uses, such as that of the calls before captures."""
        torch.cuda.empty_cache()

    def pause(self) -> None:
        """Let other threads of the host run before it looks again."""
        time.sleep(0)


def encode(model: DEQFlow, pixels: Tensor) -> tuple[Encoding, Tensor]:
    """An encoding of (B, H, W, 3) uint8 RGB, and the images that it is of, scaled and padded."""
    padded, _ = pad_to_multiple(pixels.permute(0, 3, 1, 2).float())
    return model.encode(padded), padded


def move(state: State, sign: Tensor) -> State:
    """``carry`` in a direction that a replay can change: forward by a sign of 1, backward by -1."""
    return carry_by(state, sign * state[1])


def iterate(problem: FlowProblem, rules: Rules, samples: Samples) -> None:
    """One iteration of Picard, all decisions on samples included; what is known of them is written over."""
    z = samples.value
    fz = problem(z[0], z[1])
    after = rules.account(samples, z, fz, update_px(z, fz))
    for old, new in zip(tensors(samples), tensors(after), strict=True):
        if old is not new:
            old.copy_(new)


def tensors(samples: Samples) -> list[Tensor]:
    """All of them once: Picard's answer is its last value."""
    flat = [*samples.point, *samples.value, *samples[4:]]
    return [tensor for tensor in flat if isinstance(tensor, Tensor)]


@dataclass(frozen=True)
class Parts:
    """The functions above, as they are or compiled; ``name`` is that of the runtime that they make."""

    encode: Callable[[DEQFlow, Tensor], tuple[Encoding, Tensor]] = encode
    move: Callable[[State, Tensor], State] = move
    iterate: Callable[[FlowProblem, Rules, Samples], None] = iterate
    name: str = "graphs"

    @classmethod
    def compiled(cls, **settings: Any) -> Parts:
        """Each compiled for one size of its inputs, with settings of ``torch.compile``."""

        def compiled(part: Callable[..., Any]) -> Callable[..., Any]:
            # A code of its own: PyTorch compiles one code for a few sizes, and refuses further ones.
            code = part.__code__.replace(co_name=f"{part.__name__}_{next(_numbers)}")
            return torch.compile(FunctionType(code, part.__globals__), dynamic=False, fullgraph=True, **settings)

        return cls(compiled(encode), compiled(move), compiled(iterate), "compiled")
