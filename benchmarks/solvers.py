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
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.report import clock_s, write_json
from benchmarks.sequences import first_below, first_pairs, fitted, recorded
from deq_flow_ros.equilibrium import Anderson, Broyden, Picard, Solver, State, solve
from deq_flow_ros.model import FACTOR, DEQFlow, FlowProblem, crop, load_model, pad_to_multiple, update_px
from deq_flow_ros.recordings import MediaError
from deq_flow_ros.streaming.warm_start import carry
from training.datasets import Sample
from training.pairs import pair_errors, to_array, to_tensor

SOLVERS: dict[str, Solver] = {
    "picard": Picard(),
    "picard, damping 0.7": Picard(0.7),
    "anderson": Anderson(),
    "broyden": Broyden(),
}
COLOURS = ("#2b6cb0", "#a0aec0", "#dd6b20", "#2f855a")
MARKS = (1, 2, 4, 8, 12, 24)  # iterations that the endpoint error is printed for


class Case:
    """One start of one pair, solved by every solver."""

    def __init__(self, problem: FlowProblem, start: State, iterations: int, reference: int) -> None:
        self.problem, self.start, self.iterations = problem, start, iterations
        settled = solve(problem, start, solver="anderson", max_iterations=iterations * reference, measure=update_px)
        self.state, self.residual_px = settled.state, float(settled.residual)
        self._device = start[0].device

    def curves(self, solver: Solver) -> tuple[dict[str, Any], dict[int, State]]:
        """Residual and distance (px) at each iteration, ms per iteration, and the states."""
        everywhere = range(1, self.iterations + 1)
        began = clock_s(self._device)
        solution = solve(
            self.problem, self.start, solver=solver, max_iterations=self.iterations, measure=update_px, keep=everywhere
        )
        milliseconds = 1e3 * (clock_s(self._device) - began) / self.iterations
        states = solution.trajectory
        distances = [FACTOR * (states[n][1] - self.state[1]).square().sum(1).mean().sqrt() for n in everywhere]
        return {
            "residual_px": solution.trace[:, 0].tolist(),
            "distance_px": torch.stack(distances).tolist(),
            "ms": milliseconds,
        }, states


def pair_problem(model: DEQFlow, image1: np.ndarray, image2: np.ndarray) -> tuple[FlowProblem, State, Any]:
    """The problem of two images (H, W, 3), its cold start, and the padding to crop from its flow."""
    (first, padding), (second, _) = (
        pad_to_multiple(to_tensor(image, model.device).float()) for image in (image1, image2)
    )
    encoding = model.encode(first)
    return model.problem(encoding, model.encode(second)), model.initial_state(encoding), padding


def on_pairs(model: DEQFlow, pairs: list[Sample], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every solver on every pair, cold; with the endpoint error at the marked iterations."""
    for pair in pairs:
        problem, start, padding = pair_problem(model, pair.image1, pair.image2)
        case = Case(problem, start, options.iterations, options.reference)
        for name, solver in SOLVERS.items():
            row, states = case.curves(solver)
            errors = {
                n: pair_errors(pair, to_array(crop(model.upsample(states[n]), padding)))[0]
                for n in MARKS
                if n in states
            }
            yield {
                "case": "pairs, cold", "pair": pair.name, "solver": name, "reference_residual_px": case.residual_px,
                "epe_px": errors, **row,
            }  # fmt: skip


def on_sequence(model: DEQFlow, pairs: list[Sample], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every solver on consecutive pairs, cold and from the state of the pair before."""
    warm: State | None = None
    for number, pair in enumerate(pairs):
        problem, cold, _ = pair_problem(model, pair.image1, pair.image2)
        starts = {"sequence, cold": cold} | ({} if warm is None else {"sequence, warm": warm})
        for label, start in starts.items():
            case = Case(problem, start, options.iterations, options.reference)
            if label == "sequence, cold":
                warm = carry(case.state)
            if number == 0:
                continue  # it has no warm start to compare with
            for name, solver in SOLVERS.items():
                row, _ = case.curves(solver)
                yield {
                    "case": label, "pair": pair.name, "solver": name,
                    "reference_residual_px": case.residual_px, **row,
                }  # fmt: skip


def summarise(rows: list[dict[str, Any]], bounds: list[float]) -> list[dict[str, Any]]:
    """Of each case and solver: iterations to each bound, median over the pairs, and how many pairs got there."""
    summary = []
    for case, solver in dict.fromkeys((row["case"], row["solver"]) for row in rows):
        some = [row for row in rows if (row["case"], row["solver"]) == (case, solver)]
        needed: dict[str, dict[str, dict[str, float]]] = {}
        for what in ("residual", "distance"):
            for bound in bounds:
                counts = [first_below(row[f"{what}_px"], bound) for row in some]
                entry = {"iterations": float(np.median(counts)), "reached": int(np.isfinite(counts).sum())}
                needed.setdefault(what, {})[f"{bound:g}"] = entry
        marks = some[0].get("epe_px", {})
        summary.append(
            {
                "case": case, "solver": solver, "pairs": len(some), "iterations_to_px": needed,
                "ms_per_iteration": float(np.median([row["ms"] for row in some])),
                "reference_residual_px": float(np.median([row["reference_residual_px"] for row in some])),
                "epe_px": {n: float(np.mean([row["epe_px"][n] for row in some])) for n in marks},
            }
        )  # fmt: skip
    return summary


def print_tables(summary: list[dict[str, Any]], console: Console) -> None:
    """Iterations needed, then endpoint errors."""
    table = Table(title="iterations to so many px: median over the pairs (how many got there)")
    needed = [(what, bound) for what, entries in summary[0]["iterations_to_px"].items() for bound in entries]
    for column in ("case", "solver"):
        table.add_column(column, no_wrap=True)
    for column in (*(f"{what} {bound}" for what, bound in needed), "ms / it."):
        table.add_column(column, justify="right")
    for row in summary:
        entries = [row["iterations_to_px"][what][bound] for what, bound in needed]
        cells = [f"{entry['iterations']:g} ({entry['reached']})".replace("inf", "-") for entry in entries]
        table.add_row(f"{row['case']} ({row['pairs']})", row["solver"], *cells, f"{row['ms_per_iteration']:.0f}")
    console.print(table)
    for case, residual in dict.fromkeys((row["case"], round(row["reference_residual_px"], 4)) for row in summary):
        console.print(f"{case}: median residual of the reference {residual:g} px")
    with_truth = [row for row in summary if row["epe_px"]]
    table = Table(title="endpoint error after so many iterations from zero, px, mean over the pairs")
    table.add_column("solver")
    for mark in with_truth[0]["epe_px"]:
        table.add_column(str(mark), justify="right")
    for row in with_truth:
        table.add_row(row["solver"], *(f"{error:.2f}" for error in row["epe_px"].values()))
    console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Residual against iterations, one panel per case, median over the pairs."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(3.4 * len(cases), 3.2), layout="constrained")
        panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
        for axes, case in zip(panels, cases, strict=True):
            for name, colour in zip(SOLVERS, COLOURS, strict=True):
                curves = [row["residual_px"] for row in rows if (row["case"], row["solver"]) == (case, name)]
                axes.semilogy(range(1, len(curves[0]) + 1), np.median(curves, 0), color=colour, label=name)
            axes.axhline(0.05, color="#c53030", linewidth=0.8, linestyle="--")
            axes.set(title=f"{case} ({len(curves)} pairs)", xlabel="iterations")
            axes.grid(color="#e2e8f0")
        panels[0].set_ylabel("flow update, RMS px")
        panels[-1].legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.solvers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, required=True, help="list of pairs, see training/pairs.py")
    parser.add_argument("--sequence", help="video, bag or folder of images, for warm starts")
    parser.add_argument("--first", type=int, help="so many pairs of each group of the list (default: all)")
    parser.add_argument("--frames", type=int, default=6, help="frames of the sequence (default 6)")
    parser.add_argument("--height", type=int, default=240, help="images are made smaller to fit (default 240)")
    parser.add_argument("--width", type=int, default=320, help="likewise (default 320)")
    parser.add_argument("--model", default="nano", help="name or path of weights (default nano)")
    parser.add_argument("--iterations", type=int, default=36, help="evaluations per solve (default 36)")
    parser.add_argument("--reference", type=int, default=3, help="so many times more for the reference (default 3)")
    parser.add_argument(
        "--bound", type=float, nargs="+", default=[0.05, 0.2], help="px; to count iterations to (default 0.05 0.2)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own)")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="write the curves to this picture (.png, .svg)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything to this file")
    options = parser.parse_args(arguments)
    console = Console() if Console().is_terminal else Console(width=120)  # a file has room for the names
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.iterations < 1 or options.reference < 1 or not min(options.bound) > 0:
        parser.error("--iterations and --reference must be at least 1, --bound above 0")
    try:
        size = options.height, options.width
        pairs = [fitted(pair, size) for pair in first_pairs(options.pairs, options.first)]
        sequence = recorded(options.sequence, options.frames, size).pairs if options.sequence else []
        model = load_model(options.model, options.device)
    except (OSError, ValueError, RuntimeError, MediaError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    rows: list[dict[str, Any]] = []
    with torch.inference_mode(), console.status("") as status:
        for source in (on_pairs(model, pairs, options), on_sequence(model, sequence, options)):
            for row in source:
                rows.append(row)
                status.update(f"{row['case']}: {row['pair']}, {row['solver']}")
    summary = summarise(rows, options.bound)
    print_tables(summary, console)
    if options.plot:
        plot(rows, options.plot)
    if options.json:
        figures = {
            "model": options.model, "iterations": options.iterations, "summary": summary, "curves": rows,
        }  # fmt: skip
        write_json(options.json, model.device, figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
