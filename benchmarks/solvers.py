# SPDX-License-Identifier: Apache-2.0
"""Convergence of each solver on real images: the update that is left, against iterations.

``python -m benchmarks.solvers --pairs pairs.json [--sequence FRAMES] [--model NAME_OR_PATH] [--plot OUT] [--json OUT]``

Cold: every pair of the list from zero. With a sequence its consecutive pairs too, cold and warm: from the settled state
of the pair before, carried along the motion as in a stream. All solvers start from the same state. The settled state is
the one of least update that Anderson's method finds in three times as many iterations.

The update is the RMS of the flow update, full-resolution px, which is what a solver stops on; medians over the pairs.
Times are processor time on a CPU and wall time on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from rich.console import Console

from benchmarks.report import Benchmark, Row, clock_s, grouped, picture, print_table, watched
from benchmarks.sequences import EncodedPair, add_inputs, first_below, first_pairs, recordings
from deq_flow_ros.equilibrium import Anderson, Broyden, Picard, Solver, State, solve
from deq_flow_ros.model import DEQFlow, load_model, update_px
from deq_flow_ros.streaming.warm_start import carry

SOLVERS: dict[str, Solver] = {
    "picard": Picard(),
    "picard, damping 0.7": Picard(0.7),
    "anderson": Anderson(),
    "broyden": Broyden(),
}
COLOURS = ("#2b6cb0", "#a0aec0", "#dd6b20", "#2f855a")
PAIRS, COLD, WARM = "pairs, cold", "sequence, cold", "sequence, warm"
BOUNDS, MARKS = (0.2, 0.05), (1, 2, 4, 8, 12, 24)
"""Updates in px that iterations are counted to; iterations at which the endpoint error and the update are printed."""


def rows_of(model: DEQFlow, options: argparse.Namespace) -> Iterator[Row]:
    """One row per case, pair and solver: the list cold, then the sequences cold and from the previous pair."""
    for sample in first_pairs(options):
        pair = EncodedPair(model, sample)
        yield from compare(PAIRS, pair, pair.zero(), options.iterations)[0]
    for sequence in recordings(options):
        warm: State | None = None
        for sample in sequence.pairs:
            pair = EncodedPair(model, sample)
            rows, settled = compare(COLD, pair, pair.zero(), options.iterations)
            if warm is not None:  # the first pair has no warm start to compare with
                yield from rows
                yield from compare(WARM, pair, warm, options.iterations)[0]
            warm = carry(settled)


def compare(case: str, pair: EncodedPair, start: State, iterations: int) -> tuple[Iterator[Row], State]:
    """One row per solver from one start, each measured when it is asked for, and the settled state."""
    settled, device = pair.settled(start, 3 * iterations), start[1].device
    about = {"case": case, "pair": pair.sample.name, "reference_px": float(settled.residual)}

    def row(solver: Solver) -> Row:
        began = clock_s(device)
        keep = [n for n in MARKS if n <= iterations and case == PAIRS]
        solution = solve(pair.problem, start, solver=solver, max_iterations=iterations, measure=update_px, keep=keep)
        ms = 1e3 * (clock_s(device) - began) / iterations
        errors = {n: pair.error(state) for n, state in solution.trajectory.items()}
        return {"residual_px": solution.trace[:, 0].tolist(), "ms": ms, "epe_px": errors}

    return ({**about, "solver": name, **row(solver)} for name, solver in SOLVERS.items()), settled.state


def summarise(rows: list[Row]) -> list[Row]:
    """By case and solver: iterations to each bound, how many pairs got there, the update that is left, mean error."""
    summary = []
    for (case, solver), some in grouped(rows, "case", "solver").items():
        counts = {f"{bound:g}": [first_below(row["residual_px"], bound) for row in some] for bound in BOUNDS}
        left = np.median([row["residual_px"] for row in some], 0).tolist()
        summary.append(
            {
                "case": case, "solver": solver, "pairs": len(some),
                "to_px": {
                    bound: {"iterations": median(needed), "reached": int(np.isfinite(needed).sum())}
                    for bound, needed in counts.items()
                },
                "left_px": {n: left[n - 1] for n in sorted({*MARKS, len(left)}) if n <= len(left)},
                "ms": median(row["ms"] for row in some),
                "reference_px": median(row["reference_px"] for row in some),
                "epe_px": {n: fmean(row["epe_px"][n] for row in some) for n in some[0]["epe_px"]},
            }
        )  # fmt: skip
    return summary


def plot(rows: list[Row], path: Path) -> None:
    """Draw the update against iterations, median over the pairs, with one panel per case."""
    cases = grouped(rows, "case")
    with picture(path, 3.4 * len(cases), 3.2) as figure:
        panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
        for axes, (case, of_case) in zip(panels, cases.items(), strict=True):
            for (name, some), colour in zip(grouped(of_case, "solver").items(), COLOURS, strict=True):
                updates = np.median([row["residual_px"] for row in some], 0)
                axes.semilogy(range(1, len(updates) + 1), updates, color=colour, label=name)
            axes.axhline(BOUNDS[-1], color="#c53030", linewidth=0.8, linestyle="--")
            axes.set(title=f"{case} ({len(some)} pairs)", xlabel="iterations")
        panels[0].set_ylabel("flow update, RMS px")
        panels[-1].legend(frameon=False)


def measure(options: argparse.Namespace, console: Console) -> Row:
    """Measure every solver on every pair, and print the tables."""
    model = load_model(options.model, options.device)
    with torch.inference_mode():
        rows = watched(rows_of(model, options), console, "{case}: {pair}, {solver}")
    summary = summarise(rows)
    columns = {"case": "{case} ({pairs})", "solver": "{solver}"}
    columns |= {f"to {b:g} px": f"{{to_px[{b:g}][iterations]:g}} ({{to_px[{b:g}][reached]}})" for b in BOUNDS}
    columns |= {f"left after {n}": f"{{left_px[{n}]:.4f}}" for n in summary[0]["left_px"] if n >= MARKS[-2]}
    columns |= {"reference": "{reference_px:.4f}", "ms / it.": "{ms:.0f}"}
    title = "iterations to an update, median over the pairs (how many got there); the update that is left, px"
    print_table(console, title, columns, summary, names=2)
    with_truth = [row for row in summary if row["epe_px"]]
    columns = {"solver": "{solver}", **{f"{n}": f"{{epe_px[{n}]:.2f}}" for n in MARKS}}
    print_table(
        console, "endpoint error after so many iterations from zero, px, mean over the pairs", columns, with_truth
    )
    if options.plot:
        plot(rows, options.plot)
    return {"iterations": options.iterations, "summary": summary, "curves": rows}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__, plot="the curves")
    add_inputs(line, frames=6)
    line.add_number("--first", None, "so many pairs of each group of the list (default: all)", least=1, kind=int)
    line.add_model()
    line.add_number("--iterations", 36, "evaluations per solve", least=1)
    return line.run(line.parse_args(arguments), measure)


if __name__ == "__main__":
    raise SystemExit(main())
