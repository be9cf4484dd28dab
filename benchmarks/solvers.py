# SPDX-License-Identifier: Apache-2.0
"""Convergence of each solver on real images: residual and distance to the fixed point against iterations.

``python -m benchmarks.solvers --pairs pairs.json [--sequence FRAMES] [--model NAME_OR_PATH] [--plot OUT] [--json OUT]``

Cold: every pair of the list from zero. With a sequence (a video, bag or folder of images) its consecutive pairs too,
cold and warm: from the settled state of the pair before, carried along the motion as in a stream. All solvers start
from the same state.

*Residual*: RMS of the flow update, full-resolution px, which is what the solver stops on. *Distance*: RMS difference
from the reference, the flow of least residual that Anderson's method finds in ``--reference`` times as many iterations;
its own residual is printed, since the distance means nothing far below it. Times are processor time on a CPU and wall
time on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks.report import Benchmark, Row, clock_s, grouped, mean, median, picture, table, watched
from benchmarks.sequences import EncodedPair, first_below, first_pairs, fitted, recorded
from deq_flow_ros.equilibrium import Anderson, Broyden, Picard, Solver, State, solve
from deq_flow_ros.model import FACTOR, DEQFlow, load_model, update_px
from deq_flow_ros.streaming.warm_start import carry

SOLVERS: dict[str, Solver] = {
    "picard": Picard(),
    "picard, damping 0.7": Picard(0.7),
    "anderson": Anderson(),
    "broyden": Broyden(),
}
COLOURS = ("#2b6cb0", "#a0aec0", "#dd6b20", "#2f855a")
PAIRS, COLD, WARM = "pairs, cold", "sequence, cold", "sequence, warm"
MARKS = (1, 2, 4, 8, 12, 24)
"""Numbers of iterations at which the endpoint error is printed."""


class Bench:
    """A model, and the measurements that are made with it."""

    def __init__(self, model: DEQFlow, options: argparse.Namespace) -> None:
        self.model, self.iterations = model, options.iterations
        self.reference = options.iterations * options.reference

    def rows(self, options: argparse.Namespace) -> Iterator[Row]:
        """One row per case, pair and solver: the list cold, then the sequence cold and from the previous pair."""
        size = options.height, options.width
        samples = [fitted(sample, size) for sample in first_pairs(options.pairs, options.first)]
        following = recorded(options.sequence, options.frames, size).pairs if options.sequence else []
        for sample in samples:
            pair = EncodedPair(self.model, sample)
            yield from self.start(PAIRS, pair, pair.zero())[0]
        warm: State | None = None
        for sample in following:
            pair = EncodedPair(self.model, sample)
            rows, settled = self.start(COLD, pair, pair.zero())
            if warm is not None:  # the first pair has no warm start to compare with
                yield from rows
                yield from self.start(WARM, pair, warm)[0]
            warm = carry(settled)

    def start(self, case: str, pair: EncodedPair, start: State) -> tuple[Iterator[Row], State]:
        """One row per solver from one start, each measured when it is asked for, and the reference."""
        settled = pair.settled(start, self.reference)
        about = {"case": case, "pair": pair.sample.name, "reference_residual_px": float(settled.residual)}
        rows = (
            {**about, "solver": name, **self.curves(pair, start, solver, settled.state, case == PAIRS)}
            for name, solver in SOLVERS.items()
        )
        return rows, settled.state

    def curves(self, pair: EncodedPair, start: State, solver: Solver, settled: State, with_error: bool) -> Row:
        """Residual and distance (px) at each iteration, ms per iteration, and the errors at the marked iterations."""
        everywhere, device = range(1, self.iterations + 1), self.model.device
        began = clock_s(device)
        solution = solve(
            pair.problem, start, solver=solver, max_iterations=self.iterations, measure=update_px, keep=everywhere
        )
        milliseconds = 1e3 * (clock_s(device) - began) / self.iterations
        states = solution.trajectory
        distances = [FACTOR * (states[n][1] - settled[1]).square().sum(1).mean().sqrt() for n in everywhere]
        return {
            "residual_px": solution.trace[:, 0].tolist(),
            "distance_px": torch.stack(distances).tolist(),
            "ms": milliseconds,
            "epe_px": {n: pair.error(states[n]) for n in MARKS if n in states} if with_error else {},
        }


def summarise(rows: list[Row], bounds: list[float]) -> list[Row]:
    """For each case and solver: the iterations to each bound (median over the pairs), and how many pairs reached it."""
    summary = []
    for (case, solver), some in grouped(rows, "case", "solver").items():
        needed: dict[str, Row] = {"residual": {}, "distance": {}}
        for what, entries in needed.items():
            for bound in bounds:
                counts = [first_below(row[f"{what}_px"], bound) for row in some]
                entries[f"{bound:g}"] = {"iterations": median(counts), "reached": int(np.isfinite(counts).sum())}
        summary.append(
            {
                "case": case, "solver": solver, "pairs": len(some), "iterations_to_px": needed,
                "ms_per_iteration": median(row["ms"] for row in some),
                "reference_residual_px": median(row["reference_residual_px"] for row in some),
                "epe_px": {n: mean(row["epe_px"][n] for row in some) for n in some[0]["epe_px"]},
            }
        )  # fmt: skip
    return summary


def print_tables(summary: list[Row], console: Console) -> None:
    """Print the iterations needed, then the endpoint errors."""
    needed = [(what, bound) for what, entries in summary[0]["iterations_to_px"].items() for bound in entries]
    title = "iterations to so many px: median over the pairs (how many got there)"
    iterations = table(title, ["case", "solver"], [*(" ".join(column) for column in needed), "ms / it."])
    for row in summary:
        entries = [row["iterations_to_px"][what][bound] for what, bound in needed]
        cells = [f"{entry['iterations']:g} ({entry['reached']})".replace("inf", "-") for entry in entries]
        iterations.add_row(f"{row['case']} ({row['pairs']})", row["solver"], *cells, f"{row['ms_per_iteration']:.0f}")
    console.print(iterations)
    for case, residual in dict.fromkeys((row["case"], round(row["reference_residual_px"], 4)) for row in summary):
        console.print(f"{case}: median residual of the reference {residual:g} px")
    with_truth = [row for row in summary if row["epe_px"]]
    title = "endpoint error after so many iterations from zero, px, mean over the pairs"
    errors = table(title, ["solver"], with_truth[0]["epe_px"])
    for row in with_truth:
        errors.add_row(row["solver"], *(f"{error:.2f}" for error in row["epe_px"].values()))
    console.print(errors)


def plot(rows: list[Row], path: Path) -> None:
    """Draw the residual against iterations, median over the pairs, with one panel per case."""
    cases = grouped(rows, "case")
    with picture(path, 3.4 * len(cases), 3.2) as figure:
        panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
        for axes, (case, of_case) in zip(panels, cases.items(), strict=True):
            for (name, some), colour in zip(grouped(of_case, "solver").items(), COLOURS, strict=True):
                updates = np.median([row["residual_px"] for row in some], 0)
                axes.semilogy(range(1, len(updates) + 1), updates, color=colour, label=name)
            axes.axhline(0.05, color="#c53030", linewidth=0.8, linestyle="--")
            axes.set(title=f"{case} ({len(some)} pairs)", xlabel="iterations")
        panels[0].set_ylabel("flow update, RMS px")
        panels[-1].legend(frameon=False)


def measure(options: argparse.Namespace, console: Console) -> Row:
    """Measure every solver on every pair."""
    bench = Bench(load_model(options.model, options.device), options)
    with torch.inference_mode():
        rows = watched(bench.rows(options), console, "{case}: {pair}, {solver}")
    summary = summarise(rows, options.bound)
    print_tables(summary, console)
    if options.plot:
        plot(rows, options.plot)
    return {"iterations": options.iterations, "summary": summary, "curves": rows}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__, plot="the curves")
    line.add_pairs(required=True)
    line.add_argument("--sequence", help="video, bag or folder of images, for warm starts")
    line.add_number("--first", None, "so many pairs of each group of the list (default: all)", least=1, kind=int)
    line.add_number("--frames", 6, "frames of the sequence", least=3)
    line.add_size(240, 320, "images are made smaller to fit")
    line.add_model()
    line.add_number("--iterations", 36, "evaluations per solve", least=1)
    line.add_number("--reference", 3, "so many times more for the reference", least=1)
    line.add_number("--bound", [0.05, 0.2], "px, to count iterations to", above=0, nargs="+")
    return line.run(line.parse_args(arguments), measure)


if __name__ == "__main__":
    raise SystemExit(main())
