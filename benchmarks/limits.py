# SPDX-License-Identifier: Apache-2.0
"""What iterations and scales are worth: what the defaults of the estimator are chosen from.

``python -m benchmarks.limits --pairs pairs.json [--clips 2] [--sequence FRAMES ...] [--only TABLE] [--json OUT]``

- *warm*: streams with a limit of iterations per pair, and a tolerance: mean error of their pairs behind the first, px,
  and iterations made. Of sequences without a truth, the distance from a stream of ``SETTLED`` iterations per pair.
- *cold*: every pair of the list, and generated ones, started with so many iterations at a quarter and at a half of the
  resolution each (0: from zero), and then so many at the full one: mean error, and the time of the coarse part.
- *scales* (if it is asked for): streams at one scale, with a number of iterations and of steps of the refinement: mean
  error of their warm pairs, px, and median time from a frame to its field, ms.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from benchmarks.report import Benchmark, Row, print_table
from benchmarks.sequences import CUTS, MOTIONS, EncodedPair, ImageSequence, add_inputs, every_sequence, stream
from deq_flow_ros.equilibrium import solve
from deq_flow_ros.model import DEQFlow, load_model
from training.evaluate import pair_errors
from training.flow_dataset import Sample, open_pairs

SETTLED = 36
LIMITS = (
    *((cap, None) for cap in (1, 2, 3, 4, 6, 8, 12, 24)),
    (12, 0.2), (12, 0.1), (12, 0.05), (12, 0.02), (6, 0.1), (8, 0.1), (8, 0.05),
)  # fmt: skip
"""(limit of iterations, tolerance in px or None) of warm pairs."""
COARSE, FINE = (0, 1, 2, 3, 4, 6, 8), (1, 2, 4, 6, 8, 12, 24)
"""Numbers of iterations of cold pairs, at each smaller resolution and at the full one."""
SCALES, ITERATIONS = (1.5, 1.25, 1.0, 0.75, 0.5, 0.375, 0.25), (1, 2, 4, 8)
TABLES = ("warm", "cold", "scales")


def errors(model: DEQFlow, sequences: Sequence[ImageSequence], scale: float = 1.0, **settings: Any) -> pd.DataFrame:
    """A row for each measured pair of streams at one scale: group, error (px), time (ms), iterations, started warm."""
    rows = []
    for sequence in sequences:
        results = stream(model, sequence.frames, min_scale=scale, max_scale=scale, **settings)[1:]
        for pair, result in [(sequence.pairs[place], results[place]) for place in sequence.measured]:
            if result is not None:
                error, info = pair_errors(pair, result.flow)[0], result.info
                rows.append((sequence.group, error, info.latency_ms, info.iterations, info.warm))
    return pd.DataFrame(rows, columns=["group", "epe_px", "ms", "iterations", "warm"])


def with_settled(model: DEQFlow, sequence: ImageSequence) -> ImageSequence:
    """The sequence; if it has no truth, with the flow after ``SETTLED`` iterations per pair in its place."""
    if sequence.pairs[0].flow is not None:
        return sequence
    results, pairs = stream(model, sequence.frames, max_iterations=SETTLED)[1:], []
    for pair, result in zip(sequence.pairs, results, strict=True):
        flow = np.zeros((*pair.valid.shape, 2), np.float32) if result is None else result.flow
        pairs.append(replace(pair, flow=flow, valid=np.full_like(pair.valid, True)))
    return replace(sequence, pairs=pairs)


def warm_rows(model: DEQFlow, sequences: Sequence[ImageSequence]) -> Iterator[Row]:
    """Mean error (px) and number of iterations of each group of sequences, by limit and tolerance."""
    for cap, tolerance_px in LIMITS:
        found = errors(model, sequences, max_iterations=cap, tolerance_px=tolerance_px)
        means = found.groupby("group", sort=False)[["epe_px", "iterations"]].mean()
        yield {"cap": cap, "tolerance_px": tolerance_px, "groups": means.to_dict("index")}


def scale_rows(model: DEQFlow, sequences: Sequence[ImageSequence], refinements: Sequence[int]) -> Iterator[Row]:
    """Mean error (px) and median time (ms) of the warm pairs of each group, by scale, refinement and iterations."""
    for scale, steps in product(SCALES, refinements):
        row: Row = {"scale": scale, "refinement": steps, "groups": {}}
        for iterations in ITERATIONS:
            found = errors(model, sequences, scale, max_iterations=iterations, refinement=steps)
            for group, some in found[found.warm].groupby("group", sort=False):
                figures = {"epe_px": some.epe_px.mean(), "ms": some.ms.median()}
                row["groups"].setdefault(group, {})[iterations] = figures
        yield row


@torch.inference_mode()
def cold_rows(model: DEQFlow, pairs: Sequence[tuple[str, Sample]], listed_groups: Sequence[str]) -> list[Row]:
    """Mean error (px) by the number of fine iterations, and the median time of the coarse ones in ms, by group and
    number of coarse iterations; then the means over the groups of the list.
    """
    rows: list[Row] = []
    for group, sample in pairs:
        pair = EncodedPair(model, sample)
        for coarse in COARSE:
            began = time.perf_counter()
            start = pair.coarse(coarse) if coarse else pair.zero()
            ms = 1e3 * (time.perf_counter() - began)
            found = solve(pair.problem, start, solver="picard", max_iterations=FINE[-1], keep=FINE).trajectory
            errors_px = {str(n): pair.error(found[n]) for n in FINE}
            rows.append({"group": group, "coarse": coarse, "ms": ms, **errors_px})
    every = pd.DataFrame(rows)
    means = every.groupby(["group", "coarse"], sort=False).mean()
    means["ms"] = every.groupby("coarse").ms.median().reindex(means.index, level="coarse")
    if listed_groups:
        of_list = means.loc[list(listed_groups)].groupby("coarse").mean()
        means = pd.concat([means, pd.concat({"mean of the list": of_list}, names=["group"])])
    return means.reset_index().to_dict("records")


def measure(options: argparse.Namespace, console: Console) -> Row:
    """Make the tables that are asked for."""
    model = load_model(options.model, options.device)
    figures: Row = {}
    sequences = [with_settled(model, sequence) for sequence in every_sequence(options, 5) if sequence.group != CUTS]
    if "warm" in options.only:
        figures["warm"] = list(warm_rows(model, sequences))
        columns = {"at most": "{cap}", "tolerance, px": "{tolerance_px}"}
        for group in figures["warm"][0]["groups"]:
            columns[group] = f"{{groups[{group}][epe_px]:.3f}} ({{groups[{group}][iterations]:.1f}})"
        print_table(console, "warm pairs: error, px (iterations made)", columns, figures["warm"], names=2)
    if "cold" in options.only:
        groups = open_pairs(options.pairs) if options.pairs else []
        pairs = [(group.name, group[i]) for group in groups for i in range(len(group))[: options.first]]
        pairs += [(some.group, pair) for some in sequences if some.group in MOTIONS for pair in some.pairs[:2]]
        figures["cold"] = cold_rows(model, pairs, [group.name for group in groups])
        columns = {"group": "{group}", "coarse": "{coarse}", "ms": "{ms:.0f}"}
        for row in figures["cold"]:
            row["epe_px"] = {n: row.pop(str(n)) for n in FINE}
        columns |= {str(n): f"{{epe_px[{n}]:.3f}}" for n in FINE}
        print_table(console, "cold pairs: error, px, by fine iterations", columns, figures["cold"], names=2)
    if "scales" in options.only:
        figures["scales"] = list(scale_rows(model, sequences, options.refinement))
        for group in figures["scales"][0]["groups"]:
            columns = {"scale": "{scale:g}", "refinement": "{refinement}"}
            for n in ITERATIONS:
                columns[str(n)] = f"{{groups[{group}][{n}][epe_px]:.2f}} {{groups[{group}][{n}][ms]:4.0f}}"
            title = f"{group}: error of warm pairs, px, and ms from frame to field, by iterations"
            print_table(console, title, columns, figures["scales"], names=2)
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__)
    add_inputs(line, frames=8, size=(480, 640))
    line.add_number("--first", None, "so many cold pairs of each group of the list (default: all)", least=1, kind=int)
    line.add_number("--clips", 2, "generated sequences of each motion", least=1)
    line.add_argument("--only", choices=TABLES, nargs="+", default=TABLES[:2], help="tables to make")
    line.add_number("--refinement", [0], "for scales: steps of the refinement", least=0, nargs="+")
    line.add_model()
    return line.run(line.parse_args(arguments), measure)


if __name__ == "__main__":
    raise SystemExit(main())
