# SPDX-License-Identifier: Apache-2.0
"""What measures of confidence are worth: does the error go where the pixels do that they call uncertain?

``python -m benchmarks.confidence --pairs pairs.json [--clips N] [--model NAME_OR_PATH] [--plot OUT] [--json OUT]``

Sparsification curves (mean error of the pixels left, the most uncertain taken out first) and AUSE, the area between
such a curve and that by the true error itself, over the mean error: 0 is perfect (Ilg et al., ECCV 2018, arXiv
1802.07095). Measured per pair and averaged over the pairs of a group, of:

- residual: length of the solver's last update, px;
- forward-backward: distance between a pixel and where the flow forth, and from there the flow back, leads, px;
- weak gradient: the image gradient (Sobel), where it is small the pixel counts as uncertain;
- uncertainty: the expected error that the model predicts, px, if its weights have the head for it;
- random: what a measure that knows nothing has.

Every pair starts cold, coarse to fine. Generated clips, which no training has seen, are measured as they are, and once
more with a part of the image without texture, where nothing can be known: the last table says what the measures say
inside of it and outside. Beside that, the calibration: the mean error of the pixels by the error that was expected.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console

from benchmarks.report import Benchmark, Row, grouped, mean, picture, table, watched
from benchmarks.sparsification import sparsify
from deq_flow_ros.imaging.metrics import error_lengths
from deq_flow_ros.model import DEQFlow, load_model
from training.datasets import Sample
from training.generator import HELD_OUT_SEED, ProceduralGenerator
from training.pairs import clip_pairs, read_pairs, to_array, to_tensor

RESIDUAL, FORWARD_BACKWARD, GRADIENT, UNCERTAINTY = "residual", "forward-backward", "weak gradient", "uncertainty"
GENERATED, PLAIN, PAIRS = "generated", "plain area", "pairs"
MADE = GENERATED, PLAIN
COLOURS = {
    "oracle": "#1a202c", UNCERTAINTY: "#2b6cb0", FORWARD_BACKWARD: "#2f855a", RESIDUAL: "#c05621", GRADIENT: "#a0aec0",
}  # fmt: skip
COARSE_LEVELS = 2
PATTERNS = 120
"""Number of procedural textures of the generated clips."""
BINS = np.geomspace(0.02, 64, 25)
"""Edges of the bins of the expected error, in px. Values beyond them are counted in the first and the last bin."""
MIN_SHARE = 0.002
"""Smallest share of the pixels with which a bin of the calibration is shown."""


def generated(clips: int, size: tuple[int, int], textures: str | None) -> Iterator[Sample]:
    """Pairs that no training has seen, each as it is and then with a part of the image without texture.

    :param textures: folder of photographs; None uses procedural textures only.
    """
    generator = ProceduralGenerator(
        *size, frames=2, textures=textures, seed=HELD_OUT_SEED, patterns=PATTERNS,
        max_displacement_px=size[1] / 5,
    )  # fmt: skip
    for number in range(clips):
        pair = clip_pairs(f"{GENERATED}/{number}", generator.clips([number]))[0]
        yield pair
        yield without_texture(replace(pair, name=f"{PLAIN}/{number}"))


def plain_area(size: tuple[int, int]) -> tuple[slice, slice]:
    """The part of an image, (H, W), that ``without_texture`` makes plain: a quarter of it, in the middle."""
    return slice(size[0] // 4, 3 * size[0] // 4), slice(size[1] // 4, 3 * size[1] // 4)


def without_texture(pair: Sample) -> Sample:
    """The pair with the middle of both images in one colour. Its true flow stays as it is."""
    area = plain_area(pair.image1.shape[:2])
    colour = pair.image1[area].mean((0, 1)).round().astype(np.uint8)
    image1, image2 = pair.image1.copy(), pair.image2.copy()
    image1[area] = image2[area] = colour
    return replace(pair, image1=image1, image2=image2)


def forward_backward(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """(H, W) px: how far from each pixel the forward flow, (H, W, 2) px, followed by the backward flow ends.

    Where the forward flow leads outside the image, the backward flow is that of the nearest pixel at the border.
    """
    y, x = np.mgrid[: forward.shape[0], : forward.shape[1]].astype(np.float32)
    there = cv2.remap(
        backward, x + forward[..., 0], y + forward[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return np.asarray(np.linalg.norm(forward + there, axis=2))


def gradient_strength(image: np.ndarray) -> np.ndarray:
    """(H, W): the length of the gradient of the grey values of an (H, W, 3) image."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))


def measure(model: DEQFlow, pair: Sample, iterations: int) -> Row:
    """Error, curves and AUSE of every measure on one pair, and the sums for the calibration."""
    assert pair.flow is not None
    image1, image2 = (to_tensor(image, model.device) for image in (pair.image1, pair.image2))
    forth = model(image1, image2, max_iterations=iterations, coarse_levels=COARSE_LEVELS)
    back = model(image2, image1, max_iterations=iterations, coarse_levels=COARSE_LEVELS)
    flow = to_array(forth.flow)
    uncertain = {
        RESIDUAL: forth.residual[0, 0].cpu().numpy(),
        FORWARD_BACKWARD: forward_backward(flow, to_array(back.flow)),
        GRADIENT: -gradient_strength(pair.image1),
    }
    if forth.uncertainty is not None:
        uncertain[UNCERTAINTY] = forth.uncertainty[0, 0].cpu().numpy()
    error = error_lengths(flow, pair.flow)
    curves = {name: sparsify(error[pair.valid], values[pair.valid]) for name, values in uncertain.items()}
    any_one = next(iter(curves.values()))
    group = pair.name.split("/", 1)[0]
    row: Row = {
        "pair": pair.name, "group": group, "epe_px": float(error[pair.valid].mean()),
        "ause": {name: curve.ause for name, curve in curves.items()} | {"random": any_one.random},
        "curves": {name: curve.curve.tolist() for name, curve in curves.items()} | {"oracle": any_one.oracle.tolist()},
    }  # fmt: skip
    if UNCERTAINTY in uncertain:
        expected = uncertain[UNCERTAINTY][pair.valid]
        row |= {"expected_px": float(expected.mean()), "bins": _binned(expected, error[pair.valid])}
    if group == PLAIN:
        inside = np.zeros_like(pair.valid)
        inside[plain_area(pair.image1.shape[:2])] = True
        shown = {"error": error, **uncertain, GRADIENT: gradient_strength(pair.image1)}
        row["areas"] = {
            name: [float(values[pair.valid & area].mean()) for area in (inside, ~inside)]
            for name, values in shown.items()
        }
    return row


def _binned(expected: np.ndarray, error: np.ndarray) -> dict[str, list[float]]:
    """For each bin of the expected error: its share of the pixels, and the mean expected and true error times this
    share.
    """
    place = np.digitize(expected, BINS[1:-1])
    count = len(BINS) - 1
    sums = {"share": None, "expected_px": expected, "error_px": error}
    return {name: (np.bincount(place, w, count) / len(place)).tolist() for name, w in sums.items()}


def means(rows: Sequence[Row], made: Collection[str] = MADE) -> dict[str, Row]:
    """The means of each group over its pairs, and, as ``pairs``, the mean over the groups of the list."""
    summary = {}
    for group, some in grouped(rows, "group").items():
        summary[group] = _means(some)
        if "areas" in some[0]:  # medians: one pair whose motion was not found at all would be all that is seen
            areas = {name: np.median([row["areas"][name] for row in some], 0).tolist() for name in some[0]["areas"]}
            summary[group]["areas"] = areas
    listed = [entry for group, entry in summary.items() if group not in made]
    if listed:
        summary[PAIRS] = {**_means(listed), "pairs": sum(entry["pairs"] for entry in listed)}
    return summary


def _means(some: Sequence[Row]) -> Row:
    figures: Row = {what: mean(row[what] for row in some) for what in ("epe_px", "expected_px") if what in some[0]}
    curves = {
        what: {name: np.mean([row[what][name] for row in some], 0).tolist() for name in some[0][what]}
        for what in ("ause", "curves")
    }
    return {"pairs": len(some), **figures, **curves}


def calibration(rows: Sequence[Row], made: Sequence[str] = MADE) -> dict[str, dict[str, list[float]]]:
    """The mean true error by the mean expected error in each bin, for the listed pairs and for the first kind of
    generated ones.

    Every pair has the same weight, whatever its number of pixels. Bins with hardly any pixels are left out.
    """
    kinds = {PAIRS: [row for row in rows if row["group"] not in made]}
    kinds[made[0]] = [row for row in rows if row["group"] == made[0]]
    curves = {}
    for kind, some in kinds.items():
        if some and "bins" in some[0]:
            names = ("share", "expected_px", "error_px")
            share, expected, error = (np.mean([row["bins"][name] for row in some], 0) for name in names)
            shown = share >= MIN_SHARE
            parts = share[shown], expected[shown] / share[shown], error[shown] / share[shown]
            curves[kind] = {name: part.tolist() for name, part in zip(names, parts, strict=True)}
    return curves


def print_tables(
    rows: Sequence[Row], summary: dict[str, Row], curve: dict[str, dict[str, list[float]]], console: Console
) -> None:
    """Print the AUSE by group and by pair, what the measures say about a plain area, and the calibration."""
    columns = list(rows[0]["ause"])
    title = "AUSE, over the mean error; 0 is perfect; px: mean error, and the expected one"
    ause = table(title, ["pairs"], ["error, px", "expected", *columns])

    def add(label: str, entry: Row) -> None:
        expected = f"{entry['expected_px']:.2f}" if "expected_px" in entry else "-"
        ause.add_row(label, f"{entry['epe_px']:.2f}", expected, *(f"{entry['ause'][c]:.3f}" for c in columns))

    for name, entry in summary.items():
        add(f"{name} ({entry['pairs']})", entry)
    ause.add_section()
    for row in rows:
        add(row["pair"], row)
    console.print(ause)
    for name, entry in summary.items():
        if "areas" in entry:
            title = f"{name}: mean inside of the area without texture, and outside, median over the pairs"
            areas = table(title, [""], entry["areas"])
            for place, where in enumerate(("inside", "outside")):
                areas.add_row(where, *(f"{values[place]:.3f}" for values in entry["areas"].values()))
            console.print(areas)
    for kind, values in curve.items():
        title = f"calibration, {kind}: true error of the pixels by their expected error, px"
        bins = table(title, ["share of pixels"], ["expected", "true"])
        for share, expected, error in zip(*values.values(), strict=True):
            bins.add_row(f"{100 * share:.1f} %", f"{expected:.3f}", f"{error:.3f}")
        console.print(bins)


def plot(summary: dict[str, Row], curve: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw the sparsification curves and the calibration, both for the pairs and for the generated clips."""
    kinds = [kind for kind in (PAIRS, *MADE) if kind in summary]
    count = len(kinds) + bool(curve)
    with picture(path, 3.1 * count + 0.4, 3.5) as figure:
        panels = figure.subplots(1, count, squeeze=False)[0]
        for axes, kind in zip(panels, kinds, strict=False):
            for name, values in summary[kind]["curves"].items():
                share, style = np.arange(len(values)) / len(values), "--" if name == "oracle" else "-"
                axes.plot(100 * share, values, color=COLOURS[name], label=name, linestyle=style)
            axes.set(title=kind, xlabel="pixels taken out, %", ylim=(0, 1.5))
        panels[0].set_ylabel("mean error of those left, 1: of all")
        figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower left", ncols=5)
        if curve:
            axes = panels[-1]
            for kind, colour in zip(curve, ("#2b6cb0", "#c05621"), strict=False):
                axes.loglog(curve[kind]["expected_px"], curve[kind]["error_px"], color=colour, marker=".", label=kind)
            expected = [px for values in curve.values() for px in values["expected_px"]]
            ends = [min(expected), max(expected)]
            axes.loglog(ends, ends, color="#1a202c", linestyle="--", linewidth=0.8)
            axes.set(title="calibration", xlabel="expected error, px", ylabel="true error, px")
            axes.legend(frameon=False)


def run(options: argparse.Namespace, console: Console) -> Row:
    """Measure everything on every pair, and print the tables."""
    model = load_model(options.model, options.device)
    pairs = read_pairs(options.pairs) if options.pairs else []
    made = generated(options.clips, (options.height, options.width), options.textures) if options.clips else ()
    rows = watched((measure(model, pair, options.iterations) for pair in chain(pairs, made)), console, "{pair}")
    summary, curve = means(rows), calibration(rows)
    print_tables(rows, summary, curve, console)
    if model.uncertainty is None:
        console.print(f"{options.model} has no head for the uncertainty: python -m training.train --recipe uncertainty")
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
