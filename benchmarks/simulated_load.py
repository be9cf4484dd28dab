# SPDX-License-Identifier: Apache-2.0
"""The real ``FlowEstimator`` with simulated costs: a network that computes nothing, on a clock that charges for its
calls.

The estimator decides about its time (costs, scale, deadline, iterations) as it does on a real machine. Thousands of
frames take seconds. All costs are known in advance, so an oracle can tell what would have been possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deq_flow_ros.equilibrium import State
from deq_flow_ros.model import DEQFlow, Encoding
from deq_flow_ros.model.cells import FACTOR
from deq_flow_ros.streaming import FlowEstimator, FlowInfo
from deq_flow_ros.streaming.costs import AFTER_SOLVE, BEFORE_SOLVE, PREPARE, REFINE
from deq_flow_ros.streaming.plan import number_of_pixels, scaled_size
from deq_flow_ros.streaming.virtual_clock import ITERATION, CostTable, VirtualClock

# Small, so that a frame's way through the real estimator takes little; six scales below 1 are open to it.
HEIGHT, WIDTH = 256, 320
# ms on an idle machine, about those of `nano` at 640x480 on one core; only their ratios matter.
WORK = CostTable(
    {
        HEIGHT * WIDTH: {
            "resize": [0.5], "encode": [80.0], "prepare": [9.0], "match": [1.4], "correlate": [20.0], "coarse": [70.0],
            ITERATION: [40.0], "upsample": [18.0], "output": [4.0],
        }
    }
)  # fmt: skip
BEHIND = tuple(name for name in AFTER_SOLVE if name != REFINE)
STEP_NS = 4_000_000  # in which the load of the machine is constant

Slowness = Callable[[float], float]


@dataclass(frozen=True)
class Scenario:
    """How the machine changes the costs over time.

    :ivar slowness: how many times longer work takes than on an idle machine, as a function of the time in s.
    :ivar spread: standard deviation of the logarithm of every single cost, in addition to this.
    """

    name: str
    slowness: Slowness
    spread: float


def bursts(rng: np.random.Generator, seconds: float, every_s: float = 5.0, length_s: float = 0.5) -> Slowness:
    """Another process takes half of the core for a while, now and then."""
    starts = np.cumsum(length_s + rng.exponential(every_s, max(1, math.ceil(2 * seconds / every_s))))

    def slowness(time_s: float) -> float:
        number = int(np.searchsorted(starts, time_s, side="right")) - 1
        return 2.0 if number >= 0 and time_s < starts[number] + length_s else 1.0

    return slowness


def scenarios(seconds: float, seed: int) -> list[Scenario]:
    """The scenarios of the benchmark, for runs of this many seconds."""
    third = seconds / 3
    return [
        Scenario("random costs", lambda _: 1.0, 0.2),
        Scenario("bursts of 0.5 s", bursts(np.random.default_rng(seed), seconds), 0.1),
        Scenario("drift to half speed", lambda t: 1.0 + min(1.0, max(0.0, t / third - 1)), 0.1),
        Scenario("steps to half speed and back", lambda t: 2.0 if third <= t < 2 * third else 1.0, 0.1),
    ]


class LoadedClock(VirtualClock):
    """A clock whose time passes as a scenario determines. Costs depend on the frame, the stage and the moment, but
    not on what was done before, so that they can be known in advance.
    """

    def __init__(self, scenario: Scenario, seed: int) -> None:
        super().__init__(WORK)
        self._scenario, self._seed = scenario, seed
        self.frame(0)

    def frame(self, number: int) -> None:
        """Use the costs of this frame from now on."""
        names = (*BEFORE_SOLVE, PREPARE, "coarse", *BEHIND, *(f"{ITERATION} {n}" for n in range(64)))
        normal = np.random.default_rng([self._seed, number]).standard_normal(len(names))
        # Of mean 1 whatever the spread.
        spread = self._scenario.spread
        self._factors = dict(zip(names, np.exp(spread * normal - spread**2 / 2), strict=True))
        self._iterations = 0

    def charge(self, name: str, pixels: int) -> None:
        """See ``VirtualClock.charge``."""
        self._now_ns = self.after(self._now_ns, name, pixels, self._iterations)
        self._iterations += name == ITERATION

    def after(self, now_ns: int, name: str, pixels: int, iteration: int = 0) -> int:
        """When a stage that begins now will be finished."""
        (work_ms,) = WORK.times(name, pixels) or [0.0]
        left_ns = 1e6 * work_ms * self._factors[f"{name} {iteration % 64}" if name == ITERATION else name]
        while left_ns > 0:
            slowness = self._scenario.slowness(now_ns / 1e9)
            done_ns = min(left_ns, STEP_NS / slowness)
            now_ns += round(done_ns * slowness)
            left_ns -= done_ns
        return now_ns


def possible_iterations(clock: LoadedClock, start_ns: int, end_ns: int, scale: float, most: int) -> int:
    """How many iterations an oracle would make that knows the time of every stage; 0 if not even one can be in time."""
    pixels = number_of_pixels(scaled_size(HEIGHT, WIDTH, scale))
    now_ns = start_ns
    for name in BEFORE_SOLVE:
        if name != "resize" or scale != 1:
            now_ns = clock.after(now_ns, name, pixels)
    for done in range(most + 1):
        ready_ns = now_ns
        for name in BEHIND:
            ready_ns = clock.after(ready_ns, name, pixels)
        if ready_ns > end_ns:
            return max(0, done - 1)
        if done < most:
            now_ns = clock.after(now_ns, ITERATION, pixels, done)
    return most


class IdleNetwork(DEQFlow):
    """A network that computes nothing, with the shapes of a flow network that has one channel."""

    def encode(self, image: Tensor, recompute: bool = False) -> Encoding:
        """See ``DEQFlow.encode``."""
        height, width = image.shape[-2:]
        cells = torch.ones(1, 1, height // FACTOR, width // FACTOR)
        return Encoding(cells, 0 * cells)

    def prepare(self, encoding1: Encoding) -> Any:
        """See ``DEQFlow.prepare``."""
        return ()

    def problem(self, encoding1: Encoding, encoding2: Encoding, *_: Any, **__: Any) -> Any:
        """See ``DEQFlow.problem``."""
        return lambda hidden, flow: (hidden, 0.5 * flow)

    def initial_state(self, encoding: Encoding) -> State:
        """See ``DEQFlow.initial_state``."""
        return encoding.context, encoding.context.expand(-1, 2, -1, -1)

    def coarse_start(self, image1: Tensor, image2: Tensor, *_: Any) -> State:
        """See ``DEQFlow.coarse_start``."""
        return self.initial_state(self.encode(image1))

    def upsample(self, state: State) -> Tensor:
        """See ``DEQFlow.upsample``."""
        height, width = state[1].shape[-2:]
        return torch.zeros(1, 2, FACTOR * height, FACTOR * width)

    def upsample_residual(self, solution: Any) -> Tensor:
        """See ``DEQFlow.upsample_residual``."""
        return self.upsample(solution.state)[:, :1]


@dataclass(frozen=True)
class Frame:
    """What was done with one frame, and how many iterations an oracle would have made at the same scale, where that is
    known.

    :ivar time_s: the time of its arrival.
    """

    time_s: float
    info: FlowInfo
    possible: int | None


def simulate(
    scenario: Scenario, budget_ms: float, seconds: float, period_ms: float = 33.3, seed: int = 0, **settings: Any
) -> list[Frame]:
    """Frames arrive at a steady rate. As in the node, the newest frame is taken when the previous one is done."""
    clock = LoadedClock(scenario, seed)
    settings = {"latency_budget_ms": budget_ms, "tolerance_px": None} | settings
    estimator = FlowEstimator(IdleNetwork().eval(), clock, **settings)
    estimator.warm_up(HEIGHT, WIDTH)
    began_ns, period_ns = clock.now_ns(), round(1e6 * period_ms)
    image = np.tile(np.arange(WIDTH, dtype=np.uint8)[None, :, None], (HEIGHT, 1, 3))  # not flat
    number = -1
    done: list[Frame] = []
    while True:
        number = max(number + 1, (clock.now_ns() - began_ns) // period_ns)
        if number * period_ms > 1e3 * seconds:
            return done
        arrival_ns = began_ns + number * period_ns
        clock.frame(number)
        clock.wait_until(arrival_ns)
        start_ns = clock.now_ns()
        result = estimator.update(image, number * period_ns, arrival_ns)
        if result is not None:
            end_ns = arrival_ns + round(1e6 * budget_ms)
            most = estimator.settings.max_iterations
            possible = possible_iterations(clock, start_ns, end_ns, result.info.scale, most)
            done.append(Frame((arrival_ns - began_ns) / 1e9, result.info, possible))
        estimator.prepare()


@dataclass(frozen=True)
class Account:
    """How a budget was kept and used; one row of the benchmark.

    :ivar late_percent: share of the frames with flow whose flow came after the budget.
    :ivar longest_late: the largest number of late frames in a row.
    :ivar iterations: mean number.
    :ivar of_oracle_percent: iterations relative to those that would have fitted if all costs had been known; None if
        this is not known.
    :ivar none_percent: share of the frames without any iteration; their flow is that of the previous frame, carried
        along.
    :ivar scale: mean scale.
    """

    name: str
    budget_ms: float
    frames: int
    late_percent: float
    longest_late: int
    iterations: float
    of_oracle_percent: float | None
    none_percent: float
    scale: float
    changes_per_minute: float

    @classmethod
    def of(cls, name: str, budget_ms: float, seconds: float, frames: Sequence[Frame]) -> Account:
        """The account of the frames that came within a number of seconds; there must be at least one."""
        infos = [frame.info for frame in frames]
        late = "".join("x" if info.over_budget else " " for info in infos)
        made = sum(info.iterations for info in infos)
        known = [frame.possible for frame in frames if frame.possible is not None]
        changes = sum(a.scale != b.scale for a, b in pairwise(infos))
        return cls(
            name, budget_ms, len(frames), 100 * late.count("x") / len(frames), max(map(len, late.split(" "))),
            made / len(frames), 100 * made / max(1, sum(known)) if known else None,
            100 * sum(info.iterations == 0 for info in infos) / len(frames),
            sum(info.scale for info in infos) / len(frames), 60 * changes / seconds,
        )  # fmt: skip
