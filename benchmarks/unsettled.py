# SPDX-License-Identifier: Apache-2.0
"""Which part of an image does not settle, and how it moves.

``python -m benchmarks.unsettled --sequence FRAMES ... [--pairs pairs.json] [--models nano base] [--json OUT]``

Every pair is iterated as the stream does, z <- f(z), from its coarse start. Of the flow at full resolution, px:

- *Moved*: RMS distance between the flow after ``--early`` and after ``--iterations`` iterations; *rest*: the same
  without the ``UNSETTLED`` pixels that moved most, and *share*: how much of the sum of squares is theirs.
- *Uncertainty*: its median over these pixels, and over all.
- *Last*, *last two*: RMS distance of the end from the state one and two iterations before. A state that goes to and fro
  between two ends comes back after two.
- *Cells*: *moved* of the flow of the cells before it is upsampled; *3x3*: of their means over 3x3 cells. Where
  neighbours move against each other these means hardly do, and the upsampling, which mixes 3x3 cells, evens it out.
- *Anderson*: RMS update that Anderson's method gets to in as many iterations.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from benchmarks.report import Benchmark, Row, table
from benchmarks.sequences import EncodedPair, add_inputs, first_pairs, fitted, recorded
from deq_flow_ros.equilibrium import solve
from deq_flow_ros.model import FACTOR, DEQFlow, load_model, update_px
from training.datasets import Sample

UNSETTLED = 0.05
"""Share of the pixels that count as unsettled: those that moved most."""


def rms(difference: Tensor) -> float:
    """The RMS length of vectors, (1, 2, H, W)."""
    return float(difference.square().sum(1).mean().sqrt())


def smooth(cells: Tensor) -> Tensor:
    """Means over 3x3 cells."""
    return F.avg_pool2d(cells, 3, stride=1, padding=1, count_include_pad=False)


def row_of(model: DEQFlow, sample: Sample, early: int, iterations: int) -> Row:
    """The figures of one pair that the docstring of the module describes."""
    pair = EncodedPair(model, sample)
    marks = (early, iterations - 2, iterations - 1, iterations)
    solution = solve(
        pair.problem, pair.coarse(), solver="picard", max_iterations=iterations, measure=update_px, keep=marks
    )
    first, before_last, last_but_one, end = (pair.flow(solution.trajectory[n]) for n in marks)
    moved = (end - first).norm(dim=1).flatten()
    order = moved.argsort(descending=True)
    most = order[: max(1, int(UNSETTLED * len(moved)))]
    squares = moved.square()
    cells = FACTOR * (solution.trajectory[iterations][1] - solution.trajectory[early][1])
    row: Row = {
        "pair": sample.name,
        "moved_px": rms(end - first),
        "rest_px": float(squares[order[len(most) :]].mean().sqrt()),
        "share": float(squares[most].sum() / squares.sum()),
        "last_px": rms(end - last_but_one),
        "last_two_px": rms(end - before_last),
        "cells_px": rms(cells),
        "smooth_cells_px": rms(smooth(cells)),
        "anderson_px": float(pair.settled(pair.coarse(), iterations).residual),
    }
    expected = model.upsample_uncertainty(solution.state)
    if expected is not None:
        uncertainty = pair.crop(expected).flatten()
        row |= {"uncertainty_px": float(uncertainty.median()), "uncertainty_most_px": float(uncertainty[most].median())}
    return row


def measure(options: argparse.Namespace, console: Console) -> Row:
    """One row per model and pair."""
    size = options.height, options.width
    samples = [fitted(pair, size) for pair in first_pairs(options.pairs, options.first)] if options.pairs else []
    for path in options.sequence:
        samples += recorded(path, options.frames, size).pairs
    with torch.inference_mode():
        rows: list[Row] = [
            {"model": Path(name).stem, **row_of(model, sample, options.early, options.iterations)}
            for name in options.models
            for model in [load_model(name, options.device)]
            for sample in samples
        ]
    headings = ["moved", "rest", "share", "uncertainty, most", "all", "last", "last two", "cells", "3x3", "Anderson"]
    filled = table("px; see --help", ["model", "pair"], headings)
    for row in rows:
        uncertain = [f"{row[name]:.2f}" if name in row else "" for name in ("uncertainty_most_px", "uncertainty_px")]
        moved = [f"{row['moved_px']:.3f}", f"{row['rest_px']:.3f}", f"{100 * row['share']:.0f} %"]
        names = ("last_px", "last_two_px", "cells_px", "smooth_cells_px", "anderson_px")
        filled.add_row(row["model"], row["pair"], *moved, *uncertain, *(f"{row[name]:.4f}" for name in names))
    console.print(filled)
    return {"rows": rows}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__)
    add_inputs(line)
    line.add_number("--iterations", 96, "of each pair", least=4)
    line.add_number("--early", 24, "to compare the end with", least=1)
    options = line.parse_args(arguments)
    if options.early > options.iterations - 3:
        line.error(f"--early: expected at most --iterations - 3, {options.iterations - 3}, got {options.early}")
    if not (options.pairs or options.sequence):
        line.error("expected --pairs or --sequence: without them there is nothing to measure")
    return line.run(options, measure)


if __name__ == "__main__":
    raise SystemExit(main())
