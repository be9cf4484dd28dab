# SPDX-License-Identifier: Apache-2.0
"""How well a latency budget is kept, and how well it is used, on a simulated clock.

``python -m benchmarks.controller [--budget-ms 100 200] [--seconds 60] [--json OUT]``

The real ``FlowEstimator`` decides about its time as on a real machine, over a network that computes nothing and a
clock that charges for its calls: costs that vary at random, bursts of load, a slow drift, and steps. The figures are
the same on every machine.

*late*: share of the frames whose flow came after the budget; *in a row*: the most late ones one after the other. *of
oracle*: iterations, relative to those of an oracle that knows in advance what every stage of the frame will take, at
the same scale. *none*: share of the frames without any iteration; their flow is the previous one, carried along.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.report import Benchmark, Row, print_table
from deq_flow_ros.equilibrium import State
from deq_flow_ros.model import DEQFlow, Encoding
from deq_flow_ros.model.cells import FACTOR
from deq_flow_ros.streaming import FlowEstimator, FlowInfo
from deq_flow_ros.streaming.clock import ITERATION, CostTable, VirtualClock
from deq_flow_ros.streaming.costs import AFTER_SOLVE, BEFORE_SOLVE, PREPARE, REFINE
from deq_flow_ros.streaming.plan import number_of_pixels, scaled_size

# Small, so that a frame's way through the real estimator takes little; six scales below 1 are open to it.
HEIGHT, WIDTH = 256, 320
# ms on an idle machine, about those of `nano` at 640x480 on one core; only their ratios matter.
MS = {
    "resize": 0.5, "encode": 80.0, "prepare": 9.0, "match": 1.4, "correlate": 20.0, "coarse": 70.0, ITERATION: 40.0,
    "upsample": 18.0, "output": 4.0,
}  # fmt: skip
WORK = CostTable({HEIGHT * WIDTH: {name: [ms] for name, ms in MS.items()}})
BEHIND = tuple(name for name in AFTER_SOLVE if name != REFINE)
STEP_NS = 4_000_000  # in which the load of the machine is constant
PERIOD_MS = 33.3
COLUMNS = {
    "budget, ms": "{budget_ms:g}", "costs": "{costs}", "frames": "{frames}", "late, %": "{late_percent:.2f}",
    "in a row": "{longest_late}", "iterations": "{iterations:.2f}", "of oracle, %": "{of_oracle_percent:.0f}",
    "none, %": "{none_percent:.1f}", "scale": "{scale:.2f}", "changes/min": "{changes_per_minute:.1f}",
}  # fmt: skip
Slowness = Callable[[float], float]


class Scenario(NamedTuple):
    """How the machine changes the costs over time.

    :ivar slowness: how many times longer work takes than on an idle machine, as a function of the time in s.
    :ivar spread: standard deviation of the logarithm of every single cost, in addition to this.
    """

    name: str
    slowness: Slowness
    spread: float


def bursts(seconds: float, every_s: float = 5.0, length_s: float = 0.5) -> Slowness:
    """Another process takes half of the core for a while, now and then."""
    waits_s = np.random.default_rng(0).exponential(every_s, max(1, math.ceil(2 * seconds / every_s)))
    starts = np.cumsum(length_s + waits_s)
    return lambda time_s: 2.0 if ((starts <= time_s) & (time_s < starts + length_s)).any() else 1.0


def scenarios(seconds: float) -> list[Scenario]:
    """The scenarios of the benchmark, for runs of this many seconds."""
    third = seconds / 3
    return [
        Scenario("random costs", lambda _: 1.0, 0.2),
        Scenario("bursts of 0.5 s", bursts(seconds), 0.1),
        Scenario("drift to half speed", lambda t: 1.0 + min(1.0, max(0.0, t / third - 1)), 0.1),
        Scenario("steps to half speed and back", lambda t: 2.0 if third <= t < 2 * third else 1.0, 0.1),
    ]


class LoadedClock(VirtualClock):
    """A clock whose costs depend on frame, stage and moment, not on what was done before: they are known in advance."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(WORK)
        self._scenario = scenario
        self.frame(0)

    def frame(self, number: int) -> None:
        """Use the costs of this frame from now on."""
        names = (*BEFORE_SOLVE, PREPARE, "coarse", *BEHIND, *(f"{ITERATION} {n}" for n in range(64)))
        normal = np.random.default_rng([0, number]).standard_normal(len(names))
        spread, self._iterations = self._scenario.spread, 0
        # Of mean 1 whatever the spread.
        self._factors = dict(zip(names, np.exp(spread * normal - spread**2 / 2), strict=True))

    def charge(self, name: str, pixels: int) -> None:
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
        height, width = image.shape[-2:]
        cells = torch.ones(1, 1, height // FACTOR, width // FACTOR)
        return Encoding(cells, 0 * cells)

    def prepare(self, encoding1: Encoding) -> Any:
        return ()

    def problem(self, encoding1: Encoding, encoding2: Encoding, *_: Any, **__: Any) -> Any:
        return lambda hidden, flow: (hidden, 0.5 * flow)

    def initial_state(self, encoding: Encoding) -> State:
        return encoding.context, encoding.context.expand(-1, 2, -1, -1)

    def coarse_start(self, image1: Tensor, image2: Tensor, *_: Any) -> State:
        return self.initial_state(self.encode(image1))

    def upsample(self, state: State) -> Tensor:
        return state[1].repeat_interleave(FACTOR, 2).repeat_interleave(FACTOR, 3)

    def upsample_residual(self, solution: Any) -> Tensor:
        return self.upsample(solution.state)[:, :1]


class Frame(NamedTuple):
    """What was done with one frame, and how many iterations an oracle would have made."""

    info: FlowInfo
    possible: int


def simulate(scenario: Scenario, budget_ms: float, seconds: float) -> list[Frame]:
    """Frames arrive at a steady rate. As in the node, the newest frame is taken when the previous one is done."""
    clock = LoadedClock(scenario)
    estimator = FlowEstimator(IdleNetwork().eval(), clock, latency_budget_ms=budget_ms, tolerance_px=None)
    estimator.warm_up(HEIGHT, WIDTH)
    began_ns, period_ns, most = clock.now_ns(), round(1e6 * PERIOD_MS), estimator.settings.max_iterations
    image = np.tile(np.arange(WIDTH, dtype=np.uint8)[None, :, None], (HEIGHT, 1, 3))  # not flat
    number, done = 0, list[Frame]()
    while number * PERIOD_MS <= 1e3 * seconds:
        arrival_ns = began_ns + number * period_ns
        clock.frame(number)
        clock.wait_until(arrival_ns)
        start_ns = clock.now_ns()
        result = estimator.update(image, number * period_ns, arrival_ns)
        if result is not None:
            end_ns = arrival_ns + round(1e6 * budget_ms)
            done.append(Frame(result.info, possible_iterations(clock, start_ns, end_ns, result.info.scale, most)))
        estimator.prepare()
        number = max(number + 1, (clock.now_ns() - began_ns) // period_ns)
    return done


def account(seconds: float, frames: Sequence[Frame]) -> Row:
    """How a budget was kept and used by the frames of so many seconds, at least one; iterations and scale are means."""
    infos, count = [frame.info for frame in frames], len(frames)
    late = "".join("x" if info.over_budget else " " for info in infos)
    made = sum(info.iterations for info in infos)
    return {
        "frames": count, "late_percent": 100 * late.count("x") / count, "longest_late": max(map(len, late.split(" "))),
        "iterations": made / count, "of_oracle_percent": 100 * made / max(1, sum(frame.possible for frame in frames)),
        "none_percent": 100 * sum(info.iterations == 0 for info in infos) / count,
        "scale": sum(info.scale for info in infos) / count,
        "changes_per_minute": 60 / seconds * sum(a.scale != b.scale for a, b in pairwise(infos)),
    }  # fmt: skip


def run(options: argparse.Namespace, console: Console) -> Row:
    """Simulate every scenario with every budget, and print the table."""
    accounts = [
        {"budget_ms": ms, "costs": some.name, **account(options.seconds, simulate(some, ms, options.seconds))}
        for ms, some in product(options.budget_ms, scenarios(options.seconds))
    ]
    print_table(console, "budgets kept and used", COLUMNS, accounts, names=2)
    return {"accounts": accounts}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__, device=False)
    line.add_number("--budget-ms", [100.0, 200.0], "latency budgets", above=0, nargs="+")
    line.add_number("--seconds", 60.0, "of each simulated run", above=0)
    return line.run(line.parse_args(arguments), run)


if __name__ == "__main__":
    raise SystemExit(main())
