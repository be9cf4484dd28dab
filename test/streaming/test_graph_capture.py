# SPDX-License-Identifier: Apache-2.0
"""What is captured works on the device alone, and nothing but copies is between the graphs of a frame.

Shown on PyTorch's device "meta", whose tensors have shapes and types but no values. Code takes the way there that it
takes on CUDA, nothing can be read, host and device cannot be mistaken for each other, and any size is quick.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import pytest
import torch
from fake_capture import CaptureError, check_capturable, reachable
from streams import PERIOD_NS, frames
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deq_flow_ros.model import load_model
from deq_flow_ros.streaming import FlowEstimator
from deq_flow_ros.streaming.capture import Captured, GraphDevice, Parts
from deq_flow_ros.streaming.fields import FIGURES
from deq_flow_ros.streaming.graph_engine import GraphEngine
from deq_flow_ros.streaming.workspace import Size, Workspace

T = TypeVar("T")
META = torch.device("meta")
FULL_HD = (1080, 1920)


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks for other types here, and PyTorch cannot say so of this device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


class MetaDevice(GraphDevice):
    """Captures nothing, but watches what is called, within ``watched``; all that is copied to the host is a good pair.

    :ivar calls: operations besides those that are captured, if they write to memory of the device, or make some.
    :ivar peak: bytes of the device that were in use at most.
    """

    def __init__(self) -> None:
        self.device = META
        self.calls: Counter[str] = Counter()
        self.peak = 0
        self._capturing = self._beside = False
        self._page_locked: list[weakref.ref[Tensor]] = []
        self._used: dict[int, tuple[StorageWeakRef, int]] = {}

    def watched(self) -> TorchDispatchMode:
        return _Watch(self._call)

    @property
    def used(self) -> int:
        """Bytes of the device that are in use."""
        self._used = {place: known for place, known in self._used.items() if not known[0].expired()}
        return sum(size for _, size in self._used.values())

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.removeprefix("aten::")
        given = _tensors((args, kwargs))
        hosts = [tensor for tensor in given if tensor.device != META]
        if self._capturing:
            check_capturable(func, args, kwargs)
        down = name == "copy_" and len(hosts) == 1 and hosts[0] is given[0]
        if hosts and len(hosts) < len(given):
            page_locked = any(hosts[0] is memory() for memory in self._page_locked)
            if name != "copy_" or not page_locked or not (self._beside or (self._capturing and down)):
                raise CaptureError(f"{name} works on host and device")
        if down:
            _arrive(hosts[0])
            return hosts[0]
        result = func(*args, **kwargs)
        made = [tensor for tensor in _tensors(result) if tensor.device == META]
        if self._capturing and len(made) < len(_tensors(result)):
            raise CaptureError(f"{name} makes memory of the host")
        self._count(name, made)
        return result

    def _count(self, name: str, made: Sequence[Tensor]) -> None:
        new = False
        for storage in (tensor.untyped_storage() for tensor in made):
            known = self._used.get(storage._cdata)
            if known is None or known[0].expired():
                self._used[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                new = new or storage.nbytes() > 0
        if new:
            self.peak = max(self.peak, self.used)
        if not self._capturing and (new or name.endswith("_")):
            self.calls[name] += 1

    def pool(self) -> None:
        return None

    def capture(self, function: Callable[[], T], pool: object) -> Captured[T]:
        self._capturing = True
        outputs = function()
        self._capturing = False
        return Captured(lambda: None, outputs)

    @contextmanager
    def beside(self) -> Iterator[None]:
        self._beside = True
        yield
        self._beside = False

    def hold(self, mark: object) -> None:
        pass

    def mark(self) -> Any:
        return _Mark()

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        memory = torch.ones(tuple(shape), dtype=dtype)
        self._page_locked.append(weakref.ref(memory))
        return memory

    def trim(self) -> None:
        pass

    def pause(self) -> None:
        pass


class _Watch(TorchDispatchMode):
    def __init__(self, call: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self._call = call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._call(func, args, kwargs or {})


class _Mark:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _arrive(host: Tensor) -> None:
    """What the device may say of a pair: alike, three iterations, neither converged nor diverged."""
    host.fill_(1)
    if host.dim() == 2 and host.shape[1] > FIGURES:
        host[:, -FIGURES:] = torch.tensor([3.0, 0.5, 0.0, 0.0, 1.0])


def make_engine(name: str, size: tuple[int, int]) -> tuple[GraphEngine, MetaDevice]:
    """Whose graphs are ready, in half precision."""
    device = MetaDevice()
    engine = GraphEngine(load_model(name).half().to(META), device=device, behind=False)
    with device.watched():
        engine.make_ready(size, size)
    assert engine.about == "graphs of 1 size(s)"
    return engine, device


@pytest.mark.parametrize(("name", "size"), [("nano", FULL_HD), ("base", (96, 128))])
def test_captured_code_reads_and_makes_nothing_on_the_host(name: str, size: tuple[int, int]) -> None:
    """Why: a card would refuse to capture it, or wait at each replay; at 1920x1080 nano must fit a small card too."""
    _, device = make_engine(name, size)
    assert 1e6 < device.peak < 1.5e9


def test_between_its_graphs_a_frame_only_copies() -> None:
    """Why: each operation of its own costs its launch, and memory made for each frame would fill the card."""
    size = (96, 128)
    engine, device = make_engine("nano", size)
    space = engine._shelf.get(Size(size, size, 1))
    fixed = list(reachable(space))
    estimator, used = FlowEstimator(engine, max_iterations=3, tolerance_px=None), []
    with device.watched():
        for i, image in enumerate(frames(6, *size)):
            device.calls.clear()
            result = estimator.update(image, i * PERIOD_NS)
            estimator.prepare()
            used.append(device.used)
    assert result is not None and result.info.warm and result.info.runtime == "graphs"
    # The image as it comes; the encoded pair, and twice where its solve begins; the tolerance and the direction. What
    # the stream keeps: its last image and its state, as found and as carried along.
    assert device.calls == {"copy_": 1 + 3 + 4, "fill_": 2, "clone": 3 + 4}
    assert len(set(used[2:])) == 1
    assert sorted(map(id, fixed)) == sorted(map(id, reachable(space))), "graphs know addresses alone"


def test_parts_compile_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why: a part that cannot be traced as a whole costs the card what compiling gains; found out there alone.

    Traced as for a card, without the compiler behind it, which takes a minute.
    """
    for name in ("_match", "_report"):  # captured as they are
        monkeypatch.setattr(Workspace, name, lambda self: None)
    model = load_model("nano").half().to(META)
    with torch.inference_mode():
        space = Workspace(model, MetaDevice(), Size(FULL_HD, FULL_HD, 1), Parts.compiled(backend="eager"))
    assert space.runtime == "compiled"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x * torch.ones(3),
        lambda x: x.to("cpu"),
        lambda x: torch.zeros(2),
        lambda x: x[x > 0],
        lambda x: torch.ones(3).copy_(x),
        lambda x: float(x[0]),
    ],
)
def test_the_device_of_these_tests_refuses_what_cuda_would(wrong: Callable[[Tensor], object]) -> None:
    """Why: what it let pass would be found on a card only."""
    device, x = MetaDevice(), torch.ones(3, device=META)
    with device.watched(), pytest.raises((CaptureError, RuntimeError, NotImplementedError)):
        device.capture(lambda: wrong(x), None)
