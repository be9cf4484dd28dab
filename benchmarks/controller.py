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
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.report import write_json
from benchmarks.sequences import CUTS, ImageSequence, generated, listed, read_frames
from benchmarks.simulated_load import Account, Frame, Scenario, scenarios, simulate
from deq_flow_ros.model import DEQFlow, load_model
from deq_flow_ros.recordings import MediaError, open_source
from deq_flow_ros.streaming import FlowEstimator
from training.pairs import pair_errors

SCALES = (1.5, 1.25, 1.0, 0.75, 0.5, 0.375, 0.25)
ITERATIONS = (1, 2, 4, 8)
SIZE = 480, 640
COLOURS = ("#2b6cb0", "#dd6b20")
Runs = dict[float, list[tuple[Scenario, list[Frame]]]]


def simulated(options: argparse.Namespace) -> tuple[list[Account], Runs]:
    """Every scenario under every budget, and the frames of each run by budget."""
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
    """A recording in real time, the newest frame as soon as the one before is done; until there are so many fields."""
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
    model: DEQFlow, sequence: ImageSequence, scale: float, iterations: int
) -> Iterator[tuple[float, float]]:
    """Of the warm pairs of a sequence, by a stream of this scale and number of iterations.

    :returns: mean endpoint error, px, and time from the frame to its field, ms, of one pair after the other.
    """
    estimator = FlowEstimator(
        model, min_scale=scale, max_scale=scale, max_iterations=iterations, tolerance_px=None, max_gap_ms=1e9
    )
    estimator.update(sequence.pairs[0].image1, 0)
    for number, pair in enumerate(sequence.pairs):
        estimator.prepare()
        result = estimator.update(pair.image2, number + 1)
        if result is not None and result.info.warm and number in sequence.measured:
            yield pair_errors(pair, result.flow)[0], result.info.latency_ms


def measured(model: DEQFlow, sequences: Sequence[ImageSequence]) -> list[dict[str, Any]]:
    """Mean error (px) and median time (ms) of each group of sequences at every scale and number of iterations."""
    rows = []
    for scale in SCALES:
        for iterations in ITERATIONS:
            pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for sequence in sequences:
                pairs[sequence.group] += stream_errors(model, sequence, scale, iterations)
            epe_px = {group: float(np.mean([error for error, _ in values])) for group, values in pairs.items()}
            ms = {group: float(np.median([taken for _, taken in values])) for group, values in pairs.items()}
            rows.append({"scale": scale, "iterations": iterations, "epe_px": epe_px, "ms": ms})
    return rows


def print_accounts(accounts: Sequence[Account], console: Console) -> None:
    """The table of the module's text."""
    table = Table(title="budgets kept and used")
    for heading in (
        "budget, ms", "costs", "frames", "late, %", "late in a row", "iterations", "of oracle, %", "none, %", "scale",
        "changes/min",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "costs" else "right")
    for a in accounts:
        table.add_row(
            f"{a.budget_ms:g}", a.name, str(a.frames), f"{a.late_percent:.2f}", str(a.longest_late),
            f"{a.iterations:.2f}", "" if a.of_oracle_percent is None else f"{a.of_oracle_percent:.0f}",
            f"{a.none_percent:.1f}", f"{a.scale:.2f}", f"{a.changes_per_minute:.1f}",
        )  # fmt: skip
    console.print(table)


def print_errors(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """A table per group: scales down, iterations across."""
    for group in rows[0]["epe_px"]:
        table = Table(title=f"{group}: endpoint error of warm pairs, px, and ms from frame to field, by iterations")
        table.add_column("scale")
        for iterations in ITERATIONS:
            table.add_column(str(iterations), justify="right")
        for scale in SCALES:
            cells = (f"{row['epe_px'][group]:.2f} {row['ms'][group]:4.0f}" for row in rows if row["scale"] == scale)
            table.add_row(f"{scale:g}", *cells)
        console.print(table)


def plot(path: Path, runs: Runs) -> None:
    """Latency as a share of the budget, scale and iterations over time: a column per scenario, a colour per budget."""
    columns = len(next(iter(runs.values())))
    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 5), layout="constrained")
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
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.controller",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--budget-ms", type=float, nargs="+", default=[100.0, 200.0], help="default 100 200")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each simulated run (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated costs (default 0)")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="draw the simulated runs")
    parser.add_argument("--input", metavar="RECORDING", help="run on this machine: video, bag or folder of images")
    parser.add_argument("--frames", type=int, default=300, help="fields to compute of the recording (default 300)")
    parser.add_argument("--measure", action="store_true", help="measure the error by scale and iterations")
    parser.add_argument("--pairs", type=Path, help="with --measure: also the sequences of this list of pairs")
    parser.add_argument("--clips", type=int, default=2, help="generated sequences of each motion (default 2)")
    parser.add_argument("--model", default="nano", help="name or path of weights (default nano)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="threads of PyTorch and OpenCV (default: theirs)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything to this file")
    options = parser.parse_args(arguments)
    for name, value in (("--seconds", options.seconds), ("--budget-ms", min(options.budget_ms))):
        if not value > 0:
            parser.error(f"{name}: expected a value above 0, got {value:g}")
    for name, value in (("--frames", options.frames), ("--clips", options.clips)):
        if value < 1:
            parser.error(f"{name}: expected at least 1, got {value}")
    if options.input and options.measure:
        parser.error("expected one of --input and --measure, got both")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = parse(arguments)
    console = Console() if Console().is_terminal else Console(width=140)
    if options.threads:
        torch.set_num_threads(options.threads)
        cv2.setNumThreads(options.threads)
    figures: dict[str, Any] = {}
    device = torch.device("cpu")
    try:
        if options.input or options.measure:
            model = load_model(options.model, options.device)
            device = model.device
            figures["model"] = options.model
        if options.measure:
            recorded = listed(options.pairs, SIZE) if options.pairs else iter(())
            made = (sequence for sequence in generated(options.clips, 5, SIZE) if sequence.group != CUTS)
            figures["errors"] = measured(model, list(chain(recorded, made)))
            print_errors(figures["errors"], console)
        else:
            if options.input:
                images = read_frames(options.input, 100)
                period_s = open_source(options.input).nominal_period_ns / 1e9
                accounts = [on_machine(model, images, period_s, ms, options.frames) for ms in options.budget_ms]
            else:
                accounts, runs = simulated(options)
                if options.plot:
                    plot(options.plot, runs)
            figures["accounts"] = [asdict(account) for account in accounts]
            print_accounts(accounts, console)
    except (OSError, ValueError, RuntimeError, MediaError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    if options.json:
        write_json(options.json, device, figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
