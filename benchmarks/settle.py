# SPDX-License-Identifier: Apache-2.0
"""Whether the flow settles: one and the same end from every start, however long the iteration goes on.

``python -m benchmarks.settle --pairs pairs.json [--sequence FRAMES ...] [--models nano base] [--plot OUT]``

A stable fixed point is what the method rests on (arXiv 2204.08442, sections 3 and 4). Every pair is iterated as the
stream does, z <- f(z), from five starts:

- *zero*: hidden state and flow zero.
- *coarse*: as a stream starts a pair without predecessor, from smaller versions of it.
- *warm*: the state of the pair before, moved along the motion, if the list or sequence has one. For a pair without,
  that of the same images in reverse order, its flow turned round and moved onto image 1; as far from what is sought as
  the state of a pair before whose motion was another.
- *random*: a random hidden state, tanh of standard normal noise, which is the range that it has; and a random motion,
  smooth, in each direction of ``--noise`` px RMS.
- *noise*: the same hidden state, and normal noise of ``--noise`` px in each direction, another in each cell. No flow
  looks like this; it is the hardest start that we know.

All distances are RMS over the pixels of the difference of two flows at full resolution, px. *Moved*: between the flow
after ``--early`` and after ``--iterations`` iterations. *Still*: the share of pixels whose flow moved by 0.05 px at
most between the two. *Update*: the RMS update at the last iteration. *To coarse*: between the end from this start and
that from *coarse*. *Apart*: the largest distance between any two of the ends, that from *noise* left out. *Error*: mean
endpoint error against the truth, mean over the groups of the list.

With ``--jacobian``, at the end from *coarse*: the spectral radius of the Jacobian of f, below 1 where the fixed point
is stable, and the relative residual of the adjoint equation, that of the implicit gradient, after 30 iterations.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ticker import NullLocator, ScalarFormatter
from rich.console import Console
from torch import Tensor

from benchmarks.report import Benchmark, Row, grouped, median, picture, table, watched
from benchmarks.sequences import EncodedPair, add_inputs, first_pairs, fitted, recorded
from deq_flow_ros.equilibrium import State, implicit_gradient, solve, spectral_radius
from deq_flow_ros.model import FACTOR, DEQFlow, load_model, update_px
from deq_flow_ros.streaming.warm_start import carry
from training.datasets import Sample
from training.pairs import group_means, pair_errors, to_array

STARTS = {"zero": "#a0aec0", "coarse": "#2f855a", "warm": "#2b6cb0", "random": "#c05621", "noise": "#b83280"}
"""The starts, and their colours in the plot."""
ERROR_MARKS = (6, 12, 24, 48, 96)
MARKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
"""Numbers of iterations at which the distance to the end is measured, for the plot."""
STILL_PX = 0.05
"""A pixel has settled if it moves by no more than this between ``--early`` and the end."""
PREDECESSOR_ITERATIONS = 24
"""Iterations of the reversed pair that stands in for a missing predecessor."""
ADJOINT_ITERATIONS = 30
SMOOTH = 4
"""Number of knots of the random motion in each direction."""


def random_states(pair: EncodedPair, noise_px: float, seed: int = 0) -> dict[str, State]:
    """The starts *random* and *noise*, with the same numbers on every device."""
    hidden, flow = pair.zero()
    generator = torch.Generator().manual_seed(seed)
    noisy_hidden = torch.randn(hidden.shape, generator=generator).tanh().to(hidden)
    noise = torch.randn(flow.shape, generator=generator)
    smooth = F.interpolate(noise[..., :SMOOTH, :SMOOTH], flow.shape[-2:], mode="bicubic")
    smooth /= smooth.square().mean().sqrt()
    return {
        name: (noisy_hidden, (field * noise_px / FACTOR).to(flow))
        for name, field in (("random", smooth), ("noise", noise))
    }


def reversed_state(model: DEQFlow, sample: Sample) -> State:
    """A warm start made from the pair itself: the state from image 2 to image 1, with its flow reversed."""
    pair = EncodedPair(model, replace(sample, image1=sample.image2, image2=sample.image1))
    hidden, flow = carry(solve(pair.problem, pair.coarse(), max_iterations=PREDECESSOR_ITERATIONS).state)
    return hidden, -flow


def stability(model: DEQFlow, sample: Sample, state: State) -> dict[str, float]:
    """The spectral radius of the Jacobian of the update at a state, and how well the adjoint equation is solved there.

    The latter is the relative residual after ``ADJOINT_ITERATIONS`` of Anderson's method, for the gradient of the mean
    squared flow.
    """
    residuals: list[float] = []
    with torch.inference_mode(False), torch.no_grad():
        problem = EncodedPair(model, sample).problem
        state = (state[0].clone(), state[1].clone())
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


class Bench:
    """A model, and the measurements that are made with it."""

    def __init__(self, model: DEQFlow, iterations: int, early: int, noise_px: float, jacobian: bool = False) -> None:
        self.model, self.iterations, self.early, self.noise_px = model, iterations, early, noise_px
        self.jacobian = jacobian
        self.marks = sorted({n for n in (*MARKS, *ERROR_MARKS, early) if n < iterations} | {iterations})

    def run(self, samples: Sequence[Sample]) -> Iterator[Row]:
        """One row for each pair and start.

        :param samples: in the order of the list. If image 2 of a pair is image 1 of the next pair, the next one starts
            from it.
        """
        last: tuple[Sample, State] | None = None
        for sample in samples:
            if last is not None and np.array_equal(last[0].image2, sample.image1):
                warm = carry(last[1])
            else:
                warm = reversed_state(self.model, sample)
            rows, settled = self.pair(sample, warm)
            yield from rows
            last = sample, settled

    def pair(self, sample: Sample, warm: State) -> tuple[list[Row], State]:
        """The rows of one pair, and the state that the stream would carry to the next pair."""
        pair = EncodedPair(self.model, sample)
        starts = {"zero": pair.zero(), "coarse": pair.coarse(), "warm": warm, **random_states(pair, self.noise_px)}
        solutions = {
            name: solve(pair.problem, start, max_iterations=self.iterations, measure=update_px, keep=self.marks)
            for name, start in starts.items()
        }
        flows = {
            name: {n: pair.flow(solution.trajectory[n]) for n in self.marks} for name, solution in solutions.items()
        }
        ends = {name: of_start[self.iterations] for name, of_start in flows.items()}
        apart = max(rms(ends[one] - ends[other]) for one, other in combinations(list(STARTS)[:-1], 2))
        settled, rows = solutions["coarse"].state, []
        for name in STARTS:
            moved = ends[name] - flows[name][self.early]
            row = {
                "case": "sequence" if sample.flow is None else "pairs", "pair": sample.name, "start": name,
                "moved_px": rms(moved), "still": float((moved.norm(dim=1) <= STILL_PX).float().mean()),
                "update_px": solutions[name].trace[:, 0].tolist(),
                "distance_px": {n: rms(flow - ends["coarse"]) for n, flow in flows[name].items()},
                "apart_px": apart, "epe_px": self.errors(sample, flows[name]),
            }  # fmt: skip
            if self.jacobian and name == "coarse":
                row |= stability(self.model, sample, settled)
            rows.append(row)
        return rows, settled

    def errors(self, sample: Sample, flows: dict[int, Tensor]) -> dict[int, float]:
        """The endpoint error in px at the marks and at the end; empty without ground truth."""
        if sample.flow is None:
            return {}
        marks = sorted({*ERROR_MARKS, self.iterations} & flows.keys())
        return {n: pair_errors(sample, to_array(flows[n]))[0] for n in marks}


def summarise(rows: Sequence[Row]) -> list[Row]:
    """For each model, case and start: the medians over the pairs, and the endpoint error as the mean over the
    groups.
    """
    return [
        {
            "model": model, "case": case, "start": start, "pairs": len(some),
            "moved_px": median(row["moved_px"] for row in some), "still": median(row["still"] for row in some),
            "end_update_px": median(row["update_px"][-1] for row in some),
            "to_coarse_px": median(row["distance_px"][max(row["distance_px"], key=int)] for row in some),
            "apart_px": median(row["apart_px"] for row in some), "epe_px": group_errors(some),
        }
        for (model, case, start), some in grouped(rows, "model", "case", "start").items()
    ]  # fmt: skip


def group_errors(rows: Sequence[Row]) -> dict[int, float]:
    """At each mark, the mean error of the pairs of each group in px, averaged over the groups of the list."""
    with_truth = [row for row in rows if row["epe_px"]]
    marks = with_truth[0]["epe_px"] if with_truth else ()
    return {n: group_means((row["pair"], row["epe_px"][n]) for row in with_truth)["mean"] for n in marks}


def print_tables(summary: Sequence[Row], rows: Sequence[Row], early: int, console: Console) -> None:
    """Print a table of each model, case and start, then one of all pairs."""
    marks = next((list(row["epe_px"]) for row in summary if row["epe_px"]), [])
    moved = (f"moved after {early}", "still", "last update")
    by_start = table(
        "from each start, px: medians over the pairs, and endpoint error after so many iterations",
        ["model, case (pairs)", "start"],
        [*moved, "end to coarse's", "ends apart", *(f"error {mark}" for mark in marks)],
    )
    for entry in summary:
        figures = [f"{entry[key]:.4f}" for key in ("moved_px", "end_update_px", "to_coarse_px", "apart_px")]
        figures.insert(1, f"{entry['still']:.1%}")
        figures += [f"{error:.3f}" for error in entry["epe_px"].values()]
        by_start.add_row(f"{entry['model']}, {entry['case']} ({entry['pairs']})", entry["start"], *figures)
    jacobian = ("spectral radius", "adjoint residual") if any("spectral_radius" in row for row in rows) else ()
    by_pair = table(
        "of each pair, px: the largest over its starts but noise; the least of what is still",
        ["model", "pair"],
        [*moved, "ends apart", *jacobian],
    )
    for (model, pair), all_starts in grouped(rows, "model", "pair").items():
        some = [row for row in all_starts if row["start"] != "noise"]
        largest = [max(row["moved_px"] for row in some), max(row["update_px"][-1] for row in some), some[0]["apart_px"]]
        figures = [f"{figure:.4f}" for figure in largest]
        figures.insert(1, f"{min(row['still'] for row in some):.1%}")
        figures += [f"{row['spectral_radius']:.3f}" for row in some if "spectral_radius" in row]
        figures += [f"{row['adjoint_residual']:.1e}" for row in some if "adjoint_residual" in row]
        by_pair.add_row(model, pair, *figures)
    console.print(by_start, by_pair)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw a row of panels per model: update, distance to the end and error against iterations, with one curve per
    start.

    The curves are of the pairs of the list or, if there are none, of the sequences.
    """
    models = grouped([row for row in rows if row["case"] == "pairs"] or rows, "model")
    with picture(path, 10, 2.9 * len(models)) as figure:
        panels = figure.subplots(len(models), 3, squeeze=False)
        for line, (model, of_model) in zip(panels, models.items(), strict=True):
            for start, some in grouped(of_model, "start").items():
                colour = STARTS[start]
                updates = np.median([row["update_px"] for row in some], 0)
                line[0].loglog(range(1, len(updates) + 1), updates, color=colour, label=start)
                distances = {n: median(row["distance_px"][n] for row in some) for n in some[0]["distance_px"]}
                if start == "coarse":
                    del distances[max(distances)]  # what the others are measured from
                line[1].loglog(list(distances), list(distances.values()), color=colour)
                errors = group_errors(some)
                line[2].semilogx(list(errors), list(errors.values()), color=colour, marker=".")
            count = len({row["pair"] for row in of_model})
            line[0].set(ylabel=f"{model}, {count} pairs\npx", title="update, RMS, median")
            line[1].set(title="distance to coarse's end, RMS, median")
            line[2].set(title="endpoint error, mean of the groups", ylim=(0, None))
            for axes in line:
                axes.set(xlabel="iterations", xticks=[1, 3, 6, 12, 24, 48, 96])
                axes.xaxis.set_major_formatter(ScalarFormatter())
                axes.xaxis.set_minor_locator(NullLocator())
        panels[0][0].legend(frameon=False)


def read_samples(options: argparse.Namespace) -> list[Sample]:
    """The first ``--first`` pairs of each group of the list, then those of the sequences, made smaller to fit."""
    size = options.height, options.width
    samples = [fitted(pair, size) for pair in first_pairs(options.pairs, options.first)] if options.pairs else []
    return samples + [pair for path in options.sequence for pair in recorded(path, options.frames, size).pairs]


def measure(options: argparse.Namespace, console: Console) -> Row:
    """Measure every model on every pair from every start."""
    samples = read_samples(options)
    models = {Path(name).stem: load_model(name, options.device) for name in options.models}
    given = options.iterations, options.early, options.noise, options.jacobian
    of_models = ((label, Bench(model, *given).run(samples)) for label, model in models.items())
    made = ({"model": label, **row} for label, rows in of_models for row in rows)
    with torch.inference_mode():
        rows = watched(made, console, "{model}, {pair}, {start}")
    summary = summarise(rows)
    print_tables(summary, rows, options.early, console)
    if options.plot:
        plot(rows, options.plot)
    return {"summary": summary, "curves": rows}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__, plot="the curves")
    add_inputs(line)
    line.add_number("--iterations", 96, "from each start", least=2)
    line.add_number("--early", 24, "to compare the end with", least=1)
    line.add_number("--noise", 8.0, "px, of the random start's flow", above=0)
    line.add_argument("--jacobian", action="store_true", help="also stability and adjoint equation, at coarse's end")
    options = line.parse_args(arguments)
    if options.early >= options.iterations:
        line.error(f"--early: expected less than --iterations, {options.iterations}, got {options.early}")
    if not (options.pairs or options.sequence):
        line.error("expected --pairs or --sequence: without them there is nothing to measure")
    return line.run(options, measure)


if __name__ == "__main__":
    raise SystemExit(main())
