# SPDX-License-Identifier: Apache-2.0
"""How right the times to contact are on the rendered drive, whose distances and speeds are known.

    python -m benchmarks.time_to_contact [--frames 180] [--every 3] [--plot docs/figures/time_to_contact.png]

The images are rendered (about half a minute). Every third one is 10 Hz, the rate of config/perception.yaml, with whose
iterations and refinement the flow is computed.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.report import Benchmark, Row, picture, table
from deq_flow_ros.demo.scene import Scene, SceneSettings
from deq_flow_ros.imaging.camera import CameraModel
from deq_flow_ros.model import load_model
from deq_flow_ros.perception.time_to_contact import ContactEstimator, Contacts, ContactSettings
from deq_flow_ros.streaming import FlowEstimator, FlowResult

NEAR_S, FAR_S = 1.0, 5.0
"""True times that are judged."""
FLOW: dict[str, Any] = {"max_iterations": 4, "tolerance_px": None, "refinement": 10, "max_gap_ms": 1e6}
"""As config/perception.yaml has it."""
BANDS = ((0.5, 1.0), (1.0, 2.0), (2.0, 3.0), (3.0, 5.0))


def flow_of_drive(images: dict[int, np.ndarray], model: str, direction: str) -> dict[int, FlowResult]:
    """Flow between neighbours in the order of the frames' numbers, by the frame on whose pixels it lives."""
    scene = SceneSettings()
    estimator = FlowEstimator(load_model(model), uncertainty=True, direction=direction, **FLOW)
    found = {}
    for before, number in pairwise([-1, *images]):
        result = estimator.update(images[number], scene.stamp_ns(number))
        if result is not None:
            found[before if direction == "forward" else number] = result
    return found


def _measured(found: Contacts, truth: np.ndarray) -> list[tuple[float, float, float]]:
    """(true s, told s, confidence) of the regions; the truth (regions, n) is the median over the pixels of each."""
    seconds = 1 / np.maximum(np.median(truth, axis=1), 1e-9)
    return list(zip(seconds, found.seconds.ravel(), found.confidence.ravel(), strict=True))


def measure(options: argparse.Namespace, console: Console) -> Row:
    """Run the drive, compare, and print one table."""
    scene, settings = Scene(SceneSettings()), SceneSettings()
    numbers = range(0, min(options.frames, settings.frames), options.every)
    images = {}
    with console.status("rendering"):
        for number in numbers:
            images[number] = scene.render(number)
    fields = flow_of_drive(images, options.model, "backward")
    middle = (settings.width - 1) / 2, (settings.height - 1) / 2
    camera = CameraModel(scene.focal, scene.focal, *middle, settings.width, settings.height)
    estimator = ContactEstimator((settings.height, settings.width), camera, ContactSettings())
    rows, shown = [], []
    for number, field in fields.items():
        assert field.uncertainty is not None
        found = estimator(field.flow, field.uncertainty, -options.every / settings.fps)
        closing = scene.closing_rate(number)
        rows += _measured(found, estimator.regions(closing)[..., 0])
        shown.append((number, found, closing))
    true, told, confidence = np.array(rows).T
    with np.errstate(invalid="ignore"):
        error = np.abs(told / true - 1)
    known = confidence > 0
    made = table(
        "Time to contact on the rendered drive",
        ["true time"],
        ["regions", "known", "median error", "within 15 %", "bias"],
    )
    figures = {}
    for low, high in (*BANDS, (NEAR_S, FAR_S)):
        band = (true >= low) & (true < high)
        judged = band & known
        row = {
            "regions": int(band.sum()),
            "known": float(judged.sum() / max(band.sum(), 1)),
            "median_error": float(np.median(error[judged])) if judged.any() else float("nan"),
            "within": float(np.mean(error[judged] <= 0.15)) if judged.any() else float("nan"),
            "bias": float(np.median(told[judged] / true[judged]) - 1) if judged.any() else float("nan"),
        }
        figures[f"{low:g} to {high:g} s"] = row
        shares = [f"{row[key]:.1%}" for key in ("known", "median_error", "within", "bias")]
        made.add_row(f"{low:g} to {high:g} s", str(row["regions"]), *shares)
    console.print(made)
    if options.plot:
        _plot(options.plot, images, shown)
    return {"bands": figures}


def _plot(path: Path, images: dict[int, np.ndarray], shown: list[tuple[int, Contacts, np.ndarray]]) -> None:
    number, found, closing = next((each for each in shown if each[0] >= 135), shown[-1])
    height, width = closing.shape
    with picture(path, 9.0, 2.6) as figure:
        axes = figure.subplots(1, 3)
        truth = np.where(closing > 1 / 20, 1 / np.maximum(closing, 1e-9), np.inf)
        for axis, field, title in ((axes[1], found.seconds, "told, s (white: not known)"), (axes[2], truth, "true, s")):
            drawn = axis.imshow(
                field, vmin=0, vmax=FAR_S, cmap="turbo_r", extent=(0, width, height, 0), interpolation="nearest"
            )
            axis.set_title(title)
        axes[0].imshow(images[number])
        axes[0].set_title(f"frame {number} of the drive")
        for axis in axes:
            axis.set_axis_off()
        figure.colorbar(drawn, ax=axes)


def main(args: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    line = Benchmark(__file__, __doc__, device=False, plot="one frame: the image, times told and true times", threads=1)
    line.add_argument("--model", default="nano", help="name or path (default: nano)")
    line.add_number("--frames", 180, "of the drive", least=6, kind=int)
    line.add_number("--every", 3, "take every so-many-th frame", least=1, kind=int)
    options = line.parse_args(args)
    return line.run(options, measure)


if __name__ == "__main__":
    raise SystemExit(main())
