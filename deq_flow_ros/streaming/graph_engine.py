# SPDX-License-Identifier: Apache-2.0
"""The engine for a GPU, where launching operations one by one takes most of the time: it queues captured graphs."""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from deq_flow_ros.equilibrium import Pace, Solution, State, StopReason
from deq_flow_ros.model import DEQFlow, Encoding
from deq_flow_ros.streaming.capture import GraphDevice, Parts
from deq_flow_ros.streaming.clock import MACHINE, Clock
from deq_flow_ros.streaming.eager import EagerEngine, EncodedImage, Pair, Slot, sample
from deq_flow_ros.streaming.fields import paint, resize_image, unpack
from deq_flow_ros.streaming.interface import Likeness, Palette, Solved, Wanted
from deq_flow_ros.streaming.plan import Limits
from deq_flow_ros.streaming.workspace import Size, Workspace

KEPT = 6
"""Workspaces at most: the sizes that a stream changes between. The one not asked for the longest goes."""
MET = 3
"""A size that was asked for so often has a stream; two frames may be all that somebody has."""

LOG = logging.getLogger(__name__)


class Shelf:
    """The workspaces of an engine: made when a size is met, kept while it is in use.

    :param make: makes a workspace; slow. What it raises leaves the size without one.
    :param behind: whether those that streams ask for are made by a thread of their own, while the streams go on.
    :ivar spaces: what there is, by size, the one asked for last at the end.
    :ivar failures: why there is none, by size.
    """

    def __init__(self, make: Callable[[Size], Workspace], behind: bool) -> None:
        self._make, self._behind = make, behind
        self.spaces: OrderedDict[Size, Workspace] = OrderedDict()
        self._met: Counter[Size] = Counter()
        self._used: set[Size] = set()  # since the last one was made
        self._lock, self._making = threading.RLock(), threading.Lock()
        self._thread: threading.Thread | None = None
        self.failures: dict[Size, str] = {}

    def get(self, size: Size) -> Workspace | None:
        """The workspace for a size; None as long as there is none."""
        with self._lock:
            if size not in self.spaces:
                self._met[size] += 1
                # Where all are in use, as by more cameras than there is room for, one more would push out another.
                full = len(self.spaces) >= KEPT and self._used.issuperset(self.spaces)
                if self._met[size] >= MET and size not in self.failures and not full:
                    self._request(size)
            if size in self.spaces:
                self.spaces.move_to_end(size)
                self._used.add(size)
            return self.spaces.get(size)

    def make(self, size: Size) -> None:
        """Make the workspace for a size now, unless there is one, or there was a failure."""
        with self._making:
            if size in self.spaces or size in self.failures:
                return
            try:
                space = self._make(size)
            except Exception as error:  # whatever it is: without graphs the frames are still computed
                LOG.warning("no graphs for %s, which stay eager: %s", size, error, exc_info=True)
                self.failures[size] = _first_line(error)
                return
            with self._lock:
                self.spaces[size] = space
                self._used.clear()
                while len(self.spaces) > KEPT:
                    self.spaces.popitem(last=False)

    def clear(self) -> None:
        """Give all of them back, when those in the making are made."""
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            self.spaces.clear()
            self._met.clear()
            self.failures.clear()

    def _request(self, size: Size) -> None:
        if not self._behind:
            self.make(size)
        elif self._thread is None or not self._thread.is_alive():  # one at a time; another is asked for again
            self._thread = threading.Thread(target=self.make, args=(size,), name="graphs")
            self._thread.start()


def _first_line(error: Exception) -> str:
    """An error for a log: its kind, and the first of what are often many lines."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class GraphEngine(EagerEngine):
    """It computes frames of a size that it has no graphs of yet as an ``EagerEngine``.

    Streams keep the same tensors in either case, so that a stream goes from one to the other between two frames.

    :param device: captures and replays; None: the model's, a CUDA device.
    :param compiled: compile the parts that are worth it, before they are captured.
    :param behind: make graphs while the stream goes on; False: at once.
    :param note: what there is to say of it already.
    """

    def __init__(
        self, model: DEQFlow, clock: Clock = MACHINE, device: GraphDevice | None = None, compiled: bool = False,
        behind: bool = True, note: str = "",
    ) -> None:  # fmt: skip
        super().__init__(model, clock)
        self._graphs = device or GraphDevice(model.device)
        self._compiled, self._note = compiled, note
        self._shelf = Shelf(self._make, behind)
        self._space: Workspace | None = None  # of the frames in work
        self._loaded = self._paired = False
        self._painted: tuple[np.ndarray, Tensor] | None = None
        self._made: tuple[int, StopReason] = (0, StopReason.ITERATIONS)

    @property
    def about(self) -> str:
        kind = "compiled graphs" if self._compiled else "graphs"
        failures = list(self._shelf.failures.items())  # to which the thread that makes graphs may add
        notes = [f"none for {size.processed}: {why}" for size, why in failures]
        return "; ".join(filter(None, (f"{kind} of {len(self._shelf.spaces)} size(s)", self._note, *notes)))

    def make_ready(self, source: tuple[int, int], size: tuple[int, int], batch: int = 1) -> None:
        self._shelf.make(Size(source, size, batch))

    def close(self) -> None:
        self._space = None
        self._shelf.clear()

    @torch.inference_mode()
    def encode(self, slots: Sequence[Slot], images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> None:
        self._loaded = self._paired = False
        space = self._space = None
        if len({image.shape for image in images}) == 1 and len(set(sizes)) == 1:
            height, width = images[0].shape[:2]
            space = self._space = self._shelf.get(Size((height, width), sizes[0], len(images)))
        if space is None:
            super().encode(slots, images, sizes)
            return
        scaled = [resize_image(image, sizes[0]) for image in images]
        if scaled[0] is not images[0]:
            self.stages.lap("resize")
        space.encode_images(scaled)
        encoding, padded = space.encode.outputs
        for i, (slot, image) in enumerate(zip(slots, images, strict=True)):
            features, context, tensor = (part[i : i + 1].clone() for part in (*encoding, padded))
            slot.next = EncodedImage(image, tensor, space.padding, Encoding(features, context))
        self.stages.lap("encode")

    @torch.inference_mode()
    def prepare(self, slot: Slot, direction: str, alone: bool = True) -> None:
        if slot.carried is None or slot.carried[0] is not slot.state:
            super().prepare(slot, direction, alone)
            return
        slot.start, slot.prepared, slot.carried = slot.carried[1], None, None
        self.stages.lap("prepare")

    @torch.inference_mode()
    def match(self, slots: Sequence[Slot], direction: str) -> list[Likeness]:
        space = self._space
        if space is None or len(slots) != space.size.batch:
            return super().match(slots, direction)
        self._load(space, slots, direction)
        for i, slot in enumerate(slots):
            _set_row(space.start, i, slot.start)
        space.match.replay()
        there = self._graphs.mark()
        self.stages.lap("match")
        self._pair(space)  # whatever the host decides by the likenesses: the device does not wait for it
        there.synchronize()
        return [Likeness(still, carried) for still, carried in space.likenesses.tolist()]

    @torch.inference_mode()
    def solve(self, slots: Sequence[Slot], direction: str, limits: Limits, scale: float) -> None:
        space = self._space
        if space is None:
            super().solve(slots, direction, limits, scale)
            return
        self._load(space, slots, direction)
        self._pair(space)
        self._find_starts(slots, [slot.pair(direction) for slot in slots], limits, scale)
        for i, slot in enumerate(slots):
            _set_row(space.start, i, slot.began)
        space.tolerance.fill_(-1.0 if limits.tolerance is None else limits.tolerance)
        space.progress.restart()
        space.begin.replay()
        iterate = self.stages.counted(space.iterate.replay)
        pace = Pace(
            space.progress, limits.max_iterations, limits.deadline_ns, self.clock.now_ns, limits.min_iterations,
            1e6 * limits.iteration_ms,
            watched=limits.tolerance is not None or limits.deadline_ns is not None,
            timed_after=None if limits.iteration_ms else 2,  # what is learnt is the device's time, not the host's
        )  # fmt: skip
        while pace.may_begin():
            iterate()
            space.progress.push(space.samples.active)
        self._made = pace.begun, pace.exhausted
        self.stages.lap("solve")

    @torch.inference_mode()
    def finish(
        self, slots: Sequence[Slot], direction: str, wanted: Wanted, palettes: Sequence[Palette | None] = ()
    ) -> list[Solved]:
        space = self._space
        if space is None:
            return super().finish(slots, direction, wanted)
        flows = space.make_fields(wanted)
        pictures = [
            None if palette is None else paint(palette, flow, self._table(palette))
            for flow, palette in zip_longest(flows, palettes)
        ]
        self.stages.lap("upsample")
        packed, on_host = space.download(wanted, pictures)
        with self._graphs.beside():
            self.stages.lap("output")
        self._carry(space, slots, direction)
        space.downloaded.synchronize()
        solved = unpack(Solution(space.samples, *self._made), packed.numpy(), space.size.source, wanted)
        colors = [None if picture is None else picture.numpy() for picture in on_host]
        return [replace(one, runtime=space.runtime, colors=each) for one, each in zip(solved, colors, strict=True)]

    def _carry(self, space: Workspace, slots: Sequence[Slot], direction: str) -> None:
        """Carry along what was found, while it is copied to the host. A stream that begins anew does not ask for it."""
        space.sign.fill_(1.0 if direction == "forward" else -1.0)
        space.carry.replay()
        for i, slot in enumerate(slots):
            found, start = (
                tuple(part.clone() for part in sample(state, i)) for state in (space.samples.value, space.carry.outputs)
            )
            slot.found, slot.carried = found, (found, start)

    def _table(self, palette: Palette) -> Tensor:
        """The table of a palette on the device; that of the last one stays there."""
        if self._painted is None or self._painted[0] is not palette.table:
            self._painted = palette.table, torch.from_numpy(palette.table).to(self.device)
        return self._painted[1]

    def _solve_coarsely(self, pairs: Sequence[Pair], levels: int) -> list[State]:
        space = self._space
        if space is None or space.coarse is None:
            return super()._solve_coarsely(pairs, levels)
        for i, pair in enumerate(pairs):
            _set_row(space.images, i, tuple(image.tensor for image in pair))
        space.coarse.replay()
        state = space.coarse.outputs
        assert state is not None
        return [tuple(part.clone() for part in sample(state, i)) for i in range(len(pairs))]

    def _load(self, space: Workspace, slots: Sequence[Slot], direction: str) -> None:
        """The encodings of the pairs, once a frame."""
        if self._loaded:
            return
        for i, slot in enumerate(slots):
            first, second = (image.encoding for image in slot.pair(direction))
            _set_row((*space.first, space.second), i, (*first, second.features))
        self._loaded = True

    def _pair(self, space: Workspace) -> None:
        if not self._paired:
            space.pair.replay()
            self._paired = True
            self.stages.lap("correlate")

    @torch.inference_mode()
    def _make(self, size: Size) -> Workspace:
        if self._compiled:
            try:
                return Workspace(self.model, self._graphs, size, Parts.compiled())
            except Exception as error:  # whatever a compiler says: graphs of what it was given are there without it
                LOG.warning("not compiled, the graphs are of single operations: %s", error, exc_info=True)
                self._compiled, self._note = False, f"not compiled: {_first_line(error)}"
        return Workspace(self.model, self._graphs, size, Parts())


def _set_row(batch: Sequence[Tensor], row: int, values: Sequence[Tensor] | None) -> None:
    """Write a sample, (1, ...), into tensors (B, ...); zeros for None."""
    for place, tensor in enumerate(batch):
        if values is None:
            tensor[row].zero_()
        else:
            tensor[row : row + 1].copy_(values[place])
