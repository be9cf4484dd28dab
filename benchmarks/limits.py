# SPDX-License-Identifier: Apache-2.0
"""What iterations and scales are worth: what the defaults of the estimator are chosen from.

``python -m benchmarks.limits --pairs pairs.json [--clips 2] [--sequence FRAMES ...] [--only scales] [--json OUT]``

Streams of one setting each: with a limit of iterations per pair and a tolerance at scale 1 (*warm*), or with a scale, a
number of iterations, and steps of the refinement (*scales*). Of the pairs that started warm, the table has the mean
error, px, the mean of the iterations made (in brackets), and the median time from a frame to its field, ms. Of
sequences without a truth, the error is the distance from a stream of 36 iterations per pair.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from benchmarks.report import Benchmark, Row, print_table, watched
from benchmarks.sequences import CUTS, ImageSequence, add_inputs, every_sequence, stream
from deq_flow_ros.model import DEQFlow, load_model
from training.evaluate import pair_error

SETTLED = 36
LIMITS = (
    *((cap, None) for cap in (1, 2, 3, 4, 6, 8, 12, 24)),
    (12, 0.2), (12, 0.1), (12, 0.05), (12, 0.02), (6, 0.1), (8, 0.1), (8, 0.05),
)  # fmt: skip
"""(limit of iterations, tolerance in px or None) of *warm*."""
SCALES, ITERATIONS = (1.5, 1.25, 1.0, 0.75, 0.5, 0.375, 0.25), (1, 2, 4, 8)
TABLES = ("warm", "scales")


def measured(model: DEQFlow, sequences: Sequence[ImageSequence], scale: float, **settings: Any) -> dict[str, Row]:
    """By group of sequences, over the pairs that streams of a setting start warm: error (px), iterations, time (ms)."""
    rows = []
    for sequence in sequences:
        results = stream(model, sequence.frames, min_scale=scale, max_scale=scale, **settings)[1:]
        for pair, result in list(zip(sequence.pairs, results, strict=True))[sequence.first :]:
            if result is not None and result.info.warm:
                error, info = pair_error(pair, result.flow), result.info
                rows.append((sequence.group, error, info.iterations, info.latency_ms))
    every = pd.DataFrame(rows, columns=["group", "epe_px", "iterations", "ms"]).groupby("group", sort=False)
    found: dict[str, Row] = every.agg({"epe_px": "mean", "iterations": "mean", "ms": "median"}).to_dict("index")
    return found


def with_settled(model: DEQFlow, sequence: ImageSequence) -> ImageSequence:
    """The sequence; if it has no truth, with the flow after ``SETTLED`` iterations per pair in its place."""
    if sequence.pairs[0].flow is not None:
        return sequence
    results, pairs = stream(model, sequence.frames, max_iterations=SETTLED)[1:], []
    for pair, result in zip(sequence.pairs, results, strict=True):
        flow = np.zeros((*pair.valid.shape, 2), np.float32) if result is None else result.flow
        pairs.append(replace(pair, flow=flow, valid=np.full_like(pair.valid, True)))
    return replace(sequence, pairs=pairs)


def measure(options: argparse.Namespace, console: Console) -> Row:
    """Run every setting that is asked for, and print the table."""
    model = load_model(options.model, options.device)
    sequences = [with_settled(model, sequence) for sequence in every_sequence(options, 5) if sequence.group != CUTS]
    settings: list[tuple[Any, ...]] = [(1.0, 0, *limit) for limit in LIMITS] if "warm" in options.only else []
    settings += product(SCALES, options.refinement, ITERATIONS, [None]) if "scales" in options.only else []
    names = ("scale", "refinement", "max_iterations", "tolerance_px")
    made = (dict(zip(names, setting, strict=True)) for setting in settings)
    label = "scale {scale:g}, at most {max_iterations} iterations"
    rows = watched(({**each, "groups": measured(model, sequences, **each)} for each in made), console, label)
    columns = {"scale": "{scale:g}", "refinement": "{refinement}", "at most": "{max_iterations}"}
    columns |= {"tolerance, px": "{tolerance_px}"}
    for group in rows[0]["groups"]:
        of = f"groups[{group}]"
        columns[group] = f"{{{of}[epe_px]:.3f}} ({{{of}[iterations]:.1f}}) {{{of}[ms]:4.0f}}"
    print_table(console, "warm pairs: error, px (iterations made), and ms from frame to field", columns, rows, names=4)
    return {"settings": rows}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__)
    add_inputs(line, frames=8, size=(480, 640))
    line.add_number("--clips", 2, "generated sequences of each motion", least=1)
    line.add_argument("--only", choices=TABLES, nargs="+", default=TABLES[:1], help="settings to measure")
    line.add_number("--refinement", [0], "for scales: steps of the refinement", least=0, nargs="+")
    line.add_model()
    return line.run(line.parse_args(arguments), measure)


if __name__ == "__main__":
    raise SystemExit(main())
