# SPDX-License-Identifier: Apache-2.0
"""How right the times to contact are on the rendered drive, whose distances and speeds are known.

    python -m benchmarks.time_to_contact [--max-scale 2.0] [--plot OUT] [--json OUT]

Every third image is 10 Hz, the rate of config/perception.yaml, with whose iterations and refinement the flow is
computed. The last row leaves out the regions that show more than one surface, or one from near to far: it has those of
whose pixels the middle half has true times within 20 % of the median.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from benchmarks.report import Benchmark, Row, picture, print_table
from benchmarks.sequences import EVERY, camera_of, perception_stream
from deq_flow_ros.demo.scene import Scene, SceneSettings
from deq_flow_ros.model import load_model
from deq_flow_ros.perception.time_to_contact import ContactEstimator, Contacts, ContactSettings

BANDS = ((0.5, 1.0), (1.0, 2.0), (2.0, 3.0), (3.0, 5.0), (1.0, 5.0))
"""True times that are judged, in s."""
ALIKE = 0.2
COLUMNS = {
    "true time": "{band}", "regions": "{regions}", "known": "{known:.1%}", "median error": "{median_error:.1%}",
    "within 15 %": "{within:.1%}", "bias": "{bias:.1%}",
}  # fmt: skip


def _measured(found: Contacts, truth: np.ndarray) -> pd.DataFrame:
    """True s (median of the truth, (regions, n)), told s, confidence, relative interquartile range of the truth."""
    low, median, high = np.percentile(truth, (25, 50, 75), axis=1)
    true, spread = 1 / np.maximum(median, 1e-9), (high - low) / np.maximum(np.abs(median), 1e-9)
    told, confidence = found.seconds.ravel(), found.confidence.ravel()
    return pd.DataFrame({"true": true, "ratio": told / true, "confidence": confidence, "spread": spread})


def measure(options: argparse.Namespace, console: Console) -> Row:
    """Run the drive, compare, and print one table."""
    settings = SceneSettings()
    scene, stream = Scene(settings), perception_stream(load_model(options.model), max_scale=options.max_scale)
    estimator = ContactEstimator((settings.height, settings.width), camera_of(scene), ContactSettings())
    measured, shown = [], []
    for number in range(0, options.frames, EVERY):
        image = scene.render(number)
        field = stream.update(image, settings.stamp_ns(number))
        if field is None or field.uncertainty is None:  # there is none of the first image
            continue
        found = estimator(field.flow, field.uncertainty, -EVERY / settings.fps)
        closing = scene.closing_rate(number)
        measured.append(_measured(found, estimator.regions(closing)[..., 0]))
        shown.append((number, image, found, closing))
    regions, figures = pd.concat(measured), []
    for low, high, alike in (*((*band, np.inf) for band in BANDS), (*BANDS[-1], ALIKE)):
        band = regions[(regions.true >= low) & (regions.true < high) & (regions.spread < alike)]
        judged = band[band.confidence > 0]
        error = (judged.ratio - 1).abs()
        figures.append(
            {
                "band": f"{low:g} to {high:g} s" + (", alike" if alike < np.inf else ""), "regions": len(band),
                "known": len(judged) / max(len(band), 1), "median_error": error.median(),
                "within": (error <= 0.15).mean(), "bias": judged.ratio.median() - 1,
            }
        )  # fmt: skip
    print_table(console, "Time to contact on the rendered drive", COLUMNS, figures)
    if options.plot:
        _plot(options.plot, *next((each for each in shown if each[0] >= 135), shown[-1]))
    return {"bands": figures}


def _plot(path: Path, number: int, image: np.ndarray, found: Contacts, closing: np.ndarray) -> None:
    height, width = closing.shape
    truth = np.where(closing > 1 / 20, 1 / np.maximum(closing, 1e-9), np.inf)
    look = {"vmax": BANDS[-1][1], "cmap": "turbo_r", "extent": (0, width, height, 0), "interpolation": "nearest"}
    with picture(path, 9.0, 2.6) as figure:
        axes = figure.subplots(1, 3)
        axes[0].imshow(image)
        axes[1].imshow(found.seconds, vmin=0, **look)
        figure.colorbar(axes[2].imshow(truth, vmin=0, **look), ax=axes)
        titles = f"frame {number} of the drive", "told, s (white: not known)", "true, s"
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(title)
            axis.set_axis_off()


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    line = Benchmark(__file__, __doc__, device=False, plot="one frame: the image, times told and true times", threads=1)
    line.add_model()
    line.add_number("--frames", 180, "of the drive", least=6, most=180)
    line.add_number("--max-scale", 2.0, "scale of the images that the flow is computed at", least=0.25)
    return line.run(line.parse_args(arguments), measure)


if __name__ == "__main__":
    raise SystemExit(main())
