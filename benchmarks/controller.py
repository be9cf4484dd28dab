# SPDX-License-Identifier: Apache-2.0
"""How well a latency budget is kept, and how well it is used: simulated, or on this machine.

``python -m benchmarks.controller [--budget-ms 100 200] [--seconds 60] [--plot OUT] [--json OUT]``: the real estimator
on a simulated clock, under costs that vary at random, bursts of load, a slow drift, and steps. The same seed gives the
same figures on every machine.

``python -m benchmarks.controller --input RECORDING [--frames 300]``: the real estimator in real time, whatever else the
machine does; the recording is played at its rate, and over again while it is too short.

``python -m benchmarks.controller --measure [--pairs pairs.json] [--clips 2]``: what the rule for the scale is taken
from: the error of warm streams at fixed scales and numbers of iterations, and the time from a frame to its field.

"Late" are the frames whose flow came after the budget. "Of oracle" compares the iterations with those of an oracle that
knows in advance what every stage of the frame will take, at the same scale; on a real machine nobody knows.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain, product
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.report import Benchmark, Row, grouped, mean, median, picture, table
from benchmarks.sequences import CUTS, ImageSequence, generated, listed, read_frames, streamed
from benchmarks.simulated_load import Account, Frame, Scenario, scenarios, simulate
from deq_flow_ros.model import DEQFlow, load_model
from deq_flow_ros.recordings import open_source
from deq_flow_ros.streaming import FlowEstimator
from training.pairs import pair_errors

SCALES = (1.5, 1.25, 1.0, 0.75, 0.5, 0.375, 0.25)
ITERATIONS = (1, 2, 4, 8)
SIZE = 480, 640
COLOURS = ("#2b6cb0", "#dd6b20")
Runs = dict[float, list[tuple[Scenario, list[Frame]]]]


def simulated(options: argparse.Namespace) -> tuple[list[Account], Runs]:
    """Run every scenario with every budget; also returns the frames of each run by budget."""
    runs: Runs = {}
    for budget_ms in options.budget_ms:
        runs[budget_ms] = [
            (scenario, simulate(scenario, budget_ms, options.seconds, seed=options.seed))
            for scenario in scenarios(options.seconds, options.seed)
        ]
    accounts = [
        Account.of(scenario.name, budget_ms, options.seconds, frames)
        for budget_ms, members in runs.items()
        for scenario, frames in members
    ]
    return accounts, runs


def on_machine(model: DEQFlow, images: Sequence[np.ndarray], period_s: float, budget_ms: float, count: int) -> Account:
    """Process a recording in real time, always the newest frame once the previous one is done, until there is a
    given number of fields.
    """
    estimator = FlowEstimator(model, latency_budget_ms=budget_ms)
    estimator.warm_up(*images[0].shape[:2])
    there_and_back = [*images, *images[-2:0:-1]]  # without a cut where the recording starts over
    period_ns, began_ns = round(1e9 * period_s), estimator.clock.now_ns()
    number = -1
    frames: list[Frame] = []
    while len(frames) < count:
        number = max(number + 1, (estimator.clock.now_ns() - began_ns) // period_ns)
        arrival_ns = began_ns + number * period_ns
        time.sleep(max(0.0, (arrival_ns - estimator.clock.now_ns()) / 1e9))
        image = there_and_back[number % len(there_and_back)]
        result = estimator.update(image, number * period_ns, arrival_ns)
        estimator.prepare()
        if result is not None:
            frames.append(Frame((arrival_ns - began_ns) / 1e9, result.info, None))
    return Account.of("this machine", budget_ms, (estimator.clock.now_ns() - began_ns) / 1e9, frames)


def stream_errors(
    model: DEQFlow, sequence: ImageSequence, scale: float, iterations: int, refinement: int = 0
) -> Iterator[tuple[float, float]]:
    """The errors of the warm pairs of a sequence, solved by a stream at this scale with this number of iterations.

    :returns: for each pair in turn, the mean endpoint error in px and the time from the frame to its field in ms.
    """
    limits = {"min_scale": scale, "max_scale": scale, "max_iterations": iterations, "tolerance_px": None}
    for place, result in streamed(model, sequence, refinement=refinement, **limits):
        if result.info.warm:
            yield pair_errors(sequence.pairs[place], result.flow)[0], result.info.latency_ms


def measured(model: DEQFlow, sequences: Sequence[ImageSequence], refinements: Sequence[int] = (0,)) -> list[Row]:
    """Mean error (px) and median time (ms) of each group of sequences at every scale and number of iterations.

    :param refinements: the numbers of refinement steps to try.
    """
    rows = []
    for scale, iterations, refinement in product(SCALES, ITERATIONS, refinements):
        pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for sequence in sequences:
            pairs[sequence.group] += stream_errors(model, sequence, scale, iterations, refinement)
        epe_px = {group: mean(error for error, _ in values) for group, values in pairs.items()}
        ms = {group: median(taken for _, taken in values) for group, values in pairs.items()}
        rows.append({"scale": scale, "iterations": iterations, "refinement": refinement, "epe_px": epe_px, "ms": ms})
    return rows


def print_accounts(accounts: Sequence[Account], console: Console) -> None:
    """Print the table that the docstring of the module describes."""
    columns = [
        "frames", "late, %", "late in a row", "iterations", "of oracle, %", "none, %", "scale", "changes/min",
    ]  # fmt: skip
    kept = table("budgets kept and used", ["budget, ms", "costs"], columns)
    for a in accounts:
        kept.add_row(
            f"{a.budget_ms:g}", a.name, str(a.frames), f"{a.late_percent:.2f}", str(a.longest_late),
            f"{a.iterations:.2f}", "" if a.of_oracle_percent is None else f"{a.of_oracle_percent:.0f}",
            f"{a.none_percent:.1f}", f"{a.scale:.2f}", f"{a.changes_per_minute:.1f}",
        )  # fmt: skip
    console.print(kept)


def print_errors(rows: Sequence[Row], console: Console) -> None:
    """Print a table per group, with scales and refinements as rows and iterations as columns."""
    for group in rows[0]["epe_px"]:
        title = f"{group}: endpoint error of warm pairs, px, and ms from frame to field, by iterations"
        errors = table(title, ["scale", "refinement"], ITERATIONS)
        for (scale, refinement), some in grouped(rows, "scale", "refinement").items():
            cells = (f"{row['epe_px'][group]:.2f} {row['ms'][group]:4.0f}" for row in some)
            errors.add_row(f"{scale:g}", str(refinement), *cells)
        console.print(errors)


def plot(path: Path, runs: Runs) -> None:
    """Draw latency as a share of the budget, scale and iterations over time: one column per scenario, one colour per
    budget.
    """
    columns = len(next(iter(runs.values())))
    with picture(path, 11, 5, font_size=8) as figure:
        axes = figure.subplots(3, columns, sharex=True, sharey="row")
        for (budget_ms, members), colour in zip(runs.items(), COLOURS, strict=False):
            for column, (scenario, frames) in enumerate(members):
                times = [frame.time_s for frame in frames]
                infos = [frame.info for frame in frames]
                share = [info.latency_ms / budget_ms for info in infos]
                axes[0, column].set_title(scenario.name)
                axes[0, column].plot(times, share, ".", markersize=1.5, color=colour)
                axes[1, column].plot(times, [info.scale for info in infos], color=colour, linewidth=1)
                made = [info.iterations for info in infos]
                axes[2, column].plot(times, made, ".", markersize=1.5, color=colour, label=f"{budget_ms:g} ms")
        for name, row in zip(("latency / budget", "scale", "iterations"), axes, strict=True):
            row[0].set_ylabel(name)
        for column in range(columns):
            axes[0, column].axhline(1.0, color="#1a202c", linewidth=0.8, linestyle="--")
            axes[2, column].set_xlabel("s")
        handles, labels = axes[2, 0].get_legend_handles_labels()
        named = [f"budget {label}" for label in labels]
        figure.legend(handles, named, loc="outside upper right", ncols=len(named), markerscale=4)


def run(options: argparse.Namespace, console: Console) -> Row:
    """Run the one of the three measurements that the options ask for."""
    if not (options.input or options.measure):
        accounts, runs = simulated(options)
        if options.plot:
            plot(options.plot, runs)
    else:
        model = load_model(options.model, options.device)
        if options.measure:
            recorded = listed(options.pairs, SIZE) if options.pairs else iter(())
            made = (sequence for sequence in generated(options.clips, 5, SIZE) if sequence.group != CUTS)
            errors = measured(model, list(chain(recorded, made)), options.refinement)
            print_errors(errors, console)
            return {"errors": errors}
        images = read_frames(options.input, 100)
        period_s = open_source(options.input).nominal_period_ns / 1e9
        accounts = [on_machine(model, images, period_s, ms, options.frames) for ms in options.budget_ms]
    print_accounts(accounts, console)
    return {"accounts": [asdict(account) for account in accounts]}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__, plot="the simulated runs")
    line.add_number("--budget-ms", [100.0, 200.0], "latency budgets", above=0, nargs="+")
    line.add_number("--seconds", 60.0, "of each simulated run", above=0)
    line.add_number("--seed", 0, "of the simulated costs", least=0)
    line.add_argument("--input", metavar="RECORDING", help="run on this machine: video, bag or folder of images")
    line.add_number("--frames", 300, "fields to compute of the recording", least=1)
    line.add_argument("--measure", action="store_true", help="measure the error by scale and iterations")
    line.add_pairs("with --measure: also the sequences of this list of pairs")
    line.add_number("--clips", 2, "generated sequences of each motion", least=1)
    line.add_number("--refinement", [0], "with --measure: steps of the refinement", least=0, nargs="+")
    line.add_model()
    options = line.parse_args(arguments)
    if options.input and options.measure:
        line.error("expected one of --input and --measure, got both")
    return line.run(options, run)


if __name__ == "__main__":
    raise SystemExit(main())
