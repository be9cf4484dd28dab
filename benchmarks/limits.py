# SPDX-License-Identifier: Apache-2.0
"""What iterations are worth, in a stream and at its start: what the defaults of the estimator are chosen from.

``python -m benchmarks.limits --pairs pairs.json [--clips 2] [--sequence FRAMES ...] [--threads 1] [--json OUT]``

- *Warm*: streams with a limit of iterations per pair, and a tolerance: mean error of their warm pairs, and iterations
  made. Of sequences without a truth, the distance from a stream of ``SETTLED`` iterations per pair.
- *Cold*: every pair of the list, and generated ones, started with so many iterations at a quarter and at a half of the
  resolution each (0: from zero), and then so many at the full one: mean error, and the time of the coarse part.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console

from benchmarks.report import Benchmark, Row, mean, median, table
from benchmarks.sequences import CUTS, EncodedPair, ImageSequence, generated, listed, recorded, streamed
from deq_flow_ros.equilibrium import solve
from deq_flow_ros.model import DEQFlow, load_model
from training.datasets import Sample
from training.pairs import open_pairs, pair_errors

SETTLED = 36
SCALE = {"min_scale": 1.0, "max_scale": 1.0}
CAPS = (1, 2, 3, 4, 6, 8, 12, 24)
"""Limits of iterations per warm pair, without a tolerance."""
TOLERANCES = ((12, 0.2), (12, 0.1), (12, 0.05), (12, 0.02), (6, 0.1), (8, 0.1), (8, 0.05))
"""(limit of iterations, tolerance in px) of warm pairs."""
COARSE, FINE = (0, 1, 2, 3, 4, 6, 8), (1, 2, 4, 6, 8, 12, 24)
"""Numbers of iterations of cold pairs, at each smaller resolution and at the full one."""


def warm_rows(model: DEQFlow, sequences: Sequence[ImageSequence]) -> list[Row]:
    """Mean error (px) and number of iterations of each group of sequences, by limit and tolerance."""
    unknown = [sequence for sequence in sequences if sequence.pairs[0].flow is None]
    settled = {
        (sequence.group, place): result.flow
        for sequence in unknown
        for place, result in streamed(model, sequence, max_iterations=SETTLED, tolerance_px=None, **SCALE)
    }
    rows = []
    for cap, tolerance_px in [*((cap, None) for cap in CAPS), *TOLERANCES]:
        errors, made = defaultdict(list), defaultdict(list)
        for sequence in sequences:
            limits = {"max_iterations": cap, "tolerance_px": tolerance_px, **SCALE}
            for place, result in streamed(model, sequence, **limits):
                pair, known = sequence.pairs[place], settled.get((sequence.group, place))
                away = None if known is None else float(np.linalg.norm(result.flow - known, axis=2).mean())
                errors[sequence.group].append(pair_errors(pair, result.flow)[0] if away is None else away)
                made[sequence.group].append(result.info.iterations)
        means = {group: (mean(values), mean(made[group])) for group, values in errors.items()}
        rows.append({"cap": cap, "tolerance_px": tolerance_px, "groups": means})
    return rows


@torch.inference_mode()
def cold_rows(model: DEQFlow, pairs: Sequence[tuple[str, Sample]]) -> list[Row]:
    """Mean error (px) of each group by the number of fine and of coarse iterations, and the median time of the
    coarse ones in ms.
    """
    errors: dict[int, dict[str, list[list[float]]]] = {coarse: defaultdict(list) for coarse in COARSE}
    taken: dict[int, list[float]] = defaultdict(list)
    for group, sample in pairs:
        pair = EncodedPair(model, sample)
        for coarse in COARSE:
            began = time.perf_counter()
            start = pair.coarse(coarse) if coarse else pair.zero()
            taken[coarse].append(1e3 * (time.perf_counter() - began))
            found = solve(pair.problem, start, solver="picard", max_iterations=FINE[-1], keep=FINE).trajectory
            errors[coarse][group].append([pair.error(found[fine]) for fine in FINE])
    return [
        {
            "coarse": coarse,
            "ms": median(taken[coarse]),
            "epe_px": {group: np.mean(values, axis=0).tolist() for group, values in errors[coarse].items()},
        }
        for coarse in COARSE
    ]


def print_warm(rows: Sequence[Row], console: Console) -> None:
    """Print a table with the limits as rows and the groups as columns."""
    filled = table("warm pairs: error, px (iterations made)", ["at most", "tolerance, px"], rows[0]["groups"])
    for row in rows:
        tolerance = "none" if row["tolerance_px"] is None else f"{row['tolerance_px']:g}"
        cells = (f"{error:.3f} ({made:.1f})" for error, made in row["groups"].values())
        filled.add_row(str(row["cap"]), tolerance, *cells)
    console.print(filled)


def print_cold(rows: Sequence[Row], listed_groups: Sequence[str], console: Console) -> None:
    """Print a table per group, and one of the mean over the groups of the list: coarse iterations as rows, fine ones
    as columns.
    """
    titles = {group: [group] for group in rows[0]["epe_px"]}
    if listed_groups:
        titles["mean of the list"] = list(listed_groups)
    for title, groups in titles.items():
        filled = table(f"cold pairs, {title}: error, px", ["coarse", "ms"], FINE)
        for row in rows:
            means = np.mean([row["epe_px"][group] for group in groups], axis=0)
            filled.add_row(str(row["coarse"]), f"{row['ms']:.0f}", *(f"{error:.3f}" for error in means))
        console.print(filled)


def measure(options: argparse.Namespace, console: Console) -> Row:
    """Make both tables, or the one that is asked for."""
    size = options.height, options.width
    model = load_model(options.model, options.device)
    figures: Row = {}
    made = [sequence for sequence in generated(options.clips, 5, size) if sequence.group != CUTS]
    if options.only != "cold":
        sequences = [*(listed(options.pairs, size) if options.pairs else ()), *made]
        sequences += [recorded(path, options.frames, size, options.skip) for path in options.sequence]
        figures["warm"] = warm_rows(model, sequences)
        print_warm(figures["warm"], console)
    if options.only != "warm":
        groups = open_pairs(options.pairs) if options.pairs else []
        pairs = [(group.name, group[i]) for group in groups for i in range(len(group))[: options.first]]
        pairs += [(sequence.group, pair) for sequence in made for pair in sequence.pairs[:2]]
        figures["cold"] = cold_rows(model, pairs)
        print_cold(figures["cold"], [group.name for group in groups], console)
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__)
    line.add_pairs()
    line.add_number("--first", None, "so many cold pairs of each group of the list (default: all)", least=1, kind=int)
    line.add_number("--clips", 2, "generated sequences of each motion", least=1)
    line.add_argument("--sequence", nargs="+", default=[], help="videos, bags or folders of images")
    line.add_number("--frames", 8, "of each --sequence", least=3)
    line.add_number("--skip", 0, "so many frames of each at its beginning", least=0)
    line.add_size(480, 640, "frames of streams are made smaller to fit")
    line.add_argument("--only", choices=("warm", "cold"), help="one of the two (default: both)")
    line.add_model()
    return line.run(line.parse_args(arguments), measure)


if __name__ == "__main__":
    raise SystemExit(main())
