# SPDX-License-Identifier: Apache-2.0
"""What measures of confidence are worth: whether the pixels that they call uncertain have the errors.

``python -m benchmarks.confidence --pairs pairs.json [--clips N] [--model NAME_OR_PATH] [--plot OUT] [--json OUT]``

Sparsification curves (mean error of the pixels left, the most uncertain taken out first) and AUSE, the area between
such a curve and that by the true error itself, over the mean error: 0 is perfect (Ilg et al., ECCV 2018, arXiv
1802.07095, section 5). Measured per pair and averaged over the pairs of a group, of the solver's residual, the
forward-backward distance, a weak image gradient, and the uncertainty that the model predicts; see docs/confidence.md.

Every pair starts cold, coarse to fine. Generated clips, which no training has seen, are measured as they are, and once
more with a part of the image without texture: the last table says what the measures say inside of it and outside.
Beside that, the calibration: the mean error of the pixels by the error that was expected.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from rich.console import Console

from benchmarks.report import Benchmark, Row, grouped, picture, print_table, watched
from deq_flow_ros.imaging.metrics import error_lengths
from deq_flow_ros.model import DEQFlow, load_model
from training.flow_dataset import Sample, read_pairs, to_array, to_tensor
from training.generator import HELD_OUT_SEED, ProceduralGenerator

RESIDUAL, FORWARD_BACKWARD, GRADIENT, UNCERTAINTY = "residual", "forward-backward", "weak gradient", "uncertainty"
GENERATED, PLAIN, PAIRS = "generated", "plain area", "pairs"
MADE = GENERATED, PLAIN
COLOURS = {
    "oracle": "#1a202c", UNCERTAINTY: "#2b6cb0", FORWARD_BACKWARD: "#2f855a", RESIDUAL: "#c05621", GRADIENT: "#a0aec0",
}  # fmt: skip
COARSE_LEVELS, STEPS = 2, 100
PATTERNS = 120  # procedural textures of the generated clips
BINS = np.geomspace(0.02, 64, 25)
"""Edges of the bins of the expected error, in px. Values beyond them are counted in the first and the last bin."""
MIN_SHARE = 0.002  # of the pixels, with which a bin of the calibration is shown
Curves = dict[str, dict[str, list[float]]]


def generated(clips: int, size: tuple[int, int], textures: str | None) -> Iterator[Sample]:
    """Pairs that no training has seen, each as it is and then with a part of the image without texture."""
    generator = ProceduralGenerator(
        *size, frames=2, textures=textures, seed=HELD_OUT_SEED, patterns=PATTERNS,
        max_displacement_px=size[1] / 5,
    )  # fmt: skip
    for number in range(clips):
        pair = generator.pairs(GENERATED, number)[0]
        yield pair
        yield without_texture(replace(pair, name=f"{PLAIN}/{number}"))


def plain_area(size: tuple[int, int]) -> tuple[slice, slice]:
    """The part of an image, (H, W), that ``without_texture`` makes plain: a quarter of it, in the middle."""
    return slice(size[0] // 4, 3 * size[0] // 4), slice(size[1] // 4, 3 * size[1] // 4)


def without_texture(pair: Sample) -> Sample:
    """The pair with the middle of both images in one colour. Its true flow stays as it is."""
    area, images = plain_area(pair.image1.shape[:2]), (pair.image1.copy(), pair.image2.copy())
    for image in images:
        image[area] = pair.image1[area].mean((0, 1)).round().astype(np.uint8)
    return replace(pair, image1=images[0], image2=images[1])


def forward_backward(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """(H, W) px: how far from each pixel the forward flow, (H, W, 2) px, followed by the backward flow ends."""
    y, x = np.mgrid[: forward.shape[0], : forward.shape[1]].astype(np.float32)
    target = x + forward[..., 0], y + forward[..., 1]
    there = cv2.remap(backward, *target, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(np.linalg.norm(forward + there, axis=2))


def gradient_strength(image: np.ndarray) -> np.ndarray:
    """(H, W): the length of the gradient of the grey values of an (H, W, 3) image."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))


def sparsify(error: np.ndarray, uncertainty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean error of the pixels left when 0, 1/100, ..., 99/100 of them are taken out, over that of all pixels.

    Pixels of equal uncertainty count with their mean error, so that their order in the image does not matter.

    :param error: (N,) endpoint error, px.
    :param uncertainty: (N,) in any unit; NaN counts as the largest.
    :returns: (100,) with the most uncertain pixels taken out first; (100,) by the error itself, the oracle.
    """
    error = error.astype(np.float64)
    by_uncertainty = pd.DataFrame({"error": error, "group": np.where(np.isnan(uncertainty), np.inf, uncertainty)})
    means = by_uncertainty.groupby("group").error.transform("mean").to_numpy()[np.argsort(by_uncertainty.group)]
    left = np.round(len(error) * (1 - np.arange(STEPS) / STEPS)).astype(int)
    sums = (np.cumsum(kept) for kept in (means, np.sort(error)))
    curve, oracle = (some[left - 1] / left / (some[-1] / len(some)) for some in sums)
    return curve, oracle


def measure(model: DEQFlow, pair: Sample, iterations: int) -> Row:
    """Error, curves and AUSE of every measure on one pair, and the sums for the calibration."""
    assert pair.flow is not None
    images = [to_tensor(image, model.device) for image in (pair.image1, pair.image2)]
    forth, back = (model(*i, max_iterations=iterations, coarse_levels=COARSE_LEVELS) for i in (images, images[::-1]))
    assert forth.uncertainty is not None
    flow = to_array(forth.flow)
    uncertain = {
        RESIDUAL: forth.residual[0, 0].cpu().numpy(),
        FORWARD_BACKWARD: forward_backward(flow, to_array(back.flow)),
        GRADIENT: -gradient_strength(pair.image1),
        UNCERTAINTY: forth.uncertainty[0, 0].cpu().numpy(),
    }
    error = error_lengths(flow, pair.flow)
    curves = {}
    for name, values in uncertain.items():
        curves[name], oracle = sparsify(error[pair.valid], values[pair.valid])
    group, expected = pair.name.split("/", 1)[0], uncertain[UNCERTAINTY][pair.valid]
    row: Row = {
        "pair": pair.name, "group": group, "epe_px": float(error[pair.valid].mean()),
        "expected_px": float(expected.mean()), "bins": _binned(expected, error[pair.valid]),
        "ause": {n: float((c - oracle).mean()) for n, c in curves.items()} | {"random": float((1 - oracle).mean())},
        "curves": {name: curve.tolist() for name, curve in curves.items()} | {"oracle": oracle.tolist()},
    }  # fmt: skip
    if group == PLAIN:
        inside = np.zeros_like(pair.valid)
        inside[plain_area(pair.image1.shape[:2])] = True
        shown = {"error": error, **uncertain, GRADIENT: gradient_strength(pair.image1)}
        for where, area in (("inside", inside), ("outside", ~inside)):
            row[where] = {name: float(values[pair.valid & area].mean()) for name, values in shown.items()}
    return row


def _binned(expected: np.ndarray, error: np.ndarray) -> dict[str, list[float]]:
    """By bin of the expected error: its share of the pixels, and mean expected and true error times that share."""
    place, count = np.digitize(expected, BINS[1:-1]), len(BINS) - 1
    sums = {"share": None, "expected_px": expected, "error_px": error}
    return {name: (np.bincount(place, w, count) / len(place)).tolist() for name, w in sums.items()}


def means(rows: Sequence[Row]) -> list[Row]:
    """The means of each group over its pairs, and, as ``pairs``, the mean over the groups of the list."""
    summary = [_means(group, some) for group, some in grouped(rows, "group").items()]
    listed = [entry for entry in summary if entry["group"] not in MADE]
    if listed:
        summary.append({**_means(PAIRS, listed), "pairs": sum(entry["pairs"] for entry in listed)})
    return summary


def _means(group: str, some: Sequence[Row]) -> Row:
    every = pd.DataFrame(list(some))
    return {
        "group": group, "pairs": len(some),
        **{name: float(every[name].mean()) for name in ("epe_px", "expected_px")},
        "ause": pd.DataFrame(list(every.ause)).mean().to_dict(),
        "curves": {name: np.mean([row["curves"][name] for row in some], 0).tolist() for name in some[0]["curves"]},
    }  # fmt: skip


def calibration(rows: Sequence[Row]) -> Curves:
    """Mean true by mean expected error in each bin with enough pixels, of the listed and of the generated pairs.

    Every pair has the same weight.
    """
    kinds = {PAIRS: [row for row in rows if row["group"] not in MADE]}
    kinds[GENERATED] = [row for row in rows if row["group"] == GENERATED]
    curves: Curves = {}
    for kind, some in kinds.items():
        if some:
            bins = pd.DataFrame({name: np.mean([row["bins"][name] for row in some], 0) for name in some[0]["bins"]})
            bins = bins[bins.share >= MIN_SHARE]
            bins[["expected_px", "error_px"]] = bins[["expected_px", "error_px"]].div(bins.share, axis=0)
            curves[kind] = bins.to_dict("list")
    return curves


def print_tables(rows: Sequence[Row], summary: Sequence[Row], curve: Curves, console: Console) -> None:
    """Print the AUSE by group and by pair, what the measures say about a plain area, and the calibration."""
    columns = {"pairs": "{label}", "error, px": "{epe_px:.2f}", "expected": "{expected_px:.2f}"}
    columns |= {name: f"{{ause[{name}]:.3f}}" for name in rows[0]["ause"]}
    labelled = [{**entry, "label": f"{entry['group']} ({entry['pairs']})"} for entry in summary]
    labelled += [{**row, "label": row["pair"]} for row in rows]
    print_table(console, "AUSE, over the mean error; 0 is perfect; px: mean error, and expected", columns, labelled)
    plain = [row for row in rows if row["group"] == PLAIN]
    if plain:  # medians: one pair whose motion was not found at all would be all that is seen
        medians = {where: pd.DataFrame([row[where] for row in plain]).median() for where in ("inside", "outside")}
        columns = {name: f"{{{name}:.3f}}" for name in plain[0]["inside"]}
        title = f"{PLAIN}: mean inside of the area without texture, and outside, median over the pairs"
        areas = ({"area": where, **figures} for where, figures in medians.items())
        print_table(console, title, {"area": "{area}", **columns}, areas)
    for kind, values in curve.items():
        columns = {"share of pixels": "{share:.1%}", "expected": "{expected_px:.3f}", "true": "{error_px:.3f}"}
        title = f"calibration, {kind}: true error of the pixels by their expected error, px"
        print_table(console, title, columns, pd.DataFrame(values).to_dict("records"))


def plot(summary: Sequence[Row], curve: Curves, path: Path) -> None:
    """Draw the sparsification curves and the calibration, both for the pairs and for the generated clips."""
    kinds = [entry for kind in (PAIRS, *MADE) for entry in summary if entry["group"] == kind]
    with picture(path, 3.1 * len(kinds) + 3.5, 3.5) as figure:
        *panels, last = figure.subplots(1, len(kinds) + 1)
        for axes, entry in zip(panels, kinds, strict=True):
            for name, values in entry["curves"].items():
                share, style = np.arange(len(values)) / len(values), "--" if name == "oracle" else "-"
                axes.plot(100 * share, values, color=COLOURS[name], label=name, linestyle=style)
            axes.set(title=entry["group"], xlabel="pixels taken out, %", ylim=(0, 1.5))
        panels[0].set_ylabel("mean error of those left, 1: of all")
        figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower left", ncols=5)
        for kind, colour in zip(curve, ("#2b6cb0", "#c05621"), strict=False):
            last.loglog(curve[kind]["expected_px"], curve[kind]["error_px"], color=colour, marker=".", label=kind)
        expected = [px for values in curve.values() for px in values["expected_px"]]
        ends = [min(expected), max(expected)]
        last.loglog(ends, ends, color="#1a202c", linestyle="--", linewidth=0.8)
        last.set(title="calibration", xlabel="expected error, px", ylabel="true error, px")
        last.legend(frameon=False)


def run(options: argparse.Namespace, console: Console) -> Row:
    """Measure everything on every pair, and print the tables."""
    model = load_model(options.model, options.device)
    if model.uncertainty is None:
        command = "python -m training.train --recipe uncertainty"
        raise ValueError(f"{options.model} has no head for the uncertainty; train one: {command}")
    pairs = read_pairs(options.pairs) if options.pairs else []
    made = generated(options.clips, (options.height, options.width), options.textures) if options.clips else ()
    rows = watched((measure(model, pair, options.iterations) for pair in chain(pairs, made)), console, "{pair}")
    summary, curve = means(rows), calibration(rows)
    print_tables(rows, summary, curve, console)
    if options.plot:
        plot(summary, curve, options.plot)
    return {"iterations": options.iterations, "summary": summary, "calibration": curve, "pairs": rows}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__, plot="curves and calibration")
    line.add_pairs()
    line.add_number("--clips", 16, "generated clips; 0: none", least=0)
    line.add_argument("--textures", help="folder of photographs for them (default: procedural textures only)")
    line.add_model()
    line.add_number("--iterations", 12, "of each solve, all levels together", least=1)
    line.add_size(304, 432, "of the generated clips")
    options = line.parse_args(arguments)
    if not (options.pairs or options.clips):
        line.error("expected --pairs, or --clips above 0: without them there is nothing to measure")
    return line.run(options, run)


if __name__ == "__main__":
    raise SystemExit(main())
