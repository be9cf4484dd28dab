# SPDX-License-Identifier: Apache-2.0
"""A device without a card: it captures on the CPU as strictly as CUDA does, and counts what costs time on one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deq_flow_ros.streaming.clock import Clock
from deq_flow_ros.streaming.costs import StageTimes
from deq_flow_ros.streaming.graphs import Captured, GraphDevice

T = TypeVar("T")
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


class CaptureError(AssertionError):
    """What CUDA would not have captured."""


def storages(values: Any) -> set[int]:
    """Of all tensors among them."""
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


class Tape(TorchDispatchMode):
    """The operations of a function, each with the tensors that it worked on.

    A replay is no call of the function: it repeats the operations on the same tensors, so that whatever the function
    took from Python is as it was when it was captured.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        if torch.Tag.data_dependent_output in func.tags:
            raise CaptureError(f"{name} reads a value on the host")
        masks = [t for t in tree_leaves(args[1:]) if isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8)]
        if name.startswith("aten.index.") and masks:
            raise CaptureError(f"{name} by a mask has a shape that depends on values")
        if torch.Tag.dynamic_output_shape in func.tags and not name.startswith("aten.index."):
            raise CaptureError(f"{name} has a shape that depends on values")
        if name.startswith("aten.lift_fresh") or kwargs.get("pin_memory"):
            raise CaptureError(f"{name} makes memory of the host")
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    def replay(self, write: Callable[[Tensor, Tensor], None]) -> None:
        """:param write: called for each copy, to and from."""
        for func, args, kwargs, results in self.operations:
            if str(func).startswith("aten.copy_."):
                write(args[0], args[1])
                continue
            again = func(*args, **kwargs)
            given = storages((args, kwargs))
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and not storages(old) & given:
                    old.copy_(new)


class FakeClock(Clock):
    """Time that passes when somebody lets it."""

    def __init__(self) -> None:
        self.time_ns = 10**9

    def now_ns(self) -> int:
        return self.time_ns

    def stages(self, device: torch.device, pixels: int) -> StageTimes:
        return FakeStages(self, self.fake)

    fake: FakeDevice


class FakeStages(StageTimes):
    """The device's times: a stage ends when what was queued for it has ended."""

    def __init__(self, clock: FakeClock, device: FakeDevice) -> None:
        self._clock, self._fake = clock, device
        self.begin(0)

    def begin(self, pixels: int) -> None:
        self._ends: list[tuple[str, int, int]] = []
        self.restart()

    def restart(self) -> None:
        self._start_ns = max(self._clock.time_ns, self._fake.busy_until_ns)

    def lap(self, name: str) -> None:
        before = self._start_ns
        self.restart()
        self._ends.append((name, before, self._start_ns))

    def read(self, wait: bool = True) -> dict[str, float]:
        times: dict[str, float] = {}
        for name, start_ns, end_ns in self._ends:
            if wait or end_ns <= self._clock.time_ns:
                times[name] = times.get(name, 0.0) + (end_ns - start_ns) / 1e6
        return times


class FakeDevice(GraphDevice):
    """See the module. Each replay takes the same time on the device, and a tenth of it on the host.

    :ivar waits: times that the host waited for the device.
    :ivar pauses: times that it looked in vain.
    :ivar pins: page-locked memories made.
    :ivar captures: graphs captured.
    """

    def __init__(self, replay_ms: float = 0.1) -> None:
        super().__init__(torch.device("cpu"))
        self.clock = FakeClock()
        self.clock.fake = self
        self.replay_ns = round(1e6 * replay_ms)
        self.busy_until_ns = 0
        self.waits = self.pauses = self.pins = self.captures = self.replays = 0
        self._pinned: set[int] = set()
        self._under_way: list[tuple[int, Tensor, Tensor]] = []  # what arrives when

    def pool(self) -> object:
        return object()

    def capture(self, function: Callable[[], T], pool: object) -> Captured[T]:
        function()
        self.captures += 1
        with no_reads(), Tape() as tape:
            outputs = function()
        self._arrive(2**62)
        return Captured(lambda: self._replay(tape), outputs)

    def _replay(self, tape: Tape) -> None:
        self.replays += 1
        self.clock.time_ns += self.replay_ns // 10
        self.busy_until_ns = max(self.busy_until_ns, self.clock.time_ns) + self.replay_ns
        tape.replay(self._write)
        self._arrive(self.clock.time_ns)

    def _write(self, to: Tensor, values: Tensor) -> None:
        if storages(to) & self._pinned:
            self._under_way.append((self.busy_until_ns, to, values.clone()))
        else:
            to.copy_(values)

    def _arrive(self, until_ns: int) -> None:
        for item in [item for item in self._under_way if item[0] <= until_ns]:
            item[1].copy_(item[2])
            self._under_way.remove(item)

    def mark(self) -> FakeMark:
        return FakeMark(self, self.busy_until_ns)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.pins += 1
        memory = torch.zeros(tuple(shape), dtype=dtype)
        self._pinned |= storages(memory)
        return memory

    def trim(self) -> None:
        pass

    def pause(self) -> None:
        self.pauses += 1
        self.clock.time_ns += 10_000
        self._arrive(self.clock.time_ns)


class FakeMark:
    """See ``Done``."""

    def __init__(self, device: FakeDevice, at_ns: int) -> None:
        self._device, self._at_ns = device, at_ns

    def query(self) -> bool:
        return self._at_ns <= self._device.clock.time_ns

    def synchronize(self) -> None:
        self._device.waits += 1
        self._device.clock.time_ns = max(self._device.clock.time_ns, self._at_ns)
        self._device._arrive(self._device.clock.time_ns)


@contextmanager
def no_reads() -> Iterator[None]:
    """Within it this thread reads no value: also not in ways that no operation tells of."""
    thread = threading.get_ident()
    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            true = getattr(Tensor, name)

            def refuse(tensor: Tensor, *arguments: Any, name: str = name, true: Any = true) -> Any:
                if threading.get_ident() == thread:
                    raise CaptureError(f"Tensor.{name} reads a value on the host")
                return true(tensor, *arguments)

            patch.setattr(Tensor, name, refuse)
        yield
