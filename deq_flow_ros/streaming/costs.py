# SPDX-License-Identifier: Apache-2.0
"""What the stages of a frame cost, learnt from the frames before, and the processing scale that follows from it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from deq_flow_ros.model.deq_flow import MIN_SIDE

T = TypeVar("T")

# Processing scales, each about 0.7 of the pixels' side of the one before: half the work per step.
SCALES = (4.0, 3.0, 2.0, 1.5, 1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.09375, 0.0625)
# Below this short side there is little left to see.
MIN_SCALED_SIDE = 96
# Of a processed frame, unless the model allows more: all pairs of their cells, 4 bytes each, take some 1 GB.
MAX_PIXELS = 1 << 20


@dataclass
class RunningCost:
    """Running mean of a cost in ms and of its deviation, over about the last 20 values."""

    mean: float = 0.0
    deviation: float = 0.0
    count: int = 0

    def add(self, value_ms: float) -> None:
        """Take in one measurement."""
        self.count += 1
        weight = max(1 / self.count, 0.05)
        error = value_ms - self.mean
        self.mean += weight * error
        # The first value says nothing of the spread; a tenth of it is a guess to start from.
        spread = 0.1 * value_ms if self.count == 1 else abs(error)
        self.deviation += weight * (spread - self.deviation)

    @property
    def high(self) -> float:
        """What the next value will rarely exceed, ms."""
        return self.mean + 3 * self.deviation


@dataclass
class CostModel:
    """Costs of all stages, by the number of pixels processed.

    A number not met yet lies on the line between its measured neighbours. Beyond them it is in proportion to the
    nearest, and the all-pairs correlation to its square. So another processing scale, or another camera, starts with a
    guess.

    Batches have a model each (``of_batch``), so that what they take is not taken for the cost of a single frame; until
    a stage is measured there, it is guessed to take as long as one frame after the other.
    """

    stages: dict[int, dict[str, RunningCost]] = field(default_factory=dict)
    single: CostModel | None = None
    batch_size: int = 1
    _batches: dict[int, CostModel] = field(default_factory=dict)

    def of_batch(self, size: int) -> CostModel:
        """The costs of so many frames processed as one batch; of 1, this model itself."""
        return self if size == 1 else self._batches.setdefault(size, CostModel(single=self, batch_size=size))

    def add(self, pixels: int, stage_ms: dict[str, float], iterations: int) -> None:
        """Take in the stage times of one frame; "solve" is divided among its iterations.

        The first batch of a size is left out: it pays for allocations and kernel choices, as no warm-up does it before.
        """
        if self.single is not None and pixels not in self.stages:
            self.stages[pixels] = {}
            return
        known = self.stages.setdefault(pixels, {})
        for name, value in stage_ms.items():
            if name == "solve":
                if iterations:
                    known.setdefault("iteration", RunningCost()).add(value / iterations)
            else:
                known.setdefault(name, RunningCost()).add(value)

    def forget(self, pixels: int) -> None:
        """Drop what is known of frames of so many pixels."""
        self.stages.pop(pixels, None)

    def high(self, pixels: int, *names: str) -> float:
        """The sum of the named stages' high estimates, ms; 0 for what was never measured."""
        return sum(self._high(pixels, name) for name in names)

    def frame(self, pixels: int, iterations: int, scaled_to: int | None = None) -> float:
        """What a frame with so many iterations needs, ms.

        :param scaled_to: take the costs of ``pixels`` in proportion to this number of pixels.
        """
        ratio = 1.0 if scaled_to is None else scaled_to / pixels
        linear = self.high(pixels, "resize", "encode", "prepare", "upsample", "output")
        linear += iterations * self.high(pixels, "iteration")
        return ratio * linear + ratio**2 * self.high(pixels, "correlate")

    def _high(self, pixels: int, name: str) -> float:
        measured = sorted((p, stages[name].high) for p, stages in self.stages.items() if name in stages)
        if not measured:
            return 0.0 if self.single is None else self.batch_size * self.single._high(pixels, name)
        below = [m for m in measured if m[0] <= pixels]
        above = [m for m in measured if m[0] >= pixels]
        if below and above:
            (p0, c0), (p1, c1) = below[-1], above[0]
            return c0 if p0 == p1 else c0 + (c1 - c0) * (pixels - p0) / (p1 - p0)
        nearest, cost = below[-1] if below else above[0]
        return cost * (pixels / nearest) ** (2 if name == "correlate" else 1)


class ScaleController:
    """Steps the processing scale down when not one iteration fits the budget, and up again when two safely would.

    :param min_scale: lowest scale, above 0; frames are not made smaller than ``MIN_SCALED_SIDE``.
    :param max_scale: highest scale, at least ``min_scale``; frames are never processed larger than ``max_pixels``.
    :param patience: frames in a row that must leave room before the scale goes up, against flapping.
    :param max_pixels: of a processed frame, ``DEQFlow.max_pixels``.
    """

    def __init__(
        self, min_scale: float, max_scale: float = 1.0, patience: int = 15, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.patience, self.max_pixels = patience, max_pixels
        self.scale = max_scale
        self._roomy = 0
        self.limit(min_scale, max_scale)

    def limit(self, min_scale: float, max_scale: float) -> None:
        """Set other limits; the scale goes on from where it is, as far as they allow."""
        between = [s for s in SCALES if min_scale < s < max_scale]
        self._scales = [max_scale, *between, min_scale] if min_scale < max_scale else [max_scale]

    def ladder(self, height: int, width: int) -> list[float]:
        """The scales for frames of this size, largest first; at least one."""
        allowed = [s for s in self._scales if height * width * s**2 <= self.max_pixels]
        if not allowed:
            return [math.sqrt(self.max_pixels / (height * width))]
        # Frames that are small already are not made smaller.
        visible = min(1.0, MIN_SCALED_SIDE / min(height, width))
        return [s for s in allowed if s >= visible] or allowed[:1]

    def choose(self, costs: CostModel, available_ms: float, height: int, width: int) -> float:
        """The scale for the coming frame, given its size and the time until its deadline."""
        scales = self.ladder(height, width)
        last = len(scales) - 1
        index = next((i for i, scale in enumerate(scales) if scale <= self.scale), last)
        pixels = [number_of_pixels(scaled_size(height, width, scale)) for scale in scales]
        lowered = False
        while index < last and costs.frame(pixels[index], 1) > available_ms:
            index += 1
            lowered = True
        if lowered:
            self._roomy = 0
        elif index > 0:
            # What was measured at the higher scale may be of a time when the machine was busier than it is now.
            needed = min(costs.frame(pixels[index - 1], 2), costs.frame(pixels[index], 2, pixels[index - 1]))
            self._roomy = self._roomy + 1 if needed <= 0.9 * available_ms else 0
            if self._roomy >= self.patience:
                index -= 1
                self._roomy = 0
                costs.forget(pixels[index])
        self.scale = scales[index]
        return self.scale


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """(H, W) at which a frame is processed."""
    return max(MIN_SIDE, round(height * scale)), max(MIN_SIDE, round(width * scale))


def number_of_pixels(size: tuple[int, int]) -> int:
    """Of a frame of this (H, W)."""
    return size[0] * size[1]


class StageClock:
    """Times of named stages, in ms, on the device that does the work, without making it wait."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, object, object]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; one that occurs twice counts both."""
        start = self._mark()
        yield
        self._marks.append((name, start, self._mark()))

    def counted(self, function: Callable[..., T]) -> Callable[..., T]:
        """The function as it is; a clock that simulates time lets some pass with each call."""
        return function

    def _mark(self) -> object:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def read(self) -> dict[str, float]:
        """The times; on CUDA this waits for the last stage."""
        times: dict[str, float] = {}
        for name, start, end in self._marks:
            if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                end.synchronize()
                value = start.elapsed_time(end)
            else:
                value = 1e3 * (float(end) - float(start))  # type: ignore[arg-type]
            times[name] = times.get(name, 0.0) + value
        return times
