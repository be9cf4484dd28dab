# SPDX-License-Identifier: Apache-2.0
"""A device without a card: it captures on the CPU as strictly as CUDA does, and counts what costs time on one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from fake_capture import Tape, no_reads, scribble, storages
from streams import PERIOD_NS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deq_flow_ros.model import DEQFlow
from deq_flow_ros.streaming import EagerEngine, FlowEstimator, FlowResult
from deq_flow_ros.streaming.capture import Captured, GraphDevice
from deq_flow_ros.streaming.clock import Clock
from deq_flow_ros.streaming.costs import StageTimes
from deq_flow_ros.streaming.graph_engine import GraphEngine

T = TypeVar("T")


class Race(AssertionError):
    """A copy beside other work of something that this work writes, or that other graphs use."""


class FakeClock(Clock):
    """Time that passes when somebody lets it."""

    def __init__(self) -> None:
        self.time_ns = 10**9

    def now_ns(self) -> int:
        return self.time_ns

    def stages(self, device: torch.device) -> StageTimes:
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

    Copies beside take time too, at their end. They raise ``Race`` where only luck keeps them apart from other work.

    :ivar waits: times that the host waited for the device.
    :ivar pauses: times that it looked in vain.
    :ivar pins: page-locked memories made.
    :ivar captures: graphs captured.
    :ivar copied: bytes copied beside, to the device and to the host.
    :ivar overlap_ns: time in which replays ran beside copies.
    """

    def __init__(self, replay_ms: float = 0.1, copy_ms: float = 0.03) -> None:
        self.device = torch.device("cpu")
        self.clock = FakeClock()
        self.clock.fake = self
        self.replay_ns, self.copy_ns = round(1e6 * replay_ms), round(1e6 * copy_ms)
        self.waits = self.pauses = self.pins = self.captures = self.replays = self.overlap_ns = 0
        self.copied = [0, 0]
        self._queues = [0, 0]  # until when work is queued, and copies beside
        self._beside = 0
        self._page_locked: list[weakref.ref[Tensor]] = []
        self._tapes: list[weakref.ref[Tape]] = []
        self._used_until: dict[int, int] = {}  # storages, by replays
        self._copies: list[tuple[int, int, set[int], set[int]]] = []  # begin, end, read, written
        self._under_way: list[tuple[int, Tensor, Tensor]] = []  # to the host: what arrives when
        self._uploads: list[tuple[int, Tensor, Tensor]] = []  # to the device

    @property
    def busy_until_ns(self) -> int:
        """Until when something is queued where the next work or, ``beside``, the next copy goes."""
        return self._queues[self._beside]

    def pool(self) -> object:
        return object()

    def capture(self, function: Callable[[], T], pool: object) -> Captured[T]:
        function()
        self.captures += 1
        with no_reads(), Tape() as tape:
            outputs = function()
        self._arrive(2**62)
        self._tapes.append(weakref.ref(tape))
        scribble(tape.scratch(None))  # CUDA computes nothing yet
        scratch = tape.scratch(outputs)
        return Captured(lambda: self._replay(tape, scratch), outputs)

    def _replay(self, tape: Tape, scratch: list[Tensor]) -> None:
        self.replays += 1
        self.clock.time_ns += self.replay_ns // 10
        begin = max(self._queues[0], self.clock.time_ns)
        self._queues[0] = end = begin + self.replay_ns
        self._upload(begin)
        for from_ns, until_ns, read, written in self._copies:
            # Before a copy, or at the same time: nothing but time keeps it from what is used here.
            if until_ns > begin and (written & tape.used or read & tape.written):
                raise Race("a graph works on what is being copied")
            self.overlap_ns += max(0, min(until_ns, end) - max(from_ns, begin))
        self._copies = [copy for copy in self._copies if copy[1] > begin]
        self._used_until.update(dict.fromkeys(tape.used, end))
        tape.replay(self._write)
        scribble(scratch)
        self._arrive(self.clock.time_ns)

    def _write(self, to: Tensor, values: Tensor) -> None:
        if not storages(to).isdisjoint(self._pinned):
            self._under_way.append((self._queues[0], to, values.clone()))
        else:
            to.copy_(values)

    def _arrive(self, until_ns: int) -> None:
        for item in [item for item in self._under_way if item[0] <= until_ns]:
            item[1].copy_(item[2])
            self._under_way.remove(item)

    def _upload(self, until_ns: int) -> None:
        for item in [item for item in self._uploads if item[0] <= until_ns]:
            item[1].copy_(item[2])  # what is in the memory of the host by now
            self._uploads.remove(item)

    @contextmanager
    def beside(self) -> Iterator[None]:
        self._beside = 1
        with _Copies(self._copy):
            yield
        self._beside = 0

    def _copy(self, to: Tensor, source: Tensor) -> None:
        up = bool(storages(source) & self._pinned)
        on_device, on_host = (to, source) if up else (source, to)
        assert storages(on_host) <= self._pinned, "only page-locked memory is copied without a wait"
        begin = max(self._queues[1], self.clock.time_ns)
        self._queues[1] = end = begin + self.copy_ns
        if any(storages(on_device) & tape.made for tape in self._alive(self._tapes)):
            raise Race("what is copied is memory of a pool, which other graphs use")
        if any(self._used_until.get(storage, 0) > begin for storage in storages(on_device)):
            raise Race("what is copied is still worked on")
        self.copied[0 if up else 1] += to.nbytes
        nothing: set[int] = set()
        self._copies.append((begin, end, *((nothing, storages(to)) if up else (storages(source), nothing))))
        (self._uploads if up else self._under_way).append((end, to, source if up else source.clone()))

    def hold(self, mark: FakeMark) -> None:
        self._queues[self._beside] = max(self._queues[self._beside], mark.at_ns)

    def mark(self) -> FakeMark:
        return FakeMark(self, self.busy_until_ns)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.pins += 1
        memory = torch.zeros(tuple(shape), dtype=dtype)
        self._page_locked.append(weakref.ref(memory))
        return memory

    @property
    def page_locked(self) -> int:
        """How many memories of the host are in use, or kept."""
        return len(self._alive(self._page_locked))

    @property
    def _pinned(self) -> set[int]:
        return storages(self._alive(self._page_locked))

    def _alive(self, references: list[weakref.ref[Any]]) -> list[Any]:
        """What is still there; addresses of the rest may be those of other memory by now."""
        references[:] = [reference for reference in references if reference() is not None]
        return [reference() for reference in references]

    def trim(self) -> None:
        pass

    def pause(self) -> None:
        self.pauses += 1
        self.clock.time_ns += 10_000
        self._arrive(self.clock.time_ns)


class _Copies(TorchDispatchMode):
    """Copies are not made, but handed over."""

    def __init__(self, copy: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._copy = copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("aten.copy_."):
            self._copy(args[0], args[1])
            return args[0]
        return func(*args, **(kwargs or {}))


class FakeMark:
    """A place in what is queued, as ``torch.cuda.Event`` is."""

    def __init__(self, device: FakeDevice, at_ns: int) -> None:
        self._device, self.at_ns = device, at_ns

    def query(self) -> bool:
        return self.at_ns <= self._device.clock.time_ns

    def synchronize(self) -> None:
        self._device.waits += 1
        self._device.clock.time_ns = max(self._device.clock.time_ns, self.at_ns)
        self._device._arrive(self._device.clock.time_ns)


def make_engine(model: DEQFlow) -> tuple[GraphEngine, FakeDevice]:
    device = FakeDevice()
    return GraphEngine(model, device.clock, device, behind=False), device


def stream(engine: EagerEngine, images: list[np.ndarray], **settings: object) -> list[FlowResult]:
    estimator = FlowEstimator(engine, **{"max_iterations": 3, **settings})
    results = []
    for i, image in enumerate(images):
        results.append(estimator.update(image, i * PERIOD_NS))
        estimator.prepare()
    return [result for result in results if result is not None]


def assert_same(got: list[FlowResult], expected: list[FlowResult]) -> None:
    assert len(got) == len(expected) > 0
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one.flow, other.flow, atol=1e-5 * max(1.0, np.abs(other.flow).max()))
        np.testing.assert_allclose(one.residual, other.residual, atol=1e-5, rtol=1e-4)
        assert one.info.iterations == other.info.iterations and one.info.stop_reason == other.info.stop_reason
        assert one.info.warm == other.info.warm and one.info.scale == other.info.scale
        assert one.info.residual_px == pytest.approx(other.info.residual_px, rel=1e-3)
