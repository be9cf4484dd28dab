# SPDX-License-Identifier: Apache-2.0
"""Tensors that stay where they are, and captured graphs that work on them, for batches of one size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import product, starmap
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from deq_flow_ros.equilibrium import Rules, Samples, Solution, State, StopReason
from deq_flow_ros.model import DEQFlow, Encoding, FlowProblem
from deq_flow_ros.model.cells import crop, likeness, padding_of
from deq_flow_ros.streaming.capture import Captured, GraphDevice, Parts, tensors
from deq_flow_ros.streaming.eager import COARSE_ITERATIONS, LOOKUPS, coarse_levels
from deq_flow_ros.streaming.fields import FIGURES, find, interpolation, pack
from deq_flow_ros.streaming.interface import Wanted
from deq_flow_ros.streaming.plan import padded_size


class Size(NamedTuple):
    """What graphs are made for: (H, W) of frames as they come, (H, W) processed without padding, how many at a time."""

    source: tuple[int, int]
    processed: tuple[int, int]
    batch: int


class Counted:
    """The progress of a solve, which the device writes to memory of the host behind each iteration; see ``Progress``.

    Nothing waits for an event: the host reads two numbers. It may be one iteration ahead of them, so that the device
    always has work; it looks again and again where it is farther ahead.

    :ivar host: (2,) int64, page-locked: iterations made, and whether any sample goes on.
    """

    def __init__(self, device: GraphDevice) -> None:
        self.host = device.pinned((2,), torch.int64)
        self._view, self._device = self.host.numpy(), device
        self._queued = 0

    def restart(self) -> None:
        """A solve begins; what is queued for it so far counts as one."""
        self._view[:] = -1, 1
        self._queued = 0

    @property
    def in_flight(self) -> int:
        return self._queued - int(self._view[0])

    @property
    def done(self) -> bool:
        return int(self._view[1]) == 0

    def push(self, active: Tensor) -> None:
        self._queued += 1

    def look(self, wait: bool) -> None:
        if not wait or self.in_flight <= 1:
            return
        end = self._device.mark()  # an error of the device would never count on, but is raised by the query
        while self.in_flight > 1 and not end.query():
            self._device.pause()


class Workspace:
    """For batches of one size: what goes in, what comes out, and the graphs between.

    :param parts: what is captured.
    :ivar runtime: what that is called.
    :ivar padding: of what is encoded, for ``crop``.
    :ivar pixels: (B, H, W, 3) uint8 RGB, to be encoded.
    :ivar first: of the images whose pixels the flow lives on.
    :ivar second: features of the others.
    :ivar images: (B, 3, h, w) float32, both, for solving smaller versions.
    :ivar packed: what ``pack`` makes, (B, N), by what is wanted.
    """

    def __init__(self, model: DEQFlow, device: GraphDevice, size: Size, parts: Parts) -> None:
        self.size, self._device, self._model, self.runtime = size, device, model, parts.name
        pool = device.pool()
        self.padding = padding_of(*size.processed)
        self.pixels = torch.zeros(size.batch, *size.processed, 3, dtype=torch.uint8, device=device.device)
        self._staging = [(device.pinned(self.pixels.shape, torch.uint8), device.mark()) for _ in range(2)]
        self._encoded = self.downloaded = device.mark()
        self.encode: Captured[tuple[Encoding, Tensor]] = device.capture(lambda: parts.encode(model, self.pixels), pool)
        encoding, image = self.encode.outputs
        self.first, self.second = Encoding(*map(torch.zeros_like, encoding)), torch.zeros_like(encoding.features)
        self.images = torch.zeros_like(image), torch.zeros_like(image)
        self.start = model.initial_state(encoding)  # of a solve
        self.likenesses = device.pinned((size.batch, 2), torch.float32)  # at a flow of zero, and at that of the start
        self.match = device.capture(self._match, pool)
        self.pair: Captured[FlowProblem] = device.capture(self._pair, pool)
        self.tolerance = torch.full((), -1.0, device=device.device)  # -1: none
        rules = Rules(self.tolerance, keeps_best=False, look=False)
        self.samples = _kept(rules.begin(self.start))
        self.sign = torch.ones((), device=device.device)  # of the direction in which what was found is carried along
        self.carry: Captured[State] = device.capture(lambda: parts.move(self.samples.value, self.sign), pool)
        self.progress = Counted(device)
        self.begin = device.capture(lambda: self._begin(rules), pool)
        self.iterate = device.capture(lambda: self._iterate(parts, rules), pool)
        levels = coarse_levels(size.processed[0] / size.source[0], padded_size(*size.processed))
        coarse = partial(model.coarse_start, *self.images, levels, COARSE_ITERATIONS, watch=False)
        self.coarse = device.capture(coarse, pool) if levels else None
        self._matrices = _resizing(size, device.device) if size.source != size.processed else None
        heads = (False,) if model.uncertainty is None else (False, True)
        every = starmap(Wanted, product((False, True), heads))
        lengths = {each: (2 + sum(each)) * math.prod(size.source) + FIGURES for each in every}
        # Not in the pool: copies read it while the next graphs run.
        memory = torch.zeros(size.batch * max(lengths.values()), device=device.device)
        self.packed = {each: memory[: size.batch * n].view(size.batch, n) for each, n in lengths.items()}
        self.finish = {each: device.capture(partial(self._finish, each), pool) for each in lengths}
        device.trim()

    def encode_images(self, images: Sequence[np.ndarray]) -> None:
        """Queue the copy of images to ``pixels``, and their encoding.

        The copy runs beside other work, such as carrying the last state along. Of two buffers on the host, the one is
        filled that was used before the last time.
        """
        device = self._device
        staged, copied = self._staging.pop(0)
        if not copied.query():
            copied.synchronize()
        for row, image in zip(staged.numpy(), images, strict=True):
            row[:] = image
        with device.beside():
            device.hold(self._encoded)
            self.pixels.copy_(staged, non_blocking=True)
            copied = device.mark()
        self._staging.append((staged, copied))
        device.hold(copied)
        self.encode.replay()
        self._encoded = device.mark()

    def make_fields(self, wanted: Wanted) -> Tensor:
        """Queue the fields and figures of the samples; returns the flow, (B, H, W, 2), that will be there."""
        self._device.hold(self.downloaded)
        self.finish[wanted].replay()
        height, width = self.size.source
        return self.packed[wanted][:, : 2 * height * width].view(-1, height, width, 2)

    def download(self, wanted: Wanted, pictures: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
        """What ``pack`` made and these tensors, on the host once ``downloaded`` is reached; nobody writes to it later.

        The copies run beside what is queued from now on.
        """
        device = self._device
        made = device.mark()
        with device.beside():
            device.hold(made)
            packed = self._to_host(self.packed[wanted])
            on_host = [None if picture is None else self._to_host(picture) for picture in pictures]
            self.downloaded = device.mark()
        return packed, on_host

    def _to_host(self, tensor: Tensor) -> Tensor:
        host = self._device.pinned(tensor.shape, tensor.dtype)
        host.copy_(tensor, non_blocking=True)
        return host

    def _match(self) -> None:
        still = torch.zeros_like(self.start[1])
        values = [
            likeness(torch.stack((still[i], self.start[1][i])), self.first.features[i : i + 1], self.second[i : i + 1])
            for i in range(self.size.batch)
        ]
        self.likenesses.copy_(torch.stack(values), non_blocking=True)

    def _pair(self) -> FlowProblem:
        second = Encoding(self.second, self.first.context)  # whose context nobody asks for
        return self._model.problem(self.first, second, iterations=LOOKUPS)

    def _begin(self, rules: Rules) -> None:
        for old, new in zip(tensors(self.samples), tensors(rules.begin(self.start)), strict=True):
            old.copy_(new)
        self._report()

    def _iterate(self, parts: Parts, rules: Rules) -> None:
        parts.iterate(self.pair.outputs, rules, self.samples)
        self._report()

    def _report(self) -> None:
        going_on = self.samples.active.any().to(torch.int64)
        self.progress.host.copy_(torch.stack((self.samples.number, going_on)), non_blocking=True)

    def _finish(self, wanted: Wanted) -> None:
        solution = Solution(self.samples, 0, StopReason.ITERATIONS)
        alike = [
            likeness(solution.state[1][i : i + 1], self.first.features[i : i + 1], self.second[i : i + 1])
            for i in range(self.size.batch)
        ]
        fields = [self._resize(field) for field in find(self._model, solution, wanted)]
        pack(solution, fields, torch.cat(alike), self.packed[wanted])

    def _resize(self, field: Tensor) -> Tensor:
        """``crop`` and ``resize_field`` of a flow (B, 2, h, w), or of lengths (B, 1, h, w), in processed px."""
        field = crop(field, self.padding)
        if self._matrices is None:
            return field
        rows, columns, ratio = self._matrices
        ratio = ratio if field.shape[1] == 2 else ratio.mean()[None]
        return (rows @ field @ columns) * ratio[:, None, None]


def _resizing(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Resizing is linear, along each axis by itself: OpenCV's own weights as two matrices, and the ratio of sides."""
    how = interpolation(size.processed, size.source)
    (h, w), (source_h, source_w) = size.processed, size.source
    rows = cv2.resize(np.eye(h, dtype=np.float32), (h, source_h), interpolation=how)
    columns = cv2.resize(np.eye(w, dtype=np.float32), (source_w, w), interpolation=how)
    ratio = torch.tensor([source_w / w, source_h / h], device=device)
    return torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device), ratio


def _kept(samples: Samples) -> Samples:
    """The same values in tensors of their own, but that Picard's answer is its last value."""
    point, value = (tuple(tensor.clone() for tensor in state) for state in (samples.point, samples.value))
    return Samples(value, point, point, value, *(tensor.clone() for tensor in samples[4:]))
