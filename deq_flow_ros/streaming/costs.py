# SPDX-License-Identifier: Apache-2.0
"""What the stages of a frame take: timed, and learnt from the frames before."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# So many mean deviations above the mean is what a cost rarely exceeds; docs/budget.md has what follows from it.
DEVIATIONS = 2.5
# A single value counts as no more than so many deviations, or what preempts a stage once would be feared for long.
OUTLIER = 4.0
# What a guess between measured scales weighs against the first values there.
GUESS_COUNT = 10
# How fast the load follows the frames, and by how much at most a single one of them may differ.
LOAD_WEIGHT, LOAD_STEP = 0.4, 2.0
BEFORE_SOLVE, AFTER_SOLVE = ("resize", "encode", "match", "correlate"), ("upsample", "output", "refine")
# What is done ahead of a frame where there is time: charged to it only where it was not.
PREPARE = "prepare"
REENCODE, REENCODE_PARTS = "reencode", ("resize", "encode")  # the last frame once more, at another scale
# What a stage is called in the costs where it is divided among its repetitions.
SOLVE, ITERATION, COARSE, REFINE = "solve", "iteration", "coarse", "refine"


class StageTimes:
    """Times of named stages, ms: each from the end of the one before it, so that together they are all of the time.

    :param event: records a CUDA event, so that the device need not wait; None: work is done once it is asked for.
    """

    def __init__(self, event: Callable[[], Any] | None = None) -> None:
        self._event = event
        self.begin(0)

    def begin(self, pixels: int) -> None:
        """Stages of another piece of work follow, on frames that are processed with so many pixels."""
        self._laps: list[tuple[str, Any, Any]] = []
        self.restart()

    def restart(self) -> None:
        """Let the next stage begin now; what was done since the last one belongs to none."""
        self._last = self._mark()

    def lap(self, name: str) -> None:
        """The stage of this name ends here; one that occurs twice counts both."""
        before, self._last = self._last, self._mark()
        self._laps.append((name, before, self._last))

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as it is; where time is simulated, some passes with each call."""
        return function

    def read(self, wait: bool = True) -> dict[str, float]:
        """The times. On a device this waits for the last stage; or leaves out the stages that are not done."""
        times: dict[str, float] = {}
        for name, start, end in self._laps:
            if self._event is None:
                value = 1e3 * (end - start)
            elif wait or end.query():
                end.synchronize()
                value = start.elapsed_time(end)
            else:
                continue
            times[name] = times.get(name, 0.0) + value
        return times

    def _mark(self) -> Any:
        return time.perf_counter() if self._event is None else self._event()


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

    @classmethod
    def of(cls, mean: float, deviation: float, count: int) -> RunningCost:
        """From its values, checked.

        :raises ValueError: if they are not finite, or below 0.
        """
        if not all(0 <= value < math.inf for value in (mean, deviation, count)):
            raise ValueError(f"expected mean, deviation and count of at least 0, got {mean}, {deviation}, {count}")
        return cls(float(mean), float(deviation), int(count))

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


@dataclass(frozen=True)
class Rest:
    """What is still expected of a frame after what was done so far, ms.

    :ivar after: all that follows the solve.
    :ivar iteration: one iteration.
    :ivar coarse: the coarse solves of a cold start.
    """

    after: float
    iteration: float
    coarse: float


@dataclass
class CostModel:
    """Costs of all stages, by the number of pixels processed, and the load of the machine.

    Costs change for two reasons. What a stage takes in proportion to others, and at one scale in proportion to another,
    is learnt slowly. How fast the machine is at present, as other processes and its temperature have it, is one factor
    for all of them, the ``load``, and follows the last few frames. So a machine that has become slower is known to be
    slower at the scales that are not in use as well.

    A number of pixels not met yet lies on the line between its measured neighbours. Beyond them it is in proportion to
    the nearest, and the all-pairs correlation to its square: another scale, or another camera, starts with a guess.

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

    def add(self, pixels: int, stage_ms: Mapping[str, float], iterations: int) -> None:
        """Take in the stage times of one frame; "solve" is divided among its iterations.

        That the last frame was encoded once more is left out: what it costs is known from the frame's own encoding. The
        first batch of a size is left out: it pays for allocations and kernel choices, as no warm-up does it before.
        """
        if self.single is not None and pixels not in self.stages:
            self.stages[pixels] = {}
            return
        counts = {name: 1 for name in stage_ms if name not in (SOLVE, REENCODE)}
        if iterations:
            counts[ITERATION] = iterations
        values = {name: stage_ms[SOLVE if name == ITERATION else name] / n for name, n in counts.items()}
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

    def forget_stage(self, name: str) -> None:
        """Drop what is known of a stage."""
        for stages in [known for model in (self, *self._batches.values()) for known in model.stages.values()]:
            stages.pop(name, None)

    def expected(self, pixels: int, *names: str) -> Estimate:
        """The sum of the named stages; 0 for what was never measured."""
        total = Estimate()
        for name in names:
            total = total.plus(self._idle(pixels, name))
        return total.times(self.load)

    def high(self, pixels: int, *names: str) -> float:
        """What the named stages together will rarely exceed, ms."""
        return self.expected(pixels, *names).high

    def frames(self, pixels: int, most: int, *besides: str) -> list[float]:
        """What a frame with 0, 1, ... and so many iterations will rarely exceed, ms.

        :param besides: stages that not every frame has, ``PREPARE`` and ``REENCODE``, where this one has them.
        """
        fixed, one = self.expected(pixels, *BEFORE_SOLVE, *AFTER_SOLVE, *besides), self.expected(pixels, ITERATION)
        return [fixed.plus(one, count).high for count in range(most + 1)]

    def rest(self, pixels: int, so_far_ms: Mapping[str, float]) -> Rest:
        """What is still expected of a frame whose stages took so long so far."""
        slowdown = self.slowdown(pixels, so_far_ms)
        stages = (AFTER_SOLVE, (ITERATION,), (COARSE,))
        return Rest(*(slowdown * self.high(pixels, *names) for names in stages))

    def slowdown(self, pixels: int, stage_ms: Mapping[str, float]) -> float:
        """How many times longer the stages of a frame took so far than they rarely exceed; at least 1.

        The first sign that the machine has become slower, or is shared, before the frame is done and the load follows.
        """
        rarely_ms = self.high(pixels, *stage_ms)
        return max(1.0, sum(stage_ms.values()) / rarely_ms) if rarely_ms > 0 else 1.0

    def plain(self) -> dict[str, Any]:
        """All that is known, for a JSON file."""
        known = {
            str(pixels): {name: [cost.mean, cost.deviation, cost.count] for name, cost in stages.items()}
            for pixels, stages in self.stages.items()
        }
        return {"stages": known, "load": self.load, "batches": {str(n): c.plain() for n, c in self._batches.items()}}

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any], single: CostModel | None = None, batch_size: int = 1) -> CostModel:
        """From what ``plain`` returned.

        :raises ValueError: for what is no such thing (or KeyError, TypeError, AttributeError).
        """
        costs = cls(single=single, batch_size=batch_size)
        for pixels, stages in plain["stages"].items():
            costs.stages[int(pixels)] = {str(name): RunningCost.of(*values) for name, values in stages.items()}
        if single is None:
            costs.load = float(plain["load"])
            if not 0 < costs.load < math.inf:
                raise ValueError(f"expected a load above 0, got {costs.load}")
        for size, batch in plain["batches"].items():
            costs._batches[int(size)] = cls.of_plain(batch, costs, int(size))
        return costs

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
        if name == REENCODE:
            parts = [self._idle(pixels, part) for part in REENCODE_PARTS]
            return parts[0].plus(parts[1])
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
