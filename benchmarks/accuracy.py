# SPDX-License-Identifier: Apache-2.0
"""Endpoint error of the model and of classical methods on image pairs with ground truth.

``python -m benchmarks.accuracy --pairs pairs.json [--model NAME_OR_PATH] [--dtype TYPE] [--json OUT]``

Every pair starts cold: from zero, and coarse to fine (the iterations shared by the resolution of the images, its half
and its quarter). Times are per pair, the images decoded: median over the pairs. With ``--scale`` the model also runs
on enlarged images, again from a quarter of their own resolution up: its flow lives on cells of 8x8 pixels, and
smaller motion needs finer ones. With ``--dtype`` weights and features are of another type than float32; the mean
distance from the flow in float32 is then printed as well. With ``--refinement`` the coarse-to-fine flows are also
refined at the resolution of the images, in so many steps, as a stream does with the setting of that name.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import cv2
import numpy as np
from rich.console import Console

from benchmarks.peers import OPENCV
from benchmarks.report import Benchmark, Row, print_table
from deq_flow_ros.evaluation.methods import FlowFunction
from deq_flow_ros.imaging.metrics import error_lengths
from deq_flow_ros.model import PRECISIONS, DEQFlow, load_model
from deq_flow_ros.streaming.fields import refined
from training.evaluate import group_means, model_flow, pair_error
from training.flow_dataset import Sample, read_pairs


def measure(function: FlowFunction, pairs: Sequence[Sample], exact: FlowFunction | None = None) -> Row:
    """Endpoint error (px) of a method per pair and group, and its median time (ms).

    :param exact: the method in float32. "distance_px" is the mean length of the difference between the two flows, in
        px, averaged over the pairs.
    """
    function(pairs[0].image1, pairs[0].image2)  # the first call pays for allocations and kernel choices
    errors, times, distances = {}, [], []
    for pair in pairs:
        start = time.perf_counter()
        flow = function(pair.image1, pair.image2)
        times.append(1e3 * (time.perf_counter() - start))
        errors[pair.name] = pair_error(pair, flow)
        if exact is not None:
            distances.append(error_lengths(flow, exact(pair.image1, pair.image2)).mean())
    row: Row = {"epe_px": group_means(errors.items()), "pairs_epe_px": errors, "median_ms": median(times)}
    return row | {"distance_px": float(np.mean(distances)) if distances else None}


def model_methods(label: str, model: DEQFlow, options: argparse.Namespace) -> dict[str, FlowFunction]:
    """The model with each number of iterations: from zero, coarse to fine, and as the options ask enlarged, refined."""
    ways = {"from zero": (0, 1.0), "coarse to fine": (2, 1.0)}
    if options.scale != 1:
        levels = 2 + round(math.log2(max(options.scale, 1)))
        ways[f"coarse to fine, {options.scale:g}x"] = levels, options.scale
    methods = {
        f"{label}, {n} {way}": model_flow(model, n, *settings)
        for way, settings in ways.items()
        for n in options.iterations
    }

    def refining(function: FlowFunction) -> FlowFunction:
        return lambda image1, image2: refined(function(image1, image2), image1, image2, options.refinement)

    fine = {name: function for name, function in methods.items() if "coarse" in name and options.refinement}
    return methods | {f"{name}, refined": refining(function) for name, function in fine.items()}


def run(options: argparse.Namespace, console: Console) -> Row:
    """Measure every method on every pair of the list, and print a table of the groups, then one of all pairs."""
    pairs = read_pairs(options.pairs)
    label = Path(options.model).stem
    methods = model_methods(label, load_model(options.model, options.device, precision=options.dtype), options)
    exact: dict[str, FlowFunction] = {}
    if options.dtype != "float32":
        exact = model_methods(label, load_model(options.model, options.device), options)
    methods |= {"zero flow": lambda image1, image2: np.zeros((*image1.shape[:2], 2), np.float32), **OPENCV}
    results = {name: measure(function, pairs, exact.get(name)) for name, function in methods.items()}
    rows = [{"method": name, **result} for name, result in results.items()]
    columns = {"method": "{method}"}
    columns |= {group: f"{{epe_px[{group}]:.3f}}" for group in rows[0]["epe_px"]}
    columns |= {"median ms": "{median_ms:.0f}", **({"to float32, px": "{distance_px:.4f}"} if exact else {})}
    print_table(console, "endpoint error, px; mean = mean over the groups", columns, rows)
    by_pair = [{"pair": pair.name, **{n: r["pairs_epe_px"][pair.name] for n, r in results.items()}} for pair in pairs]
    columns = {"pair": "{pair}", **{name: f"{{{name}:.3f}}" for name in results}}
    print_table(console, "endpoint error per pair, px", columns, by_pair)
    return {"opencv": cv2.__version__, "methods": results}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__)
    line.add_pairs(required=True)
    line.add_model()
    line.add_number("--iterations", [12, 24], "of each solve", least=1, nargs="+")
    line.add_number("--scale", 2.0, "also process enlarged so many times; 1: do not", above=0)
    line.add_number("--refinement", 0, "steps of a refinement behind the network; 0: none", least=0)
    line.add_precision(PRECISIONS[1:], "--dtype")
    return line.run(line.parse_args(arguments), run)


if __name__ == "__main__":
    raise SystemExit(main())
