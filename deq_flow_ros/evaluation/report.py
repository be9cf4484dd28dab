# SPDX-License-Identifier: Apache-2.0
"""The report of a run: a single HTML file that needs neither a network nor other files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from deq_flow_ros.evaluation import wording
from deq_flow_ros.evaluation.gallery import Gallery, flow_picture, panels
from deq_flow_ros.evaluation.measures import MEASURES
from deq_flow_ros.evaluation.plots import run_plots
from deq_flow_ros.evaluation.summary import SettingEntry
from deq_flow_ros.imaging.colour import flow_to_color
from deq_flow_ros.imaging.pictures import data_uri
from deq_flow_ros.recordings.files import write_text

REPORT, METRICS, FRAMES = "report.html", "metrics.json", "frames.csv"
VIDEO, ANIMATION = "flow.mp4", "flow.webp"
"""Names of the result files."""


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill a template of this package.

    :raises MediaError: if the file cannot be written.
    """
    pages = Environment(
        loader=PackageLoader("deq_flow_ros.evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    pages.filters |= {"number": wording.number, "percent": wording.percent}
    write_text(path, pages.get_template(template).render(**values))


def write_report(
    path: Path, settings: Sequence[SettingEntry], frames: pd.DataFrame, metrics: wording.Metrics,
    galleries: Mapping[str, Gallery],
) -> None:  # fmt: skip
    """Write the HTML file.

    :param settings: the settings, the main one first.
    :param frames: from ``read_frames``.
    :param metrics: from ``summarise``.
    :param galleries: by setting.
    :raises MediaError: if it cannot be written.
    """
    main = metrics["settings"][0]
    error = wording.error_measure(main)
    by_setting = {setting.name: frames[frames.setting == setting.name] for setting in settings}
    stages = {name: values["mean"] for name, values in main["stage_ms"].items() if values["mean"]}
    measured = {name for figures in metrics["settings"] for name in figures["measures"]}
    write_page(
        path, "report.html", metrics=metrics, mode=wording.mode(metrics), settings=settings,
        headline=wording.headline(metrics), comparison=wording.comparison(metrics),
        plots=run_plots(by_setting, main["setting"].get("budget_ms"), error), stages=stages, error=MEASURES[error],
        measures={name: measure for name, measure in MEASURES.items() if name in measured},
        key=data_uri(_colour_wheel()), strips=_strips(settings, galleries),
    )  # fmt: skip


def _strips(settings: Sequence[SettingEntry], galleries: Mapping[str, Gallery]) -> list[dict[str, Any]]:
    """The rows of pictures: best, median and worst pairs of the main setting, and their flow with other settings."""
    main, *others = settings
    gallery, strips = galleries[main.name], []
    for label, index in gallery.ranked():
        preview = gallery.preview(index)
        max_px, shown = panels(preview)
        shown += [
            (f"flow, {other.name}", flow_picture(galleries[other.name].preview(index).flow, max_px))
            for other in others
            if index in galleries[other.name]
        ]
        pictures = [(caption, data_uri(picture)) for caption, picture in shown]
        strips.append({"label": label, "index": index, "error": preview.rank, "pictures": pictures})
    return strips


def _colour_wheel(side: int = 96) -> np.ndarray:
    """The key of the flow colours, (side, side, 3) uint8 RGB: each place has the colour of the vector leading to it."""
    steps = np.linspace(-1, 1, side, dtype=np.float32)
    vectors = np.dstack(np.meshgrid(steps, steps))
    vectors[np.hypot(*np.moveaxis(vectors, 2, 0)) > 1] = 0
    return flow_to_color(vectors, 1.0)
