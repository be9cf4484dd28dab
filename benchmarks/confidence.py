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
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.console import Console

from benchmarks.confidence_report import calibration, means, plot, print_tables
from benchmarks.report import write_json
from benchmarks.sequences import clip_pairs
from benchmarks.sparsification import sparsify
from deq_flow_ros.model import DEQFlow, load_model
from deq_flow_ros.recordings import MediaError
from training.datasets import Sample
from training.generator import ProceduralGenerator
from training.pairs import read_pairs, to_array, to_tensor
from training.validation import HELD_OUT_SEED

RESIDUAL, FORWARD_BACKWARD, GRADIENT, UNCERTAINTY = "residual", "forward-backward", "weak gradient", "uncertainty"
GENERATED, PLAIN = "generated", "plain area"
COARSE_LEVELS = 2
PATTERNS = 120
"""Different procedural textures of the generated clips."""
BINS = np.geomspace(0.02, 64, 25)
"""Edges of the bins of the expected error, px; what lies beyond is in the first and the last."""


def generated(clips: int, size: tuple[int, int], textures: str | None) -> Iterator[Sample]:
    """Pairs that no training has seen, each as it is and then with a part of it without texture.

    :param textures: folder of photographs; None: procedural textures only.
    """
    generator = ProceduralGenerator(
        *size, batch_size=1, frames=2, textures=textures, seed=HELD_OUT_SEED, patterns=PATTERNS,
        max_displacement_px=size[1] / 5,
    )  # fmt: skip
    for number in range(clips):
        pair = clip_pairs(f"{GENERATED}/{number}", generator.clips([number]))[0]
        yield pair
        yield without_texture(replace(pair, name=f"{PLAIN}/{number}"))


def plain_area(size: tuple[int, int]) -> tuple[slice, slice]:
    """The part of an image, (H, W), that ``without_texture`` makes plain: the middle, a quarter of it."""
    return slice(size[0] // 4, 3 * size[0] // 4), slice(size[1] // 4, 3 * size[1] // 4)


def without_texture(pair: Sample) -> Sample:
    """The pair with the middle of both images in one colour; its true flow is what it was."""
    area = plain_area(pair.image1.shape[:2])
    colour = pair.image1[area].mean((0, 1)).round().astype(np.uint8)
    image1, image2 = pair.image1.copy(), pair.image2.copy()
    image1[area] = image2[area] = colour
    return replace(pair, image1=image1, image2=image2)


def forward_backward(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """(H, W) px: how far from each pixel the flow forth, (H, W, 2) px, and from there the flow back leads.

    Where the flow leads outside, the flow back is that of the nearest pixel at the border.
    """
    y, x = np.mgrid[: forward.shape[0], : forward.shape[1]].astype(np.float32)
    there = cv2.remap(
        backward, x + forward[..., 0], y + forward[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return np.asarray(np.linalg.norm(forward + there, axis=2))


def gradient_strength(image: np.ndarray) -> np.ndarray:
    """(H, W): length of the gradient of the grey values of an (H, W, 3) image."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))


def measure(model: DEQFlow, pair: Sample, iterations: int) -> dict[str, Any]:
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
    error = np.linalg.norm(flow - pair.flow, axis=2)
    curves = {name: sparsify(error[pair.valid], values[pair.valid]) for name, values in uncertain.items()}
    any_one = next(iter(curves.values()))
    group = pair.name.split("/", 1)[0]
    row: dict[str, Any] = {
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
    """Per bin of the expected error: its share of the pixels, and that times the mean expected and mean true error."""
    place = np.digitize(expected, BINS[1:-1])
    count = len(BINS) - 1
    sums = {"share": None, "expected_px": expected, "error_px": error}
    return {name: (np.bincount(place, w, count) / len(place)).tolist() for name, w in sums.items()}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.confidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", type=Path, help="list of pairs with truth, see training/pairs.py")
    parser.add_argument("--clips", type=int, default=16, help="generated clips (default 16; 0: none)")
    parser.add_argument("--textures", help="folder of photographs for them (default: procedural textures only)")
    parser.add_argument("--model", default="nano", help="name or path of weights (default nano)")
    parser.add_argument("--iterations", type=int, default=12, help="of each solve, all levels together (default 12)")
    parser.add_argument("--height", type=int, default=304, help="of the generated clips (default 304)")
    parser.add_argument("--width", type=int, default=432, help="likewise (default 432)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own)")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="write curves and calibration to this picture")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything to this file")
    options = parser.parse_args(arguments)
    for name, least in (("clips", 0), ("iterations", 1), ("height", 64), ("width", 64)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    if not (options.pairs or options.clips):
        parser.error("expected --pairs, or --clips above 0: without them there is nothing to measure")
    console = Console() if Console().is_terminal else Console(width=160)  # a file has room for the names
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        model = load_model(options.model, options.device)
        pairs: list[Sample] = read_pairs(options.pairs) if options.pairs else []
        made = generated(options.clips, (options.height, options.width), options.textures) if options.clips else ()
        rows = []
        with console.status("") as status:
            for pair in (*pairs, *made):
                status.update(pair.name)
                rows.append(measure(model, pair, options.iterations))
    except (OSError, ValueError, RuntimeError, MediaError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    summary = means(rows, (GENERATED, PLAIN))
    curve = calibration(rows, (GENERATED, PLAIN))
    print_tables(rows, summary, curve, console)
    if model.uncertainty is None:
        console.print(f"{options.model} has no head for the uncertainty: python -m training.train --recipe uncertainty")
    if options.plot:
        plot(summary, curve, (GENERATED, PLAIN), options.plot)
    if options.json:
        figures = {"model": options.model, "iterations": options.iterations, "summary": summary, "calibration": curve,
                   "pairs": rows}  # fmt: skip
        write_json(options.json, model.device, figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
