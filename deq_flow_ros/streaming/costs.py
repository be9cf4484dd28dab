# SPDX-License-Identifier: Apache-2.0
"""What the stages of a frame cost, learnt from the frames before, and the processing scale that follows from it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from deq_flow_ros.model.deq_flow import MIN_SIDE

T = TypeVar("T")

# Processing scales, each with about 0.7 of the pixels of the one before.
SCALES = (
    4.0, 3.5, 3.0, 2.5, 2.0, 1.75, 1.5, 1.25, 1.0, 0.875, 0.75, 0.625, 0.5, 0.4375, 0.375, 0.3125, 0.25, 0.21875,
    0.1875, 0.15625, 0.125, 0.109375, 0.09375, 0.078125, 0.0625,
)  # fmt: skip
# Below this short side there is little left to see.
MIN_SCALED_SIDE = 96
# Of a processed frame, unless the model allows more: all pairs of their cells, 4 bytes each, take some 1 GB.
MAX_PIXELS = 1 << 20
# So many mean deviations above the mean is what a cost rarely exceeds; docs/budget.md has what follows from it.
DEVIATIONS = 2.5
# A single value counts as no more than so many deviations, or what preempts a stage once would be feared for long.
OUTLIER = 4.0
# What a guess between measured scales weighs against the first values there.
GUESS_COUNT = 10
# How fast the load follows the frames, and by how much at most a single one of them may differ.
LOAD_WEIGHT, LOAD_STEP = 0.4, 2.0
# The scale goes down when one iteration does not fit any more, and up when so many do, in this share of the time.
ITERATIONS_UP, ROOM = 2, 0.9
# So many of the last frames may have had less time than the scale needs: a frame that came at a bad moment.
EXCEPTIONS = 2
BEFORE_SOLVE, AFTER_SOLVE = ("resize", "encode", "prepare", "match", "correlate"), ("upsample", "output")


@dataclass(frozen=True)
class Estimate:
    """What a piece of work is expected to take, and its mean deviation from that, ms."""

    mean: float = 0.0
    deviation: float = 0.0

    @property
    def high(self) -> float:
        """What it will rarely exceed, ms."""
        return self.mean + DEVIATIONS * self.deviation

    def times(self, factor: float) -> Estimate:
        """Of work that takes so many times as long."""
        return Estimate(factor * self.mean, factor * self.deviation)

    def plus(self, other: Estimate, count: int = 1) -> Estimate:
        """Of this work and then the other, so many times; what makes one of them late says nothing of the others."""
        spread = math.hypot(self.deviation, math.sqrt(count) * other.deviation)
        return Estimate(self.mean + count * other.mean, spread)


@dataclass
class RunningCost:
    """Running mean of a cost in ms, over about the last 50 values, and of its deviation, over about the last 20."""

    mean: float = 0.0
    deviation: float = 0.0
    count: int = 0

    def add(self, value_ms: float) -> None:
        """Take in one measurement."""
        self.count += 1
        error = value_ms - self.mean
        if self.count > 4:
            bound = OUTLIER * max(self.deviation, 0.1 * self.mean)
            error = min(max(error, -bound), bound)
        self.mean += max(1 / self.count, 0.02) * error
        # The first value says nothing of the spread; a tenth of it is a guess to start from.
        spread = 0.1 * value_ms if self.count == 1 else abs(error)
        self.deviation += max(1 / self.count, 0.05) * (spread - self.deviation)


@dataclass
class CostModel:
    """Costs of all stages, by the number of pixels processed, and the load of the machine.

    Costs change for two reasons. What a stage takes in proportion to others, and at one scale in proportion to another,
    is learnt slowly. How fast the machine is at present, as other processes and its temperature have it, is one factor
    for all of them, the ``load``, and follows the last few frames. So a machine that has become slower is known to be
    slower at the scales that are not in use as well.

    A number of pixels not met yet lies on the line between its measured neighbours. Beyond them it is in proportion to
    the nearest, and the all-pairs correlation to its square. So another processing scale, or another camera, starts
    with a guess.

    Batches have a model each (``of_batch``), so that what they take is not taken for the cost of a single frame; until
    a stage is measured there, it is guessed to take as long as one frame after the other.

    """

    stages: dict[int, dict[str, RunningCost]] = field(default_factory=dict)
    single: CostModel | None = None
    batch_size: int = 1
    _load: float = 1.0
    _batches: dict[int, CostModel] = field(default_factory=dict)

    @property
    def load(self) -> float:
        """How many times longer everything takes than it did when it was learnt; one machine has one load."""
        return self._load if self.single is None else self.single.load

    @load.setter
    def load(self, value: float) -> None:
        if self.single is None:
            self._load = value
        else:
            self.single.load = value

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
        counts = {name: 1 for name in stage_ms if name != "solve"} | ({"iteration": iterations} if iterations else {})
        values = {name: stage_ms["solve" if name == "iteration" else name] / n for name, n in counts.items()}
        known = self._known(pixels, values)
        expected = sum(n * self.load * known[name].mean for name, n in counts.items() if known[name].count)
        measured = sum(n * values[name] for name, n in counts.items() if known[name].count)
        if expected > 0 and measured > 0:
            self.load *= min(max(measured / expected, 1 / LOAD_STEP), LOAD_STEP) ** LOAD_WEIGHT
        for name, value in values.items():
            known[name].add(value / self.load)

    def forget(self, pixels: int) -> None:
        """Drop what is known of frames of so many pixels."""
        self.stages.pop(pixels, None)

    def expected(self, pixels: int, *names: str) -> Estimate:
        """The sum of the named stages; 0 for what was never measured."""
        total = Estimate()
        for name in names:
            total = total.plus(self._idle(pixels, name))
        return total.times(self.load)

    def high(self, pixels: int, *names: str) -> float:
        """What the named stages together will rarely exceed, ms."""
        return self.expected(pixels, *names).high

    def frame(self, pixels: int, iterations: int) -> float:
        """What a frame with so many iterations will rarely exceed, ms."""
        fixed = self.expected(pixels, *BEFORE_SOLVE, *AFTER_SOLVE)
        return fixed.plus(self.expected(pixels, "iteration"), iterations).high

    def slowdown(self, pixels: int, stage_ms: dict[str, float]) -> float:
        """How many times longer the stages of a frame took so far than they rarely exceed; at least 1.

        The first sign that the machine has become slower, or is shared, before the frame is done and the load follows.
        """
        rarely_ms = self.high(pixels, *stage_ms)
        return max(1.0, sum(stage_ms.values()) / rarely_ms) if rarely_ms > 0 else 1.0

    def _known(self, pixels: int, names: Iterable[str]) -> dict[str, RunningCost]:
        """The costs of these stages, which the next values are added to.

        What lies between measured numbers of pixels starts from the guess, as if it had been measured so a few times: a
        scale tried in a busy moment would else be avoided for good.
        """
        known = self.stages.setdefault(pixels, {})
        for name in names:
            if name not in known:
                others = [p for p, stages in self.stages.items() if name in stages]
                between = bool(others) and min(others) < pixels < max(others)
                guess = self._idle(pixels, name) if between else Estimate()
                known[name] = RunningCost(guess.mean, guess.deviation, GUESS_COUNT if between else 0)
        return known

    def _idle(self, pixels: int, name: str) -> Estimate:
        """Of a stage, at a load of 1."""
        measured = {known: stages[name] for known, stages in self.stages.items() if name in stages}
        if not measured:
            return Estimate() if self.single is None else self.single._idle(pixels, name).times(self.batch_size)
        below = max((p for p in measured if p <= pixels), default=None)
        above = min((p for p in measured if p >= pixels), default=None)
        if below is None or above is None:
            nearest = max(measured) if above is None else min(measured)
            ratio = (pixels / nearest) ** (2 if name == "correlate" else 1)
            return Estimate(measured[nearest].mean, measured[nearest].deviation).times(ratio)
        share = 0.0 if above == below else (pixels - below) / (above - below)
        low, high = measured[below], measured[above]
        return Estimate(
            low.mean + share * (high.mean - low.mean), low.deviation + share * (high.deviation - low.deviation)
        )


class ScaleController:
    """The largest processing scale at which two iterations fit; it is left when not even one fits any more.

    In a stream that starts warm the second iteration still improves the flow, those after it hardly, and less than the
    next larger scale does: docs/budget.md has the figures.

    Frames that arrive while the one before is processed have waited, so the time that is left differs from frame to
    frame. What counts is the time that all but ``EXCEPTIONS`` of the last frames had. Only when a frame would be late
    without any iteration the scale goes down for its sake.

    :param min_scale: lowest scale, above 0; frames are not made smaller than ``MIN_SCALED_SIDE``.
    :param max_scale: highest scale, at least ``min_scale``; frames are never processed larger than ``max_pixels``.
    :param patience: frames at one scale before it goes up, against flapping: a change encodes one frame twice.
    :param max_pixels: of a processed frame, ``DEQFlow.max_pixels``.
    """

    def __init__(
        self, min_scale: float, max_scale: float = 1.0, patience: int = 15, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.patience, self.max_pixels = patience, max_pixels
        self.scale = max_scale
        self._available_ms: deque[float] = deque(maxlen=patience)
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
        """The scale for the coming frame, given its size and the time that is left for the work on it."""
        scales = self.ladder(height, width)
        last = len(scales) - 1
        before = index = next((i for i, scale in enumerate(scales) if scale <= self.scale), last)

        def needed(place: int, iterations: int) -> float:
            return costs.frame(number_of_pixels(scaled_size(height, width, scales[place])), iterations)

        self._available_ms.append(available_ms)
        usual_ms = sorted(self._available_ms)[: EXCEPTIONS + 1][-1]
        if needed(index, 0) > available_ms:
            while index < last and needed(index, 1) > available_ms:
                index += 1
        elif needed(index, 1) > usual_ms:
            while index < last and needed(index, ITERATIONS_UP) > usual_ms:
                index += 1
        elif len(self._available_ms) == self.patience:
            while index > 0 and needed(index - 1, ITERATIONS_UP) <= ROOM * usual_ms:
                index -= 1
        if index != before:
            self._available_ms.clear()
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

    def read(self, wait: bool = True) -> dict[str, float]:
        """The times. On CUDA this waits for the last stage; or leaves out the stages that are not done."""
        times: dict[str, float] = {}
        for name, start, end in self._marks:
            if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                if not wait and not end.query():
                    continue
                end.synchronize()
                value = start.elapsed_time(end)
            else:
                value = 1e3 * (float(end) - float(start))  # type: ignore[arg-type]
            times[name] = times.get(name, 0.0) + value
        return times
