# SPDX-License-Identifier: Apache-2.0
"""Endpoint error of the model and of classical methods on image pairs with ground truth, in one run.

``python -m benchmarks.accuracy --pairs pairs.json [--model NAME_OR_PATH] [--dtype TYPE] [--json OUT]``

Every pair starts cold: from zero, and coarse to fine (the iterations shared by the resolution of the images, its half
and its quarter). Times are per pair, the images decoded: median over the pairs. With ``--scale`` the model also runs
on enlarged images, again from a quarter of their own resolution up: its flow lives on cells of 8x8 pixels, and
smaller motion needs finer ones. With ``--dtype`` weights and features are of another type than float32; the mean
distance from the flow in float32 is then printed as well.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.report import write_json
from deq_flow_ros.evaluation.methods import FlowFunction, dense_inverse_search, farneback
from deq_flow_ros.model import DTYPES, DEQFlow, load_model
from training.datasets import Sample
from training.pairs import group_means, model_flow, pair_errors, read_pairs


def zero_flow(image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
    """No motion: what every method has to beat."""
    return np.zeros((*image1.shape[:2], 2), np.float32)


def measure(
    methods: dict[str, FlowFunction], pairs: Sequence[Sample], exact: Mapping[str, FlowFunction] | None = None
) -> dict[str, Any]:
    """Endpoint error (px) and Fl (%) per pair and group, and the median time (ms), of every method.

    :param exact: the same of some of them in float32: "distance_px" is then the mean over the pairs of the mean length
        of the difference, px.
    """
    results: dict[str, Any] = {}
    for name, function in methods.items():
        function(pairs[0].image1, pairs[0].image2)  # the first call pays for allocations and kernel choices
        errors, outliers, times, distances = [], [], [], []
        for pair in pairs:
            start = time.perf_counter()
            flow = function(pair.image1, pair.image2)
            times.append(1e3 * (time.perf_counter() - start))
            epe, fl = pair_errors(pair, flow)
            errors.append((pair, epe))
            outliers.append((pair, fl))
            if exact and name in exact:
                difference = flow - exact[name](pair.image1, pair.image2)
                distances.append(float(np.linalg.norm(difference, axis=2).mean()))
        results[name] = {
            "epe_px": group_means(errors),
            "fl_percent": group_means(outliers),
            "pairs_epe_px": {pair.name: value for pair, value in errors},
            "pairs_fl_percent": {pair.name: value for pair, value in outliers},
            "median_ms": statistics.median(times),
            "distance_px": statistics.fmean(distances) if distances else None,
        }
    return results


def model_methods(label: str, model: DEQFlow, iterations: Sequence[int], scale: float) -> dict[str, FlowFunction]:
    """The model with each number of iterations: from zero, coarse to fine and, unless the scale is 1, enlarged."""
    methods = {f"{label}, {n} from zero": model_flow(model, n) for n in iterations}
    methods |= {f"{label}, {n} coarse to fine": model_flow(model, n, coarse_levels=2) for n in iterations}
    if scale != 1:
        levels = 2 + round(math.log2(max(scale, 1)))
        methods |= {f"{label}, {n} coarse to fine, {scale:g}x": model_flow(model, n, levels, scale) for n in iterations}
    return methods


def print_tables(results: dict[str, Any], console: Console) -> None:
    """Groups first, then every pair."""
    groups = list(next(iter(results.values()))["epe_px"])
    table = Table(title="endpoint error, px (Fl, %); mean = mean over the groups")
    table.add_column("method")
    halved = any(result["distance_px"] is not None for result in results.values())
    for column in [*groups, "median ms", *(["to float32, px"] if halved else [])]:
        table.add_column(column, justify="right")
    for name, result in results.items():
        cells = [f"{result['epe_px'][g]:.3f} ({result['fl_percent'][g]:.1f})" for g in groups]
        cells.append(f"{result['median_ms']:.0f}")
        if result["distance_px"] is not None:
            cells.append(f"{result['distance_px']:.4f}")
        table.add_row(name, *cells)
    console.print(table)
    table = Table(title="endpoint error per pair, px")
    table.add_column("pair")
    for name in results:
        table.add_column(name, justify="right")
    for pair in next(iter(results.values()))["pairs_epe_px"]:
        table.add_row(pair, *(f"{result['pairs_epe_px'][pair]:.3f}" for result in results.values()))
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, required=True, help="list of pairs, see training/pairs.py")
    parser.add_argument("--model", default="nano", help="name or path of weights (default nano)")
    parser.add_argument("--iterations", type=int, nargs="+", default=[12, 24], help="default 12 24")
    parser.add_argument(
        "--scale", type=float, default=2.0, help="also process enlarged so many times (default 2; 1 = do not)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of weights and features (default float32)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch and OpenCV (default: theirs)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything to this file")
    options = parser.parse_args(arguments)
    console = Console() if Console().is_terminal else Console(width=160)  # a file has room for the names
    if options.threads:
        torch.set_num_threads(options.threads)
        cv2.setNumThreads(options.threads)
    try:
        pairs = read_pairs(options.pairs)
        model = load_model(options.model, options.device, precision=options.dtype)
        float32 = None if options.dtype == "float32" else load_model(options.model, options.device)
    except (OSError, ValueError, RuntimeError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    label = Path(options.model).stem
    ours = model_methods(label, model, options.iterations, options.scale)
    exact = None if float32 is None else model_methods(label, float32, options.iterations, options.scale)
    methods: dict[str, FlowFunction] = {
        **ours,
        "zero flow": zero_flow,
        "Farneback": farneback,
        "DIS fast": dense_inverse_search(cv2.DISOPTICAL_FLOW_PRESET_FAST),
        "DIS medium": dense_inverse_search(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM),
    }
    results = measure(methods, pairs, exact)
    print_tables(results, console)
    if options.json:
        figures = {
            "pairs": str(options.pairs), "model": options.model, "dtype": options.dtype, "opencv": cv2.__version__,
            "methods": results,
        }  # fmt: skip
        write_json(options.json, model.device, figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
