# SPDX-License-Identifier: Apache-2.0
"""Whether the flow settles: one and the same end from every start, however long it is iterated.

``python -m benchmarks.settle --pairs pairs.json [--sequence FRAMES ...] [--models nano base] [--plot OUT]``

A stable fixed point is what the method rests on (arXiv 2204.08442, sections 3 and 4). Every pair is iterated as the
stream does, z <- f(z), or by another solver, from five starts; docs/equilibrium.md describes them and the columns.
Distances are RMS over the pixels of the difference of two flows at full resolution, px. *moved* and *still* are between
``--early`` and ``--iterations``; *ends apart* is the largest distance between any two ends, without that from *noise*.

With ``--jacobian``, at the end from *coarse*: the spectral radius of the Jacobian of f, below 1 where the fixed point
is stable, and the relative residual of the adjoint equation, that of the implicit gradient, after 30 iterations.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.ticker import NullLocator, ScalarFormatter
from rich.console import Console
from torch import Tensor

from benchmarks.report import Benchmark, Row, grouped, picture, print_table, watched
from benchmarks.sequences import EncodedPair, add_inputs, fitted, recordings
from deq_flow_ros.equilibrium import State, implicit_gradient, solve, spectral_radius
from deq_flow_ros.model import FACTOR, DEQFlow, load_model, update_px
from deq_flow_ros.model.cells import carry
from training.evaluate import group_means, pair_error
from training.flow_dataset import Sample, open_pairs, to_array

STARTS = {"zero": "#a0aec0", "coarse": "#2f855a", "warm": "#2b6cb0", "random": "#c05621", "noise": "#b83280"}
"""The starts, and their colours in the plot."""
ERROR_MARKS, MARKS = (6, 12, 24, 48, 96), (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
"""Iterations after which the endpoint error is printed, and after which the distance to the end is drawn."""
STILL_PX, NOISE_PX = 0.05, 8.0
PREDECESSOR_ITERATIONS, ADJOINT_ITERATIONS = 24, 30
"""Of the reversed pair that stands in for a missing predecessor, and of the adjoint equation."""
SMOOTH = 4  # knots of the random motion in each direction
FIGURES = {
    "moved": "{moved_px:.4f}", "still": "{still:.1%}", "last update": "{end_update_px:.4f}",
    "to coarse's": "{to_coarse_px:.4f}", "ends apart": "{apart_px:.4f}",
}  # fmt: skip
JACOBIAN = {"spectral radius": "{spectral_radius:.3f}", "adjoint residual": "{adjoint_residual:.1e}"}


def random_states(pair: EncodedPair) -> dict[str, State]:
    """The starts *random* and *noise*, with the same numbers on every device."""
    hidden, flow = pair.zero()
    generator = torch.Generator().manual_seed(0)
    noisy_hidden = torch.randn(hidden.shape, generator=generator).tanh().to(hidden)
    noise = torch.randn(flow.shape, generator=generator)
    smooth = F.interpolate(noise[..., :SMOOTH, :SMOOTH], flow.shape[-2:], mode="bicubic")
    smooth /= smooth.square().mean().sqrt()
    fields = {"random": smooth, "noise": noise}
    return {name: (noisy_hidden, (field * NOISE_PX / FACTOR).to(flow)) for name, field in fields.items()}


def reversed_state(model: DEQFlow, sample: Sample) -> State:
    """A warm start made from the pair itself: the state from image 2 to image 1, with its flow reversed."""
    pair = EncodedPair(model, replace(sample, image1=sample.image2, image2=sample.image1))
    hidden, flow = carry(solve(pair.problem, pair.coarse(), max_iterations=PREDECESSOR_ITERATIONS).state)
    return hidden, -flow


def stability(model: DEQFlow, sample: Sample, state: State) -> dict[str, float]:
    """The spectral radius of the Jacobian of the update at a state, and the relative residual of the adjoint equation.

    The latter is after ``ADJOINT_ITERATIONS`` of Anderson's method, for the gradient of the mean squared flow.
    """
    residuals: list[float] = []
    with torch.inference_mode(False), torch.no_grad():
        problem, state = EncodedPair(model, sample).problem, (state[0].clone(), state[1].clone())
        radius = spectral_radius(problem, state, generator=torch.Generator(model.device).manual_seed(0))
        with torch.enable_grad():
            attached = implicit_gradient(
                problem, state, max_iterations=ADJOINT_ITERATIONS, report=lambda s: residuals.append(float(s.residual))
            )
            model.upsample(attached).square().mean().backward()
    return {"spectral_radius": float(radius), "adjoint_residual": residuals[0]}


def rms(difference: Tensor) -> float:
    """The RMS length of vectors, (1, 2, H, W)."""
    return float(difference.square().sum(1).mean().sqrt())


def rows_of(model: DEQFlow, samples: Sequence[Sample], options: argparse.Namespace) -> Iterator[Row]:
    """One row for each pair and start. A pair whose image 1 is image 2 of the pair before starts warm from that."""
    last: tuple[Sample, State] | None = None
    for sample in samples:
        follows = last is not None and np.array_equal(last[0].image2, sample.image1)
        warm = carry(last[1]) if last is not None and follows else reversed_state(model, sample)
        rows, settled = rows_of_pair(model, sample, warm, options)
        yield from rows
        last = sample, settled


def rows_of_pair(model: DEQFlow, sample: Sample, warm: State, options: argparse.Namespace) -> tuple[list[Row], State]:
    """The rows of one pair, and the state that the stream would carry to the next pair."""
    pair, count, early = EncodedPair(model, sample), options.iterations, options.early
    marks = sorted({n for n in (*MARKS, early) if n < count} | {count})
    error_marks = [n for n in marks if n in (*ERROR_MARKS, count)] if sample.flow is not None else []
    settings = {"solver": options.solver, "max_iterations": count, "measure": update_px, "keep": marks}
    starts = {"zero": pair.zero(), "coarse": pair.coarse(), "warm": warm, **random_states(pair)}
    solutions = {name: solve(pair.problem, start, **settings) for name, start in starts.items()}
    flows = {name: {n: pair.flow(solution.trajectory[n]) for n in marks} for name, solution in solutions.items()}
    ends = {name: of_start[count] for name, of_start in flows.items()}
    apart, rows = max(rms(ends[one] - ends[other]) for one, other in combinations(list(STARTS)[:-1], 2)), []
    for name in STARTS:
        moved, updates = ends[name] - flows[name][early], solutions[name].trace[:, 0].tolist()
        row = {
            "case": "sequence" if sample.flow is None else "pairs", "pair": sample.name, "start": name,
            "moved_px": rms(moved), "still": float((moved.norm(dim=1) <= STILL_PX).float().mean()),
            "update_px": updates, "end_update_px": updates[-1], "to_coarse_px": rms(ends[name] - ends["coarse"]),
            "distance_px": {n: rms(flow - ends["coarse"]) for n, flow in flows[name].items()}, "apart_px": apart,
            "epe_px": {n: pair_error(sample, to_array(flows[name][n])) for n in error_marks},
        }  # fmt: skip
        if name == "coarse" and options.jacobian:
            row |= stability(model, sample, solutions[name].state)
        rows.append(row)
    return rows, solutions["coarse"].state


def summarise(rows: Sequence[Row]) -> list[Row]:
    """By model, case and start: medians over the pairs, and the endpoint error as the mean over the groups."""
    medians = ["moved_px", "still", "end_update_px", "to_coarse_px", "apart_px"]
    return [
        {
            "model": model, "case": case, "start": start, "pairs": len(some),
            **pd.DataFrame(some)[medians].median().to_dict(), "epe_px": group_errors(some),
        }
        for (model, case, start), some in grouped(rows, "model", "case", "start").items()
    ]  # fmt: skip


def group_errors(rows: Sequence[Row]) -> dict[int, float]:
    """At each mark, the mean error of the pairs of each group in px, averaged over the groups of the list."""
    with_truth = [row for row in rows if row["epe_px"]]
    marks = with_truth[0]["epe_px"] if with_truth else ()
    return {n: group_means((row["pair"], row["epe_px"][n]) for row in with_truth)["mean"] for n in marks}


def print_tables(summary: Sequence[Row], rows: Sequence[Row], jacobian: bool, console: Console) -> None:
    """Print a table of each model, case and start, then one of all pairs."""
    marks = next((list(row["epe_px"]) for row in summary if row["epe_px"]), [])
    columns = {"model, case (pairs)": "{model}, {case} ({pairs})", "start": "{start}", **FIGURES}
    columns |= {f"error {mark}": f"{{epe_px[{mark}]:.3f}}" for mark in marks}
    title = "from each start, px: medians over the pairs, and endpoint error after so many iterations"
    print_table(console, title, columns, summary, names=2)
    worst = {"still": "min", **dict.fromkeys(("moved_px", "end_update_px", "apart_px"), "max")}
    worst |= dict.fromkeys(("spectral_radius", "adjoint_residual") if jacobian else (), "max")
    every = pd.DataFrame([row for row in rows if row["start"] != "noise"])
    by_pair = every.groupby(["model", "pair"], sort=False).agg(worst).reset_index().to_dict("records")
    columns = {"model": "{model}", "pair": "{pair}", **FIGURES, **(JACOBIAN if jacobian else {})}
    del columns["to coarse's"]
    title = "of each pair, px: the largest over its starts but noise; the least of what is still"
    print_table(console, title, columns, by_pair, names=2)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw a row of panels per model, a curve per start, of the pairs of the list or else of the sequences."""
    models = grouped([row for row in rows if row["case"] == "pairs"] or rows, "model")
    with picture(path, 10, 2.9 * len(models)) as figure:
        panels = figure.subplots(len(models), 3, squeeze=False)
        for line, (model, of_model) in zip(panels, models.items(), strict=True):
            for start, some in grouped(of_model, "start").items():
                updates, errors = np.median([row["update_px"] for row in some], 0), group_errors(some)
                line[0].loglog(range(1, len(updates) + 1), updates, color=STARTS[start], label=start)
                distances = {n: median(row["distance_px"][n] for row in some) for n in some[0]["distance_px"]}
                if start == "coarse":
                    del distances[max(distances)]  # what the others are measured from
                line[1].loglog(list(distances), list(distances.values()), color=STARTS[start])
                line[2].semilogx(list(errors), list(errors.values()), color=STARTS[start], marker=".")
            count = len({row["pair"] for row in of_model})
            line[0].set(ylabel=f"{model}, {count} pairs\npx", title="update, RMS, median")
            line[1].set(title="distance to coarse's end, RMS, median")
            line[2].set(title="endpoint error, mean of the groups", ylim=(0, None))
            for axes in line:
                axes.set(xlabel="iterations", xticks=[1, 3, 6, 12, 24, 48, 96])
                axes.xaxis.set_major_formatter(ScalarFormatter())
                axes.xaxis.set_minor_locator(NullLocator())
        panels[0][0].legend(frameon=False)


def measure(options: argparse.Namespace, console: Console) -> Row:
    """Measure every model on every pair from every start."""
    groups = open_pairs(options.pairs) if options.pairs else []
    samples = [group[index] for group in groups for index in range(len(group))[: options.first]]
    samples = [fitted(sample, (options.height, options.width)) for sample in samples]
    samples += [pair for sequence in recordings(options) for pair in sequence.pairs]
    stems = [Path(name).stem for name in options.models]
    labels = stems if len(set(stems)) == len(stems) else options.models  # runs/a/model.safetensors, runs/b/model...
    models = {label: load_model(name, options.device) for label, name in zip(labels, options.models, strict=True)}
    made = ({"model": label, **row} for label, model in models.items() for row in rows_of(model, samples, options))
    with torch.inference_mode():
        rows = watched(made, console, "{model}, {pair}, {start}")
    summary = summarise(rows)
    print_tables(summary, rows, options.jacobian, console)
    if options.plot:
        plot(rows, options.plot)
    return {"summary": summary, "curves": rows}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__, plot="the curves")
    add_inputs(line, frames=4)
    line.add_number("--first", None, "so many pairs of each group of the list (default: all)", least=1, kind=int)
    line.add_argument("--models", nargs="+", default=["nano", "base"], help="names or paths")
    line.add_argument("--solver", default="picard", help="picard, anderson or broyden")
    line.add_number("--iterations", 96, "from each start", least=2)
    line.add_number("--early", 24, "to compare the end with", least=1)
    line.add_argument("--jacobian", action="store_true", help="also stability and adjoint equation, at coarse's end")
    options = line.parse_args(arguments)
    if options.early >= options.iterations:
        line.error(f"--early: expected less than --iterations, {options.iterations}, got {options.early}")
    return line.run(options, measure)


if __name__ == "__main__":
    raise SystemExit(main())
