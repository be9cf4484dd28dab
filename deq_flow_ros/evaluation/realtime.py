# SPDX-License-Identifier: Apache-2.0
"""As on the robot, without a robot: frames arrive at their stamps on a clock that only the measured costs move on.

The estimator is the real one and computes the real flow; what its stages *take* is drawn from a table of measured
times. So budget, deadline, processing scale and dropped frames come out as they would on the machine of the table, and
come out the same again. The middleware is not part of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from deq_flow_ros.evaluation.estimators import Estimator, make_estimator
from deq_flow_ros.evaluation.results import DROPPED, FrameRecord
from deq_flow_ros.evaluation.runner import SUPERSEDED, Done, Extras, Lane, Shot, part, prefixed
from deq_flow_ros.evaluation.settings import Setting
from deq_flow_ros.media.frame import MediaError
from deq_flow_ros.model import DEQFlow
from deq_flow_ros.streaming.clock import Clock
from deq_flow_ros.streaming.costs import ScaleController, StageClock, number_of_pixels, scaled_size

ITERATION, OVERHEAD = "iteration", "overhead"
"""Costs that are no stages: one iteration of the solver, and what no stage measures."""
ROUNDS = 8
"""Measurements of every stage at every processing scale."""
LONGEST_S = 4.0
"""For the measurements at one scale, if they are at least 3."""
MEASURED_ITERATIONS = 4


@dataclass(frozen=True)
class CostTable:
    """Measured times of the stages, ms: by the number of pixels processed, then by stage, several of each."""

    stages: dict[int, dict[str, list[float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> CostTable:
        """From `plain`. Raises `MediaError` for anything else."""
        try:
            stages = {
                int(pixels): {str(name): [float(value) for value in values] for name, values in known.items()}
                for pixels, known in plain["stage_ms_by_pixels"].items()
            }
            every = [values for known in stages.values() for values in known.values()]
            if not every or not all(values and min(values) >= 0 for values in every):
                raise ValueError("a stage without times, or times below 0")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MediaError(f"expected a table of costs as metrics.json holds it, got another: {error!r}") from error
        return cls(stages)

    def plain(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "stage_ms_by_pixels": {
                str(pixels): {name: [round(value, 4) for value in values] for name, values in known.items()}
                for pixels, known in sorted(self.stages.items())
            }
        }

    def times(self, name: str, pixels: int) -> list[float]:
        """Of a stage for so many pixels; where they were not measured, those of the nearest number, in proportion (the
        similarities of all pairs: to the square). Empty for a stage that was not measured at all.
        """
        known = [measured for measured, stages in self.stages.items() if name in stages]
        if not known:
            return []
        nearest = min(known, key=lambda measured: abs(measured - pixels))
        ratio = (pixels / nearest) ** (2 if name == "correlate" else 1)
        return [ratio * value for value in self.stages[nearest][name]]


class VirtualClock(Clock):
    """Time that passes only by the costs of a table, drawn from it in a fixed sequence."""

    def __init__(self, costs: CostTable) -> None:
        self._costs = costs
        self._random = np.random.default_rng(0)
        self._now_ns = 0

    def now_ns(self) -> int:
        """See `Clock.now_ns`."""
        return self._now_ns

    def stages(self, device: torch.device, pixels: int) -> StageClock:
        """See `Clock.stages`."""
        return _ChargedStages(self, pixels)

    def wait_until(self, time_ns: int) -> None:
        """Nothing happens until then; no time passes if that is over."""
        self._now_ns = max(self._now_ns, time_ns)

    def snapshot(self) -> dict[str, Any]:
        """Where it stands, as plain values that survive JSON."""
        return {"now_ns": self._now_ns, "random": self._random.bit_generator.state}

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Go on from a `snapshot`."""
        self._now_ns, self._random.bit_generator.state = plain["now_ns"], plain["random"]

    def charge(self, name: str, pixels: int) -> None:
        """Let the time of a stage pass."""
        times = self._costs.times(name, pixels)
        if times:
            self._now_ns += round(1e6 * times[self._random.integers(len(times))])


class _ChargedStages(StageClock):
    """Stages whose times are those that the clock charges."""

    def __init__(self, clock: VirtualClock, pixels: int) -> None:
        self._clock, self._pixels = clock, pixels
        self._times: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """See `StageClock.stage`. That of the solver takes what its iterations take."""
        start_ns = self._clock.now_ns()
        yield
        if name != "solve":
            self._clock.charge(name, self._pixels)
        self._times[name] = self._times.get(name, 0.0) + (self._clock.now_ns() - start_ns) / 1e6

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """See `StageClock.counted`."""

        def charged(*arguments: Any) -> Any:
            result = function(*arguments)
            self._clock.charge(ITERATION, self._pixels)
            return result

        return charged

    def read(self, wait: bool = True) -> dict[str, float]:
        """See `StageClock.read`."""
        return self._times


class RealtimeLane(Lane):
    """One setting as on the robot: while it works on a frame, the newest of those that arrive is kept.

    :param clock: the estimator's.
    :param period_ns: between frames whose stamps do not say it.
    """

    def __init__(
        self,
        setting: Setting,
        estimator: Estimator,
        extras: Extras | None = None,
        *,
        clock: VirtualClock,
        period_ns: int,
    ) -> None:
        super().__init__(setting, estimator, extras)
        self._clock, self._period_ns = clock, period_ns
        self._warm = False
        self._first_ns = 0
        self._newest: tuple[Shot, int] | None = None
        """The last frame that arrived, and when; it is taken up unless another one arrives before that."""
        self._latest: tuple[Shot, int] | None = None
        """The one that arrived last of all."""

    @property
    def played_s(self) -> float:
        """How long the stream lasted so far, the last frame's period included."""
        return 0.0 if self._latest is None else (self._latest[1] - self._first_ns + self._period_ns) * 1e-9

    def take(self, shot: Shot) -> Iterator[Done]:
        """See `Lane.take`: what became of the frame before is known only now."""
        if not self._warm and shot.image is not None:
            self._estimator.warm_up(*shot.image.shape[:2])  # as the node does when it is configured
            self._warm = True
        arrival_ns = self._arrival_ns(shot)
        if self._newest is not None:
            waiting, its_arrival_ns = self._newest
            if arrival_ns <= self._clock.now_ns():
                yield Done(waiting, FrameRecord(waiting.index, waiting.stamp_ns, DROPPED, SUPERSEDED))
            else:
                yield self._work(waiting, its_arrival_ns)
        self._newest = shot, arrival_ns

    def finish(self) -> Iterator[Done]:
        """See `Lane.finish`."""
        if self._newest is not None:
            yield self._work(*self._newest)
            self._newest = None

    @property
    def last_taken(self) -> Shot | None:
        """See `Lane.last_taken`."""
        return super().last_taken if self._newest is None else self._newest[0]

    def snapshot(self) -> dict[str, np.ndarray]:
        """See `Lane.snapshot`. The frame that waits, if there is one, is the latest."""
        plain: dict[str, Any] = {"clock": self._clock.snapshot(), "first_ns": self._first_ns, "warm": self._warm}
        arrays = super().snapshot()
        if self._latest is not None:
            arrays |= prefixed("latest", self._latest[0].arrays())
            plain |= {"arrival_ns": self._latest[1], "waits": self._newest is not None}
        return {**arrays, "realtime": np.array(json.dumps(plain))}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """See `Lane.restore`."""
        super().restore(arrays)
        if "realtime" not in arrays:
            return
        plain = json.loads(str(arrays["realtime"]))
        self._first_ns, self._warm = plain["first_ns"], plain["warm"]
        if "arrival_ns" in plain:
            self._latest = Shot.of_arrays(part(arrays, "latest")), plain["arrival_ns"]
            self._newest = self._latest if plain["waits"] else None
        self._estimator.prepare()  # as it was after the last frame
        self._clock.restore(plain["clock"])  # last of all: what was done again has taken its time already

    def _arrival_ns(self, shot: Shot) -> int:
        """On the virtual clock: as long after the frame before as its stamp says."""
        if self._latest is None:
            arrival_ns = self._first_ns = self._clock.now_ns()
        else:
            before, its_arrival_ns = self._latest
            step_ns = shot.stamp_ns - before.stamp_ns
            arrival_ns = its_arrival_ns + (step_ns if step_ns > 0 else self._period_ns)
        self._latest = shot, arrival_ns
        return arrival_ns

    def _work(self, shot: Shot, arrival_ns: int) -> Done:
        clock = self._clock
        clock.wait_until(arrival_ns)
        waited_ms = (clock.now_ns() - arrival_ns) / 1e6
        if shot.image is not None:
            pixels = shot.image.shape[0] * shot.image.shape[1]
            start_ns = clock.now_ns()
            clock.charge("convert", pixels)
            clock.charge(OVERHEAD, pixels)
            shot = replace(shot, convert_ms=(clock.now_ns() - start_ns) / 1e6)
        done = self._process(shot, arrival_ns)
        with self._shares.of("computing"):
            self._estimator.prepare()
        if done.fields is not None:
            stage_ms = {"wait": waited_ms, **done.record.stage_ms}
            done = replace(done, record=replace(done.record, stage_ms=stage_ms))
        return done


def measure_costs(
    setting: Setting, model: DEQFlow | None, images: Sequence[np.ndarray], convert_ms: Sequence[float] = ()
) -> CostTable:
    """What the stages of a setting take on this machine, at every scale that it may use.

    :param images: successive frames of the stream, (H, W, 3) uint8 RGB, of one size; at least two.
    :param convert_ms: measured times of getting such an image out of a message.
    """
    if len(images) < 2:
        raise MediaError(f"expected at least two frames that can be read to measure the costs on, got {len(images)}")
    height, width = images[0].shape[:2]
    stages: dict[int, dict[str, list[float]]] = {}
    if convert_ms:
        stages[height * width] = {"convert": list(convert_ms)}
    ladder = [1.0]
    if setting.solves:
        assert model is not None
        scales = ScaleController(setting.min_scale, setting.max_scale, max_pixels=model.max_pixels)
        ladder = scales.ladder(height, width)
        ladder = ladder if setting.budget_ms is not None else ladder[:1]
    for scale in ladder:
        pixels = number_of_pixels(scaled_size(height, width, scale))
        known = stages.setdefault(pixels, {})
        for measured in _measure_scale(setting, model, images, scale):
            for name, value in measured.items():
                known.setdefault(name, []).append(value)
    return CostTable(stages)


def _measure_scale(
    setting: Setting, model: DEQFlow | None, images: Sequence[np.ndarray], scale: float
) -> Iterator[dict[str, float]]:
    iterations = min(MEASURED_ITERATIONS, setting.max_iterations)
    fixed = replace(
        setting, budget_ms=None, min_scale=scale, max_scale=scale, max_iterations=iterations, tolerance_px=None
    )
    estimator = make_estimator(fixed, model, Clock())
    began = time.perf_counter()
    for number in range(ROUNDS + 1):
        if number > 3 and time.perf_counter() - began > LONGEST_S:
            return
        first = number % (len(images) - 1)
        estimator.reset("measuring")
        estimator.update(images[first], 0)
        result = estimator.update(images[first + 1], 1)
        if number == 0 or result is None:
            continue  # the first one paid for allocations and kernel choices
        measured = dict(result.info.stage_ms)
        measured[OVERHEAD] = max(0.0, result.info.latency_ms - sum(measured.values()))
        measured[ITERATION] = measured.pop("solve") / max(1, result.info.iterations)
        yield measured
