# SPDX-License-Identifier: Apache-2.0
"""How well a latency budget is kept, and how well it is used, on a simulated clock.

``python -m benchmarks.controller [--budget-ms 100 200] [--seconds 60] [--json OUT]``

The real ``FlowEstimator`` decides about its time as on a real machine, over a network that computes nothing and a
clock that charges for its calls: costs that vary at random, bursts of load, a slow drift, and steps. The figures are
the same on every machine.

*late*: share of the frames whose flow came after the budget; *in a row*: the most late ones one after the other.
*used*: the mean latency, as a share of the budget. *none*: share of the frames without any iteration; their flow is the
previous one, carried along.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise, product
from statistics import fmean
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.report import Benchmark, Row, print_table
from deq_flow_ros.equilibrium import State
from deq_flow_ros.model import DEQFlow, Encoding
from deq_flow_ros.model.cells import FACTOR
from deq_flow_ros.streaming import FlowEstimator, FlowInfo
from deq_flow_ros.streaming.clock import CostTable, VirtualClock
from deq_flow_ros.streaming.costs import ITERATION

# Small, so that a frame's way through the real estimator takes little; six scales below 1 are open to it.
HEIGHT, WIDTH = 256, 320
# ms on an idle machine, about those of `nano` at 640x480 on one core; only their ratios matter.
WORK_MS = {
    "resize": 0.5, "encode": 80.0, "prepare": 9.0, "match": 1.4, "correlate": 20.0, "coarse": 70.0, ITERATION: 40.0,
    "upsample": 18.0, "output": 4.0,
}  # fmt: skip
DRAWS = 1000  # costs of each stage that the clock draws from
STEP_NS = 4_000_000  # in which the load of the machine is constant
PERIOD_MS = 33.3
COLUMNS = {
    "budget, ms": "{budget_ms:g}", "costs": "{costs}", "frames": "{frames}", "late, %": "{late_percent:.2f}",
    "in a row": "{longest_late}", "used, %": "{used_percent:.0f}", "iterations": "{iterations:.2f}",
    "none, %": "{none_percent:.1f}", "scale": "{scale:.2f}", "changes/min": "{changes_per_minute:.1f}",
}  # fmt: skip
Slowness = Callable[[float], float]
"""How many times longer work takes than on an idle machine, as a function of the time in s."""


def bursts(seconds: float, every_s: float = 5.0, length_s: float = 0.5) -> Slowness:
    """Another process takes half of the core for a while, now and then."""
    waits_s = np.random.default_rng(0).exponential(every_s, max(1, math.ceil(2 * seconds / every_s)))
    starts = np.cumsum(length_s + waits_s)
    return lambda time_s: 2.0 if ((starts <= time_s) & (time_s < starts + length_s)).any() else 1.0


def scenarios(seconds: float) -> dict[str, tuple[Slowness, float]]:
    """By name, for runs of this many seconds: how the machine changes the costs over time, and the standard deviation
    of the logarithm of every single cost beside that.
    """
    third = seconds / 3
    return {
        "random costs": (lambda _: 1.0, 0.2),
        "bursts of 0.5 s": (bursts(seconds), 0.1),
        "drift to half speed": (lambda t: 1.0 + min(1.0, max(0.0, t / third - 1)), 0.1),
        "steps to half speed and back": (lambda t: 2.0 if third <= t < 2 * third else 1.0, 0.1),
    }


class LoadedClock(VirtualClock):
    """A clock of a machine whose speed changes."""

    def __init__(self, slowness: Slowness, spread: float) -> None:
        rng = np.random.default_rng(0)
        factors = np.exp(spread * rng.standard_normal((len(WORK_MS), DRAWS)) - spread**2 / 2)  # of mean 1
        costs = zip(WORK_MS, factors * np.array(list(WORK_MS.values()))[:, None], strict=True)
        super().__init__(CostTable({HEIGHT * WIDTH: {name: ms.tolist() for name, ms in costs}}))
        self._slowness = slowness

    def charge(self, name: str, pixels: int) -> None:
        began_ns = self._now_ns
        super().charge(name, pixels)
        left_ns, self._now_ns = float(self._now_ns - began_ns), began_ns
        while left_ns > 0:
            slowness = self._slowness(self._now_ns / 1e9)
            done_ns = min(left_ns, STEP_NS / slowness)
            self._now_ns += round(done_ns * slowness)
            left_ns -= done_ns


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


def simulate(slowness: Slowness, spread: float, budget_ms: float, seconds: float) -> list[FlowInfo]:
    """Frames arrive at a steady rate. As in the node, the newest frame is taken when the previous one is done."""
    clock = LoadedClock(slowness, spread)
    estimator = FlowEstimator(IdleNetwork().eval(), clock, latency_budget_ms=budget_ms, tolerance_px=None)
    estimator.warm_up(HEIGHT, WIDTH)
    began_ns, period_ns = clock.now_ns(), round(1e6 * PERIOD_MS)
    image = np.tile(np.arange(WIDTH, dtype=np.uint8)[None, :, None], (HEIGHT, 1, 3))  # not flat
    number, done = 0, list[FlowInfo]()
    while number * PERIOD_MS <= 1e3 * seconds:
        arrival_ns = began_ns + number * period_ns
        clock.wait_until(arrival_ns)
        result = estimator.update(image, number * period_ns, arrival_ns)
        done += [] if result is None else [result.info]
        estimator.prepare()
        number = max(number + 1, (clock.now_ns() - began_ns) // period_ns)
    return done


def account(seconds: float, infos: Sequence[FlowInfo]) -> Row:
    """How a budget was kept and used by the frames of so many seconds, at least one; iterations and scale are means."""
    late = [info.over_budget for info in infos]
    return {
        "frames": len(infos), "late_percent": 100 * fmean(late), "iterations": fmean(info.iterations for info in infos),
        "longest_late": max(sum(run) for _, run in groupby(late)),
        "used_percent": 100 * fmean(info.latency_ms / (info.budget_ms or math.inf) for info in infos),
        "none_percent": 100 * fmean(info.iterations == 0 for info in infos),
        "scale": fmean(info.scale for info in infos),
        "changes_per_minute": 60 / seconds * sum(a.scale != b.scale for a, b in pairwise(infos)),
    }  # fmt: skip


def run(options: argparse.Namespace, console: Console) -> Row:
    """Simulate every scenario with every budget, and print the table."""
    accounts = [
        {"budget_ms": ms, "costs": name, **account(options.seconds, simulate(*costs, ms, options.seconds))}
        for ms, (name, costs) in product(options.budget_ms, scenarios(options.seconds).items())
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
