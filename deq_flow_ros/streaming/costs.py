# SPDX-License-Identifier: Apache-2.0
"""Measures the times of the stages of a frame, and learns their costs from earlier frames."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

# A cost rarely exceeds its mean by more than this number of mean deviations (docs/budget.md).
DEVIATIONS = 2.5
# A single value counts as at most this many deviations, so that one preemption has no lasting effect.
OUTLIER = 4.0
# The weight of a guess between measured scales, as a number of values.
GUESS_COUNT = 10
# How fast the load follows the frames, and the largest factor by which a single frame changes it.
LOAD_WEIGHT, LOAD_STEP = 0.4, 2.0
BEFORE_SOLVE, AFTER_SOLVE = ("resize", "encode", "match", "correlate"), ("upsample", "output", "refine")
# This stage is done ahead of a frame if there is time. Only if it was not, the frame is charged for it.
PREPARE = "prepare"
REENCODE, REENCODE_PARTS = "reencode", ("resize", "encode")  # the last frame once more, at another scale
# Names of stages, and of their repetitions in the costs.
SOLVE, ITERATION, COARSE, REFINE = "solve", "iteration", "coarse", "refine"


class StageTimes:
    """Times of named stages in ms. Each lasts from the end of the previous one, so together they are the whole time.

    :param event: records a CUDA event, so that the device need not wait; None: work is done when its call returns.
    """

    def __init__(self, event: Callable[[], Any] | None = None) -> None:
        self._event = event
        self.begin(0)

    def begin(self, pixels: int) -> None:
        """Begin another piece of work, on frames that are processed with this number of pixels."""
        self._laps: list[tuple[str, Any, Any]] = []
        self._last = self._mark()

    def lap(self, name: str) -> None:
        """End the stage of this name here. A stage that occurs twice has the sum of both times."""
        before, self._last = self._last, self._mark()
        self._laps.append((name, before, self._last))

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as it is. With simulated time, each of its calls takes some time."""
        return function

    def read(self, wait: bool = True) -> dict[str, float]:
        """The times. On a device, this waits for the last stage, or leaves out stages that have not ended."""
        times: dict[str, float] = {}
        for name, start, end in self._laps:
            if isinstance(start, int):
                value = (end - start) / 1e6
            elif wait or end.query():
                end.synchronize()
                value = start.elapsed_time(end)
            else:
                continue
            times[name] = times.get(name, 0.0) + value
        return times

    def _mark(self) -> Any:
        """A time in ns, or an event."""
        return time.perf_counter_ns() if self._event is None else self._event()


class Estimate(NamedTuple):
    """The expected cost of a piece of work and its mean deviation, ms."""

    mean: float = 0.0
    deviation: float = 0.0

    @property
    def high(self) -> float:
        """The cost that it rarely exceeds, ms."""
        return self.mean + DEVIATIONS * self.deviation

    def times(self, factor: float) -> Estimate:
        """The estimate for work that takes this many times as long."""
        return Estimate(factor * self.mean, factor * self.deviation)

    def plus(self, other: Estimate, count: int = 1) -> Estimate:
        """The estimate for this work and ``count`` times the other, with independent deviations."""
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


class CostModel:
    """Costs of all stages, by the number of pixels processed, and the load of the machine.

    The proportions between stages and between scales are learnt slowly. The present speed of the machine is a single
    factor for all of them, the ``load``, which follows the last few frames. If the machine becomes slower, the model
    therefore expects this at the scales that are not in use as well.

    The cost at an unknown number of pixels is interpolated between its measured neighbours. Beyond them it grows in
    proportion to the pixels, and that of the all-pairs correlation to their square.

    Each batch size has a model of its own (``of_batch``). Until a stage is measured there, it is expected to cost as
    much as the frames one after the other.

    :param single: the model of single frames, if this one is of batches; its ``load`` is that of the machine.
    :ivar stages: what is known, by the number of pixels of a frame, then by stage.
    """

    def __init__(self, single: CostModel | None = None, batch_size: int = 1) -> None:
        self.stages: dict[int, dict[str, RunningCost]] = {}
        self._single, self._batch_size = single or self, batch_size
        self._batches: dict[int, CostModel] = {}
        self.load = 1.0

    def of_batch(self, size: int) -> CostModel:
        """The costs of this number of frames processed as one batch; for 1, this model itself."""
        return self if size == 1 else self._batches.setdefault(size, CostModel(self, size))

    def add(self, pixels: int, stage_ms: Mapping[str, float], iterations: int) -> None:
        """Learn from the stage times of one frame. "solve" is divided by the number of iterations.

        Encoding the last frame once more is left out, because its cost is that of encoding a frame; so is the first
        batch of a size, which includes allocations and the choice of kernels.
        """
        single = self._single
        if single is not self and pixels not in self.stages:
            self.stages[pixels] = {}
            return
        counts = {name: 1 for name in stage_ms if name not in (SOLVE, REENCODE)}
        if iterations:
            counts[ITERATION] = iterations
        values = {name: stage_ms[SOLVE if name == ITERATION else name] / n for name, n in counts.items()}
        known = self._known(pixels, values)
        expected = sum(n * single.load * known[name].mean for name, n in counts.items() if known[name].count)
        measured = sum(n * values[name] for name, n in counts.items() if known[name].count)
        if expected > 0 and measured > 0:
            single.load *= min(max(measured / expected, 1 / LOAD_STEP), LOAD_STEP) ** LOAD_WEIGHT
        for name, value in values.items():
            known[name].add(value / single.load)

    def forget_stage(self, name: str) -> None:
        """Forget the costs of a stage."""
        for stages in [known for model in (self, *self._batches.values()) for known in model.stages.values()]:
            stages.pop(name, None)

    def expected(self, pixels: int, *names: str) -> Estimate:
        """The expected cost of the named stages together; 0 for stages that were never measured."""
        total = Estimate()
        for name in names:
            total = total.plus(self._idle(pixels, name))
        return total.times(self._single.load)

    def high(self, pixels: int, *names: str) -> float:
        """The cost that the named stages together rarely exceed, ms."""
        return self.expected(pixels, *names).high

    def frames(self, pixels: int, most: int, *besides: str) -> list[float]:
        """What a frame with 0, 1, ..., ``most`` iterations and the stages ``besides`` the usual rarely exceeds, ms."""
        fixed, one = self.expected(pixels, *BEFORE_SOLVE, *AFTER_SOLVE, *besides), self.expected(pixels, ITERATION)
        return [fixed.plus(one, count).high for count in range(most + 1)]

    def rest(self, pixels: int, so_far_ms: Mapping[str, float]) -> tuple[float, float, float]:
        """What the stages after the solve, an iteration, and the coarse solves of a cold start rarely exceed, ms each.

        :param so_far_ms: what the earlier stages of the frame took.
        """
        slowdown = self.slowdown(pixels, so_far_ms)
        after, iteration, coarse = (self.high(pixels, *names) for names in (AFTER_SOLVE, (ITERATION,), (COARSE,)))
        return slowdown * after, slowdown * iteration, slowdown * coarse

    def slowdown(self, pixels: int, stage_ms: Mapping[str, float]) -> float:
        """The time of the stages so far by what they rarely exceed, at least 1; the first sign of a slower machine."""
        rarely_ms = self.high(pixels, *stage_ms)
        return max(1.0, sum(stage_ms.values()) / rarely_ms) if rarely_ms > 0 else 1.0

    def _known(self, pixels: int, names: Iterable[str]) -> dict[str, RunningCost]:
        """The costs of these stages, to which the next values are added.

        A number of pixels between measured ones starts from the guess, as if it had been measured a few times. A scale
        that is tried in a busy moment would otherwise never be tried again.
        """
        known = self.stages.setdefault(pixels, {})
        for name in names:
            if name not in known:
                others = [p for p, stages in self.stages.items() if name in stages]
                between = bool(others) and min(others) < pixels < max(others)
                known[name] = RunningCost(*self._idle(pixels, name), GUESS_COUNT) if between else RunningCost()
        return known

    def _idle(self, pixels: int, name: str) -> Estimate:
        """The estimate for a stage at a load of 1."""
        if name == REENCODE:
            resize, encode = (self._idle(pixels, part) for part in REENCODE_PARTS)
            return resize.plus(encode)
        measured = {known: stages[name] for known, stages in self.stages.items() if name in stages}
        if not measured:
            return Estimate() if self._single is self else self._single._idle(pixels, name).times(self._batch_size)
        below = max((p for p in measured if p <= pixels), default=None)
        above = min((p for p in measured if p >= pixels), default=None)
        if below is None or above is None:
            nearest = max(measured) if above is None else min(measured)
            ratio = (pixels / nearest) ** (2 if name == "correlate" else 1)
            return Estimate(measured[nearest].mean, measured[nearest].deviation).times(ratio)
        share = 0.0 if above == below else (pixels - below) / (above - below)
        low, high = measured[below], measured[above]
        mean = low.mean + share * (high.mean - low.mean)
        return Estimate(mean, low.deviation + share * (high.deviation - low.deviation))
